"""The atheris target of virtio_vsock.py.

    python tests/fuzz/fuzz_virtio_vsock.py [libFuzzer options] [corpus directory]

for example ``-runs=1000000 -max_len=400``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.from_files import run_from_files

run_from_files()

with atheris.instrument_imports(include=["pyvmm.devices.virtio", "pyvmm.vsock"]):
    from fuzz.cases import one_input
    from fuzz.virtio_vsock import Target


def main() -> None:
    target = Target(event_idx=True)
    atheris.Setup(sys.argv, lambda data: one_input(target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
