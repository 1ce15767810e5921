"""What every atheris target begins with, before it imports what it is to look at."""

from __future__ import annotations

import os
import sys


def run_from_files() -> None:
    """Start the process anew with ``-X pyvmm_files``, unless it was: what comes out of the bundle of modules
    (pyvmm/bundle.py) does not go by atheris's import hook and so is not instrumented.
    """
    if "pyvmm_files" not in sys._xoptions:
        os.execv(sys.executable, [sys.executable, "-X", "pyvmm_files", *sys.argv])
