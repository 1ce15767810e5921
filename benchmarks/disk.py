"""``pyvmm bench disk``: what a request to a disk on virtio takes, in pyvmm and in QEMU.

One guest with a driver of its own (guests/disk/virtio_blk.S) is the firmware of a pc with one virtio-blk-pci disk. Its
image lies in memory (tmpfs), a copy for each contender, so that what is measured is the way there. Contenders take
turns, A B C C B A; whose turn it is not is stopped. A ratio is that of one round. All of them must have read the same.

After the timed turns there are three more: one with perf counting system calls, one with the kernel's count of how
often a thread went to sleep, one with Python's calls counted. They are per request, of the whole process; the guest's
own exits to user space are system calls too (KVM_RUN).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pyvmm.block import image_tool
from pyvmm.block.options import DriveOptions
from pyvmm.cli.options import Option, parse, usage
from pyvmm.errors import ConfigError
from pyvmm_benchmarks import environment
from pyvmm_benchmarks.contenders.disk_contenders import DiskKind, OwnKind, QemuKind
from pyvmm_benchmarks.disk_cases import CASES, IMAGE_MIB, rom
from pyvmm_benchmarks.exits import chosen
from pyvmm_benchmarks.report import TOLERANCE, Report, case_lines, print_comparison
from pyvmm_benchmarks.request_turns import Found, one_set

REFERENCE = "qemu-threads"
# The disk in its image: as it is; in qcow2, all of it there; in qcow2 with nothing in it, where reads are of zeros and
# the first write to each cluster has to make it.
IMAGES = ("raw", "qcow2", "qcow2-empty")
SETS, ROUNDS = 3, 10
QUICK_SETS, QUICK_ROUNDS = 1, 4
MEMORY_DIRECTORY = "/dev/shm"

OPTIONS = (
    Option("--quick", "", "fewer sets of processes, fewer rounds"),
    Option("--cases", "A,B", "only these (see --list)"),
    Option("--contenders", "A,B", f"only these; {REFERENCE} is the reference"),
    Option("--sets", "N", f"sets of fresh processes (default {SETS})", int),
    Option("--rounds", "N", f"rounds a set (default {ROUNDS})", int),
    Option("--scale", "N", "requests a turn, times this (default 1)", float),
    Option("--pin", "CPU|none", "where the vCPU runs; all other threads run elsewhere (default: the last one)"),
    Option("--format", "FORMAT", f"what the images are: {', '.join(IMAGES)} (default raw)"),
    Option("--directory", "DIR", f"where the images are made (default: {MEMORY_DIRECTORY})"),
    Option("--json", "FILE", "write everything found to FILE"),
    Option("--compare", "OLD.json", "print what changed beyond noise; exit status 1 on a regression of pyvmm"),
    Option("--tolerance", "PART", f"changes up to this part are noise (default {TOLERANCE})", float),
    Option("--list", "", "the cases and the contenders"),
    Option("--help -h", "", "this"),
)

TITLE = """\
usage: pyvmm bench disk [OPTIONS]

What a request to a disk on virtio takes, in pyvmm and in QEMU: time, system calls, wake-ups, calls of Python."""


def kinds() -> list[DiskKind]:
    """Every contender there may be, the reference first."""
    return [
        *(QemuKind("threads"), QemuKind("io_uring"), QemuKind("io_uring", iothread=True)),
        *(OwnKind("threads"), OwnKind("io_uring"), QemuKind("nbd"), OwnKind("nbd")),
    ]


def main(args: Sequence[str]) -> int:
    given = parse(OPTIONS, args, verb="bench disk")
    if given.get("help"):
        print(usage(TITLE, OPTIONS), end="")
        return 0
    if given.get("list"):
        print("cases:", *(f"  {case.name:<20}{case.title}" for case in CASES), sep="\n")
        print("contenders:", *(f"  {k.name:<20}{k.version() or 'comes with pyvmm'}" for k in kinds()), sep="\n")
        return 0
    old = Report.read(given["compare"], "disk") if "compare" in given else None
    report = measured(given)
    if "json" in given:
        report.write(given["json"])
    return 0 if old is None else print_comparison(old, report, given.get("tolerance", TOLERANCE))


def measured(given: dict[str, object]) -> Report:
    cases = chosen(str(given.get("cases", "")), CASES, "case")
    contenders = chosen(str(given.get("contenders", "")), kinds(), "contender")
    quick = bool(given.get("quick"))
    sets = int(str(given.get("sets", QUICK_SETS if quick else SETS)))
    rounds = int(str(given.get("rounds", QUICK_ROUNDS if quick else ROUNDS)))
    scale = float(str(given.get("scale", 1)))
    if sets < 1 or rounds < 1:
        raise ConfigError("--sets and --rounds: give at least 1")
    try:
        pin = environment.choose_pin(str(given["pin"]) if "pin" in given else None)
    except ValueError:
        raise ConfigError(f"--pin {given['pin']}: give the number of a CPU, or none") from None
    image = str(given.get("format", IMAGES[0]))
    if image not in IMAGES:
        raise ConfigError(f"--format {image}: use {', '.join(IMAGES)}")
    for kind in contenders:
        kind.format = image.partition("-")[0]
    settings = {"format": image, "sets": sets, "rounds": rounds, "scale": scale, "pin": pin}
    programs = {kind.name: version for kind in contenders if (version := kind.version()) is not None}
    report = Report("disk", environment.describe(pin, programs), settings)
    print("\n".join(environment.lines(report.host)) + "\n", flush=True)
    place = str(given.get("directory", MEMORY_DIRECTORY if os.path.isdir(MEMORY_DIRECTORY) else "")) or None
    with tempfile.TemporaryDirectory(dir=place) as name, environment.left_to_contenders(pin):
        directory = Path(name)
        found = {case.name: Found(case, contenders, REFERENCE, "request") for case in cases}
        for _ in range(sets):
            make_images(directory, contenders, image)  # anew: what each has written to its own differs
            one_set(cases, contenders, directory, found, rounds, scale, pin)
        for one in found.values():
            report.cases.append(one.case_report())
            print("\n".join([*case_lines(report.cases[-1]), *one.count_lines(), ""]), flush=True)
    return report


def make_images(directory: Path, contenders: Sequence[DiskKind], what: str) -> None:
    (directory / "disk.rom").write_bytes(rom())
    first = directory / "disk.img"
    if what == "qcow2-empty":
        image_tool.create(str(first), "qcow2", IMAGE_MIB << 20)
    else:
        with open(first, "wb") as file:
            source = random.Random(1)
            for _ in range(IMAGE_MIB):
                file.write(source.randbytes(1 << 20))
        if what == "qcow2":
            packed = directory / "disk.qcow2"
            image_tool.convert(DriveOptions(first, format="raw"), str(packed), "qcow2", preallocation="metadata")
            packed.replace(first)
    for kind in contenders:
        image = directory / f"{kind.name}.img"
        shutil.copyfile(first, image)
        kind.on_image(image)
    first.unlink()
