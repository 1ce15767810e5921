"""What firmware is told about booting, in the words of QEMU's -boot: "dc", or "order=dc,once=d,menu=on"."""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.x86.firmware_files import BOOT_KINDS, DEFAULT_ORDER

WORDS = ("order", "once", "menu", "splash-time", "reboot-timeout", "strict")
ON_OFF = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
MAX_MS = 0xFFFF
MAX_KINDS = 3  # as many have a place in CMOS
NEVER = -1


class BootOptions:
    """``order``: letters, what is tried in turn. ``once``: the same for the first boot only, None for none. ``menu``:
    firmware offers its boot menu, for ``splash_time_ms`` (None: as long as it likes). ``reboot_timeout_ms``: after this
    time it tries again where nothing boots, None: never. ``strict``: it tries nothing that ``order`` does not name.
    """

    __slots__ = ("menu", "once", "order", "reboot_timeout_ms", "splash_time_ms", "strict")

    def __init__(self, text: str = DEFAULT_ORDER) -> None:
        """From the words; a word that comes again takes the place of the one before. ConfigError for what is wrong."""
        self.order = DEFAULT_ORDER
        self.once: str | None = None
        self.menu = False
        self.splash_time_ms: int | None = None
        self.reboot_timeout_ms: int | None = None
        self.strict = False
        if not isinstance(text, str):
            raise ConfigError(f"boot={text!r}: give a string, such as 'dc' or 'once=d,menu=on'")
        for item in text.split(",") if text else ("",):
            word, equals, value = item.partition("=")
            if equals:
                self._take(word, value)
            else:
                self.order = letters("order", item)

    def _take(self, word: str, value: str) -> None:
        if word == "order":
            self.order = letters(word, value)
        elif word == "once":
            self.once = letters(word, value)
        elif word == "menu":
            self.menu = on_off(word, value)
        elif word == "strict":
            self.strict = on_off(word, value)
        elif word == "splash-time":
            self.splash_time_ms = milliseconds(word, value, 0)
        elif word == "reboot-timeout":
            ms = milliseconds(word, value, NEVER)
            self.reboot_timeout_ms = None if ms == NEVER else ms
        else:
            raise ConfigError(f"boot has no word {word!r}: use {', '.join(WORDS)}")


def letters(word: str, text: str) -> str:
    """``text``, where it is an order. ConfigError for another letter, one given twice, or too many."""
    if set(text) <= set(BOOT_KINDS) and len(set(text)) == len(text) and len(text) <= MAX_KINDS:
        return text
    raise ConfigError(
        f"boot {word}={text!r}: use up to {MAX_KINDS} different letters of c (disk), d (CD-ROM), n (kernel, network)"
        " and a, b (floppy)"
    )


def on_off(word: str, text: str) -> bool:
    if text not in ON_OFF:
        raise ConfigError(f"boot {word}={text}: use on or off")
    return ON_OFF[text]


def milliseconds(word: str, text: str, least: int) -> int:
    try:
        ms = int(text, 10)
    except ValueError:
        ms = least - 1
    if not least <= ms <= MAX_MS:
        never = ", or -1 for never" if least == NEVER else ""
        raise ConfigError(f"boot {word}={text}: give milliseconds from 0 to {MAX_MS}{never}")
    return ms
