"""Where a process's time goes, by thread, as the kernel tells (proc(5), /proc/PID/task/TID/stat and schedstat)."""

from __future__ import annotations

import posix

NS_PER_S = 1_000_000_000
# Fields of stat, by their number in proc(5); the first two, of which the name may hold anything, stand before.
UTIME, STIME, GUEST_TIME = 14 - 3, 15 - 3, 43 - 3


class ThreadUse:
    """Nanoseconds on a processor: ``guest_ns`` in the guest, ``user_ns`` in user space, ``system_ns`` in the kernel;
    and ``wait_ns``, in which it could have run and others did: a guest sees that of a vCPU as steal.
    """

    __slots__ = ("guest_ns", "name", "system_ns", "thread_id", "user_ns", "wait_ns")

    def __init__(self, thread_id: int, stat: str, schedstat: str) -> None:
        tick_ns = NS_PER_S // posix.sysconf("SC_CLK_TCK")
        name, _, rest = stat.partition("(")[2].rpartition(")")
        fields = rest.split()
        self.thread_id = thread_id
        self.name = name
        self.guest_ns = int(fields[GUEST_TIME]) * tick_ns
        self.user_ns = max(0, int(fields[UTIME]) * tick_ns - self.guest_ns)  # utime has the guest's too
        self.system_ns = int(fields[STIME]) * tick_ns
        waited = schedstat.split()  # empty where the kernel keeps none
        self.wait_ns = int(waited[1]) if len(waited) > 1 else 0


def threads() -> list[ThreadUse]:
    """Of this process, those that have not ended meanwhile."""
    uses = []
    for entry in posix.listdir("/proc/self/task"):
        try:
            uses.append(ThreadUse(int(entry), read(f"{entry}/stat"), read(f"{entry}/schedstat", missing="")))
        except OSError:
            continue
    return uses


def read(name: str, missing: str | None = None) -> str:
    try:
        fd = posix.open(f"/proc/self/task/{name}", posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        if missing is None:
            raise
        return missing
    try:
        return posix.read(fd, 4096).decode("utf-8", "replace")
    finally:
        posix.close(fd)
