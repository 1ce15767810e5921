"""PciHost: the way from ports 0xcf8-0xcff to the functions of bus 0, and from their interrupt pins to the router.

PCI Local Bus Specification 3.0, 3.2.2.3.2 (configuration mechanism #1); Intel 82441FX (PMC) data sheet, CONFADD and
CONFDATA. There is one bus and no bridge to another: only type 0 cycles, and nobody answers on any other bus.
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.errors import ConfigError
from pyvmm.irq import IrqLine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.devices.pci.device import PciDevice

SLOTS = 32
FUNCTIONS = 8

CONFIG_DATA = 4  # offset of the data window
RESET_CONTROL = 1  # a byte access here is not the host bridge's
ENABLE = 0x8000_0000
ENABLE_AND_BUS = 0x80FF_0000


class PciHost(Device):
    """Map 8 ports at 0xcf8.

    ``reset_control`` answers byte accesses at offset 1, port 0xcf9. ``intx(slot, pin)``, pin 0 to 3 for INTA to INTD,
    gives a function a line of its own to the interrupt router; without, they lead nowhere.

    The address register keeps all its 32 bits, as QEMU's does, and its two lowest ones select the byte together with
    the data port's: programs that write a register's unaligned number there and access 0xcfc find what they mean.
    """

    __slots__ = ("_address", "_functions", "_reset_control", "intx")

    def __init__(
        self, reset_control: Device | None = None, intx: Callable[[int, int], IrqLine] | None = None
    ) -> None:
        self._reset_control = reset_control
        self.intx = intx or no_router
        self._address = 0
        self._functions: list[PciDevice | None] = [None] * (SLOTS * FUNCTIONS)

    # -- the board's side ----------------------------------------------------------------------------------------------

    def add(self, device: PciDevice, slot: int, function: int = 0) -> None:
        """Put ``device`` on the bus. ConfigError where the place is taken or there is none."""
        if not 0 <= slot < SLOTS or not 0 <= function < FUNCTIONS:
            raise ConfigError(f"PCI {slot:02x}.{function}: a bus has slots 0 to 31 of functions 0 to 7")
        where = slot * FUNCTIONS + function
        there = self._functions[where]
        if there is not None:
            names = f"{type(there).__name__} is at PCI {slot:02x}.{function}", type(device).__name__
            raise ConfigError(f"{names[0]} already: give {names[1]} another slot")
        with self.lock:
            self._functions[where] = device
            device.plug(self, slot)
            first = slot * FUNCTIONS
            zero = self._functions[first]
            if zero is not None and any(self._functions[first + 1 : first + FUNCTIONS]):
                zero.be_multifunction()

    @property
    def devices(self) -> list[tuple[int, int, PciDevice]]:
        """What is on the bus: slot, function and device."""
        return [(n // FUNCTIONS, n % FUNCTIONS, f) for n, f in enumerate(self._functions) if f is not None]

    def retry_blocked(self) -> None:
        """A window has moved away from somewhere: whoever wanted to be there may go now."""
        for function in self._functions:
            if function is not None:
                function.retry_blocked()

    # -- the guest's side ----------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset >= CONFIG_DATA:
            address = self._address
            if address & ENABLE_AND_BUS == ENABLE:
                function = self._functions[address >> 8 & 0xFF]
                if function is not None:
                    return function.config_read(address & 0xFF | offset & 3, size)
        elif size == 4:
            return self._address
        elif offset == RESET_CONTROL and size == 1 and self._reset_control is not None:
            with self._reset_control.lock:
                return self._reset_control.read(0, 1)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= CONFIG_DATA:
            address = self._address
            if address & ENABLE_AND_BUS == ENABLE:
                function = self._functions[address >> 8 & 0xFF]
                if function is not None:
                    function.config_write(address & 0xFF | offset & 3, size, value)
        elif size == 4:
            self._address = value
        elif offset == RESET_CONTROL and size == 1 and self._reset_control is not None:
            with self._reset_control.lock:
                self._reset_control.write(0, 1, value)

    # -- the machine's side: the functions and the reset register are on their own -------------------------------------

    def reset(self) -> None:
        with self.lock:
            self._address = 0

    STATE = {"_address": 32}

    def after_load(self) -> None:
        """Every window of every function goes where it was. First those leave that are elsewhere, maybe in the way."""
        with self.lock:
            windows = [window for function in self._functions if function is not None for window in function.windows]
            for window in windows:
                window.leave()
            for window in windows:
                window.go_on()


def no_router(slot: int, pin: int) -> IrqLine:
    return IrqLine()
