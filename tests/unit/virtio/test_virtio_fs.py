"""A device whose queues a vhost-user back end serves (OASIS virtio 1.2, 5.11): in machines without vCPUs, and a back
end of the test's own, which answers each request with its bytes backwards.
"""

from __future__ import annotations

import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import vhost_back_end as b
from machine_guest import MachineGuest
from waiting import wait_for

import pyvmm
from pyvmm.devices.virtio import mmio
from pyvmm.devices.virtio.device import F_RING_RESET, F_VERSION_1, NEEDS_RESET
from pyvmm.devices.virtio.ring import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from pyvmm.errors import ConfigError, StateError
from pyvmm.vhost_user import link
from pyvmm.x86 import layout

BOARDS = pytest.mark.parametrize("board", ["microvm", "pc"])
HIPRIO, REQUEST = 0, 1
NAME = "share data"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def back_end(path: Path) -> Iterator[b.BackEnd]:
    made = b.BackEnd(path)
    yield made
    made.close()


def machine(path: Path, board: str = "microvm", **options: Any) -> pyvmm.Machine:
    return pyvmm.Machine(
        machine=board, accel="qtest", memory_mib=16, shares=[f"tag=data,socket={path}"], **options
    )


class Guest(MachineGuest):
    def __init__(self, m: pyvmm.Machine) -> None:
        super().__init__(m, NAME)
        self.requests = 0

    def begin(self) -> None:
        self.start(0, HIPRIO, REQUEST)

    def begin_unsure(self) -> None:
        """The same where the device may be broken before it is all done."""
        try:
            self.begin()
        except AssertionError:
            assert self.device.status & NEEDS_RESET

    def ask(self, queue: int = REQUEST) -> None:
        """One request, and its answer."""
        self.give(queue)
        self.answered(queue)

    def give(self, queue: int = REQUEST) -> None:
        self.requests += 1
        self.data = f"request {self.requests}".encode()
        self.chain = self.drivers[queue].add([self.data], [100])
        self.notify(queue)

    def answered(self, queue: int = REQUEST) -> None:
        assert self.used(queue) == [(self.chain, len(self.data))]
        assert self.drivers[queue].data(self.chain)[: len(self.data)] == self.data[::-1]


# -- serving -------------------------------------------------------------------------------------------------------


@BOARDS
def test_requests_are_answered_by_the_back_end_and_interrupt(path: Path, back_end: b.BackEnd, board: str) -> None:
    with machine(path, board) as m:
        guest = Guest(m)
        assert bytes(guest.config(n, 1) for n in range(36)).rstrip(b"\0") == b"data"
        assert guest.config(36, 4) == 1
        guest.begin()
        for n in range(40):  # more than the ring is long
            guest.ask((HIPRIO, REQUEST)[n % 3 > 0])
        assert all(queue.taken == 0 for queue in guest.device.queues)
        wait_for(lambda: all(queue.notified > 1 for queue in guest.device.queues))
        assert back_end.served == 40
        if board == "microvm":
            assert m.mmio.read(layout.VIRTIO_MMIO + mmio.INTERRUPT_STATUS, 4) & mmio.USED_BUFFER


def test_what_is_offered_is_what_the_back_end_has(path: Path) -> None:
    for more in (0, F_INDIRECT_DESC | F_RING_PACKED):
        back_end = b.BackEnd(path, features=F_VERSION_1 | b.F_PROTOCOL | more | 1)
        with machine(path, virtio_ring="packed") as m:
            device = m.devices[NAME]
            assert device.offered == F_VERSION_1 | F_RING_RESET | more  # type: ignore[attr-defined]
            assert not device.offered & F_EVENT_IDX  # type: ignore[attr-defined]
            guest = Guest(m)
            guest.start(more & F_INDIRECT_DESC, REQUEST)
            back_end.wait_for(lambda: b.ENABLE in back_end.requests)  # noqa: B023
            assert back_end.negotiated == F_VERSION_1 | b.F_PROTOCOL | more & F_INDIRECT_DESC
        back_end.close()
        path.unlink()


def test_a_back_end_without_protocol_features_serves_too(path: Path) -> None:
    back_end = b.BackEnd(path, features=F_VERSION_1)
    with machine(path) as m:
        guest = Guest(m)
        guest.begin()
        guest.ask()
        assert b.GET_PROTOCOL not in back_end.requests and b.ENABLE not in back_end.requests
    back_end.close()


def test_an_interrupt_goes_to_the_eventfd_that_is_the_queues_own(path: Path, back_end: b.BackEnd) -> None:
    with machine(path) as m:
        guest = Guest(m)
        queue = guest.device.queues[REQUEST]
        guest.begin()
        guest.ask()
        fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        for fd in fds:
            # What a transport does where an irqfd is the queue's, and another one.
            with queue.lock:
                queue.call_fd = fd
            guest.device.call_changed(queue)
            wait_for(lambda: fd_count(fd))  # noqa: B023  # one more, for any that the former one got
            guest.ask()
            wait_for(lambda: fd_count(fd))  # noqa: B023
        assert fd_count(fds[0]) == 0
        with queue.lock:
            queue.call_fd = -1
        guest.device.call_changed(queue)
        back_end.wait_for(lambda: back_end.requests.count(b.CALL) == 5)
        notified = queue.notified
        guest.ask()
        wait_for(lambda: queue.notified > notified)
        for fd in fds:
            os.close(fd)


def fd_count(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


# -- stopping ------------------------------------------------------------------------------------------------------


@BOARDS
def test_a_reset_stops_the_rings_and_they_begin_anew(path: Path, back_end: b.BackEnd, board: str) -> None:
    with machine(path, board) as m:
        guest = Guest(m)
        for _ in range(3):
            guest.begin()
            guest.ask()
            guest.set_status(0)
            # It has given both rings back by the time that the register was written.
            assert back_end.requests.count(b.GET_VRING_BASE) % 2 == 0
            assert all(ring.kick < 0 for ring in back_end.rings)
        assert back_end.served == 3
        assert back_end.connections == 1


def test_one_queue_is_reset_and_the_other_one_goes_on(path: Path, back_end: b.BackEnd) -> None:
    with machine(path) as m:
        guest = Guest(m)
        guest.start(F_RING_RESET, HIPRIO, REQUEST)
        guest.ask()
        guest.ask(HIPRIO)
        guest._put(mmio.QUEUE_SEL, (0, 0), REQUEST)
        guest._put(mmio.QUEUE_RESET, (0, 0), 1)
        assert back_end.rings[REQUEST].kick < 0 <= back_end.rings[HIPRIO].kick
        guest.ask(HIPRIO)
        queue = guest.device.queues[REQUEST]
        guest.drivers[REQUEST] = type(guest.drivers[REQUEST])(m.memory, queue, base=0x40_0000, size=16, enable=False)
        guest._put(mmio.QUEUE_READY, (0, 0), 1)
        guest.ask()
        guest.ask(HIPRIO)


def test_nothing_is_served_while_guest_time_stands_and_all_of_it_then(path: Path, back_end: b.BackEnd) -> None:
    with machine(path) as m:
        guest = Guest(m)
        guest.begin()
        for _ in range(5):
            guest.ask()
            guest.device.hold()  # type: ignore[attr-defined]
            assert all(ring.kick < 0 for ring in back_end.rings)
            guest.give()
            guest.device.go_on()  # type: ignore[attr-defined]
            guest.answered()


# -- back ends that are no good ------------------------------------------------------------------------------------


def broken(m: pyvmm.Machine) -> list[str]:
    """Why, once somebody hears of it."""
    told: list[str] = []
    m.events.listen(lambda event: told.append(event.data["why"]), "device-broken")
    return told


@BOARDS
def test_a_back_end_that_goes_leaves_a_broken_device_until_there_is_another_one(
    path: Path, back_end: b.BackEnd, board: str
) -> None:
    with machine(path, board) as m:
        told = broken(m)
        guest = Guest(m)
        guest.begin()
        guest.ask()
        for n in range(2):
            back_end.hang_up()
            wait_for(lambda: guest.device.status & NEEDS_RESET)
            wait_for(lambda: len(told) == n + 1)  # noqa: B023
            assert told[-1] == "its back end can't be used: it has gone"
            guest.notify(REQUEST)
            guest.set_status(0)
            guest.begin()
            guest.ask()
        assert back_end.connections == 3


def test_one_that_has_gone_before_the_driver_came_is_found_again(path: Path, back_end: b.BackEnd) -> None:
    with machine(path) as m:
        back_end.hang_up()
        guest = Guest(m)
        guest.begin()
        guest.ask()
        assert back_end.connections == 2
        assert guest.device.faults == 0


def number(request: int, value: int) -> Callable[[bytes], bytes]:
    return lambda said: struct.pack("<IIIQ", request, 5, 8, value)


LIES: list[tuple[int, b.Fault, str]] = [
    (b.SET_MEM_TABLE, number(b.SET_MEM_TABLE, 1), "it refuses request 5, with 1"),
    (b.VRING_NUM, number(b.VRING_ADDR, 0), "its answer to request 8 is message 9 with flags 0x5 and 8 bytes"),
    (b.VRING_ADDR, lambda said: said[:4] + struct.pack("<I", 1) + said[8:], "with flags 0x1"),
    (b.CALL, lambda said: said[:8] + struct.pack("<I", 1 << 31) + said[12:], "and 2147483648 bytes"),
    (b.KICK, lambda said: said + b"more", "its answer to request 18 is message"),
    (b.ENABLE, lambda said: None, "it does not answer"),
    (b.ENABLE, lambda said: said[:13], "it does not answer"),
]


@pytest.mark.parametrize(("request_", "fault", "why"), LIES, ids=[f"{n}" for n in range(len(LIES))])
def test_a_back_end_that_lies_or_waits_leaves_a_broken_device(
    monkeypatch: pytest.MonkeyPatch, path: Path, back_end: b.BackEnd, request_: int, fault: b.Fault, why: str
) -> None:
    monkeypatch.setattr(link, "LONGEST_ANSWER_S", 0.3)
    back_end.faults[request_] = fault
    with machine(path) as m:
        told = broken(m)
        guest = Guest(m)
        guest.set_status(0)
        guest.begin_unsure()
        wait_for(lambda: told)
        assert why in told[0]
        assert guest.device.status & NEEDS_RESET
        back_end.faults.clear()
        guest.set_status(0)
        guest.begin()
        guest.ask()


def test_a_word_that_nobody_asked_for_breaks_it(path: Path, back_end: b.BackEnd) -> None:
    with machine(path) as m:
        told = broken(m)
        guest = Guest(m)
        guest.begin()
        guest.ask()
        back_end.say(b"hello")
        wait_for(lambda: told)
        # The guest's answer may be there before the last ring is on: then the word comes in place of an answer to that.
        assert len(told) == 1
        assert re.search(r": (it says what nobody asked for|its answer to request \d+ is message \d+ .*)$", told[0])


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (lambda said: None, "it does not answer"),
        (lambda said: said[:12] + struct.pack("<II", 7, 0), "and answers for ring 7"),
    ],
)
def test_a_reset_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, path: Path, back_end: b.BackEnd, fault: b.Fault, why: str
) -> None:
    monkeypatch.setattr(link, "LONGEST_WORK_S", 0.3)
    with machine(path) as m:
        told = broken(m)
        guest = Guest(m)
        guest.begin()
        guest.ask()
        back_end.faults[b.GET_VRING_BASE] = fault
        guest.set_status(0)
        assert guest.device.status == 0
        wait_for(lambda: told)
        assert why in told[0]
        back_end.faults.clear()
        guest.begin()
        guest.ask()


@pytest.mark.parametrize(
    ("options", "faults", "sentence"),
    [
        ({"features": b.F_PROTOCOL}, {}, "share data: its back end knows no virtio 1.0: use a newer one"),
        ({"queues": 1}, {}, "share data: its back end has 1 queues, 2 are needed"),
        ({}, {b.GET_FEATURES: lambda said: said[:12]}, "share data: its back end can't be used: it does not answer"),
        ({}, {b.GET_PROTOCOL: lambda said: b"HTTP/1.1 400 Bad"}, "its answer to request 15 is message 1347703880"),
    ],
)
def test_a_back_end_that_is_none_is_told_before_the_machine_runs(
    monkeypatch: pytest.MonkeyPatch, path: Path, options: dict[str, int], faults: dict[int, b.Fault], sentence: str
) -> None:
    monkeypatch.setattr(link, "LONGEST_ANSWER_S", 0.3)
    back_end = b.BackEnd(path, **options)
    back_end.faults = faults
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError) as caught:
        machine(path)
    assert sentence in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the back end's own
    back_end.close()


def test_nobody_there(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"share data: socket=.*/s: No such file or directory: start its back end"):
        machine(path)


def test_a_close_does_not_wait_for_a_back_end(path: Path, back_end: b.BackEnd) -> None:
    m = machine(path)
    guest = Guest(m)
    guest.begin()
    guest.ask()
    back_end.faults[b.GET_VRING_BASE] = lambda said: None
    closing = threading.Thread(target=m.close)
    closing.start()
    closing.join(link.LONGEST_ANSWER_S)
    assert not closing.is_alive()


# -- state ---------------------------------------------------------------------------------------------------------


def test_a_share_that_is_in_use_can_not_be_saved_and_is_told_beforehand(
    path: Path, back_end: b.BackEnd, tmp_path: Path
) -> None:
    with machine(path) as m:
        guest = Guest(m)
        state = m.devices[NAME].save()
        guest.begin()
        guest.ask()
        why = "share data is in use, and what its back end knows of the guest can't be saved: unmount it"
        with pytest.raises(StateError, match=why):
            m.devices[NAME].save()
        with pytest.raises(StateError, match=why):
            m.save(tmp_path / "snapshot")
        with pytest.raises(StateError, match=why):
            m.fork()
        assert not (tmp_path / "snapshot").exists()
        guest.ask()
        live = dict(state, virtio=dict(state["virtio"], status=guest.device.status, features=F_VERSION_1))
        guest.set_status(0)
        assert m.devices[NAME].save() == dict(state, virtio=dict(state["virtio"]))
        with pytest.raises(StateError, match="it is damaged"):
            m.devices[NAME].load(live)


@BOARDS
def test_one_that_nobody_uses_is_saved_and_goes_on(path: Path, back_end: b.BackEnd, tmp_path: Path, board: str) -> None:
    with machine(path, board) as m:
        guest = Guest(m)
        guest.begin()
        guest.ask()
        guest.set_status(0)
        m.save(tmp_path / "snapshot")
    with pyvmm.Machine.restore(str(tmp_path / "snapshot")) as m:
        guest = Guest(m)
        guest.begin()
        guest.ask()
