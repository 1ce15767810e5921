"""``pyvmm trace FILE``: what a trace has: its records, its requests, what they come to, and for other programs."""

from __future__ import annotations

from pyvmm.cli.options import Option, parse, usage
from pyvmm.errors import ConfigError
from pyvmm.trace.events import KINDS, device_of, line
from pyvmm.trace.format import EXIT, VECTOR, TraceFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.trace.format import Record
    from pyvmm.trace.requests import Request


def kind_words(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for word in text.split(","):
        if word not in KINDS:
            raise ValueError(text)
        found += KINDS[word]
    return tuple(found)


def addresses(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    low = int(first, 0)
    high = int(last, 0) if dash else low
    if not 0 <= low <= high:
        raise ValueError(text)
    return low, high


OPTIONS = (
    Option("--summary", "", "what it comes to: exits, requests and where their time went, interrupts"),
    Option("--requests", "", "a line for each request, with the ns of each stage of its way"),
    Option("--export", "OUT", "write it for Perfetto; as Chrome's JSON where OUT ends in .json"),
    Option("--kind", "KIND", f"only records of these kinds, with commas between them: {', '.join(KINDS)}", kind_words),
    Option("--cpu", "N", "only what vCPU N has done", int, many=True),
    Option("--address", "A[-B]", "only exits at this port or guest-physical address, or from A to B", addresses),
    Option("--device", "NAME", "only what is of a device, drive, queue or region whose name has NAME in it", many=True),
    Option("--from", "SECONDS", "only what is later, counted from the beginning of the trace", float),
    Option("--to", "SECONDS", "only what is earlier", float),
    Option("--help -h", "", "this"),
)
TITLE = """\
usage: pyvmm trace FILE [OPTIONS]

Reads what `pyvmm run --trace FILE` has written, also while it is being written and where the process was killed.
Without an option: every record, a line each."""


def trace(args: list[str]) -> int:
    path = args.pop(0) if args and not args[0].startswith("-") else None
    given = parse(OPTIONS, args, verb="trace")
    if "help" in given:
        print(usage(TITLE, OPTIONS), end="")
        return 0
    if path is None:
        raise ConfigError("pyvmm trace needs the FILE of a --trace, before its options")
    file = TraceFile(path)
    wanted = wanted_of(file, given)
    if "export" in given:
        from pyvmm.trace.export import export

        export(file, given["export"], wanted)
    if given.get("summary"):
        from pyvmm.trace.summary import Summary

        print(Summary(file, wanted).text(), end="")
    elif given.get("requests"):
        print_requests(file, wanted)
    elif "export" not in given:
        for record in file.records():
            if wanted(record):
                print(line(file, record))
    tell_of_gaps(file)
    return 0


def tell_of_gaps(file: TraceFile) -> None:
    from pyvmm.cli.say import say

    if file.dropped:
        say(f"pyvmm: trace {file.path}: {file.dropped} records are missing, they came too fast")
    if file.damage:
        say(f"pyvmm: trace {file.path}: {file.damage}")


def wanted_of(file: TraceFile, given: dict[str, Any]) -> Callable[[Record], bool]:
    """What the filters let through; all of them must."""
    tests: list[Callable[[Record], bool]] = []
    if "kind" in given:
        kinds = given["kind"]
        tests.append(lambda record: record.kind in kinds)
    if "cpu" in given:
        cpus = given["cpu"]
        tests.append(lambda record: of_vcpu(record, cpus))
    if "address" in given:
        low, high = given["address"]
        tests.append(lambda record: record.kind == EXIT and is_at(record, low, high))
    if "device" in given:
        names = given["device"]
        tests.append(lambda record: any(name in device_of(record, file.names) for name in names))
    if "from" in given:
        first_ns = given["from"] * 1e9
        tests.append(lambda record: file.ns(record.at) >= first_ns)
    if "to" in given:
        last_ns = given["to"] * 1e9
        tests.append(lambda record: file.ns(record.since) <= last_ns)
    return lambda record: all(test(record) for test in tests)


def of_vcpu(record: Record, cpus: list[int]) -> bool:
    if record.kind in (EXIT, VECTOR):
        return record.source in cpus
    return record.thread.name in [f"CPU {cpu}/KVM" for cpu in cpus]


def is_at(record: Record, low: int, high: int) -> bool:
    from pyvmm.trace.events import Exit

    found = Exit(record)
    return found.address is not None and found.address <= high and low < found.address + found.size


def print_requests(file: TraceFile, wanted: Callable[[Record], bool]) -> None:
    """Those of which a record is wanted."""
    from pyvmm.trace.requests import Requests

    requests = Requests(file.names)
    for record in file.records():
        for request in requests.feed(record):
            if wanted(record):
                print(request_line(file, request))
    for request in requests.finish():
        print(request_line(file, request))


def request_line(file: TraceFile, request: Request) -> str:
    stages = "  ".join(f"{name} {file.ticks_ns(end - begin)}" for name, begin, end in request.stages())
    where = "" if request.sector is None else f" sector {request.sector}"
    result = f" {request.result}" if request.result < 0 else ""
    what = f"{request.device} #{request.number} {request.kind}{where} {request.bytes} bytes{result}"
    return f"{file.ns(request.begin) / 1e9:13.6f}  {what}  {stages}"
