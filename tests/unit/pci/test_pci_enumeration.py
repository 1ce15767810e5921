"""The bus as firmware and kernels walk it, and as nobody should: random accesses to all of it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from pci_bench import (
    BAR4,
    CLASS_REVISION,
    COMMAND,
    HEADER,
    HOST,
    IDE,
    INITIAL_LAYOUT,
    IO,
    ISA,
    MASTER,
    MEMORY,
    PM,
    VENDOR,
    Board,
)

SERR = 0x100


def walk(board: Board) -> list[tuple[int, int]]:
    """Every function, by the vendor and by the multifunction bit, as SeaBIOS and Linux find them."""
    found = []
    for slot in range(32):
        for function in range(8):
            if board.get((slot, function), VENDOR, 2) in (0, 0xFFFF):
                if function == 0:
                    break
                continue
            found.append((slot, function))
            if function == 0 and not board.get((slot, 0), HEADER, 1) & 0x80:
                break
    return found


def size_bar(board: Board, where: tuple[int, int], register: int) -> tuple[int, bool]:
    """Bytes (0: none) and whether it is I/O."""
    old = board.get(where, register)
    board.set(where, register, 0xFFFF_FFFF)
    answer = board.get(where, register)
    board.set(where, register, old)
    if answer == 0:
        return 0, False
    mask = ~0x3 if answer & 1 else ~0xF
    return (~(answer & mask) & 0xFFFF_FFFF) + 1, bool(answer & 1)


def test_as_seabios_does_it() -> None:
    board = Board()
    # Shadow: open the BIOS area, copy, make it read-only.
    for register in range(0x5A, 0x60):
        board.set(HOST, register, 0x33, 1)
    board.set(HOST, 0x59, 0x30, 1)
    assert board.layouts[-1] == [(0xA0000, 0x20000, "mmio"), (0xC0000, 0x40000, "ram-rw")]
    # "Moving pm_base to 0x600", before anything else is enumerated.
    board.set(PM, 0x40, 0x0601)
    board.set(PM, 0x80, 0x01, 1)
    board.set(PM, 0x90, 0x0701)
    board.set(PM, 0xD2, 0x09, 1)
    assert board.pio.read(0x608, 4) == 0
    # Probing.
    found = walk(board)
    assert found == [HOST, ISA, IDE, PM]
    classes = [board.get(where, CLASS_REVISION) >> 16 for where in found]
    assert classes == [0x0600, 0x0601, 0x0101, 0x0680]
    bars = {
        (where, n): size_bar(board, where, 0x10 + 4 * n) for where in found for n in range(6)
    }
    assert {key: bar for key, bar in bars.items() if bar != (0, False)} == {(IDE, 4): (16, True)}
    assert [size_bar(board, where, 0x30) for where in found] == [(0, False)] * 4  # no option ROMs
    # "map device bdf=00:01.1 bar 4, addr 0000c000", then each function's own.
    board.set(IDE, BAR4, 0xC000)
    for n, irq in enumerate((10, 10, 11, 11)):
        board.set(ISA, 0x60 + n, irq, 1)
    board.set(IDE, 0x40, 0x8000, 2)
    board.set(IDE, 0x42, 0x8000, 2)
    board.set(PM, 0x3C, 9, 1)
    assert board.get(PM, 0x3D, 1) == 1
    for where in found:
        board.set(where, COMMAND, board.get(where, COMMAND, 2) | IO | MEMORY | SERR, 2)
    assert board.get(PM, 0x58) & 0x0200_0000  # SMM has been set up by somebody
    assert board.mapped() == {
        "acpi_pm": 0x600,
        "smbus": 0x700,
        "ide0.bus_master": 0xC000,
        "ide1.bus_master": 0xC008,
    }
    # Lock the shadow: all but the areas of option ROMs.
    board.set(HOST, 0x5F, 0x11, 1)
    board.set(HOST, 0x59, 0x10, 1)
    assert board.layouts[-1] == [
        (0xA0000, 0x20000, "mmio"),
        (0xC0000, 0x28000, "ram-rw"),
        (0xE8000, 0x18000, "ram-ro"),
    ]


def test_as_linux_does_it_without_firmware() -> None:
    board = Board()
    board.post_firmware()
    assert board.mapped() == {
        "acpi_pm": 0x600,
        "smbus": 0x700,
        "ide0.bus_master": 0xC000,
        "ide1.bus_master": 0xC008,
    }
    found = walk(board)
    assert found == [HOST, ISA, IDE, PM]
    # __pci_read_base, with decoding off meanwhile.
    command = board.get(IDE, COMMAND, 2)
    board.set(IDE, COMMAND, command & ~(IO | MEMORY), 2)
    assert size_bar(board, IDE, BAR4) == (16, True)
    board.set(IDE, COMMAND, command, 2)
    assert board.mapped()["ide1.bus_master"] == 0xC008
    # The quirks: passive release, where the ACPI block and the SMBus are.
    board.set(ISA, 0x82, board.get(ISA, 0x82, 1) | 0x02, 1)
    assert board.get(ISA, 0x82, 1) == 0x02
    assert board.get(PM, 0x40) & 0xFFC0 == 0x600
    assert board.get(PM, 0x90) & 0xFFF0 == 0x700
    # ata_piix: both channels' decoders, timings, bus mastering.
    assert [board.get(IDE, register, 1) & 0x80 for register in (0x41, 0x43)] == [0x80, 0x80]
    board.set(IDE, 0x40, 0xA307, 2)
    assert board.get(IDE, 0x40, 2) == 0xA307
    board.set(IDE, COMMAND, command | MASTER, 2)
    assert [channel.bus_master.enabled for channel in board.channels] == [True, True]
    # BARs for the IDE function's legacy ports are not there: it is in compatibility mode.
    assert board.get(IDE, 0x09, 1) == 0x80
    assert board.get(IDE, 0x3D, 1) == 0


ACCESSES = st.lists(
    st.tuples(
        st.sampled_from([HOST, ISA, IDE, PM, (1, 2), (7, 0)]),
        st.one_of(st.integers(0, 255), st.sampled_from([4, 5, 0x20, 0x21, 0x40, 0x59, 0x60, 0x72, 0x80, 0x90, 0xD2])),
        st.sampled_from([1, 2, 4]),
        st.one_of(st.integers(0, 0xFFFF_FFFF), st.sampled_from([0, 1, 5, 7, 0x601, 0xC001, 0xCF0, 0xFFFF_FFFF])),
    ),
    max_size=60,
)
FIXED = [(where, register) for where in (HOST, ISA, IDE, PM) for register in (0x00, 0x08, 0x2C)]


def taken(board: Board, base: int, size: int) -> bool:
    """Whether another than the bus masters answers in the range."""
    return any(
        r.base is not None and r.base < base + size and base < r.base + r.size and "bus_master" not in r.name
        for r in board.pio.regions
    )


def check(board: Board, fixed: list[int]) -> None:
    """What holds whatever was written."""
    assert [board.get(where, register) for where, register in FIXED] == fixed
    mapped = board.mapped()
    bar = board.get(IDE, BAR4) & ~0xF
    if board.get(IDE, COMMAND, 2) & IO and 0 < bar < 0x10000 and not taken(board, bar, 16):
        assert mapped["ide0.bus_master"] == bar
    if "ide0.bus_master" in mapped:
        assert mapped["ide1.bus_master"] == mapped["ide0.bus_master"] + 8 == bar + 8
    if "acpi_pm" in mapped:
        assert mapped["acpi_pm"] == board.get(PM, 0x40) & 0xFFC0
    if "smbus" in mapped:
        assert mapped["smbus"] == board.get(PM, 0x90) & 0xFFF0
    master = bool(board.get(IDE, COMMAND, 2) & MASTER)
    assert [channel.bus_master.enabled for channel in board.channels] == [master, master]
    if board.layouts:
        assert board.layouts[-1] == board.bridge.segments()


@settings(deadline=None)
@given(ACCESSES)
def test_random_accesses_then_reset(accesses: list[tuple[tuple[int, int], int, int, int]]) -> None:
    board = Board()
    power_on = board.everything()
    fixed = [board.get(where, register) for where, register in FIXED]
    for where, register, size, value in accesses:
        board.set(where, register, value & (1 << 8 * size) - 1, size)
        check(board, fixed)
    board.reset()
    assert board.everything() == power_on
    assert board.bridge.segments() == INITIAL_LAYOUT


@settings(deadline=None)
@given(ACCESSES, ACCESSES)
def test_random_state_is_saved_and_loaded(
    accesses: list[tuple[tuple[int, int], int, int, int]], others: list[tuple[tuple[int, int], int, int, int]]
) -> None:
    board, other = Board(), Board()
    for target, steps in ((board, accesses), (other, others)):
        for where, register, size, value in steps:
            target.set(where, register, value & (1 << 8 * size) - 1, size)
    other.load(board.save())
    assert other.everything() == board.everything()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0xCF6, 0xD02), st.sampled_from([1, 2, 4]), st.booleans(),
                          st.integers(0, 0xFFFF_FFFF)), max_size=80))  # fmt: skip
def test_random_port_accesses(accesses: list[tuple[int, int, bool, int]]) -> None:
    board = Board()
    fixed = [board.get(where, register) for where, register in FIXED]
    for port, size, is_write, value in accesses:
        if is_write:
            board.pio.write(port, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= board.pio.read(port, size) < 1 << 8 * size
    check(board, fixed)
