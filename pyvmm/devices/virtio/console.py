"""VirtioConsole: consoles and ports by virtio (OASIS virtio 1.2, 5.3).

Queues 0 and 1 are port 0's, 2 and 3 the control queues, and from 4 on each further port has two (5.3.2). A device with
port 0 alone is the plain one, without control queues: the size of its screen is in the configuration space, and every
driver reads it there. With ports it is told by a message (5.3.6.2), whose two numbers older Linux reads the other way
round.

The device's thread serves all queues; bytes move in ConsolePort, messages in ConsoleControl.
"""

from __future__ import annotations

from struct import Struct

from pyvmm.devices.virtio.console_control import ConsoleControl
from pyvmm.devices.virtio.console_port import ConsolePort
from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.devices.virtio.ring import RingError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.chardev import Chardev
    from pyvmm.devices.virtio.ring import Virtqueue
    from pyvmm.guest_memory import GuestMemory

    # A port's number, its host's end, and its name, which a console of the kernel's has not.
    PortEnd = tuple[int, Chardev, str | None]

QUEUE_SIZE = 128
CONTROL_SIZE = 64
CONTROL_QUEUES = (2, 3)

# Features (5.3.3)
F_SIZE = 1 << 0
F_MULTIPORT = 1 << 1
F_EMERG_WRITE = 1 << 2

CONFIG = Struct("<HHII")  # struct virtio_console_config (5.3.4): columns, lines, ports, emergency write
SIZE_BYTES = 4
EMERG_WRITE = 8

FLUSH_TURNS = 4  # of each port, before the machine stands


class VirtioConsole(VirtioDevice):
    """``ends`` are its ports. Port 0 is always there (5.3.2); where it is not among them nobody is at its other end."""

    DEVICE_ID = 3
    own_thread = True  # a callable or a disk at a port's other end may take its time

    def __init__(self, memory: GuestMemory, ends: Sequence[PortEnd], *, queue_size: int = QUEUE_SIZE) -> None:
        from pyvmm.chardev import NullChardev

        by_number = {number: (chardev, name) for number, chardev, name in ends}
        count = max(by_number, default=0) + 1
        multiport = count > 1 or any(name is not None for _, name in by_number.values())
        sizes = [queue_size] * 2
        if multiport:
            sizes += [CONTROL_SIZE] * 2 + [queue_size] * (2 * count - 2)
        features = F_SIZE | F_EMERG_WRITE | (F_MULTIPORT if multiport else 0)
        super().__init__(memory, queues=sizes, config_bytes=CONFIG.size, features=features)
        self.config[:] = CONFIG.pack(0, 0, count, 0)
        self.ports = []
        for number in range(count):
            chardev, name = by_number.get(number, (NullChardev(), None))
            receives, sends = self.queues[first_queue(number) :][:2]
            announced = number in by_number
            port = ConsolePort(number, receives, sends, chardev, self.kick, name=name, announced=announced)
            chardev.set_resized(self._resized)
            self.ports.append(port)
        self._control = None
        if multiport:
            known = [port for port in self.ports if port.announced]
            self._control = ConsoleControl(self.queues[2], self.queues[3], known, self.kick)
        self._take_size()

    @property
    def _multiport(self) -> ConsoleControl | None:
        """The control queues, where the driver uses them."""
        return self._control if self.features & F_MULTIPORT else None

    # -- configuration space -----------------------------------------------------------------------------------------

    def _take_size(self) -> bool:
        """The screen of port 0; whether it is another one than before. Where nobody knows it, what was is kept."""
        size = self.ports[0].chardev.size
        packed = CONFIG.pack(*(size or (0, 0)), 0, 0)[:SIZE_BYTES]
        if size is None or packed == self.config[:SIZE_BYTES]:
            return False
        self.config[:SIZE_BYTES] = packed
        return True

    def _resized(self) -> None:
        """On whatever thread says so, perhaps in the middle of a write: the device's own looks at it."""
        if self.io is not None:
            self.io.call_soon(self._look_at_sizes)

    def _look_at_sizes(self) -> None:
        """On the device's thread, without a lock."""
        with self.lock:
            changed = self._take_size()
        if changed:
            self.config_changed()
        if (control := self._multiport) is not None:
            for port in self.ports:
                if port.announced:
                    control.resized(port)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """5.3.5: an emergency write is taken at any time, whatever was negotiated."""
        if offset == EMERG_WRITE:
            self.ports[0].emergency_write(value & 0xFF)

    # -- the driver --------------------------------------------------------------------------------------------------

    def driver_ok(self) -> None:
        self._resized()
        if not self.features & F_MULTIPORT:
            self.ports[0].set_open(True)  # there is nobody to say so

    def handle(self, queue: Virtqueue) -> None:
        control = self._multiport
        if queue.index in CONTROL_QUEUES:
            if control is not None and queue is control.receives:
                control.send()
            elif control is not None and control.hear():
                self.kick(queue)
            return
        port = self.ports[port_of(queue.index)]
        if port.number and control is None:
            return
        if queue is port.receives:
            port.receive()
        elif port.send():
            self.kick(queue)

    def flush(self) -> None:
        """What the driver has made available by now goes out, as far as the host takes it: the device's thread stands.
        """
        for port in self.ports:
            queue = port.sends
            if port.number and self._multiport is None:
                continue
            for _ in range(FLUSH_TURNS):
                with queue.lock:
                    if not self.live or not queue.ready:
                        break
                    try:
                        if not port.send():
                            break
                    except RingError as error:
                        self.broken(str(error))
            else:
                self.kick(queue)  # the rest is for the thread, when it goes on

    # -- coming to rest ----------------------------------------------------------------------------------------------

    def quiesce(self) -> None:
        for port in self.ports:
            with port.sends.lock:
                port.forget()

    def stop_queue(self, queue: Virtqueue) -> None:
        for port in self.ports:
            if queue is port.sends:
                with queue.lock:
                    port.forget()

    def reset_device(self) -> None:
        """Input that no driver has read is the host's still: the next one gets it."""
        for port in self.ports:
            port.set_open(False)
        if self._control is not None:
            self._control.reset()

    # -- state -------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        state: dict[str, Any] = super().save()
        state["ports"] = [port.save() for port in self.ports]
        state["control"] = None if self._control is None else self._control.save()
        return state

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import part, value_of

        own = dict(state) if isinstance(state, dict) else {}
        saved_ports, control = own.pop("ports", None), own.pop("control", None)
        ports = value_of(("list", "part", len(self.ports)), saved_ports, "ports")
        super().load(own)
        for port, saved in zip(self.ports, ports, strict=True):
            part(f"ports[{port.number}]", port, saved)
        if self._control is not None:
            part("control", self._control, control)

    def after_load(self) -> None:
        super().after_load()
        for port in self.ports:
            with port.sends.lock:
                try:
                    port.retake()
                except RingError as error:
                    self.broken(str(error))


def first_queue(number: int) -> int:
    """Of the two that port ``number`` has (5.3.2)."""
    return 2 * number + 2 if number else 0


def port_of(index: int) -> int:
    """Which port queue ``index`` belongs to, where it is no control queue."""
    return index // 2 - 1 if index > 1 else 0
