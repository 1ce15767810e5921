"""Requests without sense to a disk on virtio: headers, data and status in any shape and any place of a chain.

    python tests/fuzz/virtio_blk.py [--cases N] [--seed N]     so many inputs by a generator
    python tests/fuzz/fuzz_virtio_blk.py [libFuzzer options]   the same target, fed by atheris

Nothing may raise. A status is one of three; a device breaks for nothing but a request without header or status; and the
image around the disk stays as it is.
"""

from __future__ import annotations

import random
import struct
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "virtio"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from blk_bench import BlkBench
from fuzz.cases import arguments
from fuzz.cases import run as run_bytes

from pyvmm.block import DriveOptions, open_drive
from pyvmm.devices.virtio import blk
from pyvmm.event_loop import EventLoop

SECTOR = 512
SECTORS = 64
MARGIN_SECTORS = 8
KINDS = (*blk.REQUESTS, 2, 10, 14, 15, 0xFFFF_FFFF)
EDGES = (0, 1, SECTORS - 1, SECTORS, SECTORS + 1, (1 << 55) - 1, 1 << 55, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
SIZES = (0, 1, 15, 16, 17, 20, 31, 32, 511, 512, 513, 1024, 4096)
MOST_CHAINS = 4
RENEW_EVERY = 500  # inputs


class Input:
    """Choices out of bytes; zeros where there are none left."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def of(self, values: tuple[int, ...]) -> int:
        return values[self.byte() % len(values)]

    def word(self, size: int, edges: tuple[int, ...]) -> int:
        """One of the edges, or any number of that many bytes."""
        if self.byte() & 3:
            return self.of(edges) & (1 << 8 * size) - 1
        return int.from_bytes(bytes(self.byte() for _ in range(size)), "little")


class Target:
    """``ring``: the layout of the queue, as TestDriver has it."""

    def __init__(self, directory: Path, **ring: bool) -> None:
        self.path = directory / "disk.img"
        self.image = random.Random(1).randbytes((SECTORS + 2 * MARGIN_SECTORS) * SECTOR)
        self.path.write_bytes(self.image)
        self.errors: list[BaseException] = []
        self.loop = EventLoop(self.errors.append)
        options = DriveOptions(self.path, offset=MARGIN_SECTORS * SECTOR, size=SECTORS * SECTOR)
        self.backend = open_drive(options, loop=self.loop, clock=self.loop.clock)
        self.ring = ring
        self.cases = 0
        self.bench = BlkBench(self.backend, ring=ring)

    def __call__(self, data: bytes) -> None:
        given = Input(data)
        self.cases += 1
        broken, numbers = False, {}
        for _ in range(1 + given.byte() % MOST_CHAINS):
            readable, writable = self.chain(given)
            if not readable and not writable:
                continue
            numbers[self.bench.add(readable, writable)] = sum(writable)
            broken |= sum(map(len, readable)) < blk.HEADER.size or not sum(writable)
        self.bench.serve()
        if broken:
            assert self.bench.disk.faults
        else:
            assert not self.bench.disk.faults
            for number, room in numbers.items():
                assert self.bench.wait(number) in (0, 1, 2)
                assert self.bench.used()[number] == room
        assert not self.errors
        if broken or self.cases % RENEW_EVERY == 0:
            self.check()
            self.bench = BlkBench(self.backend, ring=self.ring)

    def chain(self, given: Input) -> tuple[list[bytes], list[int]]:
        kind = given.word(4, KINDS)
        header = struct.pack("<IIQ", kind, given.of((0, 1)), given.word(8, EDGES))
        data = b""
        if given.byte() & 1:
            for _ in range(given.byte() % 4):
                data += struct.pack("<QII", given.word(8, EDGES), given.word(4, EDGES), given.word(4, (0, 1, 2)))
        else:
            data = bytes([given.byte()]) * given.of(SIZES)
        whole = (header + data)[: len(header + data) - given.of((0,) * 20 + (1, 16))]
        cut = given.of(SIZES)
        readable = [piece for piece in (whole[:cut], whole[cut:]) if piece]
        writable = [size for size in (given.of(SIZES), given.of((1,) * 10 + (0, 2))) if size]
        return readable, writable

    def check(self) -> None:
        """The margins of the image, and its size."""
        now = self.path.read_bytes()
        margin = MARGIN_SECTORS * SECTOR
        assert len(now) == len(self.image)
        assert (now[:margin], now[-margin:]) == (self.image[:margin], self.image[-margin:])
        self.backend.drain()
        assert self.backend.stats.in_flight == 0

    def close(self) -> None:
        self.check()
        self.backend.close()
        self.loop.close()


def run(directory: Path, cases: int, seed: int, **ring: bool) -> int:
    """So many inputs; how many requests the disk has done."""
    target = Target(directory, **ring)
    try:
        run_bytes(target, cases, seed)
        stats = target.backend.stats
        return stats.read.operations + stats.write.operations + stats.flush.operations + stats.discard.operations
    finally:
        target.close()


def main() -> None:
    args = arguments(__doc__, cases=20_000).parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        print(f"{args.cases} inputs of seed {args.seed}: {run(Path(directory), args.cases, args.seed)} requests done")


if __name__ == "__main__":
    main()
