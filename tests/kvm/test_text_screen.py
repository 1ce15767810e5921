"""VGA's text mode on both boards: what a guest puts into text memory is on the screen, and costs no exit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import PASSED, Guest

import pyvmm

MACHINES = ["microvm", "pc"]

# Writes "Hi" in yellow on blue at the start of row 2, moves the cursor behind it, waits for a frame to end.
PROGRAM = """
    .set    TEXT, 0xb8000
    movl    $0x1e691e48, TEXT + 320
    mov     $0x3d4, %dx
    mov     $0x000e, %ax                # cursor, high
    outw    %ax, %dx
    mov     $0xa20f, %ax                # low: 162
    outw    %ax, %dx
    mov     $0x3da, %dx
1:  inb     %dx, %al
    test    $8, %al
    jz      1b
2:  inb     %dx, %al
    test    $8, %al
    jnz     2b
    mov     TEXT + 320, %ebx
    mov     $100000, %ecx
3:  incw    TEXT + 400
    loop    3b
    finish
"""


@pytest.mark.parametrize("machine", MACHINES)
def test_text_and_cursor(boot: Callable[..., Guest], machine: str) -> None:
    guest = boot(PROGRAM, machine=machine, vga="text")
    assert guest.run() == PASSED
    vga = guest.machine.vga
    assert vga is not None
    assert vga.lines()[:3] == ["", "", "Hi".ljust(40) + "á"]  # 100,000 is 0x186a0
    assert vga.cursor == (2, 2)
    assert guest.regs()["rbx"] == 0x1E691E48
    # A memory slot: 100,003 accesses, and none of them came out of KVM.
    assert guest.exits("MMIO") == 0


def test_without_it_there_is_no_screen(boot: Callable[..., Guest]) -> None:
    guest = boot("finish")
    assert guest.machine.vga is None


def test_text_memory_stays_over_a_reset(boot: Callable[..., Guest]) -> None:
    guest = boot("movw $0x0741, 0xb8000\n finish", machine="pc", vga="text")
    assert guest.run() == PASSED
    guest.machine.reset()
    assert guest.machine.vga is not None
    assert guest.machine.vga.lines()[0] == "A"


def test_a_device_of_the_embedders_own_may_stand_there(boot: Callable[..., Guest]) -> None:
    class Screen(pyvmm.Device):
        written = 0

        def write(self, offset: int, size: int, value: int) -> None:
            self.written += 1

    guest = boot("movw $0x0741, 0xb8000\n finish", machine="pc")
    screen = Screen()
    guest.machine.mmio.map(0xB8000, 0x8000, screen)
    assert guest.run() == PASSED
    assert screen.written == 1
