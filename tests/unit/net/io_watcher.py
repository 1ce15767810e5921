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
