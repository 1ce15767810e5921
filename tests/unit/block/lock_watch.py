"""Watches over the rule that a thread goes on with a coroutine only while it holds no lock of the block layer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from pyvmm.block import backend, coroutine
from pyvmm.block.coroutine import AioContext
from pyvmm.block.protocols.blkdebug import BlkDebug
from pyvmm.block.thread_pool import ThreadPool

_mine = threading.local()


def held() -> list[str]:
    """The names of the locks that this thread holds."""
    if not hasattr(_mine, "names"):
        _mine.names = []
    names: list[str] = _mine.names
    return names


class WatchedLock:
    """A lock that knows which thread holds it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken = self._lock.acquire(blocking, timeout)
        if taken:
            held().append(self._name)
        return taken

    def release(self) -> None:
        held().remove(self._name)
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


def watch_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on: the locks that are made know their thread, and a coroutine that goes on under one is an error."""
    for owner, attribute in ((AioContext, "lock"), (ThreadPool, "_lock"), (BlkDebug, "_lock")):
        monkeypatch.setattr(owner, "__init__", with_watched_lock(owner, attribute))
    start = coroutine.start

    def watched_start(coroutine: Any, owner: Any) -> None:
        assert held() == [], "a coroutine goes on on a thread that holds a lock"
        start(coroutine, owner)

    monkeypatch.setattr(coroutine, "start", watched_start)
    monkeypatch.setattr(backend, "start", watched_start)


def with_watched_lock(owner: Any, attribute: str) -> Callable[..., None]:
    made = owner.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        setattr(self, attribute, WatchedLock(f"{owner.__name__}.{attribute}"))

    return init
