"""Stock Linux on an IDE disk, saved and thrown away at random moments: nothing lost, clocks right. By hand:

    ci/lab run -- .venv/bin/python tests/boot/saved_linux.py 20

boots Debian's kernel with two vCPUs, has it write and read files by DMA through so many lives, and checks the files,
the kernel's messages, and that its clock agrees with guest time. `--native` goes as far as software KVM runs a kernel.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import boot_assets
from console import SerialLine
from lives import Lives
from test_linux_disk import INITRD_INIT, make_root, sums

import pyvmm

APPEND = "console=ttyS0 panic=-1"
FILES = 4
LIMIT_S = 3600.0
LINE_BYTES = 4096  # of a console's output, in which its last line is
# The kernel's own words for time that went wrong, or a processor that did nothing for too long. ("Marking TSC unstable
# due to TSCs unsynchronized" is no such: it says so of every AMD processor without an invariant TSC, as the lab's is.)
COMPLAINTS = (
    *("soft lockup", "rcu_sched", "rcu_preempt detected stalls", "watchdog on CPU", "check_tsc_sync_source failed"),
    *("timed out", "hung_task", "exception Emask"),
)


class TimedLine(SerialLine):
    """Notes guest time, by ``now_s()``, when a line of the kernel's comes, beside the time that stands in it."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s: Callable[[], float] = lambda: 0.0
        self.times: list[tuple[float, float]] = []

    def _hear(self, data: bytes) -> None:
        super()._hear(data)
        # "[   12.345678] reboot: Power down"
        if found := re.findall(r"^\[ *(\d+\.\d+)\] ", self.output[-LINE_BYTES:], re.MULTILINE):
            kernel_s = float(found[-1])
            if not self.times or self.times[-1][1] != kernel_s:
                self.times.append((self.now_s(), kernel_s))

    def passed(self) -> tuple[float, float]:
        """Guest time and the kernel's, between its first process and its end: what it says before that comes late."""
        start = self.output.index("] Run /init")
        first = float(self.output[self.output.rindex("[", 0, start) + 1 : start])
        times = [(guest_s, kernel_s) for guest_s, kernel_s in self.times if kernel_s >= first]
        return times[-1][0] - times[0][0], times[-1][1] - times[0][1]


def lives(wanted: int, directory: Path) -> int:
    """A whole boot to the power-off, in at least ``wanted`` lives."""
    image = make_root(directory)
    modules = boot_assets.kernel("generic").modules("ata_piix", "sd_mod", "crc32c_generic", "ext4")
    initrd = boot_assets.initrd(INITRD_INIT, directory, modules)
    line = TimedLine()
    began = time.monotonic()

    def make() -> pyvmm.Machine:
        return pyvmm.Machine(
            machine="pc",
            cpus=2,
            memory_mib=256,
            drives=[str(image)],
            kernel=str(boot_assets.kernel("generic").vmlinux),
            initrd=str(initrd),
            append=f"{APPEND} tasks=dma:{FILES}",
            serial=line.chardev,
        )

    # The moments are spread over the boot and the work; a life's beginning takes as long as some seconds of it.
    with Lives(make, seed=1, longest_s=120.0 / wanted, long_life_s=60.0) as guest:
        line.now_s = lambda: guest.machine.clock.now_ns() / 1e9
        status = guest.to_the_end(LIMIT_S)
        count, guest_s = guest.count, guest.machine.clock.now_ns() / 1e9
    output = line.output
    said = {text.strip() for text in output.splitlines()}
    print(f"{count} lives, {guest_s:.1f} s of guest time in {time.monotonic() - began:.0f} s", flush=True)
    assert status == 0, output[-3000:]
    assert sums("dma", FILES) <= said, output[-3000:]
    assert "errors: 0" in said, output[-3000:]
    assert [word for word in COMPLAINTS if word in output] == [], output
    guest_s, kernel_s = line.passed()
    assert abs(guest_s - kernel_s) < 1, f"{guest_s:.1f} s of guest time, {kernel_s:.1f} s of the kernel's"
    print(f"since its first process {guest_s:.2f} s of guest time, {kernel_s:.2f} s of the kernel's")
    return count


def native(wanted: int) -> int:
    """What software KVM runs of a kernel with one vCPU: to its memory, 23 s on an idle machine."""
    kernel = boot_assets.kernel("cloud")
    line = SerialLine()

    def make() -> pyvmm.Machine:
        return pyvmm.Machine(
            memory_mib=128,
            kernel=str(kernel.vmlinux),
            cpu="host,-cx16,-xsave",
            append="console=ttyS0 earlyprintk=serial noxsave panic=-1",
            serial=line.chardev,
        )

    with Lives(make, seed=1, longest_s=40.0 / wanted) as guest:
        guest.until(lambda: "Memory: " in line.output and line.output.endswith("\n"), LIMIT_S)
        print(f"{guest.count} lives to {line.output.splitlines()[-1]!r}")
        return guest.count


def main() -> int:
    wanted = int(next((word for word in sys.argv[1:] if word.isdigit()), "20"))
    with tempfile.TemporaryDirectory() as directory:
        total = 0
        while total < wanted:
            total += native(wanted) if "--native" in sys.argv else lives(wanted, Path(tempfile.mkdtemp(dir=directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
