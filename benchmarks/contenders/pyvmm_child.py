"""pyvmm with the guest of one case. The work is JSON in the first argument: cases.ExitCase's fields and the image.

Prints where guest RAM is; then, for each line it reads, its own share of the case's accesses.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import time
from typing import Any

import pyvmm
from pyvmm.cpu_exec import CpuExec

# As guests/exits/exits.inc has them.
OTHERS_PORT = 0xE8
OTHERS_PORTS = 4
MAILBOX = 0x18_0000
SAMPLES = 0x20_0000
TURN, DONE, WARM_UP, ANSWER = 0x08, 0x0C, 0x10, 0x24
SECTOR_BYTES = 512

LOOK_S = 0.0001
KICK_PAUSE_S = 0.0001


class Counter(pyvmm.Device):
    """A device of the user's own: the least a handler can do and still do something."""

    def __init__(self) -> None:
        self.count = 0

    def read(self, offset: int, size: int) -> int:
        self.count += 1
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.count += 1


class Sectors(pyvmm.Device):
    """Behind a FIFO window, as the IDE data port is: one call a sector, which opens the window for the next."""

    def __init__(self, reads: bool) -> None:
        self.sector = bytearray(SECTOR_BYTES)
        self.count = 0
        self.window = pyvmm.FifoRegion(4, self, self.next)
        self.open = self.window.open_read if reads else self.window.open_write
        self.open(self.sector)

    def next(self) -> None:
        self.count += 1
        self.open(self.sector)


def main() -> None:
    work = json.loads(sys.argv[1])
    options = {"cpus": work["cpus"], "testdev": work["irqs"], "memory_mib": work["memory_mib"]}
    with pyvmm.Machine(machine="microvm", flat=work["image"], flat_mode="long64", **options) as machine:
        make_device(machine, work)
        if work["doorbell"]:
            make_doorbell(machine, work)
        if work["coalesce"]:
            space, address = work["coalesce"]
            machine.coalesce(getattr(machine, space), address, 1 if space == "pio" else 4)
        base = machine.memory.ram[0].host_address
        # Asked before it runs: a vCPU in the guest keeps everybody else waiting until its next exit.
        khz = machine.cpus[0].vcpu.tsc_khz
        print(f"memory {base:#x} tsc_khz {khz}", flush=True)
        if work["kick"]:
            kick(machine)
        machine.resume()
        for _ in sys.stdin:
            print(json.dumps(own(machine, work, khz)), flush=True)


def make_device(machine: pyvmm.Machine, work: dict[str, Any]) -> None:
    """At the device's place, and one for each of the other processors."""
    kind = work["device"]
    if not kind:
        return
    space, address = work["at"]
    bus = getattr(machine, space)
    if kind == "python":
        bus.map(address, 4, Counter())
    elif kind == "compiled":
        bus.add(address, pyvmm.LatchRegion(4))
    else:
        bus.add(address, Sectors(reads=work["guest"].startswith("ins")).window)
    for other in range(min(work["cpus"] - 1, OTHERS_PORTS)):
        if kind == "python":
            machine.pio.map(OTHERS_PORT + other, 1, Counter())
        else:
            machine.pio.add(OTHERS_PORT + other, pyvmm.LatchRegion(1))


def make_doorbell(machine: pyvmm.Machine, work: dict[str, Any]) -> None:
    space, address = work["doorbell"]
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    getattr(machine, space).add(address, pyvmm.EventRegion(4, fd, write_size=1 if space == "pio" else 0))
    if work["answer"]:
        answer = machine.memory.view(MAILBOX + ANSWER, 4).cast("I")

        def wait() -> None:
            while True:
                answer[0] += os.eventfd_read(fd)

        threading.Thread(target=wait, daemon=True).start()


def own(machine: pyvmm.Machine, work: dict[str, Any], khz: int) -> dict[str, float] | None:
    """pyvmm's own share, ns: of the accesses of the first vCPU at the case's place."""
    space, address = work["at"]
    reason, where = ("IO", address) if space == "pio" else ("MMIO", address & ~0xFFF)
    rows = machine.cpus[0].exec.stats.rows(khz)
    row = next((each for each in rows if (each.reason, each.address) == (reason, where)), None)
    if row is None:
        return None
    return {
        "p50": quantile(row.histogram_ns, 0.5),
        "p99": quantile(row.histogram_ns, 0.99),
        "mean": row.mean_ns,
        "min": row.min_ns,
    }


def quantile(histogram: list[tuple[float, int]], q: float) -> float:
    """Buckets double: interpolated on a log scale."""
    target = q * sum(count for _, count in histogram)
    seen = 0
    for bound, count in histogram:
        if seen + count >= target:
            return bound / 2 * 2 ** ((target - seen) / count)
        seen += count
    return 0.0


def kick(machine: pyvmm.Machine) -> None:
    """Takes the turns itself: kicks the run loop out of the guest, timed until its ``run`` has returned."""
    loop = machine.cpus[0].exec
    tick_ns = 1e6 / machine.cpus[0].vcpu.tsc_khz
    out = threading.Semaphore(0)
    again = threading.Semaphore(0)
    out_at = 0

    def stay() -> None:
        nonlocal out_at
        CpuExec.prepare_thread()
        while True:
            loop.run()
            out_at = time.perf_counter_ns()
            out.release()
            again.acquire()

    threading.Thread(target=stay, daemon=True).start()
    box = machine.memory.view(MAILBOX, 0x40).cast("I")
    samples = machine.memory.view(SAMPLES, 1 << 20).cast("I")
    while True:
        while box[TURN // 4] == box[DONE // 4]:
            time.sleep(LOOK_S)
        warm_up, _, _, _, singles = struct.unpack_from("<5I", box.cast("B"), WARM_UP)
        for n in range(warm_up + singles):
            time.sleep(KICK_PAUSE_S)
            start = time.perf_counter_ns()
            loop.kick()
            out.acquire()
            if n >= warm_up:
                samples[n - warm_up] = round((out_at - start) / tick_ns)
            again.release()
        box[DONE // 4] = box[TURN // 4]


if __name__ == "__main__":
    main()
