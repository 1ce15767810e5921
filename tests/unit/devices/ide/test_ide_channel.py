"""The channel: who answers, the interrupt line, resets, and registers touched at the wrong moment."""

from __future__ import annotations

import pytest
from ide_bench import (
    ABRT,
    BM_STATUS,
    BSY,
    COMMAND,
    CONTROL,
    COUNT,
    DATA,
    DEVICE,
    DRDY,
    DRQ,
    DSC,
    ERR,
    ERROR,
    FEATURES,
    HIGH,
    LOW,
    MID,
    SECTOR,
    STATUS,
    Bench,
    disk,
    new_bench,
    pattern,
)

from pyvmm.devices.ide.atapi import AtapiDrive

SRST, NIEN, HOB = 4, 2, 0x80
DONE = DRDY | DSC
READ, IDENTIFY, IDENTIFY_PACKET, DIAGNOSTIC, DEVICE_RESET, FLUSH = 0x20, 0xEC, 0xA1, 0x90, 0x08, 0xE7


def two_disks() -> Bench:
    return Bench(disk(pattern(64, seed=1))[0], disk(pattern(128, seed=2))[0])


def signature(bench: Bench) -> tuple[int, ...]:
    return tuple(bench.inb(port) for port in (ERROR, COUNT, LOW, MID, HIGH))


class TestWhoAnswers:
    def test_nobody(self) -> None:
        bench = Bench()
        for unit in (0, 1):
            bench.select(unit)
            bench.out(COUNT, 0x55)
            bench.out(LOW, 0xAA)
            assert [bench.inb(port) for port in range(ERROR, STATUS + 1)] == [0] * 7
            assert bench.alt() == 0
            for opcode in (IDENTIFY, IDENTIFY_PACKET, READ, DIAGNOSTIC, DEVICE_RESET, 0xA0):
                bench.out(COMMAND, opcode)
                assert bench.status() == 0
            assert bench.pull(4) == b"\xff\xff\xff\xff"
        bench.out(CONTROL, SRST, 0)
        assert bench.status() == 0
        assert bench.irqs == []

    def test_an_absent_slave(self) -> None:
        bench, backend = new_bench()
        bench.select(1)
        bench.out(COUNT, 0x55)
        bench.out(COMMAND, IDENTIFY)
        assert [bench.inb(port) for port in range(ERROR, STATUS + 1)] == [0] * 7
        assert bench.irqs == []
        bench.select(0)
        assert bench.status() == DONE
        assert bench.inb(DEVICE) == 0xA0
        assert backend.log == []

    def test_an_absent_master(self) -> None:
        bench = Bench(None, disk()[0])
        assert bench.status() == 0
        bench.select(1)
        assert bench.status() == DONE
        bench.command(IDENTIFY, unit=1)
        assert bench.status() == DONE | DRQ

    def test_registers_read_back_as_probes_expect(self) -> None:
        bench = two_disks()
        for unit in (0, 1):
            bench.select(unit)
            bench.out(COUNT, 0x55)
            bench.out(LOW, 0xAA)
            bench.out(MID, 0x12)
            bench.out(HIGH, 0x34)
            assert [bench.inb(p) for p in (COUNT, LOW, MID, HIGH)] == [0x55, 0xAA, 0x12, 0x34]
            assert bench.inb(DEVICE) == 0xA0 | unit << 4

    def test_commands_are_for_the_selected_one(self) -> None:
        bench = two_disks()
        for unit, data in ((1, pattern(128, seed=2)), (0, pattern(64, seed=1))):
            bench.command(READ, 3, unit=unit)
            assert bench.status() == DONE | DRQ
            assert bench.pull(SECTOR) == data[3 * SECTOR : 4 * SECTOR]

    def test_a_commands_results_are_in_that_drives_registers_only(self) -> None:
        bench = two_disks()
        bench.command(READ, 3, 2, unit=1)
        bench.pull(2 * SECTOR)
        assert (bench.inb(COUNT), bench.lba()) == (0, 5)
        bench.out(DEVICE, 0xE0)
        assert (bench.inb(COUNT), bench.lba()) == (2, 3)


class TestInterrupt:
    def test_status_takes_it_back_and_alternate_status_does_not(self) -> None:
        bench, _ = new_bench()
        bench.command(IDENTIFY)
        assert bench.irq.level == 1
        bench.alt()
        assert bench.irq.level == 1
        bench.status()
        assert bench.irq.level == 0
        assert bench.irqs == [1, 0]

    def test_the_next_command_takes_it_back(self) -> None:
        bench, backend = new_bench()
        bench.command(FLUSH)
        assert bench.irq.level == 1
        backend.held = True
        bench.out(COMMAND, FLUSH)
        assert bench.irq.level == 0

    def test_nien_holds_it_back_but_does_not_lose_it(self) -> None:
        bench, _ = new_bench()
        bench.out(CONTROL, NIEN)
        bench.command(FLUSH)
        assert bench.irqs == []
        assert not bench.inb(BM_STATUS) & 4
        bench.out(CONTROL, 0)
        assert bench.irqs == [1]
        assert bench.inb(BM_STATUS) & 4
        bench.out(CONTROL, NIEN)
        assert bench.irq.level == 0
        bench.status()
        bench.out(CONTROL, 0)
        assert bench.irqs == [1, 0]

    def test_it_is_the_selected_drives(self) -> None:
        bench = two_disks()
        bench.command(FLUSH)
        bench.select(1)
        assert bench.irq.level == 0
        assert bench.status() == DONE
        bench.select(0)
        assert bench.irq.level == 1


class TestHob:
    def test_the_previous_contents_show(self) -> None:
        bench, _ = new_bench()
        for port in (COUNT, LOW, MID, HIGH):
            bench.out(port, port & 0xFF, 0x10 | port & 0xFF)
        assert [bench.inb(p) for p in (COUNT, LOW, MID, HIGH)] == [0xF2 | 0x10, 0xF3, 0xF4, 0xF5]
        bench.out(CONTROL, HOB)
        assert [bench.inb(p) for p in (COUNT, LOW, MID, HIGH)] == [0xF2, 0xF3, 0xF4, 0xF5]
        assert bench.inb(DEVICE) == 0xA0
        assert bench.status() == DONE

    @pytest.mark.parametrize("port", [FEATURES, COUNT, LOW, MID, HIGH, DEVICE])
    def test_any_write_ends_it(self, port: int) -> None:
        bench, _ = new_bench()
        bench.out(MID, 1, 2)
        bench.out(CONTROL, HOB)
        assert bench.inb(MID) == 1
        bench.out(port, 0)
        assert bench.inb(MID) == (0 if port == MID else 2)


class TestReset:
    def test_signature_of_disks(self) -> None:
        bench = two_disks()
        bench.select(1)
        bench.out(CONTROL, SRST)
        assert bench.alt() == BSY
        bench.out(CONTROL, 0)
        # The first drive is selected now.
        assert bench.inb(DEVICE) == 0xA0
        assert (bench.status(), *signature(bench)) == (DONE, 1, 1, 1, 0, 0)
        bench.select(1)
        assert (bench.status(), *signature(bench)) == (DONE, 1, 1, 1, 0, 0)
        assert bench.irqs == []

    def test_signature_of_a_packet_device(self) -> None:
        bench = Bench(None, AtapiDrive(None))
        bench.out(CONTROL, SRST, 0)
        bench.select(1)
        assert (bench.status(), *signature(bench)) == (0, 1, 1, 1, 0x14, 0xEB)

    def test_power_on_is_as_a_reset(self) -> None:
        bench = Bench(disk()[0], AtapiDrive(None))
        assert (bench.status(), *signature(bench)) == (DONE, 1, 1, 1, 0, 0)
        bench.select(1)
        assert (bench.status(), *signature(bench)) == (0, 1, 1, 1, 0x14, 0xEB)

    def test_it_ends_a_transfer(self) -> None:
        bench, backend = new_bench()
        bench.command(READ, 0, 8)
        bench.pull(SECTOR + 100)
        bench.out(CONTROL, SRST, 0)
        assert bench.irq.level == 0
        assert bench.status() == DONE
        assert bench.pull(2) == b"\xff\xff"
        assert bench.read_pio(READ, 2, 2) == backend.data[2 * SECTOR : 4 * SECTOR]

    def test_nothing_is_taken_while_it_lasts(self) -> None:
        bench, backend = new_bench()
        bench.out(CONTROL, SRST)
        for opcode in (READ, DEVICE_RESET, IDENTIFY, DIAGNOSTIC):
            bench.out(COMMAND, opcode)
            assert bench.alt() == BSY
        bench.out(COUNT, 0x77)
        bench.out(CONTROL, SRST | NIEN)
        assert bench.alt() == BSY
        bench.out(CONTROL, 0)
        assert (bench.status(), bench.inb(COUNT)) == (DONE, 1)
        assert backend.log == []

    @pytest.mark.parametrize("opcode", [READ, FLUSH, 0x40, 0xC8])
    def test_busy_until_the_backend_has_called_back(self, opcode: int) -> None:
        bench, backend = new_bench()
        backend.held = True
        bench.prd((0x1000, SECTOR))
        bench.start()
        bench.command(opcode)
        bench.out(CONTROL, SRST)
        bench.out(CONTROL, 0)
        assert backend.waiting[0].cancelled
        assert bench.alt() & BSY
        bench.out(CONTROL, SRST)  # and once more meanwhile
        bench.out(CONTROL, 0)
        assert bench.alt() & BSY
        backend.release()
        assert (bench.status(), *signature(bench)) == (DONE, 1, 1, 1, 0, 0)
        assert bench.irqs == []
        backend.held = False
        assert bench.read_pio(READ, 2, 2) == backend.data[2 * SECTOR : 4 * SECTOR]

    @pytest.mark.parametrize("releases", [0, 1, 2])
    @pytest.mark.parametrize("bad", [False, True])
    @pytest.mark.parametrize("dma", [False, True])
    @pytest.mark.parametrize("machine", [False, True])
    def test_in_any_part_of_a_write(self, releases: int, bad: bool, dma: bool, machine: bool) -> None:
        """The data, the flush, the search for the sector that can not be written."""
        bench, backend = new_bench()
        bench.command(0xEF, features=0x82)
        backend.held = True
        backend.bad = {3} if bad else set()
        bench.prd((0x1000, 8 * SECTOR))
        bench.start(False)
        bench.command(0xCA if dma else 0x30, 0, 8)
        if not dma:
            bench.push(bytes(8 * SECTOR))
        for _ in range(releases):
            if backend.waiting:
                backend.release()
        bench.irqs.clear()
        if machine:
            bench.channel.reset()
        else:
            bench.out(CONTROL, 4, 0)
        while backend.waiting:
            backend.waiting[0].cancelled = False
            backend.release()
        assert bench.status() == DONE
        assert 1 not in bench.irqs
        backend.held, backend.bad = False, set()
        bench.write_pio(0x30, 8, pattern(8, seed=4))
        assert backend.data[8 * SECTOR : 16 * SECTOR] == pattern(8, seed=4)

    def test_a_callback_while_srst_is_set(self) -> None:
        bench, backend = new_bench()
        backend.held = True
        bench.command(READ)
        bench.out(CONTROL, SRST)
        backend.release()
        assert bench.alt() == BSY
        bench.out(CONTROL, 0)
        assert bench.status() == DONE

    def test_the_other_drive_does_not_wait_and_does_not_share_the_buffer(self) -> None:
        first, slow = disk(pattern(64, seed=1))
        second, quick = disk(pattern(64, seed=2))
        bench = Bench(first, second)
        slow.held = True
        bench.command(READ, 3)
        bench.out(CONTROL, SRST)
        bench.out(CONTROL, 0)
        bench.command(READ, 5, unit=1)  # lost: the first one is selected, and busy
        assert bench.alt() & BSY
        assert quick.log == []
        # Only a reset selects the other: not here. The buffer of the one that is still at work is not used again.
        slow.waiting[0].cancelled = False
        slow.release()
        bench.command(READ, 5, unit=1)
        assert bench.pull(SECTOR) == quick.data[5 * SECTOR : 6 * SECTOR]

    def test_a_machines_reset_forgets_what_is_under_way(self) -> None:
        bench, backend = new_bench()
        backend.held = True
        for opcode in (READ, FLUSH, 0x40):
            bench.command(opcode)
            bench.channel.reset()
            assert bench.status() == DONE
            backend.release()
            assert bench.status() == DONE
            assert bench.irq.level == 0

    def test_late_data_of_before_a_machines_reset_is_nowhere_to_be_seen(self) -> None:
        bench, backend = new_bench()
        backend.held = True
        bench.command(READ, 3)
        bench.channel.reset()
        bench.command(READ, 7)
        backend.release()  # of sector 3
        assert bench.alt() & BSY
        backend.release()
        assert bench.status() == DONE | DRQ
        assert bench.pull(SECTOR) == backend.data[7 * SECTOR : 8 * SECTOR]

    def test_a_machines_reset_selects_the_first_drive_with_interrupts_on(self) -> None:
        bench = two_disks()
        bench.out(CONTROL, NIEN)
        bench.command(FLUSH, unit=1)
        bench.channel.reset()
        assert bench.inb(DEVICE) == 0xA0
        bench.command(FLUSH)
        assert bench.irqs == [1]


class TestDiagnostic:
    def test_both_carry_it_out(self) -> None:
        bench = Bench(disk()[0], AtapiDrive(None))
        bench.select(1)
        bench.out(COMMAND, DIAGNOSTIC)
        assert bench.irqs == [1]
        assert bench.inb(DEVICE) == 0xA0
        assert (bench.status(), *signature(bench)) == (DONE, 1, 1, 1, 0, 0)
        bench.select(1)
        assert (bench.status(), *signature(bench)) == (0, 1, 1, 1, 0x14, 0xEB)

    def test_the_first_answers_for_an_absent_second(self) -> None:
        bench, _ = new_bench()
        bench.select(1)
        bench.out(COMMAND, DIAGNOSTIC)
        assert bench.irqs == [1]
        assert (bench.status(), *signature(bench)) == (DONE, 1, 1, 1, 0, 0)


class TestAtTheWrongMoment:
    @pytest.mark.parametrize("port", [FEATURES, COUNT, LOW, MID, HIGH, DEVICE])
    def test_registers_are_not_the_guests_while_data_moves(self, port: int) -> None:
        bench = two_disks()
        bench.command(READ, 3, 2)
        before = [bench.inb(p) for p in range(ERROR, DEVICE + 1)]
        bench.out(port, 0xFF)
        assert [bench.inb(p) for p in range(ERROR, DEVICE + 1)] == before
        assert bench.pull(2 * SECTOR) == pattern(64, seed=1)[3 * SECTOR : 5 * SECTOR]

    @pytest.mark.parametrize("opcode", [0x00, DEVICE_RESET, READ, 0x30, 0x91, IDENTIFY, 0xC8, DIAGNOSTIC, 0xFF])
    def test_commands_are_lost_while_data_moves(self, opcode: int) -> None:
        bench, backend = new_bench()
        bench.command(READ, 3, 2)
        bench.pull(100)
        bench.out(COMMAND, opcode)
        assert bench.pull(2 * SECTOR - 100) == backend.data[3 * SECTOR + 100 : 5 * SECTOR]
        assert bench.status() == DONE
        assert len(backend.log) == 1

    @pytest.mark.parametrize("opcode", [DEVICE_RESET, READ, IDENTIFY, FLUSH])
    def test_and_while_busy(self, opcode: int) -> None:
        bench, backend = new_bench()
        backend.held = True
        bench.command(FLUSH)
        bench.out(COMMAND, opcode)
        assert bench.alt() & BSY
        backend.release()
        assert bench.status() == DONE
        assert backend.log == [("flush", 0, 0)]

    def test_data_without_a_transfer(self) -> None:
        bench, backend = new_bench()
        before = bytes(backend.data)
        bench.push(b"\x00\x01\x02\x03")
        assert bench.pull(4) == b"\xff\xff\xff\xff"
        bench.command(READ, 1)
        bench.push(b"\x00" * 8)  # the wrong way
        assert bench.pull(SECTOR) == backend.data[SECTOR : 2 * SECTOR]
        bench.command(0x30, 2)
        assert bench.pull(2) == b"\xff\xff"
        assert bench.status() == DONE | DRQ
        assert backend.data == before

    def test_every_command_code_without_a_drive_behind_it_or_with_one(self) -> None:
        for opcode in range(256):
            bench = Bench(disk()[0], AtapiDrive(None))
            for unit in (0, 1):
                bench.command(opcode, 5, unit=unit)
                bench.pio.read(DATA, 2)
                bench.status()
                bench.out(CONTROL, SRST, 0)

    @pytest.mark.parametrize("opcode", [0x01, 0x22, 0x60, 0x80, 0xB0, 0xF1, 0xFF, 0xA0, IDENTIFY_PACKET, DEVICE_RESET])
    def test_commands_a_disk_does_not_know(self, opcode: int) -> None:
        bench, _ = new_bench()
        bench.command(opcode)
        assert bench.irq.level == 1
        assert (bench.status(), bench.inb(ERROR)) == (DRDY | DSC | ERR, ABRT)


class TestWithoutPython:
    """What a driver polls is answered by the regions: a region's count goes up with each access of that kind."""

    def test_a_busy_drive_is_polled_for_nothing(self) -> None:
        bench, backend = new_bench()
        channel = bench.channel
        backend.held = True
        bench.command(READ, 5, 1)
        assert [bench.status() for _ in range(11)] == [BSY | DRDY | DSC] * 11
        assert [bench.alt() for _ in range(10)] == [BSY | DRDY | DSC] * 10
        assert (channel.region.count, channel.control.count) == (10, 10)
        backend.release()
        assert (bench.irq.level, bench.alt()) == (1, DONE | DRQ)
        assert (bench.status(), bench.irq.level) == (DONE | DRQ, 0)
        assert (channel.region.count, channel.control.count) == (10, 10)

    def test_a_reset_ends_it(self) -> None:
        bench, backend = new_bench()
        backend.held = True
        bench.command(READ, 5, 1)
        assert [bench.alt() for _ in range(3)] == [BSY | DRDY | DSC] * 3
        bench.out(CONTROL, SRST)
        assert [bench.alt() for _ in range(3)] == [BSY] * 3
        bench.out(CONTROL, 0)
        backend.release()
        assert bench.status() == DONE
