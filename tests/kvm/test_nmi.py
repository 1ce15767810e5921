"""Non-maskable interrupts from the host: delivered with interrupts off, one at a time, the next after IRET."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import PASSED, PORT, Guest, Recorder

# Counts NMIs in a loop that leaves interrupts off, and tells the device of each from within the handler.
COUNTING = """
        .include "interrupts64.inc"
        set_gate 2, on_nmi
        load_idt
        cli
        mov     $DEVICE_PORT, %edx
        mov     $1, %al
        outb    %al, (%dx)              # ready
1:      cmpl    $3, nmis
        jb      1b
        finish
on_nmi:
        push    %rax
        incl    nmis
        mov     $2, %al
        outb    %al, (%dx)
        pop     %rax
        iretq                           # unblocks NMIs (SDM 3A, 6.7.1)
nmis:   .long 0
"""


# In the lab too: there the processor delivers them, on a software KVM the emulator.
@pytest.mark.parametrize("where", ["here", pytest.param("lab", marks=pytest.mark.lab)])
def test_three_of_them(where: str, boot: Callable[..., Guest]) -> None:
    recorder = Recorder()
    guest = boot(COUNTING)
    guest.machine.pio.map(PORT, 1, recorder)
    guest.start()
    recorder.wait_for(1)
    for n in range(3):
        guest.machine.nmi()
        recorder.wait_for(2 + n)
    guest.wait()
    assert guest.machine.status == PASSED
    assert recorder.writes == [1, 2, 2, 2]
    assert guest.value("nmis") == 3
