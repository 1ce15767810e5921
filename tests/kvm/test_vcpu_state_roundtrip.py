"""Every piece of a vCPU's state: read, set to something else, read back; and seen by the guest where it can look."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from guests import PASSED, PORT, Guest, Recorder

from pyvmm.errors import ConfigError, KvmError
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.x86 import vcpu_state

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16)))


@pytest.fixture
def guest(boot: Callable[..., Guest]) -> Guest:
    return boot("finish")


@pytest.fixture
def vcpu(guest: Guest) -> Vcpu:
    return guest.machine.cpus[0].vcpu


def test_regs(vcpu: Vcpu) -> None:
    values = {name: 0x1111_1111_1111_1111 * (n + 1) & (1 << 64) - 1 for n, name in enumerate(GENERAL)}
    vcpu.regs = values
    regs = vcpu.regs
    assert {name: regs[name] for name in GENERAL} == values
    # In part: what is not named stays.
    vcpu.regs = {"rax": 7}
    assert vcpu.regs == {**regs, "rax": 7}


def test_the_registers_of_an_entry_but_for_what_is_kvm_s_own(vcpu: Vcpu) -> None:
    regs, sregs = {**vcpu.regs, "rax": 7, "rip": 0x1234}, {**vcpu.sregs, "cr2": 0x5678}
    before = sregs["apic_base"]
    vcpu.enter(regs, {**sregs, "apic_base": 1, "interrupt_bitmap": [1, 2, 3, 4]})
    assert vcpu.regs == regs
    assert vcpu.sregs == {**sregs, "apic_base": before, "interrupt_bitmap": [0, 0, 0, 0]}
    with pytest.raises(ConfigError, match="the registers at the entry: a value has more bits than its register"):
        vcpu.enter({**regs, "rax": 1 << 64}, sregs)


def test_regs_are_what_the_guest_computes_with(boot: Callable[..., Guest]) -> None:
    guest = boot("add %rax, %rbx\n xor %r15, %r8\n finish")
    guest.machine.cpus[0].regs = {"rax": 3, "rbx": 1 << 40, "r8": 0xFF, "r15": 0xF0}
    assert guest.run() == PASSED
    regs = guest.regs()
    assert (regs["rbx"], regs["r8"], regs["r15"]) == ((1 << 40) + 3, 0x0F, 0xF0)


def test_sregs(vcpu: Vcpu) -> None:
    sregs = vcpu.sregs
    sregs["cr2"] = 0x1234_5678
    sregs["fs"] = {**sregs["fs"], "base": 0x7000_0000}
    sregs["gdt"] = {**sregs["gdt"], "base": 0x5000, "limit": 0x47}
    sregs["idt"] = {**sregs["idt"], "base": 0x6000, "limit": 0xFFF}
    vcpu.sregs = sregs
    after = vcpu.sregs
    for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base", "cs", "fs", "gdt", "idt"):
        assert after[name] == sregs[name], name


def test_sregs2(vcpu: Vcpu) -> None:
    state = vcpu.sregs2
    assert state["cr3"] == vcpu.sregs["cr3"]
    vcpu.sregs2 = {"cr2": 0xABCD_E000}
    assert vcpu.sregs2 == {**state, "cr2": 0xABCD_E000}


def test_fpu(vcpu: Vcpu) -> None:
    """struct kvm_fpu: 8 registers of 16 bytes, control, status, tag; and at 160 the XMM registers."""
    state = bytearray(vcpu.fpu)
    state[0:10] = bytes(range(1, 11))
    state[160:176] = bytes(range(0x20, 0x30))
    state[128:130] = struct.pack("<H", 0x027F)
    vcpu.fpu = bytes(state)
    after = vcpu.fpu
    assert after[0:10] == state[0:10]
    assert after[160:176] == state[160:176]
    assert after[128:130] == state[128:130]


def test_xsave(vcpu: Vcpu) -> None:
    """XSAVE area: XMM0 at 160, and bit 1 of XSTATE_BV (at 512) says that it is not in its initial state."""
    state = bytearray(vcpu.xsave)
    state[160:176] = b"\xa5" * 16
    state[512] |= 0b11
    vcpu.xsave = bytes(state)
    assert vcpu.xsave[160:176] == b"\xa5" * 16
    assert vcpu.get_xsave2(4096)[160:176] == b"\xa5" * 16


def test_sse_registers_reach_the_guest(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
        mov     %cr4, %rax
        or      $0x600, %eax
        mov     %rax, %cr4
        movups  %xmm1, out
        finish
        .balign 16
    out: .fill 16
        """
    )
    vcpu = guest.machine.cpus[0].vcpu
    state = bytearray(vcpu.xsave)
    state[176:192] = b"through the KVM!"
    state[512] |= 0b11
    vcpu.xsave = bytes(state)
    assert guest.run() == PASSED
    assert guest.bytes_at("out", 16) == b"through the KVM!"


def test_xcrs(vcpu: Vcpu) -> None:
    xcrs = vcpu.xcrs
    assert xcrs == {0: 1}
    vcpu.xcrs = {0: 3}
    assert vcpu.xcrs == {0: 3}


def test_msrs(vcpu: Vcpu) -> None:
    star, kernel_gs_base, sysenter_cs, nobody = 0xC0000081, 0xC0000102, 0x174, 0x1234
    values = {star: 0x0023_0010_0000_0000, kernel_gs_base: 0xFFFF_8000_1234_5000, sysenter_cs: 0x10}
    vcpu.set_msrs(values)
    # One that KVM does not know is left out, and those after it are read all the same.
    assert vcpu.get_msrs([star, nobody, kernel_gs_base, sysenter_cs]) == values
    with pytest.raises(KvmError, match="0x1234"):
        vcpu.set_msrs({star: 0, nobody: 1, sysenter_cs: 0})


def test_lapic(vcpu: Vcpu) -> None:
    state = bytearray(vcpu.lapic)
    assert len(state) == 1024
    task_priority = 0x80
    state[task_priority] = 0x50
    vcpu.lapic = bytes(state)
    assert vcpu.lapic[task_priority] == 0x50
    assert vcpu.sregs["cr8"] == 5


def test_mp_state(boot: Callable[..., Guest]) -> None:
    machine = boot("finish", cpus=2).machine
    first, second = (cpu.vcpu for cpu in machine.cpus)
    assert (first.mp_state, second.mp_state) == (0, 1)
    second.mp_state = 3
    assert second.mp_state == 3


def test_events(vcpu: Vcpu) -> None:
    """A pending NMI and its mask."""
    vcpu.nmi()
    assert vcpu.events["nmi_pending"] == 1
    state = {**vcpu.events, "nmi_pending": 0, "nmi_masked": 1, "flags": 1}  # KVM_VCPUEVENT_VALID_NMI_PENDING
    vcpu.events = state
    after = vcpu.events
    assert (after["nmi_pending"], after["nmi_masked"]) == (0, 1)


def test_debugregs(vcpu: Vcpu) -> None:
    state = vcpu.debugregs
    state["db"] = [0x1000, 0x2000, 0x3000, 0x4000]
    state["dr7"] = 0x401
    vcpu.debugregs = state
    after = vcpu.debugregs
    assert list(after["db"]) == state["db"]
    assert after["dr7"] == 0x401


def test_cpuid(guest: Guest, vcpu: Vcpu) -> None:
    entries = vcpu.cpuid
    assert {entry[0] for entry in entries} >= {0, 1, 0x80000000}
    vcpu.cpuid = entries
    assert vcpu.cpuid == entries
    assert guest.run() == PASSED


def test_tsc(vcpu: Vcpu) -> None:
    khz = vcpu.tsc_khz
    assert 100_000 < khz < 10_000_000
    vcpu.tsc_khz = khz
    assert vcpu.tsc_khz == khz
    tsc = 0x10
    before = vcpu.get_msrs([tsc])[tsc]
    assert vcpu.get_msrs([tsc])[tsc] > before


def test_translate(boot: Callable[..., Guest], vcpu: Vcpu) -> None:
    assert vcpu.translate(0x12_3456) == 0x12_3456
    assert vcpu.translate(1 << 40) is None


def test_all_of_it_moves_to_another_machine(boot: Callable[..., Guest]) -> None:
    """Paused in the middle of a computation, its state and memory go on in a second machine, to the same result."""
    source = """
        mov     $DEVICE_PORT, %edx
        mov     $1, %eax
        mov     $1000, %ecx
    1:  imul    $1664525, %rax, %rax
        add     $1013904223, %rax
        outb    %al, %dx
        loop    1b
        finish
    """
    whole, first, second = boot(source), boot(source), boot(source)
    assert whole.run() == PASSED

    class Pauser(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            super().write(offset, size, value)
            if len(self.log) == 100:
                first.machine.pause()

    first.machine.pio.map(PORT, 1, Pauser())
    first.run()
    assert first.regs()["rcx"] in (901, 900)
    facts = vcpu_state.Facts(first.machine.kvm, first.machine.vm)
    saved = vcpu_state.save(first.machine.cpus[0].vcpu, facts)
    second.machine.memory.write(0, first.machine.memory.view(0, 4 << 20))
    vcpu_state.power_on(second.machine.cpus[0].vcpu, saved, facts)
    assert second.run() == PASSED
    assert second.regs() == whole.regs()


def test_a_running_vcpu_s_state_is_refused(boot: Callable[..., Guest]) -> None:
    from pyvmm.errors import StateError

    guest = boot("1: jmp 1b")
    guest.start()
    cpu = guest.machine.cpus[0]
    while cpu.parked:
        pass
    for name in ("regs", "sregs"):
        with pytest.raises(StateError, match="pause"):
            getattr(cpu, name)
    state: dict[str, Any] = {"rax": 1}
    with pytest.raises(StateError, match="pause"):
        cpu.regs = state
    guest.machine.pause()
    cpu.regs = state
    assert cpu.regs["rax"] == 1
