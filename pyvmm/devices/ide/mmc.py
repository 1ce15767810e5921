"""What an MMC drive says of itself and of its disc: the data of its answers, as functions of a few numbers.

SFF-8020i (ATAPI CD-ROM), INF-8090 / MMC-3 (Mt. Fuji) and SPC-2. A disc here is one session with one track of
2048-byte blocks: a CD-ROM up to 80 minutes, above that a DVD-ROM.
"""

from __future__ import annotations

BLOCK_BYTES = 2048
FRAMES_PER_SECOND = 75
LEAD_IN_FRAMES = 2 * FRAMES_PER_SECOND  # logical block 0 is at 00:02:00
CD_BLOCKS = 80 * 60 * FRAMES_PER_SECOND
LAST_MSF = (0xFF, 59, 74)  # for what lies behind all that MSF can say

PROFILE_NONE = 0x0000
PROFILE_CD_ROM = 0x0008
PROFILE_DVD_ROM = 0x0010

TRACK = 1
LEAD_OUT = 0xAA
ADR_CONTROL = 0x14  # ADR 1 (the Q channel has the position), control 4 (data track, no copying)

DVD_LEAD_IN_BLOCKS = 0x30000  # physical sector of logical block 0
DVD_STRUCTURE_BYTES = 2048

SPEED_KBYTES_S = 706  # said to be 4 times a CD's
BUFFER_KIB = 512


def be16(value: int) -> bytes:
    return value.to_bytes(2, "big")


def be24(value: int) -> bytes:
    return min(value, 0xFFFFFF).to_bytes(3, "big")


def be32(value: int) -> bytes:
    return min(value, 0xFFFFFFFF).to_bytes(4, "big")


def is_dvd(blocks: int) -> bool:
    return blocks > CD_BLOCKS


def profile(blocks: int) -> int:
    """The MMC profile of a disc of so many blocks, of none for 0."""
    if not blocks:
        return PROFILE_NONE
    return PROFILE_DVD_ROM if is_dvd(blocks) else PROFILE_CD_ROM


def address(lba: int, msf: bool) -> bytes:
    """A block's address in the four bytes that the answers have for it."""
    if not msf:
        return be32(lba)
    seconds, frame = divmod(lba + LEAD_IN_FRAMES, FRAMES_PER_SECOND)
    minute, second = divmod(seconds, 60)
    return bytes((0, *((minute, second, frame) if minute <= 0xFF else LAST_MSF)))


# READ TOC/PMA/ATIP


def toc(blocks: int, msf: bool, start_track: int) -> bytes | None:
    """Format 0: the tracks from ``start_track`` on and the lead-out. None where there are no such tracks."""
    if start_track > TRACK and start_track != LEAD_OUT:
        return None
    entries = b""
    if start_track <= TRACK:
        entries += bytes((0, ADR_CONTROL, TRACK, 0)) + address(0, msf)
    entries += bytes((0, ADR_CONTROL, LEAD_OUT, 0)) + address(blocks, msf)
    return be16(len(entries) + 2) + bytes((TRACK, TRACK)) + entries


def session_info(msf: bool) -> bytes:
    """Format 1: where the last session begins."""
    return be16(10) + bytes((1, 1, 0, ADR_CONTROL, TRACK, 0)) + address(0, msf)


def raw_toc(blocks: int, session: int) -> bytes:
    """Format 2: the Q subcodes of the lead-in, of the sessions from ``session`` on. Their addresses are always MSF."""
    points = [
        (0xA0, bytes((0, TRACK, 0, 0))),  # first track, disc type CD-ROM
        (0xA1, bytes((0, TRACK, 0, 0))),  # last track
        (0xA2, address(blocks, True)),  # lead-out
        (TRACK, address(0, True)),
    ]
    entries = b""
    if session <= 1:
        for point, where in points:
            entries += bytes((1, ADR_CONTROL, 0, point, 0, 0, 0)) + where
    return be16(len(entries) + 2) + bytes((1, 1)) + entries


# READ SUB-CHANNEL

NO_AUDIO_STATUS = 0x15
SUB_POSITION = 1
SUB_CATALOGUE_NUMBER = 2
SUB_ISRC = 3


def sub_channel(form: int, msf: bool) -> bytes | None:
    """The sub-channel data of that format, behind the header; None where there is no such format."""
    if form == SUB_POSITION:
        return bytes((SUB_POSITION, ADR_CONTROL, TRACK, 1)) + address(0, msf) + bytes(4)
    if form == SUB_CATALOGUE_NUMBER:
        return bytes((SUB_CATALOGUE_NUMBER,)).ljust(20, b"\0")  # none recorded
    if form == SUB_ISRC:
        return bytes((SUB_ISRC, ADR_CONTROL, TRACK)).ljust(20, b"\0")
    return None


# READ DISC INFORMATION, READ TRACK INFORMATION


def disc_information() -> bytes:
    """A finished disc with one complete session."""
    data = bytearray(34)
    data[0:2] = be16(len(data) - 2)
    data[2] = 0x0E  # last session complete, disc complete
    data[3] = TRACK
    data[4] = 1  # sessions
    data[5] = TRACK  # first track of the last session
    data[6] = TRACK  # last track of the last session
    data[7] = 0x20  # for unrestricted use
    data[16:24] = b"\xff" * 8  # lead-in and lead-out of a session that could be added: none can
    return bytes(data)


def track_information(blocks: int) -> bytes:
    data = bytearray(36)
    data[0:2] = be16(len(data) - 2)
    data[2] = TRACK
    data[3] = 1  # session
    data[5] = 0x04  # track mode: data, recorded uninterrupted
    data[6] = 0x01  # data mode 1
    data[24:28] = be32(blocks)  # track size
    return bytes(data)


# READ DVD STRUCTURE

DVD_PHYSICAL = 0x00
DVD_COPYRIGHT = 0x01
DVD_MANUFACTURING = 0x04
DVD_LIST = 0xFF
DVD_FORMATS = {
    DVD_PHYSICAL: DVD_STRUCTURE_BYTES,
    DVD_COPYRIGHT: 4,
    DVD_MANUFACTURING: DVD_STRUCTURE_BYTES,
}


def dvd_structure(kind: int, blocks: int) -> bytes | None:
    """The structure ``kind`` with its header; None where this disc has none of that kind."""
    if kind == DVD_LIST:
        body = b"".join(bytes((form, 0x40)) + be16(4 + size) for form, size in DVD_FORMATS.items())  # readable
    elif kind == DVD_PHYSICAL:
        body = bytes((0x01, 0x0F, 0x01, 0x00))  # DVD-ROM; 120 mm, any rate; 1 layer, embossed; densities
        body += b"\0" + be24(DVD_LEAD_IN_BLOCKS) + b"\0" + be24(DVD_LEAD_IN_BLOCKS + blocks - 1) + bytes(4)
        body = body.ljust(DVD_STRUCTURE_BYTES, b"\0")
    elif kind in DVD_FORMATS:
        body = bytes(DVD_FORMATS[kind])  # not protected, no region; nothing said by the manufacturer
    else:
        return None
    return be16(len(body) + 2) + bytes(2) + body


# GET CONFIGURATION


def features(blocks: int) -> list[tuple[int, bool, bytes]]:
    """(number, whether current, the whole descriptor) of each feature, in ascending order."""
    now = profile(blocks)
    on_cd, on_dvd = now == PROFILE_CD_ROM, now == PROFILE_DVD_ROM
    profiles = b"".join(be16(number) + bytes((number == now, 0)) for number in (PROFILE_DVD_ROM, PROFILE_CD_ROM))
    rows = [
        # number, version, persistent, current, feature dependent data
        (0x0000, 0, True, True, profiles),
        (0x0001, 1, True, True, be32(2) + bytes(4)),  # core: ATAPI
        (0x0003, 0, True, True, bytes((0x29, 0, 0, 0))),  # removable medium: a tray, that ejects and locks
        (0x0010, 0, False, on_cd or on_dvd, be32(BLOCK_BYTES) + be16(1 if on_cd else 16) + bytes(2)),  # random reads
        (0x001E, 1, False, on_cd, bytes(4)),  # CD read
        (0x001F, 0, False, on_dvd, b""),  # DVD read
        (0x0105, 0, True, True, bytes(4)),  # a command may time out
    ]
    return [
        (number, current, be16(number) + bytes((version << 2 | persistent << 1 | current, len(data))) + data)
        for number, version, persistent, current, data in rows
    ]


def configuration(blocks: int, requested: int, start: int) -> bytes:
    """The features from number ``start`` on: all (``requested`` 0), the current ones (1), or that one (2)."""
    chosen = [
        descriptor
        for number, current, descriptor in features(blocks)
        if (number == start if requested == 2 else number >= start and (current or not requested))
    ]
    body = bytes(2) + be16(profile(blocks)) + b"".join(chosen)
    return be32(len(body)) + body


# GET EVENT STATUS NOTIFICATION

EVENT_CLASS_MEDIA = 4
EVENT_MEDIA_BIT = 1 << EVENT_CLASS_MEDIA
EVENT_NONE_AVAILABLE = 0x80

MEDIA_NO_CHANGE = 0
MEDIA_EJECT_REQUEST = 1
MEDIA_NEW = 2

MEDIA_TRAY_OPEN = 1
MEDIA_PRESENT = 2


def no_event() -> bytes:
    """The answer where none of the asked classes is one of ours."""
    return be16(0) + bytes((EVENT_NONE_AVAILABLE, EVENT_MEDIA_BIT))


def media_event(code: int, status: int) -> bytes:
    return be16(4) + bytes((EVENT_CLASS_MEDIA, EVENT_MEDIA_BIT, code, status, 0, 0))


# INQUIRY

VPD_LIST = 0x00
VPD_SERIAL = 0x80
VPD_IDENTIFICATION = 0x83

CD_DEVICE = 0x05  # peripheral device type
REMOVABLE = 0x80
ATAPI_FORMAT = 0x21  # ATAPI version 2, response data format 1 (SFF-8020i)


def ascii_field(text: str, size: int) -> bytes:
    return text.encode("ascii", "replace")[:size].ljust(size)


def inquiry(vendor: str, product: str, revision: str) -> bytes:
    head = bytes((CD_DEVICE, REMOVABLE, 0, ATAPI_FORMAT, 31, 0, 0, 0))
    return head + ascii_field(vendor, 8) + ascii_field(product, 16) + ascii_field(revision, 4)


def vital_product_data(page: int, vendor: str, product: str, serial: str) -> bytes | None:
    """One page of vital product data (SPC-2, 8.4); None where there is no such page."""
    if page == VPD_LIST:
        body = bytes((VPD_LIST, VPD_SERIAL, VPD_IDENTIFICATION))
    elif page == VPD_SERIAL:
        body = ascii_field(serial, len(serial))
    elif page == VPD_IDENTIFICATION:
        # Code set 2 is ASCII; type 0 whatever the vendor means by it, type 1 vendor and a name of its choice.
        named = ascii_field(vendor, 8) + ascii_field(product, 16) + ascii_field(serial, len(serial))
        body = b"".join(
            bytes((2, kind, 0, len(text))) + text for kind, text in ((0, ascii_field(serial, len(serial))), (1, named))
        )
    else:
        return None
    return bytes((CD_DEVICE, page)) + be16(len(body)) + body
