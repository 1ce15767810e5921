"""save and load in the middle of everything: whatever the moment, the guest sees the same afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from ide_bench import (
    BM,
    BSY,
    COMMAND,
    CONTROL,
    DRQ,
    HIGH,
    MID,
    SECTOR,
    STATUS,
    Bench,
    FakeBackend,
    pattern,
)

from pyvmm.devices.ide.atapi import AtapiDrive
from pyvmm.devices.ide.disk import IdeDisk

Step = tuple[Any, ...]
READ_8, WRITE_8 = ("cmd", 0x20, 3, 8), ("cmd", 0x30, 3, 8)


def push(data: bytes, step: int = 700) -> list[Step]:
    return [("push", data[at : at + step]) for at in range(0, len(data), step)]


def pull(size: int, step: int = 700) -> list[Step]:
    return [("pull", min(step, size - at)) for at in range(0, size, step)]


def packet(cdb: bytes, limit: int = 0xFFFE, dma: int = 0) -> list[Step]:
    cdb = cdb.ljust(12, b"\0")
    set_up: list[Step] = [
        ("out", 0x1F6, 0xB0),
        ("out", 0x1F1, dma),
        ("out", MID, limit & 0xFF),
        ("out", HIGH, limit >> 8),
        ("out", COMMAND, 0xA0),
    ]
    return [*set_up, ("push", cdb[:6]), ("push", cdb[6:]), ("wait",)]


NEW = bytes(pattern(8, seed=77))
PRD = [("prd", (0x2000, 1000), (0x6000, 0x8000)), ("out", BM, 0), ("out", BM, 1)]
MODE_SELECT = bytes((0, 20, 0, 0, 0, 0, 0, 0, 1, 10)) + bytes(10)  # length fields as MODE SENSE gives them

SCENARIOS: dict[str, list[Step]] = {
    "pio in": [READ_8, ("wait",), *pull(8 * SECTOR), ("wait",), ("lba",)],
    "pio in, multiple": [("cmd", 0xC4, 100, 40), ("wait",), *pull(40 * SECTOR, 3000), ("wait",), ("lba",)],
    "pio in, several chunks": [
        ("ext", 0x24, 5, 600),
        *[step for n in (256, 256, 88) for step in [("wait",), *pull(n * SECTOR, 60000)]],
        ("wait",),
        ("lba",),
    ],
    "pio in, bad sector": [("cmd", 0x20, 700, 10), ("wait",), *pull(5 * SECTOR), ("wait",), ("lba",), ("in", 0x1F1)],
    "pio out": [WRITE_8, ("wait",), *push(NEW), ("wait",), ("lba",), ("image", 0, 16)],
    "pio out, multiple": [("cmd", 0xC5, 7, 8), *push(NEW), ("wait",), ("image", 0, 16)],
    "pio out, several chunks": [
        ("ext", 0x34, 5, 300),
        *push(bytes(pattern(256, seed=5)), 60000),
        ("wait",),
        *push(bytes(pattern(44, seed=6)), 12800),
        ("wait",),
        ("image", 0, 400),
    ],
    "pio out, no write cache": [
        ("cmd", 0xEF, 0, 0, 0x82),
        ("wait",),
        WRITE_8,
        *push(NEW),
        ("release",),
        ("wait",),
        ("image", 0, 16),
    ],
    "pio out, over the end": [
        ("cmd", 0x30, 1020, 8),
        *push(NEW[: 4 * SECTOR]),
        ("wait",),
        ("lba",),
        ("image", 1020, 4),
    ],
    "dma in": [*PRD, ("cmd", 0xC8, 9, 16), ("wait",), ("in", BM + 2), ("memory", 0x2000, 0x6000), ("lba",)],
    "dma in, started last": [
        PRD[0],
        ("cmd", 0xC8, 9, 16),
        ("in", STATUS),
        ("out", BM, 1),
        ("wait",),
        ("memory", 0x2000, 0x6000),
    ],
    "pio in, count of 16 bits": [
        ("ext", 0x24, 5, 600),
        *[step for n in (256, 256, 88) for step in [("wait",), *pull(n * SECTOR, 60000)]],
        ("wait",),
        ("out", CONTROL, 0x80),
        ("in", 0x1F2),
    ],
    "dma in, no bus master any more": [
        *PRD,
        ("cmd", 0xC8, 9, 16),
        ("master", False),
        ("wait",),
        ("in", BM + 2),
        ("memory", 0x2000, 0x6000),
    ],
    "dma out": [*PRD, ("poke", 0x2000, NEW), ("cmd", 0xCA, 9, 16), ("wait",), ("in", BM + 2), ("image", 0, 32)],
    "trim": [*PRD, ("poke", 0x2000, bytes((5, 0, 0, 0, 0, 0, 3, 0)) + bytes(504)), ("ext", 6, 0, 1, 1), ("wait",)],
    "identify": [("cmd", 0xEC, 0, 1), *pull(512), ("in", STATUS)],
    "verify": [("cmd", 0x40, 695, 20), ("wait",), ("lba",)],
    "flush and standby": [
        ("cmd", 0xE7, 0, 1),
        ("wait",),
        ("cmd", 0xE0, 0, 0),
        ("wait",),
        ("cmd", 0xE5, 0, 0),
        ("in", 0x1F2),
    ],
    "settings": [
        ("cmd", 0xC6, 0, 4),
        ("cmd", 0xEF, 0x42, 0x42, 3),
        ("cmd", 0xEF, 0, 0, 0x55),
        ("out", 0x1F6, 0xA3),
        ("out", 0x1F2, 32),
        ("out", COMMAND, 0x91),
        ("cmd", 0xEC, 0, 1),
        *pull(512),
    ],
    "registers": [("out", MID, 1), ("out", MID, 2), ("out", CONTROL, 0x82), ("in", MID), ("out", MID, 3), ("in", MID)],
    "reset": [READ_8, ("out", CONTROL, 4), ("in", STATUS), ("out", CONTROL, 0), ("wait",), ("in", 0x1F1)],
    "interrupt": [
        ("cmd", 0xE7, 0, 1),
        ("wait",),
        ("irq",),
        ("out", CONTROL, 2),
        ("irq",),
        ("out", CONTROL, 0),
        ("irq",),
    ],
    "packet in": [*packet(bytes((0x12, 0, 0, 0, 36)), 10), *pull(36, 4), ("wait",), ("in", STATUS)],
    "packet read": [
        *packet(bytes((0x28, 0, 0, 0, 0, 3, 0, 0, 90, 0)), 30000),
        *[step for size in (30000,) * 6 + (90 * 2048 - 180000,) for step in (*pull(size, 29000), ("wait",))],
        ("in", STATUS),
    ],
    "packet dma": [
        ("prd", *((0x20000 + n * 0x10000, 0) for n in range(3))),
        ("out", BM, 9),
        *packet(bytes((0x28, 0, 0, 0, 0, 3, 0, 0, 90, 0)), dma=1),
        ("memory", 0x20000, 90 * 2048),
    ],
    "packet out": [
        *packet(bytes((0x55, 0x10, 0, 0, 0, 0, 0, 0, 20)), 6),
        *push(MODE_SELECT, 4),
        ("wait",),
        ("in", 0x1F1),
    ],
    "packet out, dma": [
        ("poke", 0x2000, MODE_SELECT),
        ("out", BM, 0),
        *packet(bytes((0x55, 0x10, 0, 0, 0, 0, 0, 0, 20)), dma=1),
        ("prd", (0x2000, 20)),
        ("out", BM, 1),
        ("in", BM + 2),
        ("in", STATUS),
    ],
    "identify packet": [("out", 0x1F6, 0xB0), ("out", COMMAND, 0xA1), *pull(512, 100), ("in", STATUS)],
    "packet, nothing there": [
        *packet(b"\xff"),
        ("in", 0x1F1),
        *packet(bytes((3, 0, 0, 0, 18))),
        *pull(18, 2),
        ("in", STATUS),
    ],
}


class World:
    def __init__(self, held: bool) -> None:
        self.disk = FakeBackend(pattern(1024))
        self.disk.bad = {705}
        self.cd = FakeBackend(pattern(400, seed=3), read_only=True)
        self.held = held
        self.disk.held = self.cd.held = held
        self.bench = Bench(IdeDisk(self.disk), AtapiDrive(self.cd))  # type: ignore[arg-type]

    def settle(self) -> None:
        """Until no request waits."""
        for backend in (self.disk, self.cd):
            while backend.waiting:
                backend.release()

    def step(self, step: Step) -> object:
        bench = self.bench
        name, *args = step
        acts: dict[str, Callable[..., object]] = {
            "cmd": lambda op, lba, count, features=0: bench.command(op, lba, count, features=features),
            "ext": lambda op, lba, count, features=0: bench.command_ext(op, lba, count, features=features),
            "out": bench.out,
            "in": lambda port: (self.settle(), bench.inb(port))[1],
            "push": bench.push,
            "pull": bench.pull,
            "prd": bench.prd,
            "poke": bench.memory.write,
            "memory": bench.memory.read,
            "image": lambda lba, count: bytes(self.disk.data[lba * SECTOR : (lba + count) * SECTOR]),
            "lba": bench.lba_ext,
            "master": lambda on: setattr(bench.channel.bus_master, "enabled", on),
            "irq": lambda: (self.settle(), bench.irq.level)[1],
            "release": lambda: self.disk.waiting and self.disk.release(),
            "wait": lambda: (self.settle(), bench.alt())[1],
        }
        return acts[name](*args)

    def copy(self) -> World:
        """Another machine that goes on from here, by way of plain data."""
        state = self.bench.channel.save()
        assert plain(state)
        other = World(self.held)
        other.disk.data[:] = self.disk.data
        other.bench.memory.write(0, self.bench.memory.read(0, self.bench.memory.size_bytes))
        other.bench.command(0x20, 1, 2)  # it has been up to something else
        other.bench.channel.load(state)
        other.bench.channel.after_load()
        other.disk.waiting = [r for r in other.disk.waiting if (r.what, r.sector, r.count) != ("read", 1, 2)]
        return other


def plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or isinstance(value, int | bytes | str)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_rest_is_the_same_elsewhere(name: str, held: bool) -> None:
    steps = SCENARIOS[name]
    reference = World(held)
    expected = [reference.step(step) for step in steps]
    assert any(isinstance(e, bytes | int) for e in expected)
    assert not reference.bench.alt() & (BSY | DRQ)
    world = World(held)
    for n, step in enumerate(steps):
        other = world.copy()
        assert [other.step(rest) for rest in steps[n:]] == expected[n:], (n, step)
        assert other.disk.data == reference.disk.data
        assert world.step(step) == expected[n]


def test_a_reset_that_waited_is_over_elsewhere() -> None:
    """What it waited for is not there."""
    world = World(True)
    world.step(READ_8)
    world.bench.out(CONTROL, 4, 0)
    assert world.bench.alt() & BSY
    other = world.copy()
    assert other.bench.alt() == 0x50


def test_a_disc_that_is_not_there_when_a_state_is_loaded() -> None:
    for dma in (0, 1):
        world = World(False)
        for step in packet(bytes((0x28, 0, 0, 0, 0, 3, 0, 0, 90, 0)), dma=dma):
            world.step(step)
        other = World(False)
        drive = AtapiDrive(None)
        other.bench = Bench(IdeDisk(other.disk), drive)  # type: ignore[arg-type]
        other.bench.channel.load(world.bench.channel.save())
        other.bench.channel.after_load()
        other.bench.prd(*((0x20000 + n * 0x10000, 0) for n in range(3)))
        other.bench.out(BM, 9)
        while other.bench.alt() & DRQ:
            other.bench.pull(other.bench.inb(MID) | other.bench.inb(HIGH) << 8)
        assert (other.bench.alt(), other.bench.inb(0x1F1)) == (0x51, 0x20)


def test_a_copy_of_a_copy() -> None:
    """Twice within one window: what had moved before either time counts."""
    world = World(False)
    world.step(READ_8)
    got = b""
    for _ in range(0, 8 * SECTOR, 128):
        got += world.bench.pull(128)
        world = world.copy()
    assert got == pattern(1024)[3 * SECTOR : 11 * SECTOR]
    assert world.bench.status() == 0x50
    json.dumps(str(world.bench.channel.save()))
