"""A card with several queue pairs, each served by a thread of its own, as a board has it (virtio 1.2, 5.1.6.5.5)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from net_bench import HEADER_BYTES, MAC, NetBench, PlayTap, frame
from test_virtio_net import ALL
from waiting import wait_for

from pyvmm.devices.virtio.net import VirtioNet
from pyvmm.io_thread import IoThreads

NO_HEADER = bytes(HEADER_BYTES)
PAIRS = 3
LIMIT_S = 20.0


class Settled:
    """In the place of a test's own watcher: the threads need nobody."""

    def settle(self) -> None:
        pass


class Tap(PlayTap):
    """A queue that is attached or detached has no frame under way: nobody else may have its lanes."""

    card: VirtioNet
    there = 1

    def enable_pairs(self, count: int) -> None:
        super().enable_pairs(count)
        for pair in range(min(count, self.there), max(count, self.there)):
            for queue in self.card.queues[2 * pair : 2 * pair + 2]:
                assert not self.can_be_taken(queue.lock) or not self.card.live
        self.there = count

    def can_be_taken(self, lock: object) -> bool:
        """By another thread than this one."""
        got = threading.Event()

        def take() -> None:
            with lock:  # type: ignore[attr-defined]
                got.set()

        threading.Thread(target=take, daemon=True).start()
        return got.wait(0.02)


class Bench(NetBench):
    def make(self, pairs: int) -> VirtioNet:
        card = super().make(pairs)
        self.errors: list[BaseException] = []
        self.threads = IoThreads(self.errors.append)
        made = [self.threads.make() for _ in range(pairs)]
        card.io, card.ios = made[0], dict(enumerate(made[1:], 1))
        assert card.thread_per_queue
        for queue in card.queues:
            made[card.thread_of(queue)].add_reader(queue.kick_fd, lambda q=queue: card.serve(q), edge=True)
        self.backend.__class__ = Tap
        self.backend.card = card
        self.io = Settled()
        self.threads.resume()
        return card

    def close(self) -> None:
        self.threads.close()
        for queue in self.card.queues:
            os.close(queue.kick_fd)
        self.backend.close()
        for peer in self.peers:
            peer.close()

    def use(self, pairs: int) -> None:
        """The driver's command, and its answer."""
        number = self.control.add([bytes((4, 0)), pairs.to_bytes(2, "little")], [1])
        self.card.kick(self.control.queue)
        used: list[tuple[int, int]] = []
        wait_for(lambda: used.extend(self.control.used()) or used)
        assert used == [(number, 1)]
        assert self.control.data(number) == b"\0"


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench("tap", pairs=PAIRS, take=ALL)
    yield made
    made.close()
    assert made.errors == []
    assert made.card.faults == 0


def test_a_pair_whose_thread_is_busy_holds_up_no_other(bench: Bench) -> None:
    bench.use(PAIRS)
    go_on, held = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        assert go_on.wait(LIMIT_S)

    bench.card.ios[1].call_soon(hold)
    assert held.wait(LIMIT_S)
    for pair in range(PAIRS):
        bench.give(2048, pair=pair)
        bench.peers[pair].send(NO_HEADER + frame(pair))
        bench.send(frame(pair), pair=pair)
    received: dict[int, list[bytes]] = {pair: [] for pair in range(PAIRS)}
    went: dict[int, list[bytes]] = {pair: [] for pair in range(PAIRS)}

    def look(*pairs: int) -> bool:
        for pair in pairs:
            received[pair] += [data for _, data in bench.received(pair)]
            went[pair] += bench.went(pair)
        return all(received[pair] and went[pair] for pair in pairs)

    wait_for(lambda: look(0, 2))
    look(1)
    assert (received[1], went[1]) == ([], [])
    go_on.set()
    wait_for(lambda: look(1))
    for pair in range(PAIRS):
        assert (received[pair], went[pair]) == ([frame(pair)], [NO_HEADER + frame(pair)])


def test_frames_go_in_order_while_the_driver_changes_how_many_pairs_it_uses(bench: Bench) -> None:
    bench.use(PAIRS)
    over = threading.Event()
    came: dict[int, list[int]] = {pair: [] for pair in range(PAIRS)}

    def pump(pair: int) -> None:
        """A driver at one pair, and who is at its other end: frames each way."""
        number = 0
        while not over.is_set() or number % 8:
            if bench.tx[pair].free >= 2:
                bench.tx[pair].add([NO_HEADER, MAC + MAC + number.to_bytes(4, "little") + bytes(60)])
                bench.card.kick(bench.tx[pair].queue)
                number += 1
            bench.tx[pair].used()
            for data in bench.went(pair):
                came[pair].append(int.from_bytes(data[24:28], "little"))
            if bench.rx[pair].free:
                bench.give(2048, pair=pair, kick=False)
                bench.card.kick(bench.rx[pair].queue)
            try:
                bench.peers[pair].send(NO_HEADER + frame(number))
            except BlockingIOError:
                pass
            bench.received(pair)
        sent[pair] = number

    sent: dict[int, int] = {}
    pumps = [threading.Thread(target=pump, args=(pair,)) for pair in range(PAIRS)]
    for thread in pumps:
        thread.start()
    for n in range(16):
        bench.use((1, 3, 2, 3)[n % 4])
    bench.use(PAIRS)
    over.set()
    for thread in pumps:
        thread.join(LIMIT_S)
    for pair in range(PAIRS):

        def all_there(pair: int = pair) -> bool:
            came[pair] += [int.from_bytes(data[24:28], "little") for data in bench.went(pair)]
            return len(came[pair]) == sent[pair]

        wait_for(all_there)
        assert came[pair] == list(range(sent[pair]))


def test_a_reset_while_all_of_them_work(bench: Bench) -> None:
    for _ in range(10):
        bench.use(PAIRS)
        for pair in range(PAIRS):
            bench.give(*[2048] * 8, pair=pair)
            bench.send(*[frame(n) for n in range(8)], pair=pair)
            bench.peers[pair].send(NO_HEADER + frame(pair))
        with bench.card.lock:
            bench.card.write_status(0)
        for pair in range(PAIRS):
            bench.went(pair)
        bench.start()
