"""ConsoleControl: the control queues of a virtio console, by which both ends tell of ports. OASIS virtio 1.2, 5.3.6.2.

The driver says that it is ready, and is told of each port. It says that it is ready for a port, and is told what the
port is: a console, its name, that the host's end is open, the size of its screen. From then on the driver says when a
program of the guest's has opened it.

What the driver is to be told waits for its buffers, as a bit for each port and message: so nothing is lost for want of
one, and however often a driver asks, nothing grows.
"""

from __future__ import annotations

from struct import Struct

from pyvmm.device import DeviceLock
from pyvmm.devices.virtio.ring import RingError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from pyvmm.devices.virtio.chain import Chain
    from pyvmm.devices.virtio.ring import Virtqueue

    class HostEnd(Protocol):
        """What of a port's host end is told."""

        size: tuple[int, int] | None

    class Port(Protocol):
        """What of a port is told, and what the driver says of it."""

        number: int
        name: str | None

        @property
        def chardev(self) -> HostEnd: ...

        @property
        def is_console(self) -> bool: ...
        def set_open(self, is_open: bool) -> None: ...


MESSAGE = Struct("<IHH")  # struct virtio_console_control: port, event, value
SIZE = Struct("<HH")  # struct virtio_console_resize: columns, lines
DEVICE_READY, DEVICE_ADD, DEVICE_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = range(8)
# The order in which a port's messages are sent.
IN_ORDER = (DEVICE_ADD, CONSOLE_PORT, PORT_NAME, PORT_OPEN, RESIZE)

BATCH = 32
TURNS = 8  # batches of the driver's messages before others have their turn


class ConsoleControl:
    """``receives`` and ``sends`` are the queues, named from the driver's side; ``ports`` those it is to know of."""

    def __init__(
        self, receives: Virtqueue, sends: Virtqueue, ports: Sequence[Port], kick: Callable[[Virtqueue], object]
    ) -> None:
        self.receives, self.sends = receives, sends
        self._kick = kick
        self._ports = {port.number: port for port in ports}
        self._lock = DeviceLock()  # of what follows
        self._added = dict.fromkeys(self._ports, False)
        self._ready = dict.fromkeys(self._ports, False)
        self._due = dict.fromkeys(self._ports, 0)  # a bit for each message
        # The size of its screen that was told last.
        self._told: dict[int, tuple[int, int] | None] = dict.fromkeys(self._ports)

    def reset(self) -> None:
        """No driver is there."""
        with self._lock:
            for number in self._ports:
                self._added[number] = self._ready[number] = False
                self._due[number] = 0

    # -- to the driver -----------------------------------------------------------------------------------------------

    def resized(self, port: Port) -> None:
        """The screen of a console may have another size. From any thread."""
        size = port.chardev.size
        with self._lock:
            if not self._ready[port.number] or not port.is_console or size in (None, self._told[port.number]):
                return
            self._due[port.number] |= 1 << RESIZE
        self._kick(self.receives)

    def send(self) -> None:
        """As many messages as the driver has buffers for; it rings when there are more. ``receives.lock`` is held."""
        queue = self.receives
        try:
            while self._next() is not None:
                chains = queue.take(1)
                if chains:
                    self._put(chains[0])
                elif not queue.enable_kicks():
                    return
            queue.disable_kicks()
        finally:
            queue.flush()

    def _next(self) -> tuple[Port, int] | None:
        """A port and what it is to be told next. Only ``send`` takes something away, but for a reset."""
        with self._lock:
            for number, due in self._due.items():
                if due:
                    return self._ports[number], next(event for event in IN_ORDER if due & 1 << event)
        return None

    def _put(self, chain: Chain) -> None:
        found = self._next()
        assert found is not None
        port, event = found
        with self._lock:
            self._due[port.number] &= ~(1 << event)
            if event == RESIZE:
                self._told[port.number] = port.chardev.size
        message = message_of(port, event)
        if chain.writable_bytes < len(message):
            raise RingError(f"a message of {len(message)} bytes, and a buffer for {chain.writable_bytes} (5.3.6.2)")
        self.receives.push(chain, chain.write(0, message))

    # -- from the driver ---------------------------------------------------------------------------------------------

    def hear(self) -> bool:
        """What the driver says. Whether there may be more. ``sends.lock`` is held."""
        queue = self.sends
        queue.disable_kicks()
        try:
            for _ in range(TURNS):
                chains = queue.take(BATCH)
                if not chains and not queue.enable_kicks():
                    return False
                for chain in chains:
                    message = chain.read(0, MESSAGE.size)
                    if len(message) < MESSAGE.size:
                        raise RingError(f"a control message of {len(message)} bytes (5.3.6.2)")
                    self._heard(*MESSAGE.unpack(message))
                    queue.push(chain, 0)
            return True
        finally:
            queue.flush()

    def _heard(self, number: int, event: int, value: int) -> None:
        """Of a port that is not there, and what only a device says, means nothing."""
        if event == DEVICE_READY:
            if value:
                self._add_ports()
        elif number not in self._ports:
            return
        elif event == PORT_READY:
            self._port_ready(number, ok=bool(value))
        elif event == PORT_OPEN:
            self._ports[number].set_open(bool(value))

    def _add_ports(self) -> None:
        with self._lock:
            for number, added in self._added.items():
                if not added:  # 5.3.6.2.1: never one that exists
                    self._added[number] = True
                    self._due[number] = 1 << DEVICE_ADD
        self._kick(self.receives)

    def _port_ready(self, number: int, *, ok: bool) -> None:
        """Or, where not ``ok``, the driver can't have it: it is as if it had not been added."""
        port = self._ports[number]
        with self._lock:
            self._ready[number] = ok
            self._added[number] = self._added[number] and ok
            self._due[number] = 0 if not ok else self._due[number] | bits_for(port)
        if not ok:
            port.set_open(False)
        self._kick(self.receives)

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def _fields(self) -> dict[str, object]:
        flags = ("each", dict.fromkeys(self._ports, "flag"))
        return {"_added": flags, "_ready": flags, "_due": ("each", dict.fromkeys(self._ports, 8))}

    def save(self) -> dict[str, Any]:
        from pyvmm.state import save_fields

        with self._lock:
            return save_fields(self, self._fields)

    def load(self, state: object) -> None:
        from pyvmm.state import load_fields

        with self._lock:
            load_fields(self, self._fields, state)
            for number in self._due:
                self._due[number] &= sum(1 << event for event in IN_ORDER)


def bits_for(port: Port) -> int:
    """What is to be told of a port that is ready."""
    events = [PORT_OPEN]  # whoever is at the host's end, or comes there: the chardev takes output at any time
    if port.is_console:
        events.append(CONSOLE_PORT)
        if port.chardev.size is not None:
            events.append(RESIZE)
    else:
        events.append(PORT_NAME)
    return sum(1 << event for event in events)


def message_of(port: Port, event: int) -> bytes:
    if event == PORT_NAME:
        return MESSAGE.pack(port.number, event, 1) + (port.name or "").encode()
    if event == RESIZE:
        return MESSAGE.pack(port.number, event, 0) + SIZE.pack(*(port.chardev.size or (0, 0)))
    return MESSAGE.pack(port.number, event, 1)
