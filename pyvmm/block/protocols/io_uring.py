"""The engine aio="io_uring": reads, writes and flushes of a file by a ring of the kernel's instead of worker threads.

It is file_posix with another ``co_submit``, over uring.pyx. A submission whose completion is in the ring when the
system call returns does not suspend its coroutine. The others ring an eventfd, which the event loop watches: from the
kernel straight to the thread that goes on with the request. What requests that go on there submit in their turn goes
to the kernel in one batch.

Single requests that a ring can't take go to the thread pool: discards, zeroes, more than the ring holds, what O_DIRECT
wants aligned and is not, what the kernel has no room for now. But a drive never gets another engine than its options
ask for: where the host refuses io_uring, that is a ConfigError.
"""

from __future__ import annotations

from errno import EACCES, EAGAIN, ECANCELED, EFAULT, EINTR, EINVAL, EMFILE, ENFILE, ENOMEM, ENOSYS, EOPNOTSUPP, EPERM

from pyvmm.block.protocols.file_posix import FLUSH, READ, Aiocb, FilePosix
from pyvmm.block.protocols.locking import unlock_image
from pyvmm.block.uring import IOV_MAX, Ring
from pyvmm.errors import ConfigError
from pyvmm.light import Lock, get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.block.coroutine import AioContext, ReaderLoop
    from pyvmm.block.protocols.image import Image
    from pyvmm.block.stats import BlockStats

ENTRIES = 128
GIVEN_UP = (-ECANCELED, -EINTR, -EAGAIN, -EFAULT)
CAP_SYS_ADMIN = 21  # linux/capability.h


def open_ring(entries: int = ENTRIES) -> Ring:
    """A ring, or ConfigError: one sentence that says why the host refuses it, and what to do."""
    try:
        return Ring(entries)
    except OSError as exc:
        raise ConfigError(f"aio=io_uring can't be had: {why_refused(exc)}, or use aio=threads") from exc


def refusal() -> str | None:
    """Why this host would refuse the engine, in one sentence; None: it would not."""
    try:
        open_ring().close()
    except ConfigError as exc:
        return str(exc)
    return None


def why_refused(exc: OSError) -> str:
    """Cause and remedy of what ``Ring`` raised. io_uring_setup(2); Documentation/admin-guide/sysctl/kernel.rst."""
    call, number = exc.filename, exc.errno
    if number in (EPERM, EACCES):
        return why_forbidden(f"{call}: {exc.strerror}")
    if number == ENOSYS:
        return (
            f"this kernel has no {call}, or a sandbox hides it: use Linux 5.6 or later with CONFIG_IO_URING, and allow"
            " io_uring in the sandbox's filter of system calls"
        )
    if number == EOPNOTSUPP or (number == EINVAL and call == "io_uring_register"):
        return f"this kernel's io_uring is too old (no {call}): use Linux 5.6 or later"
    if number == ENOMEM:
        return (
            f"no memory for the ring ({call}): raise the limit of locked memory with `ulimit -l`, to which kernels"
            " before 5.12 count it, or close machines that are done"
        )
    if number in (EMFILE, ENFILE):
        return f"too many open files ({call}): raise `ulimit -n`, or close machines that are done"
    return f"{call}: {exc.strerror}: use another kernel"


def why_forbidden(what: str) -> str:
    """EPERM has two causes that look the same: the sysctl (since Linux 6.6), and a filter of system calls."""
    disabled = number_in("/proc/sys/kernel/io_uring_disabled")
    if disabled == 2:
        return f"{what}: kernel.io_uring_disabled=2 forbids it to all: sysctl kernel.io_uring_disabled=0 allows it"
    if disabled == 1 and not has_cap_sys_admin():
        return (
            f"{what}: kernel.io_uring_disabled=1 leaves it to CAP_SYS_ADMIN and the group kernel.io_uring_group: join"
            " that group, or sysctl kernel.io_uring_disabled=0 allows it to all"
        )
    return (
        f"{what}: the sandbox around this process forbids it: allow io_uring_setup, io_uring_enter and"
        " io_uring_register in its seccomp filter (a container's profile, a service's SystemCallFilter)"
    )


def number_in(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def has_cap_sys_admin() -> bool:
    try:
        with open("/proc/self/status") as file:
            effective = next(line for line in file if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return False
    return bool(int(effective.split()[1], 16) >> CAP_SYS_ADMIN & 1)


class FileUring(FilePosix):
    """file_posix with a ring as its engine."""

    def __init__(self, image: Image, context: AioContext, stats: BlockStats) -> None:
        loop: ReaderLoop = context.loop  # type: ignore[assignment]
        if not hasattr(loop, "add_reader"):
            raise ConfigError("aio=io_uring needs an event loop that watches descriptors: use aio=threads")
        super().__init__(image, context, stats)
        self._loop = loop
        self._lock = Lock()  # the ring's
        self._ring = open_ring()
        self._event_fd = self._ring.event_fd
        self._closed = False
        self._gathering = 0  # the thread that will submit what it queues later, in one batch
        try:
            loop.add_reader(self._event_fd, self._on_event)
        except BaseException:
            self._ring.close()
            raise
        context.add_source(self._event_fd, self._on_event)

    async def co_submit(self, aiocb: Aiocb) -> int:
        if not self._luring_submit(aiocb):
            return await self.paio_submit(aiocb)
        ret = await aiocb
        if not self._given_up(ret):
            return ret
        if aiocb.cancelled or self._closed:
            return -ECANCELED
        again = Aiocb(self, aiocb.kind, aiocb.offset, aiocb.length, aiocb.iov, bool(aiocb.flags))
        return await self.paio_submit(again)

    def _given_up(self, ret: int) -> bool:
        """Whether this result says nothing of the file: a worker can do what the kernel gave up.

        When a thread ends (a vCPU's, or one of the embedder's), the kernel cancels or interrupts what it has submitted,
        or goes on with it in a thread of its own that no longer sees the memory: EFAULT. EINVAL: memory that is not
        aligned for O_DIRECT, for which a worker has a buffer that is.
        """
        return ret in GIVEN_UP or (ret == -EINVAL and self.alignment > 1)

    def _luring_submit(self, aiocb: Aiocb) -> bool:
        """Queue it in the ring and submit that. False where the ring can't take it. Where the completion is there at
        once, the result is set.
        """
        if aiocb.kind != FLUSH and (
            len(aiocb.iov) > IOV_MAX or (self.alignment > 1 and (aiocb.offset | aiocb.length) % self.alignment)
        ):
            return False
        with self._lock:
            if self._closed or not self._queue_locked(aiocb):
                return False
            if self._gathering == get_ident():
                return True
            done, refused = self._submit_locked()
        for other, result in done:
            if other is aiocb:
                aiocb.result = result
                aiocb.set()  # its coroutine is the caller, and finds the result when it looks
            else:
                self._context.complete(other, result)
        self._to_workers(refused)
        return True

    def _queue_locked(self, aiocb: Aiocb) -> bool:
        ring = self._ring
        if aiocb.kind == FLUSH:
            return ring.fdatasync(aiocb, self._fd)
        transfer = ring.readv if aiocb.kind == READ else ring.writev
        try:
            return transfer(aiocb, self._fd, aiocb.iov, aiocb.offset, aiocb.flags)
        except (BufferError, TypeError):  # a worker will find the same, and say so
            return False

    def _submit_locked(self) -> tuple[list[tuple[Aiocb, int]], list[Aiocb]]:
        """All that is queued to the kernel: the completions there are, and the requests that it would not take.

        EBUSY ends when completions were taken, EAGAIN and a filter that has come to forbid io_uring_enter do not:
        those requests need not wait for a better time.
        """
        ring = self._ring
        refused: list[Aiocb] = []
        error = ring.submit()
        done = ring.reap()
        if error:
            if ring.submit():
                refused = ring.take_back()
            done += ring.reap()
        return done, refused

    def _to_workers(self, refused: list[Aiocb]) -> None:
        for aiocb in refused:
            self._pool.submit(aiocb)

    def _on_event(self) -> None:
        """The eventfd rings, or somebody drains."""
        with self._lock:
            if self._closed:
                return
            self._ring.acknowledge()
            done, refused = self._submit_locked()
            # A callback that is called below may drain, and so come here again: the outermost call submits what all of
            # them have gathered.
            mine = not self._gathering
            if mine:
                self._gathering = get_ident()
        try:
            for aiocb, result in done:
                self._context.complete(aiocb, result)
            self._to_workers(refused)
            self._context.run_due()
        finally:
            if mine:
                self._submit_gathered()

    def _submit_gathered(self) -> None:
        with self._lock:
            self._gathering = 0
            if self._closed or not self._ring.unsubmitted:
                return
            done, refused = self._submit_locked()
        for aiocb, result in done:
            self._context.complete(aiocb, result)
        self._to_workers(refused)

    def cancel(self, aiocb: Aiocb) -> None:
        aiocb.cancelled = True
        with self._lock:
            if not self._closed and self._ring.cancel(aiocb):
                self._ring.submit()  # what it would not take goes with the next submission
        super().cancel(aiocb)

    def close(self) -> None:
        self._context.remove_source(self._event_fd)
        self._loop.remove_reader(self._event_fd)
        with self._lock:
            if self._closed:
                return
            self._closed = True
            left = self._ring.close()
        for aiocb, result in left:
            self._context.complete(aiocb, result)
        # The kernel may hold the open file a moment longer than the result of the last request says, and with it its
        # locks: whoever opens the image next must not meet them.
        self._pool.close()
        unlock_image(self._fd)
        super().close()

    def abandon(self) -> None:
        self._closed = True
        self._ring.close()  # in a child: its descriptors only
        super().abandon()
