"""ConsolePort: one port of a virtio console, a pair of queues and a Chardev. OASIS virtio 1.2, 5.3.6.

Output goes from the guest's memory to the chardev as fast as that takes it, many buffers in one write. Where it takes
no more (``can_write``), buffers stay in the ring, and those that were taken already in ``_hand``, until
``set_writable`` says that it goes on: so nothing is lost, and nothing grows. Linux's hvc driver waits for each buffer
that it has given, as it would for a serial line that is held.

Input comes on the event loop's thread, which touches no ring: a little waits here for the device's thread, the rest at
the chardev. A port that the guest has not opened has no room.
"""

from __future__ import annotations

from pyvmm.device import DeviceLock
from pyvmm.devices.virtio.ring import RingError
from pyvmm.light import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.chardev import Chardev
    from pyvmm.devices.virtio.chain import Chain
    from pyvmm.devices.virtio.ring import Virtqueue

BATCH = 64  # buffers of output in the hand, at most
PIECE_BYTES = 1 << 16  # of output in one write
TURN_BYTES = 1 << 18  # of output before other ports have their turn
INPUT_BYTES = 4096  # that wait here for the guest's buffers


class ConsolePort:
    """Port ``number``. ``receives`` is the queue with room for input, ``sends`` the one with output; the methods that
    move bytes are called with the queue's lock held. ``kick(queue)`` has a queue served, from any thread.

    ``name``: None for a console of the kernel's. ``announced``: the guest is to know of it, where it knows of ports.
    """

    def __init__(
        self,
        number: int,
        receives: Virtqueue,
        sends: Virtqueue,
        chardev: Chardev,
        kick: Callable[[Virtqueue], None],
        *,
        name: str | None = None,
        announced: bool = True,
    ) -> None:
        self.number = number
        self.name = name
        self.announced = announced
        self.receives, self.sends = receives, sends
        self.chardev = chardev
        self.open = False
        """The guest reads it."""
        self.on_open: Callable[[bool], object] | None = None
        """Hears when that changes, on whatever thread; it may call nothing of the device."""
        self._kick = kick
        self._hand: deque[Chain] = deque()
        self._sent = 0  # bytes of the first of them
        self._lock = DeviceLock()  # of the input, and whether it is refused
        self._input = bytearray()
        self._refused = False  # input waits at the chardev for room here
        self._tokens: list[Any] = []
        chardev.set_receiver(self._receive, self._room)
        chardev.set_writable(lambda: kick(sends))

    @property
    def is_console(self) -> bool:
        """Whether the guest's kernel has it, and no program."""
        return self.name is None

    # -- output ------------------------------------------------------------------------------------------------------

    def send(self) -> bool:
        """Output, as far as the chardev takes it. Whether there may be more that it would take now."""
        queue, chardev = self.sends, self.chardev
        left = TURN_BYTES
        queue.disable_kicks()
        try:
            while left > 0 and chardev.can_write:
                if not self._hand and not self._take():
                    if not queue.enable_kicks():
                        return False
                    continue
                data = self._gather()
                chardev.write(data)
                left -= len(data)
            return chardev.can_write
        finally:
            queue.flush()

    def _take(self) -> bool:
        chains = self.sends.take(BATCH)
        for chain in chains:
            if chain.writable_bytes:
                raise RingError(f"port {self.number}: a buffer of output that is to be written to (5.3.6.1)")
        self._hand += chains
        return bool(chains)

    def _gather(self) -> bytes:
        """What goes out next; the driver has the buffers back that end in it."""
        pieces = []
        size = 0
        while self._hand and size < PIECE_BYTES:
            chain = self._hand[0]
            piece = chain.read(self._sent, PIECE_BYTES - size)
            pieces.append(piece)
            size += len(piece)
            self._sent += len(piece)
            if self._sent >= chain.readable_bytes:
                self.sends.push(chain, 0)
                self._hand.popleft()
                self._sent = 0
        return b"".join(pieces)

    def emergency_write(self, byte: int) -> None:
        """One character at once, whatever the rings are like (5.3.5). It may be lost where the chardev is full."""
        with self.sends.lock:  # one at a time writes
            self.chardev.write(bytes((byte,)))

    def forget(self) -> None:
        """No buffer of the guest's is here any more."""
        self._hand.clear()
        self._sent = 0

    # -- input -------------------------------------------------------------------------------------------------------

    def _room(self) -> int:
        with self._lock:
            room = max(0, INPUT_BYTES - len(self._input)) if self.open else 0
            self._refused = self._refused or not room
            return room

    def _receive(self, data: bytes) -> None:
        with self._lock:
            self._input += data
        self._kick(self.receives)

    def receive(self) -> None:
        """Input into the guest's buffers, as far as there are any. The driver rings when there are more."""
        queue = self.receives
        try:
            while self.open and self._input:
                chains = queue.take(1)
                if chains:
                    self._fill(chains[0])
                elif not queue.enable_kicks():
                    return
            queue.disable_kicks()  # buffers are for later
        finally:
            queue.flush()
            self._accept()

    def _fill(self, chain: Chain) -> None:
        if chain.readable_bytes:
            raise RingError(f"port {self.number}: a buffer for input that is to be read (5.3.6.1)")
        with self._lock:
            data = bytes(self._input[: chain.writable_bytes])
            del self._input[: len(data)]
        self.receives.push(chain, chain.write(0, data))

    def _accept(self) -> None:
        """There is room again, where there was none."""
        with self._lock:
            again = self._refused and self.open and len(self._input) < INPUT_BYTES
            if again:
                self._refused = False
        if again:
            self.chardev.accept_input()

    def set_open(self, is_open: bool) -> None:
        """The guest has opened or closed it. What it did not read is there when it opens it again."""
        with self._lock:
            changed = is_open != self.open
            self.open = is_open
        if changed and self.on_open is not None:
            self.on_open(is_open)
        if is_open:
            self._accept()
        self._kick(self.receives)  # whether the driver is to ring for it is another matter now

    # -- state -------------------------------------------------------------------------------------------------------

    # Who types and who feeds may have found the same room, each for his own.
    STATE = {"open": "flag", "_input": ("bytes", 0, 2 * INPUT_BYTES), "_sent": 32}

    def save(self) -> dict[str, Any]:
        from pyvmm.state import save_fields

        with self._lock:
            fields = save_fields(self, self.STATE)
        return {**fields, "hand": [chain.token for chain in self._hand]}

    def load(self, state: object) -> None:
        from pyvmm.errors import StateError
        from pyvmm.state import load_fields

        self.forget()
        with self._lock:
            load_fields(self, self.STATE, state, besides=("hand",))
        assert isinstance(state, dict)
        hand = state["hand"]
        if not isinstance(hand, list) or len(hand) > BATCH:
            raise StateError(f"hand is no list of at most {BATCH} chains")
        self._tokens = hand

    def retake(self) -> None:
        """The buffers that were in the hand of whoever was saved. RingError; ``sends.lock`` is held."""
        tokens, self._tokens = self._tokens, []
        self._hand.extend(self.sends.retake(token) for token in tokens)
