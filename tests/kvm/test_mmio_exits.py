"""MMIO: loads and stores of every size, unaligned, and over the end of a region or a page."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import MMIO, PASSED, Guest, Recorder

ANSWER = 0x1122_3344_5566_7788


def test_every_size_in_long_mode(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
        mov     $DEVICE_MMIO, %edi
        mov     $0xaabbccdd99887766, %rax
        movb    %al, (%rdi)
        movw    %ax, 2(%rdi)
        movl    %eax, 4(%rdi)
        movq    %rax, 8(%rdi)
        movzbl  1(%rdi), %ebx
        movzwl  2(%rdi), %ecx
        movl    4(%rdi), %esi
        movq    8(%rdi), %r8
        finish
        """
    )
    device = Recorder(lambda offset, size: ANSWER)
    guest.machine.mmio.map(MMIO, 16, device)
    assert guest.run() == PASSED
    assert device.log == [
        ("write", 0, 1, 0x66),
        ("write", 2, 2, 0x7766),
        ("write", 4, 4, 0x99887766),
        ("write", 8, 8, 0xAABBCCDD_99887766),
        ("read", 1, 1),
        ("read", 2, 2),
        ("read", 4, 4),
        ("read", 8, 8),
    ]
    regs = guest.regs()
    assert (regs["rbx"], regs["rcx"], regs["rsi"], regs["r8"]) == (0x88, 0x7788, 0x55667788, ANSWER)
    assert guest.exits("MMIO") == 8


def test_protected_mode(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
        movl    $0x01020304, DEVICE_MMIO
        movw    $0x0506, DEVICE_MMIO + 4
        movb    $0x07, DEVICE_MMIO + 6
        mov     DEVICE_MMIO, %ebx
        finish
        """,
        "protected32",
    )
    device = Recorder(lambda offset, size: ANSWER)
    guest.machine.mmio.map(MMIO, 16, device)
    assert guest.run() == PASSED
    assert device.writes == [0x01020304, 0x0506, 0x07]
    assert guest.regs()["rbx"] == 0x55667788


def test_read_modify_write(boot: Callable[..., Guest]) -> None:
    """An `or` to memory is a read and a write; an `xchg` too."""
    guest = boot(
        """
        mov     $DEVICE_MMIO, %edi
        orl     $0x0f, (%rdi)
        mov     $0x55, %eax
        xchg    %eax, (%rdi)
        finish
        """
    )
    device = Recorder(lambda offset, size: 0xF0)
    guest.machine.mmio.map(MMIO, 8, device)
    assert guest.run() == PASSED
    assert device.log == [("read", 0, 4), ("write", 0, 4, 0xFF), ("read", 0, 4), ("write", 0, 4, 0x55)]


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_goes_whole_to_a_device_that_takes_it(boot: Callable[..., Guest], offset: int) -> None:
    guest = boot(
        f"""
        mov     $DEVICE_MMIO + {offset}, %edi
        movl    $0x04030201, (%rdi)
        mov     (%rdi), %ebx
        finish
        """
    )
    memory = bytearray(16)
    device = Recorder(lambda at, size: int.from_bytes(memory[at : at + size], "little"))
    guest.machine.mmio.map(MMIO, 16, device)
    memory[offset : offset + 4] = b"\xde\xad\xbe\xef"
    assert guest.run() == PASSED
    assert device.log == [("write", offset, 4, 0x04030201), ("read", offset, 4)]
    assert guest.regs()["rbx"] == 0xEFBEADDE


def test_unaligned_is_split_for_a_device_that_does_not(boot: Callable[..., Guest]) -> None:
    guest = boot("mov $DEVICE_MMIO + 1, %edi\n movl $0x04030201, (%rdi)\n mov (%rdi), %ebx\n finish")
    device = Recorder(lambda offset, size: offset if size == 1 else (offset + 1) << 8 | offset)
    guest.machine.mmio.map(MMIO, 16, device, unaligned=False)
    assert guest.run() == PASSED
    assert device.log == [
        ("write", 1, 1, 0x01),
        ("write", 2, 2, 0x0302),
        ("write", 4, 1, 0x04),
        ("read", 1, 1),
        ("read", 2, 2),
        ("read", 4, 1),
    ]
    assert guest.regs()["rbx"] == 0x04030201


def test_across_two_pages(boot: Callable[..., Guest]) -> None:
    """KVM cuts an access at the page; each part reaches the region that stands there."""
    guest = boot(
        """
        mov     $DEVICE_MMIO + 0xffe, %edi
        movl    $0x04030201, (%rdi)
        movl    (%rdi), %ebx
        finish
        """
    )
    low, high = Recorder(lambda offset, size: 0x2211), Recorder(lambda offset, size: 0x4433)
    guest.machine.mmio.map(MMIO, 0x1000, low)
    guest.machine.mmio.map(MMIO + 0x1000, 0x1000, high)
    assert guest.run() == PASSED
    assert low.log == [("write", 0xFFE, 2, 0x0201), ("read", 0xFFE, 2)]
    assert high.log == [("write", 0, 2, 0x0403), ("read", 0, 2)]
    assert guest.regs()["rbx"] == 0x44332211


def test_over_a_region_s_end(boot: Callable[..., Guest]) -> None:
    """Inside one page it is one exit; what lies past the region is nobody's."""
    guest = boot("mov $DEVICE_MMIO + 2, %edi\n movl $0x04030201, (%rdi)\n mov (%rdi), %ebx\n finish")
    device = Recorder(lambda offset, size: 0x2211)
    guest.machine.mmio.map(MMIO, 4, device)
    assert guest.run() == PASSED
    assert device.log == [("write", 2, 2, 0x0201), ("read", 2, 2)]
    assert guest.regs()["rbx"] == 0xFFFF2211


def test_string_moves(boot: Callable[..., Guest]) -> None:
    """rep movs and stos to and from a device: unit by unit, in order."""
    guest = boot(
        """
        cld
        mov     $source, %esi
        mov     $DEVICE_MMIO, %edi
        mov     $4, %ecx
        rep movsl
        mov     $DEVICE_MMIO, %edi
        mov     $0x5a5a5a5a, %eax
        mov     $2, %ecx
        rep stosl
        finish
    source:
        .long   1, 2, 3, 4
        """
    )
    device = Recorder()
    guest.machine.mmio.map(MMIO, 16, device)
    assert guest.run() == PASSED
    flat = b"".join(value.to_bytes(size, "little") for _kind, _offset, size, value in device.log)
    assert flat == b"".join(n.to_bytes(4, "little") for n in (1, 2, 3, 4)) + b"\x5a" * 8
    at = 0
    for _kind, offset, size, _value in device.log:
        assert offset == at % 16
        at += size
