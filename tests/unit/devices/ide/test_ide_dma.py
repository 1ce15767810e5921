"""Bus master transfers: the table, the status bits, both orders of starting, what guests get wrong, TRIM."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ide_bench import (
    ABRT,
    BM,
    BM_STATUS,
    BM_TABLE,
    BSY,
    CONTROL,
    COUNT,
    DRDY,
    DRQ,
    DSC,
    ERR,
    ERROR,
    IDNF,
    LAST,
    PRD_TABLE,
    RAM_BYTES,
    SECTOR,
    UNC,
    Bench,
    disk,
    new_bench,
    pattern,
)

READ, READ_EXT, WRITE, WRITE_EXT, WRITE_FUA, TRIM = 0xC8, 0x25, 0xCA, 0x35, 0x3D, 0x06
DONE = DRDY | DSC
FAILED = DRDY | DSC | ERR
ACTIVE, ERROR_BIT, INTERRUPT = 1, 2, 4


@pytest.mark.parametrize("command_first", [False, True])
@pytest.mark.parametrize("read", [False, True])
def test_both_orders(command_first: bool, read: bool) -> None:
    bench, backend = new_bench()
    data = pattern(8, seed=5)
    bench.memory.write(0x2000, data)
    expected = backend.data[3 * SECTOR : 11 * SECTOR] if read else data
    bench.prd((0x2000, 8 * SECTOR))
    if command_first:
        bench.command(READ if read else WRITE, 3, 8)
        assert bench.alt() == DONE | DRQ
        assert bench.bm_status() == 0
        bench.start(read)
    else:
        bench.start(read)
        assert bench.bm_status() == ACTIVE
        bench.command(READ if read else WRITE, 3, 8)
    assert bench.bm_status() == INTERRUPT
    assert bench.irq.level == 1
    assert bench.status() == DONE
    assert (bench.inb(COUNT), bench.lba()) == (0, 11)
    assert bench.memory.read(0x2000, 8 * SECTOR) == expected
    assert backend.data[3 * SECTOR : 11 * SECTOR] == expected
    assert len(backend.log) == 1
    bench.out(BM, 0)
    bench.out(BM_STATUS, 4)
    assert bench.bm_status() == 0


def test_one_write_that_forgets_old_results_and_starts() -> None:
    bench, _ = new_bench()
    for _ in range(2):
        bench.prd((0x2000, SECTOR))
        bench.command(READ, 3, 1)
        bench.pio.write(BM, 4, 0x0006_0009)
        assert bench.bm_status() == INTERRUPT
        assert bench.status() == DONE
        bench.out(BM, 0)


@pytest.mark.parametrize("read", [False, True])
def test_scattered(read: bool) -> None:
    bench, backend = new_bench()
    entries = [(0x10000, 512), (0x14000, 1024), (0x20002, 6), (0x30000, 506), (0x11000, 2048), (0x11800, 4096)]
    for n, (address, size) in enumerate(entries):
        bench.memory.write(address, bytes(pattern(9, seed=n)[:size]))
    before = b"".join(bench.memory.read(address, size) for address, size in entries)
    bench.prd(*entries)
    bench.start(read)
    bench.command(READ if read else WRITE, 0, 16)
    assert bench.bm_status() == INTERRUPT
    after = b"".join(bench.memory.read(address, size) for address, size in entries)
    assert after == (backend.data[: 16 * SECTOR] if read else before)
    assert backend.data[: 16 * SECTOR] == after


def test_lba48() -> None:
    bench, backend = new_bench(sectors=3000)
    bench.prd(*((0x10000 + n * 0x10000, 0) for n in range(18)))  # 0 is 64 KiB
    bench.start()
    bench.command_ext(READ_EXT, 700, 2300)
    assert bench.status() == DONE
    assert bench.memory.read(0x10000, 2300 * SECTOR) == backend.data[700 * SECTOR :]
    assert bench.lba_ext() == 3000
    assert backend.log == [("read", 700, 2048), ("read", 2748, 252)]


def test_two_thousand_tiny_pieces() -> None:
    bench, backend = new_bench()
    entries = [(0x40000 + 4 * n, 2) for n in range(2048)]
    bench.prd(*entries)
    bench.start()
    bench.command(READ, 0, 8)
    assert bench.bm_status() == INTERRUPT
    assert b"".join(bench.memory.read(*entry) for entry in entries) == backend.data[: 8 * SECTOR]


class TestTable:
    """(INTERRUPT, ACTIVE) of "Programming Interface for Bus Master IDE Controller", section 3."""

    def test_longer_than_the_command(self) -> None:
        bench, backend = new_bench()
        for entries in ([(0x2000, 1024)], [(0x2000, 512), (0x3000, 512)]):
            bench.prd(*entries)
            bench.out(BM, 0)
            bench.start()
            bench.command(READ, 0, 1)
            assert bench.bm_status() == INTERRUPT | ACTIVE
            assert bench.status() == DONE
            assert bench.memory.read(0x2000, SECTOR) == backend.data[:SECTOR]
            assert bench.memory.read(0x2200, SECTOR) == bytes(SECTOR)
            bench.out(BM, 0)
            assert bench.bm_status() == INTERRUPT

    @pytest.mark.parametrize("opcode", [READ, WRITE])
    def test_too_short(self, opcode: int) -> None:
        bench, backend = new_bench()
        bench.prd((0x2000, 512), (0x3000, 510))
        bench.start()
        bench.command(opcode, 0, 2)
        assert bench.bm_status() == 0
        assert bench.irqs == []
        assert bench.status() == DONE
        assert backend.log == []
        # It goes on from there.
        bench.out(BM, 0)
        bench.prd((0x2000, 1024))
        bench.start()
        bench.command(opcode, 0, 2)
        assert bench.bm_status() == INTERRUPT

    def test_without_an_end(self) -> None:
        bench, _ = new_bench()
        bench.memory.write(0, bytes([0x00, 0x40, 0, 0, 0x02, 0, 0, 0]) * (0x10000 // 8))
        for table in (0, 0xFF00, 0xFFFC):
            bench.pio.write(BM_TABLE, 4, table)
            bench.out(BM, 0)
            bench.start()
            bench.command(READ, 0, 256)  # 128 KiB, from at most 16 KiB of table that goes round
            assert bench.bm_status() in (0, ERROR_BIT)
            assert bench.status() == DONE

    def test_the_longest(self) -> None:
        bench, backend = new_bench()
        raw = b"".join(struct.pack("<II", 0x20000 + 16 * n, 16 | (LAST if n == 8191 else 0)) for n in range(8192))
        bench.memory.write(0x10000, raw)
        bench.pio.write(BM_TABLE, 4, 0x10000)
        bench.start()
        bench.command(READ, 0, 256)
        assert bench.bm_status() == INTERRUPT
        assert bench.memory.read(0x20000, 256 * SECTOR) == backend.data[: 256 * SECTOR]

    @pytest.mark.parametrize("table", [RAM_BYTES, RAM_BYTES - 8, 0xFFFF_FFF0, 0xE000_0000])
    def test_not_in_memory(self, table: int) -> None:
        bench, backend = new_bench()
        if table < RAM_BYTES:
            bench.memory.write(table, struct.pack("<II", 0x2000, 16))  # and goes on where there is nothing
        bench.pio.write(BM_TABLE, 4, table)
        bench.start()
        bench.command(READ, 0, 2)
        assert bench.bm_status() == ERROR_BIT
        assert bench.irqs == []
        assert bench.status() == DONE
        assert backend.log == []
        bench.out(BM_STATUS, 2)
        assert bench.bm_status() == 0

    @pytest.mark.parametrize("address", [RAM_BYTES, RAM_BYTES - 510, 0xFFFF_FFFE, 0xFEE0_0000])
    @pytest.mark.parametrize("opcode", [READ, WRITE])
    def test_describes_what_is_not_memory(self, address: int, opcode: int) -> None:
        bench, backend = new_bench()
        bench.prd((0x2000, 512), (address, 512))
        bench.start()
        bench.command(opcode, 0, 2)
        assert bench.bm_status() == ERROR_BIT
        assert bench.memory.read(0x2000, 512) == bytes(512)
        assert backend.log == []

    def test_odd_addresses_and_counts(self) -> None:
        bench, backend = new_bench()
        bench.prd((0x2001, 513))
        bench.pio.write(BM_TABLE, 4, PRD_TABLE | 3)
        assert bench.pio.read(BM_TABLE, 4) == PRD_TABLE
        bench.start()
        bench.command(READ, 0, 1)
        assert bench.bm_status() == INTERRUPT
        assert bench.memory.read(0x1FFE, SECTOR + 4) == b"\0\0" + backend.data[:SECTOR] + b"\0\0"

    def test_aligned_to_four_bytes_only(self) -> None:
        """Entries over the end of a page, and of the block of 64 KiB that a table lies in."""
        bench, backend = new_bench()
        bench.prd(*((0x2000 + 1024 * n, 512) for n in range(16)), table=0x8FC4)
        bench.start()
        bench.command(READ, 0, 16)
        assert bench.bm_status() == INTERRUPT
        data = b"".join(bench.memory.read(0x2000 + 1024 * n, 512) for n in range(16))
        assert data == backend.data[: 16 * SECTOR]
        bench.out(BM, 0)
        bench.prd((0x2000, 512), (0x3000, 512), table=0xFFF4)
        bench.start()
        bench.command(READ, 0, 2)
        assert bench.bm_status() == 0

    def test_rom_is_not_written(self) -> None:
        from pyvmm.guest_memory import RamRegion

        bench, backend = new_bench()
        bench.memory.add(RamRegion(0x1000_0000, 4096, readonly=True, name="rom"))
        bench.prd((0x1000_0000, 512))
        bench.start()
        bench.command(READ, 0, 1)
        assert bench.bm_status() == ERROR_BIT
        bench.out(BM, 0)
        bench.start(False)
        bench.command(WRITE, 0, 1)
        assert bench.bm_status() == INTERRUPT
        assert backend.data[:SECTOR] == bytes(SECTOR)

    def test_is_read_once(self) -> None:
        """What the guest changes in it later has no effect."""
        bench, backend = new_bench()
        backend.held = True
        bench.prd((0x2000, 512))
        bench.start()
        bench.command(READ, 0, 1)
        bench.prd((0x7_0000_0000 & 0xFFFF_FFFF, 0xFFFF))
        bench.pio.write(BM_TABLE, 4, 0xFFFF_0000)
        backend.release()
        assert bench.bm_status() == INTERRUPT
        assert bench.memory.read(0x2000, SECTOR) == backend.data[:SECTOR]


class TestRegisters:
    def test_parts(self) -> None:
        bench, _ = new_bench()
        bench.pio.write(BM_TABLE, 4, 0x12345678)
        assert [bench.inb(BM_TABLE + n) for n in range(4)] == [0x78, 0x56, 0x34, 0x12]
        bench.out(BM_TABLE + 1, 0xAB)
        bench.pio.write(BM_TABLE + 2, 2, 0xCDEF)
        assert bench.pio.read(BM_TABLE, 4) == 0xCDEFAB78
        assert bench.pio.read(BM, 4) == 0
        bench.pio.write(BM, 4, 0x0060_0008)
        assert bench.pio.read(BM, 4) == 0x0060_0008
        assert bench.pio.read(BM_STATUS, 2) == 0x60

    def test_only_some_bits_can_be_set(self) -> None:
        bench, _ = new_bench()
        bench.out(BM, 0xF6)
        bench.out(BM_STATUS, 0xFF)
        assert (bench.inb(BM), bench.inb(BM_STATUS)) == (0, 0x60)
        bench.out(BM + 1, 0xFF)
        bench.out(BM + 3, 0xFF)
        assert (bench.inb(BM + 1), bench.inb(BM + 3)) == (0, 0)

    def test_the_interrupt_bit_follows_every_interrupt(self) -> None:
        bench, _ = new_bench()
        bench.command(0xE7)
        assert bench.bm_status() == INTERRUPT
        bench.status()
        assert bench.bm_status() == INTERRUPT
        bench.out(BM_STATUS, 4)
        assert bench.bm_status() == 0

    def test_starting_twice_is_starting_once(self) -> None:
        bench, backend = new_bench()
        backend.held = True
        bench.prd((0x2000, 512))
        bench.command(READ)
        bench.start()
        bench.out(BM, 9)
        assert len(backend.log) == 1

    def test_the_commands_direction_counts(self) -> None:
        bench, backend = new_bench()
        before = bytes(backend.data)
        bench.prd((0x2000, 512))
        bench.start(to_memory=False)
        bench.command(READ, 5)
        assert bench.bm_status() == INTERRUPT
        assert bench.memory.read(0x2000, SECTOR) == before[5 * SECTOR : 6 * SECTOR]
        assert backend.data == before


class TestStopping:
    def test_before_the_command(self) -> None:
        bench, backend = new_bench()
        bench.prd((0x2000, 512))
        bench.start()
        bench.out(BM, 0)
        bench.command(READ)
        assert bench.alt() == DONE | DRQ
        assert backend.log == []
        bench.start()
        assert bench.status() == DONE

    def test_in_the_middle(self) -> None:
        bench, backend = new_bench()
        backend.held = True
        bench.prd((0x2000, 512))
        bench.start()
        bench.command(READ)
        bench.out(BM, 8)
        assert bench.bm_status() == 0
        assert backend.waiting[0].cancelled
        assert bench.alt() & BSY  # until nobody writes to the guest's memory any more
        backend.release()
        assert bench.irq.level == 1
        assert (bench.status(), bench.inb(ERROR), bench.lba()) == (FAILED, ABRT, 0)
        backend.held = False
        bench.start()
        bench.command(READ)
        assert bench.status() == DONE

    def test_too_late_to_be_cancelled(self) -> None:
        bench, backend = new_bench()
        backend.held = True
        bench.prd((0x2000, 512))
        bench.start()
        bench.command(READ)
        bench.out(BM, 8)
        backend.waiting[0].cancelled = False
        backend.release()
        assert bench.status() == DONE
        assert bench.bm_status() == INTERRUPT
        assert bench.memory.read(0x2000, SECTOR) == backend.data[:SECTOR]

    def test_between_the_requests_of_a_long_one(self) -> None:
        bench, backend = new_bench(sectors=3000)
        backend.held = True
        bench.prd(*((0x10000 + n * 0x10000, 0) for n in range(18)))
        bench.start()
        bench.command_ext(READ_EXT, 0, 2300)
        bench.out(BM, 8)
        backend.waiting[0].cancelled = False
        backend.release()
        assert backend.waiting == []
        assert (bench.status(), bench.inb(ERROR), bench.lba_ext()) == (FAILED, ABRT, 2048)

    def test_bus_mastering_switched_off(self) -> None:
        bench, backend = new_bench()
        assert bench.channel.bus_master.enabled
        bench.channel.bus_master.enabled = False
        bench.prd((0x2000, 512))
        bench.start()
        bench.command(READ)
        assert bench.alt() == DONE | DRQ
        assert bench.bm_status() == ACTIVE
        assert backend.log == []
        bench.channel.bus_master.enabled = True
        assert bench.bm_status() == INTERRUPT
        assert bench.status() == DONE

    @pytest.mark.parametrize("entries", [[(0, 0)] * 4096, [(0x2000, 512)]])
    def test_a_read_that_is_started_with_bus_mastering_off(self, entries: list[tuple[int, int]]) -> None:
        """QEMU's ide-test (bmdma/no_busmaster) waits for its end: active and interrupt, no error, no byte in memory."""
        bench, _ = new_bench()
        bench.prd(*entries, last=len(entries) == 1)
        before = bench.memory.read(0, bench.memory.size_bytes)
        bench.channel.bus_master.enabled = False
        bench.command(READ, 0, 0)  # 256 sectors
        assert bench.alt() == DONE | DRQ
        bench.start()
        assert bench.bm_status() == ACTIVE | INTERRUPT
        assert bench.status() == DONE
        assert bench.memory.read(0, bench.memory.size_bytes) == before

    def test_a_write_that_is_started_with_bus_mastering_off_waits(self) -> None:
        bench, backend = new_bench()
        before = bytes(backend.data)
        bench.memory.write(0x2000, b"w" * 512)
        bench.prd((0x2000, 512))
        bench.channel.bus_master.enabled = False
        bench.command(WRITE, 5)
        bench.start(to_memory=False)
        assert (bench.alt(), bench.bm_status()) == (DONE | DRQ, ACTIVE)
        assert backend.data == before
        bench.channel.bus_master.enabled = True
        assert (bench.status(), bench.bm_status()) == (DONE, INTERRUPT)
        assert backend.data[5 * 512 : 6 * 512] == b"w" * 512

    def test_a_read_that_no_table_could_hold(self) -> None:
        """What is left of the table's 64 KiB has no room for as many entries."""
        bench, _ = new_bench()
        bench.pio.write(BM + 4, 4, 0x1_FFF8)  # one entry: 64 KiB
        bench.channel.bus_master.enabled = False
        bench.command(READ, 0, 0)
        bench.start()
        assert bench.bm_status() & (ACTIVE | INTERRUPT) == 0

    def test_a_reset_takes_the_command_away(self) -> None:
        bench, backend = new_bench()
        bench.prd((0x2000, 512))
        bench.command(READ)
        bench.out(CONTROL, 4, 0)
        bench.start()
        assert backend.log == []
        assert bench.status() == DONE
        bench.command(READ)  # the start bit is set still
        assert bench.status() == DONE
        assert bench.bm_status() == INTERRUPT


class TestErrors:
    @pytest.mark.parametrize(("opcode", "error"), [(READ, UNC), (WRITE, ABRT)])
    @pytest.mark.parametrize("bad", [0, 1, 9, 15])
    def test_the_first_bad_sector_is_named(self, opcode: int, error: int, bad: int) -> None:
        bench, backend = new_bench()
        backend.bad = {100 + bad}
        bench.memory.write(0x2000, pattern(16, seed=8))
        bench.prd((0x2000, 1000), (0x6000, 16 * SECTOR - 1000))
        bench.start(opcode == READ)
        bench.command(opcode, 100, 16)
        assert bench.bm_status() == INTERRUPT
        assert (bench.status(), bench.inb(ERROR), bench.lba(), bench.inb(COUNT)) == (FAILED, error, 100 + bad, 16 - bad)

    @pytest.mark.parametrize("opcode", [READ, WRITE])
    def test_past_the_end(self, opcode: int) -> None:
        bench, backend = new_bench()
        bench.prd((0x2000, 0))
        bench.start()
        bench.command(opcode, 1020, 8)
        assert bench.irq.level == 1
        assert bench.bm_status() & INTERRUPT
        assert (bench.status(), bench.inb(ERROR), bench.lba(), bench.inb(COUNT)) == (FAILED, IDNF, 1024, 4)
        bench.command(opcode, 5000, 8)
        assert (bench.status(), bench.inb(ERROR), bench.lba(), bench.inb(COUNT)) == (FAILED, IDNF, 5000, 8)
        assert backend.log == []

    def test_fua_and_the_write_cache(self) -> None:
        bench, backend = new_bench()
        bench.memory.write(0x2000, pattern(1, seed=3))
        bench.prd((0x2000, 512))
        bench.start(False)
        bench.command_ext(WRITE_FUA, 4, 1)
        assert bench.status() == DONE
        assert backend.stable == backend.data
        assert backend.log == [("write", 4, 1), ("flush", 0, 0)]
        bench.command(0xEF, features=0x82)
        bench.out(BM, 0)
        bench.start(False)
        backend.held = True
        bench.command(WRITE, 5)
        backend.release()
        assert bench.alt() & BSY
        backend.flush_ret = -5
        backend.release()
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, ABRT)
        assert bench.bm_status() == INTERRUPT


class TestTrim:
    def trim(self, bench: Bench, *ranges: tuple[int, int], blocks: int = 1, features: int = 1) -> None:
        raw = b"".join(struct.pack("<Q", lba | count << 48) for lba, count in ranges)
        bench.memory.write(0x2000, raw.ljust(blocks * SECTOR, b"\0"))
        bench.prd((0x2000, blocks * SECTOR))
        bench.out(BM, 0)
        bench.start(False)
        bench.command_ext(TRIM, 0, blocks, features=features)

    def test_ranges(self) -> None:
        bench, backend = new_bench()
        self.trim(bench, (5, 10), (0, 0), (100, 924))
        assert (bench.bm_status(), bench.status()) == (INTERRUPT, DONE)
        assert backend.discarded == [(5, 10), (100, 924)]

    def test_a_table_that_is_too_short(self) -> None:
        bench, backend = new_bench()
        bench.prd((0x2000, 510))
        bench.start(False)
        bench.command_ext(TRIM, 0, 1, features=1)
        assert (bench.bm_status(), bench.irqs, bench.status(), backend.log) == (0, [], DONE, [])

    def test_none(self) -> None:
        bench, backend = new_bench()
        self.trim(bench)
        assert (bench.bm_status(), bench.status()) == (INTERRUPT, DONE)
        assert backend.log == []

    def test_as_many_as_there_can_be(self) -> None:
        bench, backend = new_bench()
        ranges = [(n, 1) for n in range(512)]
        self.trim(bench, *ranges, blocks=8)
        assert bench.status() == DONE
        assert backend.discarded == ranges

    def test_past_the_end_nothing_is_forgotten(self) -> None:
        bench, backend = new_bench()
        self.trim(bench, (5, 10), (1020, 5))
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, ABRT)
        assert backend.log == []

    @pytest.mark.parametrize(("blocks", "features"), [(9, 1), (0, 1), (1, 0), (1, 2)])
    def test_what_is_not_supported(self, blocks: int, features: int) -> None:
        bench, backend = new_bench()
        bench.command_ext(TRIM, 0, blocks, features=features)
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, ABRT)
        bench.start(False)
        assert backend.log == []

    def test_a_failure(self) -> None:
        bench, backend = new_bench()
        backend.discard_ret = -5
        self.trim(bench, (5, 10), (20, 1))
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, ABRT)
        assert len(backend.log) == 1

    def test_a_reset_in_the_middle_stops_it(self) -> None:
        bench, backend = new_bench()
        backend.held = True
        self.trim(bench, (5, 10), (20, 1))
        bench.out(CONTROL, 4, 0)
        backend.waiting[0].cancelled = False
        backend.release()
        assert bench.status() == DONE
        assert backend.log == [("discard", 5, 10)]


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 3000).map(lambda n: 2 * n), min_size=1, max_size=40),
    count=st.integers(1, 64),
    read=st.booleans(),
)
def test_any_table(pieces: list[int], count: int, read: bool) -> None:
    """Whatever the pieces are, the data is in order, and no byte beside it changes."""
    bench = Bench(disk(pattern(64))[0])
    entries = []
    at = 0x20000
    for n, size in enumerate(pieces):
        entries.append((at, size))
        at += size + (6 if n % 3 else 0)
    span = at - 0x20000 + 16
    bench.memory.write(0x20000, bytes((n * 7 + 1) & 0xFF for n in range(span)))
    before = bench.memory.read(0x20000, span)
    image = bytes(pattern(64))
    bench.prd(*entries)
    bench.start(read)
    bench.command(READ if read else WRITE, 0, count)
    size = count * SECTOR
    if sum(pieces) < size:
        assert bench.bm_status() == 0
        assert bench.memory.read(0x20000, span) == before
        return
    assert bench.bm_status() == INTERRUPT | (ACTIVE if sum(pieces) > size else 0)
    expected = bytearray(before)
    done = 0
    written = b""
    for address, length in entries:
        length = min(length, size - done)
        start = address - 0x20000
        if read:
            expected[start : start + length] = image[done : done + length]
        written += before[start : start + length]
        done += length
    assert bench.memory.read(0x20000, span) == expected
    if not read:
        backend = bench.channel.drives[0].backend  # type: ignore[attr-defined]
        assert backend.data[:size] == written
