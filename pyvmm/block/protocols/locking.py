"""Who else has the image open: open file description locks on single bytes, as QEMU sets them.

A user of an image says what it does with it, and what it cannot bear others to do, each by a shared lock on one byte:
byte 100 + n, "I do n"; byte 200 + n, "nobody else may do n". It then looks whether one of the others holds the
counterpart of one of its own. So readers live side by side, a writer is alone, and pyvmm and QEMU know of each other
(fcntl(2), F_OFD_SETLK; QEMU's block/file-posix.c, RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE). The bytes need not
exist in the file. The locks go with the descriptor.
"""

from __future__ import annotations

import fcntl
import os
import struct
from errno import EACCES, EAGAIN

DOES_BASE = 100
FORBIDS_BASE = 200

CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)

FLOCK = "hhqqi0q"  # struct flock of a 64-bit Linux: type, whence, start, length, pid


def lock_image(fd: int, writes: bool) -> bool:
    """Say what we do with the image. False where another user forbids it, or does what we cannot bear: no lock is held.

    File systems that know no locks let everybody in, as in QEMU.
    """
    does = [CONSISTENT_READ, WRITE] if writes else [CONSISTENT_READ]
    forbids = [WRITE]
    mine = [DOES_BASE + n for n in does] + [FORBIDS_BASE + n for n in forbids]
    counterparts = [FORBIDS_BASE + n for n in does] + [DOES_BASE + n for n in forbids]
    try:
        # First set, then look: of two that come at once at least one sees the other.
        for byte in mine:
            set_lock(fd, fcntl.F_RDLCK, byte)
        free = not any(held_by_another(fd, byte) for byte in counterparts)
    except OSError as exc:
        if exc.errno not in (EACCES, EAGAIN):
            return True
        free = False
    if not free:
        for byte in mine:
            set_lock(fd, fcntl.F_UNLCK, byte)
    return free


def unlock_image(fd: int) -> None:
    """Give up all locks now, where the open file may live on when ``fd`` is closed."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(FLOCK, fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:  # a file system that knows no locks
        pass


def set_lock(fd: int, kind: int, byte: int) -> None:
    """OSError: EAGAIN, EACCES where somebody has it exclusively; others where there are no locks."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(FLOCK, kind, os.SEEK_SET, byte, 1, 0))


def held_by_another(fd: int, byte: int) -> bool:
    asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    return int(struct.unpack(FLOCK, answer)[0]) != fcntl.F_UNLCK


def is_image(fd: int) -> bool:
    """Whether somebody, this process too, has the file open as an image that nobody else may write."""
    try:
        return held_by_another(fd, FORBIDS_BASE + WRITE)
    except OSError:  # a file system that knows no locks
        return False


def users(fd: int) -> list[str]:
    """Programs that have this file open, as far as we may see: "process 4711 (qemu-system-x86)"."""
    wanted = os.fstat(fd)
    found = []
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                try:
                    there = os.stat(f"/proc/{pid}/fd/{name}")
                except OSError:
                    continue
                if os.path.samestat(there, wanted) and not (int(pid) == os.getpid() and int(name) == fd):
                    with open(f"/proc/{pid}/comm") as comm:
                        program = comm.read().strip()
                    whose = "this process" if int(pid) == os.getpid() else f"process {pid} ({program})"
                    if whose not in found:
                        found.append(whose)
        except OSError:
            continue
    return found
