"""Disks by PIO: DRQ blocks and their interrupts, the three kinds of addresses, errors, large and slow transfers."""

from __future__ import annotations

from typing import Any

import pytest
from ide_bench import (
    ABRT,
    BSY,
    COMMAND,
    COUNT,
    DATA,
    DEVICE,
    DRDY,
    DRQ,
    DSC,
    ERR,
    ERROR,
    HIGH,
    IDNF,
    LOW,
    MID,
    SECTOR,
    UNC,
    Bench,
    FakeBackend,
    disk,
    new_bench,
    pattern,
)

from pyvmm.devices.ide.atapi import AtapiDrive

READ, READ_EXT, READ_MULTIPLE, READ_MULTIPLE_EXT = 0x20, 0x24, 0xC4, 0x29
WRITE, WRITE_EXT, WRITE_MULTIPLE, WRITE_MULTIPLE_EXT, WRITE_FUA = 0x30, 0x34, 0xC5, 0x39, 0xCE
SET_MULTIPLE = 0xC6
DONE = DRDY | DSC
FAILED = DRDY | DSC | ERR


def sectors(backend: FakeBackend, lba: int, count: int) -> bytes:
    return bytes(backend.data[lba * SECTOR : (lba + count) * SECTOR])


@pytest.mark.parametrize("count", [1, 2, 255, 256])
def test_read_sectors(count: int) -> None:
    bench, backend = new_bench()
    assert bench.read_pio(READ, 100, count) == sectors(backend, 100, count)
    assert bench.inb(ERROR) == 0
    assert bench.inb(COUNT) == 0
    assert bench.lba() == 100 + count
    assert len(backend.log) == 1  # the whole command in one request


@pytest.mark.parametrize("count", [1, 2, 256])
def test_write_sectors(count: int) -> None:
    bench, backend = new_bench()
    data = pattern(count, seed=7)
    before = bytes(backend.data)
    bench.write_pio(WRITE, 50, data)
    end = (50 + count) * SECTOR
    assert backend.data == before[: 50 * SECTOR] + data + before[end:]
    assert backend.log == [("write", 50, count)]
    assert (bench.inb(COUNT), bench.lba()) == (0, 50 + count)


@pytest.mark.parametrize("width", [2, 4])
def test_the_data_port_takes_words_and_double_words(width: int) -> None:
    bench, backend = new_bench()
    bench.command(READ, 3)
    assert bench.pull(SECTOR, width) == sectors(backend, 3, 1)
    bench.command(WRITE, 4)
    bench.push(pattern(1, seed=2), width)
    assert sectors(backend, 4, 1) == pattern(1, seed=2)


def test_bytes_at_the_data_port_are_none_of_its_business() -> None:
    bench, backend = new_bench()
    bench.command(READ, 3)
    assert bench.inb(DATA) == 0xFF
    assert bench.pull(SECTOR) == sectors(backend, 3, 1)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("count", [1, 16, 37, 256])
def test_multiple(block: int, count: int) -> None:
    bench, backend = new_bench()
    bench.command(SET_MULTIPLE, count=block)
    assert bench.status() == DONE
    assert bench.read_pio(READ_MULTIPLE, 9, count, block) == sectors(backend, 9, count)
    data = pattern(count, seed=3)
    bench.write_pio(WRITE_MULTIPLE, 9, data, block)
    assert sectors(backend, 9, count) == data


def test_multiple_is_aborted_while_it_is_off() -> None:
    bench, _ = new_bench()
    bench.command(SET_MULTIPLE, count=0)
    for opcode in (READ_MULTIPLE, READ_MULTIPLE_EXT, WRITE_MULTIPLE, WRITE_MULTIPLE_EXT, WRITE_FUA):
        bench.command(opcode)
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, ABRT)


@pytest.mark.parametrize("count", [3, 17, 32, 128, 255])
def test_a_multiple_that_is_too_large_or_odd_changes_nothing(count: int) -> None:
    bench, backend = new_bench()
    bench.command(SET_MULTIPLE, count=count)
    assert (bench.status(), bench.inb(ERROR)) == (FAILED, ABRT)
    assert bench.read_pio(READ_MULTIPLE, 0, 32, 16) == sectors(backend, 0, 32)


def test_lba48_reads_and_writes_more_than_28_bits_can_say() -> None:
    class Sparse(FakeBackend):
        """The last sectors of a disk of 2^40."""

        def __init__(self) -> None:
            super().__init__(pattern(700))
            self.first = (1 << 40) - self.sectors

        def at(self, sector: int) -> int:
            return sector - self.first

        def aio_readv(self, sector: int, iov: Any, cb: Any) -> Any:
            return super().aio_readv(self.at(sector), iov, cb)

        def aio_writev(self, sector: int, iov: Any, cb: Any) -> Any:
            return super().aio_writev(self.at(sector), iov, cb)

    backend = Sparse()
    drive, _ = disk()
    drive.backend = backend  # type: ignore[assignment]
    drive.sectors = 1 << 40
    bench = Bench(drive)
    bench.command_ext(READ_EXT, backend.first + 5, 600)
    data = b""
    for _ in range(600):
        assert bench.status() == DONE | DRQ
        data += bench.pull(SECTOR, 4)
    assert data == sectors(backend, 5, 600)
    assert bench.alt() == DONE
    assert backend.log == [("read", 5, 256), ("read", 261, 256), ("read", 517, 88)]
    assert bench.lba_ext() == backend.first + 605
    bench.command_ext(WRITE_EXT, backend.first + 5, 258)
    bench.push(pattern(258, seed=5), 4)
    assert sectors(backend, 5, 258) == pattern(258, seed=5)
    # One past the end
    bench.command_ext(READ_EXT, (1 << 40) - 1, 2)
    assert bench.pull(SECTOR) == sectors(backend, 699, 1)
    assert (bench.status(), bench.inb(ERROR), bench.lba_ext(), bench.inb(COUNT)) == (FAILED, IDNF, 1 << 40, 1)


def test_a_count_of_zero_is_the_largest() -> None:
    bench, backend = new_bench(sectors=300)
    bench.command(READ, 0, 0)
    for _ in range(256):
        assert bench.status() == DONE | DRQ
        bench.pull(SECTOR, 4)
    assert bench.status() == DONE
    bench.command_ext(READ_EXT, 0, 0)  # 65536: all 300, and then none
    for _ in range(300):
        assert bench.status() == DONE | DRQ
        bench.pull(SECTOR, 4)
    assert (bench.status(), bench.inb(ERROR), bench.lba_ext()) == (FAILED, IDNF, 300)
    assert {what for what, _, _ in backend.log} == {"read"}


class TestChs:
    """The default translation of a disk of 8064 sectors: 8 cylinders, 16 heads, 63 sectors."""

    def chs(self, bench: Bench, opcode: int, cylinder: int, head: int, sector: int, count: int = 1) -> None:
        bench.out(DEVICE, 0xA0 | head)
        bench.out(COUNT, count)
        bench.out(LOW, sector)
        bench.out(MID, cylinder & 0xFF)
        bench.out(HIGH, cylinder >> 8)
        bench.out(COMMAND, opcode)

    def address(self, bench: Bench) -> tuple[int, int, int]:
        return bench.inb(MID) | bench.inb(HIGH) << 8, bench.inb(DEVICE) & 15, bench.inb(LOW)

    @pytest.mark.parametrize(
        ("chs", "lba"), [((0, 0, 1), 0), ((0, 0, 63), 62), ((0, 1, 1), 63), ((1, 0, 1), 1008), ((7, 15, 63), 8063)]
    )
    def test_read(self, chs: tuple[int, int, int], lba: int) -> None:
        bench, backend = new_bench(sectors=8064)
        self.chs(bench, READ, *chs)
        assert bench.status() == DONE | DRQ
        assert bench.pull(SECTOR) == sectors(backend, lba, 1)
        assert backend.log == [("read", lba, 1)]

    def test_the_address_moves_on_over_tracks_and_cylinders(self) -> None:
        bench, _ = new_bench(sectors=8064)
        self.chs(bench, READ, 0, 15, 63)
        bench.pull(SECTOR)
        assert self.address(bench) == (1, 0, 1)

    @pytest.mark.parametrize("chs", [(0, 0, 0), (0, 0, 64), (8, 0, 1), (0xFFFF, 15, 63)])
    @pytest.mark.parametrize("opcode", [READ, WRITE, 0x40, 0x70, 0xC8, 0xCA])
    def test_addresses_that_are_not_there(self, chs: tuple[int, int, int], opcode: int) -> None:
        bench, backend = new_bench(sectors=8064)
        self.chs(bench, opcode, *chs)
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, IDNF)
        assert backend.log == []

    def test_initialize_device_parameters(self) -> None:
        bench, _ = new_bench(sectors=8064)
        bench.out(DEVICE, 0xA3)  # 4 heads
        bench.out(COUNT, 32)
        bench.out(COMMAND, 0x91)
        assert bench.status() == DONE
        self.chs(bench, READ, 1, 2, 3)
        assert bench.pull(SECTOR) == bytes(pattern(8064)[194 * SECTOR : 195 * SECTOR])  # (1 * 4 + 2) * 32 + 3 - 1
        assert self.address(bench) == (1, 2, 4)
        self.chs(bench, READ, 0, 4, 1)
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, IDNF)
        bench.command(0xEC)
        words = bench.pull(SECTOR)
        assert [int.from_bytes(words[2 * n : 2 * n + 2], "little") for n in (1, 3, 6, 54, 55, 56, 57, 58)] == [
            8, 16, 63, 63, 4, 32, 8064, 0,
        ]  # fmt: skip
        bench.out(COUNT, 0)
        bench.out(COMMAND, 0x91)
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, ABRT)

    def test_an_error_is_reported_in_the_form_of_the_command(self) -> None:
        bench, backend = new_bench(sectors=8064)
        backend.bad = {63 * 16 + 5}
        self.chs(bench, READ, 1, 0, 5, 3)
        bench.pull(SECTOR)
        assert (bench.status(), bench.inb(ERROR), self.address(bench)) == (FAILED, UNC, (1, 0, 6))


class TestErrors:
    @pytest.mark.parametrize("bad", [0, 1, 2, 7, 30, 31])
    def test_the_sectors_before_a_bad_one_are_read(self, bad: int) -> None:
        bench, backend = new_bench()
        backend.bad = {100 + bad, 100 + 31}
        bench.command(READ, 100, 32)
        for n in range(bad):
            assert bench.irq.level == 1
            assert bench.status() == DONE | DRQ
            assert bench.pull(SECTOR) == sectors(backend, 100 + n, 1)
        assert bench.irq.level == 1
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, UNC)
        assert (bench.lba(), bench.inb(COUNT)) == (100 + bad, 32 - bad)
        assert len(backend.log) <= 2 + 2 * 5

    def test_the_blocks_before_a_bad_one_are_read(self) -> None:
        bench, backend = new_bench()
        backend.bad = {100 + 21}
        bench.command(READ_MULTIPLE, 100, 64)
        assert bench.status() == DONE | DRQ
        assert bench.pull(16 * SECTOR, 4) == sectors(backend, 100, 16)
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, UNC)
        assert (bench.lba(), bench.inb(COUNT)) == (121, 64 - 21)

    def test_a_bad_sector_far_into_a_long_read(self) -> None:
        bench, backend = new_bench()
        backend.bad = {600}
        bench.command_ext(READ_EXT, 0, 1000)
        assert bench.pull(600 * SECTOR, 4) == sectors(backend, 0, 600)
        assert (bench.status(), bench.inb(ERROR), bench.lba_ext()) == (FAILED, UNC, 600)

    def test_a_failure_that_does_not_come_back_is_none(self) -> None:
        bench, backend = new_bench()
        backend.bad = {10}
        backend.held = True
        bench.command(READ, 0, 32)
        backend.release()
        backend.bad = set()
        while backend.waiting:
            backend.release()
        assert bench.pull(32 * SECTOR, 4) == sectors(backend, 0, 32)
        assert bench.status() == DONE

    @pytest.mark.parametrize("bad", [0, 5, 31])
    def test_the_first_sector_that_can_not_be_written_is_named(self, bad: int) -> None:
        bench, backend = new_bench()
        before = bytes(backend.data)
        backend.bad = {100 + bad}
        data = pattern(32, seed=9)
        bench.command(WRITE, 100, 32)
        bench.push(data, 4)
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, ABRT)
        assert (bench.lba(), bench.inb(COUNT)) == (100 + bad, 32 - bad)
        assert sectors(backend, 100, bad) == data[: bad * SECTOR]
        assert backend.data[(100 + bad) * SECTOR :] == before[(100 + bad) * SECTOR :]

    @pytest.mark.parametrize("opcode", [READ, WRITE, READ_MULTIPLE, WRITE_MULTIPLE])
    @pytest.mark.parametrize("lba", [1024, 5000, (1 << 28) - 1])
    def test_past_the_end(self, opcode: int, lba: int) -> None:
        bench, backend = new_bench()
        bench.command(opcode, lba, 4)
        assert bench.irq.level == 1
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, IDNF)
        assert (bench.lba(), bench.inb(COUNT)) == (lba, 4)
        assert backend.log == []

    def test_over_the_end(self) -> None:
        bench, backend = new_bench()
        bench.command(READ, 1020, 8)
        assert bench.pull(4 * SECTOR) == sectors(backend, 1020, 4)
        assert (bench.status(), bench.inb(ERROR), bench.lba(), bench.inb(COUNT)) == (FAILED, IDNF, 1024, 4)
        bench.command(WRITE, 1020, 8)
        bench.push(bytes(4 * SECTOR))
        assert (bench.status(), bench.inb(ERROR), bench.lba(), bench.inb(COUNT)) == (FAILED, IDNF, 1024, 4)
        assert sectors(backend, 1020, 4) == bytes(4 * SECTOR)
        # In DRQ blocks of 16, the one that reaches over the end is not moved.
        bench.command(READ_MULTIPLE, 1000, 32)
        assert bench.pull(16 * SECTOR) == sectors(backend, 1000, 16)
        assert (bench.status(), bench.inb(ERROR), bench.lba(), bench.inb(COUNT)) == (FAILED, IDNF, 1024, 8)

    def test_a_disk_that_is_read_only(self) -> None:
        bench, backend = new_bench(read_only=True)
        for opcode in (WRITE, WRITE_MULTIPLE, WRITE_EXT, 0xCA, 0x35, 0x3D):
            bench.command(opcode)
            assert (bench.status(), bench.inb(ERROR)) == (FAILED, ABRT)
        assert backend.log == []
        assert bench.read_pio(READ, 0, 1) == sectors(backend, 0, 1)

    def test_a_command_after_an_error_begins_with_a_clean_slate(self) -> None:
        bench, backend = new_bench()
        backend.bad = {1}
        bench.command(READ, 1)
        assert bench.status() == FAILED
        assert bench.read_pio(READ, 2, 1) == sectors(backend, 2, 1)
        assert bench.inb(ERROR) == 0


class TestSlow:
    """The backend calls back later."""

    def test_busy_until_the_data_is_there(self) -> None:
        bench, backend = new_bench()
        backend.held = True
        bench.command(READ, 5, 2)
        assert bench.alt() & BSY
        assert bench.pull(4) == b"\xff\xff\xff\xff"
        assert bench.irq.level == 0
        backend.release()
        assert bench.irq.level == 1
        assert bench.status() == DONE | DRQ
        assert bench.pull(2 * SECTOR) == sectors(backend, 5, 2)

    def test_busy_until_the_data_is_written(self) -> None:
        bench, backend = new_bench()
        backend.held = True
        bench.command(WRITE, 5, 2)
        bench.push(pattern(2, seed=4))
        bench.out(0x1F7, 0)  # a command meanwhile is lost
        assert bench.alt() & BSY
        bench.irqs.clear()
        backend.release()
        assert bench.irqs == [1] or bench.irq.level == 1
        assert bench.status() == DONE
        assert sectors(backend, 5, 2) == pattern(2, seed=4)

    def test_long_transfers_chunk_by_chunk(self) -> None:
        bench, backend = new_bench()
        backend.held = True
        bench.command_ext(WRITE_EXT, 0, 520)
        data = pattern(520, seed=6)
        for begin, end in ((0, 256), (256, 512), (512, 520)):
            assert bench.alt() == DONE | DRQ
            bench.push(data[begin * SECTOR : end * SECTOR], 4)
            assert bench.alt() & BSY
            backend.release()
        assert bench.status() == DONE
        assert sectors(backend, 0, 520) == data
        bench.command_ext(READ_EXT, 0, 520)
        for begin, end in ((0, 256), (256, 512), (512, 520)):
            assert bench.alt() & BSY
            backend.release()
            assert bench.pull((end - begin) * SECTOR, 4) == data[begin * SECTOR : end * SECTOR]
        assert bench.status() == DONE

    def test_a_write_that_fails_once_is_none(self) -> None:
        bench, backend = new_bench()
        backend.held = True
        backend.bad = {10}
        bench.command(WRITE, 0, 32)
        bench.push(pattern(32, seed=4), 4)
        backend.release()
        backend.bad = set()
        while backend.waiting:
            assert bench.alt() & BSY
            backend.release()
        assert bench.status() == DONE
        assert sectors(backend, 0, 32) == pattern(32, seed=4)

    def test_errors_that_are_found_later(self) -> None:
        bench, backend = new_bench()
        backend.held = True
        backend.bad = {19}
        bench.command(READ, 0, 32)
        while backend.waiting:
            assert bench.alt() & BSY
            backend.release()
        assert bench.pull(19 * SECTOR, 4) == sectors(backend, 0, 19)
        assert (bench.status(), bench.inb(ERROR), bench.lba()) == (FAILED, UNC, 19)


class TestWriteCache:
    def test_writes_are_flushed_before_they_end_while_it_is_off(self) -> None:
        bench, backend = new_bench()
        bench.command(0xEF, features=0x82)
        assert bench.status() == DONE
        assert backend.log == [("flush", 0, 0)]
        data = pattern(2, seed=4)
        bench.write_pio(WRITE, 5, data)
        assert backend.stable == bytes(backend.data)
        assert backend.log[1:] == [("write", 5, 2), ("flush", 0, 0)]
        bench.command(0xEF, features=0x02)
        bench.write_pio(WRITE, 5, data)
        assert backend.log[3:] == [("write", 5, 2)]

    def test_write_multiple_fua(self) -> None:
        bench, backend = new_bench()
        bench.command_ext(WRITE_FUA, 5, 2)
        bench.push(bytes(2 * SECTOR))
        assert bench.status() == DONE
        assert backend.stable[5 * SECTOR : 7 * SECTOR] == bytes(2 * SECTOR)

    def test_a_flush_that_fails(self) -> None:
        bench, backend = new_bench()
        backend.flush_ret = -5
        bench.command_ext(WRITE_FUA, 5, 1)
        bench.push(bytes(SECTOR))
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, ABRT)


class TestDataOut:
    """Whoever gathers the guest's writes to the data port is told when there will be some."""

    def test_for_each_chunk_and_for_packets(self) -> None:
        drive, backend = disk()
        bench = Bench(drive, AtapiDrive(None))
        windows: list[bool] = []
        bench.channel.on_data_out = lambda: windows.append(bench.channel.data.writing)
        bench.read_pio(READ, 0, 4)
        assert windows == []
        bench.write_pio(WRITE, 0, bytes(4 * SECTOR))
        assert windows == [True]
        backend.held = True
        bench.command_ext(WRITE_EXT, 0, 300)
        bench.push(bytes(256 * SECTOR), 4)
        assert windows == [True] * 2
        backend.release()
        assert windows == [True] * 3
        bench.push(bytes(44 * SECTOR), 4)
        backend.release()
        bench.packet(bytes(6), unit=1)
        assert windows == [True] * 4
        assert not bench.channel.data.writing
