"""What a record says, in words: of exits, interrupts and the points on a request's way."""

from __future__ import annotations

from pyvmm.kvm.exits import exit_name
from pyvmm.trace.format import (
    BEGIN,
    CALL,
    DONE,
    EXIT,
    KICK,
    LINE,
    MOVE,
    MSI,
    PUSH,
    SHOW,
    SUBMIT,
    TAKE,
    VECTOR,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.trace.format import Names, Record, TraceFile

PAGE_BYTES = 4096
DIRECTIONS = ("in", "out", "")  # exit_stats.pyx has the same, in a layer above
# Of a drive's requests (block/backend.py), and what a lane moves (block/lane.pxd), which has the first two.
OPERATIONS = ("read", "write", "flush", "discard", "write-zeroes")

# The words of --kind.
KINDS = {
    "exit": (EXIT,),
    "queue": (KICK, TAKE, BEGIN, PUSH, SHOW),
    "drive": (MOVE, SUBMIT, CALL, DONE),
    "interrupt": (LINE, MSI, VECTOR),
}


class Exit:
    """``address`` is a port (IO), a guest-physical address (MMIO) or None; ``count`` the units of string I/O."""

    __slots__ = ("address", "count", "direction", "reason", "size", "value")

    def __init__(self, record: Record) -> None:
        a = record.a
        number = a >> 57
        self.reason = exit_name(number if number < 0x7F else 0xFF)
        self.direction = DIRECTIONS[min(a >> 55 & 3, 2)]
        self.size = (a >> 52 & 7) + 1
        self.count = 1
        self.address: int | None = None
        if self.reason == "IO":
            self.address, self.count = a & 0xFFFF, a >> 16 & 0xFFFF
        elif self.reason == "MMIO":
            self.address = a & (1 << 52) - 1
        self.value = record.b

    @property
    def row(self) -> tuple[str, int | None, str]:
        """The row of Machine.exit_stats that it is counted in."""
        address = self.address
        if address is not None and self.reason == "MMIO":
            address -= address % PAGE_BYTES
        return self.reason, address, self.direction

    def region(self, names: Names) -> str:
        """Who answers there: its name, or ""."""
        return "" if self.address is None else names.region(self.reason, self.address)

    def text(self, names: Names) -> str:
        if self.address is None:
            return self.reason
        times = f" x{self.count}" if self.count != 1 else ""
        where = self.region(names)
        words = f"{self.reason} {self.direction} {self.address:#x} {self.size}{times} {self.value:#x}"
        return words + (f" {where}" if where else "")


def operation(number: int) -> str:
    return OPERATIONS[number] if number < len(OPERATIONS) else f"kind {number}"


def signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def queue_name(names: Names, number: int) -> str:
    return names.queues.get(number, f"queue {number}")


def drive_name(names: Names, number: int) -> str:
    return names.drives.get(number, f"drive {number}")


def where(record: Record) -> str:
    """Of a read or a write: sector and bytes."""
    return f"{operation(record.a >> 48 & 0xFF)} sector {record.a & (1 << 48) - 1} {record.b >> 32} bytes"


def device_of(record: Record, names: Names) -> str:
    """Whom --device looks at: the queue, drive, region or interrupt's users that it is about."""
    kind = record.kind
    if kind == EXIT:
        return Exit(record).region(names)
    if kind in (SUBMIT, CALL, DONE):
        return drive_name(names, record.source)
    if kind == LINE:
        return names.gsis.get(record.source, "")
    return queue_name(names, record.source) if kind in QUEUES else ""


QUEUES = (KICK, TAKE, BEGIN, MOVE, PUSH, SHOW)


def text(record: Record, names: Names) -> str:
    """One record, without its time and thread."""
    kind, a, b = record.kind, record.a, record.b
    if kind == EXIT:
        return f"exit {Exit(record).text(names)}"
    if kind in QUEUES:
        name = queue_name(names, record.source)
        return {
            KICK: f"kick {name}",
            TAKE: f"take {name} #{a} reads {b & 0xFFFF_FFFF} writes {b >> 32}",
            BEGIN: f"begin {name} #{a}",
            MOVE: f"move {name} #{b & 0xFFFF_FFFF} {where(record)}",
            PUSH: f"push {name} #{a} {b} bytes",
            SHOW: f"show {name} {a} done" + (", interrupt" if b else ""),
        }[kind]
    if kind in (SUBMIT, CALL, DONE):
        name = drive_name(names, record.source)
        return {
            SUBMIT: f"submit {name} #{b & 0xFFFF_FFFF} {where(record)}",
            CALL: f"call {name} #{a} {signed(b)}",
            DONE: f"done {name} #{a} {signed(b)}",
        }[kind]
    if kind == LINE:
        users = names.gsis.get(record.source, "")
        return f"interrupt GSI {record.source} {'up' if a else 'down'}" + (f" {users}" if users else "")
    if kind == MSI:
        return f"interrupt MSI {a:#x} {b:#x}"
    if kind == VECTOR:
        return f"interrupt vector {a:#x} vCPU {record.source}"
    return f"kind {kind} {record.source} {a:#x} {b:#x}"


def line(trace: TraceFile, record: Record) -> str:
    """One record, as `pyvmm trace` prints it: seconds, thread, what, and how long that took."""
    took = f"  {trace.ticks_ns(record.ticks)} ns" if record.ticks else ""
    seconds = trace.ns(record.since) / 1e9
    return f"{seconds:13.6f}  {record.thread!s:<14}  {text(record, trace.names)}{took}"
