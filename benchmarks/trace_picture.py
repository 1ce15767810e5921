"""docs/trace-request.png: the way of one request, out of a real trace: python benchmarks/trace_picture.py OUT.png

The guest of ``pyvmm bench disk`` reads 4 KiB from an image that is not in the page cache, so that the request takes the
whole way: a worker of the drive waits for the disk. Of all such reads the one with the median time is drawn.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pyvmm.cli.bench import load

load()

import pyvmm  # noqa: E402
from pyvmm.block.options import DriveOptions  # noqa: E402
from pyvmm.trace.format import TraceFile  # noqa: E402
from pyvmm.trace.requests import Request, requests_of  # noqa: E402
from pyvmm_benchmarks import disk_cases  # noqa: E402
from pyvmm_benchmarks.mailbox import Mailbox, Memory  # noqa: E402
from pyvmm_benchmarks.plots import DPI, pyplot  # noqa: E402

CASE = "read_4k_qd1_irq"
REQUESTS = 200
LIMIT_S = 60.0
WHO = {
    "notice": "queue's thread wakes", "device": "header read, drive asked", "queue": "waits for a worker",
    "call": "preadv", "completion": "status written", "interrupt": "used ring shown, irqfd",
}  # fmt: skip


def traced(directory: Path) -> list[tuple[Request, TraceFile]]:
    """Reads that a worker has done."""
    (directory / "disk.rom").write_bytes(disk_cases.rom())
    image, path = directory / "disk.img", directory / "trace"
    with open(image, "wb") as file:
        for _ in range(disk_cases.IMAGE_MIB):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    case = next(case for case in disk_cases.CASES if case.name == CASE)
    drive = DriveOptions(str(image), interface="virtio")
    options = {"firmware": str(directory / "disk.rom"), "memory_mib": disk_cases.MEMORY_MIB, "drives": [drive]}
    with pyvmm.Machine(machine="pc", **options) as machine:
        machine.resume()
        box = Mailbox(Memory(os.getpid()), machine.memory.ram[0].host_address)
        end = time.monotonic() + LIMIT_S
        while not box.ready:
            assert time.monotonic() < end, "the guest does not begin"
            time.sleep(0.01)
        machine.start_trace(path)
        disk_cases.take(box, case, REQUESTS, LIMIT_S, lambda: True)
        machine.stop_trace()
    trace = TraceFile(str(path))
    return [(request, trace) for request in requests_of(trace) if "called" in request.points and request.drive]


def draw(request: Request, trace: TraceFile, count: int, out: str) -> None:
    """Each stage a row of its own, beginning where the one before it ends."""
    plt = pyplot()
    stages = request.stages()
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.42 * len(stages)), layout="constrained")
    whole = trace.ticks_ns(request.end - request.begin) / 1000
    for row, (_, begin, end) in enumerate(stages):
        left, width = (trace.ticks_ns(tsc) / 1000 for tsc in (begin - request.begin, end - begin))
        axes.barh(row, width, left=left, color=plt.get_cmap("tab10")(row), height=0.75)
        late = left + width / 2 > whole / 2
        axes.text(left if late else left + width, row, f" {width:.1f} us ", va="center", ha="right" if late else "left",
                  fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(stages)), [f"{name}: {WHO.get(name, name)}" for name, _, _ in stages], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, whole * 1.02)
    axes.grid(True, axis="x", alpha=0.25)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("us from the doorbell", fontsize=8)
    title = f"A read of {request.bytes} bytes by virtio, not in the page cache (the median of {count})"
    axes.set_title(title, fontsize=9)
    figure.savefig(out, dpi=DPI)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=os.path.expanduser("~")) as directory:
        found = traced(Path(directory))
        if not found:
            sys.exit("every read was answered by the page cache: give a directory on a disk by HOME")
        found.sort(key=lambda pair: pair[0].end - pair[0].begin)
        draw(*found[len(found) // 2], len(found), sys.argv[1])


if __name__ == "__main__":
    main()
