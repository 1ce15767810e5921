"""The seeded driver: a Guest on a FencedBoard for a number of accesses, with a watch on time, memory and the fences."""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
import time
from pathlib import Path

from fuzz.guest import Choices, Guest
from fuzz.harness import FencedBoard
from fuzz.memory_watch import MemoryWatch

CHECK_EVERY = 25_000  # accesses
LONGEST_STEP_S = 30.0  # one that takes longer hangs: the process ends with a traceback of every thread


class Report:
    def __init__(self, guest: Guest, seconds: float, slowest_s: float, memory: MemoryWatch) -> None:
        self.accesses = guest.accesses
        self.steps = dict(sorted(guest.steps.items()))
        self.seconds = seconds
        self.slowest_s = slowest_s
        self.memory = memory

    def __str__(self) -> str:
        rate = self.accesses / self.seconds
        steps = ", ".join(f"{name} {count}" for name, count in self.steps.items())
        return (
            f"{self.accesses} accesses in {self.seconds:.1f} s ({rate:.0f} a second), the slowest step "
            f"{self.slowest_s * 1000:.0f} ms; nothing raised, nothing outside of the guest's memory and its disk was "
            f"touched; {self.memory.blocks} objects and {self.memory.anonymous >> 10} KiB more than after the first "
            f"{CHECK_EVERY} accesses at most\nsteps: {steps}"
        )


def run(directory: Path, accesses: int, seed: int, watch: bool = True) -> Report:
    """AssertionError (Escaped), or what a device raised, with the last accesses in its notes."""
    board = FencedBoard(directory)
    board.power_up()
    guest = Guest(board, Choices(seed))
    memory = MemoryWatch()
    slowest_s = 0.0
    begin = time.monotonic()
    try:
        next_check = CHECK_EVERY
        while guest.accesses < accesses:
            if watch:
                faulthandler.dump_traceback_later(LONGEST_STEP_S, exit=True)
            before = time.monotonic()
            guest.step()
            slowest_s = max(slowest_s, time.monotonic() - before)
            board.check_errors()
            if guest.accesses >= next_check:
                board.check()
                board.check_alive()
                guest.log.clear()  # the last accesses would count as what has grown
                memory.look(guest.accesses)
                next_check = guest.accesses + CHECK_EVERY
        seconds = time.monotonic() - begin
        board.check_alive()
        board.check()
        board.close()
    except BaseException as error:
        error.add_note(f"seed {seed}, after {guest.accesses} accesses; the last of them:\n{guest.last_accesses()}")
        raise
    finally:
        if watch:
            faulthandler.cancel_dump_traceback_later()
    return Report(guest, seconds, slowest_s, memory)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--accesses", type=int, default=1_000_000, help="how many accesses to ports and memory")
    parser.add_argument("--seed", type=int, default=None, help="of the random choices; default: a new one each time")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else time.time_ns() % (1 << 32)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="pyvmm-fuzz-") as directory:
        print(run(Path(directory), options.accesses, seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
