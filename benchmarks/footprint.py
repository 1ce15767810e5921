"""What a VMM holds beyond its guest's RAM: resident memory (RSS), that which is its alone (USS), and its part of what
it shares (PSS: a page that three processes have counts a third).

Linux Documentation/filesystems/proc.rst: /proc/PID/smaps_rollup for the whole, /proc/PID/smaps for guest RAM.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

KIB_PER_MIB = 1024
# What a VMM may have put into one mapping with guest RAM: guards, ROMs.
SLACK_KIB = 8 * KIB_PER_MIB


class Mapping(NamedTuple):
    start: int
    end: int
    writable: bool
    kib: dict[str, int]  # smaps' fields

    @property
    def size_kib(self) -> int:
        return (self.end - self.start) >> 10


class Footprint(NamedTuple):
    """MiB beyond guest RAM; ``guest_mib`` is what of that is resident."""

    rss_mib: float
    uss_mib: float
    pss_mib: float
    guest_mib: float


class NoGuestRam(Exception):
    """No mapping of the process looks like guest RAM."""


def mappings(text: str) -> list[Mapping]:
    """Of /proc/PID/smaps."""
    found: list[Mapping] = []
    for line in text.splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            start, end = (int(each, 16) for each in words[0].split("-"))
            found.append(Mapping(start, end, "w" in words[1], {}))
        elif len(words) == 3 and words[2] == "kB":
            found[-1].kib[words[0][:-1]] = int(words[1])
    return found


def guest_ram(found: list[Mapping], ram_mib: int) -> list[Mapping]:
    """The mappings of guest RAM: writable neighbours of that size together, or one a little larger."""
    ram_kib = ram_mib * KIB_PER_MIB
    for first in range(len(found)):
        run: list[Mapping] = []
        for mapping in found[first:]:
            if not mapping.writable or (run and run[-1].end != mapping.start):
                break
            run.append(mapping)
            if sum(each.size_kib for each in run) >= ram_kib:
                break
        if sum(each.size_kib for each in run) == ram_kib:
            return run
    for mapping in found:
        if mapping.writable and ram_kib <= mapping.size_kib <= ram_kib + SLACK_KIB:
            return [mapping]
    raise NoGuestRam(f"no mapping of {ram_mib} MiB")


def total(kib: dict[str, int], *names: str) -> float:
    return sum(kib.get(name, 0) for name in names) / KIB_PER_MIB


def beyond_guest(pid: int, ram_mib: int) -> Footprint:
    """Of a running process. NoGuestRam where its RAM is not found; OSError where it may not be looked at."""
    ram = guest_ram(mappings(Path(f"/proc/{pid}/smaps").read_text()), ram_mib)
    whole = mappings(Path(f"/proc/{pid}/smaps_rollup").read_text())[0].kib
    private = ("Private_Clean", "Private_Dirty", "Private_Hugetlb")
    guest_rss = sum(total(each.kib, "Rss") for each in ram)
    guest_uss = sum(total(each.kib, *private) for each in ram)
    guest_pss = sum(total(each.kib, "Pss") for each in ram)
    rss, uss, pss = total(whole, "Rss"), total(whole, *private), total(whole, "Pss")
    return Footprint(rss - guest_rss, uss - guest_uss, pss - guest_pss, guest_rss)


def mean(found: list[Footprint]) -> Footprint:
    """Of several processes, each figure for itself."""
    return Footprint(*(sum(values) / len(found) for values in zip(*found, strict=True)))
