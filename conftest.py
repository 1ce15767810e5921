"""For all tests, benchmarks too: no package with machine code of its own can kill pytest (tests/tried.py)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tests"))

import tried

tried.install()
