"""A trace for Perfetto (ui.perfetto.dev, trace_processor): its own form, or the older one of Chrome's.

Exits are slices on the track of their vCPU's thread; interrupts, and what a queue hears, are instants; a request is a
track of its own, with a slice for each stage of its way. Times are ns since the trace began.

Perfetto's form is protobuf, protos/perfetto/trace/trace_packet.proto and track_event/*.proto; field numbers are cited
where they stand. Chrome's is its Trace Event Format: "X" with a duration, "i", nestable "b" and "e".
"""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError, remedy
from pyvmm.trace.events import Exit, text
from pyvmm.trace.format import EXIT, KICK, LINE, MSI, VECTOR
from pyvmm.trace.requests import Request, Requests

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, BinaryIO

    from pyvmm.trace.format import Record, Thread, TraceFile
    from pyvmm.trace.summary import Wanted

INSTANTS = (KICK, LINE, MSI, VECTOR)
PROCESS = 1
PROCESS_NAME = "pyvmm"
FIRST_THREAD = 1 << 20  # above a process's and requests' numbers


def export(trace: TraceFile, path: str, wanted: Wanted) -> None:
    """Write it to ``path``: Chrome's form where that ends in .json, else Perfetto's. ConfigError."""
    try:
        if os.path.exists(path) and os.path.samefile(path, trace.path):
            raise ConfigError(f"--export {path}: that is the trace itself: give another file")
        with open(path, "wb") as file:
            (write_json if path.endswith(".json") else write_perfetto)(trace, file, wanted)
    except OSError as error:
        raise ConfigError(f"--export {path}: {remedy(error, 'write elsewhere')}") from None


def items(trace: TraceFile, wanted: Wanted) -> Iterator[Record | Request]:
    """Records that are shown, and requests as they end."""
    requests = Requests(trace.names)
    for record in trace.records():
        if wanted(record) and (record.kind == EXIT or record.kind in INSTANTS):
            yield record
        if wanted is everything or wanted(record):
            yield from requests.feed(record)
    yield from requests.finish()


def everything(record: Record) -> bool:
    return True


def exit_words(trace: TraceFile, record: Record) -> tuple[str, dict[str, Any]]:
    """A slice's name, which is its row in exit_stats and who answers; and its arguments."""
    found = Exit(record)
    reason, address, direction = found.row
    region = found.region(trace.names)
    words = [reason, direction, "" if address is None else f"{address:#x}", region]
    arguments: dict[str, Any] = {"vcpu": record.source}
    if found.address is not None:
        arguments |= {"address": found.address, "size": found.size, "value": found.value, "count": found.count}
    return " ".join(word for word in words if word), arguments


def request_words(request: Request) -> tuple[str, dict[str, Any]]:
    arguments: dict[str, Any] = {"number": request.number, "bytes": request.bytes, "result": request.result}
    if request.sector is not None:
        arguments["sector"] = request.sector
    return f"{request.device} {request.kind}", arguments


# -- Chrome's ---------------------------------------------------------------------------------------------------------


def write_json(trace: TraceFile, file: BinaryIO, wanted: Wanted) -> None:
    """{"traceEvents": [...]}, times in microseconds."""
    import json

    pen = json.JSONEncoder(separators=(",", ":"))
    file.write(b'{"displayTimeUnit":"ns","traceEvents":[\n')
    first = True
    for event in json_events(trace, wanted):
        file.write((b"" if first else b",\n") + pen.encode(event).encode())
        first = False
    file.write(b"\n]}\n")


def json_events(trace: TraceFile, wanted: Wanted) -> Iterator[dict[str, Any]]:
    threads: dict[Thread, int] = {}
    yield {"ph": "M", "name": "process_name", "pid": PROCESS, "args": {"name": PROCESS_NAME}}
    for number, item in enumerate(items(trace, wanted)):
        if isinstance(item, Request):
            yield from json_request(trace, item, number)
            continue
        tid = threads.get(item.thread)
        if tid is None:
            tid = threads[item.thread] = thread_number(item.thread, len(threads))
            named = {"name": str(item.thread)}
            yield {"ph": "M", "name": "thread_name", "pid": PROCESS, "tid": tid, "args": named}
        event: dict[str, Any] = {"pid": PROCESS, "tid": tid, "ts": trace.ns(item.since) / 1000}
        if item.kind == EXIT:
            name, arguments = exit_words(trace, item)
            duration = {"ph": "X", "dur": trace.ticks_ns(item.ticks) / 1000}
            yield event | duration | {"name": name, "cat": "exit", "args": arguments}
        else:
            yield event | {"ph": "i", "s": "t", "cat": "interrupt", "name": text(item, trace.names)}


def json_request(trace: TraceFile, request: Request, number: int) -> Iterator[dict[str, Any]]:
    name, arguments = request_words(request)
    common = {"cat": "request", "id": number, "pid": PROCESS, "tid": PROCESS}

    def at(tsc: int) -> float:
        return trace.ns(tsc) / 1000

    yield common | {"ph": "b", "name": name, "ts": at(request.begin), "args": arguments}
    for stage, begin, end in request.stages():
        yield common | {"ph": "b", "name": stage, "ts": at(begin)}
        yield common | {"ph": "e", "name": stage, "ts": at(end)}
    yield common | {"ph": "e", "name": name, "ts": at(request.end)}


def thread_number(thread: Thread, order: int) -> int:
    return thread.number or FIRST_THREAD + order


# -- Perfetto's -------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: int | str | bytes) -> bytes:
    """A field of a message: a varint, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def message(*fields: tuple[int, int | str | bytes]) -> bytes:
    return b"".join(field(number, value) for number, value in fields)


# TracePacket.sequence_flags: SEQ_INCREMENTAL_STATE_CLEARED; TrackEvent.type
CLEARED = 1
SLICE_BEGIN, SLICE_END, INSTANT = 1, 2, 3


def packet(*fields: tuple[int, int | str | bytes]) -> bytes:
    """Of Trace.packet (1); trusted_packet_sequence_id (10)."""
    return field(1, message(*fields, (10, 1)))


def arguments_of(arguments: dict[str, Any]) -> Iterable[tuple[int, bytes]]:
    """TrackEvent.debug_annotations (4): DebugAnnotation.name (10), uint_value (3), int_value (4)."""
    for name, value in arguments.items():
        yield 4, message((10, name), (3, value) if value >= 0 else (4, value))


def event(
    ns: int, kind: int, track: int, name: str = "", category: str = "", arguments: dict[str, Any] | None = None
) -> bytes:
    """TracePacket.timestamp (8), track_event (11): type (9), track_uuid (11), name (23), categories (22)."""
    fields: list[tuple[int, int | str | bytes]] = [(9, kind), (11, track)]
    if name:
        fields += [(23, name), (22, category)]
    fields += arguments_of(arguments or {})
    return packet((8, ns), (11, message(*fields)))


def track(uuid: int, *fields: tuple[int, int | str | bytes]) -> bytes:
    """TracePacket.track_descriptor (60): uuid (1)."""
    return packet((60, message((1, uuid), *fields)))


def write_perfetto(trace: TraceFile, file: BinaryIO, wanted: Wanted) -> None:
    process = message((1, PROCESS), (6, PROCESS_NAME))  # ProcessDescriptor: pid, process_name
    file.write(packet((13, CLEARED), (87, 1)))  # sequence_flags; first_packet_on_sequence
    file.write(track(PROCESS, (3, process)))
    threads: dict[Thread, int] = {}
    for number, item in enumerate(items(trace, wanted)):
        if isinstance(item, Request):
            file.write(perfetto_request(trace, item, (1 << 40) + number))
            continue
        uuid = threads.get(item.thread)
        if uuid is None:
            uuid = threads[item.thread] = FIRST_THREAD + len(threads)
            tid = thread_number(item.thread, len(threads))
            thread = message((1, PROCESS), (2, tid), (5, str(item.thread)))  # ThreadDescriptor: pid, tid, thread_name
            file.write(track(uuid, (4, thread)))
        since = max(0, trace.ns(item.since))
        if item.kind == EXIT:
            name, arguments = exit_words(trace, item)
            file.write(event(since, SLICE_BEGIN, uuid, name, "exit", arguments))
            file.write(event(since + trace.ticks_ns(item.ticks), SLICE_END, uuid))
        else:
            file.write(event(since, INSTANT, uuid, text(item, trace.names), "interrupt"))


def perfetto_request(trace: TraceFile, request: Request, uuid: int) -> bytes:
    """Requests overlap, so each has a track; Perfetto shows those of one name and parent (5) together. name (2)"""
    name, arguments = request_words(request)

    def at(tsc: int) -> int:
        return max(0, trace.ns(tsc))

    parts = [track(uuid, (5, PROCESS), (2, name))]
    parts.append(event(at(request.begin), SLICE_BEGIN, uuid, name, "request", arguments))
    for stage, begin, end in request.stages():
        parts += [event(at(begin), SLICE_BEGIN, uuid, stage, "request"), event(at(end), SLICE_END, uuid)]
    return b"".join([*parts, event(at(request.end), SLICE_END, uuid)])
