"""What a trace comes to: exits as Machine.exit_stats has them, requests and where their time went, interrupts."""

from __future__ import annotations

from pyvmm.trace.events import Exit
from pyvmm.trace.format import EXIT, LINE, MSI, VECTOR
from pyvmm.trace.requests import STAGES, Requests

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.trace.format import Record, TraceFile
    from pyvmm.trace.requests import Request

    Wanted = Callable[[Record], bool]
    ExitRow = tuple[str, int | None, str]

MOST_ROWS = 4096  # of each table; what comes beyond is summed up as OTHERS
OTHERS = "others"
STEPS = 64  # in a factor of two: a percentile is right within 1.6%


class Times:
    """Durations in ns: their count, sum and largest, and percentiles out of a histogram."""

    __slots__ = ("count", "largest", "steps", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0
        self.largest = 0
        self.steps: dict[int, int] = {}

    def add(self, ns: int) -> None:
        ns = max(0, ns)
        self.count += 1
        self.total += ns
        self.largest = max(self.largest, ns)
        shift = max(0, ns.bit_length() - STEPS.bit_length())
        step = shift * STEPS + (ns >> shift)
        self.steps[step] = self.steps.get(step, 0) + 1

    @property
    def mean(self) -> int:
        return self.total // self.count if self.count else 0

    def percentile(self, percent: float) -> int:
        """The upper end of its step, and no more than the largest."""
        wanted, seen = self.count * percent / 100, 0
        for step in sorted(self.steps):
            seen += self.steps[step]
            if seen >= wanted:
                shift = max(0, step // STEPS - 1)
                return min(self.largest, ((step - shift * STEPS) + 1 << shift) - 1)
        return self.largest


class Summary:
    """Of the records that ``wanted`` lets through; of requests those that one of theirs does.

    ``exits`` by (reason, port or page, direction); ``requests`` by (device, kind): whole times; ``stages`` by (device,
    kind, stage); ``sizes`` in bytes; ``interrupts`` by name: how often.
    """

    def __init__(self, trace: TraceFile, wanted: Wanted = lambda record: True) -> None:
        self.trace = trace
        self.exits: dict[tuple[str, int | None, str], Times] = {}
        self.requests: dict[tuple[str, str], Times] = {}
        self.stages: dict[tuple[str, str, str], Times] = {}
        self.sizes: dict[tuple[str, str], int] = {}
        self.interrupts: dict[str, int] = {}
        self.records = 0
        self.span_ns = 0
        requests = Requests(trace.names)
        for record in trace.records():
            if wanted(record):
                self._count(record)
            for request in requests.feed(record):
                self._add(request)
        for request in requests.finish():
            self._add(request)
        self.unfinished = requests.left

    def _count(self, record: Record) -> None:
        self.records += 1
        self.span_ns = max(self.span_ns, self.trace.ns(record.at))
        if record.kind == EXIT:
            row = Exit(record).row
            times_of(self.exits, row).add(self.trace.ticks_ns(record.ticks))
            return
        name = ""
        if record.kind == LINE and record.a:
            users = self.trace.names.gsis.get(record.source, "")
            name = f"GSI {record.source}" + (f" {users}" if users else "")
        elif record.kind == MSI:
            name = f"MSI {record.a:#x} {record.b:#x}"
        elif record.kind == VECTOR:
            name = f"vector {record.a:#x}"
        if name:
            name = name if name in self.interrupts or len(self.interrupts) < MOST_ROWS else OTHERS
            self.interrupts[name] = self.interrupts.get(name, 0) + 1

    def _add(self, request: Request) -> None:
        key = request.device, request.kind
        if key not in self.requests and len(self.requests) >= MOST_ROWS:
            key = OTHERS, ""
        self.requests.setdefault(key, Times()).add(self.trace.ticks_ns(request.end - request.begin))
        self.sizes[key] = self.sizes.get(key, 0) + request.bytes
        for stage, begin, end in request.stages():
            self.stages.setdefault((*key, stage), Times()).add(self.trace.ticks_ns(end - begin))

    def text(self) -> str:
        lines = [f"{self.records} records in {self.span_ns / 1e9:.3f} s, {self.trace.dropped} dropped"]
        if self.trace.damage:
            lines.append(self.trace.damage)
        lines += ["", *self._exit_lines()] if self.exits else []
        lines += ["", *self._request_lines()] if self.requests else []
        if self.interrupts:
            lines += ["", "interrupts"]
            lines += [f"{count:>10}  {name}" for name, count in sorted(self.interrupts.items(), key=lambda i: -i[1])]
        return "\n".join(lines) + "\n"

    def _exit_lines(self) -> list[str]:
        lines = [f"{'exit':<14} {'address':>12} {'':3} {HEADS} {'total ms':>9}  region"]
        for row, times in sorted(self.exits.items(), key=lambda item: -item[1].total):
            reason, address, direction = row
            size = 4096 if reason == "MMIO" else 1
            region = "" if address is None else self.trace.names.region(reason, address, size) or "(nobody)"
            where = "" if address is None else f"{address:#x}"
            cells = f"{reason:<14} {where:>12} {direction:3} {numbers(times)} {times.total / 1e6:>9.2f}  {region}"
            lines.append(cells.rstrip())
        count, total = sum(t.count for t in self.exits.values()), sum(t.total for t in self.exits.values())
        return [*lines, f"{count} exits, {total / 1e6:.1f} ms in user space"]

    def _request_lines(self) -> list[str]:
        lines = [f"{'requests: ns':<31} {HEADS} {'MiB':>9}"]
        for key, times in sorted(self.requests.items(), key=lambda item: -item[1].total):
            lines.append(f"{' '.join(key):<31} {numbers(times)} {self.sizes[key] / (1 << 20):>9.2f}")
            for stage in dict.fromkeys(STAGES.values()):
                if (found := self.stages.get((*key, stage))) is not None:
                    lines.append(f"  {stage:<29} {numbers(found)}")
        if self.unfinished:
            lines.append(f"{self.unfinished} under way at the end")
        return lines


def times_of(table: dict[ExitRow, Times], row: ExitRow) -> Times:
    """The row's, which is made where there is room for one, or that of all others."""
    if row not in table and len(table) >= MOST_ROWS:
        row = OTHERS, None, ""
    return table.setdefault(row, Times())


HEADS = f"{'count':>9} {'mean':>9} {'p50':>9} {'p90':>9} {'p99':>9} {'max':>10}"


def numbers(times: Times) -> str:
    percents = " ".join(f"{times.percentile(percent):>9}" for percent in (50, 90, 99))
    return f"{times.count:>9} {times.mean:>9} {percents} {times.largest:>10}"
