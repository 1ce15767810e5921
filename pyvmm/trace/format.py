"""The file of a trace: how it is laid out, and a reader that believes nothing of it.

All numbers are little endian. A header, then chunks, each with a head of its own:

    header  "PYVMMTRC", version, length of the header, kHz of the TSC (0: not known), then of one moment its TSC,
            CLOCK_MONOTONIC and CLOCK_REALTIME in ns
    chunk   "CHNK", kind, ring, bytes that follow, records that were dropped there since its last chunk, then of the
            moment of writing TSC and CLOCK_MONOTONIC
    kinds   1: records, 2: names (JSON), 3: the end (JSON), which a process that was killed has not written

A record is four words: a TSC value; ticks << 24 | source << 8 | kind; a; b. By kind:

    thread  1   a thread has this ring from here on: ticks is its number, a and b its name
    exit    2   of vCPU ``source``, from leaving KVM_RUN on. a: bits 57-63 reason, 55-56 direction (in, out, none),
                52-54 size - 1, 0-51 the address; of a port 0-15, and the count above. b: the value
    kick    3   queue ``source`` was rung, and its thread is there
    take    4   a chain was taken from it. a: its number; b: bytes to read, and above bytes to write
    begin   5   what this thread asks of a drive from here on is for chain a
    move    6   a read or write of a chain's, by one system call with its neighbours. a: sector, kind << 48; b: the
                chain's number (32 bits), bytes << 32
    push    7   chain a is done, b bytes were written
    show    8   a chains were shown to the driver; b: with an interrupt
    submit  9   drive ``source`` was asked. a: sector, kind << 48; b: the request's number (32 bits), bytes << 32
    call   10   a system call for request a (0: not known) came to b
    done   11   request a is done, with b: 0 or more, or a negative errno
    line   12   GSI ``source`` was driven to level a
    msi    13   an MSI was sent: address a, data b
    vector 14   our interrupt controller interrupted vCPU ``source`` with vector a
"""

from __future__ import annotations

import os
from bisect import bisect_right
from heapq import heappop, heappush
from itertools import count
from stat import S_ISREG
from struct import Struct

from pyvmm.errors import ConfigError, remedy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, BinaryIO

MAGIC = b"PYVMMTRC"
VERSION = 1
HEADER = Struct("<8sIIQQQQ16x")
CHUNK = Struct("<IHHIIQQ")
RECORD = Struct("<QQQQ")
CHUNK_MAGIC = 0x4B4E4843
RECORDS, NAMES, END = 1, 2, 3
LONGEST_CHUNK_BYTES = 64 << 20
LONGEST_NAMES_BYTES = 4 << 20  # as objects they take twenty times as much
# So many regions, with names so long, are in less than that.
MOST_REGIONS, LONGEST_NAME = 1 << 12, 160
# What waits for its turn in the order of time: all rings of a machine with two vCPUs, full.
MOST_WAITING = 1 << 20

(THREAD, EXIT, KICK, TAKE, BEGIN, MOVE, PUSH, SHOW, SUBMIT, CALL, DONE, LINE, MSI, VECTOR) = range(1, 15)
MOST_SOURCES = 1 << 16


def header_bytes(tsc_khz: int, tsc: int, monotonic_ns: int, wall_ns: int) -> bytes:
    return HEADER.pack(MAGIC, VERSION, HEADER.size, tsc_khz, tsc, monotonic_ns, wall_ns)


def chunk_bytes(kind: int, data: bytes, tsc: int, monotonic_ns: int) -> bytes:
    """One of the chunks that are no records."""
    return CHUNK.pack(CHUNK_MAGIC, kind, 0, len(data), 0, tsc, monotonic_ns) + data


def without_waiting(path: str, flags: int) -> int:
    """An opener: a FIFO that nobody writes to is open at once."""
    return os.open(path, flags | os.O_NONBLOCK)


class Names:
    """What the numbers in a trace stand for, as far as the file says so."""

    def __init__(self, plain: Any = None) -> None:
        plain = plain if isinstance(plain, dict) else {}
        self.cpus = plain["cpus"] if type(plain.get("cpus")) is int else 0
        self.queues = named(plain.get("queues"))
        self.drives = named(plain.get("drives"))
        self.gsis = named(plain.get("gsis"))
        self.regions: dict[str, list[tuple[int, int, str]]] = {"IO": [], "MMIO": []}
        rows = plain.get("regions")
        for row in rows if isinstance(rows, list) else ():
            if is_region(row):
                self.regions[row[0]].append((row[1], row[2], clean(row[3])))
        for space, given in self.regions.items():
            self.regions[space] = apart(given)

    def region(self, space: str, address: int, size: int = 1) -> str:
        """Whoever answers in that range; more than one name where they share it, "" where nobody does."""
        regions = self.regions[space]
        found: list[str] = []
        for at in range(max(0, bisect_right(regions, address, key=base_of) - 1), len(regions)):
            base, length, name = regions[at]
            if base >= address + size or len(found) == MOST_NAMED:
                break
            if address < base + length:
                found.append(name)
        return ", ".join(found)


MOST_NAMED = 16


def base_of(region: tuple[int, int, str]) -> int:
    return region[0]


def apart(regions: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """By address, without what overlaps one before it: no bus has such."""
    kept: list[tuple[int, int, str]] = []
    for base, size, name in sorted(regions, key=base_of):
        if not kept or base >= kept[-1][0] + kept[-1][1]:
            kept.append((base, size, name))
    return kept


def is_region(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 4 or row[0] not in ("IO", "MMIO") or not isinstance(row[3], str):
        return False
    return type(row[1]) is int and type(row[2]) is int and 0 <= row[1] < 1 << 64 and 0 < row[2] <= 1 << 64


def named(plain: Any) -> dict[int, str]:
    """{"0": "name"} with numbers for keys; what is nothing of that kind is left out."""
    if not isinstance(plain, dict):
        return {}
    return {int(n): clean(t) for n, t in plain.items() if n.isdecimal() and len(n) < 6 and isinstance(t, str)}


def clean(text: str) -> str:
    """For a terminal: nothing that moves a cursor."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])


class Record:
    """One record. ``at`` is the TSC when it was made, ``since`` when what it tells of began; ``ticks`` in between."""

    __slots__ = ("a", "at", "b", "kind", "since", "source", "thread", "ticks")

    def __init__(self, thread: Thread, since: int, what: int, a: int, b: int) -> None:
        self.thread = thread
        self.since = since
        self.kind = what & 0xFF
        self.source = what >> 8 & 0xFFFF
        self.ticks = what >> 24
        self.at = since + (0 if self.kind == THREAD else self.ticks)
        self.a = a
        self.b = b


class Thread:
    """Who recorded: ``number`` is the kernel's, or 0, ``name`` as top shows it."""

    __slots__ = ("name", "number", "ring")

    def __init__(self, ring: int, number: int = 0, name: str = "") -> None:
        self.ring = ring
        self.number = number
        self.name = name or f"ring {ring}"

    @property
    def is_vcpu(self) -> bool:
        return self.name.startswith("CPU ")

    def __str__(self) -> str:
        return f"{self.name} {self.number}" if self.number and not self.is_vcpu else self.name


class TraceFile:
    """The trace at ``path``. ConfigError where it can't be read, or is none. It may still be growing, and it may end
    anywhere: ``damage`` is a sentence then, or "", and all before that is there.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.names = Names()
        self.dropped = 0
        """Records that found no room, as far as the file says."""
        self.ended = False
        """Whether the trace was stopped, and not its process."""
        self.damage = ""
        self.tsc_khz = self.tsc = self.monotonic_ns = self.wall_ns = 0
        try:
            with open(path, "rb", opener=without_waiting) as file:
                if not S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise ConfigError(f"trace {path}: this is no regular file, give the FILE of a --trace")
                self._read_header(file)
                self._end = HEADER.size
                self._scan(file)
        except OSError as error:
            raise ConfigError(f"trace {path}: {remedy(error, 'give the FILE of a --trace')}") from None

    def _read_header(self, file: BinaryIO) -> None:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size or head[:8] != MAGIC:
            raise ConfigError(f"trace {self.path}: this is no trace of pyvmm's, give the FILE of a --trace")
        _, version, size, self.tsc_khz, self.tsc, self.monotonic_ns, self.wall_ns = HEADER.unpack(head)
        if version != VERSION or size != HEADER.size:
            raise ConfigError(f"trace {self.path}: it is of version {version}, and this pyvmm reads {VERSION}")

    def _scan(self, file: BinaryIO) -> None:
        """Look at every chunk's head: how far the file is good, what was dropped, names, how fast the TSC was."""
        last = (self.tsc, self.monotonic_ns)
        known_drops = 0
        for kind, _ring, data, dropped, pair in self._chunks(file, wanted=(NAMES, END)):
            self.dropped += dropped
            last = pair
            if kind == NAMES:
                self.names = Names(from_json(data))
            elif kind == END:
                self.ended = True
                plain = from_json(data)
                if isinstance(plain, dict) and type(plain.get("dropped")) is int:
                    known_drops = max(0, plain["dropped"])
            self._end = file.tell()
        self.dropped = max(self.dropped, known_drops)
        if not 0 < self.tsc_khz < 1 << 40:
            passed, passed_ns = last[0] - self.tsc, last[1] - self.monotonic_ns
            khz = passed * 1_000_000 // passed_ns if passed > 0 and passed_ns > 0 else 0
            self.tsc_khz = khz if 0 < khz < 1 << 40 else 1_000_000

    def _chunks(
        self, file: BinaryIO, wanted: tuple[int, ...], end: int | None = None
    ) -> Iterator[tuple[int, int, bytes, int, tuple[int, int]]]:
        """From where the file stands: kind, ring, data (of the kinds that are ``wanted``), dropped, (TSC, ns)."""
        size = os.fstat(file.fileno()).st_size if end is None else end
        while (at := file.tell()) < size:
            head = file.read(CHUNK.size)
            if len(head) < CHUNK.size:
                self.damage = f"it ends at byte {at}, and what comes after that is missing"
                return
            magic, kind, ring, length, dropped, tsc, monotonic_ns = CHUNK.unpack(head)
            most = LONGEST_NAMES_BYTES if kind in (NAMES, END) else LONGEST_CHUNK_BYTES
            wrong = magic != CHUNK_MAGIC or length > most or (kind == RECORDS and length % RECORD.size)
            if wrong or at + CHUNK.size + length > size:
                # Of records cut off, as by a full disk, those that are whole count.
                length = 0 if wrong or kind != RECORDS else (size - at - CHUNK.size) // RECORD.size * RECORD.size
                at += CHUNK.size + length if length else 0
                what = "is damaged" if wrong else "ends"
                self.damage = f"it {what} at byte {at}, and what comes after that is missing"
                if not length:
                    return
                size = at
            data = b""
            if kind in wanted:
                data = file.read(length)
                if len(data) < length:
                    return  # it has become shorter
            else:
                file.seek(length, os.SEEK_CUR)
            yield kind, ring, data, dropped, (tsc, monotonic_ns)

    def ns(self, tsc: int) -> int:
        """Since the beginning of the trace."""
        since: int = tsc - self.tsc
        return since * 1_000_000 // self.tsc_khz

    def ticks_ns(self, ticks: int) -> int:
        return (ticks * 1_000_000 + self.tsc_khz // 2) // self.tsc_khz

    def records(self) -> Iterator[Record]:
        """All of them in the order of time, but for the threads' own. OSError is a ConfigError here too."""
        try:
            with open(self.path, "rb") as file:
                file.seek(HEADER.size)
                yield from self._in_order(file)
        except OSError as error:
            raise ConfigError(f"trace {self.path}: {remedy(error, 'try again')}") from None

    def _in_order(self, file: BinaryIO) -> Iterator[Record]:
        """The rings are written one after the other, round by round. What was recorded before a round began is there at
        its end; what is younger waits for the next one.
        """
        threads: dict[int, Thread] = {}
        waiting: list[tuple[int, int, Record]] = []  # a heap: in no file does a round cost more than its records
        number = count()
        last_ring, began = -1, 0
        for kind, ring, data, _, (tsc, _) in self._chunks(file, (RECORDS,), self._end):
            if kind != RECORDS:
                continue
            if ring <= last_ring or last_ring < 0:
                while waiting and last_ring >= 0 and waiting[0][0] <= began:
                    yield heappop(waiting)[2]
                began = tsc
            last_ring = ring
            thread = threads.setdefault(ring, Thread(ring))
            for since, what, a, b in RECORD.iter_unpack(data):
                if what & 0xFF == THREAD:
                    name = (a.to_bytes(8, "little") + b.to_bytes(8, "little")).split(b"\0")[0]
                    thread = threads[ring] = Thread(ring, what >> 24, clean(name.decode("ascii", "replace")))
                    continue
                record = Record(thread, since, what, a, b)
                heappush(waiting, (record.at, next(number), record))
                if len(waiting) > MOST_WAITING:
                    yield heappop(waiting)[2]
        while waiting:
            yield heappop(waiting)[2]


def from_json(data: bytes) -> Any:
    """None where it is none."""
    import json

    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
