"""The mode pages of a CD/DVD-ROM drive: what MODE SENSE shows and MODE SELECT may change.

SPC-2, 8.3 (headers, page control), SFF-8020i and MMC-3 (the pages). Nothing in them changes how this drive reads: a
host finds again what it wrote, and that is all.
"""

from __future__ import annotations

from pyvmm.devices.ide import mmc
from pyvmm.devices.ide.mmc import be16

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ERROR_RECOVERY = 0x01
CD_PARAMETERS = 0x0D
AUDIO_CONTROL = 0x0E
CAPABILITIES = 0x2A
ALL_PAGES = 0x3F

# Page control
CURRENT = 0
CHANGEABLE = 1
DEFAULT = 2

MEDIUM_CD_DATA = 0x01  # medium type codes of SFF-8020i; later standards have the byte reserved
MEDIUM_OTHER = 0x00
MEDIUM_NO_DISC = 0x70
MEDIUM_DOOR_OPEN = 0x71

BLOCK_DESCRIPTOR_BYTES = 8
SHORT_HEADER_BYTES = 4  # of the 6-byte commands
LONG_HEADER_BYTES = 8
MOST_SHORT_BYTES = 256  # a one-byte length field counts those after itself

# Each page whole, with its number and length, and which of its bits a host may write.
DEFAULTS = {
    ERROR_RECOVERY: bytes((ERROR_RECOVERY, 6, 0, 5, 0, 0, 0, 0)),  # 5 retries
    CD_PARAMETERS: bytes((CD_PARAMETERS, 6, 0, 0, 0, 60, 0, 75)),  # seconds a minute, frames a second
    # Ports 0 and 1 play the left and right channel at full volume, ports 2 and 3 nothing.
    AUDIO_CONTROL: bytes((AUDIO_CONTROL, 14, 4, 0, 0, 0, 0, 75, 1, 0xFF, 2, 0xFF, 0, 0, 0, 0)),
}
MASKS = {
    ERROR_RECOVERY: bytes((0, 0, 0xFF, 0xFF, 0, 0, 0, 0)),
    CD_PARAMETERS: bytes((0, 0, 0, 0x0F, 0, 0, 0, 0)),  # the inactivity timer
    AUDIO_CONTROL: bytes((0, 0, 0x02, 0, 0, 0, 0, 0, 0x0F, 0xFF, 0x0F, 0xFF, 0x0F, 0xFF, 0x0F, 0xFF)),
}
NUMBERS = (*DEFAULTS, CAPABILITIES)  # in ascending order

# The capabilities page
READS = 0x3F  # CD-R, CD-RW, fixed packets, DVD-ROM, DVD-R, DVD-RAM
FORMS = 0x70  # mode 2 form 1, mode 2 form 2, multi-session
LOADING_TRAY = 1 << 5
CAN_EJECT = 1 << 3
IS_LOCKED = 1 << 1
CAN_LOCK = 1 << 0
VOLUME_LEVELS = 256


def capabilities(locked: bool) -> bytes:
    mechanism = LOADING_TRAY | CAN_EJECT | CAN_LOCK | (IS_LOCKED if locked else 0)
    body = bytes((READS, 0, FORMS, 0, mechanism, 0))
    body += be16(mmc.SPEED_KBYTES_S) + be16(VOLUME_LEVELS) + be16(mmc.BUFFER_KIB) + be16(mmc.SPEED_KBYTES_S)
    return bytes((CAPABILITIES, 18)) + body.ljust(18, b"\0")


def medium_type(blocks: int, tray_open: bool) -> int:
    if tray_open:
        return MEDIUM_DOOR_OPEN
    if not blocks:
        return MEDIUM_NO_DISC
    return MEDIUM_OTHER if mmc.is_dvd(blocks) else MEDIUM_CD_DATA


class ModePages:
    """The pages of one drive, as its host has set them."""

    __slots__ = ("_current",)

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._current = dict(DEFAULTS)

    def _page(self, number: int, control: int, locked: bool) -> bytes:
        if number == CAPABILITIES:
            page = capabilities(locked)
            return page[:2].ljust(len(page), b"\0") if control == CHANGEABLE else page
        if control == CHANGEABLE:
            return DEFAULTS[number][:2] + MASKS[number][2:]
        return (DEFAULTS if control == DEFAULT else self._current)[number]

    def sense(self, number: int, control: int, medium: int, locked: bool, *, long: bool) -> bytes | None:
        """MODE SENSE (10 where ``long``, else 6) of a page or of all. None: no such page, or no room in the answer.

        ``control`` is CURRENT, CHANGEABLE or DEFAULT. There is no block descriptor: MMC has none.
        """
        if number != ALL_PAGES and number not in NUMBERS:
            return None
        numbers = NUMBERS if number == ALL_PAGES else (number,)
        body = b"".join(self._page(one, control, locked) for one in numbers)
        if long:
            return be16(LONG_HEADER_BYTES - 2 + len(body)) + bytes((medium, 0, 0, 0, 0, 0)) + body
        if SHORT_HEADER_BYTES + len(body) > MOST_SHORT_BYTES:
            return None
        return bytes((SHORT_HEADER_BYTES - 1 + len(body), medium, 0, 0)) + body

    def select(self, data: bytes, *, long: bool) -> str:
        """MODE SELECT with this parameter list: "" where all of it was taken over, else nothing of it was, and
        "length" where a part is cut off, "field" where a value is none that can be set."""
        header_bytes = LONG_HEADER_BYTES if long else SHORT_HEADER_BYTES
        if len(data) < header_bytes:
            return "length"
        descriptor_bytes = int.from_bytes(data[6:8], "big") if long else data[3]
        if descriptor_bytes not in (0, BLOCK_DESCRIPTOR_BYTES):
            return "field"
        position = header_bytes + descriptor_bytes
        if len(data) < position:
            return "length"
        if descriptor_bytes and int.from_bytes(data[position - 3 : position], "big") not in (0, mmc.BLOCK_BYTES):
            return "field"
        wanted = dict(self._current)
        while position < len(data):
            head = data[position : position + 2]
            if len(head) < 2 or position + 2 + head[1] > len(data):
                return "length"
            page = data[position : position + 2 + head[1]]
            number = page[0] & 0x7F  # the top bit, PS, means nothing in this direction
            if number not in DEFAULTS or len(page) != len(DEFAULTS[number]):
                return "field"
            fixed = zip(page[2:], wanted[number][2:], MASKS[number][2:], strict=True)
            if any((new ^ old) & ~mask & 0xFF for new, old, mask in fixed):
                return "field"
            wanted[number] = bytes((number,)) + page[1:]
            position += len(page)
        self._current = wanted
        return ""

    STATE = {"_current": ("each", {number: ("bytes", len(page)) for number, page in DEFAULTS.items()})}

    def save(self) -> dict[str, Any]:
        from pyvmm.state import save_fields

        return save_fields(self, self.STATE)

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import load_fields

        load_fields(self, self.STATE, state)
