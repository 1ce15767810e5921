"""What no device claims: reads give ones, writes are lost, and the guest goes on."""

from __future__ import annotations

from collections.abc import Callable

from guests import PASSED, PORT, Guest, Recorder


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
