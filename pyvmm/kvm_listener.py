"""KvmListener: what is mapped, told to KVM: memory slots and their dirty log, ioeventfds, coalesced zones.

Linux Documentation/virt/kvm/api.rst: KVM_SET_USER_MEMORY_REGION, KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG,
KVM_IOEVENTFD, KVM_REGISTER_COALESCED_MMIO.

It hears from the MemoryMap what shows as memory, and from both address spaces where a write signals an eventfd and
where writes may be gathered. So a doorbell in a PCI BAR is an ioeventfd wherever the BAR goes, and none where it no
longer is.

A memory slot is changed as soon as the map tells of it. What is on the buses is compared at each commit with what KVM
has, because every difference costs a grace period in KVM, milliseconds with an irqchip. A machine's start does not wait
for those: until ``go_live``, which runs beside the guest, the regions answer by themselves.
"""

from __future__ import annotations

import posix
from errno import EINVAL

from pyvmm.address_space import SpaceListener
from pyvmm.device import DeviceLock
from pyvmm.errors import ConfigError, KindError, KvmError, StateError
from pyvmm.kvm.system import CAPABILITIES
from pyvmm.kvm.vm import DIRTY_LOG_MANUAL_PROTECT, MEM_LOG_DIRTY_PAGES, MEM_READONLY
from pyvmm.places import Places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.address_space import AddressSpace
    from pyvmm.cpu_exec import CpuExec
    from pyvmm.kvm.system import Kvm
    from pyvmm.kvm.vm import Vm
    from pyvmm.memory_map import Section

    Event = tuple[bool, int, int, int | None]  # is it a port, address, size (0: any), datamatch
    Zone = tuple[bool, int, int]  # is it a port, address, size

PAGE_BYTES = 4096
FEWEST_SLOTS = 32  # where KVM does not say how many there are (api.rst, KVM_CAP_NR_MEMSLOTS)


class KvmListener(SpaceListener):
    """KvmListener(kvm, vm, pio), then ``listen(it)`` of the memory map and of both spaces.

    ``attach(loops)`` when the vCPUs are made, then ``go_live()`` where it may wait. From any thread.
    """

    def __init__(self, kvm: Kvm, vm: Vm, pio: AddressSpace) -> None:
        self._kvm = kvm
        self._vm = vm
        self._pio: AddressSpace | None = pio
        self._lock = DeviceLock()
        self._live = self._closed = False
        self.gathers_ports = bool(kvm.check_extension("KVM_CAP_COALESCED_PIO"))
        """Whether this host's KVM can gather writes to ports."""
        self._slots: dict[object, tuple[int, Section]] = {}  # by Section.key
        most = kvm.check_extension("KVM_CAP_NR_MEMSLOTS") or FEWEST_SLOTS
        self.slots = Places("memory slot", 0, most, numbered=True)
        """Who has which memory slot."""
        self._logging = False
        self._gone: list[Section] = []  # went while the log was on: any page of theirs may have been written
        # Duplicates of the regions' descriptors: KVM wants an eventfd once more to let go of it, and its owner may have
        # closed it by then. What comes again to the same place has another one; it may be another eventfd.
        self._eventfds: dict[Event, int] = {}
        self._ioeventfds: dict[Event, int] = {}  # what KVM has of them
        self._use_ioeventfds = True
        self._zones: list[Zone] = []
        self._kvm_zones: list[Zone] = []  # what KVM has of them: those that touch are one
        self._loops: Sequence[CpuExec] = ()
        self._ring_lock = DeviceLock()
        self._ring_attached = False

    def close(self) -> None:
        """Give the descriptors back. The VM is on its way out: what it was told goes with it."""
        with self._lock:
            self.abandon()

    def abandon(self) -> None:
        """In a child of fork: the same, without a lock."""
        self._live, self._closed = False, True
        for fd in {*self._eventfds.values(), *self._ioeventfds.values()}:
            posix.close(fd)
        self._eventfds.clear()
        self._ioeventfds.clear()
        self._loops = ()
        self._pio = None  # which refers to us
        self._slots.clear()  # their memory, too, is no longer ours
        self._gone.clear()

    # -- memory slots --------------------------------------------------------------------------------------------------

    def section_add(self, section: Section) -> None:
        with self._lock:
            slot = self.slots.give(1, section.region.name)
            try:
                self._set_slot(slot, section)
            except BaseException:
                self.slots.free(slot)
                raise
            self._slots[section.key] = slot, section

    def section_del(self, section: Section) -> None:
        with self._lock:
            slot, known = self._slots.pop(section.key)
            self._vm.set_memory_slot(slot, section.gpa, 0, section.host_address)
            self.slots.free(slot)
            if self._logging and not section.readonly:
                self._gone.append(known)

    def _set_slot(self, slot: int, section: Section) -> None:
        flags = MEM_READONLY if section.readonly else MEM_LOG_DIRTY_PAGES if self._logging else 0
        self._vm.set_memory_slot(slot, section.gpa, section.size, section.host_address, flags)

    def log_dirty(self, on: bool) -> None:
        """Have KVM note from now on which pages the guest writes, or no longer: waits for a grace period a slot.

        KVM does not note what the host writes: a device's DMA, an image that is loaded, the RAM behind a ROM.
        """
        with self._lock:
            if on == self._logging:
                return
            if on and self._manual_protect:
                self._vm.enable_cap(CAPABILITIES["KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"], DIRTY_LOG_MANUAL_PROTECT)
            self._logging = on
            self._gone.clear()
            for slot, section in self._slots.values():
                if not section.readonly:
                    self._set_slot(slot, section)

    def take_dirty(self) -> list[tuple[Section, bytes]]:
        """What was written since ``log_dirty(True)`` or the last call: sections, each with a bitmap, a bit a page of
        4 KiB. Sections without a written page are left out; one that went meanwhile comes with all of its pages.

        The guest may run: what it writes meanwhile is in this result or in the next one. StateError with the log off.
        """
        with self._lock:
            if not self._logging:
                raise StateError("the dirty log is off: log_dirty(True) turns it on")
            gone, self._gone = self._gone, []
            taken = [(section, all_ones(section.size // PAGE_BYTES)) for section in gone]
            for slot, section in self._slots.values():
                if section.readonly:
                    continue
                bitmap = self._vm.dirty_log(slot, section.size)
                if any(bitmap):
                    if self._manual_protect:
                        self._vm.clear_dirty_log(slot, 0, section.size // PAGE_BYTES, bitmap)
                    taken.append((section, bitmap))
            return taken

    @property
    def _manual_protect(self) -> bool:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: reading the log does not clear it, KVM_CLEAR_DIRTY_LOG does so by pages.
        """
        return bool(self._kvm.check_extension("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2") & DIRTY_LOG_MANUAL_PROTECT)

    # -- what the spaces tell ------------------------------------------------------------------------------------------

    def eventfd_add(self, space: AddressSpace, address: int, size: int, datamatch: int | None, fd: int) -> None:
        with self._lock:
            if not self._closed:
                try:
                    self._eventfds[space is self._pio, address, size, datamatch] = posix.dup(fd)
                except OSError:
                    raise no_eventfd(space.name, address) from None

    def eventfd_del(self, space: AddressSpace, address: int, size: int, datamatch: int | None, fd: int) -> None:
        event = space is self._pio, address, size, datamatch
        with self._lock:
            ours = self._eventfds.pop(event, None)
            if ours is not None and self._ioeventfds.get(event) != ours:
                posix.close(ours)

    def coalesced_add(self, space: AddressSpace, address: int, size: int) -> None:
        with self._lock:
            if not self._closed and self._gathers(space):
                self._zones.append((space is self._pio, address, size))

    def coalesced_del(self, space: AddressSpace, address: int, size: int) -> None:
        zone = space is self._pio, address, size
        with self._lock:
            if zone in self._zones:
                self._zones.remove(zone)

    def commit(self) -> None:
        with self._lock:
            if self._live:
                self._apply()

    # -- what KVM is told ----------------------------------------------------------------------------------------------

    def _gathers(self, space: AddressSpace) -> bool:
        return self.gathers_ports if space is self._pio else bool(self._kvm.check_extension("KVM_CAP_COALESCED_MMIO"))

    def coalesce(self, space: AddressSpace, address: int, size: int) -> None:
        """Have writes to this range gathered from now on, whatever is mapped there. ConfigError where KVM can't."""
        if not self._gathers(space):
            raise ConfigError(f"this host's KVM does not coalesce {space.name} writes: map the range without it")
        with self._lock:
            self._zones.append((space is self._pio, address, size))
            self._apply()

    def attach(self, loops: Sequence[CpuExec]) -> None:
        """These are the vCPUs' loops, which drain what KVM gathers. Nothing is waited for yet."""
        with self._lock:
            self._loops = loops
            if self._zones:
                self._attach_ring()
            self._live = not self.waits

    @property
    def waits(self) -> bool:
        """Whether ``go_live`` has something to tell KVM."""
        return bool(self._eventfds or self._zones)

    def go_live(self) -> None:
        """Tell KVM what has been mapped, and from now on what changes, as it does."""
        with self._lock:
            self._live = True
            self._apply()

    @property
    def ioeventfds(self) -> bool:
        """Whether eventfds are KVM's to signal. False: each is an exit, which the region answers; for comparison."""
        return self._use_ioeventfds

    @ioeventfds.setter
    def ioeventfds(self, use: bool) -> None:
        with self._lock:
            self._use_ioeventfds = use
            self._apply()

    def _apply(self) -> None:
        """Bring KVM to what is wanted. What goes is taken back first, because two can't have one address."""
        wanted = self._eventfds if self._use_ioeventfds else {}
        for event, ours in list(self._ioeventfds.items()):
            if wanted.get(event) != ours:
                self._ioeventfd(event, ours, deassign=True)
                del self._ioeventfds[event]
                if self._eventfds.get(event) != ours:
                    posix.close(ours)
        for event, ours in wanted.items():
            if event not in self._ioeventfds:
                self._ioeventfd(event, ours)
                self._ioeventfds[event] = ours
        zones = joined(self._zones)
        for zone in [zone for zone in self._kvm_zones if zone not in zones]:
            self._vm.coalesce(zone[1], zone[2], pio=zone[0], unregister=True)
            self._kvm_zones.remove(zone)
        if zones:
            self._attach_ring()
        for zone in zones:
            if zone not in self._kvm_zones:
                self._vm.coalesce(zone[1], zone[2], pio=zone[0])
                self._kvm_zones.append(zone)

    def _ioeventfd(self, event: Event, fd: int, deassign: bool = False) -> None:
        is_port, address, size, datamatch = event
        try:
            self._vm.ioeventfd(fd, address, size, pio=is_port, datamatch=datamatch, deassign=deassign)
        except KvmError as error:
            if error.errno == EINVAL:
                raise no_eventfd("pio" if is_port else "mmio", address) from None
            raise

    def _attach_ring(self) -> None:
        """Every vCPU drains KVM's ring from now on: looking at it costs a page more on every exit, so not before."""
        if not self._ring_attached and self._loops:
            self._ring_attached = True
            page = self._kvm.check_extension("KVM_CAP_COALESCED_MMIO")
            for loop in self._loops:
                loop.coalesced_ring(page, self._ring_lock)


def no_eventfd(space: str, address: int) -> KindError:
    return KindError(f"{space} {address:#x}: what should be signalled there is no open eventfd: use os.eventfd()")


def joined(zones: Sequence[Zone]) -> list[Zone]:
    """The same addresses in as few zones as can be: KVM finds an access's zone only where none overlaps another."""
    found: list[Zone] = []
    for is_port, address, size in sorted(zones):
        if found and found[-1][0] == is_port and address <= found[-1][1] + found[-1][2]:
            start = found[-1][1]
            found[-1] = is_port, start, max(found[-1][2], address + size - start)
        else:
            found.append((is_port, address, size))
    return found


def all_ones(pages: int) -> bytes:
    """The bitmap of a section with every page written; whole words, as KVM's are."""
    return ((1 << pages) - 1).to_bytes((pages + 63) // 64 * 8, "little")
