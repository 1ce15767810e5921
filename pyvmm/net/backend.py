"""NetBackend: what a network card sees of its host.

Ports that carry frames, what may be left to whoever takes them (offloads), and whether anybody is there. All calls
come from the card: ``configure``, ``set_offloads`` and ``enable_pairs`` with its lock held and no frame under way;
``attach`` and ``lost`` on the thread that serves its queues.
"""

from __future__ import annotations

from pyvmm.net.port import Port, StreamPort

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    class IoWatcher(Protocol):
        """The thread that serves a device's queues, as it looks after descriptors."""

        def add_reader(self, fd: int, callback: Callable[[], None]) -> None: ...
        def remove_reader(self, fd: int) -> object: ...
        def add_writer(self, fd: int, callback: Callable[[], None]) -> None: ...
        def remove_writer(self, fd: int) -> object: ...
        def call_soon(self, callback: Callable[[], None]) -> None: ...


# What a frame for the guest may leave to it; TUNSETOFFLOAD's bits (linux/if_tun.h).
CHECKSUM = 0x01
TSO4 = 0x02
TSO6 = 0x04
TSO_ECN = 0x08
USO4 = 0x20
USO6 = 0x40


class NetBackend:
    """One that is a single descriptor, or several, for good.

    ``has_header``: virtio's header is in front of every frame, and ``offloads`` what its sender may leave undone then.
    """

    has_header = False
    offloads = 0

    def __init__(self, ports: Sequence[Port]) -> None:
        self.ports = list(ports)

    @property
    def connected(self) -> bool:
        """Whether frames get anywhere."""
        return not self.ports[0].closed

    def attach(self, io: IoWatcher, on_link: Callable[[], None]) -> None:
        """A card is at this end. ``on_link()`` is called, on ``io``'s thread, when ``connected`` has become true."""

    def configure(self, header_bytes: int) -> None:
        """How long the guest's headers are: 12, or 10 of an old driver (virtio 1.2, 5.1.6.1)."""

    def set_offloads(self, offloads: int) -> None:
        """What the guest takes upon itself for frames that come to it."""

    def enable_pairs(self, count: int) -> None:
        """The guest uses so many of the ports, the first ones."""

    def lost(self) -> None:
        """A port was found closed; nobody watches its descriptor any more."""
        for port in self.ports:
            port.close()

    def close(self) -> None:
        """Give all back. Again is fine."""
        for port in self.ports:
            port.close()

    def abandon(self) -> None:
        """In a child of fork: only the descriptors."""
        for port in self.ports:
            port.close()


class StreamBackend(NetBackend):
    """A stream socket that is connected."""

    def __init__(self, fd: int = -1) -> None:
        super().__init__([StreamPort(fd)])
