"""Stock Linux at work, saved and gone on from: live, while it stands, by a migration; in the middle of transfers too.

tests/boot/saved_under_load.py has the work, what is looked at, and does fifty by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from saved_under_load import run


@pytest.mark.lab
@pytest.mark.slow
def test_three_snapshots_under_load(tmp_path: Path) -> None:
    run(tmp_path, "microvm", 3)


@pytest.mark.lab
@pytest.mark.slow
def test_three_snapshots_in_the_middle_of_transfers(tmp_path: Path) -> None:
    """fio with verification on virtio-blk, words by TCP and over vsock."""
    run(tmp_path, "pc", 3, transfers=True)
