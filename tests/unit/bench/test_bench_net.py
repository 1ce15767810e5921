"""``pyvmm bench net``: its guest assembles, both sides agree on where things are, and frames are what they say."""

from __future__ import annotations

import re

from pyvmm_benchmarks import exit_guests, mailbox, net, net_cases

MAC, ADDRESS = bytes.fromhex("020000000101"), bytes([10, 98, 1, 1])


def defined() -> dict[str, str]:
    text = net_cases.SOURCE.read_text()
    return {name: value.strip() for name, value in re.findall(r"^\s+\.set\s+(\w+),\s+([^#\n]+)", text, re.M)}


def offset(value: str) -> int:
    """Of a field of the mailbox."""
    assert value.startswith("MAILBOX + ")
    return int(value.removeprefix("MAILBOX + "), 16)


def test_the_guest_is_a_rom() -> None:
    rom = net_cases.rom()
    assert len(rom) == exit_guests.ROM_BYTES
    assert rom[0xFFF0] == 0xEA


def test_both_sides_agree_on_the_mailbox() -> None:
    there = defined()
    assert int(there["MAILBOX"], 16) == mailbox.MAILBOX
    assert int(there["MAGIC"], 16) == mailbox.MAGIC
    assert offset(there["BOX_TURN"]) == mailbox.TURN
    assert offset(there["BOX_DONE"]) == mailbox.DONE == mailbox.TURN + 4
    plan = ("COUNT", "DEPTH", "SIZE", "TOTAL", "FLAGS")
    assert [offset(there[f"BOX_{name}"]) for name in plan] == [net_cases.PLAN_AT + 4 * n for n in range(5)]
    result = ("TICKS", "BYTES", "BUFFERS", "KICKS", "IRQS")
    assert [offset(there[f"BOX_{name}"]) - net_cases.RESULT_AT for name in result] == [0, 8, 16, 20, 24]
    flags = [int(there[name]) for name in ("RECEIVE", "BY_INTERRUPT", "THERE_AND_BACK")]
    assert flags == [net_cases.RECEIVE, net_cases.BY_INTERRUPT, net_cases.THERE_AND_BACK]
    assert int(there["FRAME"], 16) == net_cases.FRAME_AT


def test_every_case_fits_the_guest_and_its_frame_is_whole() -> None:
    there = defined()
    for case in net_cases.CASES:
        assert case.depth < int(there["QUEUE_SIZE"])
        frame = case.frame(MAC, ADDRESS)
        assert len(frame) == case.frame_bytes
        assert len(case.header) == net_cases.HEADER.size
        assert case.header == bytes(net_cases.HEADER.size) or case.large
        assert frame[6:12] == MAC
        assert net_cases.FRAME_AT + len(case.header) + len(frame) <= int(there["BUFFERS"], 16)
    assert len({case.name for case in net_cases.CASES}) == len(net_cases.CASES)


def test_who_has_the_hosts_address() -> None:
    case = next(case for case in net_cases.CASES if case.name == "arp")
    frame = case.frame(MAC, ADDRESS)
    assert frame[:14] == b"\xff" * 6 + MAC + b"\x08\x06"
    assert frame[22:42] == MAC + bytes([10, 98, 1, 2]) + bytes(6) + ADDRESS


def test_the_reference_is_a_contender() -> None:
    names = [kind.name for kind in net.NetBench().kinds()]
    assert names[0] == net.NetBench().reference
    assert len(set(names)) == len(names)
