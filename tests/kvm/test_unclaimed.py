"""What no device claims: reads give ones, writes are lost, and the guest goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import PASSED, PORT, TIMEOUT_S, Guest, Recorder

import pyvmm


def test_ports(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
        mov     $NOBODY_PORT, %edx
        mov     $0x12345678, %eax
        outb    %al, %dx
        outw    %ax, %dx
        outl    %eax, %dx
        xor     %eax, %eax
        inb     %dx, %al
        mov     %eax, %ebx
        xor     %eax, %eax
        inw     %dx, %ax
        mov     %eax, %ecx
        inl     %dx, %eax
        mov     %eax, %esi
        finish
        """
    )
    assert guest.run() == PASSED
    regs = guest.regs()
    assert (regs["rbx"], regs["rcx"], regs["rsi"]) == (0xFF, 0xFFFF, 0xFFFFFFFF)


def test_addresses(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
        mov     $NOBODY_MMIO, %edi
        movb    $1, (%rdi)
        movq    $1, (%rdi)
        movzbl  (%rdi), %ebx
        movzwl  3(%rdi), %ecx
        movl    (%rdi), %esi
        movq    8(%rdi), %r8
        finish
        """
    )
    assert guest.run() == PASSED
    regs = guest.regs()
    assert (regs["rbx"], regs["rcx"], regs["rsi"]) == (0xFF, 0xFFFF, 0xFFFFFFFF)
    assert regs["r8"] == 0xFFFFFFFF_FFFFFFFF


def test_the_last_port(boot: Callable[..., Guest]) -> None:
    """Port 0xffff, one and four bytes: what would lie past it is not there."""
    guest = boot(
        """
        mov     $0xffff, %edx
        mov     $0x55, %al
        outb    %al, %dx
        inb     %dx, %al
        movzbl  %al, %ebx
        finish
        """
    )
    device = Recorder(lambda offset, size: 0x99)
    guest.machine.pio.map(0xFFFF, 1, device)
    assert guest.run() == PASSED
    assert device.log == [("write", 0, 1, 0x55), ("read", 0, 1)]
    assert guest.regs()["rbx"] == 0x99


def test_partly_claimed(boot: Callable[..., Guest]) -> None:
    """A four-byte in over a device of two ports: its bytes, and ones."""
    guest = boot("mov $DEVICE_PORT, %edx\n inl %dx, %eax\n mov %eax, %ebx\n finish")
    device = Recorder(lambda offset, size: 0x2211)
    guest.machine.pio.map(PORT, 2, device)
    assert guest.run() == PASSED
    assert guest.regs()["rbx"] == 0xFFFF2211
    assert device.log == [("read", 0, 2)]


# outl 0x80000400, 0xcf8; outb 3, 0xf4; hlt: how kvm-unit-tests look for a PCI device, and how they end.
CONFIGURATION_ADDRESS = bytes.fromhex("66b800040080 baf80c 66ef b003 e6f4 f4")


@pytest.mark.parametrize("machine", ["microvm", "pc"])
def test_the_configuration_address_is_no_write_to_the_reset_register(machine: str) -> None:
    """0xcf8's dword is PCI's (PCI 3.0, 3.2.2.3.2) whether or not there is PCI; 0xcf9 is written by bytes alone."""
    with pyvmm.Machine(machine=machine, memory_mib=16, flat=CONFIGURATION_ADDRESS, no_reboot=True) as m:
        assert m.run(TIMEOUT_S) == 7


@pytest.mark.parametrize("machine", ["microvm", "pc"])
@pytest.mark.parametrize(("port", "size"), [(0xCF8, 2), (0xCF8, 4), (0xCF6, 4)])
def test_no_wider_access_resets(boot: Callable[..., Guest], machine: str, port: int, size: int) -> None:
    suffix, register = {2: ("w", "%ax"), 4: ("l", "%eax")}[size]
    guest = boot(
        f"mov ${port:#x}, %edx\n mov $0x06060606, %eax\n out{suffix} {register}, %dx\n finish",
        machine=machine,
        no_reboot=True,
    )
    assert guest.run() == PASSED


@pytest.mark.parametrize("machine", ["microvm", "pc"])
def test_a_byte_resets(boot: Callable[..., Guest], machine: str) -> None:
    guest = boot("mov $0xcf9, %edx\n mov $6, %al\n outb %al, %dx\n hlt", machine=machine, no_reboot=True)
    assert guest.run() == pyvmm.machine.STATUS_RESET
