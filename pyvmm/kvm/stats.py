"""The kernel's own binary statistics of a VM or a vCPU, as KVM_GET_STATS_FD gives them.

Linux Documentation/virt/kvm/api.rst, "4.133 KVM_GET_STATS_FD": a header, an id string, descriptors, data.
"""

from __future__ import annotations

import _struct
import posix

_HEADER = _struct.Struct("=6I")  # flags, name_size, num_desc, id_offset, desc_offset, data_offset
_DESCRIPTOR = _struct.Struct("=IhHII")  # flags, exponent, size, offset, bucket_size; the name follows


class KvmStats:
    """An open statistics descriptor. The layout never changes during its life, so it is read once."""

    __slots__ = ("_data_bytes", "_data_offset", "_fields", "fd", "id")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        _flags, name_size, count, id_offset, desc_offset, self._data_offset = _HEADER.unpack(
            posix.pread(fd, _HEADER.size, 0)
        )
        self.id = posix.pread(fd, name_size, id_offset).split(b"\0")[0].decode()
        stride = _DESCRIPTOR.size + name_size
        table = posix.pread(fd, stride * count, desc_offset)
        self._fields: list[tuple[str, int, int]] = []  # name, offset, number of 64-bit values
        for at in range(0, stride * count, stride):
            _kind, _exponent, size, offset, _bucket = _DESCRIPTOR.unpack_from(table, at)
            name = table[at + _DESCRIPTOR.size : at + stride].split(b"\0")[0].decode()
            self._fields.append((name, offset, size))
        self._data_bytes = max((o + 8 * n for _, o, n in self._fields), default=0)

    def read(self) -> dict[str, int | list[int]]:
        """{name: value}, a histogram as a list of its buckets."""
        data = posix.pread(self.fd, self._data_bytes, self._data_offset)
        values: dict[str, int | list[int]] = {}
        for name, offset, count in self._fields:
            numbers = list(_struct.unpack_from(f"={count}Q", data, offset))
            values[name] = numbers[0] if count == 1 else numbers
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
