"""VhostUserDevice: a virtio device whose queues a program of the host's serves (pyvmm/vhost_user). OASIS virtio 1.2, 2
and 3; QEMU's docs/interop/vhost-user.rst.

Its registers are here, its rings are not: the program has the guest's memory, waits at the queues' own doorbells, and
interrupts by eventfd. Where a queue's interrupt is an irqfd it gets that (``Virtqueue.call_fd``); else one of ours, and
the device's thread passes it on.

The program is told on the device's thread, where it may take its time; a driver that resets the device, or a queue,
waits until the program touches nothing any more. While guest time stands, no ring is served (``hold``). A program that
has gone, does not answer or lies leaves the device broken. After a reset there is a new one, where that can be had.

What the program knows of its driver can't be saved.
"""

from __future__ import annotations

import os

from pyvmm.device import DeviceLock
from pyvmm.devices.virtio.device import DRIVER_OK, F_RING_RESET, NEEDS_RESET, VirtioDevice
from pyvmm.devices.virtio.ring import F_RING_PACKED, F_VERSION_1, RING_FEATURES
from pyvmm.errors import ConfigError, StateError
from pyvmm.vhost_user.link import BackEndError, Link, Ring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.devices.virtio.ring import Virtqueue
    from pyvmm.guest_memory import GuestMemory
    from pyvmm.vhost_user.server import Server

# Of a packed ring (2.8): the index that is next and, in bit 15, its wrap counter, which begins with 1; of what is
# available in the lower half, of what was used in the upper one.
NEW_PACKED_RING = 1 << 15 | 1 << 31


class VhostUserDevice(VirtioDevice):
    """``server`` serves it; ``what`` names it in what is said. ConfigError where nobody serves it.

    ``memory`` is shared: each piece of RAM is in a file.
    """

    own_thread = True
    served_elsewhere = True

    def __init__(
        self,
        memory: GuestMemory,
        server: Server,
        *,
        what: str,
        queues: Sequence[int],
        config_bytes: int = 0,
        features: int = 0,
    ) -> None:
        super().__init__(memory, queues=queues, config_bytes=config_bytes, features=features)
        self.what = what
        self._server = server
        # All below is under it: whoever talks to the program. Taken below ``lock``, above a queue's lock.
        self._gate = DeviceLock()
        self._link: Link | None = None
        self._bases: dict[int, int] = {}
        """Where rings that do not run go on: by queue."""
        self._running: dict[int, int] = {}
        """The rings that are served, and the eventfd by which each interrupts."""
        self._used = False
        """A driver has come as far as DRIVER_OK since the program was connected."""
        self._begun = False
        """The program has features and memory."""
        self._ended = False
        self._calls = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in self.queues]
        try:
            link = self._connect()
        except BaseException:
            self.close()
            raise
        self.served_features = link.features

    # -- the other end: ``_gate`` is held, but for the first connection --------------------------------------------

    def _connect(self) -> Link:
        """A new connection. ConfigError where there is none, or nobody who can serve such a device."""
        try:
            link = self._link = Link(self._server.connect())
        except BackEndError as error:
            raise ConfigError(f"{self.what}: its back end can't be used: {self._told(error)}") from None
        if not link.features & F_VERSION_1:
            raise ConfigError(f"{self.what}: its back end knows no virtio 1.0: use a newer one")
        if link.queues and link.queues < len(self.queues):
            raise ConfigError(f"{self.what}: its back end has {link.queues} queues, {len(self.queues)} are needed")
        return link

    def _told(self, error: BackEndError) -> str:
        """With the program's own last words."""
        self._disconnect()
        words = self._server.last_words()
        return f"{error}: {words}" if words else str(error)

    def _disconnect(self) -> None:
        """Nobody serves it any more."""
        link, self._link = self._link, None
        self._running.clear()
        self._begun = self._used = False
        if link is not None:
            self._unwatch(link.fd)
            link.close()

    def _unwatch(self, *fds: int) -> None:
        for fd in fds:
            if self.io is not None and fd >= 0:
                self.io.remove_reader(fd)

    def _new_server(self) -> None:
        """One of our own knows what its driver had open: the next driver gets another one."""
        self._disconnect()
        self._unwatch(self._server.log_fd)
        self._server.end()

    def _lost(self, error: BackEndError | ConfigError) -> None:
        """Without the gate: nobody serves the device any more."""
        with self._gate:
            why = self._told(error) if isinstance(error, BackEndError) else str(error)
            self._new_server()
        self.broken(f"its back end can't be used: {why}")

    # -- serving: on the device's thread ---------------------------------------------------------------------------

    @property
    def _wanted(self) -> bool:
        return bool(self.status & DRIVER_OK) and not self.status & NEEDS_RESET

    def _soon(self) -> None:
        if self.io is not None:
            self.io.call_soon(self.serve_all)

    def serve_all(self) -> None:
        """Have each queue that is ready served, by the eventfd that is right now."""
        try:
            with self._gate:
                if self._wanted and not self._ended:
                    link = self._begin()
                    for queue in self.queues:
                        self._bring(link, queue)
        except (BackEndError, ConfigError) as error:
            self._lost(error)

    def _begin(self) -> Link:
        """The program, which knows the guest's memory."""
        link = self._link
        if link is not None and not self._used:
            try:
                link.look()
            except BackEndError:  # it went before anybody wanted anything of it: another one will do
                self._new_server()
                link = None
        if link is None:
            link = self._connect()
        self._used = True
        if not self._begun:
            missing = self.features & RING_FEATURES & ~link.features
            if missing or self.features & self.own_features & ~link.features:
                raise BackEndError("it is another one, which has not the features that the driver has been promised")
            memory = [(ram.gpa, ram.size_bytes, ram.fd, 0) for ram in self.memory.ram if not ram.readonly]
            link.begin(self.features, memory)
            self._begun = True
            self._watch_all(link)
        return link

    def _watch_all(self, link: Link) -> None:
        io = self.io
        if io is None:
            return
        io.add_reader(link.fd, self._on_word)
        if self._server.log_fd >= 0:
            io.add_reader(self._server.log_fd, self._on_log)
        for queue, fd in zip(self.queues, self._calls, strict=True):
            io.add_reader(fd, self._passer_on(queue, fd))

    def _on_log(self) -> None:
        with self._gate:
            fd = self._server.log_fd
            if not self._server.hear():
                self._unwatch(fd)

    def _bring(self, link: Link, queue: Virtqueue) -> None:
        index = queue.index
        with queue.lock:
            call_fd = queue.call_fd if queue.call_fd >= 0 else self._calls[index]
            ring = Ring(
                *(index, queue.size, queue.desc_gpa, queue.driver_gpa, queue.device_gpa), queue.kick_fd, call_fd
            ) if queue.ready else None  # fmt: skip
        if ring is None:
            return
        if index not in self._running:
            new = NEW_PACKED_RING if self.features & F_RING_PACKED else 0
            self._running[index] = call_fd
            link.start(ring, self._bases.get(index, new))
            self.kick(queue)  # what was made available before counts too
        elif self._running[index] != call_fd:
            link.switch_call(index, call_fd)
            self._running[index] = call_fd
        else:
            return
        # An interrupt may have gone to an eventfd that nobody listened to any more.
        with queue.lock:
            queue.call()

    def _passer_on(self, queue: Virtqueue, fd: int) -> Any:
        def pass_on() -> None:
            try:
                os.eventfd_read(fd)
            except OSError:  # another look has read it; or it is closed
                return
            with queue.lock:
                if queue.ready:
                    queue.call()

        return pass_on

    def _on_word(self) -> None:
        """It has gone, or says something: but answers are read by whoever waits for them."""
        try:
            with self._gate:
                if self._link is not None:
                    self._link.look()
        except BackEndError as error:
            self._lost(error)

    # -- the driver's side: ``lock`` is held -----------------------------------------------------------------------

    @property
    def offered(self) -> int:
        served = self.served_features
        rings = self.ring_features & (served | ~RING_FEATURES)  # F_RING_RESET is a stop and a start: ours to give
        return self.own_features & served | rings & (RING_FEATURES | F_RING_RESET) | F_VERSION_1

    def driver_ok(self) -> None:
        self._soon()

    def enable_with(self, queue: Virtqueue, features: int) -> None:
        super().enable_with(queue, features)
        if self.live:
            self._soon()

    def call_changed(self, queue: Virtqueue) -> None:
        self._soon()

    def stop_queue(self, queue: Virtqueue) -> None:
        """2.6.1: nothing of the ring is touched when this returns, and it begins anew."""
        self._stop([queue.index])
        with self._gate:
            self._bases.pop(queue.index, None)

    def quiesce(self) -> None:
        self._stop(range(len(self.queues)))

    def _stop(self, indices: Sequence[int]) -> None:
        """What was taken from these rings is done when this returns, and they are no more touched."""
        try:
            with self._gate:
                for index in indices:
                    if self._link is not None and index in self._running:
                        self._bases[index] = self._link.stop(index)
                        del self._running[index]
        except BackEndError as error:
            self._lost(error)

    def reset_device(self) -> None:
        with self._gate:
            self._bases.clear()
            self._begun = False
            if self._used and self._server.own:
                self._new_server()

    # -- the machine's side ----------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Guest time stands: nothing of the guest's memory changes any more."""
        self.quiesce()

    def go_on(self) -> None:
        """Guest time goes on."""
        self._soon()

    def why_not_saved(self) -> str | None:
        """Why its state can't be saved now; None where it can."""
        if not self.status & DRIVER_OK:
            return None
        return (
            f"{self.what} is in use, and what its back end knows of the guest can't be saved: unmount it in the guest"
            " and unload its driver first, or leave it out"
        )

    def save(self) -> dict[str, Any]:
        with self.lock:
            if (why := self.why_not_saved()) is not None:
                raise StateError(why)
            return super().save()

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        with self.lock:
            if self.status & DRIVER_OK:
                raise StateError(f"{self.what}: the state is of one in use, which can't be saved: it is damaged")

    def close(self) -> None:
        """The program ends, where it is ours. Again is fine."""
        with self._gate:
            self._ended = True
            self._new_server()
            calls, self._calls = self._calls, []
            self._unwatch(*calls)
        for fd in calls:
            os.close(fd)

    def abandon(self) -> None:
        """In a child of fork: descriptors only. Takes no lock."""
        if self._link is not None:
            self._link.close()
        self._server.abandon()
        calls, self._calls = self._calls, []
        for fd in calls:
            os.close(fd)
