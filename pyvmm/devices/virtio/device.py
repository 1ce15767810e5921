"""VirtioDevice: what all virtio devices are, whatever they are found by. OASIS virtio 1.2, chapters 2 and 3.

A device of its own states DEVICE_ID, FEATURES and QUEUES and overrides ``handle``, which serves a queue. A transport
(mmio.py, pci.py) shows it to the guest: it calls the methods under "the transport's side", with ``lock`` held.

Three kinds of locks, always taken in this order:

``lock``         the device's: registers and configuration space. Handlers of the vCPUs hold it.
``queue.lock``   one queue: ``handle`` runs with it, on a queue thread, and a completion takes it. Whoever holds it
                 never waits for the device's lock.
``notice``       status, generation and interrupts: held for some lines, and nothing is called with it but the
                 transport's ``config_interrupt``.

``live`` says whether buffers may be used: the driver has set DRIVER_OK (3.1.1), and the device is not broken.
"""

from __future__ import annotations

import os

from pyvmm.device import Device, DeviceLock
from pyvmm.devices.virtio.ring import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    RingError,
    Virtqueue,
)
from pyvmm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from pyvmm.guest_memory import GuestMemory

    class Transport(Protocol):
        """How a guest finds the device: what of it the device calls."""

        def config_interrupt(self) -> None:
            """The driver is to look at status and configuration. From any thread, ``notice`` is held."""

    class IoWatcher(Protocol):
        """The thread that serves the device's queues (IoThread). Callbacks run on it, with no lock held."""

        def add_reader(self, fd: int, callback: Callable[[], object], *, edge: bool = False) -> None: ...
        def remove_reader(self, fd: int) -> bool: ...
        def add_writer(self, fd: int, callback: Callable[[], object]) -> None: ...
        def remove_writer(self, fd: int) -> bool: ...
        def call_soon(self, callback: Callable[[], object]) -> None: ...

# Device status, 2.1
ACKNOWLEDGE = 1
DRIVER = 2
DRIVER_OK = 4
FEATURES_OK = 8
NEEDS_RESET = 64
FAILED = 128
OF_THE_DRIVER = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED

# Reserved feature bits, 6; those of the rings are in ring.pyx.
F_ANY_LAYOUT = 1 << 27  # of legacy devices, 6.3: a driver may cut a request into buffers as it likes
F_RING_RESET = 1 << 40
# What is offered of the rings unless said otherwise: QEMU's choice.
USUAL_RING_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_RING_RESET
LEGACY_FEATURES = (1 << 32) - 1


class VirtioDevice(Device):
    """VirtioDevice(memory): ``queues`` are the queues' largest sizes, where they are not QUEUES; ``config_bytes`` is
    the length of the device's configuration space; ``features`` are offered in place of FEATURES.

    ``config`` is the configuration space, little endian; ``status`` the driver's, ``features`` what was negotiated.
    """

    DEVICE_ID = 0
    """What kind of device it is, 5."""
    FEATURES = 0
    """The feature bits of its kind that it offers, below bit 28."""
    QUEUES: tuple[int, ...] = ()
    """The largest size of each queue, a power of two."""
    own_thread = False
    """Whether its queues have a thread of their own; else they share the machine's."""
    thread_per_queue = False
    """Whether each of them has one, or as many as ``thread_of`` says."""
    served_elsewhere = False
    """Another process serves its queues: nobody here is rung."""

    valid_sizes = (1, 8)
    impl_sizes = (1, 4)

    def __init__(
        self,
        memory: GuestMemory,
        *,
        queues: Sequence[int] | None = None,
        config_bytes: int = 0,
        features: int | None = None,
    ) -> None:
        self.memory = memory
        sizes = self.QUEUES if queues is None else queues
        self.queues = [Virtqueue(memory, n, size, name=f"{type(self).__name__}.{n}") for n, size in enumerate(sizes)]
        self.config = bytearray(config_bytes)
        self.own_features = self.FEATURES if features is None else features
        self.ring_features = USUAL_RING_FEATURES
        self.notice = DeviceLock()
        self.status = 0
        self.features = 0
        self.live = False
        self.legacy = False
        """The driver uses the legacy interface (1.3.1): no FEATURES_OK, no VERSION_1."""
        self.generation = 0
        """Goes up with each change of the configuration space, 2.5.2."""
        self.driver_features = 0
        self.feature_select = self.driver_feature_select = self.queue_select = 0
        self.faults = 0
        """How often a driver broke it."""
        self.fault = ""
        """What it did wrong last."""
        self.io: IoWatcher | None = None
        """Where the host's end is watched; given by the board, before the driver can be ready."""
        self.ios: dict[int, IoWatcher] = {}
        """The other threads, where it has several: by their numbers, ``thread_of``."""
        self.transport: Transport | None = None
        self.on_broken: Callable[[str], object] | None = None

    # -- what a device overrides -----------------------------------------------------------------------------------

    def config_reading(self) -> None:
        """The driver is about to read ``config``: bring it up to date."""

    def config_write(self, offset: int, size: int, value: int) -> None:
        """The driver writes into configuration space, inside of it. Nothing happens."""

    def check_features(self, features: int) -> bool:
        """Whether these go together, at FEATURES_OK (3.1.1). They are among those that are offered."""
        return True

    def driver_ok(self) -> None:
        """Buffers may be used from its return on: the driver has set DRIVER_OK, or a state has been loaded in which it
        had.
        """

    def handle(self, queue: Virtqueue) -> None:
        """Serve ``queue``: take, work, push, flush. On its thread, with ``queue.lock`` held, while ``live``.

        It may be called with nothing to do, and leaves with ``queue.enable_kicks()`` having been False; or it kicks
        itself. RingError may come out.
        """

    def thread_of(self, queue: Virtqueue) -> int:
        """The number of the thread that serves ``queue``, where it has several: 0 is ``io``."""
        return queue.index

    def quiesce(self) -> None:
        """Return when no request is in flight. ``lock`` is held, and no queue's; nothing is served meanwhile."""

    def stop_queue(self, queue: Virtqueue) -> None:
        """The same of one queue, which the driver resets (2.6.1). By default of all."""
        self.quiesce()

    def call_changed(self, queue: Virtqueue) -> None:
        """``queue.call_fd`` is another one."""

    def reset_device(self) -> None:
        """Own fields to what they are at power-on. No request is in flight, and no queue is ready."""

    # -- what a device calls ---------------------------------------------------------------------------------------

    def config_changed(self) -> None:
        """``config`` is another one: have the driver look at it. From any thread, with any lock."""
        with self.notice:
            self.generation = self.generation + 1 & 0xFFFF_FFFF
            self._interrupt()

    def broken(self, why: str) -> None:
        """The driver has done what it must not do: nothing is served until it resets the device (2.1.2). From anywhere.
        """
        with self.notice:
            if self.status & NEEDS_RESET:
                return
            self.live = False
            self.faults += 1
            self.fault = why
            self.status |= NEEDS_RESET
            self._interrupt()
        if self.on_broken is not None:
            self.on_broken(why)

    def _interrupt(self) -> None:
        # 2.1.2: no notification before DRIVER_OK.
        if self.status & DRIVER_OK and self.transport is not None:
            self.transport.config_interrupt()

    def kick(self, queue: Virtqueue) -> None:
        """Serve ``queue`` soon: there is something for it. From anywhere."""
        if queue.kick_fd >= 0:
            try:
                os.eventfd_write(queue.kick_fd, 1)
            except BlockingIOError:
                pass  # full: it is about to be served

    def serve(self, queue: Virtqueue) -> None:
        """The queue was rung, or kicked: on its thread."""
        with queue.lock:
            if self.live and queue.ready:
                if queue.traced is not None:
                    queue.trace_kick()
                if queue.owes_call:
                    queue.call_again()
                try:
                    self.handle(queue)
                except RingError as error:
                    self.broken(str(error))

    # -- the transport's side: ``lock`` is held ----------------------------------------------------------------------

    @property
    def offered(self) -> int:
        """The features that it offers."""
        return self.own_features | self.ring_features | F_VERSION_1

    def read_features(self, window: int) -> int:
        """32 bits of ``offered``."""
        return self.offered >> 32 * window & 0xFFFF_FFFF if window < 2 else 0

    def write_features(self, window: int, value: int) -> None:
        """The driver accepts features. After FEATURES_OK it can't any more (3.1.1)."""
        if window > 1:
            value = 1 if value else 0  # any that is not offered will do: they are refused at FEATURES_OK
            window = 2
        if not self.status & FEATURES_OK:
            self.driver_features &= ~(0xFFFF_FFFF << 32 * window)
            self.driver_features |= value << 32 * window

    def write_status(self, value: int) -> None:
        """2.1: zero resets the device; else bits are set. Which of them were taken shows when it is read."""
        if value == 0:
            self.reset_by_driver()
            return
        self.legacy = False
        new = value & OF_THE_DRIVER & ~self.status
        if new & FEATURES_OK and not self._take_features():
            new &= ~FEATURES_OK
        if new & DRIVER_OK and not (self.status | new) & FEATURES_OK:
            new &= ~DRIVER_OK
        self._set_status(new)

    def write_legacy_status(self, value: int) -> None:
        """2.1 as before 1.0: features are what the driver has accepted of the lower 32 by now."""
        if value == 0:
            self.reset_by_driver()
            return
        self.legacy = True
        new = value & OF_THE_DRIVER & ~FEATURES_OK & ~self.status
        if new & DRIVER_OK:
            self.features = self.legacy_features
        self._set_status(new)

    @property
    def legacy_features(self) -> int:
        """Of the features that a legacy driver has accepted, those that are there."""
        return self.driver_features & (self.offered | F_ANY_LAYOUT) & LEGACY_FEATURES

    def _take_features(self) -> bool:
        """FEATURES_OK: whether the driver's choice can be had. VERSION_1 must be in it (6.1)."""
        wanted = self.driver_features
        if wanted & ~self.offered or not wanted & F_VERSION_1 or not self.check_features(wanted):
            return False
        self.features = wanted
        return True

    def _set_status(self, new: int) -> None:
        with self.notice:
            self.status |= new
            begins = bool(new & DRIVER_OK) and not self.status & NEEDS_RESET
        if not begins:
            return
        # Before anything is served: a driver that has rung already has the queue's thread look at any moment.
        self.driver_ok()
        with self.notice:
            self.live = not self.status & NEEDS_RESET
        self.kick_all()

    def kick_all(self) -> None:
        """Serve every queue: what was made available before counts too."""
        for queue in self.queues:
            if queue.ready:
                self.kick(queue)

    @property
    def selected(self) -> Virtqueue | None:
        """The queue that the driver has selected; None where there is no such one."""
        return self.queues[self.queue_select] if self.queue_select < len(self.queues) else None

    def may_set_up(self, queue: Virtqueue | None) -> bool:
        """Whether the driver may write the size and the addresses: not while the queue is in use (4.1.4.3.2)."""
        return queue is not None and not queue.ready

    def enable_queue(self, queue: Virtqueue) -> None:
        """The driver has set it up. Before FEATURES_OK it can't (3.1.1); one that is set up wrongly breaks the device.
        """
        if not self.status & FEATURES_OK or self.status & NEEDS_RESET:
            return
        self.enable_with(queue, self.features)

    def enable_with(self, queue: Virtqueue, features: int) -> None:
        """The same for whoever knows that it may."""
        with queue.lock:
            if queue.ready or self.status & NEEDS_RESET:
                return
            try:
                queue.enable(features)
            except RingError as error:
                self.broken(str(error))
        if self.live:
            self.kick(queue)

    def disable_queue(self, queue: Virtqueue) -> None:
        """The driver takes it out of use: nothing of its ring is touched any more when this returns."""
        with queue.lock:
            queue.disable()
        self.stop_queue(queue)

    def reset_queue(self, queue: Virtqueue) -> None:
        """2.6.1: the queue is as at power-on when this returns."""
        self.disable_queue(queue)
        with queue.lock:
            queue.forget()

    def reset_by_driver(self) -> None:
        """2.4: all is as at power-on when this returns. Requests in flight are waited for, and answered by nobody."""
        with self.notice:
            self.live = False
        for queue in self.queues:
            with queue.lock:  # a handler under way is waited for; the next one finds ``live`` down
                queue.disable()
        self.quiesce()
        for queue in self.queues:
            with queue.lock:
                queue.forget()
        with self.notice:
            self.status = self.features = self.driver_features = 0
            self.legacy = False
        self.feature_select = self.driver_feature_select = self.queue_select = 0
        self.reset_device()

    def read_config(self, offset: int, size: int) -> int:
        """Configuration space; ones behind its end."""
        self.config_reading()
        if offset + size > len(self.config):
            return (1 << 8 * size) - 1
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Configuration space; behind its end nothing happens."""
        if offset + size <= len(self.config):
            self.config_write(offset, size, value)

    # -- the machine's side ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        with self.lock:
            self.reset_by_driver()

    @property
    def _fields(self) -> dict[str, object]:
        """The state of every virtio device, beside STATE."""
        return {
            "status": 8,
            "features": 64,
            "driver_features": 96,
            "legacy": "flag",
            "generation": 32,
            "feature_select": 32,
            "driver_feature_select": 32,
            "queue_select": 32,
            "config": ("bytes", len(self.config)),
        }

    def save(self) -> dict[str, Any]:
        from pyvmm.state import save_fields

        with self.lock:
            return {
                **super().save(),
                "virtio": save_fields(self, self._fields),
                "queues": [queue.save() for queue in self.queues],
            }

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import check_names, load_fields, part, value_of

        with self.lock:
            own = {name: value for name, value in state.items() if name not in ("virtio", "queues")}
            check_names(state, [*own, "virtio", "queues"])
            queues = value_of(("list", "part", len(self.queues)), state["queues"], "queues")
            super().load(own)
            load_fields(self, self._fields, state["virtio"])
            if self.features & ~(self.offered | F_ANY_LAYOUT):
                more = f"features {self.features:#x} are more than the {self.offered:#x} that are offered"
                raise StateError(f"{more}: give the device the same options")
            for queue, saved in zip(self.queues, queues, strict=True):
                part(f"queues[{queue.index}]", queue, saved)
            self.live = bool(self.status & DRIVER_OK) and not self.status & NEEDS_RESET

    def after_load(self) -> None:
        with self.lock:
            for queue in self.queues:
                with queue.lock:
                    try:
                        queue.after_load(self.features)
                    except RingError as error:
                        self.broken(str(error))
            if self.live:
                self.driver_ok()
                self.kick_all()
