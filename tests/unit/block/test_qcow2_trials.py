"""A little of what tests/qcow2_trials.py does at length: qcow2 against a model and QEMU's programs."""

from __future__ import annotations

from pathlib import Path

import pytest
from qcow2_trials import kill_one, operations

from pyvmm.block.formats.qcow2 import refcounts, tables


@pytest.mark.parametrize(
    ("layers", "features"),
    [
        (1, {}),
        (3, {}),
        (3, {"compat": "0.10"}),
        (1, {"cluster_size": 4096, "refcount_bits": 2}),
        (1, {"cluster_size": 512, "refcount_bits": 64}),
        (3, {"compression_type": "zstd"}),
    ],
)
def test_random_operations(tmp_path: Path, layers: int, features: dict[str, object]) -> None:
    operations(tmp_path, 7, 120, layers, 2, **features)


def test_random_operations_with_room_for_few_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and blocks are given up and written in the middle of everything."""
    monkeypatch.setattr(tables, "CACHE_BYTES", 0)
    monkeypatch.setattr(refcounts, "CACHE_BYTES", 0)
    operations(tmp_path, 8, 120, 3, 2, cluster_size=512, refcount_bits=64)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_end_at_any_moment_leaves_at_most_leaks(tmp_path: Path, seed: int) -> None:
    kill_one(tmp_path, seed, 0.15)
