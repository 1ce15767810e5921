"""VirtioMmio: a virtio device behind memory-mapped registers. OASIS virtio 1.2, 4.2: version 2, no legacy interface.

The registers are under the device's lock, interrupts under the transport's own, which is below a queue's.

Its interrupt is an edge, and InterruptStatus says what for. Causes are counted, a queue's by the queue itself
(``Virtqueue.notified``): a bit is set where one has counted on since the driver last acknowledged it. So a completion
need not come by here: it may signal an irqfd. And the driver acknowledges what it has seen: what comes between its look
and its acknowledgement is not lost.
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.devices.virtio.device import F_RING_RESET
from pyvmm.region import MemoryRegion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.devices.virtio.ring import Virtqueue

REGION_BYTES = 0x200
MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR = int.from_bytes(b"PYVM", "little")

# Registers, 4.2.2
MAGIC_VALUE = 0x000
VERSION_REGISTER = 0x004
DEVICE_ID = 0x008
VENDOR_ID = 0x00C
DEVICE_FEATURES = 0x010
DEVICE_FEATURES_SEL = 0x014
DRIVER_FEATURES = 0x020
DRIVER_FEATURES_SEL = 0x024
QUEUE_SEL = 0x030
QUEUE_SIZE_MAX = 0x034
QUEUE_SIZE = 0x038
QUEUE_READY = 0x044
QUEUE_NOTIFY = 0x050
INTERRUPT_STATUS = 0x060
INTERRUPT_ACK = 0x064
STATUS = 0x070
QUEUE_DESC = 0x080  # each 64 bits in two registers
QUEUE_DRIVER = 0x090
QUEUE_DEVICE = 0x0A0
SHM_SEL = 0x0AC
SHM_LEN = 0x0B0
SHM_BASE = 0x0B8
SHM_END = 0x0C0
QUEUE_RESET = 0x0C0
CONFIG_GENERATION = 0x0FC
CONFIG = 0x100

USED_BUFFER = 1  # of InterruptStatus
CONFIG_CHANGE = 2
ADDRESSES = {QUEUE_DESC: "desc_gpa", QUEUE_DRIVER: "driver_gpa", QUEUE_DEVICE: "device_gpa"}


class VirtioMmio(Device):
    """``interrupt()`` is an edge of the device's interrupt, from any thread. ``region`` is to be mapped.

    ``call_fd``, an eventfd, interrupts too: queues signal it without coming by here.
    """

    def __init__(self, device: VirtioDevice, interrupt: Callable[[], object], *, call_fd: int = -1) -> None:
        self.device = device
        self._interrupt = interrupt
        self._config_changes = 0
        self._seen = self._causes()  # at the driver's last look
        self._acknowledged = self._seen
        device.transport = self
        for queue in device.queues:
            # Another process would interrupt without counting: it has to come by here.
            queue.call_fd = -1 if device.served_elsewhere else call_fd
            queue.on_call = interrupt
        self.region = MemoryRegion(REGION_BYTES, device, name="virtio-mmio", read=self.read, write=self.write)

    def ring_doorbells(self) -> None:
        """Have a write to QueueNotify signal the queue's eventfd: before the region is mapped."""
        for queue in self.device.queues:
            self.region.add_eventfd(queue.kick_fd, offset=QUEUE_NOTIFY, size=4, datamatch=queue.index)

    # -- the device's side -------------------------------------------------------------------------------------------

    def config_interrupt(self) -> None:
        with self.lock:
            self._config_changes += 1
        self._interrupt()

    # -- the guest's side: the device's lock is held -----------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset >= CONFIG:
            return self.device.read_config(offset - CONFIG, size)
        if size != 4:
            return 0  # 4.2.2.2: the driver has to use 32 bits
        device = self.device
        if offset == INTERRUPT_STATUS:
            self._seen = self._causes()
            return self._status_of(self._seen)
        if offset == STATUS:
            return device.status
        if offset == CONFIG_GENERATION:
            return device.generation
        if offset == MAGIC_VALUE:
            return MAGIC
        if offset == VERSION_REGISTER:
            return VERSION
        if offset == DEVICE_ID:
            return device.DEVICE_ID
        if offset == VENDOR_ID:
            return VENDOR
        if offset == DEVICE_FEATURES:
            return device.read_features(device.feature_select)
        if SHM_LEN <= offset < SHM_END:
            return 0xFFFF_FFFF  # 4.2.2.1: there is no shared memory of that number
        queue = device.selected
        if queue is None:
            return 0
        if offset == QUEUE_SIZE_MAX:
            return queue.max_size
        if offset == QUEUE_READY:
            return int(queue.ready)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        device = self.device
        if offset >= CONFIG:
            device.write_config(offset - CONFIG, size, value)
        elif size != 4:
            return
        elif offset == QUEUE_NOTIFY:
            if value < len(device.queues):
                device.kick(device.queues[value])
        elif offset == INTERRUPT_ACK:
            self._acknowledge(value)
        elif offset == STATUS:
            device.write_status(value)
            if value == 0:
                self._forget_interrupts()
        elif offset == DEVICE_FEATURES_SEL:
            device.feature_select = value
        elif offset == DRIVER_FEATURES_SEL:
            device.driver_feature_select = value
        elif offset == DRIVER_FEATURES:
            device.write_features(device.driver_feature_select, value)
        elif offset == QUEUE_SEL:
            device.queue_select = value
        elif (queue := device.selected) is not None:
            self._write_queue(queue, offset, value)

    def _write_queue(self, queue: Virtqueue, offset: int, value: int) -> None:
        """A register of the queue that is selected."""
        device = self.device
        if offset == QUEUE_READY:
            if value == 1:
                device.enable_queue(queue)
            elif value == 0 and queue.ready:
                device.disable_queue(queue)
        elif offset == QUEUE_RESET:
            if value == 1 and device.features & F_RING_RESET:
                device.reset_queue(queue)
        elif queue.ready:
            return  # 4.2.2.2: not while it is in use
        elif offset == QUEUE_SIZE:
            queue.size = min(value, 0xFFFF)  # which is too much for any queue, and as much as a queue's size may be
        elif (name := ADDRESSES.get(offset & ~7)) is not None and offset & 7 in (0, 4):
            set_half(queue, name, offset & 4, value)

    # -- interrupts --------------------------------------------------------------------------------------------------

    def _causes(self) -> list[int]:
        """How often there was one: a change of the configuration, then a queue's buffers, each queue."""
        return [self._config_changes, *(queue.notified for queue in self.device.queues)]

    def _status_of(self, causes: list[int]) -> int:
        """InterruptStatus, if there have been those."""
        config, *queues = self._acknowledged
        config_now, *queues_now = causes
        return (USED_BUFFER if queues != queues_now else 0) | (CONFIG_CHANGE if config != config_now else 0)

    def _acknowledge(self, value: int) -> None:
        config = (self._seen if value & CONFIG_CHANGE else self._acknowledged)[0]
        queues = (self._seen if value & USED_BUFFER else self._acknowledged)[1:]
        self._acknowledged = [config, *queues]

    def _forget_interrupts(self) -> None:
        self._seen = self._acknowledged = self._causes()

    # -- the machine's side ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        with self.device.lock:
            self._forget_interrupts()

    def save(self) -> dict[str, Any]:
        with self.device.lock:
            return {"interrupt_status": self._status_of(self._causes()), "seen": self._status_of(self._seen)}

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import check_names, value_of

        check_names(state, ["interrupt_status", "seen"])
        status, seen = (value_of(2, state[name], name) for name in ("interrupt_status", "seen"))
        with self.device.lock:
            self._acknowledged = self._causes_before(status)
            self._seen = self._causes_before(status & ~seen)

    def _causes_before(self, status: int) -> list[int]:
        """As if what is in ``status`` had not been there yet."""
        config, *queues = self._causes()
        return [
            config - 1 if status & CONFIG_CHANGE else config,
            *(notified - 1 if status & USED_BUFFER else notified for notified in queues),
        ]

    def after_load(self) -> None:
        """An edge that was under way may have been lost: one too many finds nothing to do. It waits for the device's
        thread, and so for the guest to run: the interrupt controllers get their state after the devices.
        """
        if self._causes() == self._acknowledged:
            return
        if self.device.io is None:
            self._interrupt()
        else:
            self.device.io.call_soon(self._interrupt)


def set_half(queue: Virtqueue, name: str, upper: int, value: int) -> None:
    """The lower or the upper 32 bits of one of a queue's addresses."""
    shift = 32 if upper else 0
    setattr(queue, name, getattr(queue, name) & ~(0xFFFF_FFFF << shift) | value << shift)
