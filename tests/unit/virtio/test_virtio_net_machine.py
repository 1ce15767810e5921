"""A network card in a whole machine without a vCPU: on both boards, both rings, its peer a socket of the test's."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from machine_guest import MachineGuest
from net_bench import HEADER_BYTES, MAC, frame

import pyvmm
from pyvmm.clock import VirtualClock
from pyvmm.devices.virtio.net import VirtioNet
from pyvmm.devices.virtio.net_features import F_CTRL_VQ, F_GUEST_ANNOUNCE, F_MAC, F_MRG_RXBUF, F_STATUS
from pyvmm.devices.virtio.ring import F_RING_PACKED
from pyvmm.errors import ConfigError
from pyvmm.net.options import NetOptions

BOARDS = pytest.mark.parametrize("board", ["microvm", "pc"])
RINGS = pytest.mark.parametrize("ring", ["split", "packed"])
LIMIT_S = 20.0


@pytest.fixture
def cable() -> Iterator[Callable[[], tuple[NetOptions, socket.socket]]]:
    """A card's options, and the other end of what it is joined to."""
    ends: list[socket.socket] = []

    def make() -> tuple[NetOptions, socket.socket]:
        ends.extend(socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
        ends[-1].settimeout(LIMIT_S)
        return NetOptions("fd", fd=ends[-2].fileno(), mac=MAC.hex(":")), ends[-1]

    yield make
    for end in ends:
        end.close()


def machine(board: str, net: NetOptions, ring: str) -> pyvmm.Machine:
    return pyvmm.Machine(machine=board, accel="qtest", memory_mib=16, nets=[net], virtio_ring=ring)


def put(peer: socket.socket, data: bytes) -> None:
    peer.sendall(len(data).to_bytes(4, "big") + data)


def taken(peer: socket.socket) -> bytes:
    """The next frame."""
    size = int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big")
    return peer.recv(size, socket.MSG_WAITALL)


def is_quiet(peer: socket.socket) -> bool:
    return not select.select([peer], [], [], 0)[0]


def send(guest: MachineGuest, data: bytes) -> None:
    chain = guest.drivers[1].add([bytes(HEADER_BYTES), data])
    guest.notify(1)
    assert guest.used(1) == [(chain, 0)]


@BOARDS
@RINGS
def test_frames_both_ways_and_in_another_machine(
    board: str, ring: str, cable: Callable[[], tuple[NetOptions, socket.socket]]
) -> None:
    packed = ring == "packed"
    net, peer = cable()
    with machine(board, net, ring) as m:
        card = m.devices["net0"]
        assert isinstance(card, VirtioNet)
        guest = MachineGuest(m, "net0")
        guest.start(F_MAC | F_STATUS | F_MRG_RXBUF | (F_RING_PACKED if packed else 0), 0, 1, packed=packed)
        assert guest.config(0, 4).to_bytes(4, "little") + guest.config(4, 2).to_bytes(2, "little") == MAC
        assert guest.config(6, 2) == 1  # the link is up
        send(guest, frame(1))
        assert taken(peer) == frame(1)
        chains = [guest.drivers[0].add([], [2048]) for _ in range(4)]
        guest.notify(0)
        put(peer, frame(2, 1500))
        ((chain, written),) = guest.used(0)
        assert (chain, written) == (chains[0], HEADER_BYTES + 1500)
        assert guest.drivers[0].data(chain)[HEADER_BYTES:written] == frame(2, 1500)
        assert (card.stats["sent"], card.stats["received"]) == (1, 1)
        state = m.save_state()
    net, peer = cable()
    with machine(board, net, ring) as m:
        m.load_state(state)
        card = m.devices["net0"]
        assert isinstance(card, VirtioNet)
        for n, driver in guest.drivers.items():
            driver.memory, driver.queue = m.memory, card.queues[n]
        guest.machine = m
        put(peer, frame(3, 1000))
        assert guest.used(0) == [(chains[1], HEADER_BYTES + 1000)]
        send(guest, frame(4))
        assert taken(peer) == frame(4)
        card.link_up = False
        assert guest.config(6, 2) == 0


@BOARDS
def test_twins_have_addresses_of_their_own(
    board: str, cable: Callable[[], tuple[NetOptions, socket.socket]], tmp_path: Path
) -> None:
    """In the card and in what the machine says that it is made of."""

    def end(mac: str | None = None) -> list[NetOptions]:
        return [cable()[0].changed(mac=mac)]

    def mac_of(m: pyvmm.Machine) -> bytes:
        card = m.devices["net0"]
        assert isinstance(card, VirtioNet)
        assert card.mac.hex(":") == m.config.nets[0].mac
        return card.mac

    def announced(m: pyvmm.Machine) -> int:
        assert m.board.announcer is not None
        return m.board.announcer.under_way

    path, asked = tmp_path / "a", "02:00:00:00:00:77"
    with machine(board, end(MAC.hex(":"))[0], "split") as m:
        m.save(path)
    macs = []
    with pyvmm.Template(path, nets=end()) as template, template.start() as m:
        macs.append(mac_of(m))
        forks = m.fork(2, each=lambda n: {"nets": end()})
        macs += [mac_of(each) for each in forks]
        (same,) = m.fork(nets=end(asked))
        assert mac_of(same).hex(":") == asked
        for each in (same, *forks):
            each.close()
    with pyvmm.Machine.restore(path, nets=end()) as m:
        macs.append(mac_of(m))
        assert announced(m) == 0  # the saved machine may be on this network, and its guest's address is the same
        m.reset()
        assert mac_of(m) == macs[-1]
        m.load(path)
        assert mac_of(m) == macs[-1]
    assert len({MAC, *macs}) == 5
    assert all(mac[0] & 3 == 2 for mac in macs)  # locally administered, and no group's
    with pyvmm.Machine.restore(path, twin=False, nets=end(MAC.hex(":"))) as m:
        assert mac_of(m) == MAC
        assert announced(m) == 1


MS = 1_000_000
WAITS_MS = (0, 50, 150, 250, 350)  # of QEMU's default rounds
ANNOUNCES = F_STATUS | F_GUEST_ANNOUNCE | F_CTRL_VQ


@pytest.mark.parametrize(
    ("words", "waits_ms"),
    [
        ((), WAITS_MS),
        ((10, 25, 4, 10), (0, 10, 20, 25)),
        ((0, 0, 2, 0), (0, 0)),
        ((50, 550, 0, 100), ()),
    ],
)
def test_rounds_of_announcements(
    words: tuple[int, ...], waits_ms: tuple[int, ...], cable: Callable[[], tuple[NetOptions, socket.socket]]
) -> None:
    net, peer = cable()
    with machine("microvm", net, "split") as m:
        clock = m.clock
        assert isinstance(clock, VirtualClock)
        MachineGuest(m, "net0").start(F_MAC, 0, 1)
        m.announce_self(*words)
        for wait_ms in waits_ms:
            if wait_ms:
                clock.step(wait_ms * MS - 1)
                assert is_quiet(peer)
            clock.step(1 if wait_ms else 0)
            assert taken(peer)[6:14] == MAC + b"\x80\x35"
        clock.step(10**12)
        assert clock.next_deadline_ns is None
        assert is_quiet(peer)


def test_announcements_begin_anew_or_end(cable: Callable[[], tuple[NetOptions, socket.socket]]) -> None:
    net, _ = cable()
    with machine("microvm", net, "split") as m:
        clock = m.clock
        assert isinstance(clock, VirtualClock)
        guest = MachineGuest(m, "net0")
        guest.start(F_MAC | ANNOUNCES, 0, 1, 2)
        m.announce_self(rounds=1000, id="a")
        m.announce_self(rounds=1, interfaces=["net0"])
        clock.step(1)
        assert guest.config(6, 2) == 3
        chain = guest.drivers[2].add([b"\3\0"], [1])
        guest.notify(2)
        assert guest.used(2) == [(chain, 1)]
        assert guest.config(6, 2) == 1
        state = m.save_state()
        clock.step(60 * MS)
        assert guest.config(6, 2) == 3
        asked = m.save_state()
        for n in range(63):
            m.announce_self(rounds=2, id=str(n))
        with pytest.raises(ConfigError, match="64 others are under way"):
            m.announce_self(id="one more")
        for n in (*range(63), "a"):
            m.announce_self(rounds=0, id=str(n))
        assert clock.next_deadline_ns is None
        with pytest.raises(ConfigError, match=r"no such card: did you mean net0\?"):
            m.announce_self(interfaces=["net1"])
        with pytest.raises(ConfigError, match="rounds=1001"):
            m.announce_self(rounds=1001)
    for saved, status in ((state, 1), (asked, 3)):
        net, _ = cable()
        with machine("microvm", net, "split") as m:
            m.load_state(saved)
            guest.machine = m
            assert guest.config(6, 2) == status
    with pyvmm.Machine(accel="qtest", memory_mib=4) as m:
        m.announce_self()
        with pytest.raises(ConfigError, match="no network card"):
            m.announce_self(interfaces=["net0"])


def test_two_cards_of_a_pc_have_slots_and_addresses_of_their_own(
    cable: Callable[[], tuple[NetOptions, socket.socket]],
) -> None:
    nets = [cable()[0].changed(mac=None) for _ in range(2)]
    with pyvmm.Machine(machine="pc", accel="qtest", memory_mib=16, nets=nets) as m:
        cards = [m.devices["net0"], m.devices["net1"]]
        functions = [m.devices["net0.pci"], m.devices["net1.pci"]]
        slots = {slot for slot, _, function in m.devices["pci"].devices if function in functions}  # type: ignore[attr-defined]
        assert len(slots) == 2
        assert len({card.mac for card in cards if isinstance(card, VirtioNet)}) == 2


@BOARDS
@pytest.mark.parametrize("name", ["serial", "rng", "net1.mmio", "net1.pci"])
def test_a_card_with_the_name_of_another_device(
    board: str, name: str, cable: Callable[[], tuple[NetOptions, socket.socket]]
) -> None:
    """What is saved and found by name would be one of the two."""
    if name.endswith("mmio" if board == "pc" else "pci"):
        name = "net1"
    nets = [cable()[0].changed(id=name, mac=None), cable()[0].changed(id="net1", mac=None)]
    with pytest.raises(ConfigError, match=name):
        pyvmm.Machine(machine=board, accel="qtest", memory_mib=16, nets=nets, rng=True)
