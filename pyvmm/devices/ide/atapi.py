"""AtapiDrive: the packet commands of a CD/DVD-ROM drive, with its tray, its sense data and its media changes.

SFF-8020i and INF-8090 / MMC-3 for the commands, SPC-2 for those that every SCSI device has; where they leave a choice
(which media changes are reported, and how) what QEMU's drive does, because that is what guests are tried with.

There is no transport in here: ``packet`` takes the bytes of a command and says what is to follow. The channel moves the
data, reads blocks from ``backend`` and reports how that ended. Whoever calls holds the channel's lock.
"""

from __future__ import annotations

from errno import ENOMEDIUM

from pyvmm.devices.ide import mmc
from pyvmm.devices.ide.mmc import BLOCK_BYTES
from pyvmm.devices.ide.mode_pages import ModePages, medium_type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol, TypeAlias

    Buffer: TypeAlias = bytes | bytearray | memoryview

    class Medium(Protocol):
        """What the commands ask of a BlockBackend; the channel, which reads, asks more."""

        @property
        def sectors(self) -> int: ...  # of 512 bytes
        @property
        def inserted(self) -> bool: ...


PACKET_BYTES = 12
SECTORS_PER_BLOCK = BLOCK_BYTES // 512

# What follows a packet
NO_DATA = 0  # it is done
DATA_IN = 1  # `data` goes to the host
READ = 2  # `count` blocks of 2048 bytes from `lba` on go to the host
DATA_OUT = 3  # `length` bytes come from the host and go to `data_out`
CHECK = 4  # check condition: the status has ERR, the error register the sense key

# Sense keys
NO_SENSE = 0x0
NOT_READY = 0x2
MEDIUM_ERROR = 0x3
ILLEGAL_REQUEST = 0x5
UNIT_ATTENTION = 0x6
ABORTED_COMMAND = 0xB

# Additional sense codes, with their qualifier in the low byte
NO_ADDITIONAL_SENSE = 0x0000
UNRECOVERED_READ_ERROR = 0x1100
PARAMETER_LIST_LENGTH = 0x1A00
INVALID_OPCODE = 0x2000
LBA_OUT_OF_RANGE = 0x2100
INVALID_FIELD_IN_CDB = 0x2400
INVALID_PARAMETERS = 0x2600
MEDIUM_MAY_HAVE_CHANGED = 0x2800
INCOMPATIBLE_FORMAT = 0x3002
SAVING_NOT_SUPPORTED = 0x3900
MEDIUM_NOT_PRESENT = 0x3A00
MEDIA_REMOVAL_PREVENTED = 0x5302
ILLEGAL_MODE_FOR_TRACK = 0x6400

SENSE_CURRENT = 0x70  # response code: an error of the last command, fixed format
SENSE_VALID = 0x80  # the information field holds an LBA
SENSE_BYTES = 18


class PacketResult:
    """What follows a packet: one of the five kinds above, with the fields that belong to it."""

    __slots__ = ("count", "data", "kind", "lba", "length")

    def __init__(self, kind: int, data: bytes = b"", lba: int = 0, count: int = 0, length: int = 0) -> None:
        self.kind = kind
        self.data = data
        self.lba = lba
        self.count = count
        self.length = length

    def __repr__(self) -> str:
        kind = ("NO_DATA", "DATA_IN", "READ", "DATA_OUT", "CHECK")[self.kind]
        return f"<PacketResult {kind} {self.data.hex()} lba {self.lba} count {self.count} length {self.length}>"


# How much of a change of discs the host has been told
UNCHANGED = 0
REMOVED = 1  # nothing: it will see the old one gone first
REPLACED = 2  # that one is gone; now the new one

# READ CD
ANY_SECTOR = 0
MODE_1_SECTOR = 2
LAST_SECTOR_TYPE = 5  # 1 is audio, 3 to 5 are other kinds of data
READ_CD_PARTS = 0xFE  # sync, headers, user data, error correction, C2 error bits
READ_CD_USER_DATA = 0x10

# READ TRACK INFORMATION
TRACK_BY_LBA = 0
TRACK_BY_SESSION = 2

SAVED_VALUES = 3  # MODE SENSE's page control
MODE_SELECT_SAVE = 0x01  # SP

DONE = PacketResult(NO_DATA)
FAILED = PacketResult(CHECK)


class AtapiDrive:
    """One drive; ``backend`` None is an empty one. All blocks are of 2048 bytes; what is left over at an image's end
    and does not fill one is no block.

    ``backend`` is what to read from after a READ; it may be replaced between two packets, never by a packet.
    """

    def __init__(
        self,
        backend: Medium | None,
        *,
        model: str = "pyvmm DVD-ROM",
        serial: str = "PV00003",
        vendor: str = "PYVMM",
        product: str = "DVD-ROM",
        revision: str = "1.0",
    ) -> None:
        """``model`` (40 characters) and ``serial`` (20) are those of IDENTIFY PACKET DEVICE, ``vendor`` (8),
        ``product`` (16) and ``revision`` (4, for both) those of INQUIRY."""
        self.backend = backend
        self.model = model
        self.serial = serial
        self.vendor = vendor
        self.product = product
        self.revision = revision
        self.tray_open = False
        self.on_tray: Callable[[bool], object] = nobody_looks
        """Called with whether the tray is open, when it has moved; with the channel's lock held."""
        self.locked = False
        self.sense_key = NO_SENSE
        self._asc = NO_ADDITIONAL_SENSE
        self._information: int | None = None  # the LBA a read failed at
        self._change = UNCHANGED
        self._new_media = False  # events not polled yet
        self._eject_request = False
        self._select_long = False  # which MODE SELECT the data is for that will come
        self._pages = ModePages()

    # Tray and disc, as the machine's user handles them

    @property
    def blocks(self) -> int:
        """How many blocks of 2048 bytes the host can reach; 0 without a disc, or with the tray open."""
        backend = self.backend
        if self.tray_open or backend is None or not backend.inserted:
            return 0
        return backend.sectors // SECTORS_PER_BLOCK

    def insert(self, backend: Medium) -> None:
        """A disc goes in, in place of one that may be there, and the tray closes. The host will be told."""
        self.backend = backend
        self._move_tray(False)
        self._changed()

    def eject(self, force: bool = False) -> bool:
        """Take the disc out, with the tray left open. Where the host holds the tray locked: False, nothing happens but
        that it is asked to let go; ``force`` is the pin in the hole."""
        if self.locked and not self.tray_open and not force:
            self._eject_request = True
            return False
        self.locked = False
        self.backend = None
        self._move_tray(True)
        self._changed()
        return True

    def _move_tray(self, is_open: bool) -> None:
        moves, self.tray_open = self.tray_open is not is_open, is_open
        if moves:
            self.on_tray(is_open)

    def _changed(self) -> None:
        self._change = REMOVED
        self._new_media = True
        self._eject_request = False

    # Packets

    def packet(self, cdb: Buffer) -> PacketResult:
        """Carry out one command: 12 bytes, fewer are filled up with zeros. Never raises, whatever they are."""
        cdb = bytes(cdb[:PACKET_BYTES]).ljust(PACKET_BYTES, b"\0")
        command = COMMANDS.get(cdb[0])
        flags = 0 if command is None else command[1]
        if not flags & DURING_ATTENTION:
            if self.sense_key == UNIT_ATTENTION:
                return FAILED  # until REQUEST SENSE has fetched it
            if self._change and self.blocks:
                return self._report_change()
        if flags & NEEDS_DISC and not self.blocks:
            return self.fail(NOT_READY, MEDIUM_NOT_PRESENT)
        if command is None:
            return self.fail(ILLEGAL_REQUEST, INVALID_OPCODE)
        if not flags & KEEPS_SENSE:
            self._set_sense(NO_SENSE, NO_ADDITIONAL_SENSE)
        return command[0](self, cdb)

    def _report_change(self) -> PacketResult:
        # Two steps, because a host that does not poll for events only notices a disc that was gone for a while.
        if self._change == REMOVED:
            self._change = REPLACED
            return self.fail(NOT_READY, MEDIUM_NOT_PRESENT)
        self._change = UNCHANGED
        return self.fail(UNIT_ATTENTION, MEDIUM_MAY_HAVE_CHANGED)

    def fail(self, key: int, asc: int, information: int | None = None) -> PacketResult:
        """End the command with this sense. Also for the channel, where the transfer went wrong."""
        self._set_sense(key, asc, information)
        return FAILED

    def read_failed(self, error: int, lba: int) -> PacketResult:
        """The backend gave ``error`` (an errno) for the blocks from ``lba`` on."""
        if error == ENOMEDIUM:
            return self.fail(NOT_READY, MEDIUM_NOT_PRESENT)
        return self.fail(MEDIUM_ERROR, UNRECOVERED_READ_ERROR, lba)

    def _set_sense(self, key: int, asc: int, information: int | None = None) -> None:
        self.sense_key = key
        self._asc = asc
        self._information = information

    def _invalid_field(self) -> PacketResult:
        return self.fail(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB)

    def _test_unit_ready(self, cdb: bytes) -> PacketResult:
        return DONE

    def _request_sense(self, cdb: bytes) -> PacketResult:
        data = bytearray(SENSE_BYTES)
        data[0] = SENSE_CURRENT
        if self._information is not None:
            data[0] |= SENSE_VALID
            data[3:7] = mmc.be32(self._information)
        data[2] = self.sense_key
        data[7] = SENSE_BYTES - 8
        data[12:14] = mmc.be16(self._asc)
        self._set_sense(NO_SENSE, NO_ADDITIONAL_SENSE)
        return answer(data, cdb[4])

    def _inquiry(self, cdb: bytes) -> PacketResult:
        data: bytes | None
        if cdb[1] & 1:
            data = mmc.vital_product_data(cdb[2], self.vendor, self.product, self.serial)
        else:
            data = None if cdb[2] else mmc.inquiry(self.vendor, self.product, self.revision)
        return self._invalid_field() if data is None else answer(data, number(cdb, 3, 2))

    def _start_stop_unit(self, cdb: bytes) -> PacketResult:
        start, load_or_eject, power_condition = cdb[4] & 1, cdb[4] & 2, cdb[4] & 0xF0
        if load_or_eject and not power_condition:
            if not start and not self.tray_open and self.locked:
                return self.fail(NOT_READY if self.blocks else ILLEGAL_REQUEST, MEDIA_REMOVAL_PREVENTED)
            self._move_tray(not start)
        return DONE

    def _prevent_allow_removal(self, cdb: bytes) -> PacketResult:
        self.locked = bool(cdb[4] & 1)
        return DONE

    def _read_capacity(self, cdb: bytes) -> PacketResult:
        return PacketResult(DATA_IN, mmc.be32(self.blocks - 1) + mmc.be32(BLOCK_BYTES))

    # Reading

    def _read(self, lba: int, count: int) -> PacketResult:
        if not count:
            return DONE
        if lba + count > self.blocks:
            return self.fail(ILLEGAL_REQUEST, LBA_OUT_OF_RANGE)
        return PacketResult(READ, lba=lba, count=count)

    def _read_10(self, cdb: bytes) -> PacketResult:
        return self._read(number(cdb, 2, 4), number(cdb, 7, 2))

    def _read_12(self, cdb: bytes) -> PacketResult:
        return self._read(number(cdb, 2, 4), number(cdb, 6, 4))

    def _read_cd(self, cdb: bytes) -> PacketResult:
        sector_type, parts, sub_channel = cdb[1] >> 2 & 7, cdb[9] & READ_CD_PARTS, cdb[10] & 7
        if sector_type > LAST_SECTOR_TYPE:
            return self._invalid_field()
        if sector_type not in (ANY_SECTOR, MODE_1_SECTOR):
            return self.fail(ILLEGAL_REQUEST, ILLEGAL_MODE_FOR_TRACK)
        if not parts and not sub_channel:
            return DONE
        if parts != READ_CD_USER_DATA or sub_channel:
            return self._invalid_field()  # there are no sync, header, error correction or sub-channel bytes to give
        return self._read(number(cdb, 2, 4), number(cdb, 6, 3))

    def _seek(self, cdb: bytes) -> PacketResult:
        if number(cdb, 2, 4) >= self.blocks:
            return self.fail(ILLEGAL_REQUEST, LBA_OUT_OF_RANGE)
        return DONE

    def _set_cd_speed(self, cdb: bytes) -> PacketResult:
        return DONE

    # What kind of disc, what is on it

    def _read_toc(self, cdb: bytes) -> PacketResult:
        msf = bool(cdb[1] & 2)
        form = cdb[2] & 0x0F or cdb[9] >> 6  # where MMC has it, where SFF-8020i has it
        data: bytes | None = None
        if form == 0:
            data = mmc.toc(self.blocks, msf, cdb[6])
        elif form == 1:
            data = mmc.session_info(msf)
        elif form == 2:
            data = mmc.raw_toc(self.blocks, cdb[6])
        return self._invalid_field() if data is None else answer(data, number(cdb, 7, 2))

    def _read_sub_channel(self, cdb: bytes) -> PacketResult:
        data = b""
        if cdb[2] & 0x40:
            if cdb[3] == mmc.SUB_ISRC and cdb[6] != mmc.TRACK:
                return self._invalid_field()
            found = mmc.sub_channel(cdb[3], bool(cdb[1] & 2))
            if found is None:
                return self._invalid_field()
            data = found
        return answer(bytes((0, mmc.NO_AUDIO_STATUS)) + mmc.be16(len(data)) + data, number(cdb, 7, 2))

    def _read_header(self, cdb: bytes) -> PacketResult:
        lba = number(cdb, 2, 4)
        if lba >= self.blocks:
            return self.fail(ILLEGAL_REQUEST, LBA_OUT_OF_RANGE)
        mode_1 = bytes((1, 0, 0, 0))
        return answer(mode_1 + mmc.address(lba, bool(cdb[1] & 2)), number(cdb, 7, 2))

    def _read_disc_information(self, cdb: bytes) -> PacketResult:
        if cdb[1] & 7:
            return self._invalid_field()
        return answer(mmc.disc_information(), number(cdb, 7, 2))

    def _read_track_information(self, cdb: bytes) -> PacketResult:
        by, which = cdb[1] & 3, number(cdb, 2, 4)
        if by == TRACK_BY_LBA and which >= self.blocks:
            return self.fail(ILLEGAL_REQUEST, LBA_OUT_OF_RANGE)
        if by > TRACK_BY_SESSION or (by and which != 1):
            return self._invalid_field()
        return answer(mmc.track_information(self.blocks), number(cdb, 7, 2))

    def _read_dvd_structure(self, cdb: bytes) -> PacketResult:
        media_type, layer, kind = cdb[1] & 0x0F, cdb[6], cdb[7]
        if kind != mmc.DVD_LIST and not mmc.is_dvd(self.blocks):
            return self.fail(ILLEGAL_REQUEST, INCOMPATIBLE_FORMAT)
        data = None if media_type or layer else mmc.dvd_structure(kind, self.blocks)
        return self._invalid_field() if data is None else answer(data, number(cdb, 8, 2))

    # What kind of drive, how it is set, what happened to it

    def _get_configuration(self, cdb: bytes) -> PacketResult:
        requested = cdb[1] & 3
        if requested > 2:
            return self._invalid_field()
        return answer(mmc.configuration(self.blocks, requested, number(cdb, 2, 2)), number(cdb, 7, 2))

    def _get_event_status(self, cdb: bytes) -> PacketResult:
        allocation = number(cdb, 7, 2)
        if not cdb[1] & 1:
            return self._invalid_field()  # only polled: nothing here could answer later
        if not cdb[4] & mmc.EVENT_MEDIA_BIT:
            return answer(mmc.no_event(), allocation)
        code, status = mmc.MEDIA_NO_CHANGE, mmc.MEDIA_TRAY_OPEN
        if not self.tray_open:
            status = mmc.MEDIA_PRESENT if self.blocks else 0
            if self._new_media:
                code, self._new_media = mmc.MEDIA_NEW, False
            elif self._eject_request:
                code, self._eject_request = mmc.MEDIA_EJECT_REQUEST, False
        return answer(mmc.media_event(code, status), allocation)

    def _mechanism_status(self, cdb: bytes) -> PacketResult:
        door = 0x10 if self.tray_open else 0
        return answer(bytes((0, door, 0, 0, 0, 1, 0, 0)), number(cdb, 8, 2))  # idle, 1 slot, no table of slots

    def _mode_sense(self, cdb: bytes) -> PacketResult:
        long = cdb[0] == MODE_SENSE_10
        control, page = cdb[2] >> 6, cdb[2] & 0x3F
        if control == SAVED_VALUES:
            return self.fail(ILLEGAL_REQUEST, SAVING_NOT_SUPPORTED)
        medium = medium_type(self.blocks, self.tray_open)
        data = self._pages.sense(page, control, medium, self.locked, long=long)
        if data is None:
            return self._invalid_field()
        return answer(data, number(cdb, 7, 2) if long else cdb[4])

    def _mode_select(self, cdb: bytes) -> PacketResult:
        long = cdb[0] == MODE_SELECT_10
        if cdb[1] & MODE_SELECT_SAVE:
            return self._invalid_field()
        length = number(cdb, 7, 2) if long else cdb[4]
        if not length:
            return DONE
        self._select_long = long
        return PacketResult(DATA_OUT, length=length)

    def data_out(self, data: Buffer) -> PacketResult:
        """The host's data of the last packet, all of it or what came: NO_DATA or CHECK."""
        wrong = self._pages.select(bytes(data), long=self._select_long)
        if wrong:
            return self.fail(ILLEGAL_REQUEST, PARAMETER_LIST_LENGTH if wrong == "length" else INVALID_PARAMETERS)
        return DONE

    # The device's side

    def identify_packet(self, transfer_mode: int = 0) -> bytes:
        """The 512 bytes of IDENTIFY PACKET DEVICE. ``transfer_mode`` is what SET FEATURES has chosen (its sector count:
        20h + n multiword DMA, 40h + n ultra DMA), for the words that show it."""
        words = [0] * 256
        words[0] = 0x85C0  # ATAPI, CD-ROM, removable, DRQ within 50 us of PACKET, 12-byte packets
        words[10:20] = ata_string(self.serial, 20)
        words[20] = 3  # kind of buffer: two ports, reads ahead; obsolete, but hosts print it
        words[21] = mmc.BUFFER_KIB * 2  # its size in 512-byte units
        words[23:27] = ata_string(self.revision, 8)
        words[27:47] = ata_string(self.model, 40)
        words[49] = 0x0B00  # IORDY, LBA, DMA
        words[51] = 0x0200  # PIO mode 2 without flow control
        words[53] = 0x0007  # words 54-58, 64-70 and 88 are valid
        words[63] = 0x0007 | selected(transfer_mode, MULTIWORD_DMA, 2)
        words[64] = 0x0003  # PIO modes 3 and 4
        words[65:69] = [120, 120, 120, 120]  # ns a cycle of multiword DMA and of PIO
        words[71:73] = [30, 30]  # ns to the release of the bus, and to the end of SERVICE: never used
        words[80] = 0x001E  # ATA/ATAPI-1 to -4
        words[82] = words[85] = 0x4210  # NOP, DEVICE RESET, PACKET
        words[83] = words[84] = words[87] = 0x4000
        words[88] = 0x003F | selected(transfer_mode, ULTRA_DMA, 5)
        words[93] = 0x6001  # a cable of 80 wires
        return b"".join(word.to_bytes(2, "little") for word in words)

    def reset(self) -> None:
        """Power on, hard or software reset: as new, but for the disc, the tray and events not asked for yet."""
        self.locked = False
        self._set_sense(NO_SENSE, NO_ADDITIONAL_SENSE)
        self._change = UNCHANGED
        self._select_long = False
        self._pages.reset()

    # All but the disc: whoever loads this has put the same one in.
    STATE = {
        "tray_open": "flag",
        "locked": "flag",
        "sense_key": 4,
        "_asc": 16,
        "_information": ("or none", 64),
        "_change": range(UNCHANGED, REPLACED + 1),
        "_new_media": "flag",
        "_eject_request": "flag",
        "_select_long": "flag",
        "_pages": "part",
    }

    def save(self) -> dict[str, Any]:
        from pyvmm.state import save_fields

        return save_fields(self, self.STATE)

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import load_fields

        load_fields(self, self.STATE, state)


# Operation codes: what carries each out, and the rules that hold before.
DURING_ATTENTION = 1  # is carried out while there is a unit attention, and does not report one
NEEDS_DISC = 2
KEEPS_SENSE = 4  # what the last command left is still wanted

MODE_SELECT_6 = 0x15
MODE_SENSE_6 = 0x1A
MODE_SELECT_10 = 0x55
MODE_SENSE_10 = 0x5A

COMMANDS: dict[int, tuple[Callable[[AtapiDrive, bytes], PacketResult], int]] = {
    0x00: (AtapiDrive._test_unit_ready, NEEDS_DISC),
    0x03: (AtapiDrive._request_sense, DURING_ATTENTION | KEEPS_SENSE),
    0x12: (AtapiDrive._inquiry, DURING_ATTENTION | KEEPS_SENSE),
    MODE_SELECT_6: (AtapiDrive._mode_select, 0),
    MODE_SENSE_6: (AtapiDrive._mode_sense, 0),
    0x1B: (AtapiDrive._start_stop_unit, 0),
    0x1E: (AtapiDrive._prevent_allow_removal, 0),
    0x25: (AtapiDrive._read_capacity, NEEDS_DISC),
    0x28: (AtapiDrive._read_10, NEEDS_DISC),
    0x2B: (AtapiDrive._seek, NEEDS_DISC),
    0x42: (AtapiDrive._read_sub_channel, NEEDS_DISC),
    0x43: (AtapiDrive._read_toc, NEEDS_DISC),
    0x44: (AtapiDrive._read_header, NEEDS_DISC),
    0x46: (AtapiDrive._get_configuration, DURING_ATTENTION | KEEPS_SENSE),
    0x4A: (AtapiDrive._get_event_status, DURING_ATTENTION | KEEPS_SENSE),
    0x51: (AtapiDrive._read_disc_information, NEEDS_DISC),
    0x52: (AtapiDrive._read_track_information, NEEDS_DISC),
    MODE_SELECT_10: (AtapiDrive._mode_select, 0),
    MODE_SENSE_10: (AtapiDrive._mode_sense, 0),
    0xA8: (AtapiDrive._read_12, NEEDS_DISC),
    0xAD: (AtapiDrive._read_dvd_structure, NEEDS_DISC),
    0xBB: (AtapiDrive._set_cd_speed, 0),
    0xBD: (AtapiDrive._mechanism_status, 0),
    0xBE: (AtapiDrive._read_cd, NEEDS_DISC),
}


MULTIWORD_DMA = 0x20  # SET FEATURES, transfer modes
ULTRA_DMA = 0x40


def nobody_looks(is_open: bool) -> None:
    """In place of ``on_tray``."""


def selected(transfer_mode: int, kind: int, highest: int) -> int:
    """The bit of an identify word of DMA modes that says which one is in use; none for another kind's."""
    return 0x100 << (transfer_mode - kind) if kind <= transfer_mode <= kind + highest else 0


def ata_string(text: str, size: int) -> list[int]:
    """Words with the first character of each pair in the upper byte (ATA/ATAPI-6, 3.2.9)."""
    field = mmc.ascii_field(text, size)
    return [int.from_bytes(field[at : at + 2], "big") for at in range(0, size, 2)]


def number(cdb: bytes, offset: int, size: int) -> int:
    """A field of the command; they are big endian."""
    return int.from_bytes(cdb[offset : offset + size], "big")


def answer(data: bytes | bytearray, allocation: int) -> PacketResult:
    """``data``, but not more than the host has room for; none at all is no error."""
    return PacketResult(DATA_IN, bytes(data[:allocation])) if allocation else DONE
