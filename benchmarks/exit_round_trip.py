"""Exit round trip: one port access, from the guest to user space and back, against a minimal loop in C.

The same guest bytes run in every contender:

    floor      benchmarks/floor.c: KVM_RUN, look at the port, KVM_RUN
    unclaimed  pyvmm, a port nobody claims
    compiled   pyvmm, a LatchRegion: handled in compiled code, without the GIL
    python     pyvmm, a device in Python whose handler does ``self.count += 1``

The guest takes the times itself, by RDTSC, so that they are taken alike everywhere. `block`: a block of exits
in the tightest loop there is (OUT or IN, and LOOP), divided by their number; the median block. `exit`: each
single access; median and 99th percentile. Ratios are to the floor of the same round; their 95% interval is a
bootstrap over the rounds.

Own share is the time from leaving KVM_RUN to entering it again, by pyvmm's exit profiler: its histogram's
buckets double, so the median is interpolated; mean and minimum are exact. `over C` is the difference of the
`exit` medians: it also holds what pyvmm makes the kernel pay afterwards (caches and TLB), and what KVM_RUN
costs a process that has threads.

Rounds go A B C D D C B A, each contender in a fresh process pinned to one CPU.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import measure
from measure import US_PER_NS, histogram_quantile, interval, median, quantile

CONTENDERS = ("floor", "unclaimed", "compiled", "python")
DIRECTIONS = ("out", "in")
Rounds = list[dict[str, list[dict[str, float]]]]  # a round: contender -> its turns

BLOCK_EXITS = 20  # short enough that most blocks run undisturbed on a busy host


def pyvmm_contender(work: dict[str, Any]) -> dict[str, Any]:
    """In the child: one machine, one run."""
    import pyvmm

    class Counter(pyvmm.Device):
        """The device of the user's own: the least a handler can do and still do something."""

        def __init__(self) -> None:
            self.count = 0

        def read(self, offset: int, size: int) -> int:
            self.count += 1
            return 0

        def write(self, offset: int, size: int, value: int) -> None:
            self.count += 1

    direction, blocks, singles = work["direction"], work["blocks"], work["singles"]
    guest = busy_guest(direction, blocks, singles)
    with pyvmm.Machine(memory_mib=measure.MEMORY_MIB, flat=guest, debug_exit=measure.END_PORT) as m:
        counter, latch = Counter(), pyvmm.LatchRegion(1)
        if work["contender"] == "python":
            m.pio.map(measure.BUSY_PORT, 1, counter)
        elif work["contender"] == "compiled":
            m.pio.add(measure.BUSY_PORT, latch)
        m.run(timeout_s=120)
        row = next(r for r in m.exit_stats() if r.address == measure.BUSY_PORT and r.direction == direction)
        exits = blocks * BLOCK_EXITS + singles
        handled = {"python": counter.count, "compiled": latch.count}.get(work["contender"], row.count)
        if handled != exits:
            raise SystemExit(f"{handled} of {exits} accesses arrived")
        ticks = measure.samples_of(m.memory.read(measure.SAMPLES_AT, 4 * (blocks + singles)))
        tsc_khz = m.cpus[0].vcpu.tsc_khz
    return summary(ticks, blocks, tsc_khz) | {
        "own_p50": histogram_quantile(row.histogram_ns, 0.5),
        "own_p99": histogram_quantile(row.histogram_ns, 0.99),
        "own_mean": row.mean_ns,
        "own_min": row.min_ns,
    }


def busy_guest(direction: str, blocks: int, singles: int) -> bytes:
    return measure.busy_guest(measure.access(direction, measure.BUSY_PORT), blocks, BLOCK_EXITS, singles)


def summary(ticks: list[int], blocks: int, tsc_khz: int) -> dict[str, float]:
    """The guest's samples, ``blocks`` of them for whole blocks, in ns."""
    ns = 1e6 / tsc_khz
    return {
        "block": median(ticks[:blocks]) * ns / BLOCK_EXITS,
        "p50": median(ticks[blocks:]) * ns,
        "p99": quantile(ticks[blocks:], 0.99) * ns,
    }


def floor_contender(binary: str, guest: str, blocks: int, pin: int | None) -> dict[str, float]:
    lines = {}
    for line in measure.run([binary, "exits", guest, str(measure.MEMORY_MIB), "1"], pin).splitlines():
        name, *values = line.split()
        lines[name] = [int(v) for v in values]
    return summary(lines["guest"], blocks, lines["tsc_khz"][0])


def benchmark(args: argparse.Namespace, directory: str) -> None:
    binary = measure.build_floor(directory)
    blocks = max(2, args.exits // BLOCK_EXITS)
    singles = min(args.exits, measure.MOST_SAMPLES - blocks)
    for direction in DIRECTIONS:
        guest = os.path.join(directory, f"{direction}.bin")
        with open(guest, "wb") as file:
            file.write(busy_guest(direction, blocks, singles))
        rounds: Rounds = []
        for _ in range(args.rounds):
            found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
            for name in (*CONTENDERS, *reversed(CONTENDERS)):
                if name == "floor":
                    found[name].append(floor_contender(binary, guest, blocks, args.pin))
                else:
                    work = {"contender": name, "direction": direction, "blocks": blocks, "singles": singles}
                    found[name].append(measure.child(__file__, work, args.pin))
            rounds.append(found)
        report(direction, rounds, blocks * BLOCK_EXITS, singles)


def report(direction: str, rounds: Rounds, block_exits: int, singles: int) -> None:
    def of(name: str, key: str) -> list[float]:
        """One value a round: the mean of the contender's two turns in it."""
        return [sum(turn[key] for turn in found[name]) / len(found[name]) for found in rounds]

    print(
        f"{direction}: {len(rounds)} rounds, two turns each: {block_exits} exits in blocks, {singles} single ones"
    )
    against_c = f"{'x C':>7} {'(95%)':<15}"
    print(
        f"  {'':<10}{'block us':>9}{against_c}{'exit p50':>9}{'p99 us':>8}{against_c}{'over C':>8}"
        f" | own share ns: {'~p50':>6}{'~p99':>7}{'mean':>7}{'min':>6}"
    )
    for name in CONTENDERS:
        line = f"  {name:<10}"
        for key in ("block", "p50"):
            ratios = [a / b for a, b in zip(of(name, key), of("floor", key), strict=True)]
            low, high = interval(ratios)
            line += f"{median(of(name, key)) * US_PER_NS:>9.2f}"
            if key == "p50":
                line += f"{median(of(name, 'p99')) * US_PER_NS:>8.2f}"
            line += f"{median(ratios):>7.3f} " + f"({low:.3f}-{high:.3f})".ljust(15)
        if name != "floor":
            over = [a - b for a, b in zip(of(name, "p50"), of("floor", "p50"), strict=True)]
            line += f"{median(over):>8.0f} | {'':14}" + "".join(
                f"{median(of(name, key)):>{width}.0f}"
                for key, width in (("own_p50", 6), ("own_p99", 7), ("own_mean", 7), ("own_min", 6))
            )
        print(line)
    floor = of("floor", "block")
    print(
        f"  noise: the floor's block went from {min(floor) * US_PER_NS:.2f} to {max(floor) * US_PER_NS:.2f} us\n"
    )


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--exits", type=int, default=4000, help="a turn and way of timing (default 4000)")
    options.add_argument("--rounds", type=int, default=16, help="default 16")
    measure.main(pyvmm_contender, benchmark, options)
