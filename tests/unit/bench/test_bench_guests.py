"""The exit guests: they assemble, what boots them is well-formed, and all sides agree on addresses."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from pyvmm.errors import ConfigError
from pyvmm_benchmarks import cases, exit_guests, mailbox
from pyvmm_benchmarks.contenders import exit_contender, loop_child, pyvmm_child

GUESTS = exit_guests.names()


def defined() -> dict[str, int]:
    """The numbers that exits.inc sets."""
    text = (exit_guests.SOURCES / "exits.inc").read_text().replace("MAILBOX +", "0x180000 +")
    found = re.findall(r"^\s+\.set\s+(\w+),\s+(0x[0-9a-f]+)(?: \+ (0x[0-9a-f]+))?", text, re.M)
    return {name: int(value, 16) + int(more or "0", 16) for name, value, more in found}


def test_every_case_has_its_guest_and_every_guest_its_case() -> None:
    assert {case.guest for case in cases.CASES} == set(GUESTS)
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)
    case = cases.find("cpuid")
    assert case is not None and case.guest == "cpuid"
    assert cases.find("no such case") is None


@pytest.mark.parametrize("name", GUESTS)
def test_what_boots_it(name: str) -> None:
    payload = exit_guests.payload(name)
    rom = exit_guests.rom(name)
    assert len(rom) == 0x10000
    assert rom.startswith(payload)
    assert rom[0xFFF0] == 0xEA  # a far jump
    assert rom[0xFFF3:0xFFF5] == bytes([0x00, 0xF0])  # to segment f000
    setup = exit_guests.bzimage(name)
    assert setup[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<H", setup, 0x1FE) == (0xAA55,)
    sectors = setup[0x1F1] + 1
    assert setup[sectors * 512 :].startswith(payload)
    (paragraphs,) = struct.unpack_from("<I", setup, 0x1F4)
    assert len(setup) == sectors * 512 + paragraphs * 16


@pytest.mark.parametrize("pvh", [True, False])
def test_elf(pvh: bool) -> None:
    elf = ELFFile(io.BytesIO(exit_guests.elf("cpuid", pvh=pvh)))
    assert elf.header.e_entry == exit_guests.LOAD
    load = next(segment for segment in elf.iter_segments() if segment.header.p_type == "PT_LOAD")
    assert load.header.p_paddr == exit_guests.LOAD
    assert load.data() == exit_guests.payload("cpuid")
    notes = [note for s in elf.iter_segments() if s.header.p_type == "PT_NOTE" for note in s.iter_notes()]
    entries = [int.from_bytes(note["n_descdata"], "little") for note in notes if note["n_name"] == "Xen"]
    assert entries == ([exit_guests.ENTRY_PROTECTED] if pvh else [])


def test_all_sides_agree_on_addresses() -> None:
    inc = defined()
    assert (inc["LOAD"], inc["MAILBOX"], inc["SAMPLES"]) == (exit_guests.LOAD, mailbox.MAILBOX, mailbox.SAMPLES)
    assert inc["MAGIC"] == mailbox.MAGIC
    for name in ("TURN", "DONE", "WARM_UP", "EXPECTED", "COUNTS"):
        assert inc[f"BOX_{name}"] == mailbox.MAILBOX + getattr(mailbox, name)
    for name in ("DEVICE_PORT", "DEVICE_MMIO", "DOORBELL_PORT", "DOORBELL_MMIO", "NOBODY_PORT", "UART_SCRATCH"):
        assert inc[name] == getattr(cases, name), name
    assert (inc["RTC_INDEX"], inc["IRQ_PORT"]) == (cases.RTC_INDEX, cases.IRQ_PORT)
    for child in (loop_child, pyvmm_child):
        assert (inc["MAILBOX"], inc["SAMPLES"], inc["OTHERS_PORT"]) == (child.MAILBOX, child.SAMPLES, child.OTHERS_PORT)
        for name in ("TURN", "DONE", "WARM_UP", "ANSWER"):
            assert inc[f"BOX_{name}"] == inc["MAILBOX"] + getattr(child, name)
    floor = Path(exit_contender.__file__).with_name("floor.c").read_text()
    assert f"MAILBOX = {inc['MAILBOX']:#x}, SAMPLES = {inc['SAMPLES']:#x}" in floor


def test_no_assembler_and_no_binary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="guest cpuid is not assembled: install GNU as and ld"):
        exit_guests.assembled(tmp_path / "cpuid.S", exit_guests.LOAD)
    (tmp_path / "cpuid.bin").write_bytes(b"as it was packed")
    assert exit_guests.assembled(tmp_path / "cpuid.S", exit_guests.LOAD) == b"as it was packed"


def test_an_assemblers_words_are_passed_on(tmp_path: Path) -> None:
    source = tmp_path / "bad.S"
    source.write_text("nonsense\n")
    with pytest.raises(ConfigError, match="no such instruction: `nonsense'"):
        exit_guests.assemble(source, 0)
