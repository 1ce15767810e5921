"""What a trace costs an exit: python benchmarks/trace_cost.py [--rounds N] [--cases A,B].

One machine in this process, whose guest (of ``pyvmm bench exits``) takes turns: without a trace, with one, with one,
without, a few milliseconds each, so that what slows the host down slows both. Printed is the ratio of the medians of
each round's turns, the median over all rounds with a bootstrap 95% interval; and what of the records was dropped.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pyvmm.cli.bench import load

load()

import pyvmm  # noqa: E402
from pyvmm_benchmarks import exit_guests  # noqa: E402
from pyvmm_benchmarks.cases import CASES, ExitCase  # noqa: E402
from pyvmm_benchmarks.contenders.pyvmm_child import make_device  # noqa: E402
from pyvmm_benchmarks.mailbox import MEMORY_MIB, Mailbox, Memory, Plan  # noqa: E402

PLAN = Plan(warm_up=50, pairs=6, short=5, long=40, singles=60)
LIMIT_S = 20.0


def cost_of(case: ExitCase, rounds: int, directory: Path) -> tuple[list[float], list[float], int]:
    """Median ticks of a single access, without and with a trace, of each round; and how many records were dropped."""
    image = directory / "guest.bin"
    image.write_bytes(exit_guests.payload(case.guest))
    without, traced, dropped = [], [], 0
    options = {"cpus": case.cpus, "memory_mib": MEMORY_MIB}
    with pyvmm.Machine(machine="microvm", flat=str(image), flat_mode="long64", **options) as machine:
        make_device(machine, case._asdict())
        memory = Memory(os.getpid())
        box = Mailbox(memory, machine.memory.ram[0].host_address)
        machine.resume()
        end = time.monotonic() + LIMIT_S
        while not box.ready:
            assert time.monotonic() < end, "the guest does not begin"
            time.sleep(0.001)
        for n in range(-2, rounds):
            found: dict[bool, list[int]] = {False: [], True: []}
            for on in ((False, True, True, False), (True, False, False, True))[n % 2]:
                if on:
                    machine.start_trace(directory / "trace")
                found[on] += box.take(PLAN, LIMIT_S).singles
                if on:
                    dropped += machine.stop_trace()
            if n >= 0:
                without.append(statistics.median(found[False]))
                traced.append(statistics.median(found[True]))
        memory.close()
    return without, traced, dropped


def interval(values: list[float]) -> tuple[float, float]:
    chance = random.Random(1)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(1000))
    return medians[25], medians[-26]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--cases", default="outl_to_compiled,inl_from_compiled,outl_to_python,mmio_write_compiled")
    given = parser.parse_args()
    for case in [case for case in CASES if case.name in given.cases.split(",")]:
        with tempfile.TemporaryDirectory() as directory:
            without, traced, dropped = cost_of(case, given.rounds, Path(directory))
        ratios = [on / off for on, off in zip(traced, without, strict=True)]
        low, high = interval(ratios)
        print(
            f"{case.name:<22} {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}] times an exit without a trace"
            f" ({statistics.median(without):.0f} ticks), {dropped} records dropped",
            flush=True,
        )


if __name__ == "__main__":
    main()
