"""The atheris target of trace.py.

    python tests/fuzz/fuzz_trace.py [libFuzzer options] [corpus directory]

for example ``-runs=1000000 -max_len=4096``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.from_files import run_from_files

run_from_files()

with atheris.instrument_imports(include=["pyvmm.trace"]):
    from fuzz.trace import one_input


def main() -> None:
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
