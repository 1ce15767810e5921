"""A guest gives memory to its balloon, natively, on virtio-mmio and on virtio-pci, and takes it back; and says what it
has when it is asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from guests import PASSED, TIMEOUT_S, Guest

import pyvmm

MIB = 1 << 20
PAGES = 1024  # that the guest gives
FROM = 4 * MIB

# Queues 0 inflates, 1 deflates and 2 has statistics, each with one buffer. No interrupts. `config` is the offset of the
# device's configuration space from RBP.
QUEUES = """
    .set QUEUE_SIZE, 8
    .set INFLATE, 0x20000
    .set DEFLATE, 0x21000
    .set STATS, 0x22000
    .set AVAIL, 0x80
    .set USED, 0x100
    .set NUMBERS, 0x30000
    .set STAT, 0x40000
    .set PAGES, 1024
    .set FIRST, 0x400
    .macro clear queue
    movl    $0, \\queue + AVAIL
    movl    $0, \\queue + USED
    .endm
    .macro offer queue, buffer, size
    movq    $\\buffer, \\queue
    movl    $\\size, \\queue + 8
    movl    $0, \\queue + 12
    movzwl  \\queue + AVAIL + 2, %eax
    and     $QUEUE_SIZE - 1, %eax
    movw    $0, \\queue + AVAIL + 4(, %rax, 2)
    incw    \\queue + AVAIL + 2
    .endm
    .macro await queue
8:  pause
    movzwl  \\queue + USED + 2, %eax
    cmp     %ax, \\queue + AVAIL + 2
    jne     8b
    .endm
    clear   INFLATE
    clear   DEFLATE
    clear   STATS
"""
PROGRAM = """
    mov     $FIRST, %ecx                # every page has something in it, and is named
1:  mov     %rcx, %rdi
    shl     $12, %rdi
    mov     %rcx, (%rdi)
    mov     %ecx, NUMBERS - 4 * FIRST(, %rcx, 4)
    inc     %ecx
    cmp     $FIRST + PAGES, %ecx
    jb      1b
    offer   INFLATE, NUMBERS, 0x1000
    ring    0
    await   INFLATE
    movl    $PAGES, config + 4(%rbp)
    mov     $FIRST, %ecx
2:  mov     %rcx, %rdi
    shl     $12, %rdi
    cmpq    $0, (%rdi)
    jne     failed
    inc     %ecx
    cmp     $FIRST + PAGES, %ecx
    jb      2b
    offer   DEFLATE, NUMBERS, 0x1000
    ring    1
    await   DEFLATE
    movl    $0, config + 4(%rbp)
    movq    $0x1234, FIRST << 12
    cmpq    $0x1234, FIRST << 12
    jne     failed
    movw    $4, STAT                    # MEMFREE: how often it was asked
    movq    $0, STAT + 2
again:
    offer   STATS, STAT, 10
    ring    2
3:  pause
    cmpl    $0x100, config(%rbp)        # 1 MiB is asked for
    je      end
    movzwl  STATS + USED + 2, %eax
    cmp     %ax, STATS + AVAIL + 2
    jne     3b
    incq    STAT + 2
    jmp     again
end:
    finish
failed:
    finish  9
"""
MMIO_UP = QUEUES + """
    .set VIRTIO, 0xfeb00000
    .set config, 0x100
    .include "virtio_mmio64.inc"
    mov     $VIRTIO, %ebp
    cmpl    $5, 8(%rbp)                 # a balloon
    jne     failed
    register 0x70, 1
    register 0x70, 3
    register 0x24, 0
    register 0x20, 3                    # MUST_TELL_HOST, STATS_VQ
    register 0x24, 1
    register 0x20, 1                    # VERSION_1
    register 0x70, 11
    set_up  0, INFLATE
    set_up  1, DEFLATE
    set_up  2, STATS
    register 0x70, 15
"""
MMIO = MMIO_UP + PROGRAM
PCI = QUEUES + """
    .set config, 0x2000
    .include "virtio_pci64.inc"
    pci_config 0
    inl     %dx, %eax
    cmp     $0x10021af4, %eax           # the transitional balloon
    jne     failed
    pci_config 0x20                     # BAR 4
    inl     %dx, %eax
    and     $~15, %eax
    mov     %eax, %ebp
    movb    $1, 20(%rbp)
    movb    $3, 20(%rbp)
    movl    $0, 8(%rbp)
    movl    $3, 12(%rbp)
    movl    $1, 8(%rbp)
    movl    $1, 12(%rbp)
    movb    $11, 20(%rbp)
    set_up  0, INFLATE
    set_up  1, DEFLATE
    set_up  2, STATS
    movb    $15, 20(%rbp)
""" + PROGRAM
BOTH = pytest.mark.parametrize(("machine", "source"), [("microvm", MMIO), ("pc", PCI)], ids=["mmio", "pci"])


class Actual:
    """What the machine has told of its balloon."""

    def __init__(self, machine: pyvmm.Machine) -> None:
        self.told: list[int] = []
        self._changed = threading.Condition()
        machine.events.listen(self._hear, "balloon")

    def _hear(self, event: pyvmm.Event) -> None:
        with self._changed:
            self.told.append(event.data["actual_bytes"])
            self._changed.notify_all()

    def wait_for(self, told: list[int]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.told == told, TIMEOUT_S), self.told


@BOTH
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_pages_go_and_come_back(boot: Callable[..., Guest], machine: str, source: str, shared: bool) -> None:
    guest = boot(source, machine=machine, balloon=0, memory_mib=16, shared_memory=shared)
    actual = Actual(guest.machine)
    guest.start()
    actual.wait_for([PAGES * 4096, 0])
    said = [guest.machine.balloon_stats(TIMEOUT_S) for _ in range(3)]
    assert all((stats["target_bytes"], stats["actual_bytes"]) == (0, 0) for stats in said)
    # What it says of itself at the start may be on its way, and answers the first question: so not each by one.
    assert 0 <= said[0]["free_bytes"] < said[1]["free_bytes"] < said[2]["free_bytes"] <= 4
    guest.machine.set_balloon(1)
    guest.wait()
    assert guest.machine.status == PASSED
    device = guest.machine.devices["balloon"]
    assert device.given_bytes == PAGES * 4096  # type: ignore[attr-defined]


@BOTH
def test_it_goes_on_elsewhere(boot: Callable[..., Guest], machine: str, source: str) -> None:
    """With statistics that wait to be asked for."""
    guest = boot(source, machine=machine, balloon=0, memory_mib=16)
    guest.start()
    said = guest.machine.balloon_stats(TIMEOUT_S)["free_bytes"]
    guest.machine.pause()
    state = guest.machine.save_state()
    guest.close()
    guest = boot(source, machine=machine, balloon=0, memory_mib=16)
    guest.machine.load_state(state)
    guest.start()
    assert guest.machine.balloon_stats(TIMEOUT_S)["free_bytes"] > said
    guest.machine.set_balloon(1)
    guest.wait()
    assert guest.machine.status == PASSED


def test_a_guest_that_says_nothing(boot: Callable[..., Guest]) -> None:
    guest = boot("1: pause\n jmp 1b", machine="microvm", balloon=0)
    guest.start()
    with pytest.raises(TimeoutError, match="said nothing of its memory"):
        guest.machine.balloon_stats(0.05)
    guest.machine.pause()
