"""A device's thread for tests: it runs what is due when it is told to."""

from __future__ import annotations

import select
from collections.abc import Callable


class Watcher:
    """What a device has as ``io``; ``turn`` calls what is ready now."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], None]] = {}
        self.writers: dict[int, Callable[[], None]] = {}
        self.calls: list[Callable[[], None]] = []

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        assert fd >= 0
        self.readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        self.readers.pop(fd, None)

    def add_writer(self, fd: int, callback: Callable[[], None]) -> None:
        assert fd >= 0
        self.writers[fd] = callback

    def remove_writer(self, fd: int) -> None:
        self.writers.pop(fd, None)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.calls.append(callback)

    def turn(self, wait_s: float = 0) -> int:
        """How many were called."""
        calls, self.calls = self.calls, []
        for call in calls:
            call()
        poll = select.poll()
        for fd in {*self.readers, *self.writers}:
            mask = (select.POLLIN if fd in self.readers else 0) | (select.POLLOUT if fd in self.writers else 0)
            poll.register(fd, mask)
        count = len(calls)
        for fd, mask in poll.poll(0 if calls else wait_s * 1000):
            for table, events in ((self.readers, select.POLLIN), (self.writers, select.POLLOUT)):
                if mask & (events | select.POLLERR | select.POLLHUP | select.POLLNVAL) and fd in table:
                    table[fd]()
                    count += 1
        return count

    def settle(self) -> None:
        """Until nothing is ready any more."""
        for _ in range(10000):
            if not self.turn():
                return
        raise AssertionError("it never comes to rest")


class EdgeWatcher(Watcher):
    """The same by epoll, which knows edges: as IoThread, for a device that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.epoll = select.epoll()
        self.edges: set[int] = set()
        self._known: set[int] = set()

    def _tell(self, fd: int) -> None:
        mask = (select.EPOLLIN if fd in self.readers else 0) | (select.EPOLLOUT if fd in self.writers else 0)
        try:
            if not mask:
                self._known.discard(fd)
                self.epoll.unregister(fd)
            elif fd in self._known:
                self.epoll.modify(fd, mask | (select.EPOLLET if fd in self.edges else 0))
            else:
                self.epoll.register(fd, mask | (select.EPOLLET if fd in self.edges else 0))
                self._known.add(fd)
        except OSError:
            assert not mask  # closed first, and then no longer watched

    def add_reader(self, fd: int, callback: Callable[[], None], *, edge: bool = False) -> None:
        super().add_reader(fd, callback)
        (self.edges.add if edge else self.edges.discard)(fd)
        self._tell(fd)

    def remove_reader(self, fd: int) -> None:
        super().remove_reader(fd)
        self.edges.discard(fd)
        self._tell(fd)

    def add_writer(self, fd: int, callback: Callable[[], None]) -> None:
        super().add_writer(fd, callback)
        self._tell(fd)

    def remove_writer(self, fd: int) -> None:
        super().remove_writer(fd)
        self._tell(fd)

    def turn(self, wait_s: float = 0) -> int:
        calls, self.calls = self.calls, []
        for call in calls:
            call()
        count = len(calls)
        for fd, mask in self.epoll.poll(0 if calls else wait_s):
            for table, events in ((self.readers, select.EPOLLIN), (self.writers, select.EPOLLOUT)):
                if mask & (events | select.EPOLLERR | select.EPOLLHUP) and fd in table:
                    table[fd]()
                    count += 1
        return count
