"""Code in a network namespace of its own, where it may do with interfaces what it likes."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from boot_assets import LeftOutError

UNSHARE = ("unshare", "--net", *(("--user", "--map-root-user") if os.geteuid() else ()))
LONGEST_S = 120
TESTS = Path(__file__).parent
HEAD = f"import sys; sys.path[:0] = {[str(TESTS.parent), str(TESTS / 'unit' / 'net')]!r}\n"


@functools.cache
def refusal(*command: str) -> str:
    """What is said where this makes no namespaces; "" where it does."""
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    return (tried.stderr.strip() or str(tried.returncode)) if tried.returncode else ""


def in_namespace(code: str) -> str:
    """What ``code`` prints in an interpreter of its own. AssertionError with what it said where it fails.

    LeftOutError where this user may make none: in a chroot (unshare(2)), in many containers.
    """
    if refusal(*UNSHARE):
        raise LeftOutError(f"no network namespace may be made here: {refusal(*UNSHARE)}")
    command = [*UNSHARE, sys.executable, "-c", HEAD + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S)
    assert done.returncode == 0, done.stderr
    return done.stdout
