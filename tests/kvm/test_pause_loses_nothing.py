"""Pause, read the state, resume, in the middle of a loop of port reads: no value is lost and none comes twice."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from guests import PASSED, PORT, TIMEOUT_S, Guest

import pyvmm

PAUSES = 10_000
STOP = 0xFFFF_FFFF

# Sums what the device answers (EAX of each `in`) in RBX, until it answers STOP.
SUM = """
    mov     $DEVICE_PORT, %edx
    xor     %ebx, %ebx
    xor     %ecx, %ecx
1:  {read}
    cmp     $0xffffffff, %eax
    je      2f
    add     %rax, %rbx
    inc     %rcx
    jmp     1b
2:  finish
"""


class Counter(pyvmm.Device):
    """Gives 1, 2, 3, ... and sums what it gave; STOP once ``last`` is set."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = 0
        self.last = False
        self._wanted = 0
        self._reached = threading.Event()

    def read(self, offset: int, size: int) -> int:
        if self.last:
            return STOP
        self.count += 1
        self.sum += self.count
        if self.count == self._wanted:
            self._reached.set()
        return self.count

    def wait_for_more(self, reads: int) -> None:
        """Until the guest, paused or just resumed, has read so many times more."""
        with self.lock:
            self._reached.clear()
            self._wanted = self.count + reads
        assert self._reached.wait(TIMEOUT_S)


def pause_and_look(guest: Guest, counter: Counter, times: int) -> None:
    """A parked vCPU has summed what the device has given, but for one value that is still on its way there."""
    machine = guest.machine
    guest.start()
    for n in range(times):
        # Sometimes at once, when it is just entering the guest; mostly after a read or more, so that it does get on.
        if n % 4:
            counter.wait_for_more(n % 4)
        machine.pause()
        regs = guest.regs()
        # An `in` that was under way is complete: its value is in the sum, or still in RAX on the way there.
        assert regs["rbx"] in (counter.sum, counter.sum - counter.count)
        if regs["rbx"] != counter.sum:
            assert regs["rax"] == counter.count
        # Written back: a state that was set must not undo what the access did.
        guest.machine.cpus[0].regs = regs
        machine.resume()
    counter.last = True
    guest.wait()
    assert machine.control.status == PASSED
    regs = guest.regs()
    assert regs["rcx"] == counter.count
    assert regs["rbx"] == counter.sum


@pytest.mark.native
def test_ten_thousand_pauses_in_a_loop_of_in(boot: Callable[..., Guest]) -> None:
    guest = boot(SUM.format(read="inl %dx, %eax"))
    counter = Counter()
    guest.machine.pio.map(PORT, 4, counter)
    pause_and_look(guest, counter, PAUSES)


def test_in_a_loop_of_mmio_reads(boot: Callable[..., Guest]) -> None:
    guest = boot(SUM.format(read="mov $DEVICE_MMIO, %edi\n mov (%rdi), %eax"))
    counter = Counter()
    guest.machine.mmio.map(0xD000_0000, 4, counter)
    pause_and_look(guest, counter, 300)


def test_in_string_input(boot: Callable[..., Guest]) -> None:
    """A pause may fall between the units of a rep ins: RCX units are left, and all arrive in order."""
    guest = boot(
        """
        cld
    2:  mov     $DEVICE_PORT, %edx
        mov     $buffer, %edi
        mov     $1000, %ecx
        rep insl
        mov     $buffer, %esi
        mov     $1000, %ecx
    1:  lodsl
        cmp     $0xffffffff, %eax
        je      3f
        inc     %ebx                    # must be the next number
        cmp     %ebx, %eax
        jne     bad
        loop    1b
        jmp     2b
    3:  finish
    bad:
        finish  9
        .balign 8
    buffer:
        .fill   4000
        """
    )
    counter = Counter()
    guest.machine.pio.map(PORT, 4, counter)
    guest.start()
    for n in range(300):
        counter.wait_for_more(1 + n % 7)
        guest.machine.pause()
        guest.machine.cpus[0].regs = guest.regs()
        guest.machine.resume()
    counter.last = True
    guest.wait()
    assert guest.machine.control.status == PASSED


def test_two_vcpus(boot: Callable[..., Guest]) -> None:
    """Each reads from a device of its own; both are parked with their sums whole."""
    guest = boot(
        """
        .include "interrupts64.inc"
        .include "smp64.inc"
        start_others
        xor     %edi, %edi
    other_main:                         # EDI: 0 or 1
        lea     DEVICE_PORT(, %rdi, 4), %edx
        xor     %ebx, %ebx
        xor     %ecx, %ecx
    1:  inl     %dx, %eax
        cmp     $0xffffffff, %eax
        je      2f
        add     %rax, %rbx
        inc     %rcx
        jmp     1b
    2:  lock incl done
    3:  cmpl    $2, done
        jne     3b
        finish
    done: .long 0
        """,
        cpus=2,
    )
    counters = [Counter(), Counter()]
    for n, counter in enumerate(counters):
        guest.machine.pio.map(PORT + 4 * n, 4, counter)
    guest.start()
    for i in range(300):
        counters[i & 1].wait_for_more(1 + i % 3)
        guest.machine.pause()
        for n, counter in enumerate(counters):
            regs = guest.regs(n)
            assert regs["rbx"] in (counter.sum, counter.sum - counter.count)
        guest.machine.resume()
    for counter in counters:
        counter.last = True
    guest.wait()
    assert guest.machine.control.status == PASSED
    for n, counter in enumerate(counters):
        assert (guest.regs(n)["rcx"], guest.regs(n)["rbx"]) == (counter.count, counter.sum)
