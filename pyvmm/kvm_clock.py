"""KvmClock: what KVM keeps of guest time (the paravirtual clock, TSCs, deadline timers) stops with the machine.

Linux Documentation/virt/kvm/api.rst, KVM_GET_CLOCK, KVM_SET_CLOCK, KVM_KVMCLOCK_CTRL; devices/vcpu.rst,
KVM_VCPU_TSC_CTRL; Intel SDM vol. 3, 18.17 (time-stamp counter), 11.5.4.1 (TSC-deadline mode).

The PIT and the APIC's counting timers run on in the kernel: setting them anew would mean to write the whole state of an
APIC, and lose an interrupt that comes in between. One that runs out meanwhile ticks once when the machine goes on.
"""

from __future__ import annotations

from pyvmm.errors import KvmError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.cpu import Cpu
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.kvm.vm import Vm

MSR_TSC = 0x10
MSR_TSC_DEADLINE = 0x6E0
COUNTS = (MSR_TSC, MSR_TSC_DEADLINE)
MASK_64 = (1 << 64) - 1


class Ways:
    """What is known of how one KVM keeps time: a call that it refuses costs as much as one that it takes."""

    __slots__ = ("offsets", "tsc_khz")

    def __init__(self) -> None:
        self.offsets = True
        """It has KVM_VCPU_TSC_OFFSET, as far as is known."""
        self.tsc_khz = 0
        """How fast a new vCPU's TSC counts; 0 where nobody has asked yet."""


_ways: dict[object, Ways] = {}


def ways(device: object) -> Ways:
    """Of the KVM behind Kvm.device, once a process."""
    return _ways.setdefault(device, Ways())


class KvmClock:
    """``stop`` when every vCPU has parked, ``start`` before the first goes on: in between no time passes for the guest.

    Times are of all vCPUs together: their TSCs are moved by one difference, so that they stay in step.
    """

    __slots__ = ("_clock_ns", "_cpus", "_deadlines", "_loaded_offsets", "_tsc", "_tsc_khz", "_vm", "_ways", "tsc_khz")

    def __init__(self, vm: Vm, cpus: Sequence[Cpu], known: Ways | None = None) -> None:
        self._vm = vm
        self._cpus = cpus
        self._ways = known = known or Ways()
        # Asked for now: the ioctl waits for a vCPU that runs, and one that has halted for good never comes back.
        self.tsc_khz = known.tsc_khz = known.tsc_khz or cpus[0].vcpu.tsc_khz
        """How fast the guest's TSCs count."""
        self._clock_ns: int | None = None  # None while time runs
        self._tsc = 0
        self._deadlines: list[int] = []
        self._loaded_offsets: list[int] = []
        self._tsc_khz = 0

    def stop(self) -> None:
        """Note the time. A second call changes nothing."""
        if self._clock_ns is not None:
            return
        self._clock_ns = self._vm.get_clock()["clock"]
        # Before one runs out: KVM forgets a deadline when it has told the guest of it.
        counts = [cpu.vcpu.get_msrs(COUNTS) for cpu in self._cpus]
        self._tsc = counts[0][MSR_TSC]
        self._deadlines = [count.get(MSR_TSC_DEADLINE, 0) for count in counts]

    def forget_timers(self) -> None:
        """A reset has disarmed them."""
        self._deadlines = [0] * len(self._cpus)

    def start(self) -> None:
        """Go on from where it stopped, and tell the guest that it stood: its watchdogs then keep quiet."""
        clock_ns, self._clock_ns = self._clock_ns, None
        if clock_ns is None:
            return
        if self._ways.offsets or any(self._deadlines):
            self._take_back()
        self._vm.set_clock(clock_ns)
        for cpu in self._cpus:
            cpu.vcpu.kvmclock_ctrl()

    def _take_back(self) -> None:
        """What the TSCs have counted meanwhile; where that can't be, the deadlines move with them."""
        # Of a machine that goes on from a saved state it may be less than it was.
        passed = signed(tsc(self._cpus[0].vcpu) - self._tsc)
        for cpu in self._cpus:
            self._move_tsc(cpu.vcpu, -passed)
        if not any(self._deadlines):
            return
        # What could not be taken back (a KVM whose guests read the host's counter).
        left = signed(tsc(self._cpus[0].vcpu) - self._tsc)
        late = left if abs(left) > abs(passed) // 2 else 0
        for cpu, due in zip(self._cpus, self._deadlines, strict=True):
            if due:
                # Armed for a moment of the host's: written again, it is armed by the guest's TSC of now.
                cpu.vcpu.set_msrs({MSR_TSC_DEADLINE: due + late & MASK_64})

    def _move_tsc(self, vcpu: Vcpu, difference: int) -> None:
        """By KVM's own offset, exactly: a value written to the MSR would be rounded to those of the other vCPUs."""
        if not self._ways.offsets:
            return  # before Linux 5.16: the counter runs on
        try:
            vcpu.tsc_offset = vcpu.tsc_offset + difference & MASK_64
        except KvmError:
            self._ways.offsets = False

    # -- state (state.pyx has the contract) -------------------------------------------------------------------------

    STATE_VERSION = 1

    def save(self) -> dict[str, Any]:
        """As of the stop. Of the TSCs' offsets those to vCPU 0's: the rest follows from its count. [] where KVM tells
        none.
        """
        first = self._cpus[0].vcpu
        stopped = self._clock_ns is not None
        offsets = self._offsets()
        return {
            "clock_ns": self._clock_ns if stopped else self._vm.get_clock()["clock"],
            "tsc": self._tsc if stopped else tsc(first),
            "tsc_khz": self.tsc_khz,
            "tsc_offsets": [offset - offsets[0] & MASK_64 for offset in offsets],
            "deadlines": list(self._deadlines) if stopped else [deadline(cpu.vcpu) for cpu in self._cpus],
        }

    def _offsets(self) -> list[int]:
        if self._ways.offsets:
            try:
                return [cpu.vcpu.tsc_offset for cpu in self._cpus]
            except KvmError:
                self._ways.offsets = False
        return []  # before Linux 5.16

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import once

        loaded = once(state, len(self._cpus), lambda: self._checked(state))
        self._clock_ns, self._tsc, self._tsc_khz, self._loaded_offsets, deadlines = loaded
        self._deadlines = list(deadlines)

    def _checked(self, state: dict[str, Any]) -> tuple[int, int, int, list[int], list[int]]:
        from pyvmm.state import check_length, check_names, value_of

        check_names(state, ("clock_ns", "tsc", "tsc_khz", "tsc_offsets", "deadlines"))
        clock_ns = value_of(63, state["clock_ns"], "clock_ns")
        count = value_of(64, state["tsc"], "tsc")
        khz = value_of(31, state["tsc_khz"], "tsc_khz")
        offsets = value_of(("list", 64, 0, len(self._cpus)), state["tsc_offsets"], "tsc_offsets")
        deadlines = value_of(("list", 64, len(self._cpus)), state["deadlines"], "deadlines")
        if offsets:
            check_length(len(offsets), (len(self._cpus),), "tsc_offsets", "entries")
        return clock_ns, count, khz, offsets, deadlines

    def pass_time(self, ns: int) -> None:
        """So much time has passed since what was loaded. Before ``after_load``."""
        assert self._clock_ns is not None
        self._clock_ns += ns
        self._tsc = self._tsc + ns * self._tsc_khz // 1_000_000 & MASK_64

    def after_load(self) -> None:
        """The counts go on at ``start``. StateError where this host's TSC counts faster or slower, and can't be scaled.
        """
        if self._tsc_khz != self.tsc_khz:
            try:
                for cpu in self._cpus:
                    cpu.vcpu.tsc_khz = self._tsc_khz
            except KvmError:
                raise StateError(
                    f"the guest's TSC counts {self._tsc_khz} kHz, this host's {self.tsc_khz}, and its KVM can't scale"
                ) from None
            self.tsc_khz = self._tsc_khz
        if len(self._cpus) == 1:
            return  # nobody to be in step with
        first = self._offsets()[:1]
        for cpu, difference in zip(self._cpus, self._loaded_offsets if first else [], strict=False):
            cpu.vcpu.tsc_offset = first[0] + difference & MASK_64


def signed(difference: int) -> int:
    """A difference of two counts of 64 bits."""
    return (difference & MASK_64 ^ 1 << 63) - (1 << 63)


def tsc(vcpu: Vcpu) -> int:
    return vcpu.get_msrs([MSR_TSC])[MSR_TSC]


def deadline(vcpu: Vcpu) -> int:
    """What its TSC-deadline timer is armed for; 0 where it is not, or there is none."""
    try:
        return vcpu.get_msrs([MSR_TSC_DEADLINE])[MSR_TSC_DEADLINE]
    except KvmError:
        return 0

