"""A device that raises: DeviceError with its traceback, the machine stopped, this process and other machines alive."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import MMIO, PASSED, PORT, TIMEOUT_S, Guest

import pyvmm
from pyvmm import RunState
from pyvmm.errors import DeviceError


class Broken(pyvmm.Device):
    valid_sizes = (1, 8)
    impl_sizes = (1, 8)

    def read(self, offset: int, size: int) -> int:
        raise ZeroDivisionError("the device divided by zero")

    def write(self, offset: int, size: int, value: int) -> None:
        raise KeyError(value)


ACCESSES = {
    "pio in": "mov $DEVICE_PORT, %edx\n inl %dx, %eax",
    "pio out": "mov $DEVICE_PORT, %edx\n outl %eax, %dx",
    "mmio read": "mov $DEVICE_MMIO, %edi\n mov (%rdi), %eax",
    "mmio write": "mov $DEVICE_MMIO, %edi\n mov %eax, (%rdi)",
    "rep outs": "mov $DEVICE_PORT, %edx\n mov $0x100000, %esi\n mov $5, %ecx\n rep outsb",
    "rep ins": "mov $DEVICE_PORT, %edx\n mov $0x200000, %edi\n mov $5, %ecx\n rep insb",
}


@pytest.mark.parametrize("access", ACCESSES)
def test_the_machine_stops(boot: Callable[..., Guest], access: str) -> None:
    guest = boot(f"mov $0x4242, %ebx\n {ACCESSES[access]}\n finish")
    guest.machine.pio.map(PORT, 4, Broken())
    guest.machine.mmio.map(MMIO, 8, Broken())
    with pytest.raises(DeviceError) as caught:
        guest.run()
    error = caught.value
    assert error.status == 8
    reads = access in ("pio in", "mmio read", "rep ins")
    assert isinstance(error.__cause__, ZeroDivisionError if reads else KeyError)
    assert "rbx 0000000000004242" in error.dump
    assert "Traceback (most recent call last)" in error.dump
    assert "test_device_errors.py" in error.dump
    assert guest.machine.state is RunState.INTERNAL_ERROR
    assert guest.regs()["rbx"] == 0x4242
    # The host goes on: this machine can be reset, and another one runs beside it.
    other = boot("finish")
    assert other.run() == PASSED
    guest.machine.reset()
    assert guest.machine.state.value == "paused"
    with pytest.raises(DeviceError):
        guest.run()


def test_a_read_that_returns_no_number(boot: Callable[..., Guest]) -> None:
    class Forgetful(pyvmm.Device):
        def read(self, offset: int, size: int) -> int:
            return None  # type: ignore[return-value]  # the mistake this test is about

    guest = boot("mov $DEVICE_PORT, %edx\n inb %dx, %al\n finish")
    guest.machine.pio.map(PORT, 1, Forgetful())
    with pytest.raises(DeviceError) as caught:
        guest.run()
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_timer_callback_that_raises(boot: Callable[..., Guest]) -> None:
    """It runs on the event loop's thread while the guest spins: the machine stops all the same."""
    guest = boot("1: jmp 1b")

    def callback() -> None:
        raise OSError("the callback failed")

    guest.machine.clock.timer(callback).arm(guest.machine.clock.now_ns() + 1_000_000)
    with pytest.raises(DeviceError) as caught:
        guest.run()
    assert isinstance(caught.value.__cause__, OSError)
    assert "the callback failed" in caught.value.dump


def test_the_other_vcpu_stops_too(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
        .include "interrupts64.inc"
        .include "smp64.inc"
        start_others
    1:  jmp     1b
    other_main:
        mov     $DEVICE_PORT, %edx
        inb     %dx, %al
        finish
        """,
        cpus=2,
    )
    guest.machine.pio.map(PORT, 1, Broken())
    with pytest.raises(DeviceError) as caught:
        guest.run()
    assert caught.value.dump.startswith("vCPU 1")
    assert all(cpu.parked for cpu in guest.machine.cpus)


def test_the_lock_of_a_device_that_raised_is_free(boot: Callable[..., Guest]) -> None:
    guest = boot("mov $DEVICE_PORT, %edx\n outb %al, %dx\n finish")
    device = Broken()
    guest.machine.pio.map(PORT, 1, device)
    with pytest.raises(DeviceError):
        guest.run()
    with device.lock:
        pass
    with pytest.raises(ZeroDivisionError):
        guest.machine.pio.read(PORT, 1)


def test_the_command_s_exit_status(
    tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import asm

    from pyvmm.cli import main
    from pyvmm.devices.port80 import Port80

    def fail(self: Port80, offset: int, size: int, value: int) -> None:
        raise ArithmeticError("no such code")

    monkeypatch.setattr(Port80, "write", fail)
    image = tmp_path_factory.mktemp("guest") / "guest.bin"
    image.write_bytes(asm.assemble("outb %al, $0x80\n finish").image)
    words = ["run", "--flat", str(image), "--flat-mode", "long64", "--memory", "4", "--serial", "none"]
    assert main([*words, "--timeout", str(TIMEOUT_S)]) == 8
    assert "ArithmeticError: no such code" in capfd.readouterr().err
