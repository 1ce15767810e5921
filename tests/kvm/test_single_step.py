"""KVM_SET_GUEST_DEBUG: a single step ends in RunState.DEBUG, and so does a hardware breakpoint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import PASSED, Guest

from pyvmm import RunState
from pyvmm.kvm.vcpu import GUESTDBG_ENABLE, GUESTDBG_SINGLESTEP, GUESTDBG_USE_HW_BP


def test_step_by_step(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
    s0: mov     $1, %eax
    s1: add     $2, %eax
    s2: mov     %eax, %ebx
    s3: jmp     s5
    s4: nop
    s5: finish
        """
    )
    vcpu = guest.machine.cpus[0].vcpu
    vcpu.set_guest_debug(GUESTDBG_ENABLE | GUESTDBG_SINGLESTEP)
    seen = []
    for _ in range(4):
        guest.run()
        assert guest.machine.state is RunState.DEBUG
        seen.append(guest.regs()["rip"])
    symbols = guest.program.symbols
    assert seen == [symbols[name] for name in ("s1", "s2", "s3", "s5")]
    detail = guest.machine.cpus[0].exec.detail
    assert detail["exit"] == "DEBUG"
    assert detail["pc"] == symbols["s5"]
    assert detail["exception"] == 1
    assert detail["dr6"] & 1 << 14  # BS: single step
    assert guest.regs()["rbx"] == 3
    vcpu.set_guest_debug(0)
    assert guest.run() == PASSED


@pytest.mark.native
def test_hardware_breakpoint(boot: Callable[..., Guest]) -> None:
    """The lab's emulated processor does not stop at breakpoints of its guests' guests."""
    guest = boot("mov $5, %ecx\n here: inc %ebx\n dec %ecx\n jnz here\n finish")
    vcpu = guest.machine.cpus[0].vcpu
    here = guest.program.symbols["here"]
    # DR7: L0, execution.
    vcpu.set_guest_debug(GUESTDBG_ENABLE | GUESTDBG_USE_HW_BP, [here, 0, 0, 0, 0, 0, 0, 0x1])
    guest.run()
    assert guest.machine.state is RunState.DEBUG
    regs = guest.regs()
    assert (regs["rip"], regs["rbx"]) == (here, 0)
    vcpu.set_guest_debug(0)
    assert guest.run() == PASSED
    assert guest.regs()["rbx"] == 5
