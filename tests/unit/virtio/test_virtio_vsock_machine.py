"""A vsock device in whole machines without vCPUs: over virtio-mmio and virtio-pci, with both rings, on its own thread;
saved, forked and restored.
"""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from net_bench import Driver
from vsock_bench import Packet, header
from waiting import wait_for

import pyvmm
from pyvmm.devices.virtio import mmio, vsock
from pyvmm.devices.virtio import vsock_packet as p
from pyvmm.devices.virtio.device import ACKNOWLEDGE, DRIVER, DRIVER_OK, F_VERSION_1, FEATURES_OK
from pyvmm.devices.virtio.ring import F_RING_PACKED
from pyvmm.errors import ConfigError
from pyvmm.x86 import layout

LIMIT_S = 20.0
BAR4 = 0xFE00_4000
READY = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
CHUNK = 32768
BOARDS = ["microvm", "pc"]
RINGS = ["split", "packed"]


def machine(kind: str, path: Path, cid: int = 3, connections: int = 256, **options: Any) -> pyvmm.Machine:
    words = f"cid={cid},path={path},connections={connections}"
    return pyvmm.Machine(machine=kind, accel="qtest", memory_mib=16, vsock=words, **options)


class Guest:
    """A driver of the machine's vsock device, by the registers of its transport."""

    def __init__(self, m: pyvmm.Machine, packed: bool) -> None:
        self.m = m
        device = m.devices["vsock"]
        assert isinstance(device, vsock.VirtioVsock)
        self.device = device
        features = F_VERSION_1 | (F_RING_PACKED if packed else 0)
        (self.start_mmio if m.config.machine == "microvm" else self.start_pci)(features, packed)
        self.chains: dict[int, None] = {}
        for _ in range(100):
            self.chains[self.drivers[vsock.RX].add([], [4096])] = None
        for n in (vsock.RX, vsock.EVENT):
            self.drivers[vsock.EVENT].add([], [4])
            self.ring(n)

    def rings(self, packed: bool) -> list[Driver]:
        end = 0x10_0000
        made = []
        for queue in self.device.queues:
            base, end = end, end + 0x40_0000
            made.append(Driver(self.m.memory, queue, base=base, end=end, packed=packed, enable=False))
        return made

    def start_mmio(self, features: int, packed: bool) -> None:
        def write(offset: int, value: int) -> None:
            self.m.mmio.write(layout.VIRTIO_MMIO + offset, 4, value)

        assert self.m.mmio.read(layout.VIRTIO_MMIO + mmio.DEVICE_ID, 4) == 19
        self.cid = self.m.mmio.read(layout.VIRTIO_MMIO + mmio.CONFIG, 4)
        write(mmio.STATUS, ACKNOWLEDGE | DRIVER)
        for window in (0, 1):
            write(mmio.DRIVER_FEATURES_SEL, window)
            write(mmio.DRIVER_FEATURES, features >> 32 * window & 0xFFFF_FFFF)
        write(mmio.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        self.drivers = self.rings(packed)
        for n, driver in enumerate(self.drivers):
            driver.queue.forget()
            write(mmio.QUEUE_SEL, n)
            write(mmio.QUEUE_SIZE, driver.size)
            for register, gpa in (
                (mmio.QUEUE_DESC, driver.desc), (mmio.QUEUE_DRIVER, driver.driver), (mmio.QUEUE_DEVICE, driver.device)
            ):  # fmt: skip
                write(register, gpa)
            write(mmio.QUEUE_READY, 1)
        write(mmio.STATUS, READY)
        self.ring = lambda n: write(mmio.QUEUE_NOTIFY, n)

    def start_pci(self, features: int, packed: bool) -> None:
        slot = next(slot for slot, _, f in self.m.devices["pci"].devices if f is self.m.devices["vsock.pci"])  # type: ignore[attr-defined]

        def config(register: int, size: int, value: int) -> None:
            self.m.pio.write(0xCF8, 4, 0x8000_0000 | slot << 11 | register)
            self.m.pio.write(0xCFC, size, value)

        def put(offset: int, size: int, value: int) -> None:
            self.m.mmio.write(BAR4 + offset, size, value)

        self.m.pio.write(0xCF8, 4, 0x8000_0000 | slot << 11)
        assert self.m.pio.read(0xCFC, 4) == 0x1053_1AF4  # no transitional one
        config(0x20, 4, BAR4)
        config(0x24, 4, 0)
        config(0x04, 2, 6)
        self.cid = self.m.mmio.read(BAR4 + 0x2000, 4)
        put(20, 1, ACKNOWLEDGE | DRIVER)
        for window in (0, 1):
            put(8, 4, window)
            put(12, 4, features >> 32 * window & 0xFFFF_FFFF)
        put(20, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        self.drivers = self.rings(packed)
        for n, driver in enumerate(self.drivers):
            driver.queue.forget()
            put(22, 2, n)
            put(24, 2, driver.size)
            for offset, gpa in ((32, driver.desc), (40, driver.driver), (48, driver.device)):
                put(offset, 8, gpa)
            put(28, 2, 1)
        put(20, 1, READY)
        self.ring = lambda n: put(0x3000 + 4 * n, 2, n)

    def send(self, op: int, port: int, guest_port: int, data: bytes = b"", **fields: Any) -> None:
        pieces = [header(op, port, guest_port, size=len(data), cid=self.cid, **fields), data]
        self.drivers[vsock.TX].add([piece for piece in pieces if piece])
        self.ring(vsock.TX)

    def packets(self) -> list[Packet]:
        """What has come since the last look; its buffers are given again."""
        found = []
        rx = self.drivers[vsock.RX]
        for chain, written in rx.used():
            del self.chains[chain]
            data = rx.data(chain)[:written]
            found.append(Packet(*p.HEADER.unpack(data[:44]), data[44:]))
            self.chains[rx.add([], [4096])] = None
        if found:
            self.ring(vsock.RX)
        self.drivers[vsock.TX].used()
        return found

    def hear(self) -> list[Packet]:
        """The same, when something has come."""
        found: list[Packet] = wait_for(self.packets)
        return found


def echo(guest: Guest, path: Path) -> None:
    """Both ways at once, with a program of the host's that listens for the guest."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}_7")
        listener.listen()

        def serve() -> None:
            end, _ = listener.accept()
            with end:
                while data := end.recv(CHUNK):
                    end.sendall(data)

        host = threading.Thread(target=serve)
        host.start()
        guest.send(p.OP_REQUEST, 7, 1)
        (answer,) = guest.hear()
        assert answer.op == p.OP_RESPONSE
        sent = bytes(range(256)) * (CHUNK // 256)
        for n in range(8):
            got = b""
            guest.send(p.OP_RW, 7, 1, sent, forwarded=n * CHUNK)
            while len(got) < CHUNK:
                got += b"".join(packet.data for packet in guest.hear())
            assert got == sent
        guest.send(p.OP_SHUTDOWN, 7, 1, flags=p.BOTH_WAYS)
        assert [packet.op for packet in guest.hear()][-1] == p.OP_RST
        host.join(LIMIT_S)
        assert not host.is_alive()
    Path(f"{path}_7").unlink()


def call(guest: Guest, path: Path) -> socket.socket:
    """A client of the host's, which the guest accepts."""
    end = socket.socket(socket.AF_UNIX)
    end.settimeout(LIMIT_S)
    end.connect(str(path))
    end.sendall(b"CONNECT 22\n")
    (request,) = guest.hear()
    assert (request.op, request.dst_cid, request.dst_port) == (p.OP_REQUEST, guest.cid, 22)
    guest.send(p.OP_RESPONSE, request.src_port, 22)
    assert end.recv(100) == b"OK %d\n" % request.src_port
    return end


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("doorbell", ["on", "off"])
@pytest.mark.parametrize("kind", BOARDS)
def test_streams(tmp_path: Path, kind: str, ring: str, doorbell: str) -> None:
    path = tmp_path / "vm.sock"
    with machine(kind, path, virtio_ring=ring, virtio_ioeventfd=doorbell) as m:
        assert path.stat().st_mode & 0o777 == 0o600
        guest = Guest(m, ring == "packed")
        assert guest.cid == 3
        echo(guest, path)
        with call(guest, path) as end:
            end.sendall(b"hello")
            assert [packet.data for packet in guest.hear()] == [b"hello"]
            left = end.dup()
    with left:  # the machine was closed with a client there
        assert left.recv(100) == b""
    assert not path.exists()


@pytest.mark.parametrize("kind", BOARDS)
def test_a_snapshot_goes_on_with_another_address(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "vm.sock", tmp_path / "twin.sock"
    with machine(kind, path) as m:
        guest = Guest(m, False)
        with call(guest, path) as end:
            m.save(tmp_path / "a.snap")
            with pytest.raises(ConfigError, match="give another path"):
                pyvmm.Machine.restore(tmp_path / "a.snap")
            with pyvmm.Machine.restore(tmp_path / "a.snap", vsock=f"cid=9,path={other}") as twin:
                device = twin.devices["vsock"]
                assert isinstance(device, vsock.VirtioVsock)
                assert device.read_config(0, 8) == 9
                assert other.exists()
                assert device.connections == 0
            end.sendall(b"still here")
            assert [packet.data for packet in guest.hear()] == [b"still here"]
    with pyvmm.Machine.restore(tmp_path / "a.snap") as again:
        assert again.config.vsock is not None
        assert again.config.vsock.path == str(path)
        assert path.exists()


def test_the_driver_goes_on_in_a_twin(tmp_path: Path) -> None:
    path = tmp_path / "vm.sock"
    with machine("microvm", path) as m:
        guest = Guest(m, False)
        call(guest, path).close()
        guest.hear()
        (twin,) = m.fork(vsock=f"cid=4,path={tmp_path / 'twin.sock'}")
        with twin:
            events = guest.drivers[vsock.EVENT]
            device = twin.devices["vsock"]
            assert isinstance(device, vsock.VirtioVsock)
            for driver, queue in zip(guest.drivers, device.queues, strict=True):
                driver.memory, driver.queue = twin.memory, queue
            guest.m, guest.cid = twin, 4
            ((event, written),) = wait_for(lambda: list(events.used()))
            assert events.data(event)[:written] == bytes(4)  # TRANSPORT_RESET
            events.add([], [4])
            twin.mmio.write(layout.VIRTIO_MMIO + mmio.QUEUE_NOTIFY, 4, vsock.EVENT)
            guest.ring = lambda n: twin.mmio.write(layout.VIRTIO_MMIO + mmio.QUEUE_NOTIFY, 4, n)
            echo(guest, tmp_path / "twin.sock")
            call(guest, tmp_path / "twin.sock").close()


def test_twins_have_nobody_at_the_hosts_end_but_those_given(tmp_path: Path) -> None:
    with machine("microvm", tmp_path / "vm.sock") as m:
        twins = m.fork(2, each=lambda n: {"vsock": f"cid=5,path={tmp_path / 'twin.sock'}"} if n else {})
        paths = [twin.config.vsock.path for twin in twins if twin.config.vsock is not None]
        assert paths == [None, str(tmp_path / "twin.sock")]
        for twin in twins:
            twin.close()


def test_a_machine_without_it_has_none() -> None:
    with pyvmm.Machine(machine="microvm", accel="qtest", vsock="none") as m:
        assert "vsock" not in m.devices


@pytest.mark.parametrize("kind", BOARDS)
def test_resets_while_streams_run(tmp_path: Path, kind: str) -> None:
    """The driver resets the device from its own thread, at any moment of what clients and the device's thread do."""
    path = tmp_path / "vm.sock"
    over = threading.Event()

    def clients() -> None:
        while not over.is_set():
            with socket.socket(socket.AF_UNIX) as end:
                end.settimeout(LIMIT_S)
                try:
                    end.connect(str(path))
                    end.sendall(b"CONNECT 22\n" + bytes(20_000))
                    while end.recv(1 << 16):
                        pass
                except OSError:  # it was cut off, or there is nobody yet
                    over.wait(0.001)

    threads = [threading.Thread(target=clients) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        with machine(kind, path, connections=8, virtio_ring="packed") as m:  # offered: the driver may have either
            device = m.devices["vsock"]
            assert isinstance(device, vsock.VirtioVsock)
            for n in range(40):
                guest = Guest(m, bool(n % 2))
                before = device.stats["opened"]
                while device.stats["opened"] == before:
                    answer(guest, guest.hear())
                for _ in range(n % 5):
                    answer(guest, guest.packets())
                with device.lock:
                    device.write_status(0)
                assert device.connections == 0
            assert (m.error, device.faults) == (None, 0)
    finally:
        over.set()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def answer(guest: Guest, packets: list[Packet]) -> None:
    """Each client is accepted, and has its data back."""
    for packet in packets:
        if packet.op == p.OP_REQUEST:
            guest.send(p.OP_RESPONSE, packet.src_port, packet.dst_port)
        elif packet.op == p.OP_RW and guest.drivers[vsock.TX].free > 2:
            guest.send(p.OP_RW, packet.src_port, packet.dst_port, packet.data)
