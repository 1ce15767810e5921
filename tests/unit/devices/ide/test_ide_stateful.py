"""A guest without sense on a channel with a disk and a CD, whose backends answer at once or later, well or badly.

Nothing may raise; the registers, the window and the interrupt line must fit together after every step; memory that no
table names stays as it is; and a reset must bring the drives back from anywhere.
"""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from ide_bench import (
    BM,
    BM_TABLE,
    BSY,
    COMMAND,
    CONTROL,
    DATA,
    DEVICE,
    DRDY,
    DRQ,
    DSC,
    ERR,
    LAST,
    SECTOR,
    STATUS,
    Bench,
    FakeBackend,
    pattern,
)

from pyvmm.devices.ide.atapi import AtapiDrive
from pyvmm.devices.ide.disk import IdeDisk
from pyvmm.devices.ide.pio_buffer import PioBuffer

SECTORS = 700
BM_START = 1
TABLES = range(0x4000, 0x6000)  # where PRD tables are
BUFFERS = range(0x20000, 0x60000)  # what good ones name
EDGE = 0x20_2F00  # near the end of memory: most of what is named there is none, but a few bytes are
NSECTORS = st.sampled_from((0, 1, 2, 3, 16, 17, 100, 255))
OPCODES = st.one_of(
    st.sampled_from((0x20, 0x24, 0x25, 0x29, 0x30, 0x34, 0x35, 0x39, 0xC4, 0xC5, 0xC8, 0xCA, 0xCE, 0x3D)),
    st.sampled_from((0x06, 0x08, 0x40, 0x42, 0x70, 0x90, 0x91, 0xA0, 0xA1, 0xC6, 0xE0, 0xE7, 0xEC, 0xEF, 0xF8)),
    st.integers(0, 255).filter(lambda code: code not in (0xE6, 0x99)),
)
LBAS = st.one_of(st.integers(0, SECTORS + 10), st.integers(0, (1 << 28) - 1))
CDBS = st.one_of(
    st.binary(min_size=12, max_size=12),
    st.builds(
        lambda op, lba, count: bytes((op, 0)) + struct.pack(">IBHBBB", lba, 0, count, 0, 0, 0),
        st.sampled_from((0x28, 0x12, 0x03, 0x00, 0x25, 0x43, 0x5A, 0x55, 0x1B)),
        st.integers(0, 180),
        st.integers(0, 80),
    ),
)


class SenselessGuest(RuleBasedStateMachine):
    @initialize(held=st.booleans())
    def power_on(self, held: bool) -> None:
        self.disk = FakeBackend(pattern(SECTORS))
        self.cd = FakeBackend(pattern(4 * 175, seed=2), read_only=True)
        self.disk.held = self.cd.held = held
        self.bench = Bench(IdeDisk(self.disk), AtapiDrive(self.cd))  # type: ignore[arg-type]
        memory = self.bench.memory
        memory.write(0, bytes(memory.size_bytes))

    # -- ports -------------------------------------------------------------------------------------------------------

    @rule(port=st.integers(DATA, COMMAND - 1), value=st.integers(0, 255))
    def write_register(self, port: int, value: int) -> None:
        self.bench.out(port, value)

    @rule(port=st.one_of(st.integers(DATA, COMMAND), st.just(CONTROL)), size=st.sampled_from((1, 2, 4)))
    def read_port(self, port: int, size: int) -> None:
        assert 0 <= self.bench.pio.read(port, size) < 1 << 8 * size

    @rule(value=st.sampled_from((0, 2, 4, 6, 0x80, 0xFF)))
    def write_control(self, value: int) -> None:
        self.bench.out(CONTROL, value)

    @rule(port=st.integers(BM, BM + 7), size=st.sampled_from((1, 2, 4)), value=st.integers(0, 0xFFFF_FFFF))
    def write_bus_master(self, port: int, size: int, value: int) -> None:
        if port + size > BM_TABLE:
            return  # see start
        if self.bench.channel.bus_master.prd_table not in TABLES:
            value &= ~BM_START if port == BM else value
        self.bench.pio.write(port, size, value & (1 << 8 * size) - 1)

    @rule(port=st.integers(BM, BM + 7), size=st.sampled_from((1, 2, 4)))
    def read_bus_master(self, port: int, size: int) -> None:
        self.bench.pio.read(port, size)

    @rule(size=st.integers(1, 9000), width=st.sampled_from((2, 4)))
    def pull(self, size: int, width: int) -> None:
        self.bench.pull(size, width)

    @rule(size=st.integers(1, 9000), width=st.sampled_from((2, 4)))
    def push(self, size: int, width: int) -> None:
        self.bench.push(b"\x5a" * size, width)

    # -- commands that might be meant --------------------------------------------------------------------------------

    @rule(opcode=OPCODES, lba=LBAS, count=NSECTORS, unit=st.integers(0, 1), features=st.integers(0, 3))
    def command(self, opcode: int, lba: int, count: int, unit: int, features: int) -> None:
        self.bench.command(opcode, lba, count, features=features, unit=unit)

    @rule(opcode=OPCODES, lba=st.integers(0, (1 << 48) - 1), count=st.integers(0, 700))
    def command_ext(self, opcode: int, lba: int, count: int) -> None:
        self.bench.command_ext(opcode, lba % (SECTORS + 5) if lba & 1 else lba, count, features=1)

    @rule(cdb=CDBS, limit=st.integers(0, 0xFFFF), dma=st.booleans())
    def packet(self, cdb: bytes, limit: int, dma: bool) -> None:
        bench = self.bench
        bench.out(DEVICE, 0xB0)
        bench.out(0x1F1, int(dma))
        bench.out(0x1F4, limit & 0xFF)
        bench.out(0x1F5, limit >> 8)
        bench.out(COMMAND, 0xA0)
        bench.push(cdb)

    @rule(
        entries=st.lists(
            st.tuples(
                st.one_of(
                    st.integers(BUFFERS.start, BUFFERS.stop - 0x10000),
                    st.sampled_from((0xFFFF_FFFF, EDGE, 0xFEE0_0000)),
                ),
                st.one_of(st.sampled_from((0, 1, 2, 511, 512, 4096)), st.integers(0, 0xFFFF)),
            ),
            min_size=1,
            max_size=12,
        ),
        table=st.integers(TABLES.start, TABLES.stop - 200),
        flags=st.sampled_from((1, 9)),
    )
    def start(self, entries: list[tuple[int, int]], table: int, flags: int) -> None:
        raw = b"".join(struct.pack("<II", address, size) for address, size in entries[:-1])
        raw += struct.pack("<II", entries[-1][0], entries[-1][1] | LAST)
        self.bench.memory.write(table & ~3, raw)
        self.bench.pio.write(BM_TABLE, 4, table)
        self.bench.out(BM, 0)
        self.bench.out(BM, flags)

    @rule(enabled=st.booleans())
    def bus_mastering(self, enabled: bool) -> None:
        self.bench.channel.bus_master.enabled = enabled

    # -- the host ----------------------------------------------------------------------------------------------------

    @rule(held=st.booleans(), bad=st.sets(st.integers(0, SECTORS), max_size=2), ret=st.sampled_from((0, 0, -5)))
    def backends(self, held: bool, bad: set[int], ret: int) -> None:
        for backend in (self.disk, self.cd):
            backend.held = held
            backend.bad = bad
            backend.flush_ret = backend.discard_ret = ret

    @rule(which=st.booleans(), last=st.booleans(), late=st.booleans())
    def release(self, which: bool, last: bool, late: bool) -> None:
        backend = self.disk if which else self.cd
        if backend.waiting:
            if last:
                backend.waiting.insert(0, backend.waiting.pop())
            if late:
                backend.waiting[0].cancelled = False  # it could not be cancelled any more
            backend.release()

    @rule(out=st.booleans())
    def change_disc(self, out: bool) -> None:
        device: Any = self.bench.channel.drives[1]
        with self.bench.channel.lock:
            if out:
                device.device.eject(force=True)
            else:
                device.device.insert(self.cd)

    @rule()
    def reset_the_machine(self) -> None:
        self.settle()
        self.bench.channel.reset()
        assert self.bench.alt() == DRDY | DSC

    @rule()
    def save_and_load(self) -> None:
        state = self.bench.channel.save()
        self.settle_elsewhere()
        self.bench.channel.load(state)
        self.bench.channel.after_load()

    @rule()
    def recover(self) -> None:
        """What a driver does that has lost its way."""
        bench = self.bench
        bench.out(BM, 0)
        bench.out(CONTROL, 4)
        self.settle()
        bench.out(CONTROL, 0)
        self.settle()
        assert bench.status() == DRDY | DSC
        assert bench.irq.level == 0
        self.disk.held, self.disk.bad = False, set()
        bench.command(0x20, 5, 1)
        assert bench.status() == DRDY | DSC | DRQ
        assert bench.pull(SECTOR) == self.disk.data[5 * SECTOR : 6 * SECTOR]
        assert bench.status() == DRDY | DSC

    def settle(self) -> None:
        for backend in (self.disk, self.cd):
            while backend.waiting:
                backend.release()

    def settle_elsewhere(self) -> None:
        """The host's threads are done before a state is loaded: nobody writes to the guest's memory behind it."""
        self.disk.held = self.cd.held = False
        self.settle()

    # -- what must always hold ---------------------------------------------------------------------------------------

    @invariant()
    def the_parts_fit_together(self) -> None:
        channel = self.bench.channel
        drive = channel.selected
        status = drive.status
        irq = self.bench.irq.level
        assert irq == int(drive.intrq and not channel._control & 2)
        if channel.data.writing:
            assert status & (BSY | DRQ) == DRQ
        if status & DRQ:
            assert drive.activity is not None
            assert not status & (BSY | ERR)
        elif not status & BSY:
            assert drive.activity is None
        if status & BSY:
            waits = drive.activity is not None or drive.lingering is not None
            assert waits or channel.in_reset
        assert status & ERR == 0 or drive.error
        assert channel.bus_master.status & ~0x67 == 0
        assert channel.bus_master.prd_table & 3 == 0

    @invariant()
    def what_is_read_without_python_is_what_python_would_say(self) -> None:
        bench = self.bench
        channel = bench.channel
        drive = channel.selected
        ports = {CONTROL: drive.status, BM: channel.bus_master.command, BM + 2: channel.bus_master.status}
        if not drive.intrq:  # else the read would have a consequence
            ports[STATUS] = drive.status
        assert {port: bench.inb(port) for port in ports} == ports

    @invariant()
    def the_image_keeps_its_size(self) -> None:
        assert len(self.disk.data) == SECTORS * SECTOR
        assert self.cd.data == pattern(4 * 175, seed=2)

    def teardown(self) -> None:
        """What no good table named is as it was."""
        memory = self.bench.memory
        assert memory.read(0, TABLES.start) == bytes(TABLES.start)
        between = BUFFERS.start - TABLES.stop
        assert memory.read(TABLES.stop, between) == bytes(between)
        after = EDGE - BUFFERS.stop
        assert memory.read(BUFFERS.stop, after) == bytes(after)


SenselessGuest.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestSenselessGuest = SenselessGuest.TestCase


def test_one_buffer_a_channel() -> None:
    assert len(PioBuffer().memory) == 256 * SECTOR
