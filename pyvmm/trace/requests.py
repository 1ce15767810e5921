"""Requests: the records of a trace put together to what a guest asked for, and the points on its way.

A virtio queue's chain goes from the doorbell over ``taken`` to ``shown``; a drive's request has ``submitted``, the
system call for it, and ``done``, within a chain's way or, for IDE, within an exit that is the doorbell. Which belong
together the threads say: what a thread submits is for the chain that it has begun, or the exit it is in; the interrupt
is the first that the thread raises on which the request was done.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import pairwise

from pyvmm.trace.events import drive_name, operation, queue_name, signed
from pyvmm.trace.format import BEGIN, CALL, DONE, EXIT, KICK, LINE, MOVE, PUSH, SHOW, SUBMIT, TAKE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import OrderedDict
    from collections.abc import Iterator

    from pyvmm.trace.format import Names, Record, Thread, TraceFile
else:
    from _collections import OrderedDict  # as ``light`` has deque

# What the time between two points is called. They follow one another without a gap, so where some are missing a stage
# is longer: what the page cache has, a drive does at once.
STAGES = {
    ("doorbell", "taken"): "notice",
    ("taken", "submitted"): "device",
    ("doorbell", "submitted"): "device",
    ("taken", "called"): "device",
    ("taken", "done"): "device",
    ("submitted", "called"): "queue",
    ("called", "returned"): "call",
    ("submitted", "done"): "at once",
    ("returned", "done"): "completion",
    ("done", "told"): "interrupt",
}
POINTS = ("doorbell", "taken", "submitted", "called", "returned", "done", "told")
# What is under way at once, of each sort and on all queues and drives; a file that claims more is none of ours.
MOST_PENDING = 1 << 16


class Request:
    """``points`` are TSC values by the names of POINTS. ``interrupted``: an interrupt was what told the guest."""

    __slots__ = (
        *("bytes", "calls", "device", "drive", "in_exit", "interrupted", "kind", "number", "owed", "points", "result"),
        *("pushed", "sector", "thread"),
    )

    def __init__(self, device: str, thread: Thread, number: int) -> None:
        self.device = device
        self.drive = ""
        self.thread = thread
        self.number = number
        self.kind = "chain"
        self.sector: int | None = None
        self.bytes = 0
        self.result = 0
        self.calls = 0
        self.points: dict[str, int] = {}
        self.interrupted = False
        self.in_exit = False  # the exit that asked for it is not over
        self.owed = False  # done, and an interrupt may follow
        self.pushed = False  # a chain whose queue has it back

    def mark(self, point: str, tsc: int) -> None:
        self.points[point] = tsc

    @property
    def begin(self) -> int:
        return min(self.points.values())

    @property
    def end(self) -> int:
        """The last point: when its guest was told, where that is known."""
        return max(self.points.values())

    def stages(self) -> list[tuple[str, int, int]]:
        """(name, TSC, TSC), between the points that are known."""
        known = [(point, self.points[point]) for point in POINTS if point in self.points]
        found = []
        for (earlier, before), (later, after) in pairwise(known):
            if after >= before:
                found.append((STAGES.get((earlier, later), f"{earlier} to {later}"), before, after))
        return found


class Requests:
    """``feed`` records in order; it gives those that are over with each. ``left`` are under way at the end."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._kicks: dict[int, int] = {}
        self._chains: dict[int, dict[int, Request]] = {}  # by queue, by number
        self._taken = 0  # chains in all of them
        self._pushed: dict[int, list[int]] = {}  # by queue: numbers, as a heap
        self._begun: dict[int, Request] = {}  # by ring: the chain that its thread works for
        self._asked: dict[tuple[int, int], tuple[Request, bool]] = {}  # by drive and number; whether for a chain
        self._uncalled = Uncalled()
        self._in_exit: dict[int, list[Request]] = {}  # by ring: what has no doorbell yet
        self._exiting = 0  # requests in all of them
        self._done: dict[int, Request] = {}  # by ring: over, but for its interrupt

    def feed(self, record: Record) -> list[Request]:
        work = WORK.get(record.kind)
        return [] if work is None else work(self, record)

    @property
    def left(self) -> int:
        return sum(map(len, self._chains.values())) + sum(not chain for _, chain in self._asked.values())

    # -- queues ------------------------------------------------------------------------------------------------

    def _kick(self, record: Record) -> list[Request]:
        self._kicks[record.source] = record.at
        return []

    def _take(self, record: Record) -> list[Request]:
        if self._taken >= MOST_PENDING:
            self._chains.clear()
            self._pushed.clear()
            self._taken = 0
        queue = self._chains.setdefault(record.source, {})
        if record.a in queue:
            self._taken -= len(queue)
            queue.clear()  # the queue has been reset
            self._pushed.pop(record.source, None)
        self._taken += 1
        request = queue[record.a] = Request(queue_name(self._names, record.source), record.thread, record.a)
        request.bytes = (record.b & 0xFFFF_FFFF) + (record.b >> 32)
        if record.source in self._kicks:
            request.mark("doorbell", self._kicks[record.source])
        request.mark("taken", record.at)
        return []

    def _begin(self, record: Record) -> list[Request]:
        request = self._chains.get(record.source, {}).get(record.a)
        if request is None:
            self._begun.pop(record.thread.ring, None)
        else:
            self._begun[record.thread.ring] = request
        return []

    def _move(self, record: Record) -> list[Request]:
        request = self._chains.get(record.source, {}).get(record.b & 0xFFFF_FFFF)
        if request is not None:
            self._what(request, record)
            request.mark("called", record.since)
            request.mark("returned", record.at)
            request.calls += 1
        return []

    def _what(self, request: Request, record: Record) -> None:
        request.kind = operation(record.a >> 48 & 0xFF)
        request.sector = record.a & (1 << 48) - 1
        request.bytes = record.b >> 32

    def _push(self, record: Record) -> list[Request]:
        request = self._chains.get(record.source, {}).get(record.a)
        if request is not None:
            if not request.pushed:
                heappush(self._pushed.setdefault(record.source, []), record.a)
            request.pushed = True
            request.mark("done", record.at)
        return []

    def _show(self, record: Record) -> list[Request]:
        """The oldest that were pushed, where not all are shown: that is a queue in order (virtio 1.2, 2.7.9)."""
        self._kicks.pop(record.source, None)  # what is taken from now on was not rung for: it was found
        pushed = self._pushed.get(record.source, [])
        queue = self._chains.get(record.source, {})
        over = [queue.pop(heappop(pushed)) for _ in range(min(record.a, len(pushed)))]
        self._taken -= len(over)
        for request in over:
            request.mark("told", record.at)
            request.interrupted = bool(record.b)
        return over

    # -- drives ------------------------------------------------------------------------------------------------

    def _submit(self, record: Record) -> list[Request]:
        ring = record.thread.ring
        name = drive_name(self._names, record.source)
        request = self._begun.get(ring)
        of_a_chain = request is not None
        if request is None:
            request = Request(name, record.thread, record.b & 0xFFFF_FFFF)
            if record.thread.is_vcpu and self._exiting < MOST_PENDING:
                request.in_exit = True
                self._in_exit.setdefault(ring, []).append(request)
                self._exiting += 1
        request.drive = name
        self._what(request, record)
        request.points.setdefault("submitted", record.at)
        if len(self._asked) >= MOST_PENDING:
            self._asked.clear()
            self._uncalled = Uncalled()
        number = record.b & 0xFFFF_FFFF
        self._uncalled.remove(record.source, number)
        self._asked[record.source, number] = request, of_a_chain
        self._uncalled.add(record.source, number, record.b >> 32)
        return []

    def _call(self, record: Record) -> list[Request]:
        drive, number = record.source, record.a & 0xFFFF_FFFF
        if (drive, number) in self._asked:
            self._uncalled.remove(drive, number)
        else:  # its coroutine was not asleep yet: the first that has none of that length
            number = self._uncalled.first(drive, None if signed(record.b) < 0 else record.b)
        known = self._asked.get((drive, number))
        if known is not None:
            request = known[0]
            request.points.setdefault("called", record.since)
            request.mark("returned", record.at)
            request.calls += 1
        return []

    def _finish(self, record: Record) -> list[Request]:
        number = record.a & 0xFFFF_FFFF
        request, of_a_chain = self._asked.pop((record.source, number), (None, False))
        self._uncalled.remove(record.source, number)
        if request is None:
            return []
        request.result = signed(record.b)
        request.mark("done", record.at)
        if of_a_chain:
            return []  # its chain goes on
        ring = record.thread.ring
        over = self._settle(ring)
        request.owed = True
        self._done[ring] = request
        return over

    def _settle(self, ring: int) -> list[Request]:
        """What waited on this thread for an interrupt has none."""
        request = self._done.pop(ring, None)
        if request is None:
            return []
        request.owed = False
        return [] if request.in_exit else [request]

    def _line(self, record: Record) -> list[Request]:
        ring = record.thread.ring
        if record.a and ring in self._done:
            request = self._done[ring]
            request.mark("told", record.at)
            request.interrupted = True
            return self._settle(ring)
        return []

    def _exit(self, record: Record) -> list[Request]:
        """An exit is recorded at its end: what was submitted in it has it for a doorbell."""
        ring = record.thread.ring
        self._begun.pop(ring, None)
        over = self._settle(ring)
        waiting = self._in_exit.pop(ring, [])
        self._exiting -= len(waiting)
        for request in waiting:
            request.in_exit = False
            if request.points["submitted"] >= record.since:
                request.mark("doorbell", record.since)
            if "done" in request.points and not request.owed:
                over.append(request)  # within the exit
        return over

    def finish(self) -> Iterator[Request]:
        """No record is left: those that only waited for an interrupt."""
        for request in self._done.values():
            request.in_exit = False
        for ring in list(self._done):
            yield from self._settle(ring)


class Uncalled:
    """What drives were asked for and no system call is known of, found by its length without a look at the others."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[int, int], int] = {}  # by drive and number
        self._numbers: dict[tuple[int, int | None], OrderedDict[int, None]] = {}  # by drive and length; None: any

    def add(self, drive: int, number: int, size: int) -> None:
        self._bytes[drive, number] = size
        for length in (size, None):
            self._numbers.setdefault((drive, length), OrderedDict())[number] = None

    def remove(self, drive: int, number: int) -> None:
        size = self._bytes.pop((drive, number), None)
        for length in () if size is None else (size, None):
            numbers = self._numbers[drive, length]
            del numbers[number]
            if not numbers:
                del self._numbers[drive, length]

    def first(self, drive: int, size: int | None) -> int:
        """The number of the oldest of that length, which is one of these no more; -1 where there is none."""
        numbers = self._numbers.get((drive, size))
        if numbers is None:
            return -1
        number = next(iter(numbers))
        self.remove(drive, number)
        return number


WORK = {
    KICK: Requests._kick,
    TAKE: Requests._take,
    BEGIN: Requests._begin,
    MOVE: Requests._move,
    PUSH: Requests._push,
    SHOW: Requests._show,
    SUBMIT: Requests._submit,
    CALL: Requests._call,
    DONE: Requests._finish,
    LINE: Requests._line,
    EXIT: Requests._exit,
}


def requests_of(trace: TraceFile) -> Iterator[Request]:
    """Those of a trace, as they end."""
    requests = Requests(trace.names)
    for record in trace.records():
        yield from requests.feed(record)
    yield from requests.finish()
