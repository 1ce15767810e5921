"""VirtioPci: a virtio device as a function on PCI. OASIS virtio 1.2, 4.1: transitional, modern only or legacy only.

BAR 4 has the modern structures (4.1.4), BAR 1 the MSI-X table, and of a transitional function BAR 0 the legacy
registers in I/O space (4.1.4.10). QEMU's layout: drivers and firmware have seen it.

The regions of the BARs are under the device's lock. The function's own lock, for INTx and ISR, and Msix's are taken
last: whoever interrupts may hold a queue's. A queue whose vector is open signals the vector's irqfd without coming by
here.
"""

from __future__ import annotations

from struct import pack

from pyvmm.devices.pci.capability import MSIX, VENDOR_SPECIFIC, Capabilities
from pyvmm.devices.pci.device import PciDevice
from pyvmm.devices.pci.msix import BAR_BYTES, ENTRY_BYTES, PENDING, Msix
from pyvmm.devices.virtio.device import F_ANY_LAYOUT, F_RING_RESET, LEGACY_FEATURES
from pyvmm.region import EventRegion, MemoryRegion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.address_space import AddressSpace
    from pyvmm.devices.pci.msix import Interrupts
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.devices.virtio.ring import Virtqueue

VENDOR = 0x1AF4
MODERN_ID = 0x1040  # and the device's own number, 4.1.2.1
# By the device's number: its id as a transitional function (4.1.2.1), its class.
TRANSITIONAL_IDS = {1: 0x1000, 2: 0x1001, 3: 0x1003, 4: 0x1005, 5: 0x1002, 8: 0x1004, 9: 0x1009}
CLASSES = {1: 0x020000, 2: 0x010000, 3: 0x078000, 8: 0x010000, 19: 0x078000, 26: 0x018000}
OTHER_CLASS = 0x00FF00
MODERN_SUBSYSTEM = 0x1100  # 4.1.2.2: 0x40 or higher

# Structures in BAR 4
MODERN_BAR, MODERN_BYTES = 4, 0x4000
COMMON, COMMON_BYTES = 0x0000, 60
ISR = 0x1000
DEVICE = 0x2000
NOTIFY = 0x3000
STRUCTURE_BYTES = 0x1000
NOTIFY_MULTIPLIER = 4
MSIX_BAR, LEGACY_BAR = 1, 0
COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = 1, 2, 3, 4, 5  # cfg_type, 4.1.4
NO_VECTOR = 0xFFFF

# Common configuration, 4.1.4.3
COMMON_FORMAT = "<IIIIHHBBHHHHHQQQHH"
DEVICE_FEATURE_SELECT, DRIVER_FEATURE_SELECT, DRIVER_FEATURE = 0, 8, 12
CONFIG_VECTOR, STATUS, QUEUE_SELECT, QUEUE_SIZE, QUEUE_VECTOR = 16, 20, 22, 24, 26
QUEUE_ENABLE, QUEUE_RESET = 28, 58
ADDRESSES = {32: "desc_gpa", 40: "driver_gpa", 48: "device_gpa"}

# Legacy registers, 4.1.4.10
LEGACY_FEATURES_REGISTER, LEGACY_DRIVER_FEATURES, LEGACY_ADDRESS, LEGACY_SIZE = 0, 4, 8, 12
LEGACY_SELECT, LEGACY_NOTIFY, LEGACY_STATUS, LEGACY_ISR = 14, 16, 18, 19
LEGACY_CONFIG_VECTOR, LEGACY_QUEUE_VECTOR = 20, 22  # with MSI-X on; configuration space follows
LEGACY_PAGE = 4096

USED_BUFFER, CONFIG_CHANGE = 1, 2  # of ISR, 4.1.4.5


class VirtioPci(PciDevice):
    """``device`` on PCI, with BARs in ``pio`` and ``mmio``, which sends its messages through ``interrupts``.

    ``legacy``, where there is such an id, and ``modern``: the interfaces that it has, 1.3.1; both of them make it
    transitional. The queues have their eventfds already.
    """

    def __init__(
        self,
        device: VirtioDevice,
        pio: AddressSpace,
        mmio: AddressSpace,
        interrupts: Interrupts,
        *,
        legacy: bool = True,
        modern: bool = True,
    ) -> None:
        number = device.DEVICE_ID
        legacy = legacy and number in TRANSITIONAL_IDS
        modern = modern or not legacy
        super().__init__(
            vendor_id=VENDOR,
            device_id=TRANSITIONAL_IDS[number] if legacy else MODERN_ID + number,
            class_code=CLASSES.get(number, OTHER_CLASS),
            revision=0 if legacy else 1,
            subsystem=(VENDOR, number if legacy else MODERN_SUBSYSTEM),
            interrupt_pin=1,
        )
        self.device = device
        self._isr = 0
        self._config_vector = NO_VECTOR
        self._vectors = [NO_VECTOR] * len(device.queues)
        self.msix = Msix(len(device.queues) + 1, interrupts, self._route_all)
        self.STATE = {
            **PciDevice.STATE,
            "_isr": 8,
            "_config_vector": 16,
            "_vectors": ("list", 16, len(self._vectors)),
            "msix": "part",
        }
        device.transport = self
        for queue in device.queues:
            queue.on_call = self._caller(queue.index)
        if legacy:
            self._add_legacy_bar(pio)
        self._add_msix(mmio)
        self._window_data: int | None = None  # the register that leads to the modern structures
        if modern:
            self._add_modern_bar(mmio)
            self._add_modern_capabilities()

    # -- what the guest finds ----------------------------------------------------------------------------------------

    def _add_legacy_bar(self, pio: AddressSpace) -> None:
        device = self.device
        size = 1 << (LEGACY_QUEUE_VECTOR + 2 + len(device.config) - 1).bit_length()

        def make() -> MemoryRegion:
            region = MemoryRegion(size, device, name="virtio-legacy", read=self.read_legacy, write=self.write_legacy)
            for queue in device.queues:
                if queue.kick_fd >= 0:
                    region.add_eventfd(queue.kick_fd, offset=LEGACY_NOTIFY, size=2, datamatch=queue.index)
            return region

        self.add_io_bar(LEGACY_BAR, size, pio, [(0, make)])

    def _add_msix(self, mmio: AddressSpace) -> None:
        device, msix = self.device, self.msix
        pending_bytes = (msix.count + 63) // 64 * 8

        def table() -> MemoryRegion:
            return MemoryRegion(
                msix.count * ENTRY_BYTES, device, name="msix", read=msix.read_table, write=msix.write_table,
                valid_sizes=(4, 8), impl_sizes=(4, 4),
            )  # fmt: skip

        def pending() -> MemoryRegion:
            return MemoryRegion(
                pending_bytes, device, name="msix.pending", read=msix.read_pending, write=msix.write_pending,
                valid_sizes=(4, 8), impl_sizes=(4, 4),
            )  # fmt: skip

        self.add_memory_bar(MSIX_BAR, BAR_BYTES, mmio, [(0, table), (PENDING, pending)])
        self._capabilities = Capabilities(self)
        where = pack("<HII", msix.count - 1, MSIX_BAR, PENDING | MSIX_BAR)
        self._msix_control = self._capabilities.add(MSIX, where, b"\0\xc0") + 2

    def _add_modern_bar(self, mmio: AddressSpace) -> None:
        device = self.device

        def doorbell(queue: Virtqueue) -> MemoryRegion:
            return EventRegion(NOTIFY_MULTIPLIER, queue.kick_fd, name=f"virtio.notify{queue.index}")

        def structures() -> MemoryRegion:
            return MemoryRegion(NOTIFY, device, name="virtio", read=self.read_modern, write=self.write_modern)

        bells = [
            (NOTIFY + NOTIFY_MULTIPLIER * queue.index, lambda queue=queue: doorbell(queue))
            for queue in device.queues
            if queue.kick_fd >= 0
        ]
        parts = [(0, structures), *bells]
        self.add_memory_bar(MODERN_BAR, MODERN_BYTES, mmio, parts, prefetchable=True, wide=True)

    def _add_modern_capabilities(self) -> None:
        capabilities = self._capabilities
        for kind, offset, size in (
            (COMMON_CFG, COMMON, COMMON_BYTES), (ISR_CFG, ISR, 1), (DEVICE_CFG, DEVICE, STRUCTURE_BYTES)
        ):  # fmt: skip
            capabilities.add(VENDOR_SPECIFIC, structure(kind, offset, size))
        bells = structure(NOTIFY_CFG, NOTIFY, STRUCTURE_BYTES, pack("<I", NOTIFY_MULTIPLIER))
        capabilities.add(VENDOR_SPECIFIC, bells)
        # 4.1.4.9: a way to the structures through configuration space. BAR, offset, length and data are the driver's.
        window = structure(PCI_CFG, 0, 0, bytes(4))
        writable = b"\0\0\xff\0\0\0" + b"\xff" * 12
        self._window_data = capabilities.add(VENDOR_SPECIFIC, window, writable) + 16

    # -- the device's side: from any thread --------------------------------------------------------------------------

    def _caller(self, index: int) -> Callable[[], None]:
        def called() -> None:
            if self.msix.enabled:
                self.msix.notify(self._vectors[index])
            else:
                self._raise(USED_BUFFER)

        return called

    def config_interrupt(self) -> None:
        if self.msix.enabled:
            self.msix.notify(self._config_vector)
        else:
            self._raise(CONFIG_CHANGE)

    def _raise(self, cause: int) -> None:
        with self.lock:
            self._isr |= cause
            self.set_interrupt(1)

    def _take_isr(self) -> int:
        with self.lock:
            isr, self._isr = self._isr, 0
            if isr:
                self.set_interrupt(0)
            return isr

    def _route_all(self) -> None:
        for queue in self.device.queues:
            self._route(queue)

    def _route(self, queue: Virtqueue) -> None:
        """The queue's interrupts go to the irqfd of its vector, while that is open; else they come by here."""
        with queue.lock:
            before = queue.call_fd
            queue.call_fd = self.msix.fd(self._vectors[queue.index]) if self.msix.enabled else -1
            changed = queue.call_fd != before
        if changed:
            self.device.call_changed(queue)

    # -- modern: the device's lock is held ---------------------------------------------------------------------------

    def read_modern(self, offset: int, size: int) -> int:
        """BAR 4, below the doorbells."""
        if offset >= DEVICE:
            return self.device.read_config(offset - DEVICE, size)
        if offset >= ISR:
            return self._take_isr() if offset == ISR else 0
        return int.from_bytes(self._common()[offset : offset + size], "little")

    def _common(self) -> bytes:
        device = self.device
        queue = device.selected
        of_queue = (0, NO_VECTOR, 0, 0, 0, 0, 0) if queue is None else (
            queue.size & 0xFFFF, self._vectors[queue.index], int(queue.ready), queue.index,
            queue.desc_gpa, queue.driver_gpa, queue.device_gpa,
        )  # fmt: skip
        return pack(
            COMMON_FORMAT,
            device.feature_select,
            device.read_features(device.feature_select),
            device.driver_feature_select,
            device.driver_features >> 32 * device.driver_feature_select & 0xFFFF_FFFF
            if device.driver_feature_select < 2
            else 0,
            self._config_vector,
            len(device.queues),
            device.status,
            device.generation & 0xFF,
            device.queue_select & 0xFFFF,
            *of_queue,
            0,
            0,
        )

    def write_modern(self, offset: int, size: int, value: int) -> None:
        """BAR 4. A write that is no whole field is lost (4.1.3.1)."""
        device = self.device
        if offset >= NOTIFY:
            index = (offset - NOTIFY) // NOTIFY_MULTIPLIER
            if index < len(device.queues):
                device.kick(device.queues[index])
        elif offset >= DEVICE:
            device.write_config(offset - DEVICE, size, value)
        elif offset == DEVICE_FEATURE_SELECT and size == 4:
            device.feature_select = value
        elif offset == DRIVER_FEATURE_SELECT and size == 4:
            device.driver_feature_select = value
        elif offset == DRIVER_FEATURE and size == 4:
            device.write_features(device.driver_feature_select, value)
        elif offset == CONFIG_VECTOR and size == 2:
            self._config_vector = self._vector(value)
        elif offset == STATUS and size == 1:
            device.write_status(value)
            if value == 0:
                self._forget()
        elif offset == QUEUE_SELECT and size == 2:
            device.queue_select = value
        elif offset < ISR and (queue := device.selected) is not None:
            self._write_queue(queue, offset, size, value)

    def _write_queue(self, queue: Virtqueue, offset: int, size: int, value: int) -> None:
        device = self.device
        if offset == QUEUE_VECTOR and size == 2:
            self._vectors[queue.index] = self._vector(value)
            self._route(queue)
        elif offset == QUEUE_ENABLE and size == 2:
            if value == 1:
                device.enable_queue(queue)
        elif offset == QUEUE_RESET and size == 2:
            if value == 1 and device.features & F_RING_RESET:
                device.reset_queue(queue)
        elif queue.ready:
            return  # 4.1.4.3.2: not while it is in use
        elif offset == QUEUE_SIZE and size == 2:
            queue.size = value
        elif size == 4 and (name := ADDRESSES.get(offset & ~7)) is not None:
            shift = 32 if offset & 4 else 0
            setattr(queue, name, getattr(queue, name) & ~(0xFFFF_FFFF << shift) | value << shift)

    def _vector(self, value: int) -> int:
        """4.1.5.1.2: one that is not there reads back as none."""
        return value if value < self.msix.count else NO_VECTOR

    def _forget(self) -> None:
        """The device has been reset: no vectors, no interrupt."""
        self._config_vector = NO_VECTOR
        self._vectors[:] = [NO_VECTOR] * len(self._vectors)
        self._take_isr()
        self._route_all()

    # -- legacy: the device's lock is held ---------------------------------------------------------------------------

    def read_legacy(self, offset: int, size: int) -> int:
        device = self.device
        header = LEGACY_QUEUE_VECTOR + 2 if self.msix.enabled else LEGACY_CONFIG_VECTOR
        if offset >= header:
            return device.read_config(offset - header, size)
        queue = device.selected
        if offset == LEGACY_FEATURES_REGISTER:
            return (device.offered | F_ANY_LAYOUT) & LEGACY_FEATURES
        if offset == LEGACY_DRIVER_FEATURES:
            return device.driver_features & LEGACY_FEATURES
        if offset == LEGACY_SELECT:
            return device.queue_select & 0xFFFF
        if offset == LEGACY_STATUS:
            return device.status
        if offset == LEGACY_ISR:
            return self._take_isr()
        if offset == LEGACY_CONFIG_VECTOR:
            return self._config_vector
        if queue is None:
            return NO_VECTOR if offset == LEGACY_QUEUE_VECTOR else 0
        if offset == LEGACY_ADDRESS:
            return queue.desc_gpa // LEGACY_PAGE if queue.ready else 0
        if offset == LEGACY_SIZE:
            return queue.max_size
        return self._vectors[queue.index] if offset == LEGACY_QUEUE_VECTOR else 0

    def write_legacy(self, offset: int, size: int, value: int) -> None:
        device = self.device
        header = LEGACY_QUEUE_VECTOR + 2 if self.msix.enabled else LEGACY_CONFIG_VECTOR
        if offset >= header:
            device.write_config(offset - header, size, value)
        elif offset == LEGACY_DRIVER_FEATURES and size == 4:
            device.driver_features = value
        elif offset == LEGACY_SELECT:
            device.queue_select = value
        elif offset == LEGACY_NOTIFY:
            if value < len(device.queues):
                device.kick(device.queues[value])
        elif offset == LEGACY_STATUS:
            device.write_legacy_status(value & 0xFF)
            if value & 0xFF == 0:
                self._forget()
        elif offset == LEGACY_CONFIG_VECTOR:
            self._config_vector = self._vector(value)
        elif (queue := device.selected) is not None:
            if offset == LEGACY_ADDRESS and size == 4:
                self._set_legacy_queue(queue, value)
            elif offset == LEGACY_QUEUE_VECTOR:
                self._vectors[queue.index] = self._vector(value)
                self._route(queue)

    def _set_legacy_queue(self, queue: Virtqueue, page: int) -> None:
        """2.7.2: all three parts of the ring in a row, the last one at a page's start. Page 0 takes it out of use."""
        device = self.device
        if queue.ready:
            device.reset_queue(queue)
        if page:
            size = queue.size = queue.max_size
            queue.desc_gpa = page * LEGACY_PAGE
            queue.driver_gpa = queue.desc_gpa + 16 * size
            queue.device_gpa = -(-(queue.driver_gpa + 6 + 2 * size) // LEGACY_PAGE) * LEGACY_PAGE
            device.enable_with(queue, device.legacy_features)

    # -- configuration space: the host's lock is held ----------------------------------------------------------------

    def changed(self, first: int, last: int) -> None:
        super().changed(first, last)
        if first <= self._msix_control + 1 and last >= self._msix_control:
            self.msix.update(self.get(self._msix_control, 2))

    def config_read(self, register: int, size: int) -> int:
        data = self._window_data
        if data is not None and data <= register < data + 4 and (where := self._window_at(data)) is not None:
            offset, length = where
            with self.device.lock:
                value = self.read_modern(offset, length) if offset < NOTIFY else 0
            with self.lock:
                self.config[data : data + length] = value.to_bytes(length, "little")
        return super().config_read(register, size)

    def config_write(self, register: int, size: int, value: int) -> None:
        super().config_write(register, size, value)
        data = self._window_data
        if data is not None and data <= register < data + 4 and (where := self._window_at(data)) is not None:
            offset, length = where
            with self.device.lock:
                self.write_modern(offset, length, self.get(data, length))

    def _window_at(self, data: int) -> tuple[int, int] | None:
        """Offset in BAR 4 and length of what the driver asks for there; None where that is no access (4.1.4.9.1)."""
        bar, offset, length = self.get(data - 12), self.get(data - 8, 4), self.get(data - 4, 4)
        fits = length in (1, 2, 4) and offset % length == 0 and offset + length <= MODERN_BYTES
        return (offset, length) if bar == MODERN_BAR and fits else None

    # -- the machine's side ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        with self._config_lock:
            super().reset()
            self.msix.reset()
            with self.device.lock:
                self._forget()

    def after_load(self) -> None:
        super().after_load()
        self.msix.update(self.get(self._msix_control, 2))
        self.msix.after_load()


def structure(kind: int, offset: int, size: int, more: bytes = b"") -> bytes:
    """A virtio_pci_cap of BAR 4 behind its header, 4.1.4."""
    return pack("<BBBBHII", 16 + len(more), kind, MODERN_BAR if kind != PCI_CFG else 0, 0, 0, offset, size) + more
