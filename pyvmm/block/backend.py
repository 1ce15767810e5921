"""BlockBackend: a drive as a device sees it.

A request is checked against the image's size and counted. From then on it is a coroutine, ``_co_do_rw``. It waits for
earlier requests that it overlaps, for the throttle, and for the driver. Where it fails, the drive's policy says what
follows. At its end the device's callback is called with 0 or a negative errno.

Threads: any may submit. The callback runs on the submitting thread, before ``aio_*`` returns, where nothing had to be
waited for; else on the worker that did it, the event loop's thread, or one that drains or resumes, with no lock of ours
held. A callback may submit, but not drain: its own request is in flight until it returns.

Order: of two requests in flight that overlap, one of them a write, the later one starts when the earlier is complete.

A device without need of that order may ask for a ``lane``: leave to make transfers that wait for nothing by itself,
from compiled code (lane.pyx). They count as requests of this drive; all others come by ``aio_*``.
"""

from __future__ import annotations

from errno import EACCES, ECANCELED, EINVAL, EIO, ENOMEDIUM, ENOSPC
from os import strerror
from time import monotonic_ns

from pyvmm.block.coroutine import AioContext, Waiter, start
from pyvmm.block.driver import SECTOR_BYTES
from pyvmm.block.iov import all_zeros, iov_length
from pyvmm.block.stats import TRACE_DONE, TRACE_SUBMIT, BlockStats
from pyvmm.errors import ConfigError, HostError, StateError, remedy
from pyvmm.light import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.block.driver import FormatDriver, Iov
    from pyvmm.block.lane import Lane
    from pyvmm.block.options import DriveOptions
    from pyvmm.block.throttle import Throttle
    from pyvmm.clock import Clock
    from pyvmm.trace.recorder import Tap

    Callback = Callable[[int], object]
    OnError = Callable[["BlockBackend", str, int, str], object]

READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES = range(5)
OPERATIONS = ("read", "write", "flush", "discard", "write_zeroes")


class Turn(Waiter):
    """A request's wait for those before it that it overlaps."""

    __slots__ = ("_request",)

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._request = request

    def cancel(self) -> None:
        self._request.backend._cancel_turn(self._request, self)


NOBODY: tuple[Turn, ...] = ()


class Request:
    """One request, from ``aio_*`` until its callback."""

    __slots__ = (
        *("backend", "begin", "blockers", "callback", "cancelled", "dependents", "end", "iov", "kind", "length"),
        *("may_unmap", "number", "offset", "since_ns", "turn", "waiter"),
    )

    def __init__(
        self, backend: BlockBackend, kind: int, offset: int, length: int, iov: Iov, callback: Callback
    ) -> None:
        self.backend = backend
        self.kind = kind
        self.offset = offset
        self.length = length
        self.iov = iov
        self.callback: Callback | None = callback
        self.cancelled = False
        self.may_unmap = True
        self.waiter: Waiter | None = None
        self.blockers = 0  # how many it waits for
        self.turn: Turn | None = None
        self.dependents: list[Request] | None = None  # who waits for it
        self.number = 0  # in the order of submission
        self.begin = self.end = 0  # the bytes it touches
        self.since_ns = monotonic_ns()

    def cancel(self) -> None:
        """Ask for an early end. The callback still comes, once: with -ECANCELED, or with the result.

        It is never called from within ``cancel``.
        """
        self.backend._cancel(self)


class BlockBackend:
    """A drive. ``on_error(backend, operation, errno, action)`` is called for each request that failed on the host, with
    what follows by the drive's policy: "report", "ignore" or "stop". It may be called wherever a callback may.
    """

    def __init__(
        self,
        options: DriveOptions,
        driver: FormatDriver | None,
        context: AioContext,
        *,
        stats: BlockStats | None = None,
        throttle: Throttle | None = None,
        on_error: OnError | None = None,
    ) -> None:
        self.options = options
        self.name = options.name
        self.read_only = options.read_only
        self.size_bytes = 0 if driver is None else driver.size_bytes
        self.sectors = -(-self.size_bytes // SECTOR_BYTES)
        """Size in sectors of 512 bytes. A read-only image may end inside the last one: what is missing reads as zeros.
        """
        self.format = "raw" if driver is None else driver.format
        self._write_cache = options.cache not in ("writethrough", "directsync")
        self._stats = stats = BlockStats() if stats is None else stats
        self._counters = (stats.read, stats.write, stats.flush, stats.discard, stats.write)
        self._driver = driver
        self._context = context
        self._lock = context.lock
        self._throttle = throttle
        self._on_error = on_error
        self._unmap = options.discard == "unmap"
        self._detect_zeroes = options.detect_zeroes != "off"
        self._flushes = options.cache != "unsafe"
        self._alignment = 1 if driver is None else driver.alignment
        self._skew = 0 if driver is None else driver.skew
        self._submitted = 0
        self._reading: dict[Request, None] = {}  # in flight, with a range
        self._changing: dict[Request, None] = {}  # the same, all that are no reads
        self._stalled: list[Request] = []  # put aside by a policy, and what came after
        self._held = False  # what is submitted is put aside: a saved state is being loaded
        self._written = self._flushed = 0  # counts of writes that are complete, and that were so at the last flush
        self._resizing = Lock()  # one after the other; its callers hold no other lock
        self._lane: Lane | None = None  # whose writes are counted by itself

    # -- what a device asks -----------------------------------------------------------------------------------

    def claim(self) -> None:
        """Have the image for itself again. ConfigError where somebody else has it."""
        if self._driver is not None:
            self._driver.claim()

    def give_up(self) -> None:
        """Let another process have the image: nothing is in flight, and nothing is asked before ``claim``."""
        if self._driver is not None:
            self._driver.give_up()

    @property
    def driver(self) -> FormatDriver | None:
        """The image's, for who tells of it; None without a medium."""
        return self._driver

    @property
    def inserted(self) -> bool:
        """Whether there is a medium; without one every request fails with ENOMEDIUM."""
        return self._driver is not None

    @property
    def stats(self) -> BlockStats:
        """What has been done so far."""
        if self._lane is not None:
            with self._lock:
                self._lane.fold(self._stats)
        return self._stats

    def trace_to(self, tap: Tap | None) -> None:
        """Record there what becomes of each request, from now on; None: no more."""
        self._stats.tap = tap

    @property
    def write_cache(self) -> bool:
        """False: each write is on stable storage before it is complete. The guest may change it."""
        return self._write_cache

    @write_cache.setter
    def write_cache(self, on: bool) -> None:
        with self._lock:
            self._write_cache = on
            self._grant_locked()

    def lane(self) -> Lane | None:
        """Leave to make transfers that wait for nothing by itself, the same one each time; None where there are none,
        for what the drive's options ask of every request, or for what its image is.
        """
        if self._lane is None and self._driver is not None and self._throttle is None:
            self._lane = self._driver.lane()
            with self._lock:
                self._grant_locked()
        return self._lane

    def _grant_locked(self) -> None:
        """Something has changed that the lane's leave depends on; the lock is held."""
        if self._lane is None:
            return
        kinds = 0
        if not self._stalled and not self._held and self._driver is not None and self._throttle is None:
            from pyvmm.block.lane import READS, WRITES

            # A write through the lane is not on stable storage, and nobody looks whether it is all zeros.
            writes = self._write_cache and not self.read_only and not self._detect_zeroes
            kinds = READS | (WRITES if writes else 0)
        self._lane.grant(kinds)

    def resize(self, size_bytes: int | None = None) -> bool:
        """The image may be longer by now, or is to be made so that the disk has ``size_bytes``: whether the disk has
        another size now. What lies behind the end of a smaller one is lost, and requests that reach there fail with
        EIO, those too that were put aside or waited for this. From any thread. ConfigError where it can't.
        """
        driver = self._driver
        if driver is None:
            raise ConfigError(f"drive {self.name} has no medium: there is nothing of which the size could change")
        if size_bytes is not None and (size_bytes % SECTOR_BYTES or size_bytes <= 0):
            raise ConfigError(
                f"drive {self.name}: size_bytes={size_bytes}: give whole sectors of 512 bytes, at least one"
            )
        if self.options.size is not None or self.options.keeps_writes or (size_bytes is not None and self.read_only):
            raise ConfigError(
                f"drive {self.name} has its size for good, by size=, snapshot=on or read-only=on: leave that out"
            )
        with self._resizing:
            before = self.size_bytes
            try:
                if size_bytes is None:
                    driver.grow(self.options, None)
                else:
                    self._resize_to(driver, size_bytes)
            except OSError as error:
                what = "become smaller" if size_bytes is not None and size_bytes < before else "grow"
                why = remedy(error, "make the image so long by other means, as truncate -s")
                raise ConfigError(f"drive {self.name} can't {what}: {why}") from None
            finally:
                self._measure(driver)
            return self.size_bytes != before

    def _measure(self, driver: FormatDriver) -> None:
        with self._lock:
            self.size_bytes = driver.size_bytes
            self.sectors = -(-self.size_bytes // SECTOR_BYTES)
            if self._lane is not None:
                self._lane.resize(self.size_bytes)

    def _resize_to(self, driver: FormatDriver, size_bytes: int) -> None:
        """As a request that writes all that is to go, or else the last sector: a format may write the rest of that
        one's cluster. Whoever is on the way to what is to go is waited for; who comes later waits, and sees what is
        left.
        """
        smaller = size_bytes < self.size_bytes
        first = size_bytes if smaller else max(0, self.size_bytes - SECTOR_BYTES)
        request = Request(self, WRITE, first, self.size_bytes - first, (), bool)
        throttle = self._throttle
        if smaller and self._lane is not None:
            self._lane.resize(size_bytes)
            self._lane.settle()
        with self._lock:
            self._enter_locked(request)
        try:
            if request.turn is not None:
                if throttle is not None:
                    throttle.open()  # as for a drain
                try:
                    self._context.run(self._co_turn(request.turn))
                finally:
                    if throttle is not None:
                        throttle.shut()
            if smaller:
                driver.shrink(size_bytes)
            else:
                driver.grow(self.options, size_bytes)
        finally:
            self._measure(driver)
            with self._lock:
                freed = self._untrack_locked(request)
                self._count_out_locked()
            self._give_turns(freed)

    async def _co_turn(self, turn: Turn) -> int:
        return await turn

    def _writes(self) -> int:
        """How many are complete."""
        return self._written + (0 if self._lane is None else self._lane.writes)

    def aio_readv(self, sector: int, iov: Iov, cb: Callback) -> Request:
        """Fill ``iov`` (views of bytes, a whole number of sectors in all) from ``sector`` on."""
        return self._submit(Request(self, READ, sector * SECTOR_BYTES, iov_length(iov), iov, cb))

    def aio_writev(self, sector: int, iov: Iov, cb: Callback) -> Request:
        """Write ``iov`` from ``sector`` on. Its memory may not change before the callback."""
        return self._submit(Request(self, WRITE, sector * SECTOR_BYTES, iov_length(iov), iov, cb))

    def aio_flush(self, cb: Callback) -> Request:
        """Every write that is complete now is on stable storage when the callback says 0."""
        return self._submit(Request(self, FLUSH, 0, 0, (), cb))

    def aio_discard(self, sector: int, count: int, cb: Callback) -> Request:
        """The guest has no more use for these sectors: from now on they may read as anything."""
        return self._submit(Request(self, DISCARD, sector * SECTOR_BYTES, count * SECTOR_BYTES, (), cb))

    def aio_write_zeroes(self, sector: int, count: int, cb: Callback, *, may_unmap: bool = True) -> Request:
        """These sectors read as zeros from now on. ``may_unmap``: their space may be given back, where the drive does
        that at all.
        """
        request = Request(self, WRITE_ZEROES, sector * SECTOR_BYTES, count * SECTOR_BYTES, (), cb)
        request.may_unmap = may_unmap
        return self._submit(request)

    def plug(self) -> None:
        """More requests are about to come, then ``unplug``: where each would be a message of its own, several may go
        out in one. Counted; no request waits for long.
        """
        if self._driver is not None:
            self._driver.plug()

    def unplug(self) -> None:
        if self._driver is not None:
            self._driver.unplug()

    def peek(self, sector: int, count: int) -> bytes:
        """What these sectors hold, read on this thread and past every policy and counter: for a look before the guest
        runs. Fewer bytes where they can't be read, or there is no medium."""
        return b"" if self._driver is None else self._driver.peek(sector * SECTOR_BYTES, count * SECTOR_BYTES)

    # -- what the machine asks --------------------------------------------------------------------------------

    @property
    def stalled(self) -> int:
        """How many requests an error policy has put aside, and with them those submitted since."""
        return len(self._stalled)

    def drain(self) -> None:
        """Return when nothing is in flight. Limits of rate do not hold meanwhile.

        Callbacks that are due run here. Any thread but a callback's; the caller holds no device's lock, and sees to it
        that the guest submits no more. What a policy has put aside stays there.
        """
        throttle = self._throttle
        if throttle is not None:
            throttle.open()
        try:
            self._context.run_until(self._idle_locked)
            while self._lane is not None:
                self._lane.settle()
                with self._lock:
                    if self._idle_locked():
                        break
                self._context.run_until(self._idle_locked)  # what the lane has given back
        finally:
            if throttle is not None:
                throttle.shut()
        driver = self._driver
        if driver is not None and driver.unsettled():
            self._context.run(driver.co_settle())  # what fails here is tried again, and told, by a flush

    def set_limits(self, options: DriveOptions, clock: Clock) -> None:
        """The limits of rate of ``options`` hold from now on, by this clock. What waits for the old ones goes through.
        Not while somebody drains.
        """
        made = None
        if options.throttled:
            from pyvmm.block.throttle import Throttle

            made = Throttle(options, clock, self._context)
        with self._lock:
            before, self._throttle = self._throttle, made
            self.options = options
            self._grant_locked()
        if before is not None:
            before.open()

    def resume(self) -> None:
        """Submit again, in order, what an error policy has put aside."""
        driver = self._driver
        with self._lock:
            again, self._stalled = self._stalled, []
            self._grant_locked()
            again.sort(key=lambda request: request.number)
            for request in again:
                request.since_ns = monotonic_ns()
                self._enter_locked(request)
        for request in again:
            assert driver is not None
            start(self._co_do_rw(request, driver), request)

    def drop_stalled(self) -> None:
        """Forget what an error policy has put aside: its callbacks never come. For a reset."""
        with self._lock:
            dropped, self._stalled = self._stalled, []
            self._grant_locked()
        for request in dropped:
            request.iov = ()
            request.callback = None

    # -- state (state.pyx has the contract): nothing is in flight ----------------------------------------------

    STATE = {"write_cache": "flag", "_unflushed": "flag"}
    STATE_VERSION = 1

    @property
    def _unflushed(self) -> bool:
        """Whether there are writes that a flush of the guest's has to bring to stable storage."""
        return self._writes() > self._flushed

    @_unflushed.setter
    def _unflushed(self, unflushed: bool) -> None:
        self._written = int(unflushed)
        self._flushed = self._writes() - self._written

    def save(self) -> dict[str, Any]:
        """What was put aside is asked again by its device. StateError where the guest's writes would be lost."""
        from pyvmm.state import save_fields

        if self._driver is not None and self._driver.ends_with_process():
            raise StateError(
                f"drive {self.name} has snapshot=on, and what the guest has written there ends with this process:"
                " give it an image of its own, without snapshot=on"
            )
        if self._driver is not None and self._driver.unsettled():
            raise StateError(f"drive {self.name} can't write the tables of its image: make room for them")
        return save_fields(self, self.STATE)

    def load(self, state: dict[str, Any]) -> None:
        """Until ``after_load`` requests are put aside: devices ask again for what they waited for."""
        from pyvmm.state import load_fields

        load_fields(self, self.STATE, state)
        with self._lock:
            self._held = True
            self._grant_locked()

    def after_load(self) -> None:
        """What was asked for again waits for ``resume``, as what had failed where the state was saved."""
        with self._lock:
            self._held = False
            self._grant_locked()
        if self._throttle is not None:
            self._throttle.restart()

    def close(self) -> None:
        """Drain, flush, and give the image back; what was put aside is dropped. Idempotent. HostError, when all is
        given back, where something of the guest's has not reached the image by then, and no policy says to ignore that:
        of what fails from here on nobody else would hear.
        """
        lost: list[int] = []

        def failed(backend: BlockBackend, operation: str, number: int, action: str) -> None:
            if operation != OPERATIONS[READ] and action != "ignore":
                lost.append(number)

        driver = self._driver
        if driver is None:
            return
        self._on_error = failed
        driver.ending()
        self.drain()
        self.drop_stalled()
        if not self.read_only:
            self._flush_at_end(driver, lost)
        if driver.ends_with_process():
            lost.clear()
        self._driver = self._on_error = None
        if self._lane is not None:
            self._lane.close()
        try:
            driver.close()
        except OSError as error:  # close(2): where data goes over a network, or a quota is
            lost.append(error.errno or EIO)
        if lost:
            why = remedy(OSError(lost[0], strerror(lost[0])), "see to what it is on, and check the image")
            raise HostError(f"drive {self.name}: not all that was written is in {self.options.file}: {why}")

    def _flush_at_end(self, driver: FormatDriver, lost: list[int]) -> None:
        self.aio_flush(lambda ret: None)
        self.drain()
        self.drop_stalled()
        if driver.unsettled() and not lost:  # with cache=unsafe no flush has looked at the tables of the image
            ret = self._context.run(driver.co_settle())
            if ret < 0:
                lost.append(-ret)

    def abandon(self) -> None:
        """In a child of fork, which has no worker: close the image's descriptors and do nothing else."""
        self._context.abandon()
        self._on_error = None
        driver, self._driver = self._driver, None
        if self._lane is not None:
            self._lane.grant(0)
        if driver is not None:
            driver.abandon()

    # -- a request's life -------------------------------------------------------------------------------------

    def _submit(self, request: Request) -> Request:
        driver = self._driver
        if driver is None:
            return self._refuse(request, -ENOMEDIUM)
        if request.offset < 0 or self._outside(request):
            return self._refuse(request, -EIO)
        if request.length % SECTOR_BYTES or request.length < 0:
            return self._refuse(request, -EINVAL)
        if self.read_only and request.kind not in (READ, FLUSH):
            return self._refuse(request, -EACCES)
        with self._lock:
            self._submitted += 1
            request.number = self._submitted
            if (tap := self._stats.tap) is not None:
                what = request.offset >> 9 & (1 << 48) - 1 | request.kind << 48
                tap.mark(TRACE_SUBMIT, what, request.number & 0xFFFF_FFFF | min(request.length, 0xFFFF_FFFF) << 32)
            if self._stalled or self._held:
                self._stalled.append(request)
                return request
            self._enter_locked(request)
        start(self._co_do_rw(request, driver), request)
        return request

    def _outside(self, request: Request) -> bool:
        """Whether it reaches behind the disk's end. Not true of one in flight to become so: who shrinks waits."""
        return request.offset + request.length > self.sectors * SECTOR_BYTES

    def _refuse(self, request: Request, ret: int) -> Request:
        """Fail a request that the guest got wrong. The drive's policies are for failures of the host, and not asked."""
        with self._lock:
            self._counters[request.kind].failed += 1
        request.iov = ()
        callback, request.callback = request.callback, None
        assert callback is not None
        callback(ret)
        return request

    def _enter_locked(self, request: Request) -> None:
        """Count it in, and find those before it that it has to wait for."""
        stats = self._stats
        stats.in_flight += 1
        if stats.in_flight > stats.max_in_flight:
            stats.max_in_flight = stats.in_flight
        if not request.length:
            return
        request.begin = begin = request.offset + self._skew
        end = begin + request.length
        # With O_DIRECT a write that is not whole blocks also writes the rest of its first and last block. With the end
        # rounded up here, two requests that share a block overlap, and so wait for each other.
        request.end = end = end + -end % self._alignment
        if self._changing:
            self._wait_for_locked(request, self._changing)
        if request.kind == READ:
            self._reading[request] = None
            return
        if self._reading:
            self._wait_for_locked(request, self._reading)
        self._changing[request] = None

    def _wait_for_locked(self, request: Request, others: dict[Request, None]) -> None:
        """For those that it overlaps."""
        begin, end = request.begin, request.end
        for other in others:
            if other.begin < end and begin < other.end:
                if other.dependents is None:
                    other.dependents = []
                other.dependents.append(request)
                request.blockers += 1
        if request.blockers and request.turn is None:
            request.turn = Turn(request)

    async def _co_do_rw(self, request: Request, driver: FormatDriver) -> None:
        try:
            ret = 0
            if request.turn is not None:
                ret = await request.turn
                request.turn = None
                if not ret and self._put_aside(request):
                    return
            throttle = self._throttle
            if throttle is not None and request.kind <= WRITE and not ret:
                throttled = throttle.admit(request.kind == WRITE, request.length)
                if throttled is not None:
                    ret = await throttled
            if ret or request.cancelled:
                ret = -ECANCELED
            elif self._outside(request):
                ret = -EIO  # the disk has become smaller since it was submitted
            elif request.kind == READ:
                ret = await driver.co_readv(request.offset, request.iov, request.length)
            else:
                ret = await self._co_change(request, driver)
        except BaseException:
            self._leave(request)
            raise
        self._finish(request, ret)

    async def _co_change(self, request: Request, driver: FormatDriver) -> int:
        """Everything but a read."""
        kind, offset, length, fua = request.kind, request.offset, request.length, not self._write_cache
        if kind == FLUSH:
            written = self._writes()
            if not self._flushes or written == self._flushed:
                return 0
            ret = await driver.co_flush()
            if ret == 0:
                with self._lock:
                    self._flushed = max(self._flushed, written)
            return ret
        if kind == WRITE:
            if self._detect_zeroes and all_zeros(request.iov):
                may_unmap = self._unmap and self.options.detect_zeroes == "unmap"
                ret = await driver.co_write_zeroes(offset, length, may_unmap, fua)
            else:
                ret = await driver.co_writev(offset, request.iov, length, fua)
        elif kind == WRITE_ZEROES:
            ret = await driver.co_write_zeroes(offset, length, self._unmap and request.may_unmap, fua)
        elif self._unmap:
            ret = await driver.co_discard(offset, length)
        else:
            return 0
        with self._lock:
            self._written += 1
        return ret

    def _finish(self, request: Request, ret: int) -> None:
        """Count it, ask the policy, tell the device."""
        action = "" if ret >= 0 or request.cancelled or self._outside(request) else self._action(request.kind, -ret)
        counters = self._counters[request.kind]
        freed: Sequence[Turn] = NOBODY
        with self._lock:
            if ret >= 0:
                counters.operations += 1
                counters.bytes += request.length
            elif ret != -ECANCELED:
                counters.failed += 1
            counters.time_ns += monotonic_ns() - request.since_ns
            if (tap := self._stats.tap) is not None:
                tap.mark(TRACE_DONE, request.number, ret)
            if request.dependents is None:
                (self._reading if request.kind == READ else self._changing).pop(request, None)
            else:
                freed = self._untrack_locked(request)
            stop = action == "stop" and not request.cancelled
            if stop:
                self._stalled.append(request)
                self._grant_locked()
                self._count_out_locked()
        if freed:
            self._give_turns(freed)
        if not stop:
            self._tell(request, ret, action)
        elif self._on_error is not None:
            self._on_error(self, OPERATIONS[request.kind], -ret, action)

    def _tell(self, request: Request, ret: int, action: str) -> None:
        """Its end, to the device."""
        callback = request.callback
        request.iov = ()
        request.callback = request.waiter = None
        assert callback is not None
        try:
            if action and self._on_error is not None:
                self._on_error(self, OPERATIONS[request.kind], -ret, action)
            callback(0 if action == "ignore" else ret)
        finally:
            with self._lock:
                self._count_out_locked()

    def _action(self, kind: int, errno: int) -> str:
        """What the drive's policy says of a failure (QEMU's rerror and werror; a flush counts as a write)."""
        policy = self.options.rerror if kind == READ else self.options.werror
        if policy == "enospc":
            return "stop" if errno == ENOSPC else "report"
        return policy

    def _untrack_locked(self, request: Request) -> Sequence[Turn]:
        """It is no longer in flight: the turns of those that waited for it alone."""
        (self._reading if request.kind == READ else self._changing).pop(request, None)
        if request.dependents is None:
            return NOBODY
        dependents, request.dependents = request.dependents, None
        freed: list[Turn] = []
        for other in dependents:
            if other.blockers:
                other.blockers -= 1
                if not other.blockers:
                    assert other.turn is not None
                    freed.append(other.turn)
        return freed

    def _give_turns(self, turns: Sequence[Turn]) -> None:
        # By the event loop: continued from here, a chain of requests that wait for each other would recurse.
        for turn in turns:
            self._context.complete(turn, 0)

    def _count_out_locked(self) -> None:
        self._stats.in_flight -= 1
        if not self._stats.in_flight:
            self._context.notify_locked()

    def _idle_locked(self) -> bool:
        return not self._stats.in_flight

    def _put_aside(self, request: Request) -> bool:
        """Its turn has come. Whether it is put aside all the same: an earlier request was, and the order must hold."""
        with self._lock:
            if not self._stalled or request.cancelled:
                return False
            freed = self._untrack_locked(request)
            self._stalled.append(request)
            self._count_out_locked()
        self._give_turns(freed)
        return True

    def _leave(self, request: Request) -> None:
        """An exception ended it, and is on its way to stop the machine; or a child of fork frees what it has of it."""
        if self._context.abandoned:
            return
        with self._lock:
            freed = self._untrack_locked(request)
            request.iov = ()
            request.callback = request.waiter = None
            self._count_out_locked()
        self._give_turns(freed)

    # -- cancel -----------------------------------------------------------------------------------------------

    def _cancel(self, request: Request) -> None:
        with self._lock:
            if request.callback is None:
                return
            request.cancelled = True
            stalled = request in self._stalled
            if stalled:
                self._stalled.remove(request)
                self._grant_locked()
                self._stats.in_flight += 1
        if stalled:
            waiter = Waiter()
            start(self._co_cancelled(request, waiter), request)
            self._context.complete(waiter, -ECANCELED)
        elif (waiting_for := request.waiter) is not None:
            waiting_for.cancel()

    async def _co_cancelled(self, request: Request, waiter: Waiter) -> None:
        self._finish(request, await waiter)

    def _cancel_turn(self, request: Request, turn: Turn) -> None:
        with self._lock:
            if not request.blockers:
                return
            request.blockers = 0
        self._context.complete(turn, -ECANCELED)
