"""Consoles on virtio in a whole machine without a vCPU: registers, doorbells, the device's thread, the host's ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from machine_guest import MachineGuest
from waiting import wait_for

import pyvmm
from pyvmm.chardev import PtyChardev
from pyvmm.console_options import ConsoleOptions
from pyvmm.devices.virtio import console_control as control
from pyvmm.devices.virtio.console import EMERG_WRITE, F_MULTIPORT, F_SIZE
from pyvmm.devices.virtio.ring import F_RING_PACKED

BOARDS = pytest.mark.parametrize("board", ["microvm", "pc"])
RINGS = pytest.mark.parametrize("ring", ["split", "packed"])


def machine(board: str, *consoles: object, ring: str = "split") -> pyvmm.Machine:
    return pyvmm.Machine(
        machine=board, accel="qtest", memory_mib=16, consoles=consoles, virtio_ring=ring  # type: ignore[arg-type]
    )


def start(m: pyvmm.Machine, features: int, *queues: int, ring: str = "split") -> MachineGuest:
    guest = MachineGuest(m, "console")
    packed = ring == "packed"
    guest.start(features | (F_RING_PACKED if packed else 0), *queues, packed=packed)
    return guest


@BOARDS
@RINGS
def test_one_console(board: str, ring: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with machine(board, f"file:{log}", ring=ring) as m:
        guest = start(m, F_SIZE, 0, 1, ring=ring)
        chains = [guest.drivers[1].add([b"line %d\n" % n]) for n in range(10)]
        guest.notify(1)
        assert guest.used(1, 10) == [(chain, 0) for chain in chains]
        assert log.read_bytes() == b"".join(b"line %d\n" % n for n in range(10))
        guest.write_config(EMERG_WRITE, 4, ord("!"))
        assert log.read_bytes()[-1:] == b"!"
        chain = guest.drivers[0].add([], [100])
        guest.notify(0)
        m.consoles["hvc0"].feed(b"root\n")
        assert guest.used(0) == [(chain, 5)]
        assert guest.drivers[0].data(chain)[:5] == b"root\n"


@BOARDS
@RINGS
def test_a_console_and_a_port(board: str, ring: str) -> None:
    said: list[bytes] = []
    with machine(board, ConsoleOptions(said.append, name="agent"), "none", ring=ring) as m:
        assert {"hvc0", "agent"} <= set(m.consoles)
        heard: list[dict[str, object]] = []
        m.events.listen(lambda event: heard.append(event.data), "console-port")
        guest = start(m, F_SIZE | F_MULTIPORT, *range(6), ring=ring)
        assert guest.config(4, 4) == 2
        control_in = [guest.drivers[2].add([], [64]) for _ in range(8)]
        guest.notify(2)
        for number, event in ((0, control.DEVICE_READY), (1, control.PORT_READY), (1, control.PORT_OPEN)):
            guest.drivers[3].add([control.MESSAGE.pack(number, event, 1)])
        guest.notify(3)
        told = [guest.drivers[2].data(chain)[:written] for chain, written in guest.used(2, 4)]
        assert told == [
            control.MESSAGE.pack(0, control.DEVICE_ADD, 1),
            control.MESSAGE.pack(1, control.DEVICE_ADD, 1),
            control.MESSAGE.pack(1, control.PORT_NAME, 1) + b"agent",
            control.MESSAGE.pack(1, control.PORT_OPEN, 1),
        ]
        assert len(control_in) > len(told)
        guest.drivers[5].add([b"ready"])
        guest.notify(5)
        wait_for(lambda: said == [b"ready"])
        chain = guest.drivers[4].add([], [100])
        guest.notify(4)
        m.consoles["agent"].feed(b"freeze")
        assert guest.used(4) == [(chain, 6)]
        wait_for(lambda: heard == [{"console": "agent", "open": True}])
        guest.set_status(0)
        wait_for(lambda: heard[1:] == [{"console": "agent", "open": False}])


@BOARDS
def test_a_pty_whose_reader_is_slow(board: str) -> None:
    """What the pty and the queue in front of it do not take stays in the guest's memory, until somebody reads."""
    with machine(board, "pty") as m:
        pty = m.consoles["hvc0"]
        assert isinstance(pty, PtyChardev)
        reader = os.open(pty.path, os.O_RDWR | os.O_NOCTTY)
        try:
            guest = start(m, 0, 0, 1)
            text = b"".join(b"%07d\n" % n for n in range(30_000))
            pieces = [text[at : at + 10_000] for at in range(0, len(text), 10_000)]
            for piece in pieces:
                guest.drivers[1].add([piece])
            guest.notify(1)
            wait_for(lambda: not pty.can_write)
            assert not guest.device.faults
            got = b""
            while len(got) < len(text):
                got += os.read(reader, 65536)
            assert got == text
            guest.used(1, len(pieces) - len(guest.drivers[1].used()))
        finally:
            os.close(reader)


@BOARDS
def test_it_goes_on_elsewhere(board: str) -> None:
    said: list[bytes] = []
    with machine(board, said.append, "none,name=agent") as m:
        guest = start(m, F_SIZE | F_MULTIPORT, *range(6))
        m.consoles["hvc0"].feed(b"typed")
        for number, event in ((0, control.DEVICE_READY), (0, control.PORT_READY), (0, control.PORT_OPEN)):
            guest.drivers[3].add([control.MESSAGE.pack(number, event, 1)])
        guest.notify(3)
        guest.used(3, 3)
        state = m.save_state()
    with machine(board, said.append, "none,name=agent") as m:
        m.load_state(state)
        other = MachineGuest(m, "console")
        other.drivers = guest.drivers
        for n, driver in other.drivers.items():
            driver.memory, driver.queue = m.memory, other.device.queues[n]
        chain = other.drivers[0].add([], [100])
        other.notify(0)
        assert other.used(0) == [(chain, 5)]
        other.drivers[1].add([b"still here"])
        other.notify(1)
        other.used(1)
        assert said == [b"still here"]
        other.drivers[2].add([], [64])
        other.notify(2)
        (number,) = other.used(2)
        assert other.drivers[2].data(number[0])[:8] == control.MESSAGE.pack(0, control.DEVICE_ADD, 1)


def test_another_number_of_ports_is_another_machine() -> None:
    with machine("microvm", "none") as m:
        state = m.save_state()
    with (
        machine("microvm", "none", "none") as m,
        pytest.raises(pyvmm.StateError, match="the state has no console hvc1"),
    ):
        m.load_state(state)


def test_where_a_callable_raises_the_machine_ends() -> None:
    def refuse(data: bytes) -> None:
        raise ValueError("no more")

    with machine("microvm", refuse) as m:
        guest = start(m, 0, 0, 1)
        guest.drivers[1].add([b"x"])
        guest.notify(1)
        wait_for(lambda: m.error is not None)
        assert "no more" in str(m.error) or "no more" in getattr(m.error, "dump", "")


@BOARDS
def test_last_words_are_out_before_anybody_hears_of_the_end(board: str) -> None:
    """What a guest has rung for, and the device's thread has not served yet, goes out as the machine comes to rest."""
    said: list[bytes] = []
    with machine(board, said.append) as m:
        guest = start(m, 0, 0, 1)
        chassis = m.board.chassis
        with chassis.io_threads.paused:
            guest.drivers[1].add([b"last words"])
            guest.notify(1)
            assert said == []
            chassis.consoles.flush()
            assert said == [b"last words"]
        guest.used(1)
        assert said == [b"last words"]
