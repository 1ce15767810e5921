"""Guests and peers without sense, for as long as a test may take: tests/fuzz/virtio_net.py is the same for longer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from fuzz.virtio_net import run


@pytest.mark.parametrize("kind", ["stream", "tap"])
@pytest.mark.parametrize("ring", [{}, {"packed": True, "event_idx": True}, {"indirect": True}], ids=repr)
def test_no_sense_is_survived(kind: str, ring: dict[str, bool]) -> None:
    frames, commands = run(kind, 60, 7, **ring)
    assert frames > 100
    assert commands > 50
