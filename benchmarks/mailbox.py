"""The mailbox of an exit guest, read and written from outside through /proc/PID/mem: it works for every VMM alike.

The guest needs no device to be told what to do, so nothing but the measured accesses leaves it. Offsets are those of
guests/exits/exits.inc.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MAILBOX = 0x18_0000
SAMPLES = 0x20_0000
MAGIC = 0x316D_6D76_7970_2121
MEMORY_MIB = 64
MIB = 1 << 20

TURN, DONE, WARM_UP, EXPECTED, COUNTS = 0x08, 0x0C, 0x10, 0x2C, 0x80
PLAN = struct.Struct("<5I")  # warm-up, pairs of blocks, accesses in a short and a long one, singles
WORD = struct.Struct("<I")
QUAD = struct.Struct("<Q")

LOOK_S = 0.0002
# Where a VMM may put guest RAM in a mapping: at its start, or at the next address that huge pages like.
ALIGNMENT = 2 * MIB


class Hung(Exception):
    """The guest did not come to the end of what it was told."""


class Ended(Hung):
    """Its process is gone, or about to be: an end takes the memory first, and only later can it be waited for."""

    def __init__(self) -> None:
        super().__init__("its process has ended")


class Plan(NamedTuple):
    """What the guest does in a turn."""

    warm_up: int
    pairs: int
    short: int
    long: int
    singles: int

    @property
    def accesses(self) -> int:
        return self.warm_up + self.pairs * (self.short + self.long) + self.singles


class Ticks(NamedTuple):
    """What a turn gave, in TSC ticks."""

    short: list[int]
    long: list[int]
    singles: list[int]


def has_memory(pid: int) -> bool:
    """Whether it has not begun to end (proc_pid_statm(5): all zeros then)."""
    try:
        return Path(f"/proc/{pid}/statm").read_text().split()[0] != "0"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Memory:
    """Of another process. Ended, and OSError where the kernel does not allow it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            raise Ended from None
        except PermissionError:
            if not has_memory(pid):  # one that ends may be looked at by root only
                raise Ended from None
            raise

    def read(self, address: int, size: int) -> bytes:
        data = os.pread(self._fd, size, address)
        if len(data) < size:
            raise Ended
        return data

    def write(self, address: int, data: bytes) -> None:
        if os.pwrite(self._fd, data, address) < len(data):
            raise Ended

    def close(self) -> None:
        os.close(self._fd)

    def find_guest(self) -> int | None:
        """Where guest RAM begins: by the magic number that the guest has put into the mailbox."""
        for start, end in writable(self.pid):
            if end - start < MEMORY_MIB * MIB:
                continue
            for base in candidates(start, end - MEMORY_MIB * MIB):
                try:
                    if self.read(base + MAILBOX, QUAD.size) == QUAD.pack(MAGIC):
                        return base
                except OSError:
                    continue  # a hole in the mapping
        return None


def writable(pid: int) -> list[tuple[int, int]]:
    """Its private or shared mappings that can be written. Ended."""
    found = []
    try:
        with open(f"/proc/{pid}/maps") as file:
            lines = file.readlines()
    except (FileNotFoundError, ProcessLookupError):
        raise Ended from None
    for line in lines:
        where, access, *_ = line.split()
        if access.startswith("rw"):
            start, _, end = where.partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def candidates(start: int, last: int) -> list[int]:
    aligned = -(-start // ALIGNMENT) * ALIGNMENT
    return [start, *range(aligned, last + 1, ALIGNMENT)]


class Mailbox:
    """Of a guest whose RAM is at ``base`` in its process."""

    def __init__(self, memory: Memory, base: int) -> None:
        self.memory = memory
        self.base = base

    def word(self, offset: int) -> int:
        value: int = WORD.unpack(self.memory.read(self.base + MAILBOX + offset, WORD.size))[0]
        return value

    def put(self, offset: int, data: bytes) -> None:
        self.memory.write(self.base + MAILBOX + offset, data)

    @property
    def ready(self) -> bool:
        return self.memory.read(self.base + MAILBOX, QUAD.size) == QUAD.pack(MAGIC)

    def count_of_other(self, cpu: int) -> int:
        """Accesses that vCPU ``cpu`` (from 1) has made."""
        at = self.base + MAILBOX + COUNTS + QUAD.size * (cpu - 1)
        value: int = QUAD.unpack(self.memory.read(at, QUAD.size))[0]
        return value

    def turn(self, limit_s: float, alive: Callable[[], bool]) -> None:
        """Have the guest do what it was told. Hung where its end does not come within ``limit_s``, or the process is
        gone (``alive`` false). The memory of another process tells nobody that it has changed: it is looked at.
        """
        number = self.word(TURN) + 1
        self.put(TURN, WORD.pack(number))
        end = time.monotonic() + limit_s
        while self.word(DONE) != number:
            if not alive():
                raise Ended
            if time.monotonic() > end:
                raise Hung(f"no end of a turn within {limit_s:g} s")
            time.sleep(LOOK_S)

    def take(self, plan: Plan, limit_s: float, alive: Callable[[], bool] = lambda: True) -> Ticks:
        """One turn, as ``turn``."""
        self.put(WARM_UP, PLAN.pack(*plan))
        self.turn(limit_s, alive)
        count = 2 * plan.pairs + plan.singles
        ticks = struct.unpack(f"<{count}I", self.memory.read(self.base + SAMPLES, WORD.size * count))
        blocks = ticks[: 2 * plan.pairs]
        return Ticks(list(blocks[::2]), list(blocks[1::2]), list(ticks[2 * plan.pairs :]))
