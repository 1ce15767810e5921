"""Host sides of a serial port: what comes out, what goes in, and what happens when nobody reads."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from chardev_port import LIMIT_S, Port, read_exactly, settle, turns_of

from pyvmm.chardev import (
    QUEUE_LIMIT_BYTES,
    CallableChardev,
    FileChardev,
    NullChardev,
    PtyChardev,
)
from pyvmm.errors import ConfigError
from pyvmm.event_loop import EventLoop


@pytest.fixture
def errors() -> list[BaseException]:
    return []


@pytest.fixture
def loop(errors: list[BaseException]) -> Iterator[EventLoop]:
    loop = EventLoop(errors.append)
    yield loop
    loop.close()
    assert errors == []


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe of the smallest size, so that it is full soon."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            pass


# -- null and callable --------------------------------------------------------------------------------------


def test_null_takes_everything() -> None:
    chardev = NullChardev()
    chardev.set_receiver(lambda data: pytest.fail("there is no input"))
    chardev.write(b"lost")
    chardev.accept_input()
    assert chardev.can_write
    chardev.close()


def test_callable_gets_what_is_written_at_once() -> None:
    got: list[bytes] = []
    chardev = CallableChardev(got.append)
    chardev.write(b"a")
    chardev.write(b"bc")
    assert got == [b"a", b"bc"]


def test_error_of_the_callable_comes_out() -> None:
    def fail(data: bytes) -> None:
        raise ValueError(data)

    with pytest.raises(ValueError):
        CallableChardev(fail).write(b"x")


def test_fed_input_waits_for_a_receiver_and_for_room() -> None:
    chardev = CallableChardev(lambda data: None)
    chardev.feed(b"hello")
    port = Port(room=2).attach(chardev)
    assert port.data == b"he" and port.refused
    port.take(1)
    assert port.data == b"he"  # nobody told the chardev yet
    chardev.accept_input()
    assert port.data == b"hel"
    chardev.feed(b" world")
    port.take(100)
    chardev.accept_input()
    assert port.data == b"hello world"
    chardev.feed(b"")
    assert port.data == b"hello world"


def test_bytes_fed_by_many_threads_all_arrive_each_in_order() -> None:
    chardev = CallableChardev(lambda data: None)
    port = Port(room=1 << 20).attach(chardev)

    def feed(base: int) -> None:
        for i in range(100):
            chardev.feed(bytes((base + i % 50,)))

    threads = [threading.Thread(target=feed, args=(50 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(port.data) == 400
    for n in range(4):
        mine = [b - 50 * n for b in port.data if 50 * n <= b < 50 * n + 50]
        assert mine == [i % 50 for i in range(100)]


def test_receiver_that_reads_while_receiving_gets_everything_in_order() -> None:
    """The guest's read makes room from inside the delivery: no recursion, no loss."""
    chardev = CallableChardev(lambda data: None)
    got = bytearray()

    def receive(data: bytes) -> None:
        got.extend(data)
        chardev.accept_input()

    chardev.set_receiver(receive, lambda: 1)
    chardev.feed(bytes(range(256)) * 20)
    assert bytes(got) == bytes(range(256)) * 20


def test_error_of_the_receiver_comes_out_of_feed_and_does_not_jam_it() -> None:
    chardev = CallableChardev(lambda data: None)
    got: list[bytes] = []

    def fail_once(data: bytes) -> None:
        got.append(data)
        if len(got) == 1:
            raise ValueError("once")

    chardev.set_receiver(fail_once)
    with pytest.raises(ValueError):
        chardev.feed(b"a")
    chardev.feed(b"b")
    assert got == [b"a", b"b"]


def test_break_reaches_the_device() -> None:
    chardev = CallableChardev(lambda data: None)
    chardev.send_break()
    port = Port().attach(chardev)
    chardev.send_break()
    assert port.breaks == 1


# -- files --------------------------------------------------------------------------------------------------


def test_file_is_created_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    for text in (b"first\n", b"second\n"):
        chardev = FileChardev(path)
        chardev.write(text)
        assert path.read_bytes().endswith(text)  # no buffer of ours to lose
        chardev.close()
        chardev.close()
    assert path.read_bytes() == b"first\nsecond\n"


def test_big_write_to_a_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "big"
    chardev = FileChardev(str(path))
    chardev.write(bytes(3 * QUEUE_LIMIT_BYTES + 5))
    assert path.stat().st_size == 3 * QUEUE_LIMIT_BYTES + 5
    assert chardev.can_write and chardev.lost_bytes == 0
    chardev.close()


@pytest.mark.parametrize("name", ["no/such/folder/file", "."])
def test_file_that_cannot_be_opened_is_a_config_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="give the path of a file"):
        FileChardev(tmp_path / name)


def test_fifo_without_a_reader_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError):
        FileChardev(tmp_path / "fifo")


def test_descriptor_that_is_not_open_is_a_config_error(pipe: tuple[int, int]) -> None:
    os.close(pipe[1])
    with pytest.raises(ConfigError, match="not open"):
        FileChardev(pipe[1])


def test_given_descriptor_stays_open_and_blocking(pipe: tuple[int, int]) -> None:
    chardev = FileChardev(pipe[1])
    chardev.write(b"x")
    chardev.close()
    assert os.get_blocking(pipe[1])
    os.write(pipe[1], b"y")
    assert os.read(pipe[0], 10) == b"xy"


def test_file_on_a_full_disk_does_not_fail_the_guest() -> None:
    chardev = FileChardev("/dev/full")
    chardev.write(b"x")
    chardev.close()


# -- a reader that does not keep up -------------------------------------------------------------------------


def test_full_pipe_never_blocks_and_the_loop_sends_the_queue_on(
    loop: EventLoop, pipe: tuple[int, int]
) -> None:
    chardev = FileChardev(pipe[1], loop)
    data = bytes(i % 251 for i in range(20_000))
    for start in range(0, len(data), 100):
        chardev.write(data[start : start + 100])
    assert chardev.can_write
    assert read_exactly(pipe[0], len(data)) == data
    assert chardev.lost_bytes == 0


def test_queue_is_bounded_and_tells_when_it_has_room_again(loop: EventLoop, pipe: tuple[int, int]) -> None:
    chardev = FileChardev(pipe[1], loop)
    writable = threading.Event()
    chardev.set_writable(writable.set)
    sent = 0
    while chardev.can_write:
        chardev.write(bytes((sent % 251,)) * 1000)
        sent += 1000
    settle(loop)
    assert not writable.is_set() and not chardev.can_write
    assert chardev.lost_bytes == 0  # the last one found it with room
    losses: list[int] = []
    chardev.on_lost = lambda: losses.append(chardev.lost_bytes)
    chardev.write(b"no room for this")
    chardev.write(b"nor for this")
    assert losses == [len(b"no room for this")]  # told once
    assert chardev.lost_bytes == len(b"no room for thisnor for this")
    assert QUEUE_LIMIT_BYTES <= sent < QUEUE_LIMIT_BYTES + 4096 + 1000
    read_exactly(pipe[0], sent)
    assert writable.wait(LIMIT_S)
    assert chardev.can_write
    writable.clear()
    chardev.write(b"and on")
    assert read_exactly(pipe[0], 6) == b"and on"
    settle(loop)
    assert not writable.is_set()


def test_without_a_loop_the_next_write_sends_the_queue(pipe: tuple[int, int]) -> None:
    chardev = FileChardev(pipe[1])
    chardev.write(bytes(4096))
    chardev.write(b"queued")
    assert len(os.read(pipe[0], 8192)) == 4096
    chardev.write(b" and more")
    assert os.read(pipe[0], 100) == b"queued and more"


def test_close_sends_what_a_slow_reader_still_takes(loop: EventLoop, pipe: tuple[int, int]) -> None:
    chardev = FileChardev(pipe[1], loop)
    chardev.write(bytes(10_000))
    loop.close()
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read_exactly(pipe[0], 10_000)))
    reader.start()
    chardev.close()
    reader.join(LIMIT_S)
    assert got == [bytes(10_000)]


def test_close_does_not_wait_for_ever_for_a_stuck_reader(
    loop: EventLoop, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvmm.chardev.FLUSH_LIMIT_S", 0.01)
    chardev = FileChardev(pipe[1], loop)
    chardev.write(bytes(10_000))
    chardev.close()
    assert len(os.read(pipe[0], 20_000)) == 4096


def test_closed_reader_swallows_output_and_the_queue(loop: EventLoop, pipe: tuple[int, int]) -> None:
    chardev = FileChardev(pipe[1], loop)
    writable = threading.Event()
    chardev.set_writable(writable.set)
    while chardev.can_write:
        chardev.write(bytes(1000))
    os.close(pipe[0])
    assert writable.wait(LIMIT_S)
    chardev.write(b"nobody")
    assert chardev.can_write
    chardev.close()


# -- pty ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pty(loop: EventLoop) -> Iterator[PtyChardev]:
    chardev = PtyChardev(loop)
    yield chardev
    chardev.close()


def open_client(chardev: PtyChardev) -> int:
    return os.open(chardev.path, os.O_RDWR | os.O_NOCTTY)


def test_pty_both_ways_and_raw(pty: PtyChardev) -> None:
    port = Port().attach(pty)
    client = open_client(pty)
    os.write(client, b"\x03ls\r")
    port.wait_for(b"\x03ls\r")
    pty.write(b"a\nb\x04")
    assert read_exactly(client, 4) == b"a\nb\x04"
    os.close(client)


def test_pty_loses_output_while_nobody_has_it_open(pty: PtyChardev) -> None:
    for _ in range(100):
        pty.write(bytes(1000))
    assert pty.can_write and pty.lost_bytes == 0
    client = open_client(pty)
    pty.write(b"now")
    assert read_exactly(client, 3) == b"now"
    os.close(client)


def test_pty_survives_clients_that_come_and_go(loop: EventLoop, pty: PtyChardev) -> None:
    port = Port().attach(pty)
    expected = b""
    for n in range(3):
        client = open_client(pty)
        os.write(client, b"%d" % n)
        expected += b"%d" % n
        port.wait_for(expected)
        os.close(client)
        settle(loop)
        pty.write(b"unheard")


def test_absent_client_does_not_keep_the_loop_busy(
    loop: EventLoop, pty: PtyChardev, monkeypatch: pytest.MonkeyPatch
) -> None:
    Port().attach(pty)
    os.close(open_client(pty))
    assert turns_of(loop, monkeypatch) <= 10


def test_pty_client_that_does_not_read_holds_output_back_until_it_leaves(pty: PtyChardev) -> None:
    writable = threading.Event()
    pty.set_writable(writable.set)
    client = open_client(pty)
    while pty.can_write:
        pty.write(bytes(1000))
    assert not writable.is_set()
    os.close(client)
    assert writable.wait(LIMIT_S)
    assert pty.can_write


def test_pty_queue_reaches_a_slow_client_whole(loop: EventLoop, pty: PtyChardev) -> None:
    client = open_client(pty)
    data = bytes(i % 251 for i in range(40_000))
    pty.write(data)
    assert read_exactly(client, len(data)) == data
    os.close(client)


def test_pty_input_waits_until_there_is_room(pty: PtyChardev) -> None:
    port = Port(room=1).attach(pty)
    client = open_client(pty)
    os.write(client, b"abc")
    for n in range(1, 4):
        port.wait(lambda: port.refused)
        assert port.data == b"abc"[:n]
        port.take(1)
        pty.accept_input()
    os.close(client)


def test_closed_pty_leaves_no_descriptor(loop: EventLoop) -> None:
    settle(loop)
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(20):
        chardev = PtyChardev(loop)
        Port().attach(chardev)
        chardev.close()
        chardev.close()
        chardev.write(b"late")
    assert set(os.listdir("/proc/self/fd")) == before
