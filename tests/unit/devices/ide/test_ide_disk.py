"""A disk's other commands: IDENTIFY, features, power, verify, flush, and the small ones."""

from __future__ import annotations

import struct

import pytest
from ide_bench import (
    ABRT,
    BSY,
    CONTROL,
    COUNT,
    DEVICE,
    DRDY,
    DRQ,
    DSC,
    ERR,
    ERROR,
    IDNF,
    SECTOR,
    UNC,
    Bench,
    disk,
    new_bench,
    pattern,
)

from pyvmm.devices.ide.disk import IdeDisk, standby_seconds
from pyvmm.devices.ide.identify import geometry

DONE = DRDY | DSC
FAILED = DRDY | DSC | ERR
INITIALIZE_DEVICE_PARAMETERS = 0x91
IDENTIFY, SET_FEATURES, CHECK_POWER, NS = 0xEC, 0xEF, 0xE5, 1_000_000_000


def identify(bench: Bench, unit: int = 0) -> tuple[int, ...]:
    bench.command(IDENTIFY, unit=unit)
    assert bench.irq.level == 1
    assert bench.status() == DONE | DRQ
    data = bench.pull(512)
    assert bench.status() == DONE
    assert bench.irq.level == 0
    assert sum(data) & 0xFF == 0
    assert data[510] == 0xA5
    return struct.unpack("<256H", data)


def text(words: tuple[int, ...]) -> str:
    return b"".join(word.to_bytes(2, "big") for word in words).decode()


class TestIdentify:
    def test_names(self) -> None:
        _, backend = disk()
        drive = IdeDisk(backend, model="A model", serial="S/N 1", revision="r2")  # type: ignore[arg-type]
        words = identify(Bench(drive))
        assert text(words[27:47]) == "A model".ljust(40)
        assert text(words[10:20]) == "S/N 1".ljust(20)
        assert text(words[23:27]) == "r2".ljust(8)

    def test_capacity_and_geometry(self) -> None:
        words = identify(new_bench(sectors=8064 + 5)[0])
        assert words[0] == 0x40
        assert (words[1], words[3], words[6]) == (8, 16, 63)
        assert words[54:57] == (8, 16, 63)
        assert words[57] | words[58] << 16 == 8064
        assert words[60] | words[61] << 16 == 8069
        assert words[100:104] == (8069, 0, 0, 0)

    def test_a_geometry_that_is_given(self) -> None:
        bench = Bench(IdeDisk(disk(pattern(20808))[1], geometry=(306, 4, 17)))  # type: ignore[arg-type]
        words = identify(bench)
        assert (words[1], words[3], words[6]) == words[54:57] == (306, 4, 17)
        assert words[57] | words[58] << 16 == words[60] | words[61] << 16 == 20808
        bench.command(INITIALIZE_DEVICE_PARAMETERS, lba=7 << 24, count=9)  # 8 heads, 9 sectors
        assert bench.status() == DONE
        words = identify(bench)
        assert words[54:57] == (289, 8, 9)
        assert (words[1], words[3], words[6]) == (306, 4, 17)
        bench.channel.reset()
        assert identify(bench)[54:57] == (306, 4, 17)

    @pytest.mark.parametrize("track", [63, 17, 255])
    def test_what_only_ata_1_knows(self, track: int) -> None:
        """QEMU's values (hw/ide/core.c, ide_identify): Bochs' BIOS multiplies with words 4 and 5."""
        words = identify(Bench(IdeDisk(disk()[1], geometry=(2, 4, track))))  # type: ignore[arg-type]
        assert words[4:6] == (min(0xFFFF, 512 * track), 512)
        assert words[20:23] == (3, 512, 4)

    def test_capacity_of_a_large_disk(self) -> None:
        drive, _ = disk()
        drive.sectors = 0x1234_5678_9ABC
        drive.settings_power_on()
        words = identify(Bench(drive))
        assert words[60] | words[61] << 16 == 0x0FFF_FFFF
        assert words[100:104] == (0x9ABC, 0x5678, 0x1234, 0)
        assert (words[1], words[3], words[6]) == (16383, 16, 63)

    def test_what_it_can_do(self) -> None:
        words = identify(new_bench()[0])
        assert words[47] == 0x8010
        assert words[59] == 0x0110
        assert words[49] & 0x0B00 == 0x0B00  # IORDY, LBA, DMA
        assert words[53] & 7 == 7
        assert words[63] == 0x0007
        assert words[64] == 0x0003
        assert words[80] == 0xF0
        assert words[83] & 0xC000 == 0x4000
        assert words[83] & 0x3400 == words[86] & 0x3400 == 0x3400  # FLUSH EXT, FLUSH, 48 bits
        assert words[82] & 0x20 == words[85] & 0x20 == 0x20  # write cache
        assert words[84] & 0x40  # FUA
        assert words[88] == 0x003F
        assert words[105] == 8
        assert words[169] == 1

    def test_hardware_reset_result(self) -> None:
        bench = Bench(disk()[0], disk()[0])
        assert [identify(bench, unit)[93] for unit in (0, 1)] == [0x600B, 0x6B00]

    @pytest.mark.parametrize("sectors", [1, 5, 62, 63, 64, 1007, 1008, 2880, 16514064, 1 << 40])
    def test_geometry_is_never_larger_than_the_disk(self, sectors: int) -> None:
        cylinders, heads, track = geometry(sectors)
        assert 1 <= cylinders <= 16383
        assert 1 <= heads <= 16
        assert 1 <= track <= 63
        product = cylinders * heads * track
        assert product <= sectors
        assert sectors - product < heads * track or cylinders == 16383


class TestFeatures:
    @pytest.mark.parametrize(
        ("mode", "word", "value"),
        [(0x45, 88, 0x203F), (0x40, 88, 0x013F), (0x22, 63, 0x0407), (0x0C, 63, 0x0007), (0, 88, 0x3F), (1, 88, 0x3F)],
    )
    def test_transfer_mode(self, mode: int, word: int, value: int) -> None:
        bench, _ = new_bench()
        bench.command(SET_FEATURES, features=3, count=mode)
        assert bench.status() == DONE
        assert identify(bench)[word] == value
        bench.out(CONTROL, 4, 0)
        assert identify(bench)[word] == value

    @pytest.mark.parametrize(
        ("features", "count"),
        [(3, 0x46), (3, 0x23), (3, 0x10), (3, 0x0D), (3, 0x02), (3, 0x80), (0x10, 2), (0, 0), (5, 1), (0xFF, 0)],
    )
    def test_there_is_not(self, features: int, count: int) -> None:
        bench, _ = new_bench()
        bench.command(SET_FEATURES, features=features, count=count)
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, ABRT)

    @pytest.mark.parametrize(("on", "off", "bit"), [(0x02, 0x82, 0x20), (0xAA, 0x55, 0x40)])
    def test_cache_and_look_ahead(self, on: int, off: int, bit: int) -> None:
        bench, _ = new_bench()
        bench.command(SET_FEATURES, features=off)
        assert bench.status() == DONE
        assert not identify(bench)[85] & bit
        bench.command(SET_FEATURES, features=on)
        assert identify(bench)[85] & bit

    @pytest.mark.parametrize("reverts", [False, True])
    def test_what_a_software_reset_leaves(self, reverts: bool) -> None:
        bench, _ = new_bench(sectors=8064)
        bench.command(0xC6, count=4)
        bench.command(SET_FEATURES, features=0x82)
        bench.command(SET_FEATURES, features=3, count=0x42)
        bench.command(SET_FEATURES, features=0xCC if reverts else 0x66)
        assert bench.status() == DONE
        bench.out(CONTROL, 4, 0)
        words = identify(bench)
        assert words[59] == (0x0110 if reverts else 0x0104)
        assert bool(words[85] & 0x20) == reverts
        assert words[88] == 0x043F
        bench.channel.reset()
        words = identify(bench)
        assert (words[59], words[85] & 0x20, words[88]) == (0x0110, 0x20, 0x003F)


class TestPower:
    def mode(self, bench: Bench) -> int:
        bench.command(CHECK_POWER)
        assert bench.status() == DONE
        return bench.inb(COUNT)

    @pytest.mark.parametrize(("opcode", "mode"), [(0xE0, 0), (0x94, 0), (0xE2, 0), (0xE1, 0x80), (0xE3, 0x80)])
    def test_states(self, opcode: int, mode: int) -> None:
        bench, backend = new_bench()
        assert self.mode(bench) == 0xFF
        bench.command(opcode, count=0)
        assert bench.irq.level == 1
        assert bench.status() == DONE
        assert self.mode(bench) == mode
        assert ("flush", 0, 0) in backend.log or mode
        bench.read_pio(0x20, 0, 1)
        assert self.mode(bench) == 0xFF

    def test_sleep_ends_with_a_reset_only(self) -> None:
        bench, backend = new_bench()
        bench.command(0xE6)
        assert bench.status() == DONE
        for opcode in (0x20, IDENTIFY, CHECK_POWER, 0xFF):
            bench.command(opcode)
            assert (bench.alt(), bench.irq.level) == (DONE, 0)
        bench.out(CONTROL, 4, 0)
        assert self.mode(bench) == 0
        assert bench.read_pio(0x20, 1, 1) == backend.data[SECTOR : 2 * SECTOR]

    def test_standby_that_can_not_flush(self) -> None:
        bench, backend = new_bench()
        backend.flush_ret = -5
        bench.command(0xE0)
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, ABRT)
        assert self.mode(bench) == 0xFF

    def test_standby_timer(self) -> None:
        bench, _ = new_bench()
        bench.command(0xE3, count=2)
        assert self.mode(bench) == 0x80
        bench.clock.step(9 * NS)
        bench.read_pio(0x20, 0, 1)
        bench.clock.step(9 * NS)
        assert self.mode(bench) == 0xFF
        bench.clock.step(10 * NS)
        assert self.mode(bench) == 0
        bench.read_pio(0x20, 0, 1)
        assert self.mode(bench) == 0xFF
        bench.command(0xE3, count=0)
        bench.clock.step(1000 * NS)
        assert self.mode(bench) == 0x80

    def test_standby_periods(self) -> None:
        expected = {0: 0, 1: 5, 240: 1200, 241: 1800, 251: 19800, 252: 1260, 253: 28800, 254: 0, 255: 1275}
        assert {count: standby_seconds(count) for count in expected} == expected


class TestMedium:
    @pytest.mark.parametrize("opcode", [0xE7, 0xEA])
    def test_flush(self, opcode: int) -> None:
        bench, backend = new_bench()
        bench.write_pio(0x30, 5, pattern(1, seed=4))
        assert backend.stable != backend.data
        backend.held = True
        bench.command(opcode)
        assert bench.alt() & BSY
        assert bench.irq.level == 0
        backend.release()
        assert bench.irq.level == 1
        assert bench.status() == DONE
        assert backend.stable == backend.data
        backend.flush_ret = -5
        bench.command(opcode)
        backend.release()
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, ABRT)

    @pytest.mark.parametrize("opcode", [0x40, 0x41])
    def test_verify(self, opcode: int) -> None:
        bench, backend = new_bench()
        bench.command(opcode, 500, 0)
        assert bench.status() == DONE
        assert bench.lba() == 756
        assert backend.log == [("read", 500, 256)]
        backend.bad = {505}
        bench.command(opcode, 500, 8)
        assert (bench.status(), bench.inb(ERROR), bench.lba(), bench.inb(COUNT)) == (FAILED, UNC, 505, 3)
        bench.command(opcode, 1020, 8)
        assert (bench.status(), bench.inb(ERROR), bench.lba(), bench.inb(COUNT)) == (FAILED, IDNF, 1024, 4)

    def test_verify_ext(self) -> None:
        bench, backend = new_bench(sectors=5000)
        bench.command_ext(0x42, 0, 5000)
        assert bench.status() == DONE
        assert [count for _, _, count in backend.log] == [2048, 2048, 904]
        backend.bad = {4000}
        bench.command_ext(0x42, 0, 5000)
        assert (bench.status(), bench.inb(ERROR), bench.lba_ext()) == (FAILED, UNC, 4000)

    def test_seek_and_recalibrate(self) -> None:
        bench, _ = new_bench()
        for opcode in (0x70, 0x7F, 0x10, 0x1F):
            bench.command(opcode, 1023)
            assert bench.irq.level == 1
            assert bench.status() == DONE
        bench.command(0x70, 1024)
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, IDNF)

    def test_native_max(self) -> None:
        drive, _ = disk(pattern(1100))
        bench = Bench(drive)
        bench.command(0xF8)
        assert (bench.status(), bench.lba()) == (DONE, 1099)
        bench.command_ext(0x27)
        assert (bench.status(), bench.lba_ext()) == (DONE, 1099)
        bench.out(DEVICE, 0xA0)
        bench.out(0x1F7, 0xF8)  # the last of 1008 sectors in cylinders: 0, 15, 63
        assert [bench.inb(p) for p in (0x1F3, 0x1F4, 0x1F5, DEVICE)] == [63, 0, 0, 0xAF]
        drive.sectors = 1 << 30
        bench.command(0xF8)
        assert bench.lba() == 0x0FFF_FFFF
        bench.command_ext(0x27)
        assert bench.lba_ext() == (1 << 30) - 1

    def test_nop_is_always_aborted(self) -> None:
        bench, _ = new_bench()
        bench.command(0x00)
        assert (bench.status(), bench.inb(ERROR)) == (FAILED, ABRT)
