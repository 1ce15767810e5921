from typing_extensions import Buffer

PAGE_BYTES: int
GPA_END: int
RAM_HOLE_BASE: int
RAM_HIGH_BASE: int

class RamRegion:
    gpa: int
    readonly: bool
    fd: int
    name: str
    def __init__(
        self,
        gpa: int,
        length: int,
        *,
        shared: bool = False,
        huge_pages: str | None = None,
        readonly: bool = False,
        name: str = "ram",
    ) -> None: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def host_address(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class GuestMemory:
    ram: list[RamRegion]
    size_bytes: int
    def __init__(self, size_bytes: int, *, shared: bool = False, huge_pages: str | None = None) -> None: ...
    def add(self, region: RamRegion) -> None: ...
    @property
    def regions(self) -> list[tuple[int, int]]: ...
    def view(self, gpa: int, size: int, write: bool = True) -> memoryview: ...
    def read(self, gpa: int, size: int) -> bytes: ...
    def write(self, gpa: int, data: Buffer) -> None: ...
    def drop_mapping(self, gpa: int) -> None: ...
    def close(self) -> None: ...
