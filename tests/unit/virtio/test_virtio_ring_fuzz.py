"""Rings without sense, for as long as a test may take: tests/fuzz/virtio_ring.py is the same for longer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from fuzz.virtio_ring import run

LAYOUTS = [
    {},
    {"packed": True, "event_idx": True, "indirect": True},
    {"event_idx": True, "indirect": True},
    {"packed": True, "in_order": True},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_no_sense_is_survived(layout: dict[str, bool]) -> None:
    chains, errors = run(150, 11, **layout)
    assert chains > 100
    assert errors > 100
