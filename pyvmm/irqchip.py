"""Irqchip: a machine's interrupt controllers, whether they are in KVM or ours, and all ways to interrupt its guest.

    line(gsi)             an IrqLine: an input of the controllers, with a level
    msi(address, data)    an Msi: a message, ``fire()``
    irqfd(gsi or msi)     an IrqFd: an eventfd, each write to which is one of the two

KvmIrqchip has PIC pair, IOAPIC, local APICs and PIT (KvmPit) in KVM; PythonIrqchip (python_irqchip.py), for one
processor or none, has them in devices/. Words: a GSI is an interrupt's number in the whole machine, a pin an input of
one controller, a line the device's end; to drive one is ``set``.
"""

from __future__ import annotations

from time import monotonic_ns

from pyvmm.device import Device
from pyvmm.errors import ConfigError, StateError
from pyvmm.irq import IrqWire
from pyvmm.kvm.vm import IOAPIC, PIC_MASTER, PIC_SLAVE
from pyvmm.light import Lock
from pyvmm.options import is_int
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from pyvmm.address_space import AddressSpace
    from pyvmm.cpu_exec import CpuExec
    from pyvmm.devices.irq_pins import ControllerPins
    from pyvmm.gsi_routes import GsiRoutes, Route
    from pyvmm.irq import IrqLine
    from pyvmm.irqfd import IrqFd, Msi
    from pyvmm.kvm.system import Kvm
    from pyvmm.kvm.vm import Vm
    from pyvmm.late import Late
    from pyvmm.trace.recorder import Tap

TRACE_MSI = 13  # of the records of a trace (trace/format.py)
KVM_IOAPIC_BYTES = 0x100  # what of its page the kernel's own decodes (IOAPIC_MEM_LENGTH)
# How long after its PIT has been made KVM is told to lose missed ticks (KvmPit).
LOSE_TICKS_AFTER_S = 0.1


class Irqchip:
    """What both kinds are. Lines, MSIs and irqfds may be asked for from any thread."""

    in_kernel = False
    """Whether the controllers are KVM's: then so are the local APICs and the PIT."""

    def __init__(self) -> None:
        self._wires: dict[int, IrqWire] = {}
        self._users: dict[int, list[str]] = {}  # who has lines to a GSI, or irqfds that are levels
        self._edges: dict[int, str] = {}  # who has its irqfd that makes edges, and so the GSI for itself
        self._fds: list[IrqFd] = []
        self.tap: Tap | None = None
        """Where MSIs are recorded, while somebody traces; not those of irqfds."""

    # -- what a kind of them brings ----------------------------------------------------------------------------

    @property
    def devices(self) -> Mapping[str, Late]:
        """The controllers that are Devices, by name: the board resets and saves them with its own."""
        return {}

    @property
    def controllers(self) -> Mapping[str, ControllerPins]:
        """The pins of the controllers by name, where those are ours: to watch and to drive them."""
        return {}

    def place(self, pio: AddressSpace, mmio: AddressSpace) -> None:
        """Into the guest's address spaces, what is none of ``devices``; each at the place that it has on every PC."""

    def attach(self, loop: CpuExec) -> None:
        """The run loop of a processor they interrupt."""

    STATE_VERSION = 1

    def save(self) -> dict[str, Any]:
        """What is not in ``devices`` (state.pyx has the contract)."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what ``save`` gave."""

    def after_load(self) -> None:
        """Devices have driven their lines again: an edge that was delivered before the save is not delivered twice."""

    def power_on(self, state: dict[str, Any]) -> None:
        """For a reset: what ``save`` gives of controllers that have just been made."""

    def send(self, address: int, data: int) -> bool:
        """Send an MSI once. Whether a local APIC took it."""
        raise NotImplementedError

    def write(self, address: int, data: int) -> None:
        """An MSI whose address is none of local APICs. It is the write to memory that it is on the bus (PCI 3.0, 6.8.1)
        where the controllers are ours: a driver may look for it there, as QEMU's libqos does. KVM drops it.
        """

    def _sink(self, gsi: int) -> Vm | Callable[[int], object]:
        raise NotImplementedError

    # -- lines -------------------------------------------------------------------------------------------------

    def wire(self, gsi: int, name: str = "a device") -> IrqWire:
        """The wire of GSI 0 to 23, the IOAPIC's pins: lines to one are ORed. ``name`` is who wants it.

        ConfigError where there is no such GSI, or an irqfd without resample has it.
        """
        if not is_int(gsi) or not 0 <= gsi < layout.IOAPIC_PINS:
            raise ConfigError(f"GSI {gsi!r}: give a whole number from 0 to {layout.IOAPIC_PINS - 1}")
        if gsi in self._edges:
            owner = self._edges[gsi]
            raise ConfigError(f"GSI {gsi} is for {owner} alone, whose irqfd makes edges: {name} needs another")
        self._users.setdefault(gsi, []).append(name)
        if (wire := self._wires.get(gsi)) is None:
            wire = self._wires.setdefault(gsi, IrqWire(self._sink(gsi), gsi))
        return wire

    @property
    def wires(self) -> list[tuple[int, int, list[str]]]:
        """GSI, level and who has lines to it, of every wire that somebody wants."""
        return [(gsi, wire.level, list(self._users.get(gsi, ()))) for gsi, wire in sorted(self._wires.items())]

    def wires_by_gsi(self) -> list[tuple[int, IrqWire, list[str]]]:
        """GSI, wire and who has lines to it, of every wire that somebody wants."""
        return [(gsi, wire, list(self._users.get(gsi, ()))) for gsi, wire in sorted(self._wires.items())]

    def line(self, gsi: int, name: str = "a device") -> IrqLine:
        """Another line to GSI 0 to 23; as ``wire``."""
        return self.wire(gsi, name).line()

    def free_gsi(self, candidates: Iterable[int]) -> int | None:
        """The first of ``candidates`` that nobody uses yet."""
        taken = {gsi for gsi, names in self._users.items() if names} | self._edges.keys()
        return next((gsi for gsi in candidates if gsi not in taken), None)

    # -- MSIs and irqfds ---------------------------------------------------------------------------------------

    def msi(self, address: int, data: int, name: str = "a device") -> Msi:
        """A message-signalled interrupt (SDM vol. 3, 11.11): what a guest has written to a function's registers.

        An address or a data that is no message is no error: it is sent, and reaches nobody.
        """
        from pyvmm.irqfd import Msi

        return Msi(self, address, data, name)

    def irqfd(self, target: int | Msi, *, resample: bool = False, name: str = "a device") -> IrqFd:
        """An eventfd that interrupts: for threads without the GIL, and other processes.

        Each write to it sends the Msi ``target``, or is an edge of the GSI ``target``, which nobody else may use then.
        With ``resample`` a write raises the GSI's level, which others may drive too; the guest's end of interrupt
        lowers it and signals ``resample_fd``, and whoever still wants the interrupt writes again. ConfigError where the
        GSI is taken.
        """
        from pyvmm.irqfd import IrqFd, Msi

        if isinstance(target, Msi):
            if resample:
                raise ConfigError("an irqfd of an MSI with resample: a message has no level, leave resample out")
        else:
            self._claim(target, resample, name)
        made = IrqFd(self, target, resample, name)
        try:
            made.open_descriptors()
            self._connect(made)
        except BaseException:
            self._release(made)
            raise
        self._fds.append(made)
        return made

    def close_irqfd(self, irqfd: IrqFd) -> None:
        """What IrqFd.close does."""
        try:
            self._fds.remove(irqfd)
        except ValueError:
            return  # closed already
        self._disconnect(irqfd)
        self._release(irqfd)

    def _claim(self, gsi: int, resample: bool, name: str) -> None:
        """An irqfd's GSI is shared where it is a level; else nobody has it beside the irqfd."""
        others = self._users.get(gsi)
        if others and not resample:
            raise ConfigError(
                f"GSI {gsi} has {', '.join(others)}: {name} may share it by an irqfd with resample, or needs another"
            )
        self.wire(gsi, name)
        if not resample:
            del self._users[gsi]
            self._edges[gsi] = name

    def _release(self, irqfd: IrqFd) -> None:
        irqfd.close_descriptors()
        gsi = irqfd.target
        if not isinstance(gsi, int):
            return
        if irqfd.resample:
            self._users[gsi].remove(irqfd.name)
        else:
            del self._edges[gsi]

    def _connect(self, irqfd: IrqFd) -> None:
        """Have the controllers listen to it; all of it or nothing."""
        raise NotImplementedError

    def _disconnect(self, irqfd: IrqFd) -> None:
        raise NotImplementedError

    def msi_changed(self, msi: Msi) -> None:
        """What Msi.change does beside: an irqfd of it sends the new message."""

    # -- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the irqfds that are open. Nobody drives a line any more."""
        for irqfd in list(self._fds):
            irqfd.close()
        self._wires.clear()

    def abandon(self) -> None:
        """In a child of fork: close its copies of their descriptors."""
        for irqfd in self._fds:
            irqfd.abandon()
        self._fds.clear()


def pc_routes() -> list[Route]:
    """GSI n to pin n of the PIC pair and of the IOAPIC; but the timer's wire goes to IOAPIC pin 2, as on a PC."""
    routes: list[Route] = [
        (gsi, "irqchip", PIC_MASTER if gsi < 8 else PIC_SLAVE, gsi & 7) for gsi in range(layout.ISA_IRQS)
    ]
    for gsi in range(layout.IOAPIC_PINS):
        if gsi != layout.GSI_TIMER:
            pin = layout.GSI_TIMER if gsi == layout.IRQ_TIMER else gsi
            routes.append((gsi, "irqchip", IOAPIC, pin))
    return routes


class KvmPit(Device):
    """KVM's PIT, which a guest that never touches it does without: it is made at the first access that needs it.

    Such guests start sooner: it takes KVM a thread and a grace period. What comes here is carried out on the state that
    KVM's has, or will have (x86/pit_state.py). Control words and first bytes only change that state; the first count,
    and any read, makes it, and from then on KVM answers by itself.

    It is told a little later to lose the ticks that the guest was too slow for, and not to deliver them in a row:
    KVM_REINJECT_CONTROL waits for a grace period with a lock held that the PIT's ports take, and a vCPU that changes
    processors, as one does that enters for the first time.
    """

    impl_sizes = (1, 4)

    def __init__(self, vm: Vm, later: Callable[[Callable[[], None], float], None]) -> None:
        self._vm = vm
        self._later = later
        self._made = False
        self._state = b""  # until it is made; empty: at power-on

    def place(self, pio: AddressSpace) -> None:
        name = "KVM's PIT"
        pio.map(layout.PORT_PIT, 4, self, name=name)
        pio.map(
            layout.PORT_SPEAKER, 1, self, name=name, impl_sizes=(1, 1), read=self.read_speaker, write=self.write_speaker
        )

    @property
    def state(self) -> bytes:
        """struct kvm_pit_state2."""
        if self._made:
            return self._vm.get_pit()
        from pyvmm.x86 import irqchip_state

        return self._state or irqchip_state.PIT_AT_POWER_ON

    @state.setter
    def state(self, state: bytes) -> None:
        from pyvmm.x86 import irqchip_state

        with self.lock:
            if self._made or state != irqchip_state.PIT_AT_POWER_ON:
                self._put(state)
            else:
                self._state = state

    def _put(self, state: bytes) -> None:
        if not self._made:
            self._vm.create_pit()
            self._made = True
            self._later(lambda: self._vm.set_pit_reinject(False), LOSE_TICKS_AFTER_S)
        self._vm.set_pit(state)

    def read(self, offset: int, size: int) -> int:
        return self._read(layout.PORT_PIT + offset)

    def write(self, offset: int, size: int, value: int) -> None:
        self._write(layout.PORT_PIT + offset, value & 0xFF)

    def read_speaker(self, offset: int, size: int) -> int:
        return self._read(layout.PORT_SPEAKER)

    def write_speaker(self, offset: int, size: int, value: int) -> None:
        self._write(layout.PORT_SPEAKER, value)

    def _read(self, port: int) -> int:
        from pyvmm.x86 import pit_state

        if not self._made:
            self._put(self.state)
        before = self.state
        state = bytearray(before)
        value = pit_state.read(state, port, monotonic_ns())
        if state != before:
            self._put(bytes(state))
        return value

    def _write(self, port: int, value: int) -> None:
        from pyvmm.x86 import pit_state

        state = bytearray(self.state)
        loaded = pit_state.write(state, port, value, monotonic_ns())
        if loaded or self._made:
            self._put(bytes(state))
        else:
            self._state = bytes(state)


class KvmIrqchip(Irqchip):
    """KVM's. Made after the memory slots, each later change of which waits for a grace period, and before the vCPUs,
    which get their local APICs from it. ``later(work, seconds)`` is Chassis.in_background.
    """

    in_kernel = True

    def __init__(self, kvm: Kvm, vm: Vm, later: Callable[[Callable[[], None], float], None]) -> None:
        super().__init__()
        self._vm = vm
        self._loaded: dict[str, bytes] = {}
        self._kvm = kvm
        self._lock = Lock()
        self._routes: GsiRoutes | None = None
        self._pit = KvmPit(vm, later)
        vm.create_irqchip()
        vm.set_gsi_routing(pc_routes())

    @property
    def routes(self) -> GsiRoutes:
        """KVM's table of them, made when somebody wants one beside those of the pins."""
        with self._lock:
            if self._routes is None:
                from pyvmm.gsi_routes import GsiRoutes

                limit = self._kvm.check_extension("KVM_CAP_IRQ_ROUTING")
                pins = ("KVM's IOAPIC and PIC", pc_routes(), layout.IOAPIC_PINS)
                self._routes = GsiRoutes(self._vm.set_gsi_routing, limit, *pins)
            return self._routes

    def place(self, pio: AddressSpace, mmio: AddressSpace) -> None:
        # An access there never comes to us.
        for space, address, size, name in (
            (pio, layout.PORT_PIC_MASTER, 2, "KVM's PIC"),
            (pio, layout.PORT_PIC_SLAVE, 2, "KVM's PIC"),
            (pio, layout.PORT_PIC_ELCR, 2, "KVM's PIC"),
            (mmio, layout.IOAPIC, KVM_IOAPIC_BYTES, "KVM's IOAPIC"),
            (mmio, layout.LAPIC, layout.LAPIC_BYTES, "KVM's local APIC"),
        ):
            space.reserve(address, size, name)
        self._pit.place(pio)

    def save(self) -> dict[str, Any]:
        from pyvmm.x86 import irqchip_state

        return irqchip_state.save(self._vm, self._pit.state)

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.x86 import irqchip_state

        self._loaded = irqchip_state.checked(state, self.save())

    def after_load(self) -> None:
        self.power_on(self._loaded)
        self._loaded = {}

    def power_on(self, state: dict[str, Any]) -> None:
        from pyvmm.x86 import irqchip_state

        irqchip_state.put(self._vm, state)
        self._pit.state = state["pit"]

    def send(self, address: int, data: int) -> bool:
        if (tap := self.tap) is not None:
            tap.mark(TRACE_MSI, address, data)
        return self._vm.signal_msi(address, data)

    def _sink(self, gsi: int) -> Vm:
        return self._vm

    def _connect(self, irqfd: IrqFd) -> None:
        target = irqfd.target
        if isinstance(target, int):
            self._vm.irqfd(irqfd.fd, target, resample_fd=irqfd.resample_fd)
            return
        if target.gsi >= 0:
            raise StateError(f"{target.name}: this MSI has its irqfd already: use that one")
        target.gsi = self.routes.add_msi(target.message, target.name)
        try:
            self._vm.irqfd(irqfd.fd, target.gsi)
        except BaseException:
            self._unroute(target)
            raise

    def _disconnect(self, irqfd: IrqFd) -> None:
        target = irqfd.target
        if isinstance(target, int):
            self._vm.irqfd(irqfd.fd, target, deassign=True)
        else:
            self._vm.irqfd(irqfd.fd, target.gsi, deassign=True)
            self._unroute(target)

    def _unroute(self, msi: Msi) -> None:
        gsi, msi.gsi = msi.gsi, -1
        self.routes.remove(gsi)

    def msi_changed(self, msi: Msi) -> None:
        if msi.gsi >= 0:
            self.routes.change_msi(msi.gsi, msi.message)
