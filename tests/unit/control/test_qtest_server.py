"""The qtest server on its socket: packets cut anywhere, clients that leave, IRQ lines among replies, how it ends."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm import ConfigError, Machine, StateError
from pyvmm.control import qtest
from pyvmm.control.qtest import QtestServer
from pyvmm.control.qtest_client import TIMEOUT_S, QtestClient


@pytest.fixture
def board() -> Iterator[Machine]:
    with Machine(accel="qtest", memory_mib=4) as machine:
        yield machine


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qtest.sock"


@pytest.fixture
def server(board: Machine, path: Path) -> Iterator[QtestServer]:
    made = QtestServer(board)
    made.listen(str(path))
    made.start()
    yield made
    made.close()


@pytest.fixture
def client(server: QtestServer, path: Path) -> Iterator[QtestClient]:
    made = QtestClient.connect(path)
    yield made
    made.hang_up()


def joined(thread: threading.Thread) -> bool:
    thread.join(TIMEOUT_S)
    return not thread.is_alive()


# Lines and packets


def test_a_line_for_each_line(client: QtestClient) -> None:
    assert client.ask("writel 0x1000 0x12345678") == "OK"
    assert client.ask("readl 0x1000") == "OK 0x0000000012345678"


def test_several_commands_in_one_packet(client: QtestClient) -> None:
    client.send(b"writeb 1 2\nreadb 1\nfoo\nendianness\n")
    assert [client.reply() for _ in range(4)] == [
        "OK", "OK 0x0000000000000002", "FAIL Unknown command 'foo'", "OK little",
    ]  # fmt: skip


def test_a_command_in_many_packets(client: QtestClient) -> None:
    for byte in b"readb 0x1000":
        client.send(bytes([byte]))
    client.send(b"\nendian")
    assert client.reply() == "OK 0x0000000000000000"
    client.send(b"ness\r\n")  # and a line end as terminals send it
    assert client.reply() == "OK little"


def test_bytes_that_are_no_text(client: QtestClient) -> None:
    client.send(b"\xff\xfe\0\n")
    assert client.reply() == "FAIL Unknown command '\xff\xfe\0'"


def test_a_write_of_a_mebibyte(client: QtestClient) -> None:
    data = os.urandom(1 << 20).hex()
    assert client.ask(f"write 0x100000 {1 << 20} 0x{data}") == "OK"
    assert client.ask(f"read 0x100000 {1 << 20}") == f"OK 0x{data}"


def test_a_line_without_an_end(client: QtestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qtest, "LINE_MAX_BYTES", 1000)
    client.send(b"x" * 2000)
    assert client.reply() == "FAIL a line is longer than 1000 bytes"
    with pytest.raises((EOFError, ConnectionError)):
        client.reply()


def test_a_client_that_ends_its_side_still_gets_its_replies(client: QtestClient) -> None:
    client.send(b"endianness\n" * 100)
    client.end.shutdown(socket.SHUT_WR)
    assert [client.reply() for _ in range(100)] == ["OK little"] * 100
    with pytest.raises(EOFError):
        client.reply()


# Clients


def test_one_client_after_the_other(client: QtestClient, path: Path) -> None:
    assert client.ask("writeb 5 6") == "OK"
    client.send(b"readb")  # left in the middle of a word
    client.hang_up()
    other = QtestClient.connect(path)
    assert other.ask("readb 5") == "OK 0x0000000000000006"
    other.hang_up()


def test_a_client_that_leaves_without_reading(client: QtestClient, path: Path) -> None:
    client.send(b"read 0 65536\n" * 50)
    client.hang_up()
    other = QtestClient.connect(path)
    assert other.ask("endianness") == "OK little"
    other.hang_up()


def test_the_next_client_hears_of_no_pins(client: QtestClient, path: Path, board: Machine) -> None:
    assert client.ask("irq_intercept_in ioapic") == "OK"
    client.hang_up()
    other = QtestClient.connect(path)
    assert other.ask("endianness") == "OK little"  # the first one is gone now
    board.irq_line(5).raise_()
    assert other.ask("irq_intercept_in pic") == "OK"
    assert other.irqs == []
    other.hang_up()


# IRQ lines


def test_an_interrupt_is_told_before_the_reply(client: QtestClient) -> None:
    assert client.ask("irq_intercept_in ioapic") == "OK"
    client.send(b"set_irq_in ioapic unnamed-gpio-in 9 1\n")
    assert [client.line(), client.line()] == ["IRQ raise 9", "OK"]


def test_a_tick_of_the_pit(client: QtestClient) -> None:
    client.ask("irq_intercept_in ioapic")
    for line in ("outb 0x43 0x34", "outb 0x40 0xa9", "outb 0x40 0x04"):  # mode 2, 1193 pulses
        assert client.ask(line) == "OK"
    assert client.irqs == ["IRQ raise 0"]  # its output is high from the control word on
    assert client.ask("clock_step 2100000") == "OK 2100000"
    assert client.irqs[1:] == ["IRQ lower 0", "IRQ raise 0"] * 2


def test_interrupts_from_other_threads(client: QtestClient, board: Machine) -> None:
    """They come in between, and never inside a line."""
    client.ask("irq_intercept_in ioapic")
    lines = [board.irq_line(n) for n in (3, 5, 7)]

    def drive(n: int) -> None:
        for _ in range(200):
            lines[n].pulse()

    threads = [threading.Thread(target=drive, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):  # they wait where nobody reads
        assert client.ask("endianness") == "OK little"
    assert client.ask("endianness") == "OK little"
    for n in (3, 5, 7):
        assert [line for line in client.irqs if line.endswith(f" {n}")] == [f"IRQ raise {n}", f"IRQ lower {n}"] * 200
    assert len(client.irqs) == 1200


# Beginning and end


def test_close_while_nobody_is_there(server: QtestServer, path: Path) -> None:
    server.close()
    assert not path.exists()
    server.close()
    with pytest.raises(ConfigError, match="start the server first"):
        QtestClient.connect(path)


def test_close_hangs_up(server: QtestServer, client: QtestClient) -> None:
    client.ask("endianness")
    server.close()
    with pytest.raises(EOFError):
        client.reply()


def test_close_while_a_client_does_not_read(server: QtestServer, client: QtestClient, board: Machine) -> None:
    """A reply that nobody takes, and a device's thread that waits to tell of its pin."""
    client.ask("irq_intercept_in ioapic")
    client.send(b"read 0 4000000\n" * 4)
    while not client.end.recv(1):  # it is answering
        pass
    thread = threading.Thread(target=board.irq_line(5).pulse)
    thread.start()
    server.close()
    assert joined(thread)


def test_close_cuts_a_long_step_short(server: QtestServer, client: QtestClient) -> None:
    """A tick each 100 us of guest time, for years."""
    for line in ("outb 0x43 0x34", "outb 0x40 0x77", "outb 0x40 0"):
        client.ask(line)
    client.send(b"clock_step 0x7000000000000000\n")
    server.close()
    with pytest.raises(EOFError):
        while client.reply():
            pass


def test_connecting_to_a_listener_as_libqtest_has_it(board: Machine, path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    listener.settimeout(TIMEOUT_S)
    server = QtestServer(board)
    thread = threading.Thread(target=server.connect, args=(str(path),))
    thread.start()
    client = QtestClient(listener.accept()[0])
    assert client.ask("endianness") == "OK little"
    client.hang_up()
    assert joined(thread)
    listener.close()
    server.close()


def test_connecting_where_nobody_listens(board: Machine, path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory: start what listens there first"):
        QtestServer(board).connect(str(path))


def test_a_socket_left_by_a_dead_server_is_replaced(board: Machine, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = QtestServer(board)
    server.listen(str(path))
    server.close()
    assert not path.exists()


def test_a_path_that_is_taken(server: QtestServer, board: Machine, path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is being served already"):
        QtestServer(board).listen(str(path))
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(ConfigError, match="is there, and no socket"):
        QtestServer(board).listen(str(file))
    assert file.read_text() == "precious"


@pytest.mark.parametrize("name", ["missing/qtest.sock", "x" * 200])
def test_a_path_that_cannot_be(board: Machine, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="give a path that can be made"):
        QtestServer(board).listen(str(tmp_path / name))


def test_serving_without_a_socket(board: Machine) -> None:
    with pytest.raises(StateError, match=r"call listen\(\) first"):
        QtestServer(board).serve()
