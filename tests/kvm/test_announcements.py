"""A guest that goes on elsewhere tells its network so: asked to, or by a frame that its card sends in its name."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guests import PASSED, TIMEOUT_S, Guest
from waiting import wait_for

from pyvmm import Machine
from pyvmm.devices.virtio import mmio
from pyvmm.devices.virtio.device import ACKNOWLEDGE, DRIVER, DRIVER_OK, F_VERSION_1, FEATURES_OK
from pyvmm.devices.virtio.net_features import F_CTRL_VQ, F_GUEST_ANNOUNCE, F_STATUS
from pyvmm.net.options import NetOptions
from pyvmm.x86 import layout

MAC = bytes.fromhex("020000000001")
RARP = b"\xff" * 6 + MAC + b"\x80\x35"
WAITS = "1: pause\n cmpb $0, end\n je 1b\n finish\n end: .byte 0"


@pytest.fixture
def cables() -> Iterator[Callable[[], tuple[NetOptions, socket.socket]]]:
    ends: list[socket.socket] = []

    def make() -> tuple[NetOptions, socket.socket]:
        ends.extend(socket.socketpair())
        ends[-1].settimeout(TIMEOUT_S)
        return NetOptions("fd", fd=ends[-2].fileno(), mac=MAC.hex(":")), ends[-1]

    yield make
    for end in ends:
        end.close()


def make_ready(machine: Machine, features: int) -> None:
    """What a driver does, but for queues."""

    def put(offset: int, value: int) -> None:
        machine.mmio.write(layout.VIRTIO_MMIO + offset, 4, value)

    for window in (0, 1):
        put(mmio.DRIVER_FEATURES_SEL, window)
        put(mmio.DRIVER_FEATURES, (features | F_VERSION_1) >> 32 * window & 0xFFFF_FFFF)
    for status in (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK):
        put(mmio.STATUS, status)
    put(mmio.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)


def frames(peer: socket.socket, count: int) -> list[bytes]:
    found = []
    for _ in range(count):
        size = int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big")
        found.append(peer.recv(size, socket.MSG_WAITALL)[:14])
    return found


@pytest.mark.parametrize("way", ["restore", "migration", "fork"])
@pytest.mark.parametrize("asked", [False, True])
def test_who_goes_on_elsewhere(
    boot: Callable[..., Guest],
    tmp_path: Path,
    cables: Callable[[], tuple[NetOptions, socket.socket]],
    way: str,
    asked: bool,
) -> None:
    guest = boot(WAITS, nets=[cables()[0]])
    make_ready(guest.machine, F_STATUS | (F_GUEST_ANNOUNCE | F_CTRL_VQ if asked else 0))
    net, peer = cables()
    if way == "restore":
        guest.machine.save(tmp_path / "a")
        other = Machine.restore(tmp_path / "a", twin=False, nets=[net])
    elif way == "fork":
        (other,) = guest.machine.fork(nets=[net])
    else:
        ready, came = threading.Event(), []
        address = str(tmp_path / "socket")
        thread = threading.Thread(
            target=lambda: came.append(
                Machine.incoming(address, timeout_s=TIMEOUT_S, nets=[net], ready=lambda _: ready.set())
            )
        )
        thread.start()
        assert ready.wait(TIMEOUT_S)
        guest.machine.migrate_to(address)
        thread.join()
        (other,) = came
    with other:
        assert not select.select([peer], [], [], 0)[0]  # it stands
        other.resume()
        if not asked and way != "fork":
            assert frames(peer, 3) == [RARP] * 3
        expected = 3 if asked and way != "fork" else 1
        wait_for(lambda: other.mmio.read(layout.VIRTIO_MMIO + mmio.CONFIG + 6, 2) == expected, TIMEOUT_S)
        other.memory.write(guest.program.symbols["end"], b"\1")
        assert other.wait(TIMEOUT_S) == PASSED
        assert other.mmio.read(layout.VIRTIO_MMIO + mmio.CONFIG + 6, 2) == expected
        if asked or way == "fork":
            assert not select.select([peer], [], [], 0)[0]
