"""Waiting for what another thread does without a word to us."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

LIMIT_S = 20.0
LOOK_S = 0.001

Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found], limit_s: float = LIMIT_S) -> Found:
    """What ``condition`` gives, as soon as that is true. AssertionError where it never is."""
    never = threading.Event()
    for _ in range(int(limit_s / LOOK_S)):
        if found := condition():
            return found
        never.wait(LOOK_S)
    raise AssertionError("it never came")
