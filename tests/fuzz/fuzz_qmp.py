"""The atheris target of qmp.py.

    python tests/fuzz/fuzz_qmp.py [libFuzzer options] [corpus directory]

for example ``-runs=100000 -max_len=400``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.from_files import run_from_files

run_from_files()

with atheris.instrument_imports(include=["pyvmm.control.qmp"]):
    from fuzz.qmp import one_input


def main() -> None:
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
