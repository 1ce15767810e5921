"""Callers: the host's clients of a vsock device that have connected to its socket, and not said yet where to.

The convention is host.py's: a line, CONNECT PORT. There are MOST_CALLERS of them at most: the oldest has to go when
another one comes. While the device is full, or the guest is about to drop its connections, nobody is let in: who comes
waits in the socket's backlog. All of it is done on the device's thread with the device's gate held, but for ``end``,
which a vCPU's reset calls with the gate, too.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable
    from typing import Protocol

    from pyvmm.devices.virtio.device import IoWatcher
    from pyvmm.vsock.host import Caller, HostEnd

    class Device(Protocol):
        """What of the device is needed here."""

        @property
        def io(self) -> IoWatcher | None: ...
        @property
        def full(self) -> bool: ...
        @property
        def takes_clients(self) -> bool: ...
        def guarded(self, work: Callable[[], object]) -> None: ...
        def connect(self, end: socket, guest_port: int) -> None: ...

MOST_CALLERS = 32


class Callers:
    """Those of ``host``. ``device.connect`` gets the socket of one that has said where to."""

    def __init__(self, device: Device, host: HostEnd) -> None:
        self._device = device
        self._host = host
        self._waiting: dict[int, Caller] = {}  # by their descriptors
        self._listening = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def _thread(self) -> IoWatcher:
        assert self._device.io is not None  # the board has given it
        return self._device.io

    def listen(self) -> None:
        """Take clients, where that may be now."""
        if self._listening or not self._device.takes_clients:
            return
        if self._host.fd >= 0 and not self._device.full:
            self._listening = True
            self._thread.add_reader(self._host.fd, lambda: self._device.guarded(self._on_client))

    def unlisten(self) -> None:
        if self._listening:
            self._listening = False
            self._thread.remove_reader(self._host.fd)

    def end(self) -> None:
        """All of them are sent away, and nobody is taken any more before ``listen``."""
        self.unlisten()
        for caller in list(self._waiting.values()):
            self._hang_up(caller)

    def abandon(self) -> None:
        """In a child of fork: close the descriptors."""
        for caller in self._waiting.values():
            caller.socket.close()

    def _on_client(self) -> None:
        if self._device.full:
            self.unlisten()  # the others wait where they are
            return
        try:
            caller = self._host.accept()
        except BlockingIOError:
            return
        except OSError:
            self.unlisten()  # no descriptor: until one of the device's is free
            return
        if len(self._waiting) == MOST_CALLERS:
            self._hang_up(next(iter(self._waiting.values())))
        self._waiting[caller.fd] = caller
        self._thread.add_reader(caller.fd, lambda: self._device.guarded(lambda: self._on_line(caller)))

    def _on_line(self, caller: Caller) -> None:
        if caller.fd < 0:
            return
        try:
            guest_port = caller.port()
        except ValueError:
            self._hang_up(caller)
            return
        if guest_port is None:
            return
        self._thread.remove_reader(caller.fd)
        del self._waiting[caller.fd]
        self._device.connect(caller.socket, guest_port)
        self.listen()

    def _hang_up(self, caller: Caller) -> None:
        self._thread.remove_reader(caller.fd)
        del self._waiting[caller.fd]
        caller.socket.close()
        self.listen()
