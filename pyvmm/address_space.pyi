from collections.abc import Callable

from typing_extensions import Buffer, disjoint_base

from pyvmm.device import Device

@disjoint_base
class MemoryRegion:
    @property
    def device(self) -> Device | None: ...
    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def space(self) -> AddressSpace | None: ...
    def __init__(
        self,
        size: int,
        device: Device | None = None,
        *,
        name: str | None = None,
        read: Callable[[int, int], int] | None = None,
        write: Callable[[int, int, int], object] | None = None,
        valid_sizes: tuple[int, int] | None = None,
        impl_sizes: tuple[int, int] | None = None,
        unaligned: bool | None = None,
    ) -> None: ...
    @property
    def base(self) -> int | None: ...
    @property
    def count(self) -> int: ...

class LatchRegion(MemoryRegion):
    def __init__(self, size: int, value: int = 0, *, writable: bool = True, name: str = "latch") -> None: ...
    @property
    def value(self) -> int: ...

class SinkRegion(MemoryRegion):
    def __init__(
        self,
        size: int,
        callback: Callable[[bytes], object],
        *,
        read_value: int = 0xFFFFFFFF,
        capacity: int = 4096,
        name: str = "sink",
    ) -> None: ...
    def flush(self) -> None: ...

class BufferRegion(MemoryRegion):
    def __init__(self, buffer: Buffer, *, name: str = "buffer") -> None: ...

class EventRegion(MemoryRegion):
    def __init__(self, size: int, fd: int, *, name: str = "event") -> None: ...

@disjoint_base
class FifoRegion(MemoryRegion):
    def __init__(
        self, size: int, device: Device, on_end: Callable[[], object], *, name: str = "fifo"
    ) -> None: ...
    def open_read(self, buffer: Buffer) -> None: ...
    def open_write(self, buffer: Buffer) -> None: ...
    def close(self) -> None: ...
    @property
    def position(self) -> int: ...

@disjoint_base
class FlatView:
    @property
    def regions(self) -> list[MemoryRegion]: ...

@disjoint_base
class ViewUser: ...

@disjoint_base
class AddressSpace:
    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def view(self) -> FlatView: ...
    def __init__(self, name: str, size: int) -> None: ...
    def add(self, base: int, region: MemoryRegion) -> MemoryRegion: ...
    def map(
        self,
        base: int,
        size: int,
        device: Device,
        *,
        name: str | None = None,
        read: Callable[[int, int], int] | None = None,
        write: Callable[[int, int, int], object] | None = None,
        valid_sizes: tuple[int, int] | None = None,
        impl_sizes: tuple[int, int] | None = None,
        unaligned: bool | None = None,
    ) -> MemoryRegion: ...
    def unmap(self, region: MemoryRegion) -> None: ...
    @property
    def regions(self) -> list[MemoryRegion]: ...
    def find(self, addr: int) -> MemoryRegion | None: ...
    def read(self, addr: int, size: int) -> int: ...
    def write(self, addr: int, size: int, value: int) -> None: ...
