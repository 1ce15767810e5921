"""The NBD driver against a server of the tests' own: what it asks for, what it makes of every kind of answer, what a
server that lies, stalls or goes away can do.
"""

from __future__ import annotations

import gc
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from errno import EIO, ENOSPC
from pathlib import Path
from struct import pack

import pytest
from block_drives import LIMIT_S, SECTOR, Result, TestLoop, flush, read, write
from nbd_server import READ, TRIM, WRITE, WRITE_ZEROES, Answer, Asked, Client, NbdServer
from waiting import wait_for

from pyvmm import ConfigError
from pyvmm.block import BlockBackend, DriveOptions, open_drive
from pyvmm.block.protocols import nbd, nbd_handshake
from pyvmm.block.protocols.nbd_address import parse_nbd, parse_nbd_unix
from pyvmm.block.protocols.nbd_requests import WAIT_FOR_MORE
from pyvmm.errors import HostError

Serve = Callable[..., NbdServer]
Open = Callable[..., BlockBackend]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    made: list[NbdServer] = []

    def start(size_bytes: int = 1 << 20, **how: object) -> NbdServer:
        made.append(NbdServer(tmp_path / f"nbd{len(made)}", size_bytes, **how))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture
def on(drive: Open) -> Open:
    """``on(server, **options)``: its export as a drive."""
    return lambda server, **options: drive(f"nbd:unix:{server.path}", **options)


def zeroes(backend: BlockBackend, sector: int, count: int) -> int:
    result = Result()
    backend.aio_write_zeroes(sector, count, result)
    return result.wait()


def attempt(backend: BlockBackend, sector: int = 0, count: int = 8) -> int:
    """How a read ends."""
    result = Result()
    backend.aio_readv(sector, [memoryview(bytearray(count * SECTOR))], result)
    return result.wait()


# -- what it asks for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"structured": False}, {"go": False}, {"structured": False, "go": False}])
def test_what_is_written_is_read(serve: Serve, on: Open, how: dict[str, bool]) -> None:
    server = serve(**how)
    backend = on(server)
    assert backend.size_bytes == 1 << 20
    assert write(backend, 3, b"abcd" * 4096) == 0
    assert server.data[3 * SECTOR :][: 4 * 4096] == b"abcd" * 4096
    assert flush(backend) == 0
    assert read(backend, 0, 2048) == server.data
    assert zeroes(backend, 8, 8) == 0
    assert read(backend, 8, 8) == bytes(4096)


def test_reads_into_several_pieces_of_memory(serve: Serve, on: Open) -> None:
    server = serve()
    pieces = [memoryview(bytearray(size)) for size in (512, 4096, 300_000 - 300_000 % SECTOR, SECTOR)]
    result = Result()
    on(server).aio_readv(1, pieces, result)
    assert result.wait() == 0
    got = b"".join(pieces)
    assert got == server.data[SECTOR : SECTOR + len(got)]


def test_discards_flushes_and_fua_are_asked_for(serve: Serve, on: Open) -> None:
    server = serve()
    backend = on(server, cache="writethrough")
    assert write(backend, 0, bytes(SECTOR)) == 0
    assert (server.asked[-1].kind, server.asked[-1].flags) == (WRITE, 1)
    result = Result()
    backend.aio_discard(16, 8, result)
    assert result.wait() == 0
    assert (server.asked[-1].kind, server.asked[-1].offset, server.asked[-1].length) == (TRIM, 8192, 4096)
    result = Result()
    backend.aio_write_zeroes(0, 8, result, may_unmap=False)
    assert result.wait() == 0
    assert (server.asked[-1].kind, server.asked[-1].flags) == (WRITE_ZEROES, 3)  # FUA, no hole


def test_what_the_server_can_not_do_is_done_otherwise(serve: Serve, on: Open) -> None:
    server = serve(flags=1 | 4)  # flush only
    backend = on(server, cache="writethrough")
    assert write(backend, 0, b"x" * SECTOR) == 0
    assert [(asked.kind, asked.flags) for asked in server.asked[-2:]] == [(WRITE, 0), (3, 0)]
    assert zeroes(backend, 0, 200) == 0
    assert server.data[: 200 * SECTOR] == bytes(200 * SECTOR)
    result = Result()
    backend.aio_discard(0, 8, result)
    assert result.wait() == 0
    assert {asked.kind for asked in server.asked} == {READ, WRITE, 3}


def test_block_sizes_are_kept(serve: Serve, on: Open) -> None:
    server = serve((1 << 20) + 512, blocks=(4096, 4096, 65536))
    backend = on(server)
    assert backend.size_bytes == 1 << 20  # what is behind the last block nobody can ask for
    before = bytes(server.data)
    assert read(backend, 1, 200) == before[SECTOR : 201 * SECTOR]
    assert write(backend, 1, b"y" * SECTOR * 200) == 0
    assert server.data == before[:SECTOR] + b"y" * SECTOR * 200 + before[201 * SECTOR :]
    assert zeroes(backend, 1, 20) == 0
    assert server.data[: 21 * SECTOR] == before[:SECTOR] + bytes(20 * SECTOR)
    transfers = [asked for asked in server.asked if asked.kind in (READ, WRITE, WRITE_ZEROES)]
    assert all(asked.offset % 4096 == 0 and asked.length % 4096 == 0 for asked in transfers)
    assert max(asked.length for asked in transfers) <= 65536


def test_requests_that_come_together_go_out_together(serve: Serve, on: Open) -> None:
    go = threading.Event()
    server = serve()
    backend = on(server, format="raw")
    file: nbd.Nbd = backend._driver._file  # type: ignore[union-attr]

    def when_all_are_there(client: Client, asked: Asked) -> None:
        assert go.wait(LIMIT_S)
        server.tell_the_truth(client, asked)

    server.answer = when_all_are_there
    wait_for(lambda: not file._line.awake)  # nothing comes from now on, so it sleeps until ``go``
    results = [Result() for _ in range(WAIT_FOR_MORE + 3)]
    waiting = []
    backend.plug()
    for n, result in enumerate(results):
        backend.aio_writev(8 * n, [memoryview(bytes([n]) * 4096)], result)
        waiting.append(file._line.unsent // 2)  # a header and its data
    assert waiting == [*range(1, WAIT_FOR_MORE), 0, 1, 2, 3]
    backend.unplug()
    assert not file._line.unsent
    go.set()
    assert [result.wait() for result in results] == [0] * len(results)
    assert server.data[: 4096 * len(results)] == b"".join(bytes([n]) * 4096 for n in range(len(results)))


def test_an_export_has_a_name(serve: Serve, drive: Open) -> None:
    server = serve()
    drive(f"nbd:unix:{server.path}:exportname=a b")
    drive(f"nbd+unix:///a%20b?socket={server.path}")
    assert server.names == [b"a b", b"a b"]


def test_the_end_is_said(serve: Serve, on: Open) -> None:
    server = serve()
    backend = on(server)
    write(backend, 0, bytes(SECTOR))
    backend.close()
    wait_for(lambda: len(server.asked) > 0 and server.asked[-1].kind == 2)
    assert [asked.kind for asked in server.asked[-2:]] == [3, 2]  # flush, end


def test_by_tcp(serve: Serve, drive: Open) -> None:
    server = serve()
    server.hang_up()
    server._listener = socket.create_server(("127.0.0.1", 0))
    server._start(server._accept)
    port = server._listener.getsockname()[1]
    assert read(drive(f"nbd://127.0.0.1:{port}/"), 0, 8) == server.data[:4096]


@pytest.mark.parametrize(
    ("text", "host", "port", "export"),
    [
        ("//h/e", "h", 10809, "e"),
        ("//h:1", "h", 1, ""),
        ("//[::1]:7/a%2Fb", "::1", 7, "a/b"),
        ("h:5:exportname=x:y", "h", 5, "x:y"),
    ],
)
def test_addresses(text: str, host: str, port: int, export: str) -> None:
    address = parse_nbd(text)
    assert (address.host, address.port, address.export) == (host, port, export)


@pytest.mark.parametrize("text", ["", "//", "//h:0/", "//h:x/", "unix:", "h:70000", "//h/%zz", "//h/" + "x" * 5000])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_nbd(text)
    for wrong in ("///e", "//h/e?socket=x", "///?socket="):
        with pytest.raises(ConfigError, match="names no socket"):
            parse_nbd_unix(wrong)


# -- what it makes of answers ------------------------------------------------------------------------------------------


def pieces_backwards(client: Client, asked: Asked) -> None:
    if asked.kind != READ:
        client.simple(asked)
        return
    half = asked.length // 2
    client.chunk(asked, 2, pack(">QI", asked.offset + half, asked.length - half), done=False)
    client.chunk(asked, 1, pack(">Q", asked.offset) + b"h" * half, done=False)
    client.chunk(asked, 0)


def test_a_read_may_come_in_pieces_and_holes(serve: Serve, on: Open) -> None:
    assert read(on(serve(answer=pieces_backwards)), 0, 8) == b"h" * 2048 + bytes(2048)


def fails(number: int) -> Answer:
    return lambda client, asked: client.simple(asked, number)


def fails_midway(client: Client, asked: Asked) -> None:
    client.chunk(asked, 1, pack(">Q", asked.offset) + b"h" * 512, done=False)
    client.chunk(asked, 1 << 15 | 2, pack(">IH", 28, 2) + b"no" + pack(">Q", asked.offset + 512), done=False)
    client.chunk(asked, 0)


def test_errors_are_told(serve: Serve, on: Open) -> None:
    assert attempt(on(serve(answer=fails_midway), format="raw", rerror="report")) == -ENOSPC
    backend = on(serve(answer=fails(28)), format="raw", werror="report")
    assert write(backend, 0, bytes(SECTOR)) == -ENOSPC


LIES: dict[str, Answer] = {
    "garbage": lambda client, asked: client.put(b"\xff" * 64),
    "http": lambda client, asked: client.put(b"HTTP/1.0 200 OK\r\n\r\n"),
    "another's cookie": lambda client, asked: client.put(pack(">IIQ", 0x67446698, 0, asked.cookie + 1)),
    "too much": lambda client, asked: client.chunk(asked, 1, pack(">Q", asked.offset) + bytes(asked.length + 1)),
    "2^32 bytes": lambda client, asked: client.put(
        pack(">IHHQIQ", 0x668E33EF, 1, 1, asked.cookie, 0xFFFFFFFF, asked.offset)
    ),
    "before it": lambda client, asked: client.chunk(asked, 1, pack(">Q", asked.offset - 1 & (1 << 64) - 1) + b"xy"),
    "nothing of it": lambda client, asked: client.chunk(asked, 0),
    "half of it": lambda client, asked: client.chunk(asked, 1, pack(">Q", asked.offset) + b"x" * 512),
    "twice": lambda client, asked: [
        client.chunk(asked, 1, pack(">Q", asked.offset) + bytes(512), done=False) for _ in range(2)
    ],
    "a hole too many": lambda client, asked: client.chunk(asked, 2, pack(">QI", asked.offset, 0xFFFFFFFF)),
    "an empty hole": lambda client, asked: client.chunk(asked, 2, pack(">QI", asked.offset, 0)),
    "a kind of its own": lambda client, asked: client.chunk(asked, 77, b"what"),
    "an error without a number": lambda client, asked: client.chunk(asked, 1 << 15, b"x"),
    "an error of length": lambda client, asked: client.put(
        pack(">IHHQI", 0x668E33EF, 1, 1 << 15 | 1, asked.cookie, 1 << 30)
    ),
    "an error whose text is longer": lambda client, asked: client.chunk(asked, 1 << 15, pack(">IH", 5, 4096)),
    "the end": lambda client, asked: client.line.shutdown(socket.SHUT_RDWR),
    "half a header": lambda client, asked: [client.put(b"\x66"), client.line.shutdown(socket.SHUT_RDWR)],
    "the old way": lambda client, asked: client.simple(asked, 0, bytes(asked.length)),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_an_io_error_and_the_next_request_finds_a_new_connection(serve: Serve, on: Open, name: str) -> None:
    server = serve()
    backend = on(server, format="raw", rerror="report")
    honest, server.answer = server.answer, LIES[name]
    assert attempt(backend, 8) == -EIO
    server.answer = honest
    wait_for(lambda: attempt(backend) == 0)
    assert read(backend, 0, 8) == server.data[:4096]


def test_an_answer_before_the_data_is_here(serve: Serve, on: Open) -> None:
    """It may fail a write early. The rest of the data is not the guest's memory's any more."""
    server = serve(16 << 20)
    backend = on(server, format="raw", werror="report")
    stop = threading.Event()

    def early(client: Client) -> bool:
        header = client.get(28)
        client.put(pack(">IIQ", 0x67446698, 28, int.from_bytes(header[8:16], "big")))
        stop.wait(LIMIT_S)
        return False

    server._one = early  # type: ignore[method-assign]
    server.hang_up()
    server.listen()
    wait_for(lambda: attempt_write(backend, b"\1" * (8 << 20)) == -ENOSPC)
    stop.set()


def attempt_write(backend: BlockBackend, data: bytes) -> int:
    memory = bytearray(data)
    view = memoryview(memory)
    result = Result()
    backend.aio_writev(0, [view], result)
    ret = result.wait()
    view.release()
    memory.clear()  # BufferError, if somebody had it still
    return ret


# -- a server that stalls or goes --------------------


def test_one_that_says_nothing_is_lost(serve: Serve, on: Open) -> None:
    server = serve()
    backend = on(server, format="raw", rerror="report", timeout=1)
    server.answer = lambda client, asked: None
    begin = time.monotonic()
    assert attempt(backend) == -EIO
    assert time.monotonic() - begin > 0.9


@pytest.mark.parametrize("delay", [0, 100_000])
def test_close_does_not_hang(serve: Serve, on: Open, monkeypatch: pytest.MonkeyPatch, delay: int) -> None:
    monkeypatch.setattr(nbd, "END_LIMIT_S", 0.2)
    server = serve()
    backend = on(server, format="raw", timeout=0, reconnect_delay=delay)
    server.answer = lambda client, asked: None
    result = Result()
    backend.aio_writev(0, [memoryview(bytes(SECTOR))], result)
    wait_for(lambda: bool(server.asked))
    begin = time.monotonic()
    with pytest.raises(HostError, match="not all that was written is in nbd:unix:"):
        backend.close()
    assert time.monotonic() - begin < LIMIT_S
    assert result.wait() == -EIO


def test_close_does_not_hang_without_a_server(serve: Serve, on: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "END_LIMIT_S", 0.2)
    server = serve()
    backend = on(server, format="raw", reconnect_delay=100_000)
    server.hang_up()
    result = Result()
    backend.aio_readv(0, [memoryview(bytearray(SECTOR))], result)
    backend.close()
    assert result.wait() == -EIO


def test_requests_wait_for_it_where_the_policy_says_so(serve: Serve, on: Open) -> None:
    server = serve()
    backend = on(server, format="raw", reconnect_delay=60)
    server.answer = lambda client, asked: client.line.shutdown(socket.SHUT_RDWR)  # each has to be asked again
    results = [Result() for _ in range(20)]
    buffers = [memoryview(bytearray(4096)) for _ in results]
    for number, result in enumerate(results):
        backend.aio_readv(number * 8, [buffers[number]], result)
    wait_for(lambda: len(server.asked) > 0)
    assert not any(result.done for result in results)
    server.answer = server.tell_the_truth
    assert [result.wait() for result in results] == [0] * 20
    assert b"".join(buffers) == server.data[: 20 * 4096]


def test_waiting_ends(serve: Serve, on: Open) -> None:
    server = serve()
    backend = on(server, format="raw", rerror="report", reconnect_delay=1)
    server.hang_up()
    assert attempt(backend) == -EIO


def test_a_cancelled_request_does_not_wait(serve: Serve, on: Open) -> None:
    server = serve()
    backend = on(server, format="raw", reconnect_delay=100_000)
    server.hang_up()
    wait_for(lambda: not backend._driver._file._connected)  # type: ignore[union-attr]
    result = Result()
    backend.aio_readv(0, [memoryview(bytearray(SECTOR))], result).cancel()
    assert result.wait() != 0


def test_another_disk_is_not_taken_for_it(serve: Serve, on: Open) -> None:
    server = serve()
    backend = on(server, format="raw", rerror="report", reconnect_delay=1)
    server.hang_up()
    server.size_bytes *= 2
    server.listen()
    server.came.acquire(timeout=LIMIT_S)
    assert attempt(backend) == -EIO


# -- a server that is none --------------------


def refused(server: NbdServer, **options: object) -> str:
    loop = TestLoop()
    try:
        with pytest.raises(ConfigError) as caught:
            open_drive(DriveOptions(f"nbd:unix:{server.path}", **options), loop=loop, clock=loop.clock)
    finally:
        loop.close()
    return str(caught.value)


OPEN_LIES: dict[str, tuple[bytes, str]] = {
    "another protocol": (b"SSH-2.0-OpenSSH_9.2\r\n", "no NBD server"),
    "the old one": (b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53" + bytes(200), "the old protocol"),
    "newstyle that is not fixed": (b"NBDMAGICIHAVEOPT\0\0", "no fixed newstyle"),
    "no replies": (b"NBDMAGICIHAVEOPT\0\3" + b"\xff" * 100, "no NBD"),
    "a reply without end": (
        b"NBDMAGICIHAVEOPT\0\3" + pack(">QIII", 0x3E889045565A9, 8, 1, 0xFFFFFFFF),
        "no NBD",
    ),
    "replies without end": (
        b"NBDMAGICIHAVEOPT\0\3" + pack(">QIII", 0x3E889045565A9, 8, 1, 0)
        + pack(">QIII", 0x3E889045565A9, 7, 3, 2) * 1000 + bytes(2000),
        "no NBD|come to an end",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN_LIES)
def test_what_is_no_server_is_told_in_a_sentence(serve: Serve, name: str) -> None:
    begin, says = OPEN_LIES[name]
    sentence = refused(serve(begin=lambda client: client.put(begin)))
    assert any(word in sentence for word in says.split("|")), sentence
    assert "\n" not in sentence


def test_one_that_does_not_answer_is_told(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "OPEN_LIMIT_S", 0.2)
    assert "does not answer" in refused(serve(begin=lambda client: None))


def test_one_that_is_not_there_is_told(serve: Serve) -> None:
    server = serve()
    server.hang_up()
    sentence = refused(server)
    assert "Connection refused" in sentence and "qemu-nbd --socket" in sentence
    server.path.unlink()
    assert "No such file" in refused(server)


def test_what_may_not_be_written_is_told(serve: Serve, on: Open) -> None:
    server = serve(flags=3)
    assert "give read-only=on" in refused(server)
    assert read(on(server, read_only=True), 0, 8) == server.data[:4096]


def test_block_sizes_that_are_none_are_told(serve: Serve) -> None:
    for blocks in ((0, 0, 0), (3, 4, 4096), (4096, 4096, 512), (1 << 20, 1 << 20, 1 << 25)):
        assert "block sizes" in refused(serve(blocks=blocks))
    assert "which no disk has" in refused(serve(size_bytes=1 << 20, begin=tells_size(1 << 63)))


def tells_size(size_bytes: int) -> Callable[[Client], object]:
    """A negotiation to its end, with this size."""

    def begin(client: Client) -> None:
        client.put(b"NBDMAGICIHAVEOPT\0\3")
        client.get(4 + 16)
        client.put(pack(">QIII", 0x3E889045565A9, 8, 1, 0))
        client.put(pack(">QIII", 0x3E889045565A9, 7, 3, 12) + pack(">HQH", 0, size_bytes, 1))
        client.put(pack(">QIII", 0x3E889045565A9, 7, 1, 0))

    return begin


def test_an_engine_for_files_is_refused(serve: Serve) -> None:
    assert "leave it out" in refused(serve(), aio="io_uring")


def test_a_drive_nobody_has_ends_its_thread(serve: Serve) -> None:
    server = serve()
    loop = TestLoop()
    backend = open_drive(DriveOptions(f"nbd:unix:{server.path}"), loop=loop, clock=loop.clock)
    file = backend._driver._file  # type: ignore[union-attr]
    thread, gone = file._thread, weakref.ref(file)
    del backend, file
    gc.collect()
    loop.close()
    thread.join()
    assert gone() is None


def test_limits_are_what_they_say() -> None:
    assert nbd_handshake.MOST_REPLY_BYTES * nbd_handshake.MOST_REPLIES <= 1 << 20
