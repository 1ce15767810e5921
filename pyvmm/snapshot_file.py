"""The file of a snapshot: a header, memory at page offsets, and a manifest behind it.

    0          header: MAGIC, where the manifest is, checksums
    1 page on  the memory's pieces, each at a whole page, so that it is mapped and not read; pages of zeros are holes
    at the end the manifest: plain data as MessagePack (msgpack.pyx)

A file is written beside the one that it takes the place of, synced, and renamed: whenever the writer is killed, there
is the old one whole or the new one whole. What a killed writer has left there the next one removes.

Whatever is read here may have been written by a stranger: lengths and offsets are compared with the file's size before
anything is made of them, and every fault is a StateError of one sentence.
"""

from __future__ import annotations

import posix
from errno import EINVAL, EOPNOTSUPP, EWOULDBLOCK
from stat import S_ISDIR, S_ISREG
from zlib import crc32

from pyvmm.errors import ConfigError, HostError, StateError, remedy
from pyvmm.msgpack import pack, unpack
from pyvmm.state import Known, known

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, Self

    from typing_extensions import Buffer

PAGE_BYTES = 4096
MAGIC = b"pyvmm snapshot\r\n"  # a transfer that changes line ends shows at once
FORMAT = 2
# Header, little endian: magic, format, the manifest's offset, its length, its CRC-32, the CRC-32 of all before.
FIELDS = (4, 8, 8, 4)
HEADER_BYTES = len(MAGIC) + sum(FIELDS) + 4
MANIFEST_MOST_BYTES = 64 << 20  # of a machine with 255 vCPUs it is some 4 MiB
LARGEST_WRITE_BYTES = 16 << 20
ZEROS = bytes(1 << 16)
NEW_FILE = posix.O_RDWR | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC | posix.O_NOFOLLOW


# -- writing -----------------------------------------------------------------------------------------------------------


class Writer:
    """``write`` pieces of memory into an open file, then ``commit`` a manifest. HostError where there is no room."""

    lasting = False
    """Whether it may be read by somebody else, later: then with checksums."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.end = PAGE_BYTES
        """Where the next piece may go."""
        self.written_bytes = 0
        self._fd = -1

    @property
    def fd(self) -> int:
        """Of the file, to read what stands there already."""
        return self._fd

    def reserve(self, size: int) -> int:
        """Room for ``size`` bytes of memory, a hole for now: its offset, a whole page."""
        offset = self.end
        self.end += (size + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
        return offset

    def write(self, offset: int, data: Buffer) -> None:
        """``data`` at ``offset``."""
        view = memoryview(data).cast("B")
        done = 0
        while done < view.nbytes:
            with view[done : done + LARGEST_WRITE_BYTES] as piece:
                done += self._told(posix.pwrite, self._fd, piece, offset + done)
        self.written_bytes += view.nbytes

    def clear(self, offset: int, size: int) -> int:
        """Zeros, in whole pages: how many bytes of them were no hole."""
        cleared = 0
        for start, length in file_data(self._fd, offset, size):
            for at in range(start, start + length, len(ZEROS)):
                self.write(at, ZEROS[: start + length - at])
            cleared += length
        return cleared

    def commit(self, manifest: dict[str, Any]) -> None:
        """Write the manifest and the header: it is whole."""
        data = pack(manifest)
        offset = self.reserve(len(data))
        self.write(offset, data)
        self._told(posix.ftruncate, self._fd, self.end)
        fields = (FORMAT, offset, len(data), crc32(data))
        head = MAGIC + b"".join(n.to_bytes(size, "little") for n, size in zip(fields, FIELDS, strict=True))
        self.write(0, head + crc32(head).to_bytes(4, "little"))

    def _told(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            raise HostError(f"{self.path}: {remedy(error, 'write it elsewhere')}") from None

    def close(self) -> None:
        """Nothing more is written."""
        if self._fd >= 0:
            posix.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class MemoryWriter(Writer):
    """In memory that no file system shows: for machines of this process. ``committed`` is the file to read it from."""

    def __init__(self) -> None:
        super().__init__("a snapshot in memory")
        self._fd = self._told(posix.memfd_create, "pyvmm-snapshot", posix.MFD_CLOEXEC)

    def committed(self) -> SnapshotFile:
        """The file, for whoever reads it from here on."""
        fd, self._fd = self._fd, -1
        return SnapshotFile(self.path, fd)


class SnapshotWriter(Writer):
    """``with SnapshotWriter(path) as file``: in a file that takes the place of the one at ``path`` when it is whole.

    Where the block ends without a commit, nothing is there but what was there before. ConfigError for a path that no
    file can have.
    """

    lasting = True

    def __init__(self, path: str) -> None:
        super().__init__(path)
        import os

        self._directory, name = os.path.split(path)
        if not name or os.path.isdir(path):
            raise ConfigError(f"snapshot {path!r} is a folder: give the path of a file")
        self._prefix = f".{name}."
        self._remove_left_ones()
        self._temporary = ""
        while self._fd < 0:
            self._open()

    def _open(self) -> None:
        """A file of our own, locked for as long as we write: that tells it from one that a killed writer has left."""
        import fcntl
        import os

        self._temporary = os.path.join(self._directory, f"{self._prefix}{posix.urandom(8).hex()}.tmp")
        try:
            fd = posix.open(self._temporary, NEW_FILE, 0o600)
        except OSError as error:
            why = remedy(error, "give a path in a folder that can be written")
            raise ConfigError(f"snapshot {self.path}: {why}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            posix.close(fd)  # another writer has found it before it was locked, and removes it: once more
            return
        except OSError:
            pass  # a file system without locks: there nobody removes what was left, either
        if posix.fstat(fd).st_nlink:
            self._fd = fd
        else:
            posix.close(fd)

    def _remove_left_ones(self) -> None:
        import fcntl
        import os

        try:
            names = posix.listdir(self._directory or ".")
        except OSError:
            return  # _open says why
        for name in names:
            if not name.startswith(self._prefix) or not name.endswith(".tmp"):
                continue
            left = os.path.join(self._directory, name)
            try:
                fd = posix.open(left, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NOFOLLOW | posix.O_NONBLOCK)
            except OSError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                posix.unlink(left)
            except OSError:
                pass  # somebody writes it now, or it is not ours to remove
            finally:
                posix.close(fd)

    def commit(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, and put the file in its place."""
        super().commit(manifest)
        self._told(posix.fsync, self._fd)
        self._told(posix.replace, self._temporary, self.path)
        self._temporary = ""
        sync_directory(self._directory or ".")

    def close(self) -> None:
        """Give up, where ``commit`` has not been called; nothing is left of it."""
        if self._temporary:
            try:
                posix.unlink(self._temporary)
            except OSError:
                pass
            self._temporary = ""
        super().close()


def sync_directory(path: str) -> None:
    """The rename itself reaches the disk. Some file systems can't, and need not."""
    fd = -1
    try:
        fd = posix.open(path, posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC)
        posix.fsync(fd)
    except OSError as error:
        if error.errno not in (EINVAL, EOPNOTSUPP):
            raise HostError(f"folder {path}: {remedy(error, 'write the snapshot elsewhere')}") from None
    finally:
        if fd >= 0:
            posix.close(fd)


# -- reading -----------------------------------------------------------------------------------------------------------


class SnapshotFile:
    """An open snapshot: ``manifest``, and ``fd`` for mapping its memory; ``kept`` is for what is made of the manifest,
    and others who read the same bytes have it too. StateError where it is none, or not whole.

    ``fd``, where it is open already, belongs to it from here on.
    """

    def __init__(self, path: str, fd: int | None = None) -> None:
        self.path = path
        self.fd = open_file(path) if fd is None else fd
        try:
            self.size_bytes = posix.fstat(self.fd).st_size
            self.manifest, self.kept = self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        head = self._pread(HEADER_BYTES, 0)
        if not head.startswith(MAGIC):
            raise StateError(f"{self.path} is no snapshot of pyvmm")
        if len(head) < HEADER_BYTES or crc32(head[:-4]) != int.from_bytes(head[-4:], "little"):
            raise self._damaged("its header has been changed, or cut off")
        values = []
        at = len(MAGIC)
        for size in FIELDS:
            values.append(int.from_bytes(head[at : at + size], "little"))
            at += size
        form, offset, length, checksum = values
        if form != FORMAT:
            raise StateError(
                f"snapshot {self.path} has format {form}, this pyvmm reads {FORMAT}: use the one that wrote it"
            )
        if length > MANIFEST_MOST_BYTES or offset + length > self.size_bytes:
            raise self._damaged("it was cut off")
        data = self._pread(length, offset)
        if crc32(data) != checksum:
            raise self._damaged("its manifest has been changed")
        try:
            return manifest_of(data)
        except StateError as error:
            raise self._damaged(str(error)) from None

    def check_range(self, offset: object, size: int) -> int:
        """``offset``, where ``size`` bytes of memory are there in whole pages: to be mapped. StateError where not."""
        whole = isinstance(offset, int) and not isinstance(offset, bool) and offset >= PAGE_BYTES
        if not whole or not isinstance(offset, int) or offset % PAGE_BYTES or offset + size > self.size_bytes:
            raise self._damaged("memory that it names is not in it")
        return offset

    def _pread(self, size: int, offset: int) -> bytes:
        try:
            return posix.pread(self.fd, size, offset)
        except OSError as error:
            raise HostError(f"snapshot {self.path}: {remedy(error, 'read it from elsewhere')}") from None

    def _damaged(self, why: str) -> StateError:
        return StateError(f"snapshot {self.path} is damaged: {why}")

    def data(self, offset: int, size: int) -> Iterable[tuple[int, int]]:
        """(offset, size) of what is no hole between these two, cut to whole pages; all of it where the file system
        does not tell. StateError where the file has become shorter: what is missing is no hole.
        """
        found = file_data(self.fd, offset, size)
        if posix.fstat(self.fd).st_size < self.size_bytes:
            raise self._damaged("it was cut off")
        return found

    def close(self) -> None:
        if self.fd >= 0:
            posix.close(self.fd)
            self.fd = -1

    def abandon(self) -> None:
        """In a child of fork: the same."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# What the last few manifests say, by their bytes: a process that goes on from one file again and again reads it once.
MOST_READ, MOST_READ_BYTES = 4, 1 << 20
_read: dict[bytes, tuple[dict[str, Any], dict[str, Any]]] = {}


def manifest_of(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What these bytes say, not to be changed, and what has been made of it: another reader of the same bytes has both.
    From the second time on the states in it remember what they are (Known). StateError.
    """
    manifest, kept = _read.get(data) or (None, {})
    if manifest is None:
        manifest = unpack(data)
        if not isinstance(manifest, dict):
            raise StateError("its manifest is no dict")
        if len(data) <= MOST_READ_BYTES:
            while len(_read) >= MOST_READ:
                _read.pop(next(iter(_read), b""), None)
            _read[data] = manifest, kept
    elif not isinstance(manifest.get("parts"), Known):
        manifest = {**manifest, "parts": known(manifest.get("parts"))}
        _read[data] = manifest, kept
    return manifest, kept


def open_file(path: str) -> int:
    """A descriptor of a regular file, for reading. ConfigError in one sentence."""
    try:
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK | posix.O_NOCTTY)
    except OSError as error:
        raise ConfigError(f"snapshot {path}: {remedy(error, 'give a file that can be read')}") from None
    except ValueError:
        raise ConfigError(f"snapshot {path!r}: no file has such a name: give that of save()'s file") from None
    mode = posix.fstat(fd).st_mode
    if S_ISREG(mode):
        return fd
    posix.close(fd)
    what = "a folder" if S_ISDIR(mode) else "a device or a pipe"
    raise ConfigError(f"snapshot {path} is {what}: give the file that save() wrote")


def file_data(fd: int, offset: int, size: int) -> list[tuple[int, int]]:
    """(offset, size) of the parts of a file that are no holes, in whole pages."""
    found: list[tuple[int, int]] = []
    at, end = offset, offset + size
    while at < end:
        try:
            start = posix.lseek(fd, at, posix.SEEK_DATA)
            if start >= end:
                break
            stop = min(posix.lseek(fd, start, posix.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == EINVAL or error.errno == EOPNOTSUPP or error.errno == EWOULDBLOCK:
                return [(offset, size)]
            break  # ENXIO: nothing but a hole from here on
        start -= (start - offset) % PAGE_BYTES
        stop += -(stop - offset) % PAGE_BYTES
        found.append((start, min(stop, end) - start))
        at = stop
    return found
