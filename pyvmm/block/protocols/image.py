"""Opening an image on the host: what it is, how large, who else has it, how O_DIRECT wants it, whether it may grow.

TemporaryImage is a file without a name, for what is not to be kept.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from errno import EACCES, EINVAL, EISDIR, ENOENT, EOPNOTSUPP, EPERM, EROFS

from pyvmm.block.protocols.locking import lock_image, unlock_image, users
from pyvmm.errors import ConfigError, not_local, remedy

# Smallest first: 1 is a file system that doesn't care (tmpfs), the others are block sizes of disks and file systems.
ALIGNMENTS = (1, 512, 1024, 2048, 4096, 16384, 65536)
# Reading and writing these never waits for a device.
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs", "devtmpfs")


class Image:
    """An open image. ``direct``: its descriptor has O_DIRECT; ``alignment``: what that asks of offsets and lengths, in
    bytes (1: nothing); ``tail_fd``: for the part of a last block, without O_DIRECT.
    """

    def __init__(
        self, path: str, *, read_only: bool, direct: bool = False, locking: bool = True, later: bool = False
    ) -> None:
        """ConfigError for whatever is wrong with ``path``. ``later``: somebody else may have it until ``lock``."""
        self.path = path
        self.read_only = read_only
        self.direct = direct
        self._locking = locking
        self.alignment = 1
        self.tail_fd = -1
        self.fd = open_image_file(path, (os.O_RDONLY if read_only else os.O_RDWR) | (os.O_DIRECT if direct else 0))
        try:
            if not later:
                self.lock()
            self.in_memory = in_memory(os.fstat(self.fd))
            if direct:
                self.alignment = probe_alignment(path, self.fd)
            self.measure()
        except BaseException:
            self.close()
            raise

    def lock(self) -> None:
        """ConfigError where somebody else has it."""
        if self._locking and not lock_image(self.fd, writes=not self.read_only):
            raise ConfigError(locked(self.path, self.fd))

    def unlock(self) -> None:
        if self._locking:
            unlock_image(self.fd)

    def measure(self) -> None:
        """How long it is now: ``size_bytes``. ConfigError where what is needed for that length can't be opened."""
        self.size_bytes = os.lseek(self.fd, 0, os.SEEK_END)
        if self.direct and not self.read_only and self.size_bytes % self.alignment and self.tail_fd < 0:
            self.tail_fd = open_image_file(self.path, os.O_RDWR)

    def lengthen(self, size_bytes: int) -> None:
        """Make it so long, where it is shorter. OSError as ftruncate(2)."""
        if self.size_bytes < size_bytes:
            os.ftruncate(self.fd, size_bytes)

    def shorten(self, most_bytes: int) -> None:
        """Make it no longer than that. OSError as ftruncate(2); ConfigError for a block device."""
        self.measure()
        if self.size_bytes <= most_bytes:
            return
        if stat.S_ISBLK(os.fstat(self.fd).st_mode):
            raise ConfigError(
                f"the image {self.path} is a block device, which has its size from elsewhere: make the volume smaller"
                " when the machine has ended"
            )
        os.ftruncate(self.fd, most_bytes)

    def may_grow_to(self, end: int) -> bool:
        """Whether a write may make it longer, up to byte ``end``: by its kind, its seals (fcntl(2), "File Sealing") and
        the process's limit (getrlimit(2), RLIMIT_FSIZE)."""
        if self.read_only or not stat.S_ISREG(os.fstat(self.fd).st_mode):
            return False
        try:
            if fcntl.fcntl(self.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_GROW:
                return False
        except OSError:  # a file system that knows no seals
            pass
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return limit == resource.RLIM_INFINITY or end <= limit

    def peek(self, offset: int, length: int) -> bytes:
        """What is there now; fewer bytes at the end of the file, none where they can't be read."""
        begin = offset - offset % self.alignment
        end = offset + length + -(offset + length) % self.alignment
        try:
            with mmap.mmap(-1, max(1, end - begin)) as memory:  # a page's beginning: as O_DIRECT wants it
                with memoryview(memory) as whole, whole[: end - begin] as piece:
                    got = os.preadv(self.fd, [piece], begin) if end > begin >= 0 else 0
                return memory[offset - begin : min(got, offset + length - begin)]
        except OSError:
            return b""

    def close(self) -> None:
        for fd in (self.fd, self.tail_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.tail_fd = -1


class TemporaryImage(Image):
    """An empty file of no name in ``directory``: it is gone when it is closed, or its process ends."""

    def __init__(self, directory: str) -> None:
        """ConfigError where there can't be one."""
        self.path = directory
        self.read_only = self.direct = False
        self.alignment = 1
        self.tail_fd = -1
        self.size_bytes = 0
        self.fd = open_unnamed(directory)
        self.in_memory = in_memory(os.fstat(self.fd))


def open_unnamed(directory: str) -> int:
    """By O_TMPFILE, or with a name for a moment where the file system has none of that (open(2))."""
    try:
        try:
            return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            if exc.errno not in (EISDIR, EOPNOTSUPP, EINVAL, ENOENT):
                raise
        import tempfile

        fd, path = tempfile.mkstemp(prefix="pyvmm-", dir=directory)
        os.unlink(path)
        return fd
    except OSError as exc:
        raise ConfigError(
            f"no temporary file in {directory}, where snapshot=on keeps the guest's writes ({exc.strerror}): set TMPDIR"
            " to a directory that may be written"
        ) from exc


def open_image_file(path: str, flags: int) -> int:
    """A descriptor, or ConfigError. What is neither file nor block device is not opened: a FIFO would wait for ever."""
    try:
        refuse_kind(path, os.stat(path).st_mode)
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except (OSError, ValueError) as exc:
        raise ConfigError(why_not_opened(path, flags, exc)) from exc
    try:
        refuse_kind(path, os.fstat(fd).st_mode)  # it may be another one by now
        os.set_blocking(fd, True)  # with O_NONBLOCK io_uring would answer EAGAIN
    except BaseException:
        os.close(fd)
        raise
    return fd


def refuse_kind(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise ConfigError(f"the image {path} is a directory: give the path of an image in it")
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise ConfigError(f"the image {path} is neither a file nor a block device: give the path of one")


def why_not_opened(path: str, flags: int, exc: OSError | ValueError) -> str:
    if isinstance(exc, ValueError):
        return f"the image {path!r} is no path: {exc}"
    writing = flags & os.O_ACCMODE == os.O_RDWR
    if exc.errno == ENOENT:
        give = "give the path of one"
        if writing and os.path.isdir(os.path.dirname(path) or "."):
            import shlex

            give += f", or make an empty one: truncate -s 1G {shlex.quote(path)}"
        return f"the image {path} does not exist: {not_local(path) or give}"
    if exc.errno in (EACCES, EPERM, EROFS) and writing and os.access(path, os.R_OK):
        return f"the image {path} may not be written ({exc.strerror}): allow it, or give read-only=on"
    if exc.errno in (EACCES, EPERM):
        return f"the image {path} may not be read ({exc.strerror}): allow it with chmod, or run as its owner"
    if exc.errno == EINVAL and flags & os.O_DIRECT:
        return f"the file system of the image {path} knows no O_DIRECT: use cache=writeback or writethrough"
    return f"the image {path} can't be opened: {remedy(exc, 'give another one')}"


def locked(path: str, fd: int) -> str:
    who = " and ".join(users(fd)) or "another program"
    return f"the image {path} is in use by {who}: end that first, or give locking=off and take the risk"


def probe_alignment(path: str, fd: int) -> int:
    """The least alignment of offset and length that the kernel takes for O_DIRECT."""
    memory = mmap.mmap(-1, ALIGNMENTS[-1])
    try:
        with memoryview(memory) as view:
            for alignment in ALIGNMENTS:
                with view[:alignment] as piece:
                    try:
                        os.preadv(fd, [piece], 0)
                        return alignment
                    except OSError as exc:
                        if exc.errno != EINVAL:
                            raise ConfigError(f"the image {path} can't be read: {exc.strerror}") from exc
    finally:
        memory.close()
    raise ConfigError(f"the image {path} can't be read with O_DIRECT: use cache=writeback or writethrough")


def in_memory(status: os.stat_result) -> bool:
    """Whether the file is on a file system that lives in memory, by /proc/self/mountinfo (proc_pid_mountinfo(5))."""
    if not stat.S_ISREG(status.st_mode):
        return False
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    try:
        with open("/proc/self/mountinfo") as mounts:
            for line in mounts:
                fields = line.split(" ")
                if fields[2] == device:
                    return fields[fields.index("-", 6) + 1] in MEMORY_FILE_SYSTEMS
    except (OSError, ValueError, IndexError):
        pass
    return False
