"""All of a vCPU's state as one plain dict, and back: for a reset to power-on state, and for snapshots.

Order of setting follows what KVM ties together: sregs (the APIC base) before the local APIC, CPUID before
everything (done when the vCPU is made), MSRs after the APIC, events last.
"""

from __future__ import annotations

from pyvmm.errors import KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.kvm.vcpu import Vcpu

# Time goes on over a reset, and a saved count put back would throw the vCPUs' TSCs out of step.
TSC_MSRS = frozenset({0x10, 0x3B})
MP_STATE_RUNNABLE = 0
MP_STATE_UNINITIALIZED = 1


def save(vcpu: Vcpu, msr_indices: Sequence[int], *, lapic: bool) -> dict[str, Any]:
    """``lapic``: the machine has the in-kernel irqchip, and so a local APIC and an MP state."""
    state: dict[str, Any] = {
        "regs": vcpu.regs,
        "sregs": vcpu.sregs,
        "xsave": vcpu.xsave,
        "debugregs": vcpu.debugregs,
        "events": vcpu.events,
        "msrs": vcpu.get_msrs(msr_indices),
    }
    try:
        state["xcrs"] = vcpu.xcrs
    except KvmError:
        pass  # no XSAVE on this host: there are no XCRs
    if lapic:
        state["lapic"] = vcpu.lapic
        state["mp_state"] = vcpu.mp_state
    return state


def load(vcpu: Vcpu, state: dict[str, Any]) -> None:
    """Bring back what ``save`` gave."""
    vcpu.sregs = state["sregs"]
    vcpu.regs = state["regs"]
    if "xcrs" in state:
        vcpu.xcrs = state["xcrs"]
    vcpu.xsave = state["xsave"]
    vcpu.debugregs = state["debugregs"]
    if "lapic" in state:
        vcpu.lapic = state["lapic"]
    _set_msrs(vcpu, {index: value for index, value in state["msrs"].items() if index not in TSC_MSRS})
    if "mp_state" in state:
        vcpu.mp_state = state["mp_state"]
    vcpu.events = state["events"]


def _set_msrs(vcpu: Vcpu, values: dict[int, int]) -> None:
    """All at once; where KVM refuses one (it lists some that it does not take back), one by one without that one.
    """
    try:
        vcpu.set_msrs(values)
    except KvmError:
        for index, value in values.items():
            try:
                vcpu.set_msrs({index: value})
            except KvmError:
                continue
