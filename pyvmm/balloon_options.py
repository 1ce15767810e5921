"""What a user may say about the memory balloon: the rows of BalloonOptions, and how they are written, ``--balloon``."""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.options import SWITCH, Options, disable_legacy, disable_modern, is_int, option, split_commas, whole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

UNITS_MIB = {"M": 1, "G": 1 << 10, "T": 1 << 20}


def size_mib(text: str) -> int:
    """512, 512M or 1G."""
    unit = UNITS_MIB.get(text[-1:].upper())
    return int(text, 10) if unit is None else int(text[:-1], 10) * unit


SIZE = whole(give="a number of MiB", from_text=size_mib, file="integer string")


class BalloonOptions(Options):
    """The balloon. An object does not change: ``changed`` makes another one.

    How much it takes comes first: ``BalloonOptions(512, free_page_reporting=True)``.
    """

    noun = "balloon option "
    thing = "the balloon"
    frozen = True

    mib: int = option(
        SIZE, 0, "how much of the guest's memory it takes at first: 512, 512M or 1G; 0 is a balloon that takes nothing"
        " until it is told to", metavar="SIZE")  # fmt: skip
    deflate_on_oom: bool = option(
        SWITCH, False, "the guest may take memory back by itself rather than end programs", words="deflate-on-oom")
    free_page_reporting: bool = option(
        SWITCH, False, "the guest tells at any time of memory that it does not use, and it goes back to the host",
        words="free-page-reporting")  # fmt: skip
    disable_legacy: str | None = disable_legacy()
    disable_modern: str | None = disable_modern()

    def __init__(self, mib: int = 0, **values: Any) -> None:
        super().__init__(mib=mib, **values)

    @classmethod
    def parse(cls, text: str) -> BalloonOptions:
        """From "512M,deflate-on-oom=on". ConfigError for what is wrong."""
        size, *rest = split_commas(text) or [""]
        try:
            mib = size_mib(size)
        except ValueError:
            raise ConfigError(f"balloon {size!r}: begin with a size, as 512M, or with 0") from None
        return cls(mib, **cls.from_words(rest))


def balloon_options(name: str, value: Any) -> BalloonOptions | None:
    """From a number of MiB, the words of --balloon, or BalloonOptions; None, or "none": there is no balloon."""
    if value is None or isinstance(value, BalloonOptions):
        return value
    if is_int(value):
        return BalloonOptions(value)
    if not isinstance(value, str):
        raise ConfigError(f"{name}={value!r}: give a number of MiB, '512M,deflate-on-oom=on' or BalloonOptions")
    return None if value == "none" else BalloonOptions.parse(value)


def check_balloon(balloon: BalloonOptions, memory_mib: int, huge_pages: str | None) -> None:
    """ConfigError where such memory can't have it."""
    if balloon.mib >= memory_mib:
        raise ConfigError(f"a balloon of {balloon.mib} MiB leaves nothing of {memory_mib} MiB of memory: take less")
    if huge_pages in ("2M", "1G"):
        raise ConfigError(
            f"a balloon with huge_pages={huge_pages!r}: pages that the host has set aside are not given back, use"
            " huge_pages='transparent', or leave the balloon out"
        )
