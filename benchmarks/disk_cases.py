"""The cases of ``pyvmm bench disk``, and how its guest is told: guests/disk/virtio_blk.S has the same offsets."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pyvmm_benchmarks import exit_guests
from pyvmm_benchmarks.mailbox import MAILBOX, Hung, Mailbox

MEMORY_MIB = 128
IMAGE_MIB = 256
SECTOR_BYTES = 512
SOURCE = Path(__file__).resolve().parent / "guests" / "disk" / "virtio_blk.S"

PLAN_AT = 0x10
PLAN = struct.Struct("<5I")  # count, depth, sectors, mask, flags
RESULT_AT = 0x40
RESULT = struct.Struct("<QQIII")  # ticks, sum, errors, kicks, interrupts
RANDOM, BY_INTERRUPT, WRITE = 1, 2, 4


class Answer(NamedTuple):
    """What a turn gave. ``sum``: of the first eight bytes of all buffers, where they were read."""

    ticks: int
    sum: int | None
    errors: int
    kicks: int
    interrupts: int


class DiskCase(NamedTuple):
    """``mark``: at most so many times QEMU's time; ``size_bytes`` a request, ``requests`` a turn."""

    name: str
    title: str
    size_bytes: int
    depth: int
    flags: int
    requests: int
    mark: float
    # What exit_contender.py asks of a case.
    cpus: int = 1
    threads: bool = True

    def plan(self, count: int) -> bytes:
        places = IMAGE_MIB * (1 << 20) // self.size_bytes
        return PLAN.pack(count, self.depth, self.size_bytes // SECTOR_BYTES, places - 1, self.flags)

    def take(self, mailbox: Mailbox, count: int, limit_s: float, alive: Callable[[], bool]) -> Answer:
        """One turn. Hung where its end does not come within ``limit_s``, or the process is gone."""
        mailbox.put(PLAN_AT, self.plan(count))
        mailbox.turn(limit_s, alive)
        answer = Answer(*RESULT.unpack(mailbox.memory.read(mailbox.base + MAILBOX + RESULT_AT, RESULT.size)))
        if answer.errors:
            raise Hung(f"{answer.errors} of {count} requests failed")
        return answer._replace(sum=None) if self.flags & WRITE else answer


CASES = (
    DiskCase("read_4k_qd32", "4 KiB reads at random, 32 in flight, polling", 4096, 32, RANDOM, 2000, 1.0),
    DiskCase(
        "read_4k_qd32_irq", "4 KiB reads at random, 32 in flight, by interrupt", 4096, 32, RANDOM | BY_INTERRUPT, 2000,
        1.0),
    DiskCase("read_4k_qd1", "4 KiB reads at random, one in flight, polling", 4096, 1, RANDOM, 200, 1.1),
    DiskCase(
        "read_4k_qd1_irq", "4 KiB reads at random, one in flight, by interrupt", 4096, 1, RANDOM | BY_INTERRUPT, 200,
        1.1),
    DiskCase("read_1m", "1 MiB reads in order, 4 in flight, polling", 1 << 20, 4, 0, 50, 1.0),
    DiskCase("read_1m_irq", "1 MiB reads in order, 4 in flight, by interrupt", 1 << 20, 4, BY_INTERRUPT, 50, 1.0),
    DiskCase("read_4k_seq_qd32", "4 KiB reads in order, 32 in flight, polling", 4096, 32, 0, 2000, 1.0),
    DiskCase("write_4k_qd32", "4 KiB writes at random, 32 in flight, polling", 4096, 32, RANDOM | WRITE, 2000, 1.0),
)  # fmt: skip


def rom() -> bytes:
    """The guest, as firmware of 64 KiB."""
    return exit_guests.as_rom(exit_guests.assembled(SOURCE, exit_guests.LOAD))
