"""The atheris target of migration.py.

    python tests/fuzz/fuzz_migration.py [libFuzzer options] [corpus directory]

for example ``-runs=100000 -max_len=200 -len_control=0``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.from_files import run_from_files

run_from_files()

LOOKED_AT = [
    *("pyvmm.migration", "pyvmm.migration_stream"),
    *("pyvmm.machine_snapshot", "pyvmm.machine_state", "pyvmm.state"),
]

with atheris.instrument_imports(include=LOOKED_AT):
    from fuzz.migration import Target


def main() -> None:
    atheris.Setup(sys.argv, Target().one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
