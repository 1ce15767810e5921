"""The device at the other side of a chardev, and what tests of event loops need."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

import pytest

from pyvmm.chardev import Chardev
from pyvmm.event_loop import EventLoop

LIMIT_S = 20.0


class Port:
    """The device at the other side: collects input, says how much room it has."""

    def __init__(self, room: int = 4096) -> None:
        self.data = b""
        self.free = room
        self.refused = False  # it said there is no room
        self.breaks = 0
        self._changed = threading.Condition(threading.RLock())

    def attach(self, chardev: Chardev) -> Port:
        chardev.set_receiver(self.receive, self.room, self.on_break)
        return self

    def room(self) -> int:
        with self._changed:
            if self.free == 0:
                self.refused = True
                self._changed.notify_all()
            return self.free

    def receive(self, data: bytes) -> None:
        with self._changed:
            assert 0 < len(data) <= self.free
            self.free -= len(data)
            self.data += data
            self._changed.notify_all()

    def on_break(self) -> None:
        with self._changed:
            self.breaks += 1
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, LIMIT_S), self.data

    def wait_for(self, data: bytes) -> None:
        self.wait(lambda: len(self.data) >= len(data))
        assert self.data == data

    def take(self, count: int) -> None:
        """The guest read some: there is room for more."""
        with self._changed:
            self.free += count
            self.refused = False


def settle(loop: EventLoop) -> None:
    for _ in range(2):
        done = threading.Event()
        loop.call_soon(done.set)
        assert done.wait(LIMIT_S)


def turns_of(loop: EventLoop, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the loop wakes up in 20 ms in which nothing happens."""
    turns = 0
    turn = EventLoop._turn

    def count(self: EventLoop, epoll: select.epoll) -> bool:
        nonlocal turns
        turns += 1
        return turn(self, epoll)

    settle(loop)
    over = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(EventLoop, "_turn", count)
        loop.clock.timer(over.set).arm(loop.clock.now_ns() + 20_000_000)
        assert over.wait(LIMIT_S)
    return turns


def read_exactly(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        assert select.select([fd], [], [], LIMIT_S)[0], data
        data += os.read(fd, count - len(data))
    return data
