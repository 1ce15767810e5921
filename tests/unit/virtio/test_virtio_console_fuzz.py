"""Guests without sense at a console, for as long as a test may take (tests/fuzz/virtio_console.py: for longer)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from fuzz.virtio_console import run


@pytest.mark.parametrize("ring", [{}, {"packed": True, "event_idx": True}, {"indirect": True}], ids=repr)
def test_no_sense_is_survived(ring: dict[str, bool]) -> None:
    said, heard = run(60, 7, **ring)
    assert said > 1_000_000
    assert heard > 10_000
