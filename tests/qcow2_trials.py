"""qcow2 against a model and against QEMU's programs: random operations, and ends at any moment.

``tests/unit/block/test_qcow2_trials.py`` does a little of it. For much:

    python tests/qcow2_trials.py operations 10000
    python tests/qcow2_trials.py kills 100
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "unit" / "block"))

from block_drives import SECTOR, Result, TestLoop, flush, read, write

from pyvmm.block import BlockBackend, DriveOptions, open_drive

SIZE = 8 << 20


def qemu_img(*words: str | Path, statuses: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True)
    assert done.returncode in statuses, f"{words}: {done.returncode}: {done.stdout} {done.stderr}"
    return done


def qemu_io(image: Path, *commands: str, may_fail: bool = False) -> bool:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *words, str(image)], capture_output=True, text=True)
    fine = done.returncode == 0 and "failed" not in done.stdout
    assert fine or may_fail, done.stdout + done.stderr
    return fine


class Disk:
    """An image that is open in pyvmm."""

    def __init__(self, path: Path, **options: object) -> None:
        self.loop = TestLoop()
        self.backend: BlockBackend = open_drive(
            DriveOptions(path, **options), loop=self.loop, clock=self.loop.clock  # type: ignore[arg-type]
        )

    def __enter__(self) -> BlockBackend:
        return self.backend

    def __exit__(self, *exc: object) -> None:
        self.backend.close()
        self.loop.close()
        assert self.loop.errors == []


def whole(path: Path, size: int = SIZE, **options: object) -> bytes:
    """All that is in an image, read by pyvmm."""
    with Disk(path, read_only=True, **options) as disk:
        assert disk.size_bytes == size
        return b"".join(read(disk, at // SECTOR, min(1 << 20, size - at) // SECTOR) for at in range(0, size, 1 << 20))


class Trial:
    """An image of ``layers`` layers, and the model of what is in it."""

    def __init__(self, directory: Path, rng: random.Random, layers: int, **features: object) -> None:
        self.directory = directory
        self.rng = rng
        self.model = bytearray(SIZE)
        self.snapshots: dict[str, bytes] = {}
        self.cluster = {"2M": 2 << 20}.get(str(features.get("cluster_size")), features.get("cluster_size", 65536))
        self.options = ",".join(f"{name}={value}" for name, value in features.items()) or "compat=1.1"
        below: list[str | Path] = []
        for n in range(layers):
            self.path = directory / f"layer{n}.qcow2"
            qemu_img("create", "-q", "-f", "qcow2", "-o", self.options, *below, self.path, str(SIZE))
            below = ["-b", self.path.name, "-F", "qcow2"]
            if n < layers - 1:
                self.by_qemu(20)

    def place(self, most: int = 400) -> tuple[int, int]:
        """A range of sectors; often at a cluster's edge."""
        rng = self.rng
        count = rng.choice((1, 2, 8, 128, rng.randrange(1, most)))
        sector = rng.randrange(SIZE // SECTOR)
        if rng.random() < 0.3:
            sector -= sector % 128
        sector = min(sector, SIZE // SECTOR - count)
        return sector, count

    def by_qemu(self, count: int) -> None:
        """What qemu-io writes."""
        commands = []
        for _ in range(count):
            sector, number = self.place()
            at, size = sector * SECTOR, number * SECTOR
            kind = self.rng.choice(("write", "write", "zero", "zero -u", "compressed"))
            byte = 0
            if kind == "write":
                byte = self.rng.randrange(1, 256)
                commands.append(f"write -P {byte} {at} {size}")
            elif kind == "compressed":
                byte, at, size = self.rng.randrange(1, 256), at - at % self.cluster, self.cluster
                qemu_io(self.path, *commands)
                commands.clear()
                # QEMU refuses it where something is there already.
                if not qemu_io(self.path, f"write -c -P {byte} {at} {size}", may_fail=True):
                    continue
            else:
                commands.append(f"write -z {'-u ' if kind.endswith('u') else ''}{at} {size}")
            self.model[at : at + size] = bytes([byte]) * size
        qemu_io(self.path, *commands)

    def snapshot(self, name: str) -> None:
        qemu_img("snapshot", "-c", name, self.path)
        self.snapshots[name] = bytes(self.model)

    def operations(self, count: int, **options: object) -> None:
        """By pyvmm, each looked at against the model."""
        with Disk(self.path, **options) as disk:
            for _ in range(count):
                self.operation(disk)

    def operation(self, disk: BlockBackend) -> None:
        rng, model = self.rng, self.model
        sector, count = self.place()
        at, end = sector * SECTOR, (sector + count) * SECTOR
        result = Result()
        kind = rng.choice(("read", "read", "write", "write", "write", "zero", "unmap", "discard", "flush"))
        if kind == "read":
            assert read(disk, sector, count) == model[at:end]
        elif kind == "write":
            data = rng.randbytes(end - at)
            assert write(disk, sector, data) == 0
            model[at:end] = data
        elif kind == "flush":
            assert flush(disk) == 0
        elif kind == "discard":
            disk.aio_discard(sector, count, result)
            assert result.wait() == 0
            model[at:end] = read(disk, sector, count)
            zeros = bytes(65536)
            whole = max(65536, self.cluster)
            for cluster in range(at + -at % whole, end - end % whole, 65536):
                # Version 2 has no zeros over a backing file: there a discard does nothing.
                assert model[cluster : cluster + 65536] == zeros or "compat=0.10" in self.options
        else:
            disk.aio_write_zeroes(sector, count, result, may_unmap=kind == "unmap")
            assert result.wait() == 0
            model[at:end] = bytes(end - at)

    def check(self) -> None:
        """qemu-img finds what we have written, and nothing to complain of."""
        told = qemu_img("check", "--output=json", self.path, statuses=(0, 3))
        found = json.loads(told.stdout)
        assert not found.get("leaks") and not found.get("corruptions"), told.stdout
        raw = self.directory / "model.raw"
        raw.write_bytes(self.model)
        qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, self.path)
        assert whole(self.path) == self.model
        for name, content in self.snapshots.items():
            assert whole(self.path, internal_snapshot=name) == content


def operations(directory: Path, seed: int, count: int, layers: int, sessions: int = 4, **features: object) -> None:
    """``count`` operations in so many sessions, between which QEMU writes too and takes snapshots."""
    rng = random.Random(seed)
    trial = Trial(directory, rng, layers, **features)
    for n in range(sessions):
        trial.operations(count // sessions, cache=rng.choice(("writeback", "unsafe", "writeback")))
        trial.check()
        if n + 1 < sessions:
            if n % 2 == 0 and "data_file" not in features:
                trial.snapshot(f"s{n}")
            trial.by_qemu(10)
            assert whole(trial.path) == trial.model


# -- ends at any moment --------------------------------------------------------------------------------------


def writer(path: str, seed: str) -> None:
    """A child: writes for ever, and tells of each operation before it and after it."""
    rng = random.Random(int(seed))
    with Disk(Path(path)) as disk:
        number = 0
        while True:
            number += 1
            if number % 8 == 0:
                assert flush(disk) == 0
                print("f", flush=True)
                continue
            count = rng.choice((1, 8, 128, 200))
            sector = rng.randrange(SIZE // SECTOR - count)
            byte = rng.randrange(256)
            print("b", sector, count, byte, flush=True)
            if not byte:
                result = Result()
                disk.aio_write_zeroes(sector, count, result)
                assert result.wait() == 0
            else:
                assert write(disk, sector, bytes([byte]) * (count * SECTOR)) == 0


def kill_one(directory: Path, seed: int, after_s: float) -> int:
    """A writer is killed; the image has at most leaks, and all that was flushed: the status of qemu-img check."""
    path = directory / f"killed{seed}.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={(4096, 65536)[seed % 2]}", path, str(SIZE))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, __file__, "writer", str(path), str(seed)], stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdout is not None
        told = [child.stdout.readline()]  # it writes by now
        time.sleep(after_s)
        child.send_signal(signal.SIGKILL)
        told += child.stdout.read().splitlines(keepends=True)
    done = qemu_img("check", "--output=json", path, statuses=(0, 3))
    check_flushed(path, [line for line in told if line.endswith("\n")])
    path.unlink()
    return done.returncode


def check_flushed(path: Path, told: list[str]) -> None:
    """What was written before the last flush is there, where nothing was written after it."""
    flushed, maybe, now = bytearray(SIZE), set[int](), bytearray(SIZE)
    for line in told:
        if line.startswith("f"):
            flushed[:] = now
            maybe.clear()
        else:
            sector, count, byte = map(int, line.split()[1:])
            now[sector * SECTOR : (sector + count) * SECTOR] = bytes([byte]) * (count * SECTOR)
            maybe.update(range(sector, sector + count))
    found = whole(path)
    for sector in range(SIZE // SECTOR):
        at = slice(sector * SECTOR, (sector + 1) * SECTOR)
        assert sector in maybe or found[at] == flushed[at], f"sector {sector} is lost"


def main(words: list[str]) -> None:
    if words[0] == "writer":
        writer(*words[1:])
        return
    verb, count = words[0], int(words[1])
    seed = int(words[2]) if len(words) > 2 else 0
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        if verb == "operations":
            cases: tuple[dict[str, object], ...] = (
                {}, {"compat": "0.10"}, {"cluster_size": 4096, "refcount_bits": 1}, {"lazy_refcounts": "on"},
                {"cluster_size": 512, "refcount_bits": 64}, {"compression_type": "zstd"}, {"cluster_size": "2M"},
            )  # fmt: skip
            for layers in (1, 3):
                for n, features in enumerate(cases):
                    directory = Path(name, f"{layers}-{n}")
                    directory.mkdir()
                    since = time.monotonic()
                    if features.get("refcount_bits") == 1:
                        features = {**features, "refcount_bits": 4}
                    operations(directory, seed + n, count, layers, max(4, count // 500), **features)
                    took_s = time.monotonic() - since
                    print(f"{count} operations, {layers} layers, {features}: {took_s:.0f} s", flush=True)
        else:
            rng = random.Random(seed)
            leaks = sum(kill_one(Path(name), seed + n, rng.random() * 0.4) != 0 for n in range(count))
            print(f"{count} kills: no image was worse than leaking, {leaks} leaked", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
