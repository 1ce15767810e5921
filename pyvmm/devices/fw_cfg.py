"""QEMU's firmware configuration device: named blobs that firmware and kernels fetch byte by byte or by DMA.

QEMU docs/specs/fw_cfg.rst; where that is silent, what hw/nvram/fw_cfg.c does. The x86 placement: selector and
data overlap in two ports, the DMA address register has eight of its own.
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.errors import BusError, ConfigError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    from pyvmm.guest_memory import GuestMemory

    Content: TypeAlias = bytes | bytearray | memoryview
    Data: TypeAlias = bytes | memoryview | Callable[[], bytes]

# Keys.
SIGNATURE = 0x0000
ID = 0x0001
UUID = 0x0002
RAM_SIZE = 0x0003
NOGRAPHIC = 0x0004
NB_CPUS = 0x0005
KERNEL_ADDR = 0x0007
KERNEL_SIZE = 0x0008
KERNEL_CMDLINE = 0x0009
INITRD_ADDR = 0x000A
INITRD_SIZE = 0x000B
BOOT_DEVICE = 0x000C
NUMA = 0x000D
BOOT_MENU = 0x000E
MAX_CPUS = 0x000F
KERNEL_ENTRY = 0x0010
KERNEL_DATA = 0x0011
INITRD_DATA = 0x0012
CMDLINE_ADDR = 0x0013
CMDLINE_SIZE = 0x0014
CMDLINE_DATA = 0x0015
SETUP_ADDR = 0x0016
SETUP_SIZE = 0x0017
SETUP_DATA = 0x0018
FILE_DIR = 0x0019
FILE_FIRST = 0x0020
WRITE_CHANNEL = 0x4000  # once asked for write access, now means nothing
ARCH_LOCAL = 0x8000
IRQ0_OVERRIDE = ARCH_LOCAL | 2
KEY_MASK = 0xFFFF & ~WRITE_CHANNEL

# What ID says.
ID_TRADITIONAL = 1
ID_DMA = 2

# FWCfgDmaAccess.control.
DMA_ERROR = 0x01
DMA_READ = 0x02
DMA_SKIP = 0x04
DMA_SELECT = 0x08
DMA_WRITE = 0x10
DMA_KEY_SHIFT = 16
DMA_ACCESS_BYTES = 16  # control 4, length 4, address 8, all big endian
DMA_REGISTER_READS = b"QEMU CFG"

FILE_NAME_BYTES = 56  # with the zero at the end
LONGEST_ITEM_BYTES = 1 << 32  # the directory says a size in 32 bits

# Zeros are handed out from one such block, so that a long read past an item's end needs no memory of its length.
ZEROS = bytes(1 << 20)


def check_file_name(name: str) -> None:
    """ConfigError where the directory has no room for that, or a guest could not ask for it."""
    if not name.isascii() or not name.isprintable() or not 0 < len(name) < FILE_NAME_BYTES:
        raise ConfigError(f"fw_cfg file name {name!r}: use 1 to 55 printable ASCII characters")


class Item:
    """One blob. Where ``source`` is a callable: made when first asked for, kept until reset."""

    __slots__ = ("content", "name", "on_write", "size_bytes", "source", "writable")

    def __init__(
        self,
        name: str,
        source: Data,
        size_bytes: int | None,
        writable: bool,
        on_write: Callable[[bytes], None] | None,
    ) -> None:
        self.name = name
        self.source = source
        self.size_bytes = size_bytes
        self.writable = writable
        self.on_write = on_write
        self.content: Content | None = None

    @property
    def volatile(self) -> bool:
        """True where the content is no constant, so that a saved machine must bring it along."""
        return self.writable or callable(self.source)

    def produce(self) -> Content:
        """The content. ValueError where a callable gives another size than was announced."""
        if self.content is None:
            data = self.source() if callable(self.source) else self.source
            if self.size_bytes is not None and len(data) != self.size_bytes:
                raise ValueError(f"fw_cfg {self.name}: {len(data)} bytes, announced {self.size_bytes}")
            self.content = bytearray(data) if self.writable else data
        return self.content

    def length(self) -> int:
        return len(self.produce()) if self.size_bytes is None else self.size_bytes


class FwCfgDma(Device):
    """The DMA address register, 8 bytes at 0x514, big endian. Writing its low half starts the transfer."""

    valid_sizes = (1, 8)
    impl_sizes = (1, 8)

    def __init__(self, fw_cfg: FwCfg) -> None:
        self.fw_cfg = fw_cfg
        self.high = 0

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(DMA_REGISTER_READS[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        value = int.from_bytes(value.to_bytes(size, "little"), "big")
        with self.fw_cfg.lock:
            if size == 4 and offset == 0:
                self.high = value << 32
            elif size == 4 and offset == 4:
                high, self.high = self.high, 0
                self.fw_cfg.transfer(high | value)
            elif size == 8:
                self.high = 0
                self.fw_cfg.transfer(value)


class FwCfg(Device):
    """Selector and data port: map it (2 bytes, 0x510) and ``dma`` (8 bytes, 0x514).

    Items are bytes, byte views of something larger (which ``close`` lets go of), or callables that make them when
    the guest first wants them: before that they cost nothing. Adding an item under a key or a name that is taken,
    or a name that does not fit, is a ConfigError. State is saved, loaded and reset here for both parts.
    """

    valid_sizes = (1, 2)
    impl_sizes = (1, 2)

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._items: dict[int, Item] = {}
        self._files: list[int] = []  # keys, as they were added
        self._position = 0
        self.dma = FwCfgDma(self)
        self.add(SIGNATURE, b"QEMU")
        self.add(ID, (ID_TRADITIONAL | ID_DMA).to_bytes(4, "little"))
        self._items[FILE_DIR] = Item("file directory", self._directory, None, False, None)
        self._select(SIGNATURE)

    # What the builder puts in

    def add(
        self,
        key: int,
        data: Data,
        *,
        size_bytes: int | None = None,
        writable: bool = False,
        on_write: Callable[[bytes], None] | None = None,
    ) -> None:
        """An item under a number.

        ``size_bytes`` announces what a callable will make. Where ``writable``, the guest may write it by DMA
        and ``on_write(content)`` gets the whole item each time; a reset brings the first content back.
        """
        key &= KEY_MASK
        if key in self._items:
            raise ConfigError(f"fw_cfg item {key:#06x} is there already: choose another key")
        self._items[key] = Item(f"item {key:#06x}", data, size_bytes, writable, on_write)

    def add_file(
        self,
        name: str,
        data: Data,
        *,
        size_bytes: int | None = None,
        writable: bool = False,
        on_write: Callable[[bytes], None] | None = None,
    ) -> int:
        """An item with a name in the directory, and the key it got. Otherwise as ``add``."""
        check_file_name(name)
        if any(self._items[key].name == name for key in self._files):
            raise ConfigError(f"fw_cfg file {name!r} is there already: give it once")
        key = FILE_FIRST + len(self._files)
        if key >= WRITE_CHANNEL:
            raise ConfigError(f"fw_cfg file {name!r}: no key is left for it")
        self.add(key, data, size_bytes=size_bytes, writable=writable, on_write=on_write)
        self._items[key].name = name
        self._files.append(key)
        # A directory read before this is out of date.
        self._items[FILE_DIR].content = None
        return key

    def describe_machine(self, cpus: int, max_cpus: int, ram_bytes: int, e820: bytes) -> None:
        """The items every machine has. ``e820``: the memory map, as x86.e820.pack_fw_cfg makes it."""
        self.add(NB_CPUS, cpus.to_bytes(2, "little"))
        self.add(MAX_CPUS, max_cpus.to_bytes(2, "little"))
        self.add(RAM_SIZE, ram_bytes.to_bytes(8, "little"))
        self.add_file("etc/e820", e820)

    def close(self) -> None:
        """Let go of all items, so that the files they are views of can be closed."""
        with self.lock:
            self._items.clear()
            self._files.clear()
            self._select(SIGNATURE)

    def content(self, key: int) -> bytes:
        """What the guest reads under ``key`` now. KeyError where there is no such item."""
        with self.lock:
            return bytes(self._items[key & KEY_MASK].produce())

    def _directory(self) -> bytes:
        entries = [len(self._files).to_bytes(4, "big")]
        for key in self._files:
            item = self._items[key]
            numbers = item.length().to_bytes(4, "big") + key.to_bytes(2, "big") + bytes(2)
            entries.append(numbers + item.name.encode().ljust(FILE_NAME_BYTES, b"\0"))
        return b"".join(entries)

    # The ports

    def read(self, offset: int, size: int) -> int:
        # Short, because `rep insb` comes here once a byte. Both ports give data, as QEMU's do.
        position = self._position
        if size == 1 and position < self._length:
            self._position = position + 1
            return self._data[position]
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        # Bytes written to the data port are dropped: since QEMU 2.4 items are written by DMA only.
        if size == 2:
            self._select(value)

    def _select(self, key: int) -> None:
        self._key = key & KEY_MASK
        item = self._items.get(self._key)
        self._data: Content = b"" if item is None else item.produce()
        self._length = len(self._data)
        self._position = 0

    # DMA

    def transfer(self, address: int) -> None:
        """Do what the FWCfgDmaAccess at guest-physical ``address`` says; its control field gets the outcome.

        The guest's numbers are checked, never trusted: what does not lie in RAM sets the error bit.
        """
        try:
            access = self._memory.read(address, DMA_ACCESS_BYTES)
        except BusError:
            self._answer(address, DMA_ERROR)
            return
        control = int.from_bytes(access[:4], "big")
        length = int.from_bytes(access[4:8], "big")
        target = int.from_bytes(access[8:], "big")
        if control & DMA_SELECT:
            self._select(control >> DMA_KEY_SHIFT)
        try:
            ok = self._move(control, target, length)
        except BusError:
            ok = False
        self._answer(address, 0 if ok else DMA_ERROR)

    def _answer(self, address: int, control: int) -> None:
        try:
            self._memory.write(address, control.to_bytes(4, "big"))
        except BusError:
            pass  # the guest gave no place to answer to

    def _move(self, control: int, target: int, length: int) -> bool:
        """Read, write or skip ``length`` bytes. False or BusError where it can't be done."""
        if not length or not control & (DMA_READ | DMA_WRITE | DMA_SKIP):
            return True
        start = self._position
        self._position = min(start + length, self._length)
        if control & DMA_READ:
            self._copy_out(target, length, start)
            return True
        if control & DMA_WRITE:
            return self._copy_in(target, length, start)
        return True

    def _copy_out(self, target: int, length: int, start: int) -> None:
        # One view of all of it before anything is written: a range that is not all RAM costs nothing, however long.
        view = self._memory.view(target, length)
        have = self._position - start
        view[:have] = memoryview(self._data)[start : start + have]
        for at in range(have, length, len(ZEROS)):
            piece = min(len(ZEROS), length - at)
            view[at : at + piece] = ZEROS[:piece] if piece < len(ZEROS) else ZEROS

    def _copy_in(self, target: int, length: int, start: int) -> bool:
        item = self._items.get(self._key)
        if item is None or not item.writable or start + length > self._length:
            return False
        data = self._data
        assert isinstance(data, bytearray)
        # Through a copy, so that the item keeps its size whatever happens.
        data[start : start + length] = self._memory.read(target, length)
        if item.on_write is not None:
            item.on_write(bytes(data))
        return True

    # State

    def reset(self) -> None:
        with self.lock:
            for item in self._items.values():
                if item.volatile:
                    item.content = None
            self.dma.high = 0
            self._select(SIGNATURE)

    def save(self) -> dict[str, Any]:
        """Items that never change are not in it: load into a device that was given the same ones."""
        with self.lock:
            contents = {
                str(key): bytes(item.content)
                for key, item in self._items.items()
                if item.volatile and item.content is not None
            }
            return {
                "key": self._key,
                "position": self._position,
                "dma_high": self.dma.high,
                "contents": contents,
            }

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import check_names, value_of

        check_names(state, ("key", "position", "dma_high", "contents"))
        key = value_of(range(KEY_MASK + 1), state["key"], "key")
        position = value_of(32, state["position"], "position")
        high = value_of(64, state["dma_high"], "dma_high")
        with self.lock:
            contents = self._checked_contents(state["contents"])
            self._key, self._position, self.dma.high = key & KEY_MASK, position, high
            for number, item in self._items.items():
                if item.volatile:
                    saved = contents.get(str(number))
                    item.content = bytearray(saved) if saved is not None and item.writable else saved

    def _checked_contents(self, saved: object) -> dict[str, bytes]:
        """StateError where that is not the content of items that this device has."""
        from pyvmm.state import shown, value_of

        if not isinstance(saved, dict):
            raise StateError(f"contents is {shown(saved)}, no dict")
        volatile = {str(key): item for key, item in self._items.items() if item.volatile}
        contents = {}
        for name, data in saved.items():
            if name not in volatile:
                raise StateError(f"contents has an item {shown(name)} that this machine does not have, or can't change")
            item = volatile[name]
            size = item.size_bytes
            if item.writable and size is None:
                size = len(item.source() if callable(item.source) else item.source)
            limits = (0, LONGEST_ITEM_BYTES) if size is None else (size,)
            contents[name] = value_of(("bytes", *limits), data, f"contents[{name}]")
        return contents

    def after_load(self) -> None:
        """The item that was being read is looked up again, or made again."""
        with self.lock:
            position = self._position
            self._select(self._key)
            self._position = min(position, self._length)
