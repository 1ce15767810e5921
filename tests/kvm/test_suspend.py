"""Suspend to RAM (ACPI S3) without firmware: the waking vectors, what wakes, and what is left of the machine then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import asm
import pytest
from guests import PASSED, TIMEOUT_S

import pyvmm
from pyvmm import RunState, StateError

MACHINES = ("microvm", "pc")
WAK, RTC, PWRBTN = 0x8000, 0x400, 0x100

KERNEL = """
    .set    MAGIC, 0x1badb002
    .set    FLAGS, 0x00010000           # addresses in the header
    .set    RESUME, 0x2000              # where the waking code is copied to
    .set    SEEN, 0x3000                # what it finds
    .balign 4
header:
    .long   MAGIC, FLAGS, -(MAGIC + FLAGS)
    .long   header, 0x100000, 0, 0, entry
    .include "s3.inc"
entry:
    mov     $0x80000, %esp
    incl    starts
    cmpl    $1, starts
    je      1f
    finish  0x20                        # started again
1:  mov     $resume, %esi
    mov     $RESUME, %edi
    mov     $resume_end - resume, %ecx
    cld
    rep movsb
    movl    $0x600d600d, 0x500000       # must outlive the sleep
    mov     $0x3fb, %dx                 # COM1's line control register must not
    mov     $0x1b, %al
    outb    %al, %dx
    mov     $0x1234567, %ebp
    mov     ${vector}, %ecx
    mov     $RESUME{offset}, %eax
    call    s3_prepare
    {arm}
    call    s3_sleep
starts: .long 0

    {code}
resume:
    {resume}
resume_end:
"""

# Real mode at 0x2000 and something: data segments, CS and IP, protection off, what woke us, COM1's register.
REAL_MODE = """
    .fill   3, 1, 0x90                  # the vector is no multiple of 16
    call    1f
1:  pop     %bx
    mov     %bx, SEEN                   # in the segment that begins at 0
    mov     %cs, SEEN + 2
    mov     %ds, SEEN + 4
    mov     %cr0, %eax
    mov     %eax, SEEN + 8
    mov     $0x600, %dx
    inw     %dx, %ax
    mov     %ax, SEEN + 12
    mov     $0x3fb, %dx
    inb     %dx, %al
    mov     %al, SEEN + 14
    mov     %ebp, SEEN + 16
    pushf
    pop     %ax
    mov     %ax, SEEN + 20
    finish
"""


@pytest.fixture
def machines() -> Iterator[list[pyvmm.Machine]]:
    made: list[pyvmm.Machine] = []
    yield made
    for machine in made:
        machine.close()


class Sleeper:
    """A kernel that suspends itself; ``machine`` is at its entry."""

    def __init__(
        self,
        machines: list[pyvmm.Machine],
        *,
        arm: str = "call s3_alarm",
        vector: str = "FACS_VECTOR",
        offset: str = " + 3",
        code: str = ".code16",
        resume: str = REAL_MODE,
        **options: Any,
    ) -> None:
        source = KERNEL.format(arm=arm, vector=vector, offset=offset, code=code, resume=resume)
        self.program = asm.assemble(source, "protected32")
        self.machine = pyvmm.Machine(kernel=self.program.image, memory_mib=8, **options)
        machines.append(self.machine)

    def seen(self, offset: int, size: int) -> int:
        return int.from_bytes(self.machine.memory.read(0x3000 + offset, size), "little")

    def until(self, state: RunState) -> None:
        """Wait for a state that the machine comes to by itself."""
        while self.machine.state is not state:
            assert not self.machine.wait(0.01), self.machine.control.status


@pytest.mark.parametrize("irqchip", ["kernel", "off"])
@pytest.mark.parametrize("machine", MACHINES)
def test_the_rtc_wakes_the_guest_at_its_real_mode_vector(
    machines: list[pyvmm.Machine], machine: str, irqchip: str
) -> None:
    """ACPI 6.5, table 5.13: CS is the address in paragraphs, IP the rest; 4.8.3.1.1: WAK_STS and RTC_STS."""
    sleeper = Sleeper(machines, machine=machine, irqchip=irqchip)
    assert sleeper.machine.run(TIMEOUT_S) == PASSED
    assert sleeper.seen(2, 2) == 0x2000 >> 4
    assert sleeper.seen(0, 2) - 3 in range(3, 5)  # the call's own length behind the vector
    assert sleeper.seen(4, 2) == 0
    assert sleeper.seen(8, 4) & 0x8000_0001 == 0
    assert sleeper.seen(12, 2) == WAK | RTC
    assert sleeper.machine.memory.read(0x50_0000, 4) == bytes.fromhex("0d600d60")
    assert sleeper.seen(14, 1) == 0  # the UART was reset
    assert sleeper.seen(16, 4) == 0  # so was the processor
    assert not sleeper.seen(20, 2) & 0x200
    # Memory is as the guest left it: the kernel was not loaded anew.
    assert sleeper.machine.memory.read(sleeper.program.symbols["starts"], 4) == b"\1\0\0\0"


FLAT_32 = """
    mov     %cs, %ecx
    mov     %cr0, %eax
    mov     %eax, SEEN + 8
    mov     $SEEN, %edi                 # past what real mode reaches, below and above
    movl    $0x600d600d, 0x600000
    mov     %ds:0x600000, %eax
    mov     %eax, %es:(%edi)
    mov     %ss:0x600000, %eax
    mov     %eax, %fs:16(%edi)
    mov     $0x600, %dx
    inw     %dx, %ax
    mov     %ax, SEEN + 12
    finish
"""


@pytest.mark.parametrize("machine", MACHINES)
def test_the_longer_vector_wins_and_means_flat_protected_mode(machines: list[pyvmm.Machine], machine: str) -> None:
    """ACPI 6.5, table 5.13: 32-bit environment, paging and interrupts off, all segments 4 GiB from 0."""
    arm = "movl $0x1000, FACS_VECTOR(%edi) \n call s3_alarm"
    sleeper = Sleeper(
        machines, machine=machine, vector="FACS_X_VECTOR", offset="", code=".code32", resume=FLAT_32, arm=arm
    )
    assert sleeper.machine.run(TIMEOUT_S) == PASSED
    assert sleeper.seen(8, 4) & 0x8000_0001 == 1
    assert sleeper.seen(0, 4) == sleeper.seen(16, 4) == 0x600D600D
    assert sleeper.seen(12, 2) == WAK | RTC


def test_a_suspended_machine_waits_for_wakeup(machines: list[pyvmm.Machine]) -> None:
    sleeper = Sleeper(machines, arm="")
    with pytest.raises(StateError, match="not suspended"):
        sleeper.machine.wakeup()
    sleeper.machine.resume()
    sleeper.until(RunState.SUSPENDED)
    assert not sleeper.machine.wait(0.05)
    before_ns = sleeper.machine.clock.now_ns()
    while sleeper.machine.clock.now_ns() == before_ns:  # guest time goes on: the clock has to tell the date after
        pass
    sleeper.machine.wakeup()
    assert sleeper.machine.wait(TIMEOUT_S)
    assert sleeper.machine.control.status == PASSED
    assert sleeper.seen(12, 2) == WAK | PWRBTN  # as QEMU's system_wakeup


ENABLE_BUTTON = """
    mov     s3_pm1_event, %edx
    add     $2, %edx
    mov     $PM1_PWRBTN, %ax
    outw    %ax, %dx
"""


def test_the_power_button_wakes_where_it_is_enabled(machines: list[pyvmm.Machine]) -> None:
    sleeper = Sleeper(machines, arm=ENABLE_BUTTON)
    sleeper.machine.resume()
    sleeper.until(RunState.SUSPENDED)
    sleeper.machine.powerdown()
    assert sleeper.machine.wait(TIMEOUT_S)
    assert sleeper.machine.control.status == PASSED
    assert sleeper.seen(12, 2) == WAK | PWRBTN


def test_the_power_button_does_nothing_where_it_is_not(machines: list[pyvmm.Machine]) -> None:
    sleeper = Sleeper(machines, arm="")
    sleeper.machine.resume()
    sleeper.until(RunState.SUSPENDED)
    sleeper.machine.powerdown()
    assert not sleeper.machine.wait(0.05)
    assert sleeper.machine.state is RunState.SUSPENDED


def test_an_event_that_is_pending_already_ends_the_sleep_at_once(machines: list[pyvmm.Machine]) -> None:
    sleeper = Sleeper(machines, arm=ENABLE_BUTTON)
    sleeper.machine.powerdown()
    assert sleeper.machine.run(TIMEOUT_S) == PASSED
    assert sleeper.seen(12, 2) == WAK | PWRBTN


def test_a_pause_in_the_middle_of_the_sleep(machines: list[pyvmm.Machine]) -> None:
    """Guest time stands while it is paused; it sleeps on after that."""
    sleeper = Sleeper(machines, arm="")
    sleeper.machine.resume()
    sleeper.until(RunState.SUSPENDED)
    sleeper.machine.pause()
    assert sleeper.machine.state is RunState.PAUSED
    before_ns = sleeper.machine.clock.now_ns()
    assert sleeper.machine.clock.now_ns() == before_ns
    sleeper.machine.resume()
    assert sleeper.machine.state is RunState.SUSPENDED
    sleeper.machine.pause()
    sleeper.machine.wakeup()
    assert sleeper.machine.state is RunState.PAUSED
    assert sleeper.machine.cpus[0].regs["rip"] == 3
    assert sleeper.machine.run(TIMEOUT_S) == PASSED


def test_a_sleep_goes_on_in_another_machine(machines: list[pyvmm.Machine]) -> None:
    """Saved while it sleeps, and its alarm is to come; awake it finds what it had left."""
    sleeper, other = Sleeper(machines), Sleeper(machines)
    sleeper.machine.resume()
    sleeper.until(RunState.SUSPENDED)
    sleeper.machine.pause()
    state = sleeper.machine.save_state()
    sleeper.machine.close()
    other.machine.load_state(state)
    assert other.machine.state is RunState.PAUSED
    other.machine.resume()
    assert other.machine.wait(TIMEOUT_S)
    assert other.machine.control.status == PASSED
    assert other.seen(12, 2) & (WAK | RTC) == WAK | RTC
    assert other.seen(16, 4) != 0x1234567  # the processor had no power
    assert other.machine.memory.read(0x500000, 4) == bytes.fromhex("0d600d60")


def test_run_s_time_limit_holds_for_a_suspended_guest(machines: list[pyvmm.Machine]) -> None:
    sleeper = Sleeper(machines, arm="")
    with pytest.raises(TimeoutError):
        sleeper.machine.run(0.2)
    assert sleeper.machine.state is RunState.PAUSED


def test_stop_and_reset_of_a_suspended_machine(machines: list[pyvmm.Machine]) -> None:
    sleeper = Sleeper(machines, arm="")
    sleeper.machine.resume()
    sleeper.until(RunState.SUSPENDED)
    sleeper.machine.reset()  # from the start: it suspends again
    sleeper.until(RunState.SUSPENDED)
    sleeper.machine.stop(9)
    assert sleeper.machine.wait(TIMEOUT_S)
    assert sleeper.machine.control.status == 9


@pytest.mark.parametrize(
    "clear",
    [
        "movl $0, FACS_VECTOR(%edi)",
        "movl $0x100000, FACS_VECTOR(%edi)",
        "movl $1, FACS_X_VECTOR + 4(%edi)",
        "movl $0, (%edi)",
    ],
    ids=["none", "above 1 MiB", "above 4 GiB", "no FACS"],
)
def test_without_a_vector_the_guest_is_started_again(machines: list[pyvmm.Machine], clear: str) -> None:
    sleeper = Sleeper(machines, arm=clear + "\n call s3_alarm")
    # Its image is new, but for what lies outside of it.
    counter = sleeper.program.symbols["starts"]
    sleeper.machine.resume()
    sleeper.until(RunState.SUSPENDED)
    sleeper.machine.pause()
    assert sleeper.machine.memory.read(counter, 1) == b"\1"
    sleeper.machine.wakeup()
    assert sleeper.machine.memory.read(counter, 1) == b"\0"
    assert sleeper.machine.cpus[0].regs["rax"] == 0x2BADB002


def test_without_s3_the_guest_stays_awake(machines: list[pyvmm.Machine]) -> None:
    sleeper = Sleeper(machines, no_s3=True)
    assert sleeper.machine.run(TIMEOUT_S) == 0x15 << 1 | 1


TWO_PROCESSORS = """
    lgdt    gdt_pointer
    incl    SEEN
    movl    $0xfee00000, %esi
    movl    $0x1ff, 0xf0(%esi)
    cmpl    $0, SEEN + 4                # the other one has not run by itself
    je      1f
    finish  0x30
1:  movl    $0xc4500, 0x300(%esi)       # INIT to all but ourselves, then SIPI
    movl    $0xc4600 | OTHER >> 12, 0x300(%esi)
2:  pause
    cmpl    $1, SEEN + 4
    jne     2b
    finish
    .balign 8
gdt_pointer:
    .word   7
    .long   0x4000
    .set    OTHER, 0x5000
"""

OTHER = """
    xor     %ax, %ax
    mov     %ax, %ds
    lock incl 0x3004
1:  hlt
    jmp     1b
"""


def test_other_vcpus_wait_for_sipi(machines: list[pyvmm.Machine]) -> None:
    resume = TWO_PROCESSORS.replace("gdt_pointer", "RESUME + gdt_pointer - resume", 1)
    sleeper = Sleeper(
        machines,
        cpus=2,
        vector="FACS_X_VECTOR",
        offset="",
        code=".code32",
        resume=resume,
    )
    other = asm.assemble(OTHER, "real16", 0x5000)
    sleeper.machine.memory.write(0x5000, other.image)
    assert sleeper.machine.run(TIMEOUT_S) == PASSED
    assert (sleeper.seen(0, 4), sleeper.seen(4, 4)) == (1, 1)


def test_a_guest_that_sleeps_a_few_times(machines: list[pyvmm.Machine]) -> None:
    """Each time it is woken it suspends again, from real mode; the fourth time it ends."""
    resume = """
        .fill   3, 1, 0x90
        incw    SEEN
        cmpw    $4, SEEN
        je      9f
        mov     $0x602, %dx
        mov     $0x400, %ax
        outw    %ax, %dx
        cmos_in 12
        cmos_out 11, 0x22
        mov     $0x604, %dx
        mov     $0x2400, %ax
        outw    %ax, %dx
        finish  0x31
    9:  finish
    """
    sleeper = Sleeper(machines, resume=resume)
    assert sleeper.machine.run(TIMEOUT_S) == PASSED
