"""``pyvmm qtest`` as a command: on its socket, at the end of somebody's, its drives, its end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.control.qtest_client import TIMEOUT_S, QtestClient

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    started = []

    def run(*args: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pyvmm", "qtest", *map(str, args)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def client_of(process: subprocess.Popen[str], path: Path) -> QtestClient:
    """Connected as soon as it says that it listens."""
    assert process.stderr is not None
    assert process.stderr.readline() == f"pyvmm: qtest on {path}\n"
    return QtestClient.connect(path)


def test_a_disk_through_a_socket(start: Start, tmp_path: Path) -> None:
    image, path = tmp_path / "disk.img", tmp_path / "qtest.sock"
    image.write_bytes(b"".join(bytes([n]) * 512 for n in range(64)))
    process = start("--socket", path, "--memory", 16, image)
    client = client_of(process, path)
    assert client.ask("irq_intercept_in ioapic") == "OK"
    for port, value in ((0x1F2, 1), (0x1F3, 5), (0x1F4, 0), (0x1F5, 0), (0x1F6, 0xE0), (0x1F7, 0x20)):  # READ, LBA 5
        assert client.ask(f"outb {port} {value}") == "OK"
    while int(client.ask("inb 0x3f6").split()[1], 16) & 0x88 != 0x08:  # until it has data
        pass
    assert client.ask("inw 0x1f0") == "OK 0x0505"
    assert client.ask("inb 0x1f7") == "OK 0x0058"
    assert client.irqs == ["IRQ raise 14", "IRQ lower 14"]
    assert client.ask("writel 0xfffffc 0x1234") == "OK"  # the last RAM there is
    assert client.ask("readq 0xfffffc") == "OK 0xffffffff00001234"
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 128 + signal.SIGTERM
    assert not path.exists()


def test_a_guest_visible_reset(start: Start, tmp_path: Path) -> None:
    """Software resets the machine through 0xcf9; the board goes on, at power-on."""
    path = tmp_path / "qtest.sock"
    client = client_of(start("--socket", path), path)
    for line in ("outb 0x21 0x55", "outl 0xcf8 0x80000004", "outw 0xcfc 0", "outb 0xcf9 6"):
        assert client.ask(line) == "OK"
    assert client.ask("inb 0x21") == "OK 0x0000"
    assert client.ask("inl 0xcf8") == "OK 0x0000"


def test_virtio_devices_and_a_qmp_client_beside_it(start: Start, tmp_path: Path) -> None:
    path, qmp = tmp_path / "qtest.sock", tmp_path / "qmp.sock"
    devices = ("--rng", "--net", "none", "--console", "none")
    client = client_of(start("--socket", path, "-M", "pc", *devices, "--qmp", qmp), path)
    seen = set()
    for slot in range(32):
        client.ask(f"outl 0xcf8 {0x8000_0000 | slot << 11:#x}")
        seen.add(int(client.ask("inl 0xcfc").split()[1], 16))
    # virtio 1.2, 4.1.2.1 and 5: transitional ids of a console and an entropy device.
    assert {0x1003_1AF4, 0x1005_1AF4} <= seen
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(str(qmp))
        lines = monitor.makefile("rw")
        assert "QMP" in lines.readline()
        for command, answer in (("qmp_capabilities", "{}"), ("query-balloon", "DeviceNotActive"), ("query-pci", "rng")):
            lines.write(f'{{"execute": "{command}"}}\n')
            lines.flush()
            assert answer in lines.readline()


def test_connecting(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "test.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(TIMEOUT_S)
        process = start("--connect", path)
        client = QtestClient(listener.accept()[0])
    assert client.ask("endianness") == "OK little"
    client.hang_up()
    assert process.wait(TIMEOUT_S) == 0


def test_ctrl_c(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "qtest.sock"
    process = start("--socket", path)
    client_of(process, path).hang_up()
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 130
    assert not path.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "one of --socket PATH"),
        (("--socket", "a", "--connect", "b"), "one of --socket PATH"),
        (("--socket", "/nowhere/a"), "give a path that can be made"),
        (("--connect", "/nowhere/a"), "start what listens there first"),
        (("--socket", "a", "--kernel", "b"), "there is no option --kernel"),
        (("--socket", "a", "/nowhere/disk.img"), "/nowhere/disk.img"),
    ],
)
def test_wrong_use(start: Start, args: tuple[str, ...], message: str) -> None:
    process = start(*args)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert message in errors
    assert errors.count("\n") == 1


def test_help(start: Start) -> None:
    text, errors = start("--help").communicate(timeout=TIMEOUT_S)
    assert "--connect" in text
    assert "--drive" in text
    assert "--kernel" not in text
    assert errors == ""


RULES = """\
[inject-error]
event = "flush_to_disk"
errno = "5"
immediately = "off"
once = "on"
"""


def test_a_request_that_was_put_aside_goes_on_at_sigcont(start: Start, tmp_path: Path) -> None:
    """As QEMU's ide-test has it (retry_flush): a flush fails, the drive stands, and after "cont" it is done."""
    image, rules, path = tmp_path / "disk.img", tmp_path / "rules", tmp_path / "qtest.sock"
    image.write_bytes(bytes(1 << 20))
    rules.write_text(RULES)
    drive = f"file=blkdebug:{rules}:{image},cache=writeback,format=raw,rerror=stop,werror=stop"
    process = start("--socket", path, "--drive", drive)
    client = client_of(process, path)
    process.send_signal(signal.SIGCONT)  # there is nothing to go on with: it means nothing
    for port, value in ((0x1F2, 1), (0x1F3, 1), (0x1F4, 0), (0x1F5, 0), (0x1F6, 0xE0), (0x1F7, 0x30)):  # WRITE, LBA 1
        assert client.ask(f"outb {port} {value}") == "OK"
    for _ in range(256):
        assert client.ask("outw 0x1f0 0x5555") == "OK"
    assert status_when_idle(client) == 0x50
    assert client.ask("outb 0x1f7 0xe7") == "OK"  # FLUSH CACHE
    assert process.stderr is not None
    assert process.stderr.readline() == (
        f"pyvmm: io-error: ide0-hd0: flush: Input/output error; the request waits: `kill -CONT {process.pid}` tries it"
        " again\n"
    )
    assert client.ask("inb 0x3f6") == "OK 0x00d0"  # busy, as long as it takes
    process.send_signal(signal.SIGCONT)
    assert status_when_idle(client) == 0x50
    assert image.read_bytes()[512:1024] == b"\x55" * 512


def status_when_idle(client: QtestClient) -> int:
    while (status := int(client.ask("inb 0x1f7").split()[1], 16)) & 0x80:
        pass
    return status


@pytest.mark.parametrize("client", [False, True])
def test_timeout_s_two_signals_end_it(tmp_path: Path, client: bool) -> None:
    """timeout(1) sends SIGTERM and at once SIGCONT: the kernel may hand both to another thread than the main one."""
    for attempt in range(8):
        path = tmp_path / f"socket{attempt}"
        command = [sys.executable, "-m", "pyvmm", "qtest", "--socket", str(path), "--drive", "media=cdrom"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            assert process.stderr.readline().startswith(b"pyvmm: qtest on")
            with socket.socket(socket.AF_UNIX) as connection:
                if client:
                    connection.connect(str(path))
                    connection.sendall(b"inb 0x70\n")
                    assert connection.recv(100).startswith(b"OK")
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGCONT)
                assert process.wait(60) == 128 + signal.SIGTERM
