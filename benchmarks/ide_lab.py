"""IDE DMA from a stock Linux: its own ata_piix driver, O_DIRECT, one request in flight, pyvmm beside QEMU.

    ci/lab run -- .venv/bin/python benchmarks/ide_lab.py

It needs a KVM that runs Linux: the nested lab, where this machine has none. Debian's generic kernel boots with
the program guests/disk_io.c, which is told over the serial port to read or write: 1 MiB transfers in order, to memory
in one piece and to memory in pieces of 4 KiB (two commands, of 128 pieces each), 4 KiB at random places (the same ones
each time). Both machines are built alike: one vCPU, 256 MiB, cache=writeback, aio=threads. They take turns, A B B A;
whose turn it is not stands still.

In the lab `/` is a 9p share under a tmpfs, and neither is like the file systems images lie on: 9p would measure
the host's server, and tmpfs refuses O_DIRECT and RWF_NOWAIT. So the images stand on ext4 on a RAM disk (brd),
made here; elsewhere on the temporary directory, or --directory. All of an image is in the page cache: what is
measured is the way there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import measure
import told
from measure import median

sys.path.insert(0, str(measure.ROOT / "tests"))
import boot_assets

MIB = 1 << 20
# Name, request, bytes a transfer, transfers a turn, how many times QEMU's speed it should have.
CASES = (
    ("read 1 MiB", "read", MIB, 24, 0.9),
    ("  4 KiB pieces", "readpages", MIB, 24, 0.9),
    ("write 1 MiB", "write", MIB, 24, 0.9),
    ("  4 KiB pieces", "writepages", MIB, 24, 0.9),
    ("random read 4 KiB", "random", 4096, 200, 0.8),
    ("random write 4 KiB", "randomwrite", 4096, 200, 0.8),
)
CONTENDERS = ("qemu", "pyvmm")
IMAGE_MIB = 128
RAM_DISK_MIB = 450
# An emulated host loses an interrupt once in a while, whatever the VMM: then the set is begun anew, and it is said.
TRIES = 3
MEMORY_MIB = 256
APPEND = "console=ttyS0 quiet panic=-1 nokaslr hugepages=1"

INIT = """\
stty -F /dev/ttyS0 -echo raw
n=0
while [ ! -b /dev/sda ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
echo "mode $(cat /sys/class/ata_device/dev1.0/xfer_mode)"
/bin/disk_io /dev/sda </dev/ttyS0 >/dev/ttyS0 2>&1
poweroff -f
"""


@contextlib.contextmanager
def place(args: argparse.Namespace) -> Iterator[Path]:
    """Where the images stand."""
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        if args.directory or "PYVMM_LAB" not in os.environ:
            yield Path(directory)
            return
        kernel = boot_assets.kernel("generic")
        for module in kernel.modules("brd", "crc32c_generic", "ext4"):
            options = [f"rd_size={RAM_DISK_MIB * 1024}", "rd_nr=1"] if module.name.startswith("brd.") else []
            plain = Path(directory, "module.ko")
            plain.write_bytes(boot_assets.module_bytes(module))
            # One that the lab itself has loaded is refused, and no matter.
            subprocess.run([boot_assets.busybox(), "insmod", plain, *options], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "/dev/ram0"], check=True)
        mounted = Path(directory, "images")
        mounted.mkdir()
        subprocess.run([boot_assets.busybox(), "mount", "-t", "ext4", "/dev/ram0", mounted], check=True)
        try:
            yield mounted
        finally:
            subprocess.run([boot_assets.busybox(), "umount", mounted], check=True)


class Linux(told.Guest):
    """A booted Linux whose disk_io takes requests."""

    def __init__(self, contender: str, image: Path, initrd: Path) -> None:
        self.contender = contender
        work = {
            "contender": contender,
            "image": str(image),
            "memory_mib": MEMORY_MIB,
            "kernel": str(boot_assets.kernel("generic").vmlinux),
            "initrd": str(initrd),
            "append": APPEND,
        }
        super().__init__(__file__, work)

    def move(self, case: int, count: int, used: told.Used | None = None, *, perf: bool = False) -> tuple[int, str]:
        """Nanoseconds of ``count`` transfers, and the checksum of what they moved."""
        _, what, size, _, _ = CASES[case]
        answer = self.turn(f"{what} {size} {count}\n".encode(), perf=perf)
        if not answer["said"].startswith("T "):
            raise SystemExit(f"{self.contender}: {answer['said']}")
        if used is not None:
            if perf and answer["exits"] is not None:
                used.exits = answer["exits"] / count
            elif not perf:
                used.take(answer, count)
        _, ns, checksum = answer["said"].split()
        return int(ns), checksum


def benchmark(args: argparse.Namespace, images: Path, directory: Path) -> None:
    program = directory / "disk_io"
    source = str(measure.HERE / "guests" / "disk_io.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-static", "-o", str(program), source], check=True)
    modules = boot_assets.kernel("generic").modules("ata_piix", "sd_mod")
    initrd = boot_assets.initrd(INIT, directory, modules, {"bin/disk_io": program.read_bytes()})
    image = images / "disk.img"
    image.write_bytes(random.Random(1).randbytes(IMAGE_MIB * MIB))
    names = [name for name in CONTENDERS if name in args.contenders]
    found = {name: [told.Used() for _ in CASES] for name in names}
    for _ in range(args.sets):
        for left in reversed(range(TRIES)):
            try:
                taken = one_set(args, names, {name: images / f"{name}.img" for name in names}, image, initrd)
            except told.Ended as error:
                if not left:
                    raise
                print(f"once more, after: {error}", flush=True)
                continue
            for name in names:
                for total, used in zip(found[name], taken[name], strict=True):
                    total.add(used)
            break
    report(args, found)


def one_set(
    args: argparse.Namespace, names: list[str], copies: dict[str, Path], image: Path, initrd: Path
) -> dict[str, list[told.Used]]:
    """Fresh machines, all cases."""
    taken = {name: [told.Used() for _ in CASES] for name in names}
    started: dict[str, Linux] = {}
    try:
        for name, copy in copies.items():
            shutil.copy(image, copy)
            started[name] = Linux(name, copy, initrd)
        for case, _ in enumerate(CASES):
            rounds(args, case, started, {name: taken[name][case] for name in names})
    finally:
        for each in started.values():
            with each, contextlib.suppress(OSError, subprocess.TimeoutExpired):
                each.end()
    return taken


def rounds(args: argparse.Namespace, case: int, started: dict[str, Linux], found: dict[str, told.Used]) -> None:
    count = max(1, round(CASES[case][3] * args.scale))
    checksums = set()
    for name, guest in started.items():
        found[name].times.append([])
        checksums.add(guest.move(case, count, found[name], perf=True)[1])  # warm up
    if len(checksums) > 1:
        raise SystemExit(f"{CASES[case][0]}: the contenders moved different data: {checksums}")
    for _ in range(args.rounds):
        times = dict.fromkeys(started, 0)
        for name in (*started, *reversed(started)):
            times[name] += started[name].move(case, count, found[name])[0]
        for name, value in times.items():
            found[name].times[-1].append(value)


def report(args: argparse.Namespace, found: dict[str, list[told.Used]]) -> None:
    print(f"{args.sets} sets of processes, {args.rounds} rounds each, two turns a round")
    head = f"{'MiB/s':>9}{'/s':>9}{'x QEMU':>8} {'(95%)':<14}{'mark':>5}{'exits':>8}{'us':>9}{'own':>8}"
    print(f"{'':<20}{'':<7}{head}   a transfer")
    for case, (title, _, size, transfers, mark) in enumerate(CASES):
        for name, columns in found.items():
            one = columns[case]
            count = 2 * max(1, round(transfers * args.scale))
            rate = count / (median([t for each in one.times for t in each]) * 1e-9)
            text = f"{title if name == next(iter(found)) else '':<20}{name:<7}{rate * size / MIB:>9.1f}{rate:>9.0f}"
            if name == "pyvmm" and "qemu" in found:
                ratio, low, high = told.ratios(found["qemu"][case], one)
                text += f"{ratio:>8.2f} {f'({low:.2f}-{high:.2f})':<14}{mark:>4.1f}{'+' if ratio >= mark else '-'}"
            else:
                text += f"{'':>8} {'':<14}{'':>5}"
            text += f"{'' if one.exits is None else f'{one.exits:.1f}':>8}{1e6 / rate:>9.0f}"
            if one.rows:
                text += f"{one.own_us:>8.0f}"
            print(text)
            if args.ports:
                one.print_rows("transfer")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        told.child(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("contenders", nargs="*", default=list(CONTENDERS), help="of qemu, pyvmm")
    parser.add_argument("--sets", type=int, default=1, help="of fresh processes (default 1)")
    parser.add_argument("--rounds", type=int, default=8, help="a set (default 8)")
    parser.add_argument("--scale", type=float, default=1.0, help="transfers a turn, times this")
    parser.add_argument("--ports", action="store_true", help="where pyvmm's own time goes, by port")
    parser.add_argument("--directory", help="where the images are made")
    args = parser.parse_args()
    measure.print_host(None)
    with place(args) as images, tempfile.TemporaryDirectory() as directory:
        benchmark(args, images, Path(directory))


if __name__ == "__main__":
    main()
