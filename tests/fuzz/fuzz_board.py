"""The atheris target: what the senseless guest does comes from a fuzzer that looks at what its input has reached.

    python tests/fuzz/fuzz_board.py [libFuzzer options] [corpus directory]

for example ``-max_total_time=600 -max_len=8192``. Without atheris (the extra `dev`) use ``python -m tests.fuzz``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.from_files import run_from_files

run_from_files()

with atheris.instrument_imports(include=["pyvmm.devices", "pyvmm.block", "pyvmm.memory_map", "pyvmm.clock"]):
    # Imported inside of functions otherwise, too late to be instrumented.
    from fuzz.guest import BytesChoices, Guest, NoMoreChoices
    from fuzz.harness import FencedBoard

    import pyvmm.block.formats.raw
    import pyvmm.devices.fw_cfg
    import pyvmm.devices.ide.packet_drive
    import pyvmm.devices.pci.i440fx
    import pyvmm.devices.pci.piix3
    import pyvmm.devices.pci.piix4_pm  # noqa: F401

FENCES_EVERY = 200  # inputs: they cost as much as an input does


class Target:
    def __init__(self, board: FencedBoard) -> None:
        self.board = board
        self.inputs = 0

    def __call__(self, data: bytes) -> None:
        """Raises what a device raises, Escaped or Stuck."""
        board = self.board
        board.power_up()
        guest = Guest(board, BytesChoices(data))
        try:
            while True:
                guest.step()
                board.check_errors()
        except NoMoreChoices:
            pass
        except BaseException as error:
            error.add_note(f"the last accesses:\n{guest.last_accesses()}")
            raise
        self.inputs += 1
        if self.inputs % FENCES_EVERY == 0:
            board.check_alive()
            board.check()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pyvmm-fuzz-") as directory:
        board = FencedBoard(Path(directory))
        atheris.Setup(sys.argv, Target(board))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
