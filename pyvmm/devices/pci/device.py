"""PciDevice: one function on the PCI bus, its 256 bytes of configuration space and what its base addresses decode.

PCI Local Bus Specification 3.0, chapter 6: 6.1 (type 0 header), 6.2.2 and 6.2.3 (command, status), 6.2.5 (base
addresses).

A function states which bits of which register the guest may change (``writable``) and which a one clears
(``clear_on_one``); all else is fixed. Registers that do something have their work in ``changed``, which runs after
bytes have changed.

Configuration space is under the lock of the PciHost: its handlers run on vCPU threads with that lock held. What a
function decodes moves from inside such a write, and unmapping waits for a handler under way; so no handler of a BAR's
region may touch configuration space. ``set_interrupt`` may be called from anywhere: it takes the function's own lock
only.
"""

from __future__ import annotations

from pyvmm.address_space import AddressSpace
from pyvmm.device import Device
from pyvmm.errors import ConfigError, KindError, KvmError, StateError
from pyvmm.irq import IrqLine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from pyvmm.device import DeviceLock
    from pyvmm.region import MemoryRegion

    Part = tuple[int, Callable[[], MemoryRegion]]

    class Bus(Protocol):
        """What a function needs of the host bridge that it is behind (host.py)."""

        @property
        def lock(self) -> DeviceLock: ...
        def intx(self, slot: int, pin: int) -> IrqLine: ...
        def retry_blocked(self) -> None: ...

CONFIG_BYTES = 256

# Type 0 header
VENDOR_ID = 0x00
DEVICE_ID = 0x02
COMMAND = 0x04
STATUS = 0x06
REVISION_ID = 0x08
CLASS_CODE = 0x09  # three bytes: programming interface, subclass, base class
CACHE_LINE_SIZE = 0x0C
LATENCY_TIMER = 0x0D
HEADER_TYPE = 0x0E
BAR0 = 0x10
BAR_COUNT = 6
SUBSYSTEM_VENDOR_ID = 0x2C
SUBSYSTEM_ID = 0x2E
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D

# What says which function this is, and is fixed: (register, bytes).
IDENTITY = ((VENDOR_ID, 4), (REVISION_ID, 4), (HEADER_TYPE, 1), (SUBSYSTEM_VENDOR_ID, 4))

# Command
COMMAND_IO = 0x0001
COMMAND_MEMORY = 0x0002
COMMAND_BUS_MASTER = 0x0004
COMMAND_PARITY = 0x0040
COMMAND_SERR = 0x0100
COMMAND_INTX_DISABLE = 0x0400

# Status
STATUS_INTX = 0x0008
STATUS_FAST_BACK_TO_BACK = 0x0080
STATUS_DEVSEL_MEDIUM = 0x0200

MULTIFUNCTION = 0x80  # of the header type
BAR_IO = 0x1
BAR_64 = 0x4
BAR_PREFETCHABLE = 0x8
BAR_TOP = 0xFFFF_FFFF  # a base address that reaches this has just been sized, or decodes nothing that can be there

VENDOR_INTEL = 0x8086
# What QEMU's chipset functions carry: guests know a virtual machine by it.
SUBSYSTEM = (0x1AF4, 0x1100)


class Window:
    """Regions of an address space that go together to a base the guest chooses: a BAR, or a chipset's own block.

    Where something else answers already, none of them is mapped and the window is ``blocked``: of two answers to one
    address the first one stays.

    ``parts`` are pairs of an offset in the window and a function that makes the region there. A region is mapped once:
    another vCPU may still be reading its address from a view it took before a move, and must not find the new one.
    """

    __slots__ = ("_loaded", "_noted", "_parts", "_regions", "_space", "base", "wanted")

    def __init__(self, space: AddressSpace, parts: Sequence[Part]) -> None:
        self._space = space
        self._parts = checked_parts(parts)
        self._regions: list[MemoryRegion] = []
        self.wanted: int | None = None
        """Where the guest has put it; None: it is not decoded."""
        self.base: int | None = None
        """Where it is."""
        self._noted: int | None = None  # where a loaded state has it
        self._loaded = False

    @property
    def blocked(self) -> bool:
        return self.base != self.wanted

    def save(self) -> dict[str, Any]:
        return {"wanted": self.wanted, "base": self.base}

    def load(self, state: dict[str, Any]) -> None:
        """Note where it goes: ``leave`` and ``go_on`` move it there."""
        from pyvmm.state import check_names, value_of

        check_names(state, ("wanted", "base"))
        wanted, base = (value_of(("or none", 64), state[name], name) for name in ("wanted", "base"))
        if base not in (None, wanted):
            raise StateError(f"base is {base:#x}, which is not where it is wanted")
        self.wanted = wanted
        self._noted = base
        self._loaded = True

    def leave(self) -> None:
        """After a load, first step, for all windows: unmap it where the state has it elsewhere."""
        if self._loaded and self.base != self._noted:
            self._unmap()

    def go_on(self) -> None:
        """Second step: map it where the state has it. One that was blocked stays so, in whatever order they are mapped.
        """
        if self._loaded and self.base != self._noted and self._noted is not None:
            self._map(self._noted)
        self._loaded = False

    def place(self, base: int | None) -> bool:
        """Go to ``base``, or nowhere. True where that gave addresses up, which another window may be waiting for."""
        self.wanted = base
        if base == self.base:
            return False
        gave_up = self.base is not None
        self._unmap()
        if base is not None:
            self._map(base)
        return gave_up

    def retry(self) -> None:
        """Something has moved: try once more."""
        if self.blocked and self.wanted is not None:
            self._map(self.wanted)

    def _map(self, base: int) -> None:
        try:
            for offset, make in self._parts:
                self._regions.append(self._space.add(base + offset, make()))
        except (KindError, KvmError):  # no region at all, or nothing KVM can do: the guest is not to blame
            self._unmap()
            raise
        except ConfigError:  # taken, or past the end of the space
            self._unmap()
        else:
            self.base = base

    def _unmap(self) -> None:
        while self._regions:
            self._space.unmap(self._regions.pop())
        self.base = None


def checked_parts(parts: Sequence[Part]) -> list[Part]:
    """KindError where these are no (offset, function that makes the region)."""
    if not isinstance(parts, (list, tuple)):
        raise KindError(f"parts={parts!r}: give a list of (offset, function that makes the region)")
    for part in parts:
        if not isinstance(part, (list, tuple)) or len(part) != 2:
            raise KindError(f"{part!r} is no part: give (offset, function that makes the region)")
        offset, make = part
        if not isinstance(offset, int) or isinstance(offset, bool) or offset < 0:
            raise KindError(f"a part at {offset!r}: give its offset in the window, 0 or more")
        if not callable(make):
            raise KindError(f"{make!r} makes no region: give a function that makes a new one each time")
    return [(offset, make) for offset, make in parts]


class Bar:
    """A base address register of ``size`` bytes (a power of two) and the window it moves."""

    __slots__ = ("flags", "register", "size", "window")

    def __init__(self, index: int, size: int, flags: int, window: Window) -> None:
        self.register = BAR0 + 4 * index
        self.size = size
        self.flags = flags  # the read-only low bits
        self.window = window


class PciDevice(Device):
    """A function. ``class_code``: base class, subclass and programming interface as one number of 24 bits.

    Subclasses state their registers with ``define`` and their BARs with ``add_io_bar`` and ``add_memory_bar`` when they
    are made, and override ``changed`` and ``bus_master_changed``. PciHost.add puts it on the bus.
    """

    def __init__(
        self,
        *,
        device_id: int,
        class_code: int,
        vendor_id: int = VENDOR_INTEL,
        revision: int = 0,
        subsystem: tuple[int, int] = SUBSYSTEM,
        command: int = 0,
        command_writable: int = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_SERR | COMMAND_INTX_DISABLE,
        status: int = STATUS_DEVSEL_MEDIUM,
        interrupt_pin: int = 0,
    ) -> None:
        self.config = bytearray(CONFIG_BYTES)
        self._power_on = bytearray(CONFIG_BYTES)
        self._writable = bytearray(CONFIG_BYTES)
        self._clear_on_one = bytearray(CONFIG_BYTES)
        self._bars: list[Bar] = []
        self._windows: list[Window] = []
        self._host: Bus | None = None
        self.slot = 0
        self._intx = IrqLine()  # to the interrupt router, once it is on a bus
        self._intx_level = 0  # what the function wants; the line has it where the command register lets it through
        self.define(VENDOR_ID, 2, vendor_id)
        self.define(DEVICE_ID, 2, device_id)
        self.define(COMMAND, 2, command, command_writable)
        self.define(STATUS, 2, status)
        self.define(REVISION_ID, 4, class_code << 8 | revision)
        self.define(CACHE_LINE_SIZE, 1, 0, 0xFF)
        self.define(SUBSYSTEM_VENDOR_ID, 2, subsystem[0])
        self.define(SUBSYSTEM_ID, 2, subsystem[1])
        self.define(INTERRUPT_LINE, 1, 0, 0xFF)
        self.define(INTERRUPT_PIN, 1, interrupt_pin)

    # -- what a subclass states ----------------------------------------------------------------------------------------

    def define(self, register: int, size: int, value: int, writable: int = 0, clear_on_one: int = 0) -> None:
        """A register of ``size`` bytes: its power-on value, the bits a write sets, the bits writing a one clears."""
        end = register + size
        self._power_on[register:end] = self.config[register:end] = value.to_bytes(size, "little")
        self._writable[register:end] = writable.to_bytes(size, "little")
        self._clear_on_one[register:end] = clear_on_one.to_bytes(size, "little")

    def add_window(self, space: AddressSpace, parts: Sequence[Part]) -> Window:
        """A block of the chip that moves otherwise than by a BAR: the subclass places it."""
        window = Window(space, parts)
        self._windows.append(window)
        return window

    def add_io_bar(self, index: int, size: int, pio: AddressSpace, parts: Sequence[Part]) -> Bar:
        """BAR ``index``: ``size`` ports, ``parts`` as Window has them."""
        return self._add_bar(index, size, BAR_IO, pio, parts)

    def add_memory_bar(
        self,
        index: int,
        size: int,
        mmio: AddressSpace,
        parts: Sequence[Part],
        *,
        prefetchable: bool = False,
        wide: bool = False,
    ) -> Bar:
        """BAR ``index``: ``size`` bytes of 32-bit memory addresses; ``wide``: of 64-bit ones, and the next BAR is its
        upper half.
        """
        flags = (BAR_PREFETCHABLE if prefetchable else 0) | (BAR_64 if wide else 0)
        bar = self._add_bar(index, size, flags, mmio, parts)
        if wide:
            if index + 1 == BAR_COUNT or any(other.register == bar.register + 4 for other in self._bars):
                raise ConfigError(f"BAR {index} of 64 bits needs the next one too: give another")
            self.define(bar.register + 4, 4, 0, BAR_TOP)
        return bar

    def _add_bar(self, index: int, size: int, flags: int, space: AddressSpace, parts: Sequence[Part]) -> Bar:
        smallest = 4 if flags & BAR_IO else 16
        if not isinstance(space, AddressSpace):
            raise KindError(f"BAR {index!r} in {space!r}: give the machine's pio or mmio")
        if not isinstance(index, int) or not isinstance(size, int):
            raise KindError(f"BAR {index!r} of {size!r} bytes: give whole numbers")
        outside = [part[0] for part in checked_parts(parts) if part[0] >= size]
        if outside:
            raise ConfigError(f"BAR {index} of {size} bytes has no room at {outside[0]:#x}: give an offset in it")
        if not 0 <= index < BAR_COUNT or size < smallest or size & (size - 1) or size > 1 << 31:
            raise ConfigError(f"BAR {index} of {size} bytes: give BAR 0 to 5, a power of two from {smallest} to 2 GiB")
        bar = Bar(index, size, flags, self.add_window(space, parts))
        self._bars.append(bar)
        self.define(bar.register, 4, flags, BAR_TOP & ~(size - 1))
        return bar

    def changed(self, first: int, last: int) -> None:
        """Bytes ``first`` to ``last`` were written and some of them are different now. The host's lock is held.

        Also called for all 256 after a reset.
        """
        if first < COMMAND + 2 and last >= COMMAND:
            self._update_bars()
            self.bus_master_changed(self.bus_master)
            self._show_intx()
        elif first < BAR0 + 4 * BAR_COUNT and last >= BAR0:
            self._update_bars()

    def bus_master_changed(self, enabled: bool) -> None:
        """The command register was written: may the function reach memory? Called with the same value again, too."""

    # -- the registers, by name ----------------------------------------------------------------------------------------

    def get(self, register: int, size: int = 1) -> int:
        """What ``size`` bytes at ``register`` hold."""
        return int.from_bytes(self.config[register : register + size], "little")

    @property
    def command(self) -> int:
        return self.get(COMMAND, 2)

    @property
    def bus_master(self) -> bool:
        return bool(self.config[COMMAND] & COMMAND_BUS_MASTER)

    # -- the bus's side: the host's lock is held -----------------------------------------------------------------------

    def config_read(self, register: int, size: int) -> int:
        """A configuration read of 1, 2 or 4 bytes; what lies past the 256 reads as zeros."""
        return int.from_bytes(self.config[register : register + size], "little")

    def config_write(self, register: int, size: int, value: int) -> None:
        """A configuration write of 1, 2 or 4 bytes."""
        end = min(register + size, CONFIG_BYTES)
        size = end - register
        with self.lock:  # against set_interrupt, which changes the status register
            old = int.from_bytes(self.config[register:end], "little")
            mask = int.from_bytes(self._writable[register:end], "little")
            cleared = int.from_bytes(self._clear_on_one[register:end], "little") & value
            new = (old & ~mask | value & mask) & ~cleared
            if new == old:
                return
            self.config[register:end] = new.to_bytes(size, "little")
        self.changed(register, end - 1)

    def plug(self, host: Bus, slot: int) -> None:
        """It is on ``host``'s bus now."""
        self._host = host
        self.slot = slot
        pin = self.config[INTERRUPT_PIN]
        if pin:
            self._intx = host.intx(slot, pin - 1)

    def be_multifunction(self) -> None:
        """Others share its slot (6.2.1): whoever finds function 0 looks for them."""
        self.define(HEADER_TYPE, 1, MULTIFUNCTION)

    @property
    def bars(self) -> list[Bar]:
        """Its base address registers."""
        return list(self._bars)

    @property
    def windows(self) -> list[Window]:
        """All that it may decode."""
        return list(self._windows)

    def retry_blocked(self) -> None:
        for window in self._windows:
            window.retry()

    # -- decoding ------------------------------------------------------------------------------------------------------

    def bar_base(self, bar: Bar) -> int | None:
        """The address that the BAR decodes; None where the command register, zero or the top says none."""
        enable = COMMAND_IO if bar.flags & BAR_IO else COMMAND_MEMORY
        if not self.config[COMMAND] & enable:
            return None
        wide = bar.flags & BAR_64
        base = self.get(bar.register, 8 if wide else 4) & ~(bar.size - 1)
        last = base + bar.size - 1
        # A wide one may lie above 4 GiB, as far as the address space goes; but not at the end of either half.
        return base if base and (last < BAR_TOP or (wide and base > BAR_TOP)) else None

    def assign(self, next_port: int, next_address: int) -> tuple[int, int]:
        """Give the BARs addresses as firmware would, ports and memory from these on; the first that are left."""
        with self._config_lock:
            for bar in self._bars:
                at = next_port if bar.flags & BAR_IO else next_address
                base = (at + bar.size - 1) & ~(bar.size - 1)
                self.config_write(bar.register, 4, base)
                if bar.flags & BAR_IO:
                    next_port = base + bar.size
                else:
                    next_address = base + bar.size
            enable = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER
            self.config_write(COMMAND, 2, self.command | enable)
        return next_port, next_address

    def _update_bars(self) -> None:
        for bar in self._bars:
            self.place(bar.window, self.bar_base(bar))

    def place(self, window: Window, base: int | None) -> None:
        """Move a window; whatever waits for the addresses it gives up is tried again."""
        if window.place(base):
            if self._host is not None:
                self._host.retry_blocked()
            else:
                self.retry_blocked()

    # -- INTx ----------------------------------------------------------------------------------------------------------

    def set_interrupt(self, level: int) -> None:
        """Drive the function's interrupt pin (level sensitive). From any thread."""
        with self.lock:
            self._intx_level = level
            if level:
                self.config[STATUS] |= STATUS_INTX
            else:
                self.config[STATUS] &= ~STATUS_INTX
            self._show_intx()

    def _show_intx(self) -> None:
        with self.lock:
            self._intx.set(self._intx_level and not self.command & COMMAND_INTX_DISABLE)

    # -- the machine's side --------------------------------------------------------------------------------------------

    @property
    def _config_lock(self) -> DeviceLock:
        return self.lock if self._host is None else self._host.lock

    def reset(self) -> None:
        """RST#: every register at its power-on value, nothing decoded, the interrupt pin let go."""
        with self._config_lock:
            with self.lock:
                self.config[:] = self._power_on
                self._intx_level = 0
            self.changed(0, CONFIG_BYTES - 1)

    STATE = {"config": ("bytes", CONFIG_BYTES), "_intx_level": 1}

    def save(self) -> dict[str, Any]:
        with self._config_lock:
            return {**super().save(), "windows": [window.save() for window in self._windows]}

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import load_fields, part, value_of

        with self._config_lock, self.lock:
            before = bytes(self.config)
            load_fields(self, self.STATE, state, ("windows",))
            windows = value_of(("list", "part", len(self._windows)), state["windows"], "windows")
            for register, size in IDENTITY:
                if self.config[register : register + size] != before[register : register + size]:
                    self.config[:] = before
                    raise StateError(f"config[{register:#x}] is that of another function")
            for n, window in enumerate(self._windows):
                part(f"windows[{n}]", window, windows[n])

    def after_load(self) -> None:
        """The host maps what it decodes: that of all functions together."""
        with self._config_lock:
            self.bus_master_changed(self.bus_master)
            self._show_intx()
