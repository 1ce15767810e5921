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

# A shell without job control starts background jobs with SIGINT and SIGQUIT ignored, and all that those start inherits
# it: tests of them would wait for ever, and so would ci/test at its time limit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
