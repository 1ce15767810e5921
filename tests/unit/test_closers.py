"""Closers: the other order, all of it whatever one step raises, and what a child of fork does instead."""

from __future__ import annotations

import pytest

from pyvmm.closers import Closers


class Thing:
    def __init__(self, name: str, done: list[str], error: Exception | None = None) -> None:
        self.name, self.done, self.error = name, done, error

    def close(self) -> None:
        self.done.append(f"close {self.name}")
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        self.done.append(f"abandon {self.name}")


def test_the_other_order_and_once() -> None:
    done: list[str] = []
    closers = Closers()
    first = Thing("first", done)
    assert closers.add(first) is first
    closers.call(lambda: done.append("second"))
    closers.add(Thing("third", done))
    closers.close()
    assert done == ["close third", "second", "close first"]
    closers.close()
    closers.abandon()
    assert len(done) == 3


def test_what_raises_keeps_no_other_from_closing() -> None:
    done: list[str] = []
    closers = Closers()
    errors = [ValueError("first made"), OSError("last made")]
    closers.add(Thing("a", done, errors[0]))
    closers.add(Thing("b", done))
    closers.add(Thing("c", done, errors[1]))
    with pytest.raises(OSError, match="last made"):
        closers.close()
    assert done == ["close c", "close b", "close a"]


def test_in_a_child_of_fork() -> None:
    done: list[str] = []
    closers = Closers()
    closers.add(Thing("a", done))
    closers.call(lambda: done.append("flush"))  # the parent's affair
    closers.call(lambda: done.append("unmap"), lambda: done.append("unmap here"))
    closers.abandon()
    assert done == ["unmap here", "abandon a"]
    closers.close()
    assert len(done) == 2


def test_a_step_may_add_another() -> None:
    done: list[str] = []
    closers = Closers()
    closers.call(lambda: done.append("first made"))
    closers.call(lambda: closers.call(lambda: done.append("late")))
    closers.close()
    assert done == ["late", "first made"]


def test_an_interrupt_leaves_the_rest_for_the_next_call() -> None:
    done: list[str] = []
    closers = Closers()

    def interrupted() -> None:
        raise KeyboardInterrupt

    closers.add(Thing("a", done))
    closers.call(interrupted)
    closers.add(Thing("b", done))
    with pytest.raises(KeyboardInterrupt):
        closers.close()
    assert done == ["close b"]
    closers.close()
    assert done == ["close b", "close a"]
