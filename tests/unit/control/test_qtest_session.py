"""The commands of the qtest protocol, each with its reply: on a board of a few devices, with no socket."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.address_space import AddressSpace
from pyvmm.clock import VirtualClock
from pyvmm.control.qtest import COMMANDS, MAX_BYTES, Session
from pyvmm.device import Device
from pyvmm.devices.irq_pins import ControllerPins
from pyvmm.devices.user_irqchip import UserIrqchip
from pyvmm.errors import StateError
from pyvmm.event_loop import EventLoop
from pyvmm.guest_memory import GuestMemory
from pyvmm.memory_map import MemoryMap
from pyvmm.region import LatchRegion

RAM_BYTES = 1 << 20
LATCH_PORT, BROKEN_PORT, WIDE_PORT = 0x70, 0x80, 0x1000
LATCH_GPA = 0xFEB0_0000


class Broken(Device):
    """A device with a mistake in it."""

    def read(self, offset: int, size: int) -> int:
        raise ZeroDivisionError("a device's\nmistake")


class Wide(Device):
    """Tells the size of the access."""

    def read(self, offset: int, size: int) -> int:
        return 0x4433_2211 & (1 << 8 * size) - 1


class Board:
    def __init__(self) -> None:
        self.pio = AddressSpace("pio", 1 << 16)
        self.mmio = AddressSpace("mmio", 1 << 52)
        self.memory = GuestMemory(RAM_BYTES)
        self.memory_map = MemoryMap(self.memory, self.mmio)
        self.clock = VirtualClock(1000)
        self.irqchip = UserIrqchip(self.clock)
        self.irq_controllers: Mapping[str, ControllerPins] = self.irqchip.controllers
        self.pio.add(LATCH_PORT, LatchRegion(4))
        self.pio.map(BROKEN_PORT, 1, Broken())
        self.pio.map(WIDE_PORT, 4, Wide())
        self.mmio.add(LATCH_GPA, LatchRegion(8))


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    yield made
    made.memory.close()


@pytest.fixture
def sent() -> list[str]:
    return []


@pytest.fixture
def session(board: Board, sent: list[str]) -> Session:
    return Session(board, sent.append)


def test_a_board_whose_time_runs_by_itself(sent: list[str]) -> None:
    board = Board()
    loop = EventLoop(lambda error: None)
    board.clock = loop.clock  # type: ignore[assignment]
    with pytest.raises(StateError, match="accel='qtest'"):
        Session(board, sent.append)
    loop.close()
    board.memory.close()


# Ports


def test_ports_in_three_sizes(session: Session) -> None:
    assert session.answer(f"inb {WIDE_PORT}") == "OK 0x0011"
    assert session.answer(f"inw {WIDE_PORT}") == "OK 0x2211"
    assert session.answer(f"inl {WIDE_PORT}") == "OK 0x44332211"


def test_what_is_written_comes_back(session: Session) -> None:
    for command, value, back in (("outb", "0x1a5", "0x00a5"), ("outw", "-1", "0xffff"), ("outl", "0777", "0x01ff")):
        assert session.answer(f"{command} 0x70 {value}") == "OK"
        assert session.answer("inl 0x70") == f"OK {back}"


def test_nobody_reads_as_ones(session: Session) -> None:
    assert session.answer("inb 0x200") == "OK 0x00ff"
    assert session.answer("inl 0x200") == "OK 0xffffffff"


def test_an_access_over_the_last_port(session: Session, board: Board) -> None:
    board.pio.add(0xFFFE, LatchRegion(2))
    assert session.answer("inl 0xffff") == "OK 0xffffff00"
    assert session.answer("outl 0xfffe 0x44332211") == "OK"
    assert session.answer("inw 0xffff") == "OK 0xff22"  # a latch keeps what was written last


@pytest.mark.parametrize("word", ["0x70", "112", "0160", "0X70", "+0x70", "0x0000000000000000000000000000070"])
def test_numbers(session: Session, word: str) -> None:
    session.answer("outb 0x70 0x5a")
    assert session.answer(f"inb {word}") == "OK 0x005a"


@pytest.mark.parametrize("word", ["", "x", "0x", "08", "1_0", "0b1", "0o7", "1.0", "--1", "0x-1", "\u0661", "\t5"])
def test_no_numbers(session: Session, word: str) -> None:
    assert session.answer(f"memset {word} 1 1").startswith("FAIL ADDR ")


@pytest.mark.parametrize("word", ["0x10000", "-1", "70000", "0x1" + 16 * "0", "9" * 5000])
def test_no_ports(session: Session, word: str) -> None:
    for command in ("inb", "inl"):
        assert session.answer(f"{command} {word}").startswith("FAIL ADDR ")
    assert session.answer(f"outw {word} 1").startswith("FAIL ADDR ")


# Memory


def test_memory_in_four_sizes(session: Session) -> None:
    assert session.answer("writeq 0x100 0x123456789abcdef0") == "OK"
    assert session.answer("readb 0x100") == "OK 0x00000000000000f0"
    assert session.answer("readw 0x100") == "OK 0x000000000000def0"
    assert session.answer("readl 0x100") == "OK 0x000000009abcdef0"
    assert session.answer("readq 0x100") == "OK 0x123456789abcdef0"
    assert session.answer("writeb 0x101 0x1ff") == "OK"
    assert session.answer("writew 0x102 -2") == "OK"
    assert session.answer("writel 0x104 7") == "OK"
    assert session.answer("read 0x100 8") == "OK 0xf0fffeff07000000"


def test_mmio(session: Session) -> None:
    assert session.answer(f"writel {LATCH_GPA} 0x55aa") == "OK"
    assert session.answer(f"readl {LATCH_GPA}") == "OK 0x00000000000055aa"
    assert session.answer("readl 0xfec00000") == "OK 0xffffffff".replace("0x", "0x00000000")


def test_bytes(session: Session) -> None:
    assert session.answer("write 0x100 4 0x01020304") == "OK"
    assert session.answer("read 0x100 4") == "OK 0x01020304"
    assert session.answer("write 0x100 4 0X0a0B") == "OK"
    assert session.answer("read 0x100 4") == "OK 0x0a0b0000"
    assert session.answer("write 0x100 2 0xf1f2f3f4") == "OK"
    assert session.answer("read 0x100 4") == "OK 0xf1f20000"
    assert session.answer("write 0x100 2 0x123") == "OK"
    assert session.answer("read 0x100 4") == "OK 0x12000000"
    assert session.answer("write 0x100 0 0x55") == "OK"
    assert session.answer("read 0x100 1") == "OK 0x12"


def test_bytes_in_base64(session: Session) -> None:
    assert session.answer("b64write 0x100 4 AQIDBA==") == "OK"
    assert session.answer("b64read 0x100 4") == "OK AQIDBA=="
    assert session.answer("b64read 0x100 0") == "OK "
    assert session.answer("b64write 0x100 2 /v7+/g==") == "OK"
    assert session.answer("b64write 0x106 9 /w==") == "OK"
    assert session.answer("read 0x100 8") == "OK 0xfefe03040000ff00"


def test_memset(session: Session) -> None:
    assert session.answer("memset 0x100 4 0x155") == "OK"
    assert session.answer("memset 0x200 0 1") == "OK"
    assert session.answer("read 0x100 5") == "OK 0x5555555500"
    assert session.answer("readb 0x200") == "OK 0x0000000000000000"


def test_data_that_is_none(session: Session) -> None:
    for word in ("0x", "1", "12"):
        assert session.answer(f"write 0x100 1 {word}") == "ERR invalid argument size"
    assert session.answer("b64write 0x100 1 A") == "ERR invalid argument size"
    for word in ("0xzz", "1234", "0x12_4", "0x12\u0661"):
        assert session.answer(f"write 0x100 2 {word}").startswith("FAIL DATA ")
    for word in ("!!!!", "AAA", "A\u0661=="):
        assert session.answer(f"b64write 0x100 2 {word}").startswith("FAIL B64_DATA ")
    assert session.answer("read 0x100 0") == "FAIL SIZE is 0"
    assert session.answer("read 0x100 2") == "OK 0x0000"


def test_past_the_end_there_is_nobody(session: Session) -> None:
    assert session.answer(f"write {RAM_BYTES - 2} 4 0x01020304") == "OK"
    assert session.answer(f"read {RAM_BYTES - 2} 4") == "OK 0x0102ffff"
    for address in ((1 << 52) - 4, 1 << 52, (1 << 64) - 4):
        assert session.answer(f"writeq {address} 0") == "OK"
        assert session.answer(f"readq {address}") == "OK 0xffffffffffffffff"
        assert session.answer(f"b64read {address} 3") == "OK ////"
        assert session.answer(f"memset {address} 100 0") == "OK"


def test_more_than_fits(session: Session) -> None:
    for size in (MAX_BYTES + 1, 1 << 63, (1 << 64) - 1):
        for line in ("read 0 {}", "write 0 {} 0x00", "b64read 0 {}", "b64write 0 {} AAAA", "memset 0 {} 1"):
            assert session.answer(line.format(size)).startswith("FAIL SIZE ")


def test_a_large_piece_crosses_chunks(session: Session, board: Board) -> None:
    data = bytes(range(256)) * 4096
    assert session.answer(f"b64write 0 {len(data)} {base64.b64encode(data).decode()}") == "OK"
    assert board.memory.read(0, RAM_BYTES) == data
    reply = session.answer(f"read 1 {RAM_BYTES}")
    assert reply == "OK 0x" + data[1:].hex() + "ff"


def test_a_long_command_is_cut_short_where_the_server_ends(board: Board) -> None:
    over = False
    session = Session(board, print, lambda: over)
    session.answer("writeb 0 5")
    over = True
    assert session.answer("memset 0 16 1") == "OK"
    assert board.memory.read(0, 1) == b"\5"
    board.clock.timer(lambda: None).arm(5000)
    assert session.answer("clock_step") == "OK 1000"


# Time


def test_time_by_steps(session: Session, board: Board) -> None:
    fired: list[int] = []
    for deadline_ns in (1500, 4000):
        board.clock.timer(lambda: fired.append(board.clock.now_ns())).arm(deadline_ns)
    assert session.answer("clock_step 100") == "OK 1100"
    assert session.answer("clock_step") == "OK 1500"
    assert session.answer("clock_step") == "OK 4000"
    assert fired == [1500, 4000]
    assert session.answer("clock_step") == "OK 4000"
    assert session.answer("clock_step 0x10") == "OK 4016"


def test_time_to_a_point(session: Session, board: Board) -> None:
    fired: list[int] = []
    board.clock.timer(lambda: fired.append(board.clock.now_ns())).arm(1500)
    assert session.answer("clock_set 1400") == "OK 1400"
    assert session.answer("clock_set 9000") == "OK 9000"
    assert fired == [1500]


def test_time_does_not_go_back(session: Session) -> None:
    assert session.answer("clock_set 5") == "OK 1000"
    assert session.answer("clock_step -100") == "OK 1000"
    assert session.answer("clock_step 0") == "OK 1000"


def test_time_ends(session: Session) -> None:
    assert session.answer(f"clock_set {1 << 63}").startswith("FAIL NS ")
    assert session.answer(f"clock_step {(1 << 63) - 1}").startswith("FAIL ")
    assert session.answer("clock_step x").startswith("FAIL NS ")
    assert session.answer(f"clock_set {(1 << 63) - 1}") == f"OK {(1 << 63) - 1}"


def test_a_timer_that_is_overdue_runs_at_the_next_step(session: Session, board: Board) -> None:
    fired: list[int] = []
    board.clock.timer(lambda: fired.append(1)).arm(10)
    assert session.answer("clock_step") == "OK 1000"
    assert fired == [1]


# Interrupts


def test_pins_of_the_ioapic(session: Session, board: Board, sent: list[str]) -> None:
    assert session.answer("irq_intercept_in ioapic") == "OK"
    board.irqchip.set(14, 1)
    board.irqchip.set(14, 1)
    board.irqchip.set(0, 1)
    board.irqchip.set(14, 0)
    assert sent == ["IRQ raise 14\n", "IRQ raise 0\n", "IRQ lower 14\n"]
    assert board.irqchip.pic.chips[0].irr  # they still get there


def test_interception_changes_nothing_and_tells_of_changes_only(
    session: Session, board: Board, sent: list[str]
) -> None:
    board.irqchip.set(5, 1)
    session.answer("irq_intercept_in /machine/unattached/ioapic")
    board.irqchip.set(5, 0)  # never told of the rise, nobody misses the fall
    assert sent == []
    board.irqchip.set(5, 1)
    assert sent == ["IRQ raise 5\n"]


def test_the_output_of_the_pic(session: Session, board: Board, sent: list[str]) -> None:
    assert session.answer("irq_intercept_out i8259") == "OK"
    board.irqchip.set(3, 1)
    assert sent == ["IRQ raise 0\n"]
    board.irqchip.acknowledge()
    assert sent[1:] == ["IRQ lower 0\n"]


def test_one_device_can_be_intercepted(session: Session) -> None:
    assert session.answer("irq_intercept_in nothing") == "FAIL Unknown device"
    assert session.answer("irq_intercept_in ioapic") == "OK"
    assert session.answer("irq_intercept_in ioapic") == "OK"
    assert session.answer("irq_intercept_in pic") == "FAIL IRQ intercept already enabled"
    assert session.answer("irq_intercept_in /machine/nothing") == "FAIL Unknown device"


def test_after_the_end_nothing_is_told(session: Session, board: Board, sent: list[str]) -> None:
    session.answer("irq_intercept_in ioapic")
    watch = board.irq_controllers["ioapic"].inputs.watch
    session.close()
    assert watch is not None
    watch(4, 1)  # on its way already
    board.irqchip.set(5, 1)
    assert sent == []
    other = Session(board, sent.append)
    assert other.answer("irq_intercept_in pic") == "OK"


def test_driving_a_pin(session: Session, board: Board, sent: list[str]) -> None:
    session.answer("irq_intercept_in ioapic")
    assert session.answer("set_irq_in ioapic unnamed-gpio-in 23 1") == "OK"
    assert session.answer("set_irq_in ioapic unnamed-gpio-in 23 -1") == "OK"
    assert session.answer("set_irq_in ioapic unnamed-gpio-in 23 0") == "OK"
    assert sent == ["IRQ raise 23\n", "IRQ lower 23\n"]
    for rest in ("unnamed-gpio-in 24 1", "unnamed-gpio-in -1 1", "other 3 1", "unnamed-gpio-in x 1"):
        assert session.answer(f"set_irq_in ioapic {rest}").startswith("FAIL ")
    assert session.answer("set_irq_in ioapic unnamed-gpio-in 3 0x100000000").startswith("FAIL LEVEL ")
    assert session.answer("set_irq_in nothing unnamed-gpio-in 3 1") == "FAIL Unknown device"
    assert len(sent) == 2


# The rest


def test_endianness_and_modules(session: Session) -> None:
    assert session.answer("endianness") == "OK little"
    assert session.answer("module_load hw- display-qxl") == "FAIL"


@pytest.mark.parametrize("line", ["", " ", "  inb 0x70", "foo", "INB 0x70", "inb\t0x70", "rtas a 1 2 3 4"])
def test_unknown_commands(session: Session, line: str) -> None:
    word = line.split(" ")[0]
    assert session.answer(line) == f"FAIL Unknown command '{word}'"


def test_a_very_long_word_is_not_sent_back(session: Session) -> None:
    assert len(session.answer("x" * 1_000_000)) < 200
    assert len(session.answer("inb " + "x" * 1_000_000)) < 200


@pytest.mark.parametrize("command", [name for name, (_, arguments) in COMMANDS.items() if arguments])
def test_too_few_arguments(session: Session, command: str) -> None:
    arguments = COMMANDS[command][1]
    for n in range(len(arguments)):
        line = " ".join([command, *["1"] * n])
        assert session.answer(line) == f"FAIL {command} takes {' '.join(arguments)}"


def test_more_arguments_than_wanted(session: Session) -> None:
    assert session.answer("endianness x") == "OK little"
    assert session.answer("outb 0x70 5 6 7") == "OK"
    assert session.answer("inb 0x70 9") == "OK 0x0005"


def test_a_device_that_raises_is_told_of(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert session.answer(f"inb {BROKEN_PORT}") == "FAIL inb: ZeroDivisionError: a device's mistake"
    assert "in read" in capsys.readouterr().err
    assert session.answer("endianness") == "OK little"


words = st.one_of(
    st.sampled_from(["0", "1", "0x70", "0xfec00010", "-1", "4", "0x55", "AQIDBA==", "ioapic", "unnamed-gpio-in", "99"]),
    st.integers(0, 1 << 65).map(str),
    st.text(st.characters(max_codepoint=255, exclude_characters="\n"), max_size=8),
)
lines = st.builds(
    lambda command, rest: " ".join([command, *rest]), st.one_of(st.sampled_from(sorted(COMMANDS)), words),
    st.lists(words, max_size=4),
)  # fmt: skip


@given(st.lists(lines, max_size=15))
def test_whatever_a_client_says(script: list[str]) -> None:
    board = Board()
    try:
        board.pio.unmap(next(r for r in board.pio.regions if r.base == BROKEN_PORT))
        told: list[str] = []
        session = Session(board, told.append)
        for line in script:
            if line.startswith(("read ", "b64read ", "memset ", "write ")) and len(line.split(" ")) > 2:
                continue  # large ones take long; they have tests of their own
            reply = session.answer(line)
            assert "\n" not in reply
            assert reply.split(" ")[0] in ("OK", "FAIL", "ERR")
            assert "Error" not in reply
    finally:
        board.memory.close()
