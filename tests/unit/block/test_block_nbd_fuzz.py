"""Replies of an NBD server without sense: a little of tests/fuzz/nbd_line.py, which does much."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from fuzz import nbd_line

from pyvmm.block.protocols.nbd_line import WRONG


@pytest.mark.parametrize("seed", [1, 2])
def test_replies_without_sense(seed: int) -> None:
    target = nbd_line.run(1500, seed)
    assert target.ended > 300
    assert len(target.told) > 5
    assert target.told <= set(WRONG)
