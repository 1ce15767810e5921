"""``pyvmm bench disk``: its guest assembles, and both sides agree on where things are."""

from __future__ import annotations

import re

from pyvmm_benchmarks import disk, disk_cases, exit_guests, mailbox


def defined() -> dict[str, str]:
    text = disk_cases.SOURCE.read_text()
    return {name: value.strip() for name, value in re.findall(r"^\s+\.set\s+(\w+),\s+([^#\n]+)", text, re.M)}


def offset(value: str) -> int:
    """Of a field of the mailbox."""
    assert value.startswith("MAILBOX + ")
    return int(value.removeprefix("MAILBOX + "), 16)


def test_the_guest_is_a_rom() -> None:
    rom = disk_cases.rom()
    assert len(rom) == exit_guests.ROM_BYTES
    assert rom[0xFFF0] == 0xEA


def test_both_sides_agree_on_the_mailbox() -> None:
    there = defined()
    assert int(there["MAILBOX"], 16) == mailbox.MAILBOX
    assert int(there["MAGIC"], 16) == mailbox.MAGIC
    assert offset(there["BOX_TURN"]) == mailbox.TURN
    assert offset(there["BOX_DONE"]) == mailbox.DONE == mailbox.TURN + 4
    plan = ("COUNT", "DEPTH", "SECTORS", "MASK", "FLAGS")
    assert [offset(there[f"BOX_{name}"]) for name in plan] == [disk_cases.PLAN_AT + 4 * n for n in range(5)]
    result = ("TICKS", "SUM", "ERRORS", "KICKS", "IRQS")
    assert [offset(there[f"BOX_{name}"]) - disk_cases.RESULT_AT for name in result] == [0, 8, 16, 20, 24]
    flags = [int(there[name]) for name in ("RANDOM", "BY_INTERRUPT", "WRITE")]
    assert flags == [disk_cases.RANDOM, disk_cases.BY_INTERRUPT, disk_cases.WRITE]


def test_every_case_fits_the_guest() -> None:
    there = defined()
    slots, slot_bytes = int(there["SLOTS"]), 1 << int(there["SLOT_SHIFT"])
    for case in disk_cases.CASES:
        assert case.depth <= slots
        assert case.size_bytes <= slot_bytes
        places = disk_cases.IMAGE_MIB * (1 << 20) // case.size_bytes
        assert not places & (places - 1)
    buffers = int(there["BUFFERS"], 16)
    assert buffers + slots * slot_bytes <= disk_cases.MEMORY_MIB << 20
    assert len({case.name for case in disk_cases.CASES}) == len(disk_cases.CASES)


def test_the_reference_is_a_contender() -> None:
    names = [kind.name for kind in disk.DiskBench().kinds()]
    assert names[0] == disk.DiskBench().reference
    assert len(set(names)) == len(names)
