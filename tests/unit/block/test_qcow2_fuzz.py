"""A few of the mutated images of tests/qcow2_fuzz.py."""

from __future__ import annotations

from pathlib import Path

from qcow2_fuzz import fuzz


def test_mutated_images_cost_a_sentence_at_most(tmp_path: Path) -> None:
    fuzz(tmp_path, 400, 20_000_000)
