"""The atheris target of virtio_blk.py.

    python tests/fuzz/fuzz_virtio_blk.py [libFuzzer options] [corpus directory]

for example ``-runs=1000000 -max_len=200``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.from_files import run_from_files

run_from_files()

with atheris.instrument_imports(include=["pyvmm.devices.virtio", "pyvmm.block"]):
    from fuzz.virtio_blk import Target


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        atheris.Setup(sys.argv, Target(Path(directory)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
