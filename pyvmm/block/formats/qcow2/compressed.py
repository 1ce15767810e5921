"""Compressed clusters: each a raw deflate stream or a zstd frame of a cluster's data (qcow2.txt, "compression_type").

What comes out is never more than a cluster, whatever the stream says.
"""

from __future__ import annotations

from errno import EIO

from pyvmm.block.formats.qcow2.transfer import Failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MOST_WINDOW_BYTES = 4 << 20
DEFLATE_BITS = -15  # no header; writers use a window of 12 bits, which is a part of this
WRITTEN_DEFLATE_BITS = -12


def inflated(data: bytearray, cluster_bytes: int) -> bytes:
    """Failed where it is no whole cluster."""
    import zlib

    try:
        found = zlib.decompressobj(DEFLATE_BITS).decompress(data, cluster_bytes)
    except zlib.error:
        raise Failed(EIO) from None
    return whole(found, cluster_bytes)


def unpacked_zstd(data: bytearray, cluster_bytes: int) -> bytes:
    """Failed where it is no whole cluster."""
    import zstandard

    try:
        reader = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW_BYTES).stream_reader(data)
        found = b""
        while len(found) < cluster_bytes:
            part = reader.read(cluster_bytes - len(found))
            if not part:
                break
            found += part
    except (zstandard.ZstdError, MemoryError):
        raise Failed(EIO) from None
    return whole(found, cluster_bytes)


def whole(found: bytes, cluster_bytes: int) -> bytes:
    if len(found) != cluster_bytes:
        raise Failed(EIO)
    return found


def unpacker(zstd: bool) -> Callable[[bytearray, int], bytes]:
    return unpacked_zstd if zstd else inflated


def packed(data: bytes, zstd: bool) -> bytes:
    """A cluster, compressed; it may be longer than before."""
    if zstd:
        import zstandard

        return zstandard.ZstdCompressor().compress(data)
    import zlib

    packer = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, WRITTEN_DEFLATE_BITS)
    return packer.compress(data) + packer.flush()
