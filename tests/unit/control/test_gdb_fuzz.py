"""A gdb client without sense: the same conversations as tests/fuzz/fuzz_gdb.py's, by a seeded generator."""

from __future__ import annotations

import random

import pytest
from fuzz.gdb import one_input


@pytest.mark.parametrize("seed", range(4))
def test_conversations(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(500):
        one_input(chance.randbytes(chance.randrange(400)))
