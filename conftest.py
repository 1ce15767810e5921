"""For all tests, benchmarks too: no package with machine code of its own can kill pytest (tests/tried.py), and SIGINT
interrupts it, however it was started.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tests"))

import tried

tried.install()

# A shell without job control starts background jobs with SIGINT ignored, and all that those start inherits it: tests of
# Ctrl-C would wait for ever, and so would ci/test at its time limit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
