"""Third-party packages with machine code of their own are tried in another process before they are loaded in this one.

A wheel that was made for another processor, or another libc, does not raise when it is imported or used: it kills. Here
it kills a child, and whoever wanted the package gets an ImportError that says so: one test fails, the others run.
``install`` does that for every import that is to come, of tests and of what they test.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

LIMIT_S = 120  # an emulated host is slow

# What is done with each: importing alone may be harmless.
TRIALS = {
    "atheris": "import atheris",
    "iced_x86": (
        "import iced_x86 as i; f = i.Formatter(i.FormatterSyntax.INTEL); f.format(next(iter(i.Decoder(64, b'\\x90'))))"
    ),
    "lz4": "import lz4.block as b; assert b.decompress(b.compress(bytes(9999))) == bytes(9999)",
    "matplotlib": (
        "import io, matplotlib; matplotlib.use('Agg'); import matplotlib.pyplot as p; p.figure().savefig(io.BytesIO())"
    ),
    "msgspec": "import msgspec; assert msgspec.json.decode(msgspec.json.encode([1])) == [1]",
    "numpy": "import numpy; numpy.ones(99).sum()",
    "zstandard": (
        "import zstandard as z;"
        " assert z.ZstdDecompressor().decompress(z.ZstdCompressor().compress(bytes(9999))) == bytes(9999)"
    ),
}


def what_becomes_of(code: str) -> str:
    """How an interpreter of its own fares with ``code``: "" where it ends well, else in a few words."""
    try:
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"it had not ended after {LIMIT_S} s"
    if child.returncode < 0:
        return f"it died of {signal.Signals(-child.returncode).name}"
    if child.returncode:
        return child.stderr.strip().rpartition("\n")[2] or f"it ended with status {child.returncode}"
    return ""


class TriedFirst(MetaPathFinder):
    """Finds nothing: the first of a package's imports comes past here, and goes on where the trial went well."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        code = TRIALS.get(fullname)
        if code is not None and (failure := what_becomes_of(code)):
            raise ImportError(
                f"{fullname} is missing or broken: tried in a process of its own, {failure}", name=fullname
            )
        return None


def install() -> None:
    if not any(isinstance(finder, TriedFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, TriedFirst())
