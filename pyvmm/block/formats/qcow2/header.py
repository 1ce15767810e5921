"""The header of a qcow2 image (qcow2.txt, "Header", "Header extensions"): read once, checked, and written anew.

A field that can't be is a ConfigError of one sentence. What is not understood and may be ignored is kept as it is.
"""

from __future__ import annotations

from struct import Struct, error, unpack_from

from pyvmm.block.formats.qcow2.entries import (
    ENTRY_BYTES,
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    MOST_L1_BYTES,
    MOST_NAME_BYTES,
    MOST_REFCOUNT_TABLE_BYTES,
    MOST_SNAPSHOTS,
)
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAGIC = b"QFI\xfb"
V2 = Struct(">4sIQIIQIIQQIIQ")
V3 = Struct(">QQQII")
V2_BYTES, V3_BYTES = 72, 104
COMPRESSION_AT = 104

DIRTY, CORRUPT, EXTERNAL, COMPRESSION, EXTENDED_L2 = 1, 2, 4, 8, 16  # incompatible features
KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | EXTERNAL | COMPRESSION | EXTENDED_L2
LAZY_REFCOUNTS = 1  # compatible
BITMAPS, RAW_EXTERNAL = 1, 2  # autoclear

# Header extensions
BACKING_FORMAT, FEATURE_NAMES, BITMAPS_EXTENSION = 0xE2792ACA, 0x6803F857, 0x23852875
DATA_FILE = 0x44415441
MOST_HEADER_BYTES = 1 << MAX_CLUSTER_BITS

FEATURES = (
    (0, 0, b"dirty bit"), (0, 1, b"corrupt bit"), (0, 2, b"external data file"), (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"), (1, 0, b"lazy refcounts"), (2, 0, b"bitmaps"), (2, 1, b"raw external data"),
)  # fmt: skip


class Header:
    """All offsets and sizes in bytes but where the name says clusters or entries."""

    version = 3
    cluster_bits = 16
    size = 0
    l1_entries = 0
    l1_offset = 0
    refcount_table_offset = 0
    refcount_table_clusters = 0
    snapshots = 0
    snapshots_offset = 0
    incompatible = 0
    compatible = 0
    autoclear = 0
    refcount_order = 4
    header_bytes = V3_BYTES
    zstd = False
    backing: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    bitmaps = 0
    rest = b""  # fields behind those of version 3, as they are

    def __init__(self) -> None:
        self.others: list[tuple[int, bytes]] = []  # extensions that are kept as they are

    @property
    def cluster_bytes(self) -> int:
        return 1 << self.cluster_bits

    @property
    def table_bytes(self) -> int:
        """How many bytes of the disk one L2 table maps."""
        return 1 << 2 * self.cluster_bits - 3

    @property
    def needed_l1_entries(self) -> int:
        return -(-self.size // self.table_bytes)

    @property
    def external(self) -> bool:
        return bool(self.incompatible & EXTERNAL)

    def about(self) -> dict[str, Any]:
        """In the words of qemu-img info --output=json."""
        found: dict[str, Any] = {
            "virtual-size": self.size,
            "cluster-size": self.cluster_bytes,
            "dirty-flag": bool(self.incompatible & DIRTY),
        }
        if self.backing is not None:
            found["backing-filename"] = self.backing
            if self.backing_format is not None:
                found["backing-filename-format"] = self.backing_format
        special: dict[str, Any] = {
            "compat": "0.10" if self.version == 2 else "1.1",
            "compression-type": "zstd" if self.zstd else "zlib",
            "refcount-bits": 1 << self.refcount_order,
        }
        if self.version >= 3:
            special["lazy-refcounts"] = bool(self.compatible & LAZY_REFCOUNTS)
            special["corrupt"] = bool(self.incompatible & CORRUPT)
        if self.external:
            special |= {"data-file": self.data_file, "data-file-raw": bool(self.autoclear & RAW_EXTERNAL)}
        return {**found, "format-specific": {"type": "qcow2", "data": special}}

    def pack(self) -> bytes:
        """The whole first cluster. ConfigError where it does not fit."""
        extensions = b""
        if self.backing_format is not None:
            extensions += extension(BACKING_FORMAT, self.backing_format.encode())
        if self.data_file is not None:
            extensions += extension(DATA_FILE, self.data_file.encode(errors="surrogateescape"))
        for kind, data in self.others:
            extensions += extension(kind, data)
        if self.version >= 3 or extensions:
            extensions += bytes(8)
        name = (self.backing or "").encode(errors="surrogateescape")
        header_bytes = V2_BYTES if self.version == 2 else self.header_bytes
        name_at = header_bytes + len(extensions)
        if name_at + len(name) > self.cluster_bytes or len(name) > MOST_NAME_BYTES:
            raise ConfigError("the names in the header of a qcow2 image are too long for it: give shorter ones")
        packed = V2.pack(
            *(MAGIC, self.version, name_at if name else 0, len(name), self.cluster_bits, self.size, 0),
            *(self.l1_entries, self.l1_offset, self.refcount_table_offset, self.refcount_table_clusters),
            *(self.snapshots, self.snapshots_offset),
        )
        if self.version >= 3:
            packed += V3.pack(
                self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.header_bytes
            )
            packed += self.rest
        return (packed + extensions + name).ljust(self.cluster_bytes, b"\0")


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data + bytes(-len(data) % 8)


def feature_names() -> tuple[int, bytes]:
    """The extension that tells other programs what bits mean."""
    return FEATURE_NAMES, b"".join(bytes([kind, bit]) + name.ljust(46, b"\0") for kind, bit, name in FEATURES)


def read_header(path: str, head: bytes, file_bytes: int) -> Header:
    """From the file's first bytes, as many as a cluster may have, or all there are. ``file_bytes``: how long it is."""
    wrong = Wrong(path)
    header = Header()
    try:
        fields = V2.unpack_from(head)
    except error:
        raise wrong.why("its header is cut short") from None
    (magic, header.version, name_at, name_bytes, header.cluster_bits, header.size, encryption, header.l1_entries,
     header.l1_offset, header.refcount_table_offset, header.refcount_table_clusters, header.snapshots,
     header.snapshots_offset) = fields  # fmt: skip
    if magic != MAGIC:
        raise wrong.why("it does not begin as one")
    if header.version not in (2, 3):
        raise ConfigError(f"the image {path} is qcow2 of version {header.version}: convert it to version 2 or 3")
    if not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
        raise wrong.why(f"clusters of 2^{header.cluster_bits} bytes are not between 512 bytes and 2 MiB")
    if encryption:
        raise ConfigError(f"the image {path} is encrypted, which pyvmm does not read: convert it, qemu-img convert")
    read_version_3(header, head, wrong)
    check_places(header, file_bytes, wrong)
    read_extensions(header, head, name_at, wrong)
    if name_at:
        header.backing = read_name(head, name_at, name_bytes, header, wrong)
    check_features(header, path, head, wrong)
    return header


class Wrong:
    """The sentence for an image that breaks its format's rules."""

    def __init__(self, path: str) -> None:
        self.path = path

    def why(self, what: str) -> ConfigError:
        return ConfigError(f"the image {self.path} is no good qcow2: {what}; look at it with `pyvmm image check`")


def read_version_3(header: Header, head: bytes, wrong: Wrong) -> None:
    if header.version == 2:
        header.header_bytes = V2_BYTES
        return
    try:
        (header.incompatible, header.compatible, header.autoclear, header.refcount_order, header.header_bytes
         ) = V3.unpack_from(head, V2_BYTES)  # fmt: skip
    except error:
        raise wrong.why("its header is cut short") from None
    length = header.header_bytes
    if length < V3_BYTES or length % 8 or length > min(header.cluster_bytes, len(head)):
        raise wrong.why(f"a header of {length} bytes is none")
    if header.refcount_order > 6:
        raise wrong.why(f"refcounts of 2^{header.refcount_order} bits are more than 64")
    header.rest = head[V3_BYTES:length]
    kind = header.rest[0] if header.rest else 0
    if kind > 1 or bool(kind) != bool(header.incompatible & COMPRESSION):
        raise wrong.why(f"its compression type {kind} is not what its features say")
    header.zstd = kind == 1


def check_places(header: Header, file_bytes: int, wrong: Wrong) -> None:
    """Tables that the header names are whole, aligned and inside the file."""
    cluster = header.cluster_bytes
    if header.size >> 63:
        raise wrong.why(f"a disk of {header.size} bytes is larger than any can be")
    if header.l1_entries * ENTRY_BYTES > MOST_L1_BYTES or header.needed_l1_entries > header.l1_entries:
        raise wrong.why(f"an L1 table of {header.l1_entries} entries is none for a disk of {header.size} bytes")
    if not 0 < header.refcount_table_clusters * cluster <= MOST_REFCOUNT_TABLE_BYTES:
        raise wrong.why(f"a refcount table of {header.refcount_table_clusters} clusters is none")
    if header.snapshots > MOST_SNAPSHOTS:
        raise wrong.why(f"{header.snapshots} internal snapshots are too many")
    for what, offset, length in (
        ("L1 table", header.l1_offset, header.l1_entries * ENTRY_BYTES),
        ("refcount table", header.refcount_table_offset, header.refcount_table_clusters * cluster),
        ("snapshot table", header.snapshots_offset, header.snapshots),
    ):
        if length and (offset % cluster or not offset or offset + length > file_bytes):
            raise wrong.why(f"its {what} is not where it can be, at {offset} of {file_bytes} bytes")


def read_extensions(header: Header, head: bytes, name_at: int, wrong: Wrong) -> None:
    at = header.header_bytes
    end = min(header.cluster_bytes, len(head))
    if name_at:
        end = min(end, name_at)
    while at + 8 <= end:
        kind, length = unpack_from(">II", head, at)
        at += 8
        if kind == 0:
            break
        if length > end - at:
            raise wrong.why(f"its header extension {kind:#x} is longer than the header")
        take_extension(header, kind, head[at : at + length], wrong)
        at += length + -length % 8


def take_extension(header: Header, kind: int, data: bytes, wrong: Wrong) -> None:
    if kind == BACKING_FORMAT:
        header.backing_format = checked_name(data, wrong) if data else None
    elif kind == DATA_FILE and data:
        header.data_file = checked_name(data, wrong)
    else:
        if kind == BITMAPS_EXTENSION:
            header.bitmaps = int.from_bytes(data[:4], "big")
        header.others.append((kind, data))


def read_name(head: bytes, at: int, length: int, header: Header, wrong: Wrong) -> str:
    if length > MOST_NAME_BYTES or at < header.header_bytes or at + length > min(header.cluster_bytes, len(head)):
        raise wrong.why("the name of its backing file is not inside of the header")
    return checked_name(head[at : at + length], wrong)


def checked_name(data: bytes, wrong: Wrong) -> str:
    name = data.decode(errors="surrogateescape")
    # It will stand in messages: a stranger's bytes are no commands of a terminal's.
    if not name or not name.isprintable():
        raise wrong.why("the name of a file in its header is none that can be shown")
    return name


def check_features(header: Header, path: str, head: bytes, wrong: Wrong) -> None:
    if header.incompatible & EXTENDED_L2:
        raise ConfigError(
            f"the image {path} has extended L2 entries, which pyvmm does not read: convert it, qemu-img convert -O"
            " qcow2 -o extended_l2=off"
        )
    unknown = header.incompatible & ~KNOWN_INCOMPATIBLE
    if unknown:
        names = " and ".join(named_features(header, unknown))
        raise ConfigError(f"the image {path} wants {names}, which pyvmm does not know: convert it, qemu-img convert")
    if header.external and (header.data_file is None or header.snapshots):
        raise wrong.why("it has an external data file, and no name of one, or internal snapshots beside it")
    if header.autoclear & RAW_EXTERNAL and (not header.external or header.backing):
        raise wrong.why("it has raw external data, and no data file, or a backing file beside it")


def named_features(header: Header, bits: int) -> list[str]:
    """Incompatible features by the image's own table of names, or by number."""
    names = {}
    for kind, data in header.others:
        if kind == FEATURE_NAMES:
            for at in range(0, len(data) - 47, 48):
                if data[at] == 0:
                    text = data[at + 2 : at + 48].rstrip(b"\0").decode("ascii", "replace")
                    names[data[at + 1]] = "".join(letter for letter in text if letter.isprintable())
    return [names.get(bit) or f"the feature {bit}" for bit in range(64) if bits >> bit & 1]
