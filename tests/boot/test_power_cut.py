"""What a guest was told is flushed is there after the power is cut, whenever that is.

The guest (power_cut.S) writes numbered batches of sectors, flushes after each, and then reports the batch's number over
its serial port. Two tests, since neither sees all of it:

- The VMM is killed with SIGKILL, 50 times, at moments that are drawn: what is complete for the guest must not wait in
  the VMM's own memory, nor come out of order. What the host's kernel has taken survives such a kill, so this says
  nothing about a flush that never reaches the disk.
- That is the other test's part: it stands between pyvmm and the system calls. A write goes to a second, "stable" image
  only when an fdatasync that began after it has come back, which is what fdatasync promises. A cut at the moment
  of the report would leave that image.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import asm
import pytest
from disk_images import MIB, SECTOR

import pyvmm
from pyvmm.block.protocols import file_posix

CUTS = int(os.environ.get("PYVMM_CUTS", "20"))  # more of them where that is what is to be shown
MOST = 10  # times as many
LONGEST_S = 0.3  # after the first report
LIMIT_S = 60.0

# As in power_cut.S.
FIRST_SECTOR = 64
SLOTS = 16
SLOT_SECTORS = 128
WAYS = (4, 16, 128)  # sectors of batch n, by n % 3
BATCHES_A_RUN = 3 * 5 * 7 * SLOTS * 100  # more than a run can do; each run begins with the same way and slot


def guest(first_batch: int) -> bytes:
    program = asm.assemble(Path(__file__).with_name("power_cut.S").read_text(), "real16")
    image = bytearray(program.image)
    struct.pack_into("<I", image, program.symbols["batch"] - program.address, first_batch)
    return bytes(image)


def sector_bytes(batch: int, number: int) -> bytes:
    return struct.pack("<II", batch, number) + struct.pack("<I", batch * 0x9E37_79B9 + number & 0xFFFF_FFFF) * 126


class Disk:
    """What is on an image, as the guest numbers it."""

    def __init__(self, image: bytes) -> None:
        area = image[FIRST_SECTOR * SECTOR :]
        self.sectors = [area[at : at + SECTOR] for at in range(0, SLOTS * SLOT_SECTORS * SECTOR, SECTOR)]

    def check_no_sector_is_torn(self) -> None:
        for place, data in enumerate(self.sectors):
            batch, number = struct.unpack_from("<II", data)
            if data != bytes(SECTOR):
                where = f"sector {place} of the area"
                assert (batch % SLOTS, number) == divmod(place, SLOT_SECTORS), f"{where} was written for another place"
                assert data == sector_bytes(batch, number), f"{where} is not one write of the guest"

    def newest(self) -> int:
        """The highest number of a batch that has anything here."""
        return max(int.from_bytes(data[:4], "little") for data in self.sectors)

    def check_holds(self, first_batch: int, flushed: int) -> None:
        """The last batch in each slot up to ``flushed``, or a later one."""
        for batch in range(max(first_batch, flushed - SLOTS + 1), flushed + 1):
            start = batch % SLOTS * SLOT_SECTORS
            for number in range(WAYS[batch % 3]):
                found = struct.unpack_from("<I", self.sectors[start + number])[0]
                assert found >= batch, f"batch {batch} was flushed; sector {number} of it has batch {found}'s data"


class Reports:
    """The guest's lines, as they come."""

    def __init__(self) -> None:
        self.flushed: list[int] = []
        self._rest = b""

    def hear(self, data: bytes) -> list[int]:
        """The numbers that are whole with this. AssertionError where the guest met an error."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            assert len(line.strip()) == 8, f"the guest says {line!r}"
        new = [int(line, 16) for line in lines]
        self.flushed += new
        return new


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(2 * MIB))
    return path


# ---- the process is killed -----------------------------------------------------------------------


def test_what_was_flushed_survives_kills_in_the_middle_of_writes(disk: Path, tmp_path: Path) -> None:
    def command(first_batch: int) -> list[str]:
        program = tmp_path / "guest.bin"
        program.write_bytes(guest(first_batch))
        pyvmm_run = [sys.executable, "-m", "pyvmm", "run", "--machine", "pc", "--flat", str(program), "--memory", "4"]
        return [*pyvmm_run, "--drive", f"file={disk}"]

    survives(CUTS, disk, command)


def test_so_it_does_on_virtio(disk: Path) -> None:
    """Many requests in flight, by a driver in the VMM's own process: over each transport, with each ring."""
    ways = [(machine, ring) for machine in ("microvm", "pc") for ring in ("split", "packed")]
    program = Path(__file__).with_name("virtio_power_cut.py")

    def command(first_batch: int) -> list[str]:
        way = ways[first_batch // BATCHES_A_RUN % len(ways)]
        return [sys.executable, str(program), str(disk), *way, str(first_batch)]

    survives(CUTS, disk, command)


def survives(cuts: int, disk: Path, command: Callable[[int], list[str]]) -> None:
    """Whether a cut meets writes, or the report of a batch that is done, is luck: so there are more of them where the
    first ones did not.
    """
    moments = random.Random(50)
    unflushed = cut = 0
    while cut < cuts or unflushed < cuts // 4:
        assert cut < MOST * cuts, f"only {unflushed} of {cut} cuts left an unfinished batch"
        first_batch = 1 + cut * BATCHES_A_RUN
        reports = run_until_the_cut(command(first_batch), moments.uniform(0, LONGEST_S))
        flushed = reports.flushed[-1]
        assert reports.flushed == list(range(first_batch, flushed + 1))
        after = Disk(disk.read_bytes())
        after.check_no_sector_is_torn()
        after.check_holds(first_batch, flushed)
        unflushed += after.newest() > flushed
        cut += 1


def run_until_the_cut(command: list[str], seconds: float) -> Reports:
    """Kill the VMM that long after its guest's first report: all that was reported."""
    reports = Reports()
    killed = threading.Event()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:

        def cut() -> None:
            killed.set()
            process.kill()

        assert process.stdout is not None
        timer = threading.Timer(LIMIT_S, process.kill)
        timer.start()
        try:
            while data := os.read(process.stdout.fileno(), 65536):
                first = not reports.flushed
                reports.hear(data)
                if first and reports.flushed:
                    timer.cancel()
                    timer = threading.Timer(seconds, cut)
                    timer.start()
        finally:
            timer.cancel()
            process.kill()
    assert killed.is_set(), f"the VMM ended by itself, with status {process.returncode}"
    return reports


# ---- fdatasync comes before the report -----------------------------------------------------------


class StableStorage:
    """Beside the image, what a power cut would leave of it at the worst: nothing that was not synced."""

    def __init__(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data = bytearray(image.read_bytes())
        self.syncs = 0
        self._written: list[tuple[int, bytes]] = []
        self._lock = threading.Lock()
        self._pwritev, self._fdatasync = file_posix.pwritev, os.fdatasync
        monkeypatch.setattr(file_posix, "pwritev", self.pwritev)
        monkeypatch.setattr(os, "fdatasync", self.fdatasync)

    def pwritev(self, fd: int, iov: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        done = self._pwritev(fd, iov, offset, flags)
        data = b"".join(bytes(view) for view in iov)[:done]
        with self._lock:
            if flags & os.RWF_DSYNC:
                self.data[offset : offset + done] = data
            else:
                self._written.append((offset, data))
        return done

    def fdatasync(self, fd: int) -> None:
        with self._lock:
            before = len(self._written)
        self._fdatasync(fd)
        with self._lock:
            for offset, data in self._written[:before]:
                self.data[offset : offset + len(data)] = data
            del self._written[:before]
            self.syncs += 1

    def snapshot(self) -> bytes:
        with self._lock:
            return bytes(self.data)


@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough"])
def test_the_disk_is_synced_before_the_guest_hears_of_it(
    disk: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    storage = StableStorage(disk, monkeypatch)
    reports = Reports()
    at_report: list[tuple[int, bytes]] = []
    batches = 3 * SLOTS
    enough = threading.Event()

    def hear(data: bytes) -> None:
        for batch in reports.hear(data):
            at_report.append((batch, storage.snapshot()))
            if batch == batches:
                enough.set()

    with pyvmm.Machine(
        machine="pc", flat=guest(1), memory_mib=4, drives=[f"file={disk},cache={cache}"], serial=hear
    ) as m:
        m.resume()
        assert enough.wait(LIMIT_S), f"{len(reports.flushed)} batches in {LIMIT_S} s"
    for batch, image in at_report:
        Disk(image).check_no_sector_is_torn()
        Disk(image).check_holds(1, batch)
    if cache != "writethrough":
        assert storage.syncs >= batches


def test_a_flush_that_is_not_done_is_found_out(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with cache=unsafe: flushes go nowhere, and the stable image has nothing."""
    storage = StableStorage(disk, monkeypatch)
    reports = Reports()
    reported = threading.Event()
    found: list[bytes] = []

    def hear(data: bytes) -> None:
        if reports.hear(data) and not found:
            found.append(storage.snapshot())
            reported.set()

    with pyvmm.Machine(
        machine="pc", flat=guest(1), memory_mib=4, drives=[f"file={disk},cache=unsafe"], serial=hear
    ) as m:
        m.resume()
        assert reported.wait(LIMIT_S)
    with pytest.raises(AssertionError, match="batch 1 was flushed"):
        Disk(found[0]).check_holds(1, 1)
