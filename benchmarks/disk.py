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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyvmm.block import image_tool
from pyvmm.block.options import DriveOptions
from pyvmm.cli.options import Option
from pyvmm.errors import ConfigError
from pyvmm_benchmarks.contenders.disk_contenders import DiskKind, OwnKind, QemuKind
from pyvmm_benchmarks.disk_cases import CASES, IMAGE_MIB, rom
from pyvmm_benchmarks.request_bench import RequestBench

# The disk in its image: as it is; in qcow2, all of it there; in qcow2 with nothing in it, where reads are of zeros and
# the first write to each cluster has to make it.
IMAGES = ("raw", "qcow2", "qcow2-empty")
MEMORY_DIRECTORY = "/dev/shm"


class DiskBench(RequestBench):
    verb = "disk"
    unit = "request"
    title = """\
usage: pyvmm bench disk [OPTIONS]

What a request to a disk on virtio takes, in pyvmm and in QEMU: time, system calls, wake-ups, calls of Python."""
    cases = CASES
    more_options = (
        Option("--format", "FORMAT", f"what the images are: {', '.join(IMAGES)} (default raw)"),
        Option("--directory", "DIR", f"where the images are made (default: {MEMORY_DIRECTORY})"),
    )

    def kinds(self) -> list[DiskKind]:
        return [
            *(QemuKind("threads"), QemuKind("io_uring"), QemuKind("io_uring", iothread=True)),
            *(OwnKind("threads"), OwnKind("io_uring"), QemuKind("nbd"), OwnKind("nbd")),
        ]

    def settings(self, given: dict[str, Any], contenders: Sequence[DiskKind]) -> dict[str, object]:
        image = image_of(given)
        for kind in contenders:
            kind.format = image.partition("-")[0]
        return {"format": image}

    def directory(self, given: dict[str, Any]) -> str | None:
        there = MEMORY_DIRECTORY if os.path.isdir(MEMORY_DIRECTORY) else None
        return given.get("directory") or there

    def before_set(self, directory: Path, contenders: Sequence[DiskKind], given: dict[str, Any]) -> None:
        make_images(directory, contenders, image_of(given))  # anew: what each has written to its own differs


def main(args: Sequence[str]) -> int:
    return DiskBench().main(args)


def image_of(given: dict[str, Any]) -> str:
    image: str = given.get("format", IMAGES[0])
    if image not in IMAGES:
        raise ConfigError(f"--format {image}: use {', '.join(IMAGES)}")
    return image


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
