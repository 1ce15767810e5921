"""Port I/O: in and out of 1, 2 and 4 bytes, in every mode, to a Python device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import PASSED, PORT, Guest, Recorder

MODES = ("real16", "protected32", "long64")

OUT_AND_IN = """
    mov     $DEVICE_PORT, %dx
    mov     $0xaabbccdd, %eax
    outb    %al, %dx
    outw    %ax, %dx
    outl    %eax, %dx
    mov     $-1, %eax               # what an in leaves alone of EAX must stay ones
    inb     %dx, %al
    mov     %eax, %ebx
    mov     $-1, %eax
    inw     %dx, %ax
    mov     %eax, %ecx
    add     $4, %dx
    inl     %dx, %eax
    mov     %eax, %edi
    outb    %al, $0x80              # a port in the instruction itself
    finish
"""


@pytest.mark.parametrize("mode", MODES)
def test_every_size_in_every_mode(boot: Callable[..., Guest], mode: str) -> None:
    guest = boot(OUT_AND_IN, mode)
    device = Recorder(lambda offset, size: 0x1122_3344_5566_7788)
    guest.machine.pio.map(PORT, 8, device)
    assert guest.run() == PASSED
    assert device.log == [
        ("write", 0, 1, 0xDD),
        ("write", 0, 2, 0xCCDD),
        ("write", 0, 4, 0xAABBCCDD),
        ("read", 0, 1),
        ("read", 0, 2),
        ("read", 4, 4),
    ]
    regs = guest.regs()
    # The device answered more bits than were asked for: the bus cuts them off.
    assert regs["rbx"] == 0xFFFFFF88
    assert regs["rcx"] == 0xFFFF7788
    assert regs["rdi"] == 0x55667788
    assert guest.machine.devices["port80"].last == 0x88  # type: ignore[attr-defined]


def test_ports_are_counted_by_direction(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
        mov     $DEVICE_PORT, %edx
        mov     $100, %ecx
    1:  inb     %dx, %al
        outb    %al, %dx
        outb    %al, %dx
        loop    1b
        finish
        """
    )
    guest.machine.pio.map(PORT, 8, Recorder())
    assert guest.run() == PASSED
    rows = {(row.address, row.direction): row for row in guest.machine.exit_stats() if row.reason == "IO"}
    assert rows[PORT, "in"].count == 100
    assert rows[PORT, "out"].count == 200
    row = rows[PORT, "out"]
    assert 0 < row.min_ns <= row.mean_ns <= row.max_ns
    assert sum(count for _bound, count in row.histogram_ns) == 200
