"""What other programs get of a trace: Perfetto's form by its published schema, Chrome's as its description says."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.unknown_fields import UnknownFieldSet
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as schema
from trace_files import of_threads
from trace_processor import trace_processor

from pyvmm.cli import main
from pyvmm.errors import ConfigError
from pyvmm.trace.export import everything, export
from pyvmm.trace.format import DONE, EXIT, KICK, LINE, MOVE, PUSH, SHOW, SUBMIT, TAKE, TraceFile

OUT_80 = 2 << 57 | 1 << 55 | 1 << 16 | 0x80
ROWS: dict[str, list[tuple[int, ...]]] = {
    "CPU 0/KVM": [(EXIT, 10, 30, 0, OUT_80, 65), (LINE, 45, 0, 14, 1), (EXIT, 50, 10, 0, OUT_80, 1 << 63)],
    "queue": [(KICK, 12), (TAKE, 20), (MOVE, 30, 10, 0, 8, 4096 << 32), (PUSH, 42), (SHOW, 60, 0, 0, 1, 1)],
    "worker": [(SUBMIT, 70, 0, 1, 3, 512 << 32 | 1), (DONE, 80, 0, 1, 1, -5)],
}
SLICES = {
    ("IO out 0x80 port80", 10, 40), ("IO out 0x80 port80", 50, 60), ("blk0.0 read", 12, 60), ("notice", 12, 20),
    ("device", 20, 30), ("call", 30, 40), ("completion", 40, 42), ("interrupt", 42, 60), ("ide0 read", 70, 80),
    ("at once", 70, 80),
}  # fmt: skip
INSTANTS = {("kick blk0.0", 12), ("interrupt GSI 14 up ide0", 45)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "trace"
    path.write_bytes(of_threads(ROWS))
    return path


def nested(begins: list[tuple[str, float]], name: str, at: float) -> tuple[str, float]:
    """The slice that ends here: the last that has begun on its track."""
    begun, since = begins.pop()
    assert not name or name == begun
    assert at >= since
    return begun, since


def test_perfettos_own_schema_reads_it(path: Path) -> None:
    out = path.with_suffix(".pftrace")
    export(TraceFile(str(path)), str(out), everything)
    trace = schema.Trace()
    trace.ParseFromString(out.read_bytes())
    tracks: dict[int, Any] = {}
    open_slices: dict[int, list[tuple[str, float]]] = defaultdict(list)
    slices, instants, arguments = set(), set(), {}
    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id == 1
        assert not len(UnknownFieldSet(packet))
        if packet.HasField("track_descriptor"):
            tracks[packet.track_descriptor.uuid] = packet.track_descriptor
        elif packet.HasField("track_event"):
            event, at = packet.track_event, packet.timestamp
            assert not len(UnknownFieldSet(event))
            assert event.track_uuid in tracks  # described before its first event
            if event.type == event.TYPE_SLICE_BEGIN:
                open_slices[event.track_uuid].append((event.name, at))
                arguments[event.name, at] = {a.name: a.int_value or a.uint_value for a in event.debug_annotations}
            elif event.type == event.TYPE_SLICE_END:
                slices.add((*nested(open_slices[event.track_uuid], "", at), at))
            else:
                instants.add((event.name, at))
    assert (slices, instants) == (SLICES, INSTANTS)
    assert not any(open_slices.values())
    assert arguments["IO out 0x80 port80", 50] == {"vcpu": 0, "address": 0x80, "size": 1, "value": 1 << 63, "count": 1}
    assert arguments["ide0 read", 70]["result"] == -5
    threads = {track.thread.thread_name for track in tracks.values() if track.HasField("thread")}
    assert threads == {"CPU 0/KVM", "queue 101"}
    requests = [track for track in tracks.values() if track.parent_uuid]
    assert {track.name for track in requests} == {"blk0.0 read", "ide0 read"}
    assert all(tracks[track.parent_uuid].process.process_name == "pyvmm" for track in requests)


def test_chromes_form(path: Path) -> None:
    out = path.with_suffix(".json")
    assert main(["trace", str(path), "--export", str(out)]) == 0
    events = json.loads(out.read_text())["traceEvents"]
    begun: dict[int, list[tuple[str, float]]] = defaultdict(list)
    slices, instants = set(), set()
    for event in events:
        at = round(event.get("ts", 0) * 1000)
        if event["ph"] == "X":
            slices.add((event["name"], at, at + round(event["dur"] * 1000)))
        elif event["ph"] == "b":
            begun[event["id"]].append((event["name"], at))
        elif event["ph"] == "e":
            slices.add((*nested(begun[event["id"]], event["name"], at), at))
        elif event["ph"] == "i":
            instants.add((event["name"], at))
        else:
            assert event["ph"] == "M" and event["args"]["name"]
    assert (slices, instants) == (SLICES, INSTANTS)


@pytest.mark.parametrize("form", ["pftrace", "json"])
def test_perfettos_trace_processor_reads_both(path: Path, form: str) -> None:
    out = path.with_suffix(f".{form}")
    export(TraceFile(str(path)), str(out), everything)
    with trace_processor(out) as perfetto:
        told = [(row.name, row.ts, row.ts + row.dur) for row in perfetto.query("select name, ts, dur from slice")]
        assert {row for row in told if row[1] != row[2]} == SLICES
        assert {row[:2] for row in told if row[1] == row[2]} == INSTANTS
        assert len(told) == len(SLICES) + len(INSTANTS)
        exits = "slice join thread_track on track_id = thread_track.id join thread using (utid)"
        threads = perfetto.query(f"select distinct thread.name as name from {exits} where category = 'exit'")
        assert [row.name for row in threads] == ["CPU 0/KVM"]
        argument = "extract_arg(arg_set_id, '{}.value') as value".format("debug" if form == "pftrace" else "args")
        values = perfetto.query(f"select {argument} from slice where category = 'exit' order by ts")
        assert [row.value for row in values] == [65, -(1 << 63)]  # an SQL integer has a sign
        complaints = perfetto.query("select name from stats where value != 0 and severity in ('error', 'data_loss')")
        assert not list(complaints)


def test_only_what_is_wanted(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = path.with_suffix(".json")
    assert main(["trace", str(path), "--kind", "exit", "--export", str(out), "--from", "0.00000005"]) == 0
    names = [event["name"] for event in json.loads(out.read_text())["traceEvents"] if event["ph"] != "M"]
    assert names == ["IO out 0x80 port80"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "count"),
    [([], 10), (["--kind", "exit,interrupt"], 3), (["--cpu", "0"], 3), (["--cpu", "1"], 0),
     (["--address", "0x7f-0x90"], 2), (["--address", "129"], 0), (["--device", "blk"], 5), (["--device", "ide0"], 3),
     (["--to", "0.000000045"], 6)],
)  # fmt: skip
def test_filters(path: Path, capsys: pytest.CaptureFixture[str], options: list[str], count: int) -> None:
    assert main(["trace", str(path), *options]) == 0
    assert len(capsys.readouterr().out.splitlines()) == count


def test_the_command_prints_summaries_and_requests(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(path), "--summary"]) == 0
    text = capsys.readouterr().out
    assert "2 exits, 0.0 ms in user space" in text and "blk0.0 read" in text
    assert main(["trace", str(path), "--requests"]) == 0
    assert capsys.readouterr().out.count("\n") == 2


def test_what_is_wrong_is_told(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--summary"], [str(path), "--kind", "x"], [str(path), "--address", "9-3"], [f"{path}x"]):
        assert main(["trace", *args]) == 2
        assert capsys.readouterr().err.startswith("pyvmm: ")
    with pytest.raises(ConfigError, match="write elsewhere"):
        export(TraceFile(str(path)), str(path.parent), everything)
    path.write_bytes(path.read_bytes()[:-5])
    assert main(["trace", str(path), "--summary"]) == 0
    assert "and what comes after that is missing" in capsys.readouterr().err
