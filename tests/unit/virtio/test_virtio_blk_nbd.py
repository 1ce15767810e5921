"""A disk on virtio whose content an NBD server has: chains that wait in the lane, and what becomes of them when the
server fails them, lies, goes away or takes its time.
"""

from __future__ import annotations

import gc
import random
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import pack

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "block"))

from blk_bench import IOERR, LIMIT_S, OK, SECTOR, BlkBench, header
from block_drives import TestLoop
from nbd_server import READ, WRITE, Answer, Asked, Client, NbdServer
from waiting import wait_for

from pyvmm.block import BlockBackend, DriveOptions, open_drive
from pyvmm.devices.virtio import blk
from pyvmm.devices.virtio.blk_waiting import WaitingBlk

Serve = Callable[..., NbdServer]
Open = Callable[..., BlockBackend]
BYTES = 1 << 20


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    made: list[NbdServer] = []

    def start(**how: object) -> NbdServer:
        made.append(NbdServer(tmp_path / f"nbd{len(made)}", BYTES, **how))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture
def on() -> Iterator[Open]:
    """``on(server, **options)``: its export as a drive."""
    loop = TestLoop()
    opened = []

    def open_it(server: NbdServer, **options: object) -> BlockBackend:
        on_error = options.pop("on_error", None)
        options = {"format": "raw", **options}
        opened.append(
            open_drive(
                DriveOptions(f"nbd:unix:{server.path}", **options),  # type: ignore[arg-type]
                loop=loop,
                clock=loop.clock,
                on_error=on_error,  # type: ignore[arg-type]
            )
        )
        return opened[-1]

    yield open_it
    for backend in opened:
        backend.close()
    loop.close()
    assert loop.errors == []


def lane_moved(backend: BlockBackend) -> tuple[int, int]:
    """(reads, writes) that were done, and none of them as a request of the backend's."""
    assert backend._submitted == 0
    return backend.stats.read.operations, backend.stats.write.operations


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("ring", [{}, {"packed": True}, {"indirect": True}], ids=str)
def test_chains_go_by_the_lane(serve: Serve, on: Open, structured: bool, ring: dict[str, bool]) -> None:
    server = serve(structured=structured)
    bench = BlkBench(on(server), ring=ring)
    assert type(bench.disk._fast[0]) is WaitingBlk
    assert bench.read(5, 3) == server.data[5 * SECTOR : 8 * SECTOR]
    assert bench.write(9, b"w" * 4096) == OK
    assert server.data[9 * SECTOR : 17 * SECTOR] == b"w" * 4096
    assert bench.read(0, 600) == server.data[: 600 * SECTOR]  # past our buffer, into the guest's memory
    assert lane_moved(bench.backend) == (2, 1)
    assert bench.flush() == OK
    assert server.asked[-1].kind == 3


def test_what_is_adjacent_is_asked_for_as_one(serve: Serve, on: Open) -> None:
    server = serve()
    bench = BlkBench(on(server))
    numbers = [bench.add([header(blk.T_IN, 2 * n)], [1000, 24, 1]) for n in range(10)]
    numbers.append(bench.add([header(blk.T_OUT, 100), b"o" * SECTOR], [1]))
    bench.serve()
    assert [bench.wait(number) for number in numbers] == [OK] * 11
    before = bytes(range(256)) * 40
    assert b"".join(bench.data(number)[:-1] for number in numbers[:-1]) == before
    assert [(asked.kind, asked.offset, asked.length) for asked in server.asked] == [
        (READ, 0, 10240),
        (WRITE, 100 * SECTOR, SECTOR),
    ]
    assert lane_moved(bench.backend) == (10, 1)
    assert bench.backend.stats.read.merged == 9


def fails(number: int) -> Answer:
    return lambda client, asked: client.simple(asked, number)


def test_what_the_server_fails_has_the_drives_policy(serve: Serve, on: Open) -> None:
    server = serve(answer=fails(28))
    stops: list[tuple[str, int, str]] = []
    bench = BlkBench(on(server, on_error=lambda drive, *what: stops.append(what)))
    number = bench.add([header(blk.T_OUT, 3), b"x" * SECTOR], [1])
    bench.serve()
    wait_for(lambda: bench.backend.stalled == 1)
    assert stops == [("write", 28, "stop")]
    assert number not in bench.used()
    server.answer = server.tell_the_truth
    bench.backend.resume()
    assert bench.wait(number) == OK
    assert server.data[3 * SECTOR : 4 * SECTOR] == b"x" * SECTOR
    assert bench.read(3, 1) == b"x" * SECTOR


def test_what_the_server_fails_is_told_where_the_policy_says_so(serve: Serve, on: Open) -> None:
    server = serve(answer=fails(5))
    bench = BlkBench(on(server, rerror="report"))
    assert bench.read(0, 1) == IOERR
    assert bench.backend.stats.read.failed == 1


LIES: dict[str, Answer] = {
    "garbage": lambda client, asked: client.put(b"\xff" * 64),
    "another's cookie": lambda client, asked: client.put(pack(">IIQ", 0x67446698, 0, asked.cookie + 1)),
    "half of it": lambda client, asked: client.chunk(asked, 1, pack(">Q", asked.offset) + b"x" * 512),
    "too much": lambda client, asked: client.chunk(asked, 1, pack(">Q", asked.offset) + bytes(asked.length + 1)),
    "the end": lambda client, asked: client.line.shutdown(socket.SHUT_RDWR),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_ends_the_connection_and_the_requests_are_asked_again(serve: Serve, on: Open, name: str) -> None:
    server = serve()
    bench = BlkBench(on(server, reconnect_delay=60))
    honest, lies = server.answer, iter([LIES[name]] * 3)
    server.answer = lambda client, asked: next(lies, honest)(client, asked)
    numbers = [bench.add([header(blk.T_IN, 16 * n)], [4096, 1]) for n in range(20)]
    bench.serve()
    for n, number in enumerate(numbers):
        assert bench.wait(number) == OK
        assert bench.data(number)[:-1] == server.data[16 * n * SECTOR :][:4096]


def test_without_a_policy_to_wait_a_lost_server_is_an_error(serve: Serve, on: Open) -> None:
    server = serve(answer=LIES["the end"])
    bench = BlkBench(on(server, rerror="report"))
    assert bench.read(8, 8) == IOERR
    server.answer = server.tell_the_truth
    wait_for(lambda: bench.read(8, 8) == server.data[8 * SECTOR : 16 * SECTOR])


def test_one_that_says_nothing_is_lost_to_the_lane_too(serve: Serve, on: Open) -> None:
    server = serve(answer=lambda client, asked: None)
    bench = BlkBench(on(server, rerror="report", timeout=1))
    assert bench.read(8, 8) == IOERR


class Slow:
    """Answers when it is told to."""

    def __init__(self, server: NbdServer) -> None:
        self.go = threading.Event()
        self.came = threading.Event()
        self._server = server
        server.answer = self

    def __call__(self, client: Client, asked: Asked) -> None:
        self.came.set()
        assert self.go.wait(LIMIT_S)
        self._server.tell_the_truth(client, asked)


def test_a_reset_waits_and_what_comes_then_is_nobodys(serve: Serve, on: Open) -> None:
    """2.4: what is in flight is waited for, and answered by nobody."""
    server = serve()
    slow = Slow(server)
    bench = BlkBench(on(server))
    number = bench.add([header(blk.T_IN, 8)], [SECTOR, 1])
    bench.serve()
    assert slow.came.wait(LIMIT_S)
    done = threading.Event()

    def reset() -> None:
        with bench.disk.lock:
            bench.disk.write_status(0)
        done.set()

    thread = threading.Thread(target=reset)
    thread.start()
    wait_for(lambda: not bench.disk.live)
    assert not done.is_set()
    slow.go.set()
    thread.join(LIMIT_S)
    assert done.is_set()
    assert number not in bench.used()
    assert bench.data(number)[-1] == 0  # its status was zero, and is untouched with the rest of the ring
    bench.drivers = bench.start((1 << 28) - 1)
    bench._used = [{}]
    assert bench.read(8, 1) == server.data[8 * SECTOR : 9 * SECTOR]


def test_a_drain_waits_for_the_lane_and_for_what_it_gives_back(serve: Serve, on: Open) -> None:
    server = serve()
    slow = Slow(server)
    bench = BlkBench(on(server, rerror="report"))
    number = bench.add([header(blk.T_IN, 8)], [SECTOR, 1])
    bench.serve()
    assert slow.came.wait(LIMIT_S)
    threading.Timer(0.05, slow.go.set).start()
    server.answer = fails(5)  # of what is given back
    slow._server = type("Lies", (), {"tell_the_truth": staticmethod(fails(5))})()
    bench.backend.drain()
    assert number in bench.used()
    assert bench.data(number)[-1] == IOERR


def test_a_state_is_saved_when_the_lane_is_at_rest(serve: Serve, on: Open) -> None:
    server = serve(answer=fails(28))
    bench = BlkBench(on(server))
    bench.add([header(blk.T_OUT, 3), b"x" * SECTOR], [1])
    bench.serve()
    wait_for(lambda: bench.backend.stalled == 1)
    bench.backend.drain()
    assert [len(each) for each in bench.disk.save()["asked"]] == [1]
    server.answer = server.tell_the_truth


def test_what_the_lane_may_not_do_is_the_backends(serve: Serve, on: Open) -> None:
    server = serve(blocks=(1024, 4096, 65536))
    bench = BlkBench(on(server, cache="writethrough"))
    before = bytes(server.data)
    assert bench.read(1, 1) == before[SECTOR : 2 * SECTOR]  # no whole block
    assert bench.read(0, 256) == before[: 256 * SECTOR]  # more than a payload has
    assert bench.write(2, b"y" * 1024) == OK
    assert (server.asked[-1].kind, server.asked[-1].flags) == (WRITE, 1)  # stable at once
    assert bench.backend._submitted == 3
    assert bench.read(2, 2) == b"y" * 1024
    assert bench.backend._submitted == 3


def test_a_disk_that_nobody_has_is_freed(serve: Serve, on: Open) -> None:
    server = serve()
    slow = Slow(server)
    bench = BlkBench(on(server))
    bench.add([header(blk.T_IN, 8)], [SECTOR, 1])
    bench.serve()
    assert slow.came.wait(LIMIT_S)
    gone = weakref.ref(bench.disk)
    del bench
    gc.collect()
    assert gone() is not None  # its memory is lent
    slow.go.set()

    def freed() -> bool:
        gc.collect()
        return gone() is None

    wait_for(freed)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_requests_against_a_model(serve: Serve, on: Open, seed: int) -> None:
    """In batches, of which no two requests overlap; the server hangs up now and then."""
    server = serve()
    rng = random.Random(seed)
    honest = server.answer
    server.answer = lambda client, asked: (
        client.line.shutdown(socket.SHUT_RDWR) if rng.random() < 0.02 else honest(client, asked)
    )
    bench = BlkBench(on(server, reconnect_delay=60), ring={"packed": bool(seed & 1), "indirect": True})
    model = bytearray(server.data)
    for _ in range(40):
        at, batch = 0, []
        while at < 1500 and len(batch) < 30:
            at += rng.choice((0, 0, 1, 40))
            count = rng.choice((1, 2, 8, 40))
            span = slice(at * SECTOR, (at + count) * SECTOR)
            if rng.random() < 0.5:
                data = rng.randbytes(count * SECTOR)
                model[span] = data
                batch.append((bench.add([header(blk.T_OUT, at), data], [1]), b""))
            else:
                batch.append((bench.add([header(blk.T_IN, at)], [count * SECTOR, 1]), bytes(model[span])))
            at += count
        bench.serve()
        for number, data in batch:
            assert bench.wait(number) == OK
            assert bench.data(number)[:-1] == data
    assert server.data == model
