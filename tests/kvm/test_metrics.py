"""What Prometheus reads of a machine: its own parser takes it, and the sums are exit_stats'; hostile clients hold up
nothing.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import PORT, TIMEOUT_S, Guest, Recorder
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.samples import Sample

from pyvmm import ConfigError, Machine
from pyvmm.control import http
from pyvmm.exit_stats import ExitStat

COUNT = 1000
PROGRAM = f"""mov ${COUNT}, %ecx
1: mov $DEVICE_PORT, %dx
 in (%dx), %al
 out %al, (%dx)
 dec %ecx
 jnz 1b
 finish 0"""
OPENMETRICS = "application/openmetrics-text;version=1.0.0"


def text_of(port: str | int, accept: str = "text/plain") -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        body: bytes = answer.read()
        assert answer.headers["Content-Type"].startswith(accept.partition(";")[0])
    return body.decode()


def samples(text: str) -> list[Sample]:
    return [sample for family in parser.text_string_to_metric_families(text) for sample in family.samples]


def total(found: list[Sample], name: str, /, **labels: str) -> float:
    return sum(s.value for s in found if s.name == name and labels.items() <= s.labels.items())


@pytest.fixture
def guest(boot: Callable[..., Guest]) -> Guest:
    made = boot(PROGRAM, name="m")
    made.machine.pio.map(PORT, 1, Recorder(), name="recorder")
    return made


def test_prometheus_parser_reads_it_and_the_sums_are_exit_stats(guest: Guest) -> None:
    machine = guest.machine
    port = machine.serve_metrics(0)
    assert guest.run() == 1
    found = samples(text_of(port))
    rows = machine.exit_stats()
    assert total(found, "pyvmm_exits_total") == sum(row.count for row in rows)
    assert total(found, "pyvmm_exits_total", region="recorder", direction="in") == COUNT
    seconds = sum(row.sum_ns for row in rows) / 1e9
    assert total(found, "pyvmm_exit_seconds_total") == pytest.approx(seconds)
    assert total(found, "pyvmm_exit_duration_seconds_sum") == pytest.approx(seconds)
    io = sum(row.count for row in rows if row.reason == "IO")
    assert total(found, "pyvmm_exit_duration_seconds_count", reason="IO") == io
    spread = [s for s in found if s.name == "pyvmm_exit_duration_seconds_bucket"]
    buckets = [s.value for s in spread if s.labels["reason"] == "IO"]
    assert buckets == sorted(buckets) and buckets[-1] == io and len(set(buckets)) > 2
    assert total(found, "pyvmm_machine_info", name="m", machine="microvm") == 1
    assert total(found, "pyvmm_state", pyvmm_state="shutdown") == 1 == total(found, "pyvmm_state")
    assert total(found, "pyvmm_memory_bytes") == 4 << 20


def test_in_openmetrics_too(guest: Guest) -> None:
    port = guest.machine.serve_metrics(0)
    guest.run()
    families = list(openmetrics_parser.text_string_to_metric_families(text_of(port, OPENMETRICS)))
    exits = next(family for family in families if family.name == "pyvmm_exits")
    assert sum(sample.value for sample in exits.samples) == sum(row.count for row in guest.machine.exit_stats())


def test_drives_and_cards(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    drive, card = f"file={tmp_path}/disk.img,if=virtio,id=v", f"unix={tmp_path}/net.sock,server=on"
    with Machine(accel="qtest", memory_mib=4, drives=[drive], nets=[card]) as machine:
        port = machine.serve_metrics(0)
        done: list[int] = []
        machine.backends["v"].aio_readv(0, [bytearray(512)], done.append)
        machine.drain()
        found = samples(text_of(port))
        assert total(found, "pyvmm_block_operations_total", drive="v", operation="read") == 1
        assert total(found, "pyvmm_block_bytes_total") == 512
        assert {s.labels["direction"] for s in found if s.name == "pyvmm_net_packets_total"} == {"receive", "transmit"}


def test_nothing_is_read_before_somebody_asks(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    read = Machine.exit_stats

    def reads(machine: Machine) -> list[ExitStat]:
        asked.append(None)
        return read(machine)

    monkeypatch.setattr(Machine, "exit_stats", reads)
    port = guest.machine.serve_metrics(0)
    guest.run()
    assert asked == []
    text_of(port)
    assert len(asked) == 1


def test_hostile_clients_hold_up_neither_the_machine_nor_a_right_one(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first make room for the next, long before their time is over."""
    monkeypatch.setattr(http, "LIMIT_NS", 3_600_000_000_000)
    port = guest.machine.serve_metrics(0)
    slow = [socket.create_connection(("127.0.0.1", int(port)), TIMEOUT_S) for _ in range(100)]
    for n, end in enumerate(slow):
        end.sendall(b"GET /metr" if n % 2 else bytes(range(1, 256)))
    for _ in range(500):  # who come and go
        socket.create_connection(("127.0.0.1", int(port)), TIMEOUT_S).close()
    assert guest.run() == 1
    assert total(samples(text_of(port)), "pyvmm_exits_total") > COUNT
    for end in slow:
        end.close()


@pytest.mark.parametrize("version", ["x", "1.0.\xff", "9" * 5000, "2.0\nX-Mine: 1", "1.0.7", "", "-1"])
def test_a_version_that_somebody_has_thought_of(guest: Guest, version: str, capfd: pytest.CaptureFixture[str]) -> None:
    port = guest.machine.serve_metrics(0)
    with socket.create_connection(("127.0.0.1", int(port)), TIMEOUT_S) as end:
        accept = f"application/openmetrics-text;version={version};q=z"
        end.sendall(f"GET /metrics HTTP/1.1\r\nAccept: {accept}\r\n\r\n".encode("latin-1"))
        answer = end.makefile("rb").read()
    head = answer.partition(b"\r\n\r\n")[0].decode("ascii")
    assert head.startswith("HTTP/1.1 200 OK\r\n") and "X-Mine" not in head and "1.0.7" not in head
    assert capfd.readouterr().err == ""


def test_by_a_unix_socket_that_is_the_user_s(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    assert guest.machine.serve_metrics(f"unix:{path}") == str(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(str(path))
        end.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert end.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("where", ["", "x", "70000", "1.2.3.4.5:80", "unix:", ":x", "[::1]"])
def test_places_that_are_none(guest: Guest, where: str) -> None:
    with pytest.raises(ConfigError, match="metrics="):
        guest.machine.serve_metrics(where)


def test_one_sentence_without_the_library(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install 'pyvmm-kvm\[metrics\]'"):
        guest.machine.serve_metrics(0)


def test_of_a_command(tmp_path: Path) -> None:
    (tmp_path / "spin.bin").write_bytes(b"\xeb\xfe")
    path = tmp_path / "m.sock"
    words = [sys.executable, "-m", "pyvmm", "run", "--flat", str(tmp_path / "spin.bin"), "--memory", "2"]
    process = subprocess.Popen([*words, "--serial", "none", "--metrics", f"unix:{path}"], stdin=subprocess.DEVNULL)
    try:
        with socket.socket(socket.AF_UNIX) as end:
            while end.connect_ex(str(path)):  # not there yet, or nobody listens yet
                assert process.poll() is None
            end.settimeout(TIMEOUT_S)
            end.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            text = b""
            while data := end.recv(1 << 16):
                text += data
        found = samples(text.partition(b"\r\n\r\n")[2].decode())
        assert total(found, "pyvmm_state", pyvmm_state="running") == 1
        modes = {s.labels["mode"] for s in found if s.name == "pyvmm_vcpu_seconds_total" and s.labels["vcpu"] == "0"}
        assert modes == {"guest", "user", "system", "steal"}
    finally:
        process.kill()
        process.wait()
