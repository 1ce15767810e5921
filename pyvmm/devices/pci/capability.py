"""A function's list of capabilities. PCI Local Bus Specification 3.0, 6.7."""

from __future__ import annotations

from pyvmm.devices.pci.device import CONFIG_BYTES, STATUS, STATUS_DEVSEL_MEDIUM
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.pci.device import PciDevice

STATUS_CAPABILITIES = 0x0010
POINTER = 0x34
FIRST = 0x40
HEADER_BYTES = 2
VENDOR_SPECIFIC = 0x09
MSIX = 0x11


class Capabilities:
    """Adds capabilities to ``function``, one behind the other, each found by the one before."""

    def __init__(self, function: PciDevice) -> None:
        self._function = function
        self._pointer = POINTER
        self._free = FIRST

    def add(self, number: int, body: bytes, writable: bytes = b"") -> int:
        """One with ``body`` behind its header; bits that are set in ``writable`` the guest may change. Its register.

        ConfigError where the 256 bytes are full.
        """
        at = self._free
        end = at + HEADER_BYTES + len(body)
        if end > CONFIG_BYTES:
            raise ConfigError(f"capability {number:#x} ends at {end:#x}, behind configuration space: leave one out")
        function = self._function
        function.define(STATUS, 2, STATUS_DEVSEL_MEDIUM | STATUS_CAPABILITIES)
        function.define(self._pointer, 1, at)
        function.define(at, 1, number)
        function.define(at + 1, 1, 0)
        for n, byte in enumerate(body):
            function.define(at + HEADER_BYTES + n, 1, byte, writable[n] if n < len(writable) else 0)
        self._pointer = at + 1
        self._free = (end + 3) & ~3
        return at
