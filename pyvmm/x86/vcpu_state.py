"""All of a vCPU's state as one plain dict, and back: for a reset to power-on state, and for a machine that is saved.

The order is that of what KVM ties together (Linux Documentation/virt/kvm/api.rst; QEMU's kvm_arch_get_registers and
kvm_arch_put_registers). Reading: the MP state comes first, for KVM_GET_MP_STATE carries out an INIT or SIPI that is
pending, which changes everything else. Writing: CPUID before all of it (done when the vCPU is made), sregs (the APIC
base) before the local APIC, MSRs after that, events last.

Time is apart: the TSC and the deadline that is armed by it belong to all vCPUs together (kvm_clock.py).
"""

from __future__ import annotations

from pyvmm.errors import KvmError, StateError
from pyvmm.kvm.vcpu_image import VcpuImage
from pyvmm.state import once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from pyvmm.cpu import Cpu
    from pyvmm.kvm.system import Kvm
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.kvm.vm import Vm

    Loaded = tuple[VcpuImage, bytes, bool]  # all of it, its nested state, whether it is halted

MSR_TSC, MSR_TSC_ADJUST, MSR_TSC_DEADLINE = 0x10, 0x3B, 0x6E0
MSR_FEATURE_CONTROL = 0x3A  # locks others: before them
# Time goes on over a reset, and a saved count put back would throw the vCPUs' TSCs out of step.
KEPT_BY_RESET = frozenset({MSR_TSC, MSR_TSC_ADJUST})
TIME_MSRS = frozenset({MSR_TSC, MSR_TSC_DEADLINE})
MP_STATE_RUNNABLE = 0
MP_STATE_UNINITIALIZED = 1
XSAVE_BYTES = 4096  # where KVM_CAP_XSAVE2 does not say more

# struct kvm_nested_state (linux/kvm.h): flags, and on Intel the address that VMXON was given, ~0 outside of VMX.
NESTED_FLAGS = slice(0, 2)
NESTED_FORMAT = slice(2, 4)
NESTED_VMXON = slice(8, 16)
NESTED_IN_GUEST = 0x0003  # KVM_STATE_NESTED_GUEST_MODE, KVM_STATE_NESTED_RUN_PENDING
NESTED_VMX = 0
NO_ADDRESS = b"\xff" * 8


class Facts:
    """What has to be known of a KVM to read a vCPU: its MSRs, the size of its FPU state, and what it has at all."""

    def __init__(self, kvm: Kvm, vm: Vm) -> None:
        from pyvmm.kvm.system import CAPABILITIES

        self.msr_indices: Sequence[int] = kvm.msr_indices()
        self.lapic = vm.has_irqchip
        self.xsave_bytes = max(XSAVE_BYTES, vm.check_extension(CAPABILITIES["KVM_CAP_XSAVE2"]))
        self.xsave2 = self.xsave_bytes > XSAVE_BYTES
        # The newer ones have PAE's page directory entries as the processor holds them.
        self.sregs = "sregs2" if kvm.check_extension("KVM_CAP_SREGS2") else "sregs"
        self.nested_bytes = kvm.check_extension("KVM_CAP_NESTED_STATE")
        self.shape = kvm.device, self.lapic, self.xsave_bytes, self.sregs, self.nested_bytes
        """Two with the same have vCPUs whose states have the same fields."""


_facts: dict[tuple[object, ...], Facts] = {}


def facts_of(kvm: Kvm, vm: Vm) -> Facts:
    """Once a process: a VM differs from another of the same KVM by its irqchip only."""
    key = kvm.device, vm.has_irqchip
    if key not in _facts:
        _facts[key] = Facts(kvm, vm)
    return _facts[key]


def save(vcpu: Vcpu, facts: Facts) -> dict[str, Any]:
    """Everything of it, as KVM has it. With the in-kernel irqchip a local APIC and an MP state as well."""
    state: dict[str, Any] = {}
    if facts.lapic:
        state["mp_state"] = vcpu.mp_state
    state["events"] = vcpu.events
    state["regs"] = vcpu.regs
    state["sregs"] = getattr(vcpu, facts.sregs)
    state["xsave"] = vcpu.get_xsave2(facts.xsave_bytes) if facts.xsave2 else vcpu.xsave
    try:
        state["xcrs"] = vcpu.xcrs
    except KvmError:
        state["xcrs"] = {}  # no XSAVE on this host: there are none
    state["msrs"] = vcpu.get_msrs(facts.msr_indices)
    if facts.lapic:
        state["lapic"] = vcpu.lapic
    state["debugregs"] = vcpu.debugregs
    return state


def image(state: dict[str, Any], facts: Facts) -> VcpuImage:
    """What ``save`` gave, ready to be put into vCPUs. Of the MSRs the one that locks others comes first."""
    msrs = dict(sorted(state["msrs"].items(), key=lambda item: item[0] != MSR_FEATURE_CONTROL))
    packed = {**state, "msrs": msrs}
    return VcpuImage(packed, lapic=facts.lapic, sregs2=facts.sregs == "sregs2", xsave_bytes=facts.xsave_bytes)


def power_on(vcpu: Vcpu, state: dict[str, Any], facts: Facts) -> None:
    """The state of a vCPU that has just been made, for a reset."""
    msrs = {index: value for index, value in state["msrs"].items() if index not in KEPT_BY_RESET}
    fresh = image({**state, "msrs": msrs}, facts)
    fresh.put(vcpu)  # KVM lists some MSRs that it does not take back
    fresh.put_last(vcpu)


# What a vCPU's state may be, by Facts.shape: reading one to see takes as long as all else of a load.
_kinds: dict[tuple[object, ...], dict[str, Any]] = {}


class VcpuState:
    """The state of one vCPU, by the contract of state.py."""

    STATE_VERSION = 1

    def __init__(self, cpu: Cpu, facts: Facts) -> None:
        self._cpu = cpu
        self._facts = facts
        self._loaded: Loaded | None = None

    def save(self) -> dict[str, Any]:
        """StateError where the guest runs guests of its own."""
        vcpu = self._cpu.vcpu
        state = save(vcpu, self._facts)
        nested = self._nested()
        state["nested"] = nested
        state["halted"] = bool(self._cpu.exec.halted)
        state["msrs"] = {f"{index:#x}": value for index, value in state["msrs"].items() if index not in TIME_MSRS}
        state["xcrs"] = {str(index): value for index, value in state["xcrs"].items()}
        return state

    def _nested(self) -> bytes:
        """StateError where the guest runs guests of its own: their state is not saved."""
        if not self._facts.nested_bytes:
            return b""
        nested = self._cpu.vcpu.get_nested_state(self._facts.nested_bytes)
        flags = int.from_bytes(nested[NESTED_FLAGS], "little")
        in_vmx = int.from_bytes(nested[NESTED_FORMAT], "little") == NESTED_VMX and nested[NESTED_VMXON] != NO_ADDRESS
        if flags & NESTED_IN_GUEST or in_vmx:
            raise StateError(
                f"vCPU {self._cpu.index} runs a hypervisor with guests of its own, whose state can't be saved: stop"
                " those first, or make the machine with cpu='host,-vmx,-svm'"
            )
        return nested

    def load(self, state: dict[str, Any]) -> None:
        shape = self._facts.shape
        self._loaded = once(state, shape, lambda: self._checked(state))

    def _checked(self, state: dict[str, Any]) -> Loaded:
        shape = self._facts.shape
        if shape not in _kinds:
            _kinds[shape] = {name: kind_of(name, value) for name, value in self.save().items()}
        checked = checked_fields(_kinds[shape], state, "")
        checked["msrs"], checked["xcrs"] = registers(state["msrs"], "msrs"), registers(state["xcrs"], "xcrs")
        return image(checked, self._facts), checked["nested"], checked["halted"]

    def after_load(self) -> None:
        """Into KVM. StateError where it takes an MSR that matters to the guest no more."""
        loaded, self._loaded = self._loaded, None
        assert loaded is not None, "after_load() without a load()"
        all_of_it, nested, halted = loaded
        cpu, vcpu = self._cpu, self._cpu.vcpu
        refused = all_of_it.put(vcpu)
        if nested != self._nested():
            vcpu.set_nested_state(nested)
        now = vcpu.get_msrs(refused) if refused else {}
        for index in refused:
            if now.get(index) != all_of_it.msrs[index]:
                raise StateError(
                    f"MSR {index:#x} does not take {all_of_it.msrs[index]:#x}: this host's KVM is another one"
                )
        all_of_it.put_last(vcpu)
        cpu.loaded(all_of_it.general, all_of_it.system, halted=halted)


def kind_of(name: str, known: object) -> object:
    """What the field ``name`` of a vCPU's state may be, from what this KVM gives: as state.py has it, or a dict of such
    for a structure. None: ``registers`` looks at it.
    """
    if name in ("msrs", "xcrs"):
        return None
    if isinstance(known, dict):
        return {key: kind_of(key, inner) for key, inner in known.items()}
    if isinstance(known, list):
        return ("list", 64, len(known))
    if isinstance(known, bool):
        return "flag"
    if isinstance(known, int):
        return 64
    assert isinstance(known, bytes)
    return ("bytes", len(known))


def checked_fields(kinds: Mapping[str, Any], saved: object, where: str) -> dict[str, Any]:
    """StateError where ``saved`` is not of these kinds."""
    from pyvmm.state import check_names, value_of

    check_names(saved, list(kinds))
    assert isinstance(saved, dict)
    checked = {}
    for name, kind in kinds.items():
        place = f"{where}.{name}" if where else name
        if isinstance(kind, dict):
            checked[name] = checked_fields(kind, saved[name], place)
        elif kind is not None:
            checked[name] = value_of(kind, saved[name], place)
    return checked


def registers(saved: object, where: str) -> dict[int, int]:
    """Registers by their numbers, whichever there are: KVM refuses the ones that it has not."""
    from pyvmm.state import shown, value_of

    if not isinstance(saved, dict):
        raise StateError(f"{where} is {shown(saved)}, no dict")
    return {number(name, where): value_of(64, value, f"{where}[{name}]") for name, value in saved.items()}


def number(name: object, where: str) -> int:
    """The register that ``name`` stands for."""
    from pyvmm.state import shown

    try:
        index = int(name, 0) if isinstance(name, str) else -1
    except ValueError:
        index = -1
    if not 0 <= index < 1 << 32:
        raise StateError(f"{where} has a {shown(name)}, which is no register")
    return index
