"""Whole machines without a vCPU, saved in the middle of random accesses: they go on alike. Hostile states end them."""

from __future__ import annotations

import copy
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lives import differences
from test_state import is_plain, spoil

from pyvmm import Machine, RunState, StateError
from pyvmm.block.options import DriveOptions

SECTOR = 512
DISK_SECTORS = 256
MEMORY_BYTES = 1 << 20
BUS_MASTER = 0xC000
TABLE = 0x4000

PORTS = (
    *range(0x1F0, 0x1F8), *range(0x170, 0x178), 0x3F6, 0x376, *range(BUS_MASTER, BUS_MASTER + 16),
    0xCF8, 0xCFC, 0xCFE, 0xCF9, 0xB2, 0xAFE0, 0x600, 0x602, 0x604, 0x608,
    0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x42, 0x43, 0x61, 0x60, 0x64, 0x70, 0x71, 0x92, 0x80,
    *range(0x3F8, 0x400), 0x510, 0x511, 0x514, 0x518, 0x3D4, 0x3D5, 0x3C0, 0x3DA,
)  # fmt: skip
COMMANDS = (0x20, 0x24, 0x30, 0x34, 0x40, 0xC4, 0xC5, 0xC6, 0xC8, 0xCA, 0xE7, 0xEC, 0xEF, 0xA0, 0xA1, 0x90, 0x06, 0xE0)
INQUIRY, READ_10, REQUEST_SENSE = b"\x12\0\0\0\x24", b"\x28\0\0\0\0\x02\0\0\x03", b"\x03\0\0\0\x12"
MODE_SENSE, READ_TOC, UNKNOWN = b"\x5a\0\x3f\0\0\0\0\0\xff", b"\x43\0\0\0\0\0\0\0\x20", b"\xff"
PACKETS = (INQUIRY, READ_10, REQUEST_SENSE, MODE_SENSE, READ_TOC, UNKNOWN)
MMIO = (0xFEC0_0000, 0xFEC0_0010, 0xFEE0_0080, 0xFEE0_00B0, 0xFEE0_00F0, 0xFEE0_0320, 0xFEE0_0350, 0xFEE0_0380)


def machine(directory: Path, **options: Any) -> Machine:
    drives = [
        DriveOptions(str(directory / "disk.img"), locking=False),
        DriveOptions(str(directory / "cd.iso"), media="cdrom", index=1, locking=False),
    ]
    return Machine(accel="qtest", memory_mib=1, vga="text", drives=drives, **options)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "disk.img").write_bytes(Random(1).randbytes(DISK_SECTORS * SECTOR))
    (tmp_path / "cd.iso").write_bytes(Random(2).randbytes(16 * 2048))
    return tmp_path


class Hand:
    """Random accesses, most of which make some sense: what came of each is in ``seen``."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.seen: list[object] = []

    def run(self, seed: int, count: int) -> None:
        r = Random(seed)
        steps = (self.port, self.wait, self.command, self.data, self.packet, self.table, self.config, self.mmio)
        for _ in range(count):
            r.choice((*steps, self.look))(r)
            self.m.drain()

    def look(self, r: Random) -> None:
        """At every register, and with some drives at what is behind: identification, previous contents, sense."""
        for port in PORTS:
            if not 0x1F0 <= port < 0x1F8 or port in r.sample(range(0x1F1, 0x1F8), 4):
                self.read(port, 4 if port == 0xCF8 else 1)
        self.out(0x3F6, 0x80)
        for port in range(0x1F1, 0x1F7):
            self.read(port)
        self.out(0x3F6, 0)
        what = r.choice((0xEC, 0xA1, 0))
        if what:
            self.out(0x1F6, 0xA0 if what == 0xEC else 0xB0)
            self.out(0x1F7, what)
        for _ in range(256 if what else 4):
            self.read(0x1F0, 2)

    def out(self, port: int, value: int, size: int = 1) -> None:
        self.m.pio.write(port, size, value & (1 << 8 * size) - 1)

    def read(self, port: int, size: int = 1) -> int:
        value = self.m.pio.read(port, size)
        self.seen.append((port, value))
        return value

    def port(self, r: Random) -> None:
        port, size = r.choice(PORTS), r.choice((1, 1, 2, 4))
        if r.randrange(2):
            self.read(port, size)
        elif not (port == 0xCF9 or port == 0x604):  # neither a reset nor a power-off
            self.out(port, r.getrandbits(8 * size), size)

    def wait(self, r: Random) -> None:
        self.m.clock.step(r.randrange(r.choice((100, 1_000_000, 3_000_000_000))))  # type: ignore[attr-defined]

    def command(self, r: Random) -> None:
        base = r.choice((0x1F0, 0x1F0, 0x170))
        self.out(base + 6, 0xE0 | r.randrange(2) << 4)
        for n, value in ((2, r.randrange(12)), (3, r.randrange(256)), (4, 0), (5, 0), (1, r.choice((0, 1, 2, 3)))):
            self.out(base + n, value)
        self.out(base + 7, r.choice(COMMANDS))

    def data(self, r: Random) -> None:
        base = r.choice((0x1F0, 0x1F0, 0x170))
        for _ in range(r.choice((1, 100, 256, 300))):
            if r.randrange(2):
                self.read(base, 2)
            else:
                self.out(base, r.getrandbits(16), 2)

    def packet(self, r: Random) -> None:
        for n, value in ((6, 0xB0), (1, r.randrange(2)), (4, r.choice((6, 0xFE))), (5, r.randrange(3))):
            self.out(0x1F0 + n, value)
        self.out(0x1F7, 0xA0)
        cdb = r.choice(PACKETS).ljust(12, b"\0")
        for at in range(0, r.choice((12, 12, 8)), 2):
            self.out(0x1F0, int.from_bytes(cdb[at : at + 2], "little"), 2)

    def table(self, r: Random) -> None:
        entries = b"".join(
            (0x8000 + 0x1000 * n).to_bytes(4, "little") + (0x400 if n < 7 else 0x8000_0400).to_bytes(4, "little")
            for n in range(8)
        )
        self.m.memory.write(TABLE, entries)
        self.config_write(0x0920, 4, BUS_MASTER)
        self.config_write(0x0904, 2, r.choice((5, 5, 1)))
        self.out(BUS_MASTER + 4, TABLE, 4)
        self.out(BUS_MASTER, r.choice((0, 1, 8, 9)))

    def config_write(self, at: int, size: int, value: int) -> None:
        self.out(0xCF8, 0x8000_0000 | at & ~3, 4)
        self.out(0xCFC + (at & 3), value, size)

    def config(self, r: Random) -> None:
        function = r.choice((0x0000, 0x0800, 0x0900, 0x0B00))
        at = function + r.choice((0x04, 0x20, 0x40, 0x59, 0x5A, 0x60, 0x61, 0x72, 0x80, 0x90))
        self.config_write(at, r.choice((1, 2, 4)), r.getrandbits(r.choice((8, 16, 32))))

    def mmio(self, r: Random) -> None:
        address = r.choice(MMIO)
        if r.randrange(2):
            self.seen.append(self.m.mmio.read(address, 4))
        else:
            self.m.mmio.write(address, 4, r.getrandbits(r.choice((8, 18, 32))))


SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@given(seed=st.integers(0, 1 << 32), lengths=st.tuples(st.integers(1, 40), st.integers(1, 40)))
@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
def test_a_board_goes_on_as_the_one_that_was_saved(images: Path, seed: int, lengths: tuple[int, int]) -> None:
    (images / "disk.img").write_bytes(Random(1).randbytes(DISK_SECTORS * SECTOR))
    with machine(images) as one:
        Hand(one).run(seed, lengths[0])
        state = one.save_state()
        assert one.save_state() == state
        assert is_plain(state)
        content = (images / "disk.img").read_bytes()
        hand = Hand(one)
        hand.look(Random(seed))
        hand.run(seed + 1, lengths[1])
        after, written = one.save_state(), (images / "disk.img").read_bytes()
    (images / "disk.img").write_bytes(content)
    with machine(images) as other:
        other.load_state(copy.deepcopy(state))
        assert other.save_state() == state
        again = Hand(other)
        again.look(Random(seed))
        again.run(seed + 1, lengths[1])
        assert again.seen == hand.seen
        assert differences(other.save_state(), after) == []
        assert (images / "disk.img").read_bytes() == written


@given(seed=st.integers(0, 1 << 32), data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
def test_a_hostile_state_of_a_board(images: Path, seed: int, data: st.DataObject) -> None:
    """One field is changed: a StateError in a sentence, or a guest that sees nonsense. Never anything else."""
    with machine(images) as one:
        Hand(one).run(seed, 15)
        state = one.save_state(memory=False)
    spoil(state["parts"], data)
    with machine(images) as other:
        try:
            other.load_state(state)
        except StateError as error:
            assert "\n" not in str(error)
            if other.state is RunState.INTERNAL_ERROR:
                other.reset()
        Hand(other).run(seed + 1, 15)


def test_a_drive_that_ends_with_its_process(images: Path) -> None:
    drive = DriveOptions(str(images / "disk.img"), snapshot=True)
    with Machine(accel="qtest", memory_mib=1, drives=[drive]) as m:
        m.save_state()
        hand = Hand(m)
        for n, value in ((6, 0xE0), (2, 1), (3, 0), (4, 0), (5, 0), (7, 0x30)):
            hand.out(0x1F0 + n, value)
        for _ in range(256):
            hand.out(0x1F0, 0x55AA, 2)
        m.drain()
        with pytest.raises(StateError, match="drive ide0-hd0 has snapshot=on"):
            m.save_state()
