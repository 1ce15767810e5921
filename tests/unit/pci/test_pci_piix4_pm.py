"""The power management function: its two blocks where the guest puts them, ACPI mode by command, an empty SMBus."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pci_bench import COMMAND, IO, PM, Board

PMBASE, DEVACTB, PMREGMISC, SMBBA, SMBHSTCFG = 0x40, 0x58, 0x80, 0x90, 0xD2
APMC = 0xB2
SMBUS = 0x700
STATUS, CONTROL, ADDRESS = SMBUS, SMBUS + 2, SMBUS + 4
START, KILL, DEV_ERR, FAILED, BUSY = 0x40, 0x02, 0x04, 0x10, 0x01


@pytest.fixture
def board() -> Board:
    return Board()


def test_power_on(board: Board) -> None:
    assert board.get(PM, 0) == 0x7113_8086
    assert board.get(PM, 4) == 0x0280_0000
    assert board.get(PM, 8) == 0x0680_0003
    assert board.get(PM, 0x3C) == 0x0000_0100
    assert board.get(PM, PMBASE) == 1
    assert board.get(PM, DEVACTB + 3, 1) == 0x02  # SeaBIOS: leave SMM alone
    assert board.mapped() == {}


def test_the_acpi_block_moves(board: Board) -> None:
    board.set(PM, PMBASE, 0x0601)
    assert board.pio.read(0x608, 4) == 0xFFFF_FFFF
    board.set(PM, PMREGMISC, 1, 1)
    assert board.pio.read(0x600, 4) == 0  # status and enable
    assert board.pio.read(0x60C, 4) == 0xFFFF_FFFF
    board.set(PM, PMBASE, 0xFFFF_FFFF)
    assert board.get(PM, PMBASE) == 0xFFC1
    assert board.mapped() == {"acpi_pm": 0xFFC0}
    board.set(PM, PMBASE, 0)
    assert board.mapped() == {}
    board.set(PM, PMBASE, 0xB000)
    assert board.mapped() == {"acpi_pm": 0xB000}
    board.pm.reset()
    assert board.mapped() == {}
    assert board.get(PM, PMBASE) == 1


def test_acpi_mode_by_command(board: Board) -> None:
    board.pm.post_firmware(0x600, 0x700, 9)
    pio = board.pio
    assert pio.read(0x604, 2) == 0
    pio.write(APMC, 1, 0xF1)
    assert pio.read(0x604, 2) == 1
    assert pio.read(APMC, 1) == 0xF1
    pio.write(APMC, 1, 0x5A)
    assert pio.read(0x604, 2) == 1
    pio.write(APMC, 1, 0xF0)
    assert pio.read(0x604, 2) == 0
    pio.write(APMC, 2, 0x12F1)
    assert pio.read(0x604, 2) == 1
    assert pio.read(APMC + 1, 1) == 0x12
    board.reset()
    assert (pio.read(APMC, 2), pio.read(0x604, 2)) == (0, 0xFFFF)


def test_events_make_an_sci_in_acpi_mode_only(board: Board) -> None:
    board.pm.post_firmware(0x600, 0x700, 9)
    board.pio.write(0x602, 2, 0x0100)
    board.acpi.press()
    assert board.sci.level == 0
    board.pio.write(APMC, 1, 0xF1)
    assert board.sci.level == 1
    board.pio.write(APMC, 1, 0xF0)
    assert board.sci.level == 0


def test_the_smbus_host_needs_all_three_switches(board: Board) -> None:
    for register, value, size in ((SMBBA, 0x0701, 4), (SMBHSTCFG, 1, 1), (COMMAND, IO, 2)):
        assert board.mapped() == {}
        board.set(PM, register, value, size)
    assert board.mapped() == {"smbus": SMBUS}
    board.set(PM, SMBHSTCFG, 0, 1)
    assert board.mapped() == {}


@pytest.mark.parametrize("protocol", range(8))
def test_a_transfer_on_the_empty_smbus_ends_at_once(board: Board, protocol: int) -> None:
    # As i2c-piix4 drives it: clear what is left, start, poll busy, look at the result.
    board.pm.post_firmware(0x600, 0x700, 9)
    pio = board.pio
    for address in (0xA0, 0xA1, 0x10):
        assert pio.read(STATUS, 1) == 0
        pio.write(ADDRESS, 1, address)
        pio.write(CONTROL, 1, protocol << 2)
        pio.write(CONTROL, 1, pio.read(CONTROL, 1) | START)
        assert pio.read(STATUS, 1) == DEV_ERR
        assert pio.read(CONTROL, 1) == protocol << 2
        pio.write(STATUS, 1, pio.read(STATUS, 1))
    pio.write(CONTROL, 1, KILL)
    assert pio.read(STATUS, 1) == FAILED


@given(st.lists(st.tuples(st.integers(0, 15), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFF_FFFF))))
def test_the_smbus_host_is_never_busy(writes: list[tuple[int, int, int]]) -> None:
    board = Board()
    board.pm.post_firmware(0x600, 0x700, 9)
    for offset, size, value in writes:
        board.pio.write(SMBUS + offset, size, value & (1 << 8 * size) - 1)
        assert not board.pio.read(STATUS, 1) & (BUSY | ~0x1F)
        assert not board.pio.read(CONTROL, 1) & START


def test_save_and_load(board: Board) -> None:
    board.pm.post_firmware(0x600, 0x700, 9)
    board.pio.write(APMC, 2, 0x12F1)
    board.pio.write(ADDRESS, 1, 0xA0)
    board.pio.write(CONTROL, 1, START)
    other = Board()
    other.load(board.save())
    assert other.config(PM) == board.config(PM)
    assert other.mapped() == {"acpi_pm": 0x600, "smbus": SMBUS}
    for port, size in ((APMC, 2), (ADDRESS, 1), (STATUS, 1), (0x604, 2)):
        assert other.pio.read(port, size) == board.pio.read(port, size) != 0
