"""Announcer: the network cards tell the network where they are, in rounds, as after a move to another host.

Switches and bridges send frames for an address to the port where they last saw it. A guest that has taken
VIRTIO_NET_F_GUEST_ANNOUNCE is asked to send something (OASIS virtio 1.2, 5.1.6.5.4); for another one the card sends a
RARP request in its name. A network may lose either, so there are rounds: QEMU's words and defaults (qapi/net.json,
AnnounceParameters; qapi/migration.json), its intervals (net/announce.c) in guest time, which stands while the machine
does. What rounds are left is not in a saved state: whoever goes on from that elsewhere begins anew.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.light import Lock
from pyvmm.options import is_int, near_match

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyvmm.clock import Clock, Timer
    from pyvmm.devices.virtio.net import VirtioNet

NS_A_MS = 1_000_000
INITIAL_MS, MAX_MS, ROUNDS, STEP_MS = 50, 550, 5, 100
# What QEMU's migrate-set-parameters takes.
MOST = {"initial_ms": 100_000, "max_ms": 100_000, "rounds": 1000, "step_ms": 10_000}
MOST_SERIES = 64


class Series:
    """Rounds that are under way for some cards."""

    def __init__(self, cards: Sequence[VirtioNet], initial_ms: int, max_ms: int, rounds: int, step_ms: int) -> None:
        self.cards = cards
        self.left = rounds
        self.timer: Timer | None = None
        self._rounds = rounds
        self._initial_ms = initial_ms
        self._max_ms = max_ms
        self._step_ms = step_ms

    def wait_ns(self) -> int:
        """From the round that was to the next one."""
        return min(self._initial_ms + (self._rounds - self.left - 1) * self._step_ms, self._max_ms) * NS_A_MS


class Announcer:
    """``cards`` by their names. From any thread, without a lock."""

    def __init__(self, clock: Clock, cards: Mapping[str, VirtioNet]) -> None:
        self._clock = clock
        self._cards = cards
        self._lock = Lock()
        self._series: dict[str, Series] = {}

    @property
    def under_way(self) -> int:
        """How many series of rounds are."""
        return len(self._series)

    def announce(
        self,
        initial_ms: int = INITIAL_MS,
        max_ms: int = MAX_MS,
        rounds: int = ROUNDS,
        step_ms: int = STEP_MS,
        *,
        interfaces: Sequence[str] | None = None,
        id: str = "",
    ) -> None:
        """The first round now, the next after ``initial_ms``, for each further one ``step_ms`` more, up to ``max_ms``.
        ``interfaces``: these cards only. They take the place of those of the same ``id`` that are under
        way; ``rounds=0`` only ends those. ConfigError.
        """
        for name, value in zip(MOST, (initial_ms, max_ms, rounds, step_ms), strict=True):
            if not is_int(value) or not 0 <= value <= MOST[name]:
                raise ConfigError(f"announce_self({name}={value!r}): give a whole number from 0 to {MOST[name]}")
        series = Series(self._chosen(interfaces), initial_ms, max_ms, rounds, step_ms)
        with self._lock:
            before = self._series.pop(id, None)
            if before is not None and before.timer is not None:
                before.timer.disarm()
            if not rounds:
                return
            if len(self._series) >= MOST_SERIES:
                raise ConfigError(f"announce_self(id={id!r}): {MOST_SERIES} others are under way: let one of them end")
            self._series[id] = series
            series.timer = timer = self._clock.timer(lambda: self._round(id, series))
        timer.arm(self._clock.now_ns())

    def _chosen(self, interfaces: Sequence[str] | None) -> list[VirtioNet]:
        for name in interfaces or ():
            if name not in self._cards:
                near = near_match(name, self._cards)
                raise ConfigError(f"announce_self(interfaces=[{name!r}]): there is no such card{near}")
        return [card for name, card in self._cards.items() if interfaces is None or name in interfaces]

    def _round(self, id: str, series: Series) -> None:
        with self._lock:
            if self._series.get(id) is not series:
                return  # others have taken their place
            series.left -= 1
            if series.left:
                assert series.timer is not None
                series.timer.arm(self._clock.now_ns() + series.wait_ns())
            else:
                del self._series[id]
        for card in series.cards:
            card.announce()
