"""What check.py and resize.py know of an open image: driver.py, which calls them, is above them."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Protocol

    from pyvmm.block.driver import FormatDriver, ProtocolDriver
    from pyvmm.block.formats.qcow2.header import Header
    from pyvmm.block.formats.qcow2.refcounts import Refcounts
    from pyvmm.block.formats.qcow2.tables import Tables

    class OpenDisk(Protocol):
        path: str
        file: ProtocolDriver
        header: Header
        tables: Tables
        refcounts: Refcounts
        cluster: int
        size_bytes: int
        backing: FormatDriver | None

        async def co_write_back(self) -> None: ...
        async def co_barrier(self) -> None: ...
        async def co_with_tables(self, work: Callable[[], Awaitable[None]]) -> None: ...
        async def co_store_field(self, at: int, number: int) -> int: ...
        async def co_write_zeroes(self, offset: int, length: int, may_unmap: bool, fua: bool) -> int: ...

    class SizedDisk(OpenDisk, Protocol):
        """One whose size may change: it has the requests too."""

        async def co_drop_table(self, index: int) -> None: ...
