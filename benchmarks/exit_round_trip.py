"""Exit round trip: one port access, from the guest to user space and back, against a minimal loop in C.

The same guest bytes run in every contender:

    floor      benchmarks/floor.c: KVM_RUN, look at the port, KVM_RUN
    unclaimed  pyvmm, a port nobody claims
    compiled   pyvmm, a LatchRegion: handled in compiled code, without the GIL
    python     pyvmm, a device in Python whose handler does ``self.count += 1``

The guest takes the times itself, by RDTSC, so that they are taken alike everywhere. `block`: a block of
exits in the tightest loop there is (OUT or IN, and LOOP), divided by their number; the median block.
`exit`: each single access; median and 99th percentile.

Each contender is a process of its own, pinned to one CPU. They run in turns of a few milliseconds, A B C
D D C B A: the guest of a process whose turn it is not waits inside its access of the gate port. A ratio
is that of one round's turns, so that what slows the host down slows both; the figure is the median over
all rounds, with a bootstrap 95% interval over rounds and over fresh sets of processes (where the pages of
a process happen to lie makes a difference that no number of rounds averages out).

Own share is the time from leaving KVM_RUN to entering it again, by pyvmm's exit profiler: its histogram's
buckets double, so the median is interpolated; mean and minimum are exact. `over C` is the difference of
the `exit` medians: it also holds what pyvmm makes the kernel pay afterwards (caches and TLB), and what
KVM_RUN costs a process that has threads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

import measure
from measure import US_PER_NS, histogram_quantile, interval, median, quantile

CONTENDERS = ("floor", "unclaimed", "compiled", "python")
DIRECTIONS = ("out", "in")

# A turn: short enough that most blocks, and most turns, run undisturbed on a busy host.
BLOCKS, BLOCK_EXITS, SINGLES = 15, 20, 200


def pyvmm_contender(work: dict[str, Any]) -> dict[str, float]:
    """In the child: one machine, one run."""
    import pyvmm

    class Counter(pyvmm.Device):
        """A device of the user's own: the least a handler can do and still do something."""

        def __init__(self) -> None:
            self.count = 0

        def read(self, offset: int, size: int) -> int:
            self.count += 1
            return 0

        def write(self, offset: int, size: int, value: int) -> None:
            self.count += 1

    class Gate(pyvmm.Device):
        """Hands over the samples of the last turn and waits for the next."""

        turns = 0

        def write(self, offset: int, size: int, value: int) -> None:
            if self.turns:
                samples = m.memory.read(measure.SAMPLES_AT, 4 * (BLOCKS + SINGLES))
                print(*measure.samples_of(samples), flush=True)
            else:
                print(m.cpus[0].vcpu.tsc_khz, flush=True)
            if sys.stdin.readline():
                self.turns += 1
            else:
                m.stop()

    with pyvmm.Machine(memory_mib=measure.MEMORY_MIB, flat=guest(work["direction"])) as m:
        gate, counter, latch = Gate(), Counter(), pyvmm.LatchRegion(1)
        m.pio.map(measure.GATE_PORT, 1, gate)
        if work["contender"] == "python":
            m.pio.map(measure.BUSY_PORT, 1, counter)
        elif work["contender"] == "compiled":
            m.pio.add(measure.BUSY_PORT, latch)
        m.run()
        row = next(r for r in m.exit_stats() if r.address == measure.BUSY_PORT)
        exits = gate.turns * (BLOCKS * BLOCK_EXITS + SINGLES)
        handled = {"python": counter.count, "compiled": latch.count}.get(work["contender"], row.count)
        if handled != exits:
            raise SystemExit(f"{handled} of {exits} accesses arrived")
    return {
        "own_p50": histogram_quantile(row.histogram_ns, 0.5),
        "own_p99": histogram_quantile(row.histogram_ns, 0.99),
        "own_mean": row.mean_ns,
        "own_min": row.min_ns,
    }


def guest(direction: str) -> bytes:
    access = measure.access(direction, measure.BUSY_PORT)
    return measure.busy_guest(access, BLOCKS, BLOCK_EXITS, SINGLES)


class Guest(measure.Contender):
    """A process at the gate, and what its turns gave, in ns."""

    def __init__(self, command: list[str], pin: int | None) -> None:
        super().__init__(command, pin)
        self.blocks: list[float] = []
        self.exits: list[float] = []
        self.all_exits: list[float] = []
        self._tick_ns = 1e6 / self.numbers()[0]

    def turn(self) -> None:
        self.go()
        ns = [ticks * self._tick_ns for ticks in self.numbers()]
        self.blocks.append(median(ns[:BLOCKS]) / BLOCK_EXITS)
        self.exits.append(median(ns[BLOCKS:]))
        self.all_exits += ns[BLOCKS:]


class Found:
    """One contender over all sets of processes: a list a set."""

    def __init__(self) -> None:
        self.block: list[list[float]] = []  # a value a round, the mean of its two turns
        self.exit: list[list[float]] = []
        self.p99: list[float] = []
        self.own: list[dict[str, float]] = []

    def take(self, contender: Guest) -> None:
        for series, turns in ((self.block, contender.blocks), (self.exit, contender.exits)):
            series.append([(a + b) / 2 for a, b in zip(turns[::2], turns[1::2], strict=True)])
        self.p99.append(quantile(contender.all_exits, 0.99))
        rest = contender.end()
        if rest.startswith("{"):
            self.own.append(json.loads(rest))


def benchmark(args: argparse.Namespace, directory: str) -> None:
    binary = measure.build_floor(directory)
    for direction in DIRECTIONS:
        image = os.path.join(directory, f"{direction}.bin")
        with open(image, "wb") as file:
            file.write(guest(direction))
        found = {name: Found() for name in CONTENDERS}
        for _ in range(args.sets):
            started = {}
            for name in CONTENDERS:
                work = {"contender": name, "direction": direction}
                command = measure.child_command(__file__, work)
                if name == "floor":
                    command = [binary, "exits", image, str(measure.MEMORY_MIB), "1"]
                started[name] = Guest(command, args.pin)
            for _ in range(args.rounds):
                for name in (*CONTENDERS, *reversed(CONTENDERS)):
                    started[name].turn()
            for name in CONTENDERS:
                found[name].take(started[name])
        report(direction, found)


def report(direction: str, found: dict[str, Found]) -> None:
    floor = found["floor"]
    sets, rounds = len(floor.block), len(floor.block[0])
    print(f"{direction}: {sets} sets of processes, {rounds} rounds each")
    against_c = f"{'x C':>7} {'(95%)':<15}"
    print(
        f"  {'':<10}{'block us':>9}{against_c}{'exit p50':>9}{'p99 us':>8}{against_c}{'over C':>8}"
        f" | own share ns: {'~p50':>6}{'~p99':>7}{'mean':>7}{'min':>6}"
    )
    for name, one in found.items():
        line = f"  {name:<10}{overall(one.block) * US_PER_NS:>9.2f}{ratio(one.block, floor.block)}"
        line += f"{overall(one.exit) * US_PER_NS:>9.2f}{median(one.p99) * US_PER_NS:>8.2f}"
        line += ratio(one.exit, floor.exit)
        if one.own:
            over = [a - b for x, y in zip(one.exit, floor.exit, strict=True) for a, b in zip(x, y, strict=True)]
            own = [median([each[key] for each in one.own]) for key in ("own_p50", "own_p99", "own_mean", "own_min")]
            line += f"{median(over):>8.0f} | {'':14}{own[0]:>6.0f}{own[1]:>7.0f}{own[2]:>7.0f}{own[3]:>6.0f}"
        print(line)
    sets_us = ", ".join(f"{median(each) * US_PER_NS:.2f}" for each in floor.block)
    print(f"  noise: the floor's block in each set, us: {sets_us}\n")


def overall(series: list[list[float]]) -> float:
    return median([value for each in series for value in each])


def ratio(series: list[list[float]], floor: list[list[float]]) -> str:
    groups = [[a / b for a, b in zip(x, y, strict=True)] for x, y in zip(series, floor, strict=True)]
    low, high = interval(groups)
    return f"{overall(groups):>7.3f} {f'({low:.3f}-{high:.3f})':<15}"


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--sets", type=int, default=6, help="of fresh processes (default 6)")
    options.add_argument("--rounds", type=int, default=40, help="a set (default 40)")
    measure.main(pyvmm_contender, benchmark, options)
