"""python -m tests.fuzz [--accesses N] [--seed N]: the senseless guest, for so many accesses, then the fences.

The same seed does the same again. A failure shows the accesses that led to it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.driver import main

if __name__ == "__main__":
    sys.exit(main())
