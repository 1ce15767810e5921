"""The kernel's own binary statistics of a VM or a vCPU, as KVM_GET_STATS_FD gives them.

Linux Documentation/virt/kvm/api.rst, "4.133 KVM_GET_STATS_FD": a header, an id string, descriptors, data.
"""

from __future__ import annotations

import _struct
import posix

_HEADER = _struct.Struct("=6I")  # flags, name_size, num_desc, id_offset, desc_offset, data_offset
_DESCRIPTOR = _struct.Struct("=IhHII")  # flags, exponent, size, offset, bucket_size; the name follows
# By the lowest four bits of the flags, by the next four, and by those above.
KINDS = ("cumulative", "instant", "peak", "linear-histogram", "log2-histogram")
UNITS = ("", "bytes", "seconds", "cycles", "boolean")
BASES = (10, 2)


class Field:
    """One of them: what kind of number it is, and that it is ``unit`` times ``base`` to the power of ``exponent``."""

    __slots__ = ("base", "bucket_size", "count", "exponent", "kind", "name", "offset", "unit")

    def __init__(self, name: str, flags: int, exponent: int, count: int, offset: int, bucket_size: int) -> None:
        self.name = name
        self.kind = flags & 0xF
        self.unit = flags >> 4 & 0xF
        self.base = BASES[flags >> 8 & 1]
        self.exponent = exponent
        self.count = count  # of 64-bit values
        self.offset = offset
        self.bucket_size = bucket_size


class KvmStats:
    """An open statistics descriptor. The layout never changes during its life, so it is read once."""

    __slots__ = ("_data_bytes", "_data_offset", "fd", "fields", "id")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        _flags, name_size, count, id_offset, desc_offset, self._data_offset = _HEADER.unpack(
            posix.pread(fd, _HEADER.size, 0)
        )
        self.id = posix.pread(fd, name_size, id_offset).split(b"\0")[0].decode()
        stride = _DESCRIPTOR.size + name_size
        table = posix.pread(fd, stride * count, desc_offset)
        self.fields: list[Field] = []
        for at in range(0, stride * count, stride):
            flags, exponent, size, offset, bucket = _DESCRIPTOR.unpack_from(table, at)
            name = table[at + _DESCRIPTOR.size : at + stride].split(b"\0")[0].decode()
            self.fields.append(Field(name, flags, exponent, size, offset, bucket))
        self._data_bytes = max((field.offset + 8 * field.count for field in self.fields), default=0)

    def read(self) -> dict[str, int | list[int]]:
        """{name: value}, a histogram as a list of its buckets."""
        data = posix.pread(self.fd, self._data_bytes, self._data_offset)
        values: dict[str, int | list[int]] = {}
        for field in self.fields:
            numbers = list(_struct.unpack_from(f"={field.count}Q", data, field.offset))
            values[field.name] = numbers[0] if field.count == 1 else numbers
        return values

    def close(self) -> None:
        if self.fd >= 0:
            posix.close(self.fd)
            self.fd = -1

    def __enter__(self) -> KvmStats:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()
