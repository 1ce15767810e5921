"""Guest time stands with the machine, also what KVM keeps of it: kvmclock, TSC, TSC-deadline timers."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from time import monotonic_ns
from typing import Any

import pytest
from guests import PASSED, PORT, TIMEOUT_S, Guest, Recorder

import pyvmm

MSR_TSC = 0x10
STAND_NS = 300_000_000

# kvmclock at PVCLOCK (Linux virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW), told by a write to DEVICE_PORT; then until
# its flag PVCLOCK_GUEST_STOPPED is set.
UNTIL_TOLD = """
    .set    PVCLOCK, 0xa000
    mov     $0x4b564d01, %ecx
    mov     $PVCLOCK + 1, %eax
    xor     %edx, %edx
    wrmsr
    mov     $DEVICE_PORT, %edx
    outl    %eax, %dx
1:  pause
    testb   $2, PVCLOCK + 29
    jz      1b
    finish
"""


def stand(until: Callable[[], bool] = lambda: False) -> int:
    """Let host time pass: how much it was, in ns."""
    start = monotonic_ns()
    pause = Event()
    while (passed := monotonic_ns() - start) < STAND_NS and not until():
        pause.wait(0.02)
    return passed


def started(guest: Guest) -> Guest:
    """Running, and past its first access of the device at PORT."""
    device = Recorder()
    guest.machine.pio.map(PORT, 4, device)
    guest.start()
    device.wait_for(1)
    return guest


def test_the_guest_is_told_that_it_stood(boot: Callable[..., Guest]) -> None:
    guest = started(boot(UNTIL_TOLD))
    guest.machine.pause()
    guest.machine.resume()
    guest.wait()
    assert guest.machine.control.status == PASSED


def test_a_guest_that_never_stood_is_told_nothing(boot: Callable[..., Guest]) -> None:
    guest = started(boot(UNTIL_TOLD))
    guest.machine.pause()
    assert not guest.machine.memory.read(0xA000 + 29, 1)[0] & 2


def clock_ns(m: pyvmm.Machine) -> int:
    return m.vm.get_clock()["clock"]


@pytest.mark.parametrize("how", ["pause", "timeout", "io-error"])
def test_kvmclock_stands(boot: Callable[..., Guest], how: str) -> None:
    """From the first look to the last as much has passed as the machine ran, whatever made it stand."""
    guest = started(boot("mov $DEVICE_PORT, %edx\n outl %eax, %dx\n 1: pause\n jmp 1b"))
    m = guest.machine
    if how == "pause":
        m.pause()
    elif how == "timeout":
        with pytest.raises(TimeoutError):
            m.run(0.01)
    else:
        m.drives.failed(type("Backend", (), {"name": "disk"})(), "write", 28, "stop")
        assert m.wait(TIMEOUT_S)
    first, began = clock_ns(m), monotonic_ns()
    stood = stand()
    m.resume()
    m.pause()
    assert clock_ns(m) - first <= monotonic_ns() - began - stood


def test_a_reset_of_a_standing_machine_goes_on_in_time(boot: Callable[..., Guest]) -> None:
    guest = started(boot("mov $DEVICE_PORT, %edx\n outl %eax, %dx\n 1: pause\n jmp 1b", cpus=2))
    m = guest.machine
    m.pause()
    first, began = clock_ns(m), monotonic_ns()
    stood = stand()
    m.reset()
    m.resume()
    m.pause()
    assert clock_ns(m) - first <= monotonic_ns() - began - stood


# RDTSC into `last`, over and over.
TELL_TSC = """
    mov     $DEVICE_PORT, %edx
1:  rdtsc
    shl     $32, %rdx
    or      %rdx, %rax
    mov     %rax, last
    mov     $DEVICE_PORT, %edx
    outl    %eax, %dx
    jmp     1b
    .balign 8
last: .quad 0
"""


@pytest.mark.lab
@pytest.mark.parametrize("cpus", [1, 2])
def test_the_tsc_stands(boot: Callable[..., Guest], cpus: int) -> None:
    """Software KVM's guests read the host's counter, which nobody can stop."""
    guest = boot(TELL_TSC, cpus=cpus)
    device = Recorder()
    guest.machine.pio.map(PORT, 4, device)
    guest.start()
    device.wait_for(1)
    m = guest.machine
    vcpus = [cpu.vcpu for cpu in m.cpus]

    def guest_and_host() -> tuple[int, int]:
        value, offset = vcpus[0].get_msrs([MSR_TSC])[MSR_TSC], vcpus[0].tsc_offset
        return value, value - offset & (1 << 64) - 1

    def apart() -> list[int]:
        """KVM starts vCPUs that are made within a second in step; on a slower host they are apart from the start."""
        return [vcpu.tsc_offset - vcpus[0].tsc_offset for vcpu in vcpus]

    m.pause()
    step = apart()
    # As of the stop: between that and a look at it now the host's counter has run on.
    kvm_clock = m.board.chassis.kvm_clock
    assert kvm_clock is not None
    before = kvm_clock.save()["tsc"]
    host_before = before - vcpus[0].tsc_offset & (1 << 64) - 1
    stand()
    _, host_after = guest_and_host()
    m.resume()
    device.wait_for(len(device.log) + 2)
    m.pause()
    last, host_last = guest_and_host()
    assert last - before <= (host_last - host_before) - (host_after - host_before)
    assert before <= guest.value("last", 8) + (last - before) and guest.value("last", 8) <= last
    assert apart() == step, "the vCPUs' counters have moved against each other"


DEADLINE = """
    .include "interrupts64.inc"
    .set    LVT_TIMER, 0x320
    set_gate 0x40, on_timer
    load_idt
    mov     $APIC, %edi
    movl    $0x1ff, APIC_SPURIOUS(%rdi)
    movl    $0x40040, LVT_TIMER(%rdi)       # TSC-deadline mode, vector 0x40
    mfence
    rdtsc
    shl     $32, %rdx
    or      %rdx, %rax
    add     ahead, %rax
    mov     %rax, deadline
    mov     %rax, %rdx
    shr     $32, %rdx
    mov     $0x6e0, %ecx
    wrmsr
    mov     $DEVICE_PORT, %edx
    outl    %eax, %dx
    sti
1:  pause
    jmp     1b
on_timer:
    rdtsc
    shl     $32, %rdx
    or      %rdx, %rax
    mov     %rax, fired
    finish
    .balign 8
ahead: .quad AHEAD
deadline: .quad 0
fired: .quad 0
"""


@pytest.mark.lab
def test_a_tsc_deadline_keeps_the_time_it_had_left(boot: Callable[..., Guest]) -> None:
    """It goes off when the guest's own counter has reached it, not when the host's would have."""
    khz = boot("finish").machine.cpus[0].vcpu.tsc_khz
    guest = started(boot(DEADLINE.replace("AHEAD", str(khz * 1000))))
    m = guest.machine
    m.pause()
    due = guest.value("deadline", 8)
    vcpu = m.cpus[0].vcpu
    left = due - vcpu.get_msrs([MSR_TSC])[MSR_TSC]
    assert left > 0, "the guest was not stopped within its second"
    pause: Any = Event()
    while vcpu.get_msrs([MSR_TSC])[MSR_TSC] < due:  # the kernel's timer goes off
        pause.wait(0.02)
    m.resume()
    guest.wait()
    assert m.control.status == PASSED
    assert guest.value("fired", 8) >= due
