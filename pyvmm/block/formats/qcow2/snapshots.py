"""The table of internal snapshots (qcow2.txt, "Snapshots"): read and checked."""

from __future__ import annotations

from struct import Struct, error

from pyvmm.block.formats.qcow2.entries import ENTRY_BYTES, MOST_L1_BYTES, MOST_SNAPSHOT_TABLE_BYTES
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.block.formats.qcow2.header import Header

ENTRY = Struct(">QIHHIIQII")
MOST_EXTRA_BYTES = 1024


class InternalSnapshot:
    """``size``: of the disk then, in bytes; ``vm_state_bytes``: of a saved machine beside it."""

    __slots__ = ("date_s", "end", "id", "l1_entries", "l1_offset", "name", "size", "vm_clock_ns", "vm_state_bytes")

    def __init__(self, fields: tuple[int, ...], extra: bytes, name: str, ident: str, size: int) -> None:
        self.l1_offset, self.l1_entries, _, _, self.date_s, _, self.vm_clock_ns, self.vm_state_bytes, _ = fields
        self.end = 0  # of its entry, in the file
        self.id = ident
        self.name = name
        if len(extra) >= 8:
            self.vm_state_bytes = int.from_bytes(extra[:8], "big")
        self.size = int.from_bytes(extra[8:16], "big") if len(extra) >= 16 else size


def read_snapshots(
    path: str, header: Header, file_bytes: int, read: Callable[[int, int], bytes]
) -> list[InternalSnapshot]:
    """``read(offset, length)`` of the file. ConfigError where the table is not one."""
    wrong = ConfigError(f"the image {path} has a table of internal snapshots that is none: look at it with qemu-img")
    found = []
    at = header.snapshots_offset
    end = min(file_bytes, at + MOST_SNAPSHOT_TABLE_BYTES)
    for _ in range(header.snapshots):
        begin = at
        try:
            fields = ENTRY.unpack(read(at, ENTRY.size))
        except error:
            raise wrong from None
        id_bytes, name_bytes, extra_bytes = fields[2], fields[3], fields[8]
        if extra_bytes > MOST_EXTRA_BYTES:
            raise wrong
        rest = read(at + ENTRY.size, extra_bytes + id_bytes + name_bytes)
        at += ENTRY.size + len(rest)
        if len(rest) != extra_bytes + id_bytes + name_bytes or at > end:
            raise wrong
        extra = rest[:extra_bytes]
        ident = rest[extra_bytes : extra_bytes + id_bytes].decode(errors="replace")
        name = rest[extra_bytes + id_bytes :].decode(errors="replace")
        one = InternalSnapshot(fields, extra, name, ident, header.size)
        l1_bytes = one.l1_entries * ENTRY_BYTES
        if one.l1_offset % header.cluster_bytes or l1_bytes > MOST_L1_BYTES or one.l1_offset + l1_bytes > file_bytes:
            raise wrong
        if one.size >> 63 or -(-one.size // header.table_bytes) > one.l1_entries:
            raise wrong
        at += -(at - begin) % 8
        one.end = at
        found.append(one)
    return found


def chosen(path: str, snapshots: list[InternalSnapshot], wanted: str) -> InternalSnapshot:
    """By its ID, else by its name. ConfigError without one."""
    for attribute in ("id", "name"):
        for one in snapshots:
            if getattr(one, attribute) == wanted:
                return one
    have = ", ".join(f"{one.id!a} ({one.name!a})" for one in snapshots) or "none"
    raise ConfigError(f"the image {path} has no internal snapshot {wanted!r}: it has {have}")
