"""qcow2 images with anything in them: opened, read, written, checked and mended, they cost a sentence at most.

``tests/unit/block/test_qcow2_fuzz.py`` does a few. For many, from a seed on:

    python tests/qcow2_fuzz.py 1000000 0

What must hold for each: nothing is raised but ConfigError; it takes less than LIMIT_S, and no more memory than a
machine of some hundred mebibytes has; the file takes no more room than what was written explains; the image below
stays as it is.
"""

from __future__ import annotations

import functools
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pyvmm.block import image_tool
from pyvmm.block.driver import SECTOR_BYTES
from pyvmm.block.image_tool import Opened
from pyvmm.block.options import DriveOptions
from pyvmm.errors import ConfigError

SIZE = 128 << 10
LIMIT_S = 5.0
ROOM_BYTES = 16 << 20  # what an image may grow by: its writes, their tables, and a refcount table's growth
MOST_MEMORY_BYTES = 1 << 30
HEADER_FIELDS = ((4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4),
                 (64, 8), (72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1), (112, 4), (116, 4))  # fmt: skip


def made(directory: Path) -> list[bytes]:
    """Images to begin with: both versions, small and usual clusters, over others, compressed, with snapshots."""
    found = []
    base = directory / "base"
    base.write_bytes(bytes(range(256)) * (SIZE // 512))
    for n, (options, below) in enumerate((
        ("cluster_size=512", False), ("cluster_size=512,refcount_bits=1", True), ("compat=0.10,cluster_size=512", True),
        ("cluster_size=4096", True), ("cluster_size=512,compression_type=zstd", False), ("cluster_size=65536", False),
        ("cluster_size=2048,lazy_refcounts=on", False),
    )):  # fmt: skip
        path = directory / f"made{n}"
        words = ["-b", "base", "-F", "raw"] if below else []
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *words, str(path), str(SIZE))
        writes = ["write -P 1 0 9k", "write -z 20k 6k", "write -P 3 70k 5k", "write -z -u 90k 4k"]
        if "refcount_bits=1" not in options:
            writes.insert(0, "write -c -P 2 64k 64k" if "65536" in options else "write -c -P 2 32k 4k")
        run("qemu-io", "-f", "qcow2", *(word for each in writes for word in ("-c", each)), str(path))
        if "refcount_bits=1" not in options:
            run("qemu-img", "snapshot", "-c", "one", str(path))
            run("qemu-io", "-f", "qcow2", "-c", "write -P 4 2k 3k", str(path))
        found.append(path.read_bytes())
    return found


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def mutated(image: bytes, rng: random.Random) -> bytes:
    """Some of its bytes changed: fields of the header, entries of tables, anything, or its end cut off."""
    data = bytearray(image)
    if rng.random() < 0.1:
        del data[rng.randrange(len(data)) :]
    if rng.random() < 0.05:
        data += rng.randbytes(rng.randrange(4096))
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        kind = rng.random()
        if kind < 0.25:
            at, width = rng.choice(HEADER_FIELDS)
        elif kind < 0.85:
            at, width = places(image, rng), 8
        else:
            at, width = rng.randrange(len(image)), rng.choice((1, 2, 8))
        if at + width <= len(data):
            data[at : at + width] = value(data, at, width, rng)
    return bytes(data)


def places(image: bytes, rng: random.Random) -> int:
    """An entry of one of its tables that is not zero, or one beside it."""
    at = rng.choice(entries(image))
    return at if rng.random() < 0.8 else at - 8


@functools.cache
def entries(image: bytes) -> list[int]:
    """Where something stands that looks like an entry: an offset with bits of a COPIED or compressed cluster's."""
    found = []
    for at in range(112, len(image) - 8, 8):
        entry = int.from_bytes(image[at : at + 8], "big")
        if entry and (entry & (1 << 62) or not entry & ~(1 << 63 | (1 << 24) - 512 | 1)):
            found.append(at)
    return found


def value(data: bytearray, at: int, width: int, rng: random.Random) -> bytes:
    """Something that may mean something there."""
    before = int.from_bytes(data[at : at + width], "big")
    offset = rng.choice((0, 512, len(data), len(data) - 512, 1 << 55, (1 << 56) - 512, 1 << 62, (1 << 63) - 512,
                         rng.randrange(0, len(data) + 4096, 512), *struct.unpack_from(">QQ", data.ljust(56, b"\0"), 40))
                        )  # fmt: skip
    chosen = rng.choice((
        before ^ 1 << rng.randrange(8 * width), offset, offset | 1 << 63, offset | 1, offset | 1 << 62,
        rng.getrandbits(8 * width), before + 1, (1 << 8 * width) - 1, rng.randrange(64), before ^ 1 << 63,
    ))  # fmt: skip
    return (chosen & (1 << 8 * width) - 1).to_bytes(width, "big")


def use(path: Path, rng: random.Random) -> None:
    """What may be done with an image."""
    tried(lambda: image_tool.info(str(path), "qcow2"))
    if rng.random() < 0.3:
        tried(lambda: image_tool.check(str(path), "qcow2", repair=rng.random() < 0.5))
    if rng.random() < 0.2:
        tried(lambda: read_all(DriveOptions(path, format="qcow2", read_only=True, internal_snapshot="one")))
    if rng.random() < 0.1:
        tried(lambda: image_tool.resize(str(path), "qcow2", rng.choice((SIZE * 2, 512, 1 << 40)), shrink=True))
    if tried(lambda: write_some(path, rng)):
        tried(lambda: read_all(DriveOptions(path, format="qcow2", read_only=True)))


def tried(work: object) -> bool:
    """Whether it was not refused."""
    try:
        work()  # type: ignore[operator]
        return True
    except ConfigError as error:
        assert "\n" not in str(error), str(error)
        return False


def read_all(options: DriveOptions) -> None:
    with Opened(options) as image, memoryview(bytearray(16384)) as view:
        for at in (*range(0, min(SIZE, image.disk.size_bytes), len(view)), image.disk.size_bytes - len(view)):
            if at >= 0:
                tried(lambda at=at: image.read(at, view))  # type: ignore[misc]


def write_some(path: Path, rng: random.Random) -> None:
    with Opened(DriveOptions(path, format="qcow2", cache="unsafe")) as image:
        sectors = image.disk.size_bytes // SECTOR_BYTES
        for _ in range(rng.randrange(1, 8)):
            count = rng.choice((1, 2, 16, 64))
            at = rng.randrange(min(sectors, SIZE // SECTOR_BYTES) or 1)
            if rng.random() < 0.1:
                at = sectors - count
            if at < 0 or at + count > sectors:
                continue
            kind = rng.random()
            if kind < 0.6:
                with memoryview(rng.randbytes(count * SECTOR_BYTES)) as view:
                    tried(lambda at=at, view=view: image.write(at * SECTOR_BYTES, view))  # type: ignore[misc]
            elif kind < 0.75:
                tried(lambda at=at, n=count: image.zero(at * SECTOR_BYTES, n * SECTOR_BYTES))  # type: ignore[misc]
            elif kind < 0.9:
                image.context.run(image.disk.co_discard(at * SECTOR_BYTES, count * SECTOR_BYTES))
            else:
                image.context.run(image.disk.co_settle())
        image.context.run(image.disk.co_settle())


def fuzz(directory: Path, count: int, seed: int, say: object = None) -> None:
    """AssertionError that names the seed, with the image beside it."""
    images = made(directory)
    base = (directory / "base").read_bytes()
    path = directory / "image"
    for number in range(seed, seed + count):
        rng = random.Random(number)
        image = mutated(rng.choice(images), rng)
        path.write_bytes(image)
        since = time.monotonic()
        try:
            use(path, rng)
            took_s = time.monotonic() - since
            assert took_s < LIMIT_S, f"it took {took_s:.1f} s"
            # An image that says that all up to somewhere is in use is written behind that; what is between is a hole.
            used = path.stat().st_blocks * SECTOR_BYTES
            assert used <= len(image) + ROOM_BYTES, f"the file takes {used} bytes"
        except BaseException as error:
            raise AssertionError(f"mutation {number}: {error!r}") from error
        if number % 1000 == 0:
            assert (directory / "base").read_bytes() == base, f"by {number} the image below was written"
            if say is not None:
                print(f"{number - seed} of {count}", flush=True)


def main(words: list[str]) -> None:
    count, seed = int(words[0]), int(words[1]) if len(words) > 1 else 0
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
    since = time.monotonic()
    with tempfile.TemporaryDirectory(dir=place) as name:
        fuzz(Path(name), count, seed, print)
    print(f"{count} mutations from {seed} on: {time.monotonic() - since:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
