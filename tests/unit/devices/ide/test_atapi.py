"""The CD drive's packet commands: answers byte by byte, sense data and its end, the tray, and any bytes at all."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.devices.ide import atapi, mmc
from pyvmm.devices.ide.atapi import CHECK, DATA_IN, DATA_OUT, NO_DATA, READ, AtapiDrive, PacketResult

TUR, REQUEST_SENSE, INQUIRY, START_STOP, PREVENT, CAPACITY = 0x00, 0x03, 0x12, 0x1B, 0x1E, 0x25
READ_10, SEEK, SUB_CHANNEL, TOC, HEADER, CONFIGURATION = 0x28, 0x2B, 0x42, 0x43, 0x44, 0x46
EVENT_STATUS, DISC_INFO, TRACK_INFO, READ_12, DVD, SPEED, MECHANISM, READ_CD = (
    *(0x4A, 0x51, 0x52, 0xA8),
    *(0xAD, 0xBB, 0xBD, 0xBE),
)
SELECT_6, SENSE_6, SELECT_10, SENSE_10 = 0x15, 0x1A, 0x55, 0x5A
NO_MEDIUM, NEW_MEDIUM, BAD_FIELD, OUT_OF_RANGE = (2, 0x3A00), (6, 0x2800), (5, 0x2400), (5, 0x2100)
NO_SENSE = (0, 0)
EVERYTHING = {7: 0xFF, 8: 0xFF}  # the allocation length of most 10-byte commands
CD_BLOCKS = 1000
DVD_BLOCKS = 768_000


class Disc:
    """As much of a BlockBackend as the commands look at."""

    def __init__(self, blocks: int, odd_sectors: int = 0) -> None:
        self.sectors = blocks * 4 + odd_sectors
        self.inserted = True


def cdb(opcode: int, at: dict[int, int] | None = None, **fields: int) -> bytes:
    """A packet; ``at`` has bytes by their offset, ``lba`` and ``count`` are where READ(10) and READ(12) have them."""
    packet = bytearray(12)
    packet[0] = opcode
    if "lba" in fields:
        packet[2:6] = struct.pack(">I", fields["lba"])
    if "count" in fields and opcode == READ_12:
        packet[6:10] = struct.pack(">I", fields["count"])
    elif "count" in fields and opcode == READ_CD:
        packet[6:9] = struct.pack(">I", fields["count"])[1:]
    elif "count" in fields:
        packet[7:9] = struct.pack(">H", fields["count"])
    for offset, value in (at or {}).items():
        packet[offset] = value
    return bytes(packet)


class Host:
    def __init__(self, drive: AtapiDrive) -> None:
        self.drive = drive

    def send(self, opcode: int, at: dict[int, int] | None = None, **fields: int) -> PacketResult:
        return self.drive.packet(cdb(opcode, at, **fields))

    def data(self, opcode: int, at: dict[int, int] | None = None, **fields: int) -> bytes:
        result = self.send(opcode, at, **fields)
        assert result.kind == DATA_IN, (result, self.sense())
        return result.data

    def ok(self, opcode: int, at: dict[int, int] | None = None, **fields: int) -> None:
        assert self.send(opcode, at, **fields).kind == NO_DATA

    def fails(self, opcode: int, at: dict[int, int] | None = None, **fields: int) -> tuple[int, int]:
        """The command ends with a check condition: its sense key and code."""
        result = self.send(opcode, at, **fields)
        assert result.kind == CHECK, result
        key = self.drive.sense_key  # goes into the error register
        sense = self.sense()
        assert sense[0] == key
        return sense

    def sense(self) -> tuple[int, int]:
        data = self.data(REQUEST_SENSE, {4: 18})
        return data[2], data[12] << 8 | data[13]

    def event(self) -> tuple[int, int]:
        """Media event and status."""
        data = self.data(EVENT_STATUS, {1: 1, 4: 0x10, 8: 8})
        assert data[:4] == bytes((0, 4, 4, 0x10))
        return data[4], data[5]


@pytest.fixture
def cd() -> Host:
    return Host(AtapiDrive(Disc(CD_BLOCKS)))


@pytest.fixture
def dvd() -> Host:
    return Host(AtapiDrive(Disc(DVD_BLOCKS)))


@pytest.fixture
def empty() -> Host:
    return Host(AtapiDrive(None))


# -- power on -------------------------------------------------------------------------------------------------------


def test_a_drive_with_a_disc_is_ready_at_once(cd: Host) -> None:
    # No unit attention at power on: firmware goes on to its read without asking again.
    cd.ok(TUR)
    assert cd.sense() == NO_SENSE
    assert cd.event() == (0, mmc.MEDIA_PRESENT)


NEED_A_DISC = (TUR, CAPACITY, READ_10, SEEK, SUB_CHANNEL, TOC, HEADER, DISC_INFO, TRACK_INFO, READ_12, DVD, READ_CD)


@pytest.mark.parametrize("opcode", NEED_A_DISC)
def test_an_empty_drive_is_not_ready(empty: Host, opcode: int) -> None:
    assert empty.fails(opcode) == NO_MEDIUM
    assert empty.sense() == NO_SENSE


def test_an_empty_drive_says_what_it_is(empty: Host) -> None:
    assert empty.data(INQUIRY, {4: 36})[0] == 5
    assert empty.data(CONFIGURATION, EVERYTHING)[6:8] == bytes(2)
    assert empty.event() == (0, 0)
    assert empty.data(SENSE_10, {2: 0x2A, **EVERYTHING})[2] == 0x70  # door closed, no disc
    assert empty.data(MECHANISM, {9: 8}) == bytes((0, 0, 0, 0, 0, 1, 0, 0))


def test_a_backend_that_lost_its_medium_is_no_disc(cd: Host) -> None:
    disc = cd.drive.backend
    assert isinstance(disc, Disc)
    disc.inserted = False
    assert cd.fails(READ_10, lba=0, count=1) == NO_MEDIUM


# -- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd_sectors", [0, 1, 2, 3])
def test_capacity_counts_whole_blocks(odd_sectors: int) -> None:
    host = Host(AtapiDrive(Disc(7, odd_sectors)))
    assert host.data(CAPACITY) == struct.pack(">II", 6, 2048)
    assert host.send(READ_10, lba=6, count=1).kind == READ
    assert host.fails(READ_10, lba=7, count=1) == OUT_OF_RANGE


def test_an_image_smaller_than_a_block_is_no_disc() -> None:
    assert Host(AtapiDrive(Disc(0, 3))).fails(CAPACITY) == NO_MEDIUM


@pytest.mark.parametrize("opcode", [READ_10, READ_12])
def test_reads(cd: Host, opcode: int) -> None:
    result = cd.send(opcode, lba=16, count=300)
    assert (result.kind, result.lba, result.count) == (READ, 16, 300)
    last = cd.send(opcode, lba=CD_BLOCKS - 1, count=1)
    assert (last.lba, last.count) == (CD_BLOCKS - 1, 1)
    cd.ok(opcode, lba=16, count=0)
    assert cd.fails(opcode, lba=CD_BLOCKS - 1, count=2) == OUT_OF_RANGE
    assert cd.fails(opcode, lba=CD_BLOCKS, count=1) == OUT_OF_RANGE
    assert cd.fails(opcode, lba=0xFFFFFFFF, count=0xFFFF) == OUT_OF_RANGE


def test_read_12_counts_in_32_bits(dvd: Host) -> None:
    assert dvd.send(READ_12, lba=1, count=0x10001).count == 0x10001
    assert dvd.fails(READ_12, lba=1, count=0xFFFFFFFF) == OUT_OF_RANGE


def test_read_cd_gives_user_data_and_nothing_else(cd: Host) -> None:
    for sector_type in (0, 2):  # any, mode 1
        result = cd.send(READ_CD, {1: sector_type << 2, 9: 0x10}, lba=3, count=2)
        assert (result.kind, result.lba, result.count) == (READ, 3, 2)
    cd.ok(READ_CD, {9: 0x00}, lba=3, count=2)  # no part of the blocks asked for
    cd.ok(READ_CD, {9: 0x10}, lba=3, count=0)
    for parts in (0xF8, 0x80, 0x18, 0x14):
        assert cd.fails(READ_CD, {9: parts}, lba=3, count=2) == BAD_FIELD
    assert cd.fails(READ_CD, {9: 0x10, 10: 1}, lba=3, count=2) == BAD_FIELD
    assert cd.fails(READ_CD, {9: 0x00, 10: 1}, lba=3, count=2) == BAD_FIELD
    for sector_type in (1, 3, 4, 5):  # audio, mode 2
        assert cd.fails(READ_CD, {1: sector_type << 2, 9: 0x10}, lba=3, count=2) == (5, 0x6400)
    assert cd.fails(READ_CD, {1: 6 << 2, 9: 0x10}, lba=3, count=2) == BAD_FIELD
    assert cd.fails(READ_CD, {9: 0x10}, lba=CD_BLOCKS - 1, count=2) == OUT_OF_RANGE


def test_seek_and_speed(cd: Host) -> None:
    cd.ok(SEEK, lba=CD_BLOCKS - 1)
    assert cd.fails(SEEK, lba=CD_BLOCKS) == OUT_OF_RANGE
    cd.ok(SPEED, {2: 0xFF, 3: 0xFF})


def test_a_host_error_is_a_medium_error_with_the_place(cd: Host) -> None:
    assert cd.drive.read_failed(errno.EIO, 0x123).kind == CHECK
    sense = cd.data(REQUEST_SENSE, {4: 18})
    assert sense == bytes.fromhex("f000 03 00000123 0a 00000000 1100 00000000")
    cd.drive.read_failed(errno.ENOMEDIUM, 0x123)
    sense = cd.data(REQUEST_SENSE, {4: 18})
    assert sense == bytes.fromhex("7000 02 00000000 0a 00000000 3a00 00000000")


# -- sense data -----------------------------------------------------------------------------------------------------


def test_sense_is_given_once(cd: Host) -> None:
    assert cd.send(READ_10, lba=CD_BLOCKS, count=1).kind == CHECK
    assert cd.sense() == OUT_OF_RANGE
    assert cd.sense() == NO_SENSE


def test_sense_lasts_until_the_next_command_that_can_leave_its_own(cd: Host) -> None:
    cd.send(READ_10, lba=CD_BLOCKS, count=1)
    cd.data(INQUIRY, {4: 36})
    cd.event()
    cd.data(CONFIGURATION, EVERYTHING)
    assert cd.drive.sense_key == 5
    cd.ok(TUR)
    assert cd.sense() == NO_SENSE
    cd.send(0xFF)
    cd.send(READ_10, lba=CD_BLOCKS, count=1)
    assert cd.sense() == OUT_OF_RANGE


def test_sense_is_cut_to_the_allocation_length(cd: Host) -> None:
    cd.send(0xFF)
    assert cd.data(REQUEST_SENSE, {4: 3}) == bytes((0x70, 0, 5))
    cd.send(0xFF)
    cd.ok(REQUEST_SENSE)
    assert cd.sense() == NO_SENSE


def test_unknown_commands(cd: Host, empty: Host) -> None:
    unknown = set(range(256)) - set(atapi.COMMANDS)
    assert {0x04, 0x0A, 0x2A, 0x35, 0xA3, 0xA4, 0xFF} < unknown
    for opcode in unknown:
        assert cd.fails(opcode) == (5, 0x2000)
        assert empty.fails(opcode) == (5, 0x2000)


def test_short_packets_are_filled_up_and_long_ones_cut(cd: Host) -> None:
    assert cd.drive.packet(b"").kind == NO_DATA
    assert cd.drive.packet(bytearray((INQUIRY, 0, 0, 0, 36))).kind == DATA_IN
    assert cd.drive.packet(memoryview(cdb(READ_10, lba=1, count=1) + b"\xff" * 9)).count == 1


# -- what it is -----------------------------------------------------------------------------------------------------


def test_inquiry() -> None:
    host = Host(AtapiDrive(None, vendor="ACME", product="Teapot", revision="418"))
    data = host.data(INQUIRY, {4: 255})
    assert data == bytes((5, 0x80, 0, 0x21, 31, 0, 0, 0)) + b"ACME    Teapot          418 "
    assert host.data(INQUIRY, {4: 5}) == data[:5]
    assert host.data(INQUIRY, {3: 1, 4: 0}) == data  # two bytes of allocation length
    host.ok(INQUIRY)
    assert host.fails(INQUIRY, {2: 1, 4: 36}) == BAD_FIELD


def test_vital_product_data() -> None:
    host = Host(AtapiDrive(None, vendor="ACME", product="Teapot", serial="T-1"))
    assert host.data(INQUIRY, {1: 1, 4: 255}) == bytes((5, 0, 0, 3, 0, 0x80, 0x83))
    assert host.data(INQUIRY, {1: 1, 2: 0x80, 4: 255}) == bytes((5, 0x80, 0, 3)) + b"T-1"
    data = host.data(INQUIRY, {1: 1, 2: 0x83, 4: 255})
    named = b"ACME    Teapot          T-1"
    assert data == bytes((5, 0x83, 0, 38, 2, 0, 0, 3)) + b"T-1" + bytes((2, 1, 0, len(named))) + named
    assert host.fails(INQUIRY, {1: 1, 2: 0xB0, 4: 255}) == BAD_FIELD


def test_identify() -> None:
    drive = AtapiDrive(None, model="A model", serial="S1", revision="2.5+")
    words = struct.unpack("<256H", drive.identify_packet())
    assert words[0] == 0x85C0
    assert struct.pack(">20H", *words[27:47]) == b"A model".ljust(40)
    assert struct.pack(">10H", *words[10:20]) == b"S1".ljust(20)
    assert struct.pack(">4H", *words[23:27]) == b"2.5+    "
    assert words[49] & 0x0300 == 0x0300  # LBA and DMA
    assert words[82] & 0x0210 == 0x0210  # PACKET and DEVICE RESET
    assert [word & 0xC000 for word in (words[83], words[84], words[87])] == [0x4000] * 3
    assert (words[63], words[88]) == (0x0007, 0x003F)


@pytest.mark.parametrize(
    ("mode", "multiword", "ultra"),
    [
        *((0x20, 0x107, 0x3F), (0x22, 0x407, 0x3F), (0x23, 0x7, 0x3F)),
        *((0x40, 0x7, 0x13F), (0x45, 0x7, 0x203F), (0x46, 0x7, 0x3F), (0x0C, 0x7, 0x3F)),
    ],
)
def test_identify_shows_the_transfer_mode(mode: int, multiword: int, ultra: int) -> None:
    words = struct.unpack("<256H", AtapiDrive(None).identify_packet(mode))
    assert (words[63], words[88]) == (multiword, ultra)


def features(data: bytes) -> dict[int, tuple[int, bytes]]:
    """Of GET CONFIGURATION: third byte and data of each feature by its number."""
    assert struct.unpack(">I", data[:4])[0] == len(data) - 4
    found, position = {}, 8
    while position < len(data):
        number, flags, size = struct.unpack_from(">HBB", data, position)
        assert size % 4 == 0
        found[number] = flags, data[position + 4 : position + 4 + size]
        position += 4 + size
    assert list(found) == sorted(found)
    return found


def test_configuration(cd: Host, dvd: Host, empty: Host) -> None:
    for host, profile, current in ((cd, 8, {0x10, 0x1E}), (dvd, 0x10, {0x10, 0x1F}), (empty, 0, set())):
        data = host.data(CONFIGURATION, EVERYTHING)
        assert struct.unpack(">H", data[6:8])[0] == profile
        found = features(data)
        assert set(found) == {0, 1, 3, 0x10, 0x1E, 0x1F, 0x105}
        assert {number for number, (flags, _) in found.items() if flags & 1} == {0, 1, 3, 0x105} | current
        profiles = found[0][1]
        assert profiles == bytes((0, 0x10, profile == 0x10, 0, 0, 8, profile == 8, 0))
        assert set(features(host.data(CONFIGURATION, {1: 1, **EVERYTHING}))) == {0, 1, 3, 0x105} | current
        assert set(features(host.data(CONFIGURATION, {3: 0x1E, **EVERYTHING}))) == {0x1E, 0x1F, 0x105}
        assert set(features(host.data(CONFIGURATION, {1: 2, 3: 3, **EVERYTHING}))) == {3}
        assert features(host.data(CONFIGURATION, {1: 2, 3: 4, **EVERYTHING})) == {}
        assert host.fails(CONFIGURATION, {1: 3, **EVERYTHING}) == BAD_FIELD
        assert host.data(CONFIGURATION, {8: 8}) == data[:8]


# -- what is on the disc --------------------------------------------------------------------------------------------


def test_toc(cd: Host) -> None:
    lba = cd.data(TOC, EVERYTHING)
    assert lba == bytes.fromhex("0012 01 01 00140100 00000000 0014aa00 000003e8")
    msf = cd.data(TOC, {1: 2, **EVERYTHING})
    assert msf == bytes.fromhex("0012 01 01 00140100 00000200 0014aa00 00000f19")
    assert cd.data(TOC, {6: 1, **EVERYTHING}) == lba
    assert cd.data(TOC, {6: 0xAA, **EVERYTHING}) == bytes.fromhex("000a 01 01 0014aa00 000003e8")
    assert cd.fails(TOC, {6: 2, **EVERYTHING}) == BAD_FIELD
    assert cd.data(TOC, {8: 4}) == lba[:4]
    cd.ok(TOC)


@pytest.mark.parametrize("at", [{2: 1}, {9: 0x40}])
def test_toc_sessions(cd: Host, at: dict[int, int]) -> None:
    # The format is in byte 2 since MMC, in byte 9 in SFF-8020i, and hosts of both kinds are about.
    assert cd.data(TOC, {**at, **EVERYTHING}) == bytes.fromhex("000a 01 01 00140100 00000000")


@pytest.mark.parametrize("at", [{2: 2}, {9: 0x80}])
def test_toc_raw(cd: Host, at: dict[int, int]) -> None:
    data = cd.data(TOC, {**at, **EVERYTHING})
    assert data[:4] == bytes((0, 46, 1, 1))
    entries = [data[n : n + 11] for n in range(4, len(data), 11)]
    assert [entry[3] for entry in entries] == [0xA0, 0xA1, 0xA2, 1]
    assert entries[2][8:] == bytes((0, 15, 25))
    assert entries[3][8:] == bytes((0, 2, 0))
    assert cd.data(TOC, {**at, 6: 2, **EVERYTHING}) == bytes((0, 2, 1, 1))


@pytest.mark.parametrize("at", [{2: 3}, {2: 4}, {2: 5}, {9: 0xC0}])
def test_toc_formats_of_other_discs(cd: Host, at: dict[int, int]) -> None:
    assert cd.fails(TOC, {**at, **EVERYTHING}) == BAD_FIELD


def test_addresses_beyond_what_msf_can_say() -> None:
    assert mmc.address(255 * 4500 + 59 * 75 + 74 - 150, True) == bytes((0, 255, 59, 74))
    assert mmc.address(256 * 4500 - 150, True) == bytes((0, 255, 59, 74))
    assert mmc.address(1 << 40, False) == b"\xff" * 4


def test_sub_channel_and_header(cd: Host) -> None:
    assert cd.data(SUB_CHANNEL, EVERYTHING) == bytes((0, 0x15, 0, 0))
    position = cd.data(SUB_CHANNEL, {1: 2, 2: 0x40, 3: 1, **EVERYTHING})
    assert position == bytes.fromhex("0015000c 01140101 00000200 00000000")
    catalogue = cd.data(SUB_CHANNEL, {2: 0x40, 3: 2, **EVERYTHING})
    assert catalogue == bytes.fromhex("00150014 02") + bytes(19)
    code = cd.data(SUB_CHANNEL, {2: 0x40, 3: 3, 6: 1, **EVERYTHING})
    assert code == bytes.fromhex("00150014 031401") + bytes(17)
    assert cd.fails(SUB_CHANNEL, {2: 0x40, 3: 3, 6: 2, **EVERYTHING}) == BAD_FIELD
    assert cd.fails(SUB_CHANNEL, {2: 0x40, 3: 0, **EVERYTHING}) == BAD_FIELD
    assert cd.data(HEADER, EVERYTHING, lba=5) == bytes.fromhex("01000000 00000005")
    assert cd.data(HEADER, {1: 2, **EVERYTHING}, lba=75) == bytes.fromhex("01000000 00000300")
    assert cd.fails(HEADER, EVERYTHING, lba=CD_BLOCKS) == OUT_OF_RANGE


def test_disc_and_track_information(cd: Host) -> None:
    disc = cd.data(DISC_INFO, EVERYTHING)
    assert (len(disc), disc[:8]) == (34, bytes.fromhex("0020 0e 01 01 01 01 20"))
    assert cd.fails(DISC_INFO, {1: 1, **EVERYTHING}) == BAD_FIELD
    for at in ({1: 0}, {1: 1, 5: 1}, {1: 2, 5: 1}):  # by a block, by the track's number, by the session's
        track = cd.data(TRACK_INFO, {**at, **EVERYTHING})
        assert (len(track), track[:7]) == (36, bytes.fromhex("0022 01 01 00 04 01"))
        assert struct.unpack(">II", track[8:12] + track[24:28]) == (0, CD_BLOCKS)
    assert cd.fails(TRACK_INFO, {1: 0, **EVERYTHING}, lba=CD_BLOCKS) == OUT_OF_RANGE
    assert cd.fails(TRACK_INFO, {1: 1, 5: 2, **EVERYTHING}) == BAD_FIELD
    assert cd.fails(TRACK_INFO, {1: 3, 5: 1, **EVERYTHING}) == BAD_FIELD


def test_dvd_structures(cd: Host, dvd: Host) -> None:
    everything = {8: 0xFF, 9: 0xFF}
    physical = dvd.data(DVD, everything)
    assert len(physical) == 2052
    assert physical[:20] == bytes.fromhex("08020000 010f0100 00030000 000eb7ff 00000000")
    assert dvd.data(DVD, {7: 1, **everything}) == bytes.fromhex("00060000 00000000")
    assert dvd.data(DVD, {7: 4, **everything}) == bytes.fromhex("08020000") + bytes(2048)
    listed = dvd.data(DVD, {7: 0xFF, **everything})
    assert listed == bytes.fromhex("000e0000 00400804 01400008 04400804")
    for form in listed[4::4]:
        announced = struct.unpack(">H", listed[4 + 4 * [0, 1, 4].index(form) + 2 :][:2])[0]
        assert len(dvd.data(DVD, {7: form, **everything})) == announced
    for wrong in ({7: 2}, {1: 1}, {6: 1}):
        assert dvd.fails(DVD, {**wrong, **everything}) == BAD_FIELD
    assert cd.fails(DVD, everything) == (5, 0x3002)


def test_a_disc_of_more_than_80_minutes_is_a_dvd() -> None:
    for blocks, profile in ((360_000, 8), (360_001, 0x10), (0xFFFFFFFF, 0x10)):
        host = Host(AtapiDrive(Disc(blocks)))
        assert host.data(CONFIGURATION, EVERYTHING)[7] == profile
        assert len(host.data(TOC, {1: 2, **EVERYTHING})) == 20
        assert host.data(CAPACITY)[:4] == struct.pack(">I", blocks - 1)


# -- mode pages -----------------------------------------------------------------------------------------------------


def pages(data: bytes, header: int) -> dict[int, bytes]:
    found, position = {}, header
    while position < len(data):
        size = 2 + data[position + 1]
        found[data[position]] = data[position : position + size]
        position += size
    assert position == len(data)
    return found


def test_mode_sense(cd: Host) -> None:
    long = cd.data(SENSE_10, {2: 0x3F, **EVERYTHING})
    assert struct.unpack(">H", long[:2])[0] == len(long) - 2
    assert long[2:8] == bytes((1, 0, 0, 0, 0, 0))  # a CD with data; no block descriptors
    found = pages(long, 8)
    assert list(found) == [0x01, 0x0D, 0x0E, 0x2A]
    short = cd.data(SENSE_6, {2: 0x3F, 4: 0xFF})
    assert short[:4] == bytes((len(short) - 1, 1, 0, 0))
    assert pages(short, 4) == found
    for number, page in found.items():
        assert pages(cd.data(SENSE_10, {2: number, **EVERYTHING}), 8) == {number: page}
        assert pages(cd.data(SENSE_10, {2: 0x80 | number, **EVERYTHING}), 8) == {number: page}  # default values
    assert cd.data(SENSE_10, {2: 0x2A, 8: 12}) == long[:1] + bytes((26,)) + long[2:8] + found[0x2A][:4]
    assert cd.fails(SENSE_10, {2: 0x08, **EVERYTHING}) == BAD_FIELD
    assert cd.fails(SENSE_10, {2: 0xEA, **EVERYTHING}) == (5, 0x3900)


def test_capabilities_show_the_lock(cd: Host) -> None:
    def mechanism() -> int:
        return cd.data(SENSE_10, {2: 0x2A, **EVERYTHING})[8 + 6]

    assert mechanism() == 0x29  # a tray, can eject, can lock
    cd.ok(PREVENT, {4: 1})
    assert mechanism() == 0x2B
    cd.ok(PREVENT, {4: 0})
    assert mechanism() == 0x29


def test_mode_select_sets_what_is_changeable(cd: Host) -> None:
    page = bytes((1, 6, 0x20, 9, 0, 0, 0, 0))
    assert cd.send(SELECT_10, {1: 0x10, 8: 16}).length == 16
    assert cd.send(SELECT_10, {1: 0x10, 8: 16}).kind == DATA_OUT
    assert cd.drive.data_out(bytes(8) + page).kind == NO_DATA
    assert cd.data(SENSE_6, {2: 1, 4: 255})[4:] == page
    assert cd.data(SENSE_6, {2: 0x81, 4: 255})[4:] == bytes((1, 6, 0, 5, 0, 0, 0, 0))
    assert cd.data(SENSE_6, {2: 0x41, 4: 255})[4:] == bytes((1, 6, 0xFF, 0xFF, 0, 0, 0, 0))
    # What MODE SENSE gave may come back as it is, with a block descriptor, by the short command too.
    assert cd.send(SELECT_6, {4: 20}).length == 20
    assert cd.drive.data_out(bytes((0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 8, 0)) + page).kind == NO_DATA
    cd.drive.reset()
    assert cd.data(SENSE_6, {2: 1, 4: 255})[4:] == bytes((1, 6, 0, 5, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", 0x1A00),
        (bytes(7), 0x1A00),
        (bytes(8) + bytes((1,)), 0x1A00),
        (bytes(8) + bytes((1, 6, 0, 5)), 0x1A00),
        (bytes((0, 0, 0, 0, 0, 0, 0, 8)) + bytes(4), 0x1A00),
        (bytes((0, 0, 0, 0, 0, 0, 0, 9)) + bytes(9), 0x2600),
        (bytes((0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 2, 0)), 0x2600),  # blocks of 512 bytes
        (bytes(8) + bytes((8, 0)), 0x2600),
        (bytes(8) + bytes((1, 7)) + bytes(7), 0x2600),
        (bytes(8) + bytes((1, 6, 0, 5, 1, 0, 0, 0)), 0x2600),
        (bytes(8) + bytes((0x2A, 18)) + bytes(18), 0x2600),
        (bytes(8) + bytes((1, 6, 0, 7, 0, 0, 0, 0)) + bytes((8, 0)), 0x2600),  # the first page is right
    ],
)
def test_mode_select_takes_all_or_nothing(cd: Host, data: bytes, code: int) -> None:
    assert cd.send(SELECT_10, {8: 100}).kind == DATA_OUT
    assert cd.drive.data_out(data).kind == CHECK
    assert cd.sense() == (5, code)
    assert cd.data(SENSE_6, {2: 1, 4: 255})[4:] == bytes((1, 6, 0, 5, 0, 0, 0, 0))


def test_mode_select_without_data_or_to_be_saved(cd: Host) -> None:
    cd.ok(SELECT_10)
    cd.ok(SELECT_6)
    assert cd.fails(SELECT_10, {1: 0x11, 8: 8}) == BAD_FIELD


# -- tray and disc --------------------------------------------------------------------------------------------------


def test_a_host_opens_and_closes_the_tray(cd: Host) -> None:
    cd.ok(START_STOP, {4: 0})
    cd.ok(TUR)
    cd.ok(START_STOP, {4: 2})
    assert cd.drive.tray_open
    assert cd.fails(TUR) == NO_MEDIUM
    assert cd.event() == (0, mmc.MEDIA_TRAY_OPEN)
    assert cd.data(MECHANISM, {9: 8})[1] == 0x10
    assert cd.data(SENSE_10, {2: 0x2A, **EVERYTHING})[2] == 0x71
    cd.ok(START_STOP, {4: 1})
    assert cd.drive.tray_open  # to spin up is not to load
    cd.ok(START_STOP, {4: 3})
    cd.ok(TUR)
    assert cd.event() == (0, mmc.MEDIA_PRESENT)


def test_power_conditions_move_no_tray(cd: Host) -> None:
    cd.ok(START_STOP, {4: 0x12})
    assert not cd.drive.tray_open


def test_a_locked_tray_stays(cd: Host, empty: Host) -> None:
    cd.ok(PREVENT, {4: 1})
    assert cd.fails(START_STOP, {4: 2}) == (2, 0x5302)
    assert not cd.drive.tray_open
    cd.ok(PREVENT)
    cd.ok(START_STOP, {4: 2})
    cd.ok(PREVENT, {4: 1})
    cd.ok(START_STOP, {4: 2})  # open it is
    empty.ok(PREVENT, {4: 1})
    assert empty.fails(START_STOP, {4: 2}) == (5, 0x5302)


def test_the_user_asks_a_host_that_locked_the_tray(cd: Host) -> None:
    cd.ok(PREVENT, {4: 1})
    assert not cd.drive.eject()
    cd.ok(TUR)
    assert cd.event() == (mmc.MEDIA_EJECT_REQUEST, mmc.MEDIA_PRESENT)
    assert cd.event() == (0, mmc.MEDIA_PRESENT)
    cd.ok(PREVENT)
    cd.ok(START_STOP, {4: 2})
    assert cd.drive.backend is not None
    assert cd.drive.eject()
    assert cd.drive.backend is None


def test_force_opens_a_locked_tray(cd: Host) -> None:
    cd.ok(PREVENT, {4: 1})
    assert cd.drive.eject(force=True)
    assert (cd.drive.tray_open, cd.drive.locked, cd.drive.backend) == (True, False, None)


def test_an_ejected_disc_is_gone(cd: Host) -> None:
    assert cd.drive.eject()
    assert cd.fails(READ_10, lba=0, count=1) == NO_MEDIUM
    assert cd.event() == (0, mmc.MEDIA_TRAY_OPEN)
    cd.ok(START_STOP, {4: 3})
    assert cd.fails(TUR) == NO_MEDIUM
    assert cd.event() == (mmc.MEDIA_NEW, 0)


def test_a_new_disc_shows_in_two_steps(cd: Host) -> None:
    cd.drive.insert(Disc(20))
    assert cd.fails(READ_10, lba=0, count=1) == NO_MEDIUM
    assert cd.send(READ_10, lba=0, count=1).kind == CHECK
    # Until the host has fetched that sense nothing but the harmless commands is carried out.
    assert cd.send(READ_10, lba=0, count=1).kind == CHECK
    assert cd.send(0xFF).kind == CHECK
    assert cd.data(INQUIRY, {4: 36})
    assert cd.data(CONFIGURATION, EVERYTHING)
    assert cd.event() == (mmc.MEDIA_NEW, mmc.MEDIA_PRESENT)
    assert cd.sense() == NEW_MEDIUM
    assert cd.data(CAPACITY) == struct.pack(">II", 19, 2048)
    assert cd.event() == (0, mmc.MEDIA_PRESENT)


def test_a_disc_put_into_an_open_tray_closes_it(cd: Host) -> None:
    cd.drive.eject()
    cd.drive.insert(Disc(5))
    assert not cd.drive.tray_open
    assert [cd.fails(TUR), cd.fails(TUR)] == [NO_MEDIUM, NEW_MEDIUM]
    cd.ok(TUR)


def test_reset_forgets_the_lock_and_the_sense_but_not_the_tray(cd: Host) -> None:
    cd.ok(START_STOP, {4: 2})
    cd.ok(PREVENT, {4: 1})
    cd.send(TUR)
    cd.drive.reset()
    assert (cd.drive.locked, cd.drive.tray_open, cd.sense()) == (False, True, NO_SENSE)
    cd.drive.insert(Disc(5))
    cd.drive.reset()
    cd.ok(TUR)
    assert cd.event() == (mmc.MEDIA_NEW, mmc.MEDIA_PRESENT)


# -- saved state and hostile bytes ----------------------------------------------------------------------------------

PACKETS = st.one_of(
    st.binary(max_size=16),
    st.builds(
        lambda opcode, rest: bytes((opcode,)) + rest,
        st.sampled_from(sorted(atapi.COMMANDS)),
        st.one_of(st.binary(min_size=11, max_size=11), st.lists(st.sampled_from([0, 1, 2, 16, 255])).map(bytes)),
    ),
)
STEPS = st.one_of(
    PACKETS,
    st.sampled_from(["insert", "eject", "force", "reset", "fail"]),
    st.tuples(st.just("data"), st.binary(max_size=64)),
)
DRIVES = st.builds(
    lambda disc, odd: AtapiDrive(None if disc is None else Disc(disc, odd)),
    st.sampled_from([None, 0, 1, CD_BLOCKS, DVD_BLOCKS, 0xFFFFFFFF, 1 << 40]),
    st.integers(0, 3),
)


def step(drive: AtapiDrive, what: bytes | str | tuple[str, bytes]) -> PacketResult | bool | None:
    if isinstance(what, bytes):
        return drive.packet(what)
    if isinstance(what, tuple):
        return drive.data_out(what[1])
    if what == "insert":
        drive.insert(Disc(3))
    elif what == "reset":
        drive.reset()
    elif what == "fail":
        return drive.read_failed(errno.EIO, 1 << 33)
    else:
        return drive.eject(force=what == "force")
    return None


def shown(result: PacketResult | bool | None) -> object:
    return [getattr(result, name) for name in result.__slots__] if isinstance(result, PacketResult) else result


@given(DRIVES, st.lists(STEPS, max_size=20))
def test_no_packet_raises_and_each_answer_keeps_its_bounds(
    drive: AtapiDrive, steps: list[bytes | str | tuple[str, bytes]]
) -> None:
    for what in steps:
        result = step(drive, what)
        assert 0 <= drive.sense_key <= 15
        if not isinstance(result, PacketResult):
            continue
        assert (result.kind == CHECK) <= (drive.sense_key != 0)
        if result.kind == READ:
            assert 0 < result.count <= drive.blocks - result.lba
            assert result.lba >= 0
        elif result.kind == DATA_OUT:
            assert 0 < result.length <= 0xFFFF
        elif result.kind == DATA_IN:
            assert isinstance(what, bytes)
            assert 0 < len(result.data) <= 0xFFFF


@given(DRIVES, st.lists(STEPS, max_size=12), st.lists(STEPS, max_size=6))
@settings(max_examples=50)
def test_a_loaded_drive_goes_on_as_the_saved_one(
    drive: AtapiDrive,
    before: list[bytes | str | tuple[str, bytes]],
    after: list[bytes | str | tuple[str, bytes]],
) -> None:
    for what in before:
        step(drive, what)
    other = AtapiDrive(drive.backend)
    other.load(drive.save())
    assert other.save() == drive.save()
    for what in after:
        assert shown(step(other, what)) == shown(step(drive, what))
    assert other.identify_packet() == drive.identify_packet()


@given(st.binary(min_size=12, max_size=12), st.integers(0, 255))
def test_data_is_cut_to_what_the_host_has_room_for(packet: bytes, room: int) -> None:
    for opcode, where in (
        *((INQUIRY, 4), (REQUEST_SENSE, 4), (SENSE_6, 4), (SENSE_10, 8), (TOC, 8), (CONFIGURATION, 8)),
        *((EVENT_STATUS, 8), (DISC_INFO, 8), (TRACK_INFO, 8), (SUB_CHANNEL, 8), (HEADER, 8)),
        *((DVD, 9), (MECHANISM, 9)),
    ):
        edited = bytearray(packet)
        edited[0], edited[where - 1], edited[where] = opcode, 0, room
        result = AtapiDrive(Disc(DVD_BLOCKS)).packet(bytes(edited))
        assert result.kind in ((NO_DATA, CHECK) if room == 0 else (DATA_IN, CHECK))
        assert len(result.data) <= room
