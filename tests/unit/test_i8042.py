"""The keyboard controller: what SeaBIOS and Linux do with it, the keyboard's answers, A20 and reset."""

from __future__ import annotations

import pytest

from pyvmm.devices.i8042 import I8042
from pyvmm.errors import StateError
from pyvmm.irq import IrqLine

OBF, SYS, CMD, AUX, TIMEOUT = 0x01, 0x04, 0x08, 0x20, 0x40


class Bench:
    def __init__(self) -> None:
        self.kbd_edges: list[int] = []
        self.resets = 0
        self.a20: list[bool] = []
        self.kbd_irq = IrqLine(self.kbd_edges.append)
        self.aux_irq = IrqLine()
        self.kbc = I8042(self.kbd_irq, self._on_reset, aux_irq=self.aux_irq, on_a20=self.a20.append)

    def _on_reset(self) -> None:
        self.resets += 1

    def status(self) -> int:
        return self.kbc.command.read(0, 1)

    def command(self, value: int, data: int | None = None) -> None:
        self.kbc.command.write(0, 1, value)
        if data is not None:
            self.data(data)

    def data(self, value: int) -> None:
        self.kbc.write(0, 1, value)

    def get(self) -> int:
        return self.kbc.read(0, 1)

    def drain(self) -> list[int]:
        got = []
        while self.status() & OBF:
            got.append(self.get())
        return got


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_power_on(bench: Bench) -> None:
    assert bench.status() == 0x18
    assert bench.drain() == []
    assert bench.get() == 0
    assert bench.kbd_irq.level == 0


def test_status_tells_command_from_data(bench: Bench) -> None:
    bench.command(0x60)
    assert bench.status() & CMD
    bench.data(0x45)
    assert not bench.status() & CMD


def test_self_test_and_interface_tests(bench: Bench) -> None:
    bench.command(0xAA)
    assert bench.status() & OBF
    assert bench.drain() == [0x55]
    assert bench.status() & SYS
    bench.command(0xAB)
    bench.command(0xA9)
    assert bench.drain() == [0, 0]


def test_command_byte_is_read_and_written(bench: Bench) -> None:
    bench.command(0x20)
    assert bench.drain() == [0x03]
    bench.command(0x60, 0x44)
    bench.command(0x20)
    assert bench.drain() == [0x44]
    assert bench.status() & SYS
    bench.command(0x60, 0x40)
    assert not bench.status() & SYS


def test_controller_ram(bench: Bench) -> None:
    bench.command(0x7F, 0xA5)
    bench.command(0x61, 0x5A)
    bench.command(0x3F)
    bench.command(0x21)
    assert bench.drain() == [0xA5, 0x5A]


def test_a_new_command_forgets_the_data_the_last_one_waited_for(bench: Bench) -> None:
    bench.command(0x60)
    bench.command(0xAE)
    bench.data(0xEE)  # goes to the keyboard
    assert bench.drain() == [0xEE]
    bench.command(0x20)
    assert bench.drain() == [0x03]


def test_keyboard_reset(bench: Bench) -> None:
    bench.data(0xFF)
    assert bench.drain() == [0xFA, 0xAA]


@pytest.mark.parametrize(("translate", "identity"), [(False, [0xAB, 0x83]), (True, [0xAB, 0x41])])
def test_keyboard_identifies_itself(bench: Bench, translate: bool, identity: list[int]) -> None:
    bench.command(0x60, 0x41 if translate else 0x01)
    bench.data(0xF2)
    assert bench.drain() == [0xFA, *identity]


def test_leds_and_rate_take_a_parameter(bench: Bench) -> None:
    bench.data(0xED)
    assert bench.drain() == [0xFA]
    bench.data(0x07)
    assert bench.drain() == [0xFA]
    bench.data(0xF3)
    bench.data(0x20)
    assert bench.drain() == [0xFA, 0xFA]
    assert (bench.kbc.keyboard.leds, bench.kbc.keyboard.rate) == (7, 0x20)


def test_command_instead_of_a_parameter_is_a_command(bench: Bench) -> None:
    bench.data(0xED)
    bench.data(0xEE)
    assert bench.drain() == [0xFA, 0xEE]
    assert bench.kbc.keyboard.leds == 0


def test_scanning_on_and_off(bench: Bench) -> None:
    for command, scanning in ((0xF5, False), (0xF4, True), (0xF5, False), (0xF6, True)):
        bench.data(command)
        assert bench.drain() == [0xFA]
        assert bench.kbc.keyboard.scanning is scanning


def test_scan_code_set(bench: Bench) -> None:
    bench.data(0xF0)
    bench.data(3)
    bench.data(0xF0)
    bench.data(0)
    assert bench.drain() == [0xFA, 0xFA, 0xFA, 0xFA, 3]
    bench.data(0xF0)
    bench.data(9)
    assert bench.drain() == [0xFA, 0xFE]
    bench.data(0xF6)
    assert bench.drain() == [0xFA] and bench.kbc.keyboard.scancode_set == 2


@pytest.mark.parametrize(("number", "shown"), [(1, 0x43), (2, 0x41), (3, 0x3F)])
def test_scan_code_set_translated(bench: Bench, number: int, shown: int) -> None:
    bench.command(0x60, 0x41)
    for value in (0xF0, number, 0xF0, 0):
        bench.data(value)
    assert bench.drain() == [0xFA, 0xFA, 0xFA, 0xFA, shown]


def test_key_types_are_acknowledged(bench: Bench) -> None:
    for command in range(0xF7, 0xFB):
        bench.data(command)
    assert bench.drain() == [0xFA] * 4


def test_echo_resend_and_nonsense(bench: Bench) -> None:
    bench.data(0xEE)
    bench.data(0xFE)
    bench.data(0x00)
    assert bench.drain() == [0xEE, 0xEE, 0xFE]


def test_an_interrupt_for_each_byte(bench: Bench) -> None:
    bench.data(0xFF)
    assert bench.kbd_edges == [1]
    assert bench.get() == 0xFA
    assert bench.kbd_edges == [1, 0, 1]
    assert bench.get() == 0xAA
    assert bench.kbd_edges == [1, 0, 1, 0]
    assert bench.get() == 0xAA  # empty: what it held last


def test_interrupt_follows_its_enable_bit(bench: Bench) -> None:
    bench.command(0x60, 0x00)
    bench.data(0xEE)
    assert bench.status() & OBF and bench.kbd_irq.level == 0
    bench.command(0x60, 0x01)
    assert bench.kbd_irq.level == 1
    bench.get()
    assert bench.kbd_irq.level == 0


def test_disabled_keyboard_keeps_its_bytes(bench: Bench) -> None:
    bench.command(0x60, 0x01)
    bench.data(0xFF)
    bench.command(0xAD)
    assert bench.get() == 0xFA  # it was sent already
    assert not bench.status() & OBF
    bench.command(0x20)
    assert bench.drain() == [0x11]  # the controller itself still answers
    bench.command(0xAE)
    assert bench.drain() == [0xAA]


def test_a_byte_for_the_keyboard_enables_it(bench: Bench) -> None:
    bench.command(0xAD)
    bench.data(0xEE)
    assert bench.drain() == [0xEE]


def test_keyboard_queue_is_bounded(bench: Bench) -> None:
    bench.command(0xAD)
    for _ in range(20):
        bench.kbc.keyboard.write(0xEE)
    bench.command(0xAE)
    assert bench.drain() == [0xEE] * 16


# What each of them puts into the output buffer, and the status bits it comes with.
ANSWERED = [
    ((0x20,), 0x03, 0),
    ((0x3F,), 0x00, 0),
    ((0xAA,), 0x55, 0),
    ((0xAB,), 0x00, 0),
    ((0xA9,), 0x00, 0),
    ((0xC0,), 0x80, 0),
    ((0xD0,), 0xCF, 0),
    ((0xD2, 0x42), 0x42, 0),
    ((0xD3, 0x42), 0x42, AUX),
    ((0xD4, 0x42), 0xFE, AUX | TIMEOUT),
]


@pytest.mark.parametrize(("command", "answer", "bits"), ANSWERED)
def test_answers_nobody_reads_are_not_kept(
    bench: Bench, command: tuple[int, ...], answer: int, bits: int
) -> None:
    """One in the output buffer, one that waits for it: QEMU's pckbd.c, kbd_queue."""
    bench.command(*command)
    assert bench.status() & (OBF | AUX | TIMEOUT) == OBF | bits
    for _ in range(1000):
        bench.command(*command)
    first, last = bench.drain()
    assert first == answer
    assert last == (0xDF if command == (0xD0,) else answer)  # the output port shows that the buffer was full
    assert not bench.status() & OBF


def test_the_answer_that_waits_is_the_last_one(bench: Bench) -> None:
    bench.command(0xAA)
    for value in range(100):
        bench.command(0xD2, value)
    assert bench.drain() == [0x55, 99]


def test_an_answer_goes_before_the_keyboards_bytes(bench: Bench) -> None:
    for _ in range(100):
        bench.data(0xEE)
        bench.command(0xAB)
    assert bench.drain() == [0xEE, 0x00, *[0xEE] * 16]


def test_a_saved_state_brings_no_more_than_the_chip_holds(bench: Bench) -> None:
    for _ in range(100):
        bench.data(0xEE)
        bench.command(0xAB)
    state = bench.kbc.save()
    assert len(state["keyboard"]["queue"]) == 16
    bench.kbc.load(state)
    bench.kbc.after_load()
    assert len(bench.drain()) == 2 + 16
    state["keyboard"]["queue"] = [0xEE] * 1000
    with pytest.raises(StateError, match=r"keyboard\.queue has 1000 entries, not 0 to 16"):
        bench.kbc.load(state)


def test_output_port(bench: Bench) -> None:
    bench.command(0xD0)
    assert bench.drain() == [0xCF]
    bench.command(0xD2, 0x42)
    bench.command(0xD0)
    assert bench.drain() == [0x42, 0xCF | 0x10]  # it told that the output buffer was full
    bench.command(0xD3, 0x42)
    bench.command(0xD0)
    assert bench.drain() == [0x42, 0xCF | 0x30]
    bench.command(0xC0)
    assert bench.drain() == [0x80]


def test_a20_by_the_output_port_and_by_command(bench: Bench) -> None:
    bench.command(0xD1, 0xDD)
    bench.command(0xD1, 0xDF)
    bench.command(0xDF)
    bench.command(0xDD)
    bench.command(0xDF)
    assert bench.a20 == [False, True, False, True]
    assert bench.resets == 0


@pytest.mark.parametrize("command", [0xFE, 0xF0, 0xFC])
def test_pulse_of_bit_0_resets(bench: Bench, command: int) -> None:
    bench.command(command)
    assert bench.resets == 1


def test_pulse_of_other_bits_or_none_does_not(bench: Bench) -> None:
    for command in (0xFF, 0xF1, 0xFD):
        bench.command(command)
    assert bench.resets == 0


def test_output_port_bit_0_low_resets(bench: Bench) -> None:
    bench.command(0xD1, 0x02)
    assert bench.resets == 1


def test_auxiliary_port_loops_back(bench: Bench) -> None:
    """As Linux looks for the port: a byte comes back as the port's own, with its interrupt."""
    bench.command(0xD3, 0x5A)
    assert bench.status() & (OBF | AUX) == OBF | AUX
    assert bench.aux_irq.level == 1 and bench.kbd_irq.level == 0
    assert bench.get() == 0x5A
    assert bench.aux_irq.level == 0 and not bench.status() & AUX


def test_auxiliary_port_can_be_disabled(bench: Bench) -> None:
    for command, bit in ((0xA7, 0x20), (0xA8, 0x00)):
        bench.command(command)
        bench.command(0x20)
        assert bench.get() == 0x03 | bit


def test_no_mouse_answers_with_a_timeout(bench: Bench) -> None:
    bench.command(0xD4, 0xFF)
    assert bench.status() & (OBF | AUX | TIMEOUT) == OBF | AUX | TIMEOUT
    assert bench.drain() == [0xFE]


def test_unknown_commands_are_ignored(bench: Bench) -> None:
    for command in (0x00, 0x80, 0xA1, 0xE0):
        bench.command(command)
    assert bench.drain() == [] and bench.resets == 0


def test_reset(bench: Bench) -> None:
    bench.command(0x60, 0x45)
    bench.data(0xED)
    bench.data(0x07)
    bench.kbc.reset()
    assert bench.status() == 0x18 and bench.kbd_irq.level == 0
    bench.command(0x20)
    assert bench.drain() == [0x03]
    assert bench.kbc.keyboard.leds == 0


def test_saved_state_goes_on_exactly(bench: Bench) -> None:
    bench.command(0x60, 0x45)
    bench.data(0xED)
    bench.data(0x05)
    bench.data(0xF0)
    bench.data(0x03)
    bench.data(0xF2)
    bench.command(0xD2, 0x77)
    bench.command(0x7E)
    other = Bench()
    other.kbc.load(bench.kbc.save())
    other.kbc.after_load()
    assert other.kbd_irq.level == 1
    for one in (bench, other):
        one.data(0x99)
    assert other.status() == bench.status()
    got = other.drain()
    assert got == bench.drain() and len(got) == 8
    assert other.kbc.save() == bench.kbc.save()
    assert (other.kbc.keyboard.leds, other.kbc.keyboard.scancode_set) == (5, 3)
