"""virtio-mmio's registers (OASIS virtio 1.2, 4.2), and drivers that do with them what they must not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mmio_driver import MmioDriver

from pyvmm.devices.virtio import mmio
from pyvmm.devices.virtio.device import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    F_RING_RESET,
    F_VERSION_1,
    FEATURES_OK,
    NEEDS_RESET,
    VirtioDevice,
)
from pyvmm.devices.virtio.ring import Virtqueue
from pyvmm.guest_memory import GuestMemory

sys.path.insert(0, str(Path(__file__).parents[1] / "net"))
from io_watcher import Watcher

MIB = 1 << 20
OWN_FEATURE = 1 << 5
READY = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK


class Echo(VirtioDevice):
    """Gives back what it reads. ``calls`` has what it was told."""

    DEVICE_ID = 42
    FEATURES = OWN_FEATURE
    QUEUES = (16, 8)

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(memory, config_bytes=12)
        self.calls: list[object] = []
        self.config[:] = bytes(range(1, 13))

    def handle(self, queue: Virtqueue) -> None:
        for chain in queue.take():
            queue.push(chain, chain.write(0, chain.read(0, 1 << 20)))
        queue.flush()

    def config_write(self, offset: int, size: int, value: int) -> None:
        self.calls.append(("config", offset, size, value))

    def driver_ok(self) -> None:
        self.calls.append("driver_ok")

    def quiesce(self) -> None:
        self.calls.append("quiesce")

    def reset_device(self) -> None:
        self.calls.append("reset")


@pytest.fixture
def bench() -> MmioDriver:
    memory = GuestMemory(4 * MIB)
    return MmioDriver(memory, Echo(memory))


def echo(bench: MmioDriver) -> Echo:
    assert isinstance(bench.device, Echo)
    return bench.device


def test_identity(bench: MmioDriver) -> None:
    assert [bench.read(offset) for offset in (0, 4, 8)] == [0x74726976, 2, 42]
    assert bench.offered() & ~(F_RING_RESET | F_VERSION_1) == OWN_FEATURE | 0x3000_0000
    bench.write(mmio.DEVICE_FEATURES_SEL, 2)
    assert bench.read(mmio.DEVICE_FEATURES) == 0


def test_a_request(bench: MmioDriver) -> None:
    driver = bench.start(OWN_FEATURE)
    assert bench.status == READY
    assert echo(bench).calls == ["driver_ok"]
    chain = driver.add([b"hello"], [8])
    bench.device.serve(bench.device.queues[0])
    assert driver.used() == [(chain, 5)]
    assert driver.data(chain) == b"hello\0\0\0"
    assert bench.edges == 1
    assert bench.read(mmio.INTERRUPT_STATUS) == mmio.USED_BUFFER
    bench.write(mmio.INTERRUPT_ACK, mmio.USED_BUFFER)
    assert bench.read(mmio.INTERRUPT_STATUS) == 0


def test_what_comes_between_a_look_and_its_acknowledgement_is_not_lost(bench: MmioDriver) -> None:
    driver = bench.start()
    queue = bench.device.queues[0]
    for _ in range(2):
        driver.add([b"x"], [1])
        bench.device.serve(queue)
        status = bench.read(mmio.INTERRUPT_STATUS)
        driver.add([b"x"], [1])
        bench.device.serve(queue)
        bench.write(mmio.INTERRUPT_ACK, status)
        assert bench.read(mmio.INTERRUPT_STATUS) == mmio.USED_BUFFER
        bench.write(mmio.INTERRUPT_ACK, status)
        assert bench.read(mmio.INTERRUPT_STATUS) == 0


def test_features_that_are_not_offered_are_refused(bench: MmioDriver) -> None:
    for features in (OWN_FEATURE, F_VERSION_1 | 1 << 3, F_VERSION_1 | 1 << 63):
        bench.status = 0
        bench.status = ACKNOWLEDGE | DRIVER
        bench.accept(features)
        bench.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
        assert bench.status == ACKNOWLEDGE | DRIVER
        # And without them no buffers: 3.1.1 has the driver give up here.
        bench.status = READY
        assert bench.status == ACKNOWLEDGE | DRIVER
        assert not bench.device.live
    bench.write(mmio.DRIVER_FEATURES_SEL, 7)
    bench.write(mmio.DRIVER_FEATURES, 1)
    bench.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
    assert bench.status == ACKNOWLEDGE | DRIVER


def test_features_after_features_ok_are_not_taken(bench: MmioDriver) -> None:
    bench.negotiate()
    bench.accept(OWN_FEATURE | F_VERSION_1)
    assert bench.device.features == F_VERSION_1
    bench.status = READY
    assert bench.device.features == F_VERSION_1


def test_a_queue_needs_features_ok(bench: MmioDriver) -> None:
    bench.status = ACKNOWLEDGE | DRIVER
    bench.driver()
    assert bench.read(mmio.QUEUE_READY) == 0
    assert bench.status == ACKNOWLEDGE | DRIVER


def test_a_queue_in_use_does_not_move(bench: MmioDriver) -> None:
    driver = bench.start()
    queue = bench.device.queues[0]
    before = queue.size, queue.desc_gpa, queue.driver_gpa, queue.device_gpa
    bench.write(mmio.QUEUE_SIZE, 4)
    for register in (mmio.QUEUE_DESC, mmio.QUEUE_DRIVER, mmio.QUEUE_DEVICE):
        bench.write(register, 0x1234)
        bench.write(register + 4, 0x1234)
    assert (queue.size, queue.desc_gpa, queue.driver_gpa, queue.device_gpa) == before
    driver.add([b"x"], [1])
    bench.device.serve(queue)
    assert len(driver.used()) == 1


@pytest.mark.parametrize("size", [0, 3, 32, 0xFFFF_FFFF])
def test_a_bad_size_breaks_the_device(bench: MmioDriver, size: int) -> None:
    told: list[str] = []
    bench.device.on_broken = told.append
    bench.negotiate()
    bench.driver(ready=False)
    bench.write(mmio.QUEUE_SIZE, size)
    bench.write(mmio.QUEUE_READY, 1)
    assert bench.read(mmio.QUEUE_READY) == 0
    assert bench.status & NEEDS_RESET
    assert bench.device.faults == len(told) == 1
    # Nothing is served, whatever the driver says, until it resets the device.
    bench.status = READY
    assert not bench.device.live
    bench.write(mmio.QUEUE_SIZE, 8)
    bench.write(mmio.QUEUE_READY, 1)
    assert bench.read(mmio.QUEUE_READY) == 0
    bench.status = 0
    assert bench.status == 0
    driver = bench.start()
    driver.add([b"x"], [1])
    bench.device.serve(bench.device.queues[0])
    assert len(driver.used()) == 1


def test_a_broken_ring_is_told_and_the_others_stand_too(bench: MmioDriver) -> None:
    driver = bench.start()
    other = bench.driver(1, base=0x20_0000)
    driver.put(driver.driver + 2, 2, 0x4000)  # the available index runs away
    bench.device.serve(bench.device.queues[0])
    assert bench.status == READY | NEEDS_RESET
    assert bench.read(mmio.INTERRUPT_STATUS) == mmio.CONFIG_CHANGE
    assert bench.edges == 1
    other.add([b"x"], [1])
    bench.device.serve(bench.device.queues[1])
    assert other.used() == []


def test_nothing_is_served_before_driver_ok(bench: MmioDriver) -> None:
    bench.negotiate()
    driver = bench.driver()
    driver.add([b"x"], [1])
    bench.write(mmio.QUEUE_NOTIFY, 0)
    bench.device.serve(bench.device.queues[0])
    bench.device.config_changed()
    assert driver.used() == []
    assert bench.edges == 0


def test_nothing_is_served_before_the_device_has_heard_of_driver_ok(bench: MmioDriver) -> None:
    """A driver may ring before: then the queue's thread looks while the device takes up what was negotiated."""
    bench.negotiate(OWN_FEATURE)
    driver = bench.driver()
    driver.add([b"early"], [8])
    device = echo(bench)
    in_between: list[object] = []

    def driver_ok() -> None:
        device.serve(device.queues[0])
        in_between.extend(driver.used())

    device.driver_ok = driver_ok  # type: ignore[method-assign]
    bench.status = READY
    assert in_between == []
    device.serve(device.queues[0])
    assert len(driver.used()) == 1


def test_a_driver_sets_status_bits_and_clears_none(bench: MmioDriver) -> None:
    bench.start()
    bench.status = ACKNOWLEDGE
    assert bench.status == READY
    bench.status = READY | NEEDS_RESET | 0x30
    assert bench.status == READY
    assert bench.device.live


def test_queues_that_are_not_there(bench: MmioDriver) -> None:
    bench.start()
    for n in (2, 0xFFFF, 0xFFFF_FFFF):
        bench.write(mmio.QUEUE_SEL, n)
        assert bench.read(mmio.QUEUE_SIZE_MAX) == 0
        assert bench.read(mmio.QUEUE_READY) == 0
        for register in (mmio.QUEUE_SIZE, mmio.QUEUE_READY, mmio.QUEUE_DESC, mmio.QUEUE_RESET):
            bench.write(register, 1)
        bench.write(mmio.QUEUE_NOTIFY, n)
    assert bench.status == READY


def test_configuration_space(bench: MmioDriver) -> None:
    assert bench.read(mmio.CONFIG, 1) == 1
    assert bench.read(mmio.CONFIG + 2, 2) == 0x0403
    assert bench.read(mmio.CONFIG + 8, 4) == 0x0C0B0A09
    assert bench.read(mmio.CONFIG + 4, 8) == 0x0C0B0A0908070605
    assert bench.read(mmio.CONFIG + 12, 4) == 0xFFFF_FFFF
    assert bench.read(mmio.CONFIG + 0xFC, 4) == 0xFFFF_FFFF
    bench.write(mmio.CONFIG + 10, 5, 2)
    bench.write(mmio.CONFIG + 12, 5, 4)
    assert echo(bench).calls == [("config", 10, 2, 5)]
    # Registers are 32 bits wide: 4.2.2.2.
    assert bench.read(mmio.MAGIC_VALUE, 1) == 0
    bench.write(mmio.STATUS, 1, 1)
    assert bench.status == 0


def test_a_change_of_the_configuration(bench: MmioDriver) -> None:
    bench.start()
    before = bench.read(mmio.CONFIG_GENERATION)
    bench.device.config_changed()
    assert bench.read(mmio.CONFIG_GENERATION) == before + 1
    assert bench.read(mmio.INTERRUPT_STATUS) == mmio.CONFIG_CHANGE
    bench.device.config_changed()
    bench.write(mmio.INTERRUPT_ACK, mmio.CONFIG_CHANGE)
    assert bench.read(mmio.INTERRUPT_STATUS) == mmio.CONFIG_CHANGE
    bench.write(mmio.INTERRUPT_ACK, mmio.CONFIG_CHANGE)
    assert bench.read(mmio.INTERRUPT_STATUS) == 0
    assert bench.edges == 2


def test_reset(bench: MmioDriver) -> None:
    driver = bench.start(OWN_FEATURE)
    queue = bench.device.queues[0]
    driver.add([b"x"], [1])
    (chain,) = queue.take()
    bench.device.config_changed()
    bench.status = 0
    assert bench.status == 0
    assert echo(bench).calls == ["driver_ok", "quiesce", "reset"]
    queue.complete(chain, 1)  # one that was in flight comes too late
    assert driver.used() == []
    assert bench.read(mmio.INTERRUPT_STATUS) == 0
    assert (bench.device.features, queue.size, queue.desc_gpa, queue.ready) == (0, 16, 0, False)


def test_reset_of_one_queue(bench: MmioDriver) -> None:
    driver = bench.start(F_RING_RESET)
    driver.add([b"x"], [1])
    bench.write(mmio.QUEUE_RESET, 1)
    assert bench.read(mmio.QUEUE_RESET) == 0
    assert bench.read(mmio.QUEUE_READY) == 0
    assert bench.status == READY
    bench.device.serve(bench.device.queues[0])
    assert driver.used() == []
    again = bench.driver(size=4)
    again.add([b"x"], [1])
    bench.device.serve(bench.device.queues[0])
    assert len(again.used()) == 1


def test_without_the_feature_a_queue_is_not_reset_alone(bench: MmioDriver) -> None:
    bench.start()
    bench.write(mmio.QUEUE_RESET, 1)
    assert bench.read(mmio.QUEUE_READY) == 1


def test_the_state_goes_on_in_another_device(bench: MmioDriver) -> None:
    driver = bench.start(OWN_FEATURE)
    driver.add([b"first"], [8])
    bench.device.serve(bench.device.queues[0])
    chain = driver.add([b"second"], [8])
    device, transport = bench.device.save(), bench.transport.save()
    assert (device, transport) == (bench.device.save(), bench.transport.save())
    other = MmioDriver(bench.memory, Echo(bench.memory))
    other.device.load(device)
    other.transport.load(transport)
    other.device.after_load()
    other.transport.after_load()
    assert other.edges == 1
    assert other.status == READY
    assert echo(other).calls == ["driver_ok"]
    other.device.serve(other.device.queues[0])
    assert driver.used()[-1] == (chain, 6)
    assert other.read(mmio.INTERRUPT_STATUS) == mmio.USED_BUFFER
    other.write(mmio.INTERRUPT_ACK, mmio.USED_BUFFER)
    assert other.read(mmio.INTERRUPT_STATUS) == 0


def test_what_comes_between_a_look_and_a_save_is_not_acknowledged_after_the_load(bench: MmioDriver) -> None:
    bench.start(OWN_FEATURE)
    bench.device.config_changed()
    assert bench.read(mmio.INTERRUPT_STATUS) == mmio.CONFIG_CHANGE
    bench.write(mmio.INTERRUPT_ACK, mmio.CONFIG_CHANGE)
    assert bench.read(mmio.INTERRUPT_STATUS) == 0
    bench.device.config_changed()
    other = MmioDriver(bench.memory, Echo(bench.memory))
    other.transport.load(bench.transport.save())
    for each in (bench, other):
        each.write(mmio.INTERRUPT_ACK, mmio.CONFIG_CHANGE)  # of the look before
        assert each.read(mmio.INTERRUPT_STATUS) == mmio.CONFIG_CHANGE
        assert each.transport.save() == {"interrupt_status": mmio.CONFIG_CHANGE, "seen": mmio.CONFIG_CHANGE}
        each.write(mmio.INTERRUPT_ACK, mmio.CONFIG_CHANGE)
        assert each.read(mmio.INTERRUPT_STATUS) == 0


def test_any_size_that_a_driver_has_written_can_be_saved(bench: MmioDriver) -> None:
    bench.negotiate()
    bench.write(mmio.QUEUE_SIZE, 0xFFFF_FFFF)
    other = MmioDriver(bench.memory, Echo(bench.memory))
    other.device.load(bench.device.save())
    other.device.after_load()
    other.write(mmio.QUEUE_READY, 1)
    assert other.status & NEEDS_RESET


def test_an_interrupt_of_a_saved_state_waits_until_the_guest_runs(bench: MmioDriver) -> None:
    """The interrupt controllers get their state after the devices: one that is there at once would be lost."""
    bench.start(OWN_FEATURE)
    bench.device.config_changed()
    state = bench.transport.save()
    other = MmioDriver(bench.memory, Echo(bench.memory))
    other.device.io = io = Watcher()
    other.transport.load(state)
    other.transport.after_load()
    assert other.edges == 0
    io.settle()
    assert other.edges == 1
    assert other.read(mmio.INTERRUPT_STATUS) == mmio.CONFIG_CHANGE


def test_a_state_with_rings_outside_of_memory_breaks_the_device(bench: MmioDriver) -> None:
    bench.start()
    state = bench.device.save()
    state["queues"][0]["desc"] = 1 << 60
    other = MmioDriver(bench.memory, Echo(bench.memory))
    other.device.load(state)
    other.device.after_load()
    assert other.status == READY | NEEDS_RESET
    assert not other.device.live


def test_where_no_interrupt_is_left_one_sentence_says_what_to_do() -> None:
    from pyvmm.boards.virtio import edge
    from pyvmm.errors import ConfigError

    class Irqchip:
        in_kernel = True

        def free_gsi(self, candidates: object) -> None:
            return None

    class Board:
        irqchip = Irqchip()

        def irq_line(self, gsi: int, name: str) -> None:
            raise ConfigError(f"GSI {gsi} is for net0 alone")

    with pytest.raises(ConfigError, match=r"no interrupt is left for net17: .*machine=pc"):
        edge(Board(), "net17")  # type: ignore[arg-type]
