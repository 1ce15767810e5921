"""A board of an embedder's: a serial port and one device, with a guest under KVM and driven from outside."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import Guest

import pyvmm
from pyvmm.boards.board import Board
from pyvmm.control.qtest import QtestServer
from pyvmm.control.qtest_client import QtestClient
from pyvmm.x86 import layout

PORT = 0x300


class Doubler(pyvmm.Device):
    """A number written to offset 0 is read twice as large, and interrupts; offset 4 is the power switch."""

    def __init__(self, irq: pyvmm.IrqLine, power_off: Callable[[], None]) -> None:
        self.irq, self.power_off, self.value = irq, power_off, 0

    def read(self, offset: int, size: int) -> int:
        self.irq.lower()
        return 2 * self.value

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 4:
            self.power_off()
        else:
            self.value = value
            self.irq.raise_()

    def reset(self) -> None:
        self.value = 0


class Tiny(Board):
    """It has no chipset, no ACPI and no debug ports."""

    def make_devices(self) -> None:
        self.serial = self.add_serial()
        self.doubler = self.add("doubler", Doubler(self.irq_line(5, "doubler"), self.chassis.power.off))
        self.map_ports(PORT, 8, self.doubler, "doubler")
        self.at = self.windows.give(0x200, "doubler", first=layout.VIRTIO_MMIO, end=layout.VIRTIO_MMIO_END)
        self.mmio.map(self.at, 8, self.doubler, name="doubler.mmio")
        self.describe(words=f"doubler.at={self.at:#x}")


DOUBLED = f"""
    mov ${PORT}, %edx
    mov $21, %eax
    outl %eax, %dx
    inl %dx, %eax
    mov $0x3f8, %edx
    outb %al, %dx
    mov ${layout.VIRTIO_MMIO}, %rbx
    movl $33, (%rbx)
    mov (%rbx), %eax
    outb %al, %dx
    mov ${PORT + 4}, %edx
    outb %al, %dx
    1: hlt
    jmp 1b
"""


def test_a_guest_boots_on_it(boot: Callable[..., Guest]) -> None:
    said: list[bytes] = []
    guest = boot(DOUBLED, board=Tiny, serial=said.append)
    assert (*guest.machine.devices, repr(guest.machine.board.at)) == ("serial", "doubler", str(layout.VIRTIO_MMIO))
    for _ in range(2):
        status = guest.run()
        assert (int(status), status.reason) == (0, "shutdown")
        guest.machine.reset()
        assert guest.machine.board.doubler.value == 0
    assert b"".join(said) == b"*B*B"
    with pytest.raises(pyvmm.StateError, match="no power button"):
        guest.machine.powerdown()


def test_driven_from_outside(tmp_path: Path) -> None:
    with pyvmm.Machine(board=Tiny, accel="qtest", memory_mib=4) as machine:
        server = QtestServer(machine)
        server.listen(str(tmp_path / "board"))
        server.start()
        with QtestClient.connect(tmp_path / "board") as q:
            q.irq_intercept_in("ioapic")
            q.outl(PORT, 21)
            assert q.inl(PORT) == 42
            assert q.irqs == ["IRQ raise 5", "IRQ lower 5"]
            q.writel(layout.VIRTIO_MMIO, 5)
            assert q.readl(layout.VIRTIO_MMIO) == 10
        server.close()


def test_its_words_end_the_kernel_s_command_line() -> None:
    options = {"kernel": b"none", "firmware": bytes(4096), "append": "quiet"}
    with pyvmm.Machine(board=Tiny, accel="qtest", memory_mib=4, **options) as m:
        assert m.board.command_line == "quiet doubler.at=0xfeb00000"
        assert len(m.board.acpi_devices()) == 1  # COM1


def test_two_of_its_devices_at_one_place_are_both_named() -> None:
    class Crowded(Tiny):
        def make_devices(self) -> None:
            super().make_devices()
            self.map_ports(PORT + 6, 4, pyvmm.Device(), "second")

    threads = threading.active_count()
    with pytest.raises(pyvmm.ConfigError, match=r"^second at port 0x306-0x309 overlaps doubler at 0x300-0x307"):
        pyvmm.Machine(board=Crowded, memory_mib=4, flat=b"\xf4")
    assert threading.active_count() == threads
