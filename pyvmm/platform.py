"""Platforms: who runs a guest's instructions. KvmPlatform has a VM and its vCPUs; NoCpuPlatform (accel="qtest") nobody.

The order is KVM's: memory slots before the irqchip (each slot change after it waits for an SRCU grace period), the
irqchip before the vCPUs (which get their local APICs from it).
"""

from __future__ import annotations

from pyvmm.cpu import Cpu
from pyvmm.cpu_exec import CpuExec
from pyvmm.errors import ConfigError, StateError
from pyvmm.irqchip import KvmIrqchip
from pyvmm.kvm.system import CAPABILITIES, Kvm
from pyvmm.kvm.vcpu import pack_cpuid
from pyvmm.kvm_clock import KvmClock, ways
from pyvmm.kvm_listener import KvmListener
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pyvmm.address_space import AddressSpace
    from pyvmm.chassis import Chassis
    from pyvmm.clock import Clock
    from pyvmm.event_loop import EventLoop
    from pyvmm.irqchip import Irqchip
    from pyvmm.kvm.system import CpuidEntry
    from pyvmm.kvm.vm import Vm
    from pyvmm.memory_map import MemoryMap
    from pyvmm.spec import Spec
    from pyvmm.state import Holder
    from pyvmm.x86.cpu_state import BootState
    from pyvmm.x86.vcpu_state import Facts

XAPIC_CPUS = 255  # as many as ids of eight bits can name, of which the last is the broadcast
X2APIC_FLAGS = 0b11  # KVM_X2APIC_API_USE_32BIT_IDS, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK


class Platform:
    """What both kinds answer. ``cpus`` is empty until ``make_cpus``; ``irqchip`` is what interrupts them."""

    runs_guests = False
    """Whether there are vCPUs, so that guest time passes by itself."""

    irqchip: Irqchip

    def __init__(self) -> None:
        self.cpus: list[Cpu] = []

    @property
    def tsc_khz(self) -> int:
        """How fast the guest's TSCs count; 0 without any."""
        return 0

    @staticmethod
    def clock(loop: EventLoop) -> Clock:
        """Guest time, which the devices see."""
        raise NotImplementedError

    @property
    def kvm(self) -> Kvm:
        raise StateError("accel='qtest' has no KVM: make the machine with accel='kvm'")

    @property
    def vm(self) -> Vm:
        raise StateError("accel='qtest' has no VM: make the machine with accel='kvm'")

    @property
    def listener(self) -> KvmListener:
        raise StateError("accel='qtest' has no KVM to listen for: make the machine with accel='kvm'")

    def make_cpus(self, chassis: Chassis) -> None:
        """The vCPUs, at power-on; each on a thread of its own once the machine runs."""

    def enter(self, boot: BootState | None) -> None:
        """The first vCPU at the guest's entry, the others wait for INIT and SIPI, as KVM made them. None: at the reset
        vector, as it is.
        """

    def reset(self) -> None:
        """vCPUs, interrupt controllers and clocks back to power-on. Every vCPU is parked."""

    def holders(self) -> list[tuple[str, Holder]]:
        """What has state here, by name, in the order in which it goes back (state.pyx)."""
        return []

    def cpu_identity(self) -> tuple[int, int, str] | None:
        """What a guest's inventory says of its processors. None without one."""
        return None

    def cpu_features(self) -> list[str]:
        """The features that the guest's processors show, by cpu_features.py's names; in order."""
        return []

    def hide(self, features: Iterable[str]) -> None:
        """Show these no more. Before the guest runs."""

    @property
    def gathers_ports(self) -> bool:
        """Whether writes to ports can be gathered (KVM's coalesced PIO)."""
        return False

    def finish_in_background(self, chassis: Chassis) -> None:
        """What takes long and need not be done before the guest starts."""

    def coalesce(self, space: AddressSpace, address: int, size: int) -> None:
        """Have writes to this range gathered from now on."""
        raise StateError("accel='qtest' has no KVM to gather writes: map the range without it")


class NoCpuPlatform(Platform):
    """Devices only, driven from outside; guest time stands still until somebody moves it."""

    def __init__(self, chassis: Chassis) -> None:
        super().__init__()
        self.irqchip = python_irqchip(chassis)

    @staticmethod
    def clock(loop: EventLoop) -> Clock:
        from time import time_ns

        from pyvmm.clock import VirtualClock

        return VirtualClock(wall_ns=time_ns())


class KvmPlatform(Platform):
    """A VM with ``memory_map`` in its slots, and with KVM's interrupt controllers and PIT or with ours."""

    runs_guests = True

    @staticmethod
    def clock(loop: EventLoop) -> Clock:
        return loop.clock

    def __init__(self, config: Spec, memory_map: MemoryMap, chassis: Chassis) -> None:
        super().__init__()
        self._config = config
        self._cpu = config.cpu
        closers = chassis.closers
        self._kvm = Kvm()
        closers.call(self._kvm.close, self._kvm.close)
        check_limits(self._kvm, config.cpus)
        self._vm = self._kvm.create_vm()
        closers.call(self._vm.close, self._vm.close)
        closers.call(self._close_cpus, self._abandon_cpus)
        self._listener = closers.add(KvmListener(self._kvm, self._vm, chassis.pio))
        for told in (memory_map, chassis.pio, chassis.mmio):
            told.listen(self._listener)
        # Required before the first vCPU on Intel's processors (api.rst), with any irqchip.
        self._vm.set_tss_address(layout.KVM_TSS)
        self._vm.set_identity_map_address(layout.KVM_IDENTITY_MAP)
        chassis.mmio.reserve(layout.KVM_PAGES, layout.KVM_PAGES_BYTES, "pages of KVM's own")
        self._use_ids(self._vm)
        if config.irqchip == "kernel":
            self.irqchip = closers.add(KvmIrqchip(self._kvm, self._vm, chassis.in_background))
        else:
            self.irqchip = python_irqchip(chassis)

    @property
    def kvm(self) -> Kvm:
        return self._kvm

    @property
    def vm(self) -> Vm:
        return self._vm

    @property
    def listener(self) -> KvmListener:
        return self._listener

    @property
    def tsc_khz(self) -> int:
        return self._clock.tsc_khz

    def _use_ids(self, vm: Vm) -> None:
        """For more processors than an xAPIC can name: APIC ids of 32 bits in all that KVM is told, and 255 the id of
        one processor. Before the irqchip. Linux virt/kvm/api.rst, KVM_CAP_X2APIC_API.
        """
        cpus = self._config.cpus
        if cpus <= XAPIC_CPUS:
            return
        capability = "KVM_CAP_X2APIC_API"
        if self._kvm.check_extension(capability) & X2APIC_FLAGS != X2APIC_FLAGS:
            raise ConfigError(f"{cpus} vCPUs: this host's KVM has no x2APIC ids, ask for at most {XAPIC_CPUS}")
        vm.enable_cap(CAPABILITIES[capability], X2APIC_FLAGS)

    # -- vCPUs -------------------------------------------------------------------------------------------------

    def make_cpus(self, chassis: Chassis) -> None:
        irqchip = self.irqchip
        for index in range(self._config.cpus):
            vcpu = self._vm.create_vcpu(index)
            table, packed = self._cpuid(index)
            vcpu.put_cpuid(packed)
            loop = CpuExec(vcpu, chassis.pio, chassis.mmio, user_irqchip=not irqchip.in_kernel)
            irqchip.attach(loop)
            self.cpus.append(Cpu(index, vcpu, loop, chassis.control, chassis.outcomes.cpu_stopped, table))
        if irqchip.in_kernel and self._config.cpus > 1:
            # KVM builds its map of local APICs anew when one of them changes, and only then is a new vCPU in it.
            # Without this INIT and SIPI would not reach the last vCPU as long as the guest has not touched its own
            # APIC.
            vcpu.lapic = vcpu.lapic
        chassis.control.cpus = chassis.outcomes.cpus = self.cpus
        chassis.outcomes.vendor = self._vendor
        chassis.kvm_clock = self._clock = KvmClock(self._vm, self.cpus, ways(self._kvm.device))

    def enter(self, boot: BootState | None) -> None:
        if boot is not None:
            self.cpus[0].vcpu.enter(*boot.registers())

    def _close_cpus(self) -> None:
        for cpu in self.cpus:
            cpu.exec.close()
            cpu.vcpu.close()

    def _abandon_cpus(self) -> None:
        for cpu in self.cpus:
            cpu.exec.abandon()
            cpu.vcpu.close()

    def cpu_identity(self) -> tuple[int, int, str] | None:
        from pyvmm.x86 import cpuid

        return cpuid.identity(self._cpuid(0)[0])

    def cpu_features(self) -> list[str]:
        return features_of(self.cpus[0].cpuid)

    def hide(self, features: Iterable[str]) -> None:
        self._cpu = ",".join([self._cpu, *(f"-{name}" for name in features)])
        for cpu in self.cpus:
            cpu.cpuid, packed = self._cpuid(cpu.index)
            cpu.vcpu.put_cpuid(packed)

    def _cpuid(self, index: int) -> tuple[list[CpuidEntry], bytes]:
        return cpuid_table(self._kvm, self._config, self._cpu, self.irqchip.in_kernel, index)

    def _vendor(self) -> str:
        """The host's CPUID vendor string: whose exit codes a hardware exit reason is."""
        from pyvmm.x86 import cpuid

        return cpuid.identity(self._kvm.supported_cpuid())[2]

    # -- reset -------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        from pyvmm.x86 import vcpu_state

        facts = vcpu_state.facts_of(self._kvm, self._vm)
        state = self._power_on_state(facts)
        if self.irqchip.in_kernel:
            self.irqchip.power_on(state["irqchip"])
        for cpu, saved in zip(self.cpus, state["vcpus"], strict=True):
            vcpu_state.power_on(cpu.vcpu, saved, facts)
            cpu.was_reset()
        self._clock.forget_timers()

    def _power_on_state(self, facts: Facts) -> dict[str, Any]:
        """The kernel's side of a machine that has just been made: read from one that is made for it and thrown away.

        Costs a few milliseconds at a reset, and nothing at the start of the many machines that never see one.
        """
        from pyvmm.x86 import irqchip_state, vcpu_state

        twin = self._kvm.create_vm()
        try:
            state: dict[str, Any] = {}
            self._use_ids(twin)
            if self.irqchip.in_kernel:
                twin.create_irqchip()
                state["irqchip"] = irqchip_state.save(twin)
            state["vcpus"] = []
            for cpu in self.cpus:
                vcpu = twin.create_vcpu(cpu.index)
                vcpu.cpuid = cpu.cpuid
                state["vcpus"].append(vcpu_state.save(vcpu, facts))
                vcpu.close()
            return state
        finally:
            twin.close()

    def holders(self) -> list[tuple[str, Holder]]:
        """The interrupt controllers go first, behind the lines that devices drive; then the clock, to which paravirtual
        MSRs refer; then the vCPUs.
        """
        from pyvmm.x86.vcpu_state import VcpuState, facts_of

        facts = facts_of(self._kvm, self._vm)
        chips: list[tuple[str, Holder]] = [("irqchip", self.irqchip)] if self.irqchip.in_kernel else []
        cpus = [(f"vCPU {cpu.index}", VcpuState(cpu, facts)) for cpu in self.cpus]
        return [*chips, ("KVM's clock", self._clock), *cpus]

    # -- gathered writes ---------------------------------------------------------------------------------------

    @property
    def gathers_ports(self) -> bool:
        return self._listener.gathers_ports

    def finish_in_background(self, chassis: Chassis) -> None:
        self._listener.attach([cpu.exec for cpu in self.cpus])
        if self._listener.waits:
            # It waits for grace periods in KVM, which take longer than all of the recipe.
            chassis.when_it_runs(self._listener.go_live)

    def coalesce(self, space: AddressSpace, address: int, size: int) -> None:
        self._listener.coalesce(space, address, size)


def python_irqchip(chassis: Chassis) -> Irqchip:
    """Of machines without KVM's interrupt controllers."""
    from pyvmm.python_irqchip import PythonIrqchip

    return chassis.closers.add(
        PythonIrqchip(chassis.clock, chassis.loop, chassis.memory, chassis.pio, chassis.mmio)
    )


def check_limits(kvm: Kvm, cpus: int) -> None:
    limit = kvm.check_extension("KVM_CAP_MAX_VCPUS")
    if cpus > limit:
        raise ConfigError(f"{cpus} vCPUs: this host's KVM takes at most {limit}, ask for fewer")


# What cpuid.build made, by its arguments: it takes longer than making the vCPU. Nothing in it is of one machine.
MOST_TABLES = 1024
_cpuid_tables: dict[tuple[object, ...], tuple[list[CpuidEntry], bytes]] = {}


def cpuid_table(kvm: Kvm, config: Spec, cpu: str, irqchip: bool, index: int) -> tuple[list[CpuidEntry], bytes]:
    """It, and as KVM takes it."""
    key = (kvm.device, cpu, config.cpus, irqchip, index)
    if (known := _cpuid_tables.get(key)) is None:
        from pyvmm.x86 import cpuid

        if len(_cpuid_tables) >= MOST_TABLES:
            _cpuid_tables.clear()
        deadline = irqchip and bool(kvm.check_extension("KVM_CAP_TSC_DEADLINE_TIMER"))
        made = cpuid.build(
            kvm.supported_cpuid(),
            spec=cpu,
            apic_id=index,
            cpus=config.cpus,
            irqchip=irqchip,
            tsc_deadline=deadline,
            brand=[kvm.host_cpuid(function) for function in cpuid.BRAND_STRING],
        )
        known = _cpuid_tables[key] = made, pack_cpuid(made)
    return known


# The names of what a table shows, with the table: so that no other one can have its identity.
_features: dict[int, tuple[list[CpuidEntry], list[str]]] = {}


def features_of(table: list[CpuidEntry]) -> list[str]:
    found = _features.get(id(table))
    if found is None:
        from pyvmm.x86.cpu_features import present

        if len(_features) >= MOST_TABLES:
            _features.clear()
        found = _features[id(table)] = table, present(table)
    return found[1]
