"""The cases of ``pyvmm bench net``, and how its guest is told: guests/net/virtio_net.S has the same offsets."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pyvmm_benchmarks import exit_guests
from pyvmm_benchmarks.mailbox import MAILBOX, Hung, Mailbox

MEMORY_MIB = 128
SOURCE = Path(__file__).resolve().parent / "guests" / "net" / "virtio_net.S"

PLAN_AT = 0x10
PLAN = struct.Struct("<5I")  # count, depth, size, total, flags
RESULT_AT = 0x40
RESULT = struct.Struct("<QQIII")  # ticks, bytes, buffers, kicks, interrupts
FRAME_AT = 0x100_0000
RECEIVE, BY_INTERRUPT, THERE_AND_BACK = 1, 2, 4

# struct virtio_net_hdr (OASIS virtio 1.2, 5.1.6): flags, gso_type, hdr_len, gso_size, csum_start, csum_offset and
# num_buffers
HEADER = struct.Struct("<BBHHHHH")
NEEDS_CSUM, GSO_TCPV4 = 1, 1
ETHERNET = struct.Struct(">6s6sH")
ELSEWHERE = bytes.fromhex("020000000099")  # whoever sees it lets it go
ETH_IP, ETH_ARP = 0x0800, 0x0806
SEGMENT_BYTES = 1448


class Answer(NamedTuple):
    """What a turn gave. ``sum``: the bytes that have come; None where the guest has sent only."""

    ticks: int
    sum: int | None
    buffers: int
    kicks: int
    interrupts: int


class NetCase(NamedTuple):
    """``frame_bytes`` with Ethernet's header; ``requests``: frames a turn; ``depth`` of them in flight, where they are
    sent. ``mark``: at most so many times QEMU's time.
    """

    name: str
    title: str
    frame_bytes: int
    flags: int
    requests: int
    depth: int = 64
    mark: float = 1.4
    # What exit_contender.py asks of a case.
    cpus: int = 1
    threads: bool = True

    @property
    def large(self) -> bool:
        """Whether it is one of those that are cut on their way (TSO)."""
        return self.frame_bytes > 1514

    def plan(self, count: int) -> bytes:
        total = count * (self.frame_bytes + HEADER.size)
        return PLAN.pack(count, self.depth, self.frame_bytes + HEADER.size, total, self.flags)

    def take(self, mailbox: Mailbox, count: int, limit_s: float, alive: Callable[[], bool]) -> Answer:
        """One turn. Hung where its end does not come within ``limit_s``, or the process is gone."""
        mailbox.put(PLAN_AT, self.plan(count))
        mailbox.turn(limit_s, alive)
        answer = Answer(*RESULT.unpack(mailbox.memory.read(mailbox.base + MAILBOX + RESULT_AT, RESULT.size)))
        if self.flags & RECEIVE and answer.sum != count * (self.frame_bytes + HEADER.size):
            raise Hung(f"{answer.sum} bytes came, with headers, of {count} frames of {self.frame_bytes} bytes")
        return answer if self.flags & (RECEIVE | THERE_AND_BACK) else answer._replace(sum=None)

    def frame(self, source: bytes, address: bytes) -> bytes:
        """What the guest sends, and what is sent to it: from that MAC; ``address``: the host's, which ARP asks for."""
        if self.flags & THERE_AND_BACK:
            ask = struct.pack(">HHBBH6s4s6s4s", 1, ETH_IP, 6, 4, 1, source, address[:3] + b"\2", bytes(6), address)
            return (ETHERNET.pack(b"\xff" * 6, source, ETH_ARP) + ask).ljust(self.frame_bytes, b"\0")
        head = ETHERNET.pack(ELSEWHERE, source, ETH_IP)
        size = self.frame_bytes - len(head)
        # RFC 791 and 793: TCP, from and to nobody.
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, size, 0, 0x4000, 64, 6, 0, b"\x0a\x63\0\1", b"\x0a\x63\0\2")
        tcp = struct.pack(">HHIIBBHHH", 9, 9, 0, 0, 0x50, 0x10, 0xFFFF, 0, 0)
        return (head + ip + tcp).ljust(self.frame_bytes, b"\x5a")

    @property
    def header(self) -> bytes:
        """Virtio's, in front of it."""
        if not self.large:
            return bytes(HEADER.size)
        return HEADER.pack(NEEDS_CSUM, GSO_TCPV4, 54, SEGMENT_BYTES, 34, 16, 0)


CASES = (
    NetCase("send_64k", "64 KiB segments out, polling", 64014, 0, 400),
    NetCase("send_64k_irq", "64 KiB segments out, by interrupt", 64014, BY_INTERRUPT, 400),
    NetCase("send_1514", "frames of 1514 bytes out, polling", 1514, 0, 2000),
    NetCase("send_1514_few", "frames of 1514 bytes out, 4 in flight, polling", 1514, 0, 2000, 4),
    NetCase("send_60", "frames of 60 bytes out, polling", 60, 0, 2000),
    NetCase("receive_64k", "64 KiB segments in, polling", 64014, RECEIVE, 200),
    NetCase("receive_1514", "frames of 1514 bytes in, polling", 1514, RECEIVE, 1000),
    NetCase("receive_1514_irq", "frames of 1514 bytes in, by interrupt", 1514, RECEIVE | BY_INTERRUPT, 1000),
    NetCase("receive_60", "frames of 60 bytes in, polling", 60, RECEIVE, 1000),
    NetCase("arp", "ARP there and back, polling", 60, THERE_AND_BACK, 200),
    NetCase("arp_irq", "ARP there and back, by interrupt", 60, THERE_AND_BACK | BY_INTERRUPT, 200),
)


def rom() -> bytes:
    """The guest, as firmware of 64 KiB."""
    return exit_guests.as_rom(exit_guests.assembled(SOURCE, exit_guests.LOAD))
