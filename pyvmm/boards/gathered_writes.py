"""GatheredWrites: sees to it that what KVM has gathered of a guest's writes to an IDE channel is delivered in time."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.clock import Clock
    from pyvmm.cpu import Cpu
    from pyvmm.devices.ide.channel import IdeChannel


class GatheredWrites:
    """While ``channel`` takes data from the guest, has the vCPUs deliver what KVM has gathered of it.

    It does so only when nothing has arrived for a whole period: a guest that goes on writing, or that polls, exits by
    itself, and a kick costs as much as many words.
    """

    PERIOD_NS = 5_000_000

    __slots__ = ("_channel", "_clock", "_cpus", "_moved", "_timer")

    def __init__(self, clock: Clock, cpus: Sequence[Cpu], channel: IdeChannel) -> None:
        self._clock = clock
        self._cpus = cpus
        self._channel = channel
        self._moved = 0
        self._timer = clock.timer(self._look)
        channel.on_data_out = self._begin

    def _begin(self) -> None:
        """A write command has asked for its data; the channel's lock is held."""
        if not self._timer.armed:
            self._timer.arm(self._clock.now_ns() + self.PERIOD_NS)

    def _look(self) -> None:
        # With the lock, because between two blocks of one command no window is open for a moment.
        with self._channel.lock:
            if not self._channel.data.writing:
                return
            moved = self._channel.data.count
        if moved == self._moved:
            for cpu in self._cpus:
                cpu.exec.drain()
        self._moved = moved
        self._timer.arm(self._clock.now_ns() + self.PERIOD_NS)
