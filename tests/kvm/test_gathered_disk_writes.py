"""Words that KVM gathers for the data port reach the drive also where their guest makes no exit after them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import disk_images
import pytest
from guests import PASSED, Guest

SECTOR = 512
SECTORS = 6
SOURCE = 0x20_0000

# WRITE SECTORS, with each block's end told by the interrupt alone: in between the guest looks at its memory.
WRITER = f"""
    .include "interrupts64.inc"
    set_gate 0x2e, on_disk
    load_idt
    program_pic 0xfb, 0xbf
    cld
    mov     $0x3f6, %edx
    mov     $0x08, %al              # interrupts on
    outb    %al, %dx
    mov     $0x1f2, %edx
    mov     ${SECTORS}, %al
    outb    %al, %dx
    inc     %edx
    mov     $3, %al                 # LBA 3
    outb    %al, %dx
    xor     %al, %al
    inc     %edx
    outb    %al, %dx
    inc     %edx
    outb    %al, %dx
    inc     %edx
    mov     $0xe0, %al
    outb    %al, %dx
    inc     %edx
    mov     $0x30, %al
    outb    %al, %dx
1:  inb     %dx, %al                # the first block has no interrupt
    test    $0x08, %al
    jz      1b
    mov     ${SOURCE:#x}, %esi
    xor     %ebx, %ebx
2:  mov     $256, %ecx
    mov     $0x1f0, %edx
    rep outsw
    inc     %ebx
    sti
3:  cmp     %ebx, irqs              # no exit in here
    jne     3b
    cli
    cmp     ${SECTORS}, %ebx
    jne     2b
    finish
on_disk:
    push    %rax
    push    %rdx
    mov     $0x1f7, %edx
    inb     %dx, %al
    mov     %al, status
    incl    irqs
    mov     $PIC_EOI, %al
    outb    %al, $PIC2_COMMAND
    end_of_interrupt
    pop     %rdx
    pop     %rax
    iretq
irqs:   .long 0
status: .byte 0
"""


@pytest.mark.parametrize("drives", [1, 2])
def test_a_guest_that_only_waits_for_its_interrupt(boot: Callable[..., Guest], tmp_path: Path, drives: int) -> None:
    images = [tmp_path / f"{n}.img" for n in range(drives)]
    for image in images:
        image.write_bytes(bytes(64 * SECTOR))
    guest = boot(WRITER, machine="pc", drives=[str(image) for image in images])
    data = disk_images.seeded("gathered", SECTORS * SECTOR)
    guest.machine.memory.write(SOURCE, data)
    # KVM gathers from when the ports are registered; until then each word is an exit.
    guest.machine.board.chassis.join_background()
    assert guest.run() == PASSED
    assert guest.value("irqs") == SECTORS
    assert guest.value("status", 1) & 0x89 == 0
    assert images[0].read_bytes() == bytes(3 * SECTOR) + data + bytes((64 - 3 - SECTORS) * SECTOR)
    # Few of the words were exits.
    words = sum(row.count for row in guest.machine.exit_stats() if row.address == 0x1F0)
    assert words < 256 * SECTORS / 10
