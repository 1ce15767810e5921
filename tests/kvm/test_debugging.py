"""Cpu.step() and Cpu.breakpoints: one instruction at a time, and a stop that the next run gets past."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from guests import PASSED, PORT, SPIN_ON_BOTH, Guest, Recorder

import pyvmm
from pyvmm import ConfigError, RunState, StateError

LOOP = "mov $5, %ecx\n here: inc %ebx\n there: dec %ecx\n jnz here\n finish"


def test_steps(boot: Callable[..., Guest]) -> None:
    guest = boot("mov $1, %eax\n s1: add $2, %eax\n s2: jmp s4\n nop\n s4: finish")
    cpu, symbols = guest.machine.cpus[0], guest.program.symbols
    for symbol in ("s1", "s2", "s4"):
        status = cpu.step()
        assert (status, status.reason) == (14, "debug")
        assert guest.machine.state is RunState.DEBUG
        assert cpu.regs["rip"] == symbols[symbol]
    assert cpu.regs["rax"] == 3
    assert guest.run() == PASSED


def test_a_step_over_an_access_and_to_the_end(boot: Callable[..., Guest]) -> None:
    """The device's handler runs within the step; the guest's own end is told by it."""
    guest = boot("mov $DEVICE_PORT, %edx\n inb %dx, %al\n next: mov $3, %al\n outb %al, $0xf4\n hlt")
    device = Recorder(lambda offset, size: 0x42)
    guest.machine.pio.map(PORT, 1, device)
    cpu = guest.machine.cpus[0]
    cpu.step()
    assert device.log == []
    cpu.step()
    assert (len(device.log), cpu.regs["rax"] & 0xFF, cpu.regs["rip"]) == (1, 0x42, guest.program.symbols["next"])
    cpu.step()
    status = cpu.step()
    assert (status, status.reason) == (7, "debug-exit")
    with pytest.raises(StateError, match="reset"):
        cpu.step()


def test_a_device_that_raises_in_a_step(boot: Callable[..., Guest]) -> None:
    class Broken(pyvmm.Device):
        def read(self, offset: int, size: int) -> int:
            raise LookupError("wrong")

    guest = boot("mov $DEVICE_PORT, %edx\n inb %dx, %al\n finish")
    guest.machine.pio.map(PORT, 1, Broken())
    guest.machine.cpus[0].step()
    with pytest.raises(pyvmm.DeviceError, match="wrong"):
        guest.machine.cpus[0].step()


def test_the_other_vcpus_stand_meanwhile(boot: Callable[..., Guest]) -> None:
    guest = boot(SPIN_ON_BOTH, cpus=2)
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)
    guest.start()
    device.wait_for(1)
    guest.machine.pause()
    first, second = guest.machine.cpus
    stood = first.regs
    for _ in range(4):
        before = second.regs
        second.step()
        assert second.regs != before
    assert first.regs == stood
    guest.machine.resume()
    guest.machine.pause()
    assert guest.machine.state is RunState.PAUSED


def test_a_vcpu_that_waits_executes_nothing(boot: Callable[..., Guest]) -> None:
    guest = boot("finish", cpus=2)
    with pytest.raises(TimeoutError, match="vCPU 1 executed nothing"):
        guest.machine.cpus[1].step(0.1)
    assert guest.machine.state is RunState.PAUSED
    assert guest.run() == PASSED


def test_where_a_step_can_t_be(boot: Callable[..., Guest]) -> None:
    guest = boot("mov $DEVICE_PORT, %edx\n 1: outb %al, %dx\n jmp 1b")
    cpu = guest.machine.cpus[0]
    said: list[str] = []

    class Careless(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            if not self.log:
                with pytest.raises(StateError) as caught:
                    cpu.step()
                said.append(str(caught.value))
            super().write(offset, size, value)

    device = Careless()
    guest.machine.pio.map(PORT, 1, device)
    guest.start()
    device.wait_for(1)
    for act in (cpu.step, lambda: setattr(cpu, "breakpoints", {1})):
        with pytest.raises(StateError, match="pause"):
            act()
    assert "would wait for itself" in said[0]
    guest.machine.pause()
    wrong: list[Any] = [-1, "5", float("nan")]
    for value in wrong:
        with pytest.raises(ConfigError):
            cpu.step(value)
    guest.machine.close()
    with pytest.raises(StateError):
        cpu.step()


@pytest.mark.native
def test_a_breakpoint_in_a_loop(boot: Callable[..., Guest]) -> None:
    """The lab's emulated processor does not stop at breakpoints of its guests' guests."""
    guest = boot(LOOP)
    cpu, here = guest.machine.cpus[0], guest.program.symbols["here"]
    cpu.breakpoints = {here}
    for n in range(5):
        status = guest.run()
        assert (status, status.reason) == (14, "debug")
        assert (cpu.regs["rip"], cpu.regs["rbx"]) == (here, n)
    assert guest.run() == PASSED
    assert cpu.regs["rbx"] == 5


@pytest.mark.native
def test_one_at_the_first_instruction_and_after_a_reset(boot: Callable[..., Guest]) -> None:
    guest = boot("start: inc %ebx\n finish")
    cpu, start = guest.machine.cpus[0], guest.program.symbols["start"]
    cpu.breakpoints |= {start}
    for _ in range(2):
        assert guest.run() == 14
        assert (cpu.regs["rip"], cpu.regs["rbx"]) == (start, 0)
        guest.machine.reset()
    assert guest.run() == 14
    assert guest.run() == PASSED


@pytest.mark.native
def test_steps_and_neighbours(boot: Callable[..., Guest]) -> None:
    """A step onto a breakpoint has seen it; one beside it is not missed."""
    guest = boot(LOOP)
    cpu, symbols = guest.machine.cpus[0], guest.program.symbols
    here, there = symbols["here"], symbols["there"]
    cpu.breakpoints = [here, there]
    assert cpu.step() == 14
    assert cpu.regs["rip"] == here
    seen = []
    while guest.run() == 14:
        seen.append(cpu.regs["rip"])
    assert seen == [there, here] * 4 + [there]
    assert guest.machine.status == PASSED


@pytest.mark.native
def test_they_can_be_taken_away(boot: Callable[..., Guest]) -> None:
    guest = boot(LOOP)
    cpu, here = guest.machine.cpus[0], guest.program.symbols["here"]
    cpu.breakpoints = {here}
    assert guest.run() == 14
    cpu.breakpoints -= {here}
    assert cpu.breakpoints == frozenset()
    assert guest.run() == PASSED


@pytest.mark.native
def test_real_mode_addresses_are_linear(boot: Callable[..., Guest]) -> None:
    guest = boot("ljmp $0x100, $(away - 0x1000)\n nop\n away: inc %bx\n finish", mode="real16")
    cpu, away = guest.machine.cpus[0], guest.program.symbols["away"]
    cpu.breakpoints = {away}
    assert guest.run() == 14
    assert (cpu.regs["rip"], cpu.sregs["cs"]["base"]) == (away - 0x1000, 0x1000)
    assert guest.run() == PASSED


@pytest.mark.native
def test_a_pause_at_a_breakpoint_loses_no_step(boot: Callable[..., Guest]) -> None:
    guest = boot("here: inc %rbx\n jmp here")
    cpu, here = guest.machine.cpus[0], guest.program.symbols["here"]
    cpu.breakpoints = {here}
    over = threading.Event()

    def pauses() -> None:
        while not over.is_set():
            guest.machine.pause()

    thread = threading.Thread(target=pauses)
    thread.start()
    hits = 0
    try:
        while hits < 100:
            if guest.run() == 14:
                assert (cpu.regs["rip"], cpu.regs["rbx"]) == (here, hits)
                hits += 1
    finally:
        over.set()
        thread.join()


def test_what_is_no_breakpoint(boot: Callable[..., Guest]) -> None:
    cpu = boot("finish").machine.cpus[0]
    wrong: list[Any] = [5, "0x1000", b"a", None, {"a"}, {-1}, {1 << 64}, {True}, {1.5}]
    for value in wrong:
        with pytest.raises(ConfigError, match="linear address"):
            cpu.breakpoints = value
    with pytest.raises(ConfigError, match="take some away"):
        cpu.breakpoints = range(5)  # type: ignore[assignment]  # mypy wants the getter's type
    assert cpu.breakpoints == frozenset()
    with pytest.raises(AttributeError):
        cpu.breakpoints.add(5)  # type: ignore[attr-defined]  # a copy that could be changed would be taken for a write
