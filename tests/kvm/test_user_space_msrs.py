"""KVM_CAP_X86_USER_SPACE_MSR: MSRs that KVM does not know go to msr_handler; None or False is a #GP in the guest."""

from __future__ import annotations

from collections.abc import Callable

from guests import PASSED, Guest

from pyvmm.kvm.system import CAPABILITIES

UNKNOWN_EXITS = 1 << 1  # KVM_MSR_EXIT_REASON_UNKNOWN
MSR = 0x1234  # nobody's
BAD_MSR = 0x1235


class Msrs:
    def __init__(self) -> None:
        self.value = 0x1122334455667788

    def read(self, index: int) -> int | None:
        return self.value if index == MSR else None

    def write(self, index: int, value: int) -> bool:
        if index == MSR:
            self.value = value
        return index == MSR


SOURCE = """
    .include "interrupts64.inc"
    set_gate 13, on_gp
    load_idt
    {good}
    mov     $0x1235, %ecx
    movq    $1f, resume
    rdmsr
1:  movq    $2f, resume
    wrmsr
2:  finish
on_gp:                                  # goes on where `resume` says; error code on the stack
    incl    faults
    mov     resume, %rax
    mov     %rax, 8(%rsp)
    add     $8, %rsp
    iretq
    .balign 8
resume: .quad 0
faults: .long 0
"""

READ_INVERT_WRITE = """
    mov     $0x1234, %ecx
    rdmsr
    mov     %eax, %ebx
    mov     %edx, %esi
    not     %eax
    not     %edx
    wrmsr
"""


def test_reads_and_writes(boot: Callable[..., Guest]) -> None:
    guest = boot(SOURCE.format(good=READ_INVERT_WRITE))
    handler = Msrs()
    guest.machine.vm.enable_cap(CAPABILITIES["KVM_CAP_X86_USER_SPACE_MSR"], UNKNOWN_EXITS)
    guest.machine.cpus[0].exec.msr_handler = handler
    assert guest.run() == PASSED
    regs = guest.regs()
    assert (regs["rbx"], regs["rsi"]) == (0x55667788, 0x11223344)
    assert handler.value == 0xEEDDCCBBAA998877
    assert guest.value("faults") == 2
    assert (guest.exits("X86_RDMSR"), guest.exits("X86_WRMSR")) == (2, 2)


def test_with_no_handler_all_fault(boot: Callable[..., Guest]) -> None:
    guest = boot(SOURCE.format(good=""))
    guest.machine.vm.enable_cap(CAPABILITIES["KVM_CAP_X86_USER_SPACE_MSR"], UNKNOWN_EXITS)
    assert guest.run() == PASSED
    assert guest.value("faults") == 2
