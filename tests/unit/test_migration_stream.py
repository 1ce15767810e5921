"""What a stranger may send to `pyvmm run --incoming`: it is one sentence, and nothing is started."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm import Machine
from pyvmm import migration_stream as ms
from pyvmm.errors import ConfigError, HostError, StateError, VmmError
from pyvmm.machine_state import MachineState
from pyvmm.migration import Arrival
from pyvmm.migration_stream import FRAME, MAGIC, MigrationStream
from pyvmm.msgpack import pack

GREETING = MAGIC + ms.FORMAT.to_bytes(4, "little")


def frame(kind: int, data: bytes = b"", length: int | None = None) -> bytes:
    return FRAME.pack(kind, len(data) if length is None else length) + data


def head() -> dict[str, Any]:
    with Machine(accel="qtest", machine="microvm", memory_mib=1) as m:
        state = MachineState(m.board.chassis, m.board, m.board.platform)
        return {"spec": m.config.plain(), "machine": state.description(), "images": {}}


HEAD = head()


def arrived(said: bytes) -> Machine:
    """The machine that comes of it, on a board without KVM; whatever is raised."""
    here, there = socket.socketpair()
    sender = threading.Thread(target=speak, args=(there, said))
    sender.start()
    try:
        with MigrationStream(here) as stream, stream.told_why():
            return Machine.of_arrival(Arrival(stream, "a test"), None, None, {})
    finally:
        sender.join()


def speak(there: socket.socket, said: bytes) -> None:
    """All of it, and then the end; what is answered is not looked at."""
    try:
        there.sendall(said)
        there.shutdown(socket.SHUT_WR)
        while there.recv(1 << 16):
            pass
    except OSError:
        pass
    finally:
        there.close()


def whole(pages: bytes = b"") -> bytes:
    with Machine(accel="qtest", machine="microvm", memory_mib=1) as m:
        state = m.save_state(memory=False)
    return GREETING + frame(ms.HEAD, pack(HEAD)) + pages + frame(ms.STATE, pack(state["parts"])) + frame(ms.GO)


def test_what_pyvmm_says_is_a_machine() -> None:
    page = bytes(range(256)) * 16
    pages = frame(ms.PAGES, (8192).to_bytes(8, "little") + page + page)
    pages += frame(ms.ZEROS, (8192).to_bytes(8, "little") + (4096).to_bytes(8, "little"))
    with arrived(whole(pages)) as m:
        assert m.memory.read(8192, 8192) == bytes(4096) + page
        assert m.memory.read(0, 8192) == bytes(8192)


@pytest.mark.parametrize(
    ("said", "error", "sentence"),
    [
        (b"", HostError, "the other side is gone"),
        (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", StateError, "the peer sends no machine"),
        (MAGIC + b"\7\0\0\0", StateError, "the peer speaks version 7, this pyvmm 1"),
        (GREETING + frame(ms.HEAD, b"", 1 << 31), StateError, "HEAD has 2147483648 bytes"),
        (GREETING + frame(ms.HEAD, b"", 1 << 20), HostError, "the other side is gone"),
        (GREETING + frame(99), StateError, "the peer said kind 99, where HEAD was due"),
        (GREETING + frame(ms.GO), StateError, "the peer said GO, where HEAD was due"),
        (GREETING + frame(ms.HEAD, pack([1])), StateError, "no dict"),
        (GREETING + frame(ms.HEAD, pack({**HEAD, "images": {"flat": 1 << 40}})), StateError, "an image's size is"),
        (GREETING + frame(ms.HEAD, pack({**HEAD, "images": 7})), StateError, "images is 7, no dict"),
        (
            GREETING + frame(ms.HEAD, pack({**HEAD, "images": {"flat": 4}})) + frame(ms.IMAGE, b"12345"),
            StateError,
            "a piece of 5 bytes of flat is none of its 4",
        ),
        (
            GREETING + frame(ms.HEAD, pack({**HEAD, "spec": {**HEAD["spec"], "memory_mib": "x"}})),
            ConfigError,
            "memory_mib='x': give a whole number",
        ),
    ],
)
def test_what_it_may_not_be(said: bytes, error: type[VmmError], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as caught:
        arrived(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pages",
    [
        frame(ms.PAGES, (1 << 20).to_bytes(8, "little") + bytes(4096)),
        frame(ms.PAGES, (1).to_bytes(8, "little") + bytes(4096)),
        frame(ms.PAGES, bytes(8) + bytes(100)),
        frame(ms.PAGES, bytes(8)),
        frame(ms.ZEROS, bytes(8) + (1 << 63).to_bytes(8, "little")),
        frame(ms.PAGES, ((1 << 64) - 4096).to_bytes(8, "little") + bytes(8192)),
    ],
)
def test_memory_that_the_guest_has_not(pages: bytes) -> None:
    with pytest.raises(StateError, match="the guest has no such pages"):
        arrived(whole(pages))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_hostile_stream(data: st.DataObject) -> None:
    """Something in it is changed, cut off or put in: a machine, or one sentence."""
    said = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.one_of(st.integers(0, 60), st.integers(0, len(said) - 1)))
        what = data.draw(st.sampled_from(("change", "cut", "put")))
        if what == "change":
            said[min(at, len(said) - 1)] = data.draw(st.integers(0, 255))
        elif what == "cut":
            del said[max(1, at) :]
        else:
            said[at:at] = data.draw(st.binary(max_size=16))
    try:
        arrived(bytes(said)).close()
    except VmmError as error:
        assert "\n" not in str(error)


WHOLE = whole(frame(ms.PAGES, bytes(8) + bytes(4096)))


def test_a_silent_peer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ms, "SILENCE_S", 0.2)
    here, there = socket.socketpair()
    with MigrationStream(here) as stream:
        with pytest.raises(HostError, match="was silent"):
            stream.meet()
        with pytest.raises(HostError, match="was silent"):
            stream.send(ms.IMAGE, bytes(1 << 24))
    there.close()


def test_it_is_called_off_in_each_wait() -> None:
    calls: list[Callable[[MigrationStream], object]] = [
        MigrationStream.meet,
        lambda stream: stream.send(ms.IMAGE, bytes(1 << 24)),
    ]
    for call in calls:
        here, there = socket.socketpair()
        off = threading.Event()
        with MigrationStream(here, off.is_set) as stream:
            threading.Timer(0.2, off.set).start()
            with pytest.raises(ms.Cancelled):
                call(stream)
        there.close()


def test_why_the_other_side_refuses_is_one_line() -> None:
    here, there = socket.socketpair()
    there.sendall(frame(ms.REFUSED, "no\x1b[2J room\nfor Zo\u00eb\xff".encode()))
    there.close()
    with MigrationStream(here) as stream, pytest.raises(StateError, match="refuses") as caught:
        stream.answer(ms.READY)
    assert str(caught.value) == "the other side refuses: no?[2J room?for Zo\u00eb\xff"
