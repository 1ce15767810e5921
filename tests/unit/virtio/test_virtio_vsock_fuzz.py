"""Guests, clients and programs without sense, for as long as a test may take: tests/fuzz/virtio_vsock.py is the same
for longer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from fuzz.virtio_vsock import run


@pytest.mark.parametrize("ring", [{}, {"packed": True, "event_idx": True}, {"indirect": True}], ids=repr)
def test_no_sense_is_survived(ring: dict[str, bool]) -> None:
    opened, packets = run(80, 7, **ring)
    assert opened > 40
    assert packets > 1000
