"""Balloon: the host's side of a memory balloon, as Machine has it."""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.light import Condition, Lock
from pyvmm.options import is_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.virtio.balloon import VirtioBalloon

MIB = 1 << 20
PAGES_A_MIB = 256  # a page is 4 KiB to a balloon, whatever the guest's are


class Balloon:
    """``device`` is the guest's end."""

    def __init__(self, device: VirtioBalloon) -> None:
        self._device = device
        self._lock = Lock()
        self._came = Condition(self._lock)
        self._count = 0  # of statistics that have come
        device.on_stats = self._stats_came

    def set(self, mib: int) -> None:
        """What the guest is asked to give. ConfigError where that is all it has, or no such number."""
        most = self._device.memory.size_bytes // MIB - 1
        if not is_int(mib) or not 0 <= mib <= most:
            raise ConfigError(f"set_balloon({mib!r}): give a whole number of MiB, from 0 to {most}")
        self._device.set_target(mib * PAGES_A_MIB)

    def leave(self, size_bytes: int) -> None:
        """The same, by how much of its memory the guest is to keep; more than it has: all of it."""
        page_bytes = MIB // PAGES_A_MIB
        kept = min(max(size_bytes, MIB), self._device.memory.size_bytes)
        self._device.set_target((self._device.memory.size_bytes - kept) // page_bytes)

    def stats(self, timeout_s: float) -> dict[str, int]:
        """Asked for now. TimeoutError where they do not come."""
        with self._lock:
            before = self._count
            self._device.ask_stats()
            if not self._came.wait_for(lambda: self._count != before, timeout_s):
                raise TimeoutError(f"the guest has said nothing of its memory within {timeout_s} s")
        return self.told

    @property
    def told(self) -> dict[str, int]:
        """What the guest said last of its memory, and of the balloon what it is asked for and what it has given."""
        device = self._device
        page_bytes = MIB // PAGES_A_MIB
        return {
            "target_bytes": device.target_pages * page_bytes,
            "actual_bytes": device.actual_pages * page_bytes,
            **device.stats,
        }

    def _stats_came(self) -> None:
        with self._lock:
            self._count += 1
            self._came.notify_all()
