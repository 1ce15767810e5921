"""Packets on the channel: the protocol by PIO and by DMA, byte count limits, errors, resets. Discs are fakes."""

from __future__ import annotations

from errno import ENOMEDIUM
from typing import Any

import pytest
from ide_bench import (
    ABRT,
    BM,
    BM_STATUS,
    BSY,
    COMMAND,
    CONTROL,
    COUNT,
    DRDY,
    DRQ,
    DSC,
    ERR,
    ERROR,
    HIGH,
    LOW,
    MID,
    REASON,
    Bench,
    FakeBackend,
    pattern,
)

from pyvmm.devices.ide.atapi import AtapiDrive

BLOCK = 2048
DONE = DRDY | DSC
CHECK = DRDY | DSC | ERR
NOT_READY, MEDIUM_ERROR, ILLEGAL_REQUEST, UNIT_ATTENTION, ABORTED = 2, 3, 5, 6, 0xB
INQUIRY = bytes((0x12, 0, 0, 0, 36, 0))
TEST_UNIT_READY = bytes(6)
REQUEST_SENSE = bytes((3, 0, 0, 0, 18, 0))


def read_10(lba: int, count: int) -> bytes:
    return bytes((0x28, 0)) + lba.to_bytes(4, "big") + b"\0" + count.to_bytes(2, "big")


def read_12(lba: int, count: int) -> bytes:
    return bytes((0xA8, 0)) + lba.to_bytes(4, "big") + count.to_bytes(4, "big")


def cd(blocks: int = 600) -> tuple[Bench, FakeBackend, AtapiDrive]:
    backend = FakeBackend(pattern(4 * blocks), read_only=True)
    drive = AtapiDrive(backend)
    return Bench(None, drive), backend, drive


class Cd:
    def __init__(self, blocks: int = 600) -> None:
        self.bench, self.backend, self.drive = cd(blocks)
        self.bench.select(1)

    def packet(self, cdb: bytes, limit: int = 0xFFFE, **options: Any) -> None:
        self.bench.packet(cdb, limit, unit=1, **options)

    def sense(self) -> tuple[int, int]:
        """(key, additional code and qualifier) of REQUEST SENSE."""
        self.packet(REQUEST_SENSE)
        data = self.bench.packet_in(0xFFFE)
        return data[2] & 15, data[12] << 8 | data[13]

    def result(self) -> tuple[int, int, int]:
        """(status, error, reason) at a command's end."""
        assert self.bench.irq.level == 1
        return self.bench.status(), self.bench.inb(ERROR), self.bench.inb(REASON) & 3

    def data(self, lba: int, count: int) -> bytes:
        return bytes(self.backend.data[lba * BLOCK : (lba + count) * BLOCK])


@pytest.fixture
def c() -> Cd:
    return Cd()


def test_without_data(c: Cd) -> None:
    c.packet(TEST_UNIT_READY)
    assert c.result() == (DONE, 0, 3)


def test_the_packet_itself_comes_without_an_interrupt(c: Cd) -> None:
    c.bench.out(COMMAND, 0xA0)
    assert c.bench.irq.level == 0
    assert (c.bench.alt(), c.bench.inb(REASON) & 3) == (DONE | DRQ, 1)
    c.bench.push(INQUIRY)
    assert c.bench.irq.level == 0
    c.bench.push(bytes(6))
    assert c.bench.irq.level == 1


def test_check_condition(c: Cd) -> None:
    c.packet(b"\xff")
    assert c.result() == (CHECK, ILLEGAL_REQUEST << 4, 3)
    assert c.sense() == (ILLEGAL_REQUEST, 0x2000)


@pytest.mark.parametrize("limit", [2, 3, 10, 36, 37, 0xFFFF])
def test_small_data_in_blocks_of_the_limit(c: Cd, limit: int) -> None:
    c.packet(INQUIRY, limit)
    data = c.bench.packet_in(limit)
    assert len(data) == 36
    assert data[8:16] == b"PYVMM   "
    assert c.bench.alt() == DONE


def test_data_of_an_odd_length(c: Cd) -> None:
    c.packet(bytes((0x12, 0, 0, 0, 5, 0)), 4)
    assert c.bench.status() == DONE | DRQ
    assert (c.bench.inb(MID), c.bench.inb(HIGH)) == (4, 0)
    c.bench.pull(4)
    assert c.bench.status() == DONE | DRQ
    assert (c.bench.inb(MID), c.bench.inb(HIGH)) == (1, 0)
    assert c.bench.pull(2)[1] == 0xFF
    assert c.result() == (DONE, 0, 3)


@pytest.mark.parametrize("limit", [0, 1])
def test_a_limit_that_allows_nothing(c: Cd, limit: int) -> None:
    c.packet(INQUIRY, limit)
    assert c.bench.status() == CHECK
    assert c.bench.inb(ERROR) == ABRT
    c.packet(TEST_UNIT_READY, limit)
    assert c.result() == (DONE, 0, 3)


@pytest.mark.parametrize("limit", [2048, 0xFFFE, 0xFFFF, 4096, 3000, 2, 12345])
@pytest.mark.parametrize("count", [1, 2, 33, 100])
def test_read_by_pio(c: Cd, limit: int, count: int) -> None:
    if limit == 2 and count > 2:
        count = 3
    c.packet(read_10(7, count), limit)
    assert c.bench.packet_in(limit) == c.data(7, count)
    assert c.bench.alt() == DONE
    # In requests of the buffer's size
    assert len(c.backend.log) <= 1 + count // 32 + (count > 64)


def test_read_12_of_everything(c: Cd) -> None:
    c.packet(read_12(0, 600), 0xFFFE)
    assert c.bench.packet_in(0xFFFE) == c.backend.data


def test_one_interrupt_a_block_and_one_at_the_end(c: Cd) -> None:
    c.packet(read_10(0, 4), 4096)
    c.bench.packet_in(4096)
    assert c.bench.irqs == [1, 0] * 3


@pytest.mark.parametrize("count", [1, 64, 600])
def test_read_by_dma(c: Cd, count: int) -> None:
    size = count * BLOCK
    c.bench.prd(*((0x20000 + at, min(0x10000, size - at)) for at in range(0, size, 0x10000)))
    c.bench.start()
    c.packet(read_12(0, count), 0, dma=True)
    assert c.bench.bm_status() == 4
    assert c.result() == (DONE, 0, 3)
    assert c.bench.memory.read(0x20000, size) == c.data(0, count)


def test_dma_that_is_started_after_the_packet(c: Cd) -> None:
    c.bench.prd((0x20000, BLOCK))
    c.packet(read_10(5, 1), dma=True)
    assert c.bench.alt() == DONE | DRQ
    assert c.bench.pull(4) == b"\xff" * 4
    c.bench.start()
    assert c.result() == (DONE, 0, 3)
    assert c.bench.memory.read(0x20000, BLOCK) == c.data(5, 1)


def test_small_data_by_dma(c: Cd) -> None:
    c.bench.prd((0x20000, 10), (0x30000, 4096))
    c.bench.start()
    c.packet(INQUIRY, dma=True)
    assert c.bench.bm_status() == 5  # the table is longer
    assert c.result() == (DONE, 0, 3)
    assert c.bench.memory.read(0x20000, 12)[8:] == b"PY\0\0"
    assert c.bench.memory.read(0x30000, 30) == b"VMM   DVD-ROM         1.0 ".ljust(30, b"\0")


def test_dma_without_data(c: Cd) -> None:
    c.bench.prd((0x20000, 10))
    c.bench.start()
    c.packet(TEST_UNIT_READY, dma=True)
    assert c.bench.bm_status() == 5
    assert c.result() == (DONE, 0, 3)


@pytest.mark.parametrize("cdb", [INQUIRY, read_10(5, 2)])
def test_a_table_that_is_too_short_or_outside_of_memory(c: Cd, cdb: bytes) -> None:
    for entry, status in (((0x20000, 20), 0), ((0xF000_0000, 4096), 2)):
        c.bench.prd(entry)
        c.bench.out(BM, 0)
        c.bench.start()
        c.bench.irqs.clear()
        c.packet(cdb, dma=True)
        assert c.bench.bm_status() == status
        assert c.bench.irqs == []
        assert c.bench.alt() == DONE
    assert c.backend.log == []


@pytest.mark.parametrize("bad", [0, 1, 33, 70])
def test_a_bad_block_by_pio(c: Cd, bad: int) -> None:
    c.backend.bad = {4 * (100 + bad) + 2}
    c.packet(read_10(100, 80), 4096)
    data = b""
    while c.bench.status() & DRQ:
        data += c.bench.pull(c.bench.inb(MID) | c.bench.inb(HIGH) << 8)
    assert data == c.data(100, bad)
    assert (c.bench.alt(), c.bench.inb(ERROR)) == (CHECK, MEDIUM_ERROR << 4)
    c.packet(REQUEST_SENSE)
    sense = c.bench.packet_in(0xFFFE)
    assert (sense[2] & 15, sense[12]) == (MEDIUM_ERROR, 0x11)
    assert int.from_bytes(sense[3:7], "big") == 100 + bad


def test_a_bad_block_by_dma(c: Cd) -> None:
    c.backend.bad = {4 * 103}
    c.bench.prd((0x20000, 8 * BLOCK))
    c.bench.start()
    c.packet(read_10(100, 8), dma=True)
    assert c.bench.bm_status() == 4
    assert c.result() == (CHECK, MEDIUM_ERROR << 4, 3)
    c.packet(REQUEST_SENSE)
    assert int.from_bytes(c.bench.packet_in(0xFFFE)[3:7], "big") == 103


def test_a_disc_that_is_taken_out_in_the_middle(c: Cd) -> None:
    c.packet(read_10(0, 100), 0xFFFE)
    c.bench.pull(0xFFFE)
    assert c.drive.eject()

    def gone(*_args: Any) -> Any:
        _args[-1](-ENOMEDIUM)

    c.backend.aio_readv = gone  # type: ignore[method-assign]
    while c.bench.status() & DRQ:
        c.bench.pull(c.bench.inb(MID) | c.bench.inb(HIGH) << 8)
    assert (c.bench.alt(), c.bench.inb(ERROR)) == (CHECK, NOT_READY << 4)


def test_media_change() -> None:
    c = Cd()
    c.drive.eject(force=True)
    c.packet(TEST_UNIT_READY)
    assert c.result() == (CHECK, NOT_READY << 4, 3)
    assert c.sense() == (NOT_READY, 0x3A00)
    c.backend = FakeBackend(pattern(400, seed=9), read_only=True)
    c.drive.insert(c.backend)
    seen = []
    for _ in range(3):
        c.packet(TEST_UNIT_READY)
        status = c.bench.status()
        seen.append((status, c.sense()[0]))
    assert [key for _, key in seen] == [NOT_READY, UNIT_ATTENTION, 0]
    assert seen[-1][0] == DONE
    c.packet(read_10(3, 2))
    assert c.bench.packet_in(0xFFFE) == c.data(3, 2)


def test_an_empty_drive() -> None:
    bench = Bench(AtapiDrive(None))
    bench.packet(TEST_UNIT_READY)
    assert (bench.status(), bench.inb(ERROR)) == (CHECK, NOT_READY << 4)
    bench.packet(read_10(0, 1))
    assert (bench.status(), bench.inb(ERROR)) == (CHECK, NOT_READY << 4)
    bench.packet(INQUIRY)
    assert len(bench.packet_in(0xFFFE)) == 36


def mode_select(c: Cd) -> tuple[bytes, bytes]:
    """A MODE SELECT(10) that the drive takes: its packet, its data."""
    c.packet(bytes((0x5A, 0, 0x01, 0, 0, 0, 0, 0, 255)))  # MODE SENSE of the error recovery page
    data = bytearray(c.bench.packet_in(0xFFFE))
    data[:2] = b"\0\0"
    return bytes((0x55, 0x10, 0, 0, 0, 0, 0, *len(data).to_bytes(2, "big"))), bytes(data)


@pytest.mark.parametrize("limit", [0xFFFE, 6, 5])
def test_data_from_the_host(c: Cd, limit: int) -> None:
    cdb, data = mode_select(c)
    c.packet(cdb, limit)
    at = 0
    while c.bench.status() & DRQ:
        assert c.bench.inb(REASON) & 3 == 0
        size = c.bench.inb(MID) | c.bench.inb(HIGH) << 8
        assert 0 < size <= limit
        c.bench.push(data[at : at + size])
        assert c.bench.irq.level == 1
        at += size
    assert at == len(data)
    assert (c.bench.alt(), c.bench.inb(REASON) & 3) == (DONE, 3)


@pytest.mark.parametrize("limit", [0, 1])
def test_data_from_the_host_with_a_limit_that_allows_nothing(c: Cd, limit: int) -> None:
    c.packet(mode_select(c)[0], limit)
    assert (c.bench.status(), c.bench.inb(ERROR)) == (CHECK, ABRT)


def test_data_from_the_host_that_is_wrong(c: Cd) -> None:
    cdb, data = mode_select(c)
    c.packet(cdb)
    c.bench.status()
    c.bench.push(b"\xff" * len(data))
    assert c.result() == (CHECK, ILLEGAL_REQUEST << 4, 3)


def test_data_from_the_host_by_dma(c: Cd) -> None:
    cdb, data = mode_select(c)
    c.bench.memory.write(0x2000, data)
    c.bench.prd((0x2000, len(data)))
    c.bench.start(to_memory=False)
    c.packet(cdb, dma=True)
    assert c.bench.bm_status() == 4
    assert c.result() == (DONE, 0, 3)


def test_slow_discs(c: Cd) -> None:
    c.backend.held = True
    c.packet(read_10(0, 100), 0xFFFE)
    data = b""
    while True:
        while c.backend.waiting:
            assert c.bench.alt() & BSY
            c.backend.release()
        if not c.bench.status() & DRQ:
            break
        data += c.bench.pull(c.bench.inb(MID) | c.bench.inb(HIGH) << 8)
    assert data == c.data(0, 100)


class TestCommands:
    """Those besides PACKET."""

    def test_identify_packet_device(self, c: Cd) -> None:
        c.bench.out(COMMAND, 0xA1)
        assert c.bench.irq.level == 1
        assert c.bench.status() == DONE | DRQ
        data = c.bench.pull(512)
        assert data[:2] == b"\xc0\x85"
        assert c.bench.status() == DONE

    @pytest.mark.parametrize("opcode", [0xEC, 0x20])
    def test_disk_commands_show_the_signature(self, c: Cd, opcode: int) -> None:
        c.bench.out(MID, 0)
        c.bench.out(COMMAND, opcode)
        assert (c.bench.status(), c.bench.inb(ERROR)) == (CHECK, ABRT)
        assert [c.bench.inb(p) for p in (COUNT, LOW, MID, HIGH)] == [1, 1, 0x14, 0xEB]

    @pytest.mark.parametrize("opcode", [0x00, 0x24, 0x30, 0xC4, 0xC8, 0x25, 0x06, 0x91, 0xC6, 0xFF])
    def test_others_are_aborted(self, c: Cd, opcode: int) -> None:
        c.bench.out(COMMAND, opcode)
        assert (c.bench.status(), c.bench.inb(ERROR)) == (CHECK, ABRT)

    @pytest.mark.parametrize("opcode", [0xE0, 0xE1, 0xE2, 0xE3, 0xE5, 0xE6, 0xE7])
    def test_power_and_flush(self, c: Cd, opcode: int) -> None:
        c.bench.out(COMMAND, opcode)
        assert c.bench.irq.level == 1
        assert c.bench.status() == DONE
        if opcode == 0xE5:
            assert c.bench.inb(COUNT) == 0xFF

    @pytest.mark.parametrize(("mode", "word", "value"), [(0x42, 88, 0x043F), (0x21, 63, 0x0207), (0x0C, 88, 0x003F)])
    def test_transfer_modes(self, c: Cd, mode: int, word: int, value: int) -> None:
        c.bench.command(0xEF, count=mode, features=3, unit=1)
        assert c.bench.status() == DONE
        c.bench.out(COMMAND, 0xA1)
        data = c.bench.pull(512)
        assert int.from_bytes(data[2 * word : 2 * word + 2], "little") == value

    @pytest.mark.parametrize(("features", "count"), [(3, 0x46), (3, 0x10), (3, 0x80), (2, 0), (0x55, 0), (0, 0)])
    def test_features_there_are_not(self, c: Cd, features: int, count: int) -> None:
        c.bench.command(0xEF, count=count, features=features, unit=1)
        assert (c.bench.status(), c.bench.inb(ERROR)) == (CHECK, ABRT)

    def test_overlapped_packets_are_not_supported(self, c: Cd) -> None:
        c.bench.command(0xA0, features=2, unit=1)
        assert (c.bench.status(), c.bench.inb(ERROR)) == (CHECK, ABRT)

    def test_device_reset_in_the_middle(self, c: Cd) -> None:
        c.packet(read_10(0, 100))
        c.bench.pull(100)
        c.bench.out(COMMAND, 0x08)
        assert c.bench.irq.level == 0
        assert (c.bench.status(), c.bench.inb(ERROR)) == (0, 1)
        assert [c.bench.inb(p) for p in (COUNT, LOW, MID, HIGH)] == [1, 1, 0x14, 0xEB]
        c.packet(read_10(9, 1))
        assert c.bench.packet_in(0xFFFE) == c.data(9, 1)

    def test_device_reset_while_busy(self, c: Cd) -> None:
        c.backend.held = True
        c.packet(read_10(0, 100))
        assert c.bench.alt() & BSY
        c.bench.out(COMMAND, 0x08)
        assert c.bench.alt() & BSY
        assert c.backend.waiting[0].cancelled
        c.backend.release()
        assert c.bench.status() == 0
        assert c.bench.irqs[-1:] != [1]

    def test_stopping_the_bus_master(self, c: Cd) -> None:
        c.backend.held = True
        c.bench.prd((0x20000, 8 * BLOCK))
        c.bench.start()
        c.packet(read_10(100, 8), dma=True)
        c.bench.out(BM, 8)
        c.backend.release()
        assert c.bench.inb(BM_STATUS) & 3 == 0
        assert c.result() == (CHECK, ABORTED << 4, 3)

    def test_software_reset_in_the_packet(self, c: Cd) -> None:
        c.bench.out(COMMAND, 0xA0)
        c.bench.push(bytes(6))
        c.bench.out(CONTROL, 4, 0)
        c.bench.select(1)
        assert c.bench.status() == 0
        c.packet(TEST_UNIT_READY)
        assert c.bench.status() == DONE
