"""Two vCPUs that hammer two Python devices: what the GIL does to an exit.

Every vCPU writes to a port of its own, behind which stands a device of its own whose handler does
``self.count += 1``. The guest times each access by RDTSC, after a barrier, and goes on hammering until
the last vCPU has its samples. Contenders:

    1 compiled, 2 compiled    one vCPU and two, LatchRegions: no GIL at all
    1 python                  one vCPU alone
    1+1 python                two processes with one such machine each, at once: no GIL in common
    2 python                  one machine, two vCPUs, two devices: one GIL

What `2 python` has over `1+1 python` is the GIL, and what else two vCPUs of one VM share: `2 compiled`
against `1 compiled` shows that. On a host with fewer free CPUs than vCPUs the 99th percentiles are those
of the host's scheduler: compare the lines, and look at the load.

Rounds go A B C D E E D C B A.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from typing import Any

import measure
from measure import US_PER_NS, histogram_quantile, interval, median, quantile

# name: (vCPUs, device, processes at once)
CONTENDERS = {
    "1 compiled": (1, "compiled", 1),
    "2 compiled": (2, "compiled", 1),
    "1 python": (1, "python", 1),
    "1+1 python": (1, "python", 2),
    "2 python": (2, "python", 1),
}
DONE_PORT = 0x12
PORTS = (0x14, 0x16)
ENTRIES = (0x7C00, 0x7E00)
SAMPLES_AT = (0x1_0000, 0x2_0000)
BARRIER = 0x600
WARM_UP = 500


def guest(cpu: int, cpus: int, singles: int) -> bytes:
    """Real-mode code for one vCPU."""
    access = measure.access("out", PORTS[cpu])
    return (
        measure.store_at(SAMPLES_AT[cpu])
        + b"\xf0\xfe\x06" + measure.word(BARRIER)  # lock inc byte [BARRIER]
        + b"\x80\x3e" + measure.word(BARRIER) + bytes([cpus])  # wait: cmp byte [BARRIER], cpus
        + b"\x75\xf9"  # jne wait
        + measure.repeat(WARM_UP, access)
        + measure.repeat(singles, measure.timed(access))
        + measure.access("out", DONE_PORT)
        + access + b"\xeb\xfc"  # on: access; jmp on
    )  # fmt: skip


def pyvmm_contender(work: dict[str, Any]) -> list[dict[str, float]]:
    """In the child: one machine, one run; a dict a vCPU."""
    import pyvmm

    class Counter(pyvmm.Device):
        def __init__(self) -> None:
            self.count = 0

        def write(self, offset: int, size: int, value: int) -> None:
            self.count += 1

    class Done(pyvmm.Device):
        """Ends the run when every vCPU has its samples."""

        def __init__(self) -> None:
            self.left = work["cpus"]

        def write(self, offset: int, size: int, value: int) -> None:
            self.left -= 1
            if not self.left:
                m.stop()

    cpus, singles = work["cpus"], work["singles"]
    image = guest(0, cpus, singles).ljust(ENTRIES[1] - ENTRIES[0], b"\0") + guest(1, cpus, singles)
    found = []
    with pyvmm.Machine(memory_mib=measure.MEMORY_MIB, flat=image, cpus=cpus) as m:
        m.pio.map(DONE_PORT, 1, Done())
        for port in PORTS[:cpus]:
            if work["device"] == "python":
                m.pio.map(port, 1, Counter())
            else:
                m.pio.add(port, pyvmm.LatchRegion(1))
        for cpu, entry in zip(m.cpus[1:], ENTRIES[1:], strict=False):
            # No INIT and SIPI: straight to where the first one would send it.
            cpu.sregs = m.cpus[0].sregs
            cpu.regs = m.cpus[0].regs | {"rip": entry}
            cpu.vcpu.mp_state = 0
        print(flush=True)  # ready
        sys.stdin.readline()
        m.run(timeout_s=120)
        for cpu, at, port in zip(m.cpus, SAMPLES_AT, PORTS, strict=False):
            khz = cpu.vcpu.tsc_khz
            ticks = [t * 1e6 / khz for t in measure.samples_of(m.memory.read(at, 4 * singles))]
            row = next(r for r in cpu.exec.stats.rows(khz) if r.address == port)
            found.append(
                {
                    "p50": median(ticks),
                    "p99": quantile(ticks, 0.99),
                    "own_p50": histogram_quantile(row.histogram_ns, 0.5),
                    "own_p99": histogram_quantile(row.histogram_ns, 0.99),
                }
            )
    return found


def together(work: dict[str, Any], processes: int) -> list[dict[str, float]]:
    """The contender in as many processes at once; they start running at the same moment."""
    command = measure.child_command(__file__, work)
    with ExitStack() as stack:
        started = [stack.enter_context(measure.Contender(command)) for _ in range(processes)]
        for process in started:
            process.numbers()
        for process in started:
            process.go()
        return [each for process in started for each in json.loads(process.end())]


def benchmark(args: argparse.Namespace, directory: str) -> None:
    singles = min(args.exits, measure.MOST_SAMPLES)
    rounds: list[dict[str, list[dict[str, float]]]] = []
    for _ in range(args.rounds):
        found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for name in (*CONTENDERS, *reversed(CONTENDERS)):
            cpus, device, processes = CONTENDERS[name]
            found[name] += together({"cpus": cpus, "device": device, "singles": singles}, processes)
        rounds.append(found)
    report(rounds, singles)


def report(rounds: list[dict[str, list[dict[str, float]]]], singles: int) -> None:
    def of(name: str, key: str) -> list[float]:
        """Every vCPU of every turn."""
        return [each[key] for found in rounds for each in found[name]]

    print(f"out: {len(rounds)} rounds, two turns each, {singles} exits a vCPU; medians over vCPUs and turns, us")
    print(f"  {'':<12}{'p50':>7}{'p99':>8}{'p99/p50':>9} {'(95%)':<13} | own share {'~p50':>7}{'~p99':>8}")
    for name in CONTENDERS:
        ratios = [a / b for a, b in zip(of(name, "p99"), of(name, "p50"), strict=True)]
        low, high = interval([[each] for each in ratios])
        print(
            f"  {name:<12}{median(of(name, 'p50')) * US_PER_NS:>7.2f}"
            f"{median(of(name, 'p99')) * US_PER_NS:>8.2f}"
            f"{median(ratios):>9.2f} {f'({low:.2f}-{high:.2f})':<13} | {'':9}"
            f"{median(of(name, 'own_p50')) * US_PER_NS:>8.2f}{median(of(name, 'own_p99')) * US_PER_NS:>8.2f}"
        )
    for key in ("p50", "p99"):
        over = (median(of("2 python", key)) - median(of("1+1 python", key))) * US_PER_NS
        print(f"  one GIL instead of two adds {over:+.2f} us to the {key}")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--exits", type=int, default=10_000, help="a vCPU and turn (default 10000)")
    options.add_argument("--rounds", type=int, default=8, help="default 8")
    measure.main(pyvmm_contender, benchmark, options)
