"""virtio-pci (OASIS virtio 1.2, 4.1), modern and legacy, on a pc without vCPUs; and drivers that play games."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from errno import EMFILE, ENOSPC
from random import Random
from typing import Any

import pytest
from driver import TestDriver

import pyvmm
from pyvmm.boards.virtio_interfaces import interfaces
from pyvmm.devices.virtio import pci
from pyvmm.devices.virtio.device import F_VERSION_1, NEEDS_RESET, VirtioDevice
from pyvmm.devices.virtio.ring import Virtqueue
from pyvmm.errors import ConfigError, KvmError
from pyvmm.spec import Spec

SLOT = 2
BAR4, BAR1, BAR0 = 0xFE00_4000, 0xFE00_2000, 0xC100
READY = 15
LIMIT_S = 20.0
CAPABILITIES = {1: 0x0000, 2: 0x3000, 3: 0x1000, 4: 0x2000}


class Bench:
    def __init__(self, machine: pyvmm.Machine) -> None:
        self.machine = machine
        self.mmio, self.pio = machine.mmio, machine.pio
        device, function = machine.devices["rng"], machine.devices["rng.pci"]
        assert isinstance(device, VirtioDevice)
        assert isinstance(function, pci.VirtioPci)
        self.device, self.function = device, function
        self.called = threading.Semaphore(0)
        (queue, *_) = device.queues
        on_call = queue.on_call
        assert on_call is not None

        def call() -> None:
            on_call()
            self.called.release()

        queue.on_call = call

    def config(self, register: int, size: int, value: int | None = None) -> int:
        self.pio.write(0xCF8, 4, 0x8000_0000 | SLOT << 11 | register & 0xFC)
        if value is None:
            return self.pio.read(0xCFC + (register & 3), size)
        self.pio.write(0xCFC + (register & 3), size, value)
        return value

    def place(self, base: int = BAR4) -> None:
        self.config(0x10, 4, BAR0)
        self.config(0x14, 4, BAR1)
        self.config(0x20, 4, base & 0xFFFF_FFFF)
        self.config(0x24, 4, base >> 32)
        self.config(0x04, 2, 7)
        self.base = base

    def put(self, offset: int, size: int, value: int) -> None:
        self.mmio.write(self.base + offset, size, value)

    def get(self, offset: int, size: int) -> int:
        return self.mmio.read(self.base + offset, size)

    def negotiate(self) -> None:
        for status in (1, 3):
            self.put(20, 1, status)
        self.put(8, 4, 1)
        self.put(12, 4, F_VERSION_1 >> 32)
        self.put(20, 1, 11)

    def start(self, vector: int = pci.NO_VECTOR) -> TestDriver:
        self.negotiate()
        queue = self.device.queues[0]
        driver = TestDriver(self.machine.memory, queue, size=8, enable=False)
        queue.forget()
        self.put(22, 2, 0)
        self.put(24, 2, 8)
        self.put(26, 2, vector)
        for offset, gpa in ((32, driver.desc), (40, driver.driver), (48, driver.device)):
            self.put(offset, 8, gpa)
        self.put(28, 2, 1)
        self.put(20, 1, READY)
        return driver

    def request(self, driver: TestDriver, ring: bool = True) -> None:
        """One buffer, rung for by the doorbell and filled by the queue's thread."""
        chain = driver.add([], [16])
        if ring:
            self.put(0x3000, 2, 0)
        assert self.served(driver) == [(chain, 16)]

    def served(self, driver: TestDriver) -> list[tuple[int, int]]:
        """What the queue's thread has done since the last time, when it has interrupted for it."""
        while not (used := driver.used()):
            assert self.called.acquire(timeout=LIMIT_S)
        # The interrupt comes behind the ring, and then the queue's lock is given back.
        with self.device.queues[0].lock:
            return used


@pytest.fixture
def bench() -> Iterator[Bench]:
    with pyvmm.Machine(machine="pc", accel="qtest", rng=True, memory_mib=8) as machine:
        yield Bench(machine)


def test_the_capabilities(bench: Bench) -> None:
    assert bench.config(0, 4) == 0x1005_1AF4
    assert bench.config(6, 2) & 0x10
    found, at = {}, bench.config(0x34, 1)
    while at:
        number = bench.config(at, 1)
        if number == 9:
            found[bench.config(at + 3, 1)] = bench.config(at + 8, 4)
        else:
            assert (number, bench.config(at + 2, 2)) == (0x11, 1)
        at = bench.config(at + 1, 1)
    assert {kind: offset for kind, offset in found.items() if kind != 5} == CAPABILITIES
    assert 5 in found


@pytest.mark.parametrize(
    ("asked", "ids", "revision", "subsystem", "bars", "capabilities"),
    [
        ("", 0x1002, 0, 5, (0, 1, 4, 5), {1, 2, 3, 4, 5}),
        (",disable-legacy=auto", 0x1002, 0, 5, (0, 1, 4, 5), {1, 2, 3, 4, 5}),
        (",disable-legacy=on", 0x1045, 1, 0x1100, (1, 4, 5), {1, 2, 3, 4, 5}),
        (",disable-modern=on", 0x1002, 0, 5, (0, 1), set()),
    ],
)
def test_the_interfaces_of_a_function(
    asked: str, ids: int, revision: int, subsystem: int, bars: tuple[int, ...], capabilities: set[int]
) -> None:
    """What tells a driver which of them are there, 4.1.2; and it is as QEMU's."""
    with pyvmm.Machine(machine="pc", accel="qtest", balloon=f"0{asked}", memory_mib=8) as machine:
        function = machine.devices["balloon.pci"]
        assert isinstance(function, pci.VirtioPci)
        assert (function.get(0, 4), function.get(8), function.get(0x2E, 2)) == (ids << 16 | 0x1AF4, revision, subsystem)
        function.config_write(4, 2, 0)
        for n in range(6):
            function.config_write(0x10 + 4 * n, 4, 0xFFFF_FFFF)
        assert tuple(n for n in range(6) if function.get(0x10 + 4 * n, 4)) == bars
        found, at = [], function.get(0x34)
        while at:
            found.append((function.get(at), function.get(at + 3)))
            at = function.get(at + 1)
        assert {kind for number, kind in found if number == 9} == capabilities
        assert [number for number, _ in found].count(0x11) == 1
        function.config_write(0x60, 4, 0xFFFF_FFFF)  # whatever is there, it is no way to what is not


def test_a_device_says_more_than_the_machine() -> None:
    nets, balloon = ["unix=/nowhere.sock,server=on,disable-modern=off"], "0,disable-legacy=off"
    spec = Spec(machine="pc", accel="qtest", virtio_disable_legacy="on", nets=nets, rng=True, balloon=balloon)
    assert interfaces(spec, None) == interfaces(spec, spec.nets[0]) == (False, True)
    assert interfaces(spec, spec.balloon) == (True, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rng": True, "virtio_disable_legacy": "on", "virtio_disable_modern": "on"}, "the entropy device has"),
        ({"balloon": "0,disable-modern=on,disable-legacy=on"}, "no driver could find it, leave one of them out"),
        ({"machine": "microvm", "rng": True, "virtio_disable_legacy": "on"}, "on virtio-mmio: leave them out, or give"),
        ({"machine": "microvm", "balloon": "0,disable-modern=on"}, "on virtio-mmio: leave them out, or give"),
        ({"vsock": "cid=3,path=/x.sock", "virtio_disable_modern": "on"}, "vsock has no legacy interface"),
        ({"drives": ["file=/x,disable-legacy=on"]}, "drive option disable_legacy='on' with if=ide: use if=virtio"),
        ({"rng": True, "virtio_disable_legacy": "maybe"}, "virtio_disable_legacy='maybe': use auto, on or off"),
    ],
)
def test_interfaces_that_can_not_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pyvmm.Machine(**{"machine": "pc", "accel": "qtest", **options})
    assert words in str(caught.value)


def test_bars_are_sized(bench: Bench) -> None:
    bench.place()
    for register, expected in ((0x10, 0xFFFF_FFE1), (0x14, 0xFFFF_F000), (0x20, 0xFFFF_C00C), (0x24, 0xFFFF_FFFF)):
        bench.config(register, 4, 0xFFFF_FFFF)
        assert bench.config(register, 4) == expected


@pytest.mark.parametrize("base", [BAR4, 0x12_3456_0000])
def test_a_request_with_intx(bench: Bench, base: int) -> None:
    bench.place(base)
    driver = bench.start()
    bench.request(driver)
    assert bench.config(6, 2) & 8  # the interrupt is pending
    assert bench.get(0x1000, 1) == 1
    assert bench.get(0x1000, 1) == 0
    assert not bench.config(6, 2) & 8


def test_msix(bench: Bench) -> None:
    bench.place()
    sent: list[tuple[int, int]] = []
    bench.machine.irqchip.send = lambda address, data: sent.append((address, data)) is None  # type: ignore[method-assign]
    table = BAR1 + 16
    for at, value in ((0, 0xFEE0_1000), (4, 0), (8, 0x41)):
        bench.mmio.write(table + at, 4, value)
    bench.config(0x42, 2, 0x8000)
    driver = bench.start(vector=1)
    assert bench.get(26, 2) == 1
    bench.request(driver)
    assert sent == []  # it is masked still
    assert bench.mmio.read(BAR1 + 0x800, 4) == 2
    bench.mmio.write(table + 12, 4, 0)
    assert sent == [(0xFEE0_1000, 0x41)]
    assert bench.mmio.read(BAR1 + 0x800, 4) == 0
    bench.request(driver)
    assert len(sent) == 2
    bench.mmio.write(table + 8, 4, 0x42)
    bench.config(0x42, 2, 0xC000)  # all of the function masked
    bench.request(driver)
    assert len(sent) == 2
    bench.config(0x42, 2, 0x8000)
    assert sent[2:] == [(0xFEE0_1000, 0x42)]
    assert not bench.config(6, 2) & 8
    assert bench.get(0x1000, 1) == 0


def test_vectors_that_are_not_there(bench: Bench) -> None:
    bench.place()
    for value in (2, 0x7FFF, 0xFFFE):
        bench.put(16, 2, value)
        bench.put(26, 2, value)
        assert bench.get(16, 2) == bench.get(26, 2) == pci.NO_VECTOR
    assert bench.mmio.read(BAR1 + 2 * 16, 4) == 0xFFFF_FFFF  # behind the table
    bench.mmio.write(BAR1 + 12, 1, 0)  # no access that a table takes
    assert bench.mmio.read(BAR1 + 12, 4) == 1


def test_the_window_in_configuration_space(bench: Bench) -> None:
    """4.1.4.9: for firmware that maps no BAR."""
    at = bench.function._window_data
    assert at is not None
    at -= 16
    bench.config(at + 4, 1, 4)

    def access(offset: int, size: int, value: int | None = None) -> int:
        bench.config(at + 8, 4, offset)
        bench.config(at + 12, 4, size)
        return bench.config(at + 16, size, value)

    access(20, 1, 1)
    assert access(20, 1) == 1
    assert bench.device.status == 1
    assert access(18, 2) == 1
    for offset, size in ((0x4000, 4), (0xFFFF_FFFC, 4), (1, 2), (0, 3), (0, 0)):
        bench.config(at + 8, 4, offset)
        bench.config(at + 12, 4, size)
        bench.config(at + 16, 4)
        bench.config(at + 16, 4, 0xFFFF_FFFF)
    assert bench.device.status == 1


def test_a_legacy_driver(bench: Bench) -> None:
    """4.1.4.10, as SeaBIOS and Linux have it: the ring by its page, no FEATURES_OK."""
    bench.place()
    put, get = (lambda at, size, value: bench.pio.write(BAR0 + at, size, value)), lambda at, size: bench.pio.read(
        BAR0 + at, size
    )
    for status in (0, 1, 3):
        put(18, 1, status)
    assert get(0, 4) & 1 << 27
    put(4, 4, 0)
    put(14, 2, 0)
    size = get(12, 2)
    assert size == 64
    driver = TestDriver(bench.machine.memory, bench.device.queues[0], size=size, base=0x10_0000, enable=False)
    bench.device.queues[0].forget()
    driver.driver, driver.device = driver.desc + 16 * size, driver.desc + 4096
    put(8, 4, driver.desc >> 12)
    assert get(8, 4) == driver.desc >> 12
    put(18, 1, 7)
    assert get(18, 1) == 7
    chain = driver.add([], [16])
    put(16, 2, 0)
    assert bench.served(driver) == [(chain, 16)]
    assert get(19, 1) == 1
    assert get(19, 1) == 0
    put(8, 4, 0)
    assert get(8, 4) == 0
    put(8, 4, 0xFFFF_FFFF)
    assert get(18, 1) & NEEDS_RESET
    put(18, 1, 0)
    assert get(18, 1) == 0


def test_a_bar_that_moves_under_traffic(bench: Bench) -> None:
    bench.place()
    driver = bench.start()
    for n in range(20):
        base = BAR4 + 0x10_0000 * (n % 3)
        bench.config(0x20, 4, base)
        bench.base = base
        bench.request(driver)
    bench.config(0x04, 2, 0)
    assert bench.mmio.find(bench.base) is None
    bench.config(0x04, 2, 7)
    bench.request(driver)


def test_the_state_goes_on_elsewhere(bench: Bench) -> None:
    bench.place()
    bench.config(0x42, 2, 0x8000)
    driver = bench.start(vector=1)
    bench.request(driver)
    state = bench.machine.save_state()
    with pyvmm.Machine(machine="pc", accel="qtest", rng=True, memory_mib=8) as machine:
        machine.load_state(state)
        other = Bench(machine)
        other.base = bench.base
        assert other.get(20, 1) == READY
        assert other.get(26, 2) == 1
        assert other.mmio.read(BAR1 + 0x800, 4) == 2
        driver.memory, driver.queue = machine.memory, other.device.queues[0]
        other.request(driver)


class Stubborn(VirtioDevice):
    DEVICE_ID = 42
    QUEUES = (8, 8)

    def handle(self, queue: Virtqueue) -> None:
        for chain in queue.take():
            queue.push(chain, 0)
        queue.flush()


@pytest.mark.parametrize("seed", range(8))
def test_any_accesses_at_all(seed: int) -> None:
    """Nothing that a guest writes raises or stops the machine; what it broke, a reset mends."""
    r = Random(seed)
    with pyvmm.Machine(machine="pc", accel="qtest", memory_mib=8) as machine:
        machine.board.add_virtio("rng", Stubborn(machine.memory))
        bench = Bench(machine)
        bench.place()
        for _ in range(1500):
            size = r.choice((1, 2, 4, 8))
            value = r.choice((0, 1, 3, 8, 11, 15, 0x1000, 0x8000, r.getrandbits(8 * size))) & (1 << 8 * size) - 1
            kind = r.random()
            if kind < 0.5:
                bench.put(r.choice((r.randrange(64), r.randrange(0x4000))), size, value)
            elif kind < 0.6:
                bench.get(r.choice((r.randrange(64), r.randrange(0x4000))), size)
            elif kind < 0.75:
                machine.mmio.write(BAR1 + r.randrange(0x1000), size, value)
            elif kind < 0.9:
                machine.pio.write(BAR0 + r.randrange(32), min(size, 4), value & 0xFFFF_FFFF)
                machine.pio.read(BAR0 + r.randrange(32), min(size, 4))
            else:
                bench.config(r.randrange(0x40, 0xA0) & ~3, 4, value & 0xFFFF_FFFF)
        assert machine.state is not None
        assert machine.error is None
        bench.place()
        bench.put(20, 1, 0)
        driver = bench.start()
        chain = driver.add([b"x"])
        bench.put(0x3000, 2, 0)
        assert bench.served(driver) == [(chain, 0)]


def test_a_host_without_descriptors_sends_messages_by_calls() -> None:
    """The guest that has enabled a vector is not to blame."""
    from pyvmm.boards.virtio import Messages

    class Irqchip:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def irqfd(self, target: object, *, name: str) -> object:
            raise self.error

    for error in (ConfigError("no GSI"), OSError(EMFILE, "no descriptor"), KvmError("KVM_IRQFD", ENOSPC)):
        assert Messages(Irqchip(error), "x", True).irqfd(None) is None  # type: ignore[arg-type]
