"""Several requests to a backend, one after the other, seen as one: the next begins when the last has ended.

A callback comes before ``aio_*`` returns, or later on another thread. In the first case a loop submits the next
request, so that nothing recurses, however many there are.
"""

from __future__ import annotations

from errno import ECANCELED

from pyvmm.block.driver import SECTOR_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.block import BlockBackend, Request
    from pyvmm.device import DeviceLock

    Iov = list[memoryview]
    Aio = Callable[[int, Iov, Callable[[int], object]], Request]

REQUEST_SECTORS = 2048  # 1 MiB: the other drives of a machine get their turn in between
IOV_MAX = 1024  # entries of one preadv; a sector has at most 256, as a PRD is at least two bytes


class Chain:
    """``start`` submits the first; ``then()`` is called at the end, once, under ``lock``.

    ``ret`` is 0, or why it ended before everything was done.
    """

    __slots__ = ("_cancelled", "_in_loop", "_lock", "_request", "_ret", "_then", "ret")

    def __init__(self, lock: DeviceLock, then: Callable[[], None]) -> None:
        self._lock = lock
        self._then = then
        self._request: Request | None = None
        self._ret: int | None = None
        self._in_loop = False
        self._cancelled = False
        self.ret = 0

    def start(self) -> None:
        """The lock is held."""
        self._in_loop = True
        while True:
            self._ret = None
            self._request = self._submit()
            ret = self._ret
            if ret is None:
                self._in_loop = False
                return
            if not self._goes_on(ret):
                break
        self._in_loop = False
        self._request = None
        self._then()

    def cancel(self) -> None:
        """End as soon as can be. What has begun on the host runs to its end; ``then`` comes after that."""
        self._cancelled = True
        if self._request is not None:
            self._request.cancel()

    def _called_back(self, ret: int) -> None:
        with self._lock:
            if self._in_loop:
                self._ret = ret
            elif self._goes_on(ret):
                self.start()
            else:
                self._request = None
                self._then()

    def _goes_on(self, ret: int) -> bool:
        if not self._advance(ret):
            return False
        if self._cancelled:
            self.ret = -ECANCELED
        return not self._cancelled

    def _submit(self) -> Request:
        """Send the next request, with ``_called_back`` for its callback."""
        raise NotImplementedError

    def _advance(self, ret: int) -> bool:
        """One has ended with ``ret``. Whether there is another."""
        raise NotImplementedError


class Flush(Chain):
    """A single flush."""

    __slots__ = ("_backend",)

    def __init__(self, lock: DeviceLock, backend: BlockBackend, then: Callable[[], None]) -> None:
        super().__init__(lock, then)
        self._backend = backend

    def _submit(self) -> Request:
        return self._backend.aio_flush(self._called_back)

    def _advance(self, ret: int) -> bool:
        self.ret = ret
        return False


class Discards(Chain):
    """Each of ``ranges``, which are (first sector, number of sectors); there is at least one."""

    __slots__ = ("_backend", "_left")

    def __init__(
        self, lock: DeviceLock, backend: BlockBackend, ranges: Sequence[tuple[int, int]], then: Callable[[], None]
    ) -> None:
        super().__init__(lock, then)
        self._backend = backend
        self._left = list(reversed(ranges))

    def _submit(self) -> Request:
        sector, count = self._left.pop()
        return self._backend.aio_discard(sector, count, self._called_back)

    def _advance(self, ret: int) -> bool:
        self.ret = ret
        return ret >= 0 and bool(self._left)


class Mover(Chain):
    """Moves sectors between an image, from ``lba`` on, and ``iov``, in requests of a sensible size.

    A request that fails is taken up again in halves, until it is certain which sector is the first that can't be moved.
    ``moved`` is how many went well.
    """

    __slots__ = ("_aio", "_asked", "_bad_end", "_end", "_index", "_iov", "_lba", "_next", "_offset", "moved")

    def __init__(
        self, lock: DeviceLock, aio: Aio, lba: int, iov: Iov, count: int, then: Callable[[], None], bad: bool = False
    ) -> None:
        """``count`` sectors; ``iov`` may be longer. ``bad``: moving them all at once has failed already."""
        super().__init__(lock, then)
        self._aio = aio
        self._lba = lba
        self._iov = iov
        self._end = count
        self._index = self._offset = 0  # in the iov: where the next request begins
        self._next = (0, 0)  # and where it ends
        self._bad_end = count if bad else 0  # before this sector there is a bad one, unless the failure was transient
        self._asked = 0
        self.moved = 0

    def _submit(self) -> Request:
        left = self._end - self.moved
        wanted = (self._bad_end - self.moved + 1) // 2 if self._bad_end else min(left, REQUEST_SECTORS)
        part = self._cut(wanted)
        return self._aio(self._lba + self.moved, part, self._called_back)

    def _cut(self, wanted: int) -> Iov:
        """The next ``wanted`` sectors of the iov, fewer where they have too many pieces."""
        index, offset, iov = self._index, self._offset, self._iov
        missing = wanted * SECTOR_BYTES
        part: Iov = []
        while missing:
            view = iov[index]
            size = len(view) - offset
            if size > missing:
                part.append(view[offset : offset + missing])
                offset += missing
                break
            part.append(view[offset:] if offset else view)
            missing -= size
            index += 1
            offset = 0
            if len(part) == IOV_MAX and missing:
                index, offset = back_to_sector(part, index, offset)
                wanted = sum(map(len, part)) // SECTOR_BYTES
                break
        self._asked = wanted
        self._next = index, offset
        return part

    def _advance(self, ret: int) -> bool:
        if ret == -ECANCELED or (ret < 0 and self._asked == 1):
            self.ret = ret
            return False
        if ret < 0:
            self._bad_end = self.moved + self._asked
            return True
        self.moved += self._asked
        self._index, self._offset = self._next
        if self.moved >= self._bad_end:
            self._bad_end = 0
        return self.moved < self._end


def back_to_sector(part: Iov, index: int, offset: int) -> tuple[int, int]:
    """Take from the end of ``part`` what is no whole sector; the position in the iov, (index, offset), goes along."""
    excess = sum(map(len, part)) % SECTOR_BYTES
    while excess:
        last = part[-1]
        if len(last) > excess:
            part[-1] = last[: len(last) - excess]
            return index - 1, len(last) - excess
        excess -= len(last)
        part.pop()
        index -= 1
    return index, offset
