"""VmGenId: a number that is another one in each life of a machine, so that a guest knows when it goes on as a twin.

Microsoft, "Virtual Machine Generation ID" (2012): 16 bytes in an 8-byte aligned place that no memory map calls usable;
ACPI tells where, and a notification when they have changed. Linux reseeds its random numbers then, which two machines
of one snapshot would otherwise draw alike.
"""

from __future__ import annotations

import posix

from pyvmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ID_BYTES = 16


class VmGenId(Device):
    """Map ID_BYTES, read-only for the guest. ``notify()`` is called when they have changed."""

    STATE = {"id": ("bytes", ID_BYTES)}

    __slots__ = ("_notify", "id")

    def __init__(self, notify: Callable[[], object]) -> None:
        self._notify = notify
        self.id = posix.urandom(ID_BYTES)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.id[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        pass

    def change(self) -> None:
        """Another one from here on; the guest is told."""
        with self.lock:
            self.id = posix.urandom(ID_BYTES)
        self._notify()
