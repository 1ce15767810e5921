"""The run loop's answer to every exit reason, fed with synthetic exits: no KVM, no guest."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

import kvm_page as k
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvm_page import Guest, Recorder

from pyvmm.address_space import AddressSpace
from pyvmm.cpu_exec import CpuExec, StopReason
from pyvmm.device import Device, DeviceLock
from pyvmm.dump import reason_text
from pyvmm.errors import ConfigError, KvmError, StateError
from pyvmm.kvm.exits import EXIT_REASONS
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.region import BufferRegion, FifoRegion, LatchRegion, MemoryRegion, RegisterRegion, SinkRegion

DEADLINE_S = 10
INTEL, AMD = "GenuineIntel", "AuthenticAMD"
U64 = (1 << 64) - 1


@pytest.fixture
def guest() -> Guest:
    return Guest()


def text(guest: Guest, vendor: str = INTEL) -> str:
    return reason_text(guest.cpu.detail, vendor)


def run_thread(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(DEADLINE_S)
    return not thread.is_alive()


# -- IO --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_out(guest: Guest, size: int) -> None:
    device = Recorder()
    guest.pio.map(0x3F8, 8, device)
    value = 0x8765_4321 & ((1 << (8 * size)) - 1)
    assert guest.out(0x3F8, size, value) is None
    assert device.writes == [(0, size, value)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_in(guest: Guest, size: int) -> None:
    device = Recorder(0xFFEE_DDCC_8765_4321)
    guest.pio.map(0x3F8, 8, device)
    assert guest.in_(0x3FC, size) == [0x8765_4321 & ((1 << (8 * size)) - 1)]
    assert device.reads == [(4, size)]
    assert guest.page[k.IO_DATA + size] == 0  # not a byte more


@pytest.mark.parametrize("size", [1, 2, 4])
def test_string_out_moves_the_data_and_not_the_port(guest: Guest, size: int) -> None:
    device, neighbour = Recorder(), Recorder()
    guest.pio.map(0x1F0, 4, device)
    guest.pio.map(0x1F4, 4, neighbour)
    values = [(0x1122_3344 * (i + 1)) & ((1 << (8 * size)) - 1) for i in range(9)]
    assert guest.out(0x1F0, size, *values) is None
    assert device.writes == [(0, size, value) for value in values]
    assert neighbour.writes == []


@pytest.mark.parametrize("size", [1, 2, 4])
def test_string_in_moves_the_data_and_not_the_port(guest: Guest, size: int) -> None:
    device = Recorder()
    guest.pio.map(0x1F0, 4, device)
    assert guest.in_(0x1F0, size, 9) == list(range(1, 10))
    assert device.reads == [(0, size)] * 9


@pytest.mark.parametrize("size", [1, 2, 4])
def test_string_io_up_to_the_last_byte_of_the_page(size: int) -> None:
    guest = Guest()
    device = Recorder()
    guest.pio.map(0x1F0, 4, device)
    count = k.PAGE_BYTES // size
    values = guest.in_(0x1F0, size, count)
    assert values == [n & ((1 << (8 * size)) - 1) for n in range(1, count + 1)]
    assert guest.page[2 * k.PAGE_BYTES :] == bytes(k.PAGE_BYTES)
    guest.page[2 * k.PAGE_BYTES - size : 2 * k.PAGE_BYTES] = b"\xa5" * size
    assert guest.io(k.OUT, size, 0x1F0, count) is None
    assert device.writes[-1] == (0, size, int.from_bytes(b"\xa5" * size, "little"))


def test_string_io_ending_at_the_end_of_the_mapping() -> None:
    page = bytearray(2 * k.PAGE_BYTES)
    pio, mmio = AddressSpace("pio", 1 << 16), AddressSpace("mmio", 1 << 52)
    guest = Guest()
    guest.page, guest.pio = page, pio
    guest.cpu = CpuExec(None, pio, mmio, page=page)
    assert guest.in_(0x99, 4, 1024) == [0xFFFF_FFFF] * 1024
    assert guest.io(k.IN, 1, 0x99, 3, at=2 * k.PAGE_BYTES - 3) is None
    assert guest.io(k.IN, 4, 0x99, 0, at=2 * k.PAGE_BYTES) is None


def test_a_count_of_zero_does_nothing(guest: Guest) -> None:
    device = Recorder()
    guest.pio.map(0x80, 1, device)
    assert guest.in_(0x80, 1, 0) == []
    assert guest.out(0x80, 1) is None
    assert (device.reads, device.writes) == ([], [])


def test_unclaimed_ports_float(guest: Guest) -> None:
    assert guest.in_(0x1234, 1) == [0xFF]
    assert guest.in_(0x1234, 2, 3) == [0xFFFF] * 3
    assert guest.in_(0xFFFF, 4) == [0xFFFF_FFFF]  # past the last port
    assert guest.out(0x1234, 4, 1, 2, 3) is None


def test_port_accesses_are_split_as_the_region_asks(guest: Guest) -> None:
    device = Recorder(0x11, 0x22, 0x33, 0x44)
    guest.pio.map(0x70, 4, device, valid_sizes=(1, 4), impl_sizes=(1, 1))
    assert guest.in_(0x70, 4) == [0x4433_2211]
    assert guest.in_(0x71, 2) == [0x2211]
    assert device.reads == [(0, 1), (1, 1), (2, 1), (3, 1), (1, 1), (2, 1)]
    assert guest.out(0x72, 4, 0x0403_0201) is None  # half of it is nobody's
    assert device.writes == [(2, 1, 1), (3, 1, 2)]


def test_polling_one_port_after_another(guest: Guest) -> None:
    # The loop remembers the region that answered last.
    devices = [Recorder(n) for n in range(4)]
    for n, device in enumerate(devices):
        guest.pio.map(0x100 + 2 * n, 1, device)
    for port in (0x100, 0x102, 0x100, 0x106, 0x104, 0x104, 0x102):
        assert guest.in_(port, 1) == [(port - 0x100) // 2]
        assert guest.in_(port + 1, 1) == [0xFF]


def test_a_region_that_went_away_floats_at_once_and_its_successor_answers(guest: Guest) -> None:
    old, new = Recorder(1), Recorder(2)
    region = guest.pio.map(0x80, 1, old)
    assert guest.in_(0x80, 1) == [1]
    guest.pio.unmap(region)
    assert guest.in_(0x80, 1) == [0xFF]
    guest.pio.map(0x80, 1, new)
    assert guest.in_(0x80, 1) == [2]
    assert len(old.reads) == 1


def test_a_handler_that_unmaps_itself_in_the_middle_of_string_io(guest: Guest) -> None:
    class Leaving(Device):
        calls = 0

        def read(self, offset: int, size: int) -> int:
            self.calls += 1
            if self.calls == 3:
                guest.pio.unmap(region)
                guest.pio.map(0x80, 1, Recorder(7))
            return self.calls

    device = Leaving()
    region = guest.pio.map(0x80, 1, device)
    values = guest.in_(0x80, 1, 6)
    assert values[:3] == [1, 2, 3]
    assert set(values[3:]) <= {0xFF, 7}
    assert device.calls == 3
    assert guest.in_(0x80, 1) == [7]


def test_a_handler_that_moves_its_region_while_it_is_the_recent_one(guest: Guest) -> None:
    offsets: list[int] = []

    class Moving(Device):
        def write(self, offset: int, size: int, value: int) -> None:
            offsets.append(offset)
            guest.pio.unmap(region)
            guest.pio.add(value, region)

    region = MemoryRegion(4, Moving())
    guest.pio.add(0x100, region)
    assert guest.out(0x101, 1, 0x80, 0x40) is None  # the second unit finds nobody there
    assert region.base == 0x80
    assert guest.out(0x83, 1, 0x20) is None
    assert offsets == [1, 3]


def units(data: bytes, size: int) -> list[int]:
    return [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]


class Sectors(Recorder):
    """A data port that opens a window of 4 bytes after each other, ``left`` of them."""

    def __init__(self, left: int, writes: bool = False) -> None:
        super().__init__()
        self.left, self.writing, self.windows = left, writes, [bytearray(4)]
        self.fifo = FifoRegion(1, self, self.end, wide=True)
        self.open()

    def open(self) -> None:
        self.left -= 1
        if self.writing:
            self.windows.append(bytearray(4))
            self.fifo.open_write(self.windows[-1])
        else:
            self.fifo.open_read(bytes([0x10 * self.left + n for n in range(4)]))

    def end(self) -> None:
        if self.left:
            self.open()


@pytest.mark.parametrize("size", [2, 4])
def test_string_in_goes_on_from_window_to_window_and_floats_after_the_last(guest: Guest, size: int) -> None:
    device = Sectors(2)
    guest.pio.add(0x1F0, device.fifo)
    expected = bytes([0x10, 0x11, 0x12, 0x13, 0, 1, 2, 3]) + b"\xff" * 8
    assert guest.in_(0x1F0, size, 16 // size) == units(expected, size)
    assert device.fifo.count == 16 // size


def test_string_in_with_a_window_that_ends_within_a_unit(guest: Guest) -> None:
    fifo = FifoRegion(1, Recorder(), lambda: None, wide=True)
    guest.pio.add(0x1F0, fifo)
    fifo.open_read(b"abcdef")
    assert guest.in_(0x1F0, 4, 3) == units(b"abcdef\xff\xff\xff\xff\xff\xff", 4)


def test_string_out_goes_on_from_window_to_window_and_is_lost_after_the_last(guest: Guest) -> None:
    device = Sectors(2, writes=True)
    guest.pio.add(0x1F0, device.fifo)
    assert guest.out(0x1F0, 2, *units(b"abcdefghijkl", 2)) is None
    assert device.windows[1:] == [b"abcd", b"efgh"]


def test_a_window_whose_end_unmaps_the_port_answers_no_more(guest: Guest) -> None:
    fifo = FifoRegion(1, Recorder(), lambda: guest.pio.unmap(fifo), wide=True)
    guest.pio.add(0x1F0, fifo)
    fifo.open_read(b"abcd")
    assert guest.in_(0x1F0, 2, 4) == units(b"abcd\xff\xff\xff\xff", 2)


def test_registers_answer_exits_by_themselves_while_the_device_says_so(guest: Guest) -> None:
    device = Recorder(0x42)
    device.impl_sizes = (1, 1)
    region = RegisterRegion(8, device, capacity=16)
    guest.pio.add(0x3F8, region)
    region.latch(5, 0x60)
    region.gather(0)
    assert guest.in_(0x3FD, 1) == [0x60]
    assert guest.out(0x3F8, 1, *b"many at once") is None
    assert guest.in_(0x3FD, 1, 3) == [0x60] * 3
    assert guest.out(0x3F8, 1, 10) is None
    assert guest.in_(0x3F8, 1) == [0x42]
    assert (device.reads, device.writes) == ([(0, 1)], [(0, 1, 10)])
    assert region.take() == b"many at once"
    region.unlatch(5)
    region.release()
    assert guest.in_(0x3FD, 1) == [0x42]
    assert guest.out(0x3F8, 1, 65) is None
    assert device.writes[1:] == [(0, 1, 65)]


def test_fifo_sink_and_latch_answer_string_io(guest: Guest) -> None:
    lines: list[bytes] = []
    sectors: list[bytes] = []
    buffer = bytearray(512)
    fifo = FifoRegion(2, Recorder(), lambda: sectors.append(bytes(buffer)))
    guest.pio.add(0x1F0, fifo)
    guest.pio.add(0x402, SinkRegion(1, lines.append))
    latch = LatchRegion(1)
    guest.pio.add(0x80, latch)
    sector = bytes(range(256)) * 2
    fifo.open_read(sector)
    assert guest.in_(0x1F0, 2, 256) == [int.from_bytes(sector[i : i + 2], "little") for i in range(0, 512, 2)]
    fifo.open_write(buffer)
    for i in range(0, 512, 2):
        assert guest.out(0x1F0, 2, int.from_bytes(sector[i : i + 2], "little")) is None
    assert sectors == [b"\0" * 512, sector]
    assert guest.out(0x402, 1, *b"SeaBIOS\n") is None
    assert lines == [b"SeaBIOS\n"]
    assert guest.out(0x80, 1, *range(10)) is None
    assert guest.in_(0x80, 1) == [9]


# -- MMIO ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 5, 7])
def test_mmio_of_every_size_at_every_alignment(guest: Guest, size: int, offset: int) -> None:
    memory = bytearray(range(0x10, 0x30))
    guest.mmio.add(0xFEC0_0000, BufferRegion(memory))
    assert guest.mmio_read(0xFEC0_0000 + offset, size) == bytes(range(0x10 + offset, 0x10 + offset + size))
    data = bytes(range(0xA0, 0xA0 + size))
    assert guest.mmio_write(0xFEC0_0000 + offset, data) is None
    expected = bytearray(range(0x10, 0x30))
    expected[offset : offset + size] = data
    assert memory == expected


@pytest.mark.parametrize(
    ("size", "calls"), [(3, [(0, 2), (2, 1)]), (5, [(0, 4), (4, 1)]), (7, [(0, 4), (4, 2), (6, 1)])]
)
def test_odd_mmio_sizes_reach_a_device_in_powers_of_two(
    guest: Guest, size: int, calls: list[tuple[int, int]]
) -> None:
    device = Recorder(0)
    guest.mmio.map(0x1000, 8, device)
    assert guest.mmio_read(0x1000, size) == bytes(size)
    assert device.reads == calls
    assert guest.mmio_write(0x1000, bytes(size)) is None
    assert [(offset, n) for offset, n, _ in device.writes] == calls


def test_mmio_values_are_little_endian_and_unsigned(guest: Guest) -> None:
    device = Recorder(-2)
    guest.mmio.map(0x1000, 8, device)
    assert guest.mmio_write(0x1000, bytes([1, 2, 3, 4, 5, 6, 7, 0x88])) is None
    assert device.writes == [(0, 8, 0x8807_0605_0403_0201)]
    assert guest.mmio_read(0x1000, 8) == b"\xfe" + b"\xff" * 7


def test_unclaimed_mmio_floats(guest: Guest) -> None:
    for size in range(1, 9):
        assert guest.mmio_read(0xD000_0000, size) == b"\xff" * size
        assert guest.mmio_write(0xD000_0000, bytes(size)) is None


def test_mmio_that_straddles_regions_and_gaps(guest: Guest) -> None:
    low, high = bytearray(b"\x11" * 4), bytearray(b"\x22" * 4)
    guest.mmio.add(0x1000, BufferRegion(low))
    guest.mmio.add(0x1006, BufferRegion(high))
    # 0x1004 to 0x1007 is one aligned access in it, of whoever has 0x1004: nobody.
    assert guest.mmio_read(0x1001, 8) == b"\x11\x11\x11\xff\xff\xff\xff\x22"
    assert guest.mmio_write(0x1003, bytes(range(6))) is None
    assert (low, high) == (b"\x11\x11\x11\x00", b"\x22\x22\x05\x22")


@pytest.mark.parametrize("addr", [U64, U64 - 1, U64 - 6, U64 - 7, 1 << 63, (1 << 52) - 1, 1 << 52])
def test_mmio_at_the_edges_of_the_address_space_reaches_nobody_else(guest: Guest, addr: int) -> None:
    at_zero = Recorder(0)
    guest.mmio.map(0, 0x1000, at_zero)
    assert guest.mmio_read(addr, 8) == b"\xff" * 8
    assert guest.mmio_write(addr, bytes(8)) is None
    assert (at_zero.reads, at_zero.writes) == ([], [])


def test_mmio_of_length_zero_does_nothing(guest: Guest) -> None:
    device = Recorder()
    guest.mmio.map(0x1000, 8, device)
    assert guest.mmio_read(0x1000, 0) == b""
    assert guest.mmio_write(0x1000, b"") is None
    assert (device.reads, device.writes) == ([], [])


def test_ports_and_memory_are_two_spaces(guest: Guest) -> None:
    guest.pio.map(0x80, 1, Recorder(1))
    guest.mmio.map(0x80, 1, Recorder(2))
    assert guest.in_(0x80, 1) == [1]
    assert guest.mmio_read(0x80, 1) == b"\x02"


# -- devices that go wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "1", b"1", 1.0, [], object()])
def test_a_read_that_gives_no_int_stops_the_run_with_a_type_error(guest: Guest, value: object) -> None:
    guest.pio.map(0x80, 4, Recorder(value))
    guest.mmio.map(0x1000, 8, Recorder(value))
    with pytest.raises(TypeError):
        guest.io(k.IN, 1, 0x80)
    with pytest.raises(TypeError):
        guest.exit(k.MMIO, "Q8sIB", 0x1003, b"", 4, 0)


@pytest.mark.parametrize(
    ("value", "byte"), [(-1, 0xFF), (-2, 0xFE), (0x1FF, 0xFF), (1 << 64, 0), ((1 << 200) + 5, 5), (True, 1)]
)
def test_a_read_that_gives_too_much_is_cut_to_the_access(guest: Guest, value: int, byte: int) -> None:
    guest.pio.map(0x80, 1, Recorder(value))
    assert guest.in_(0x80, 1) == [byte]
    assert guest.page[k.IO_DATA + 1] == 0


def test_what_a_device_raises_comes_out_and_the_loop_can_be_used_again(guest: Guest) -> None:
    bad = Recorder(KeyError)
    guest.pio.map(0x80, 1, bad)
    guest.mmio.map(0x1000, 8, bad)
    guest.pio.map(0x90, 1, Recorder(5))
    for access in (
        lambda: guest.io(k.IN, 1, 0x80),
        lambda: guest.out(0x80, 1, 0),
        lambda: guest.exit(k.MMIO, "Q8sIB", 0x1000, b"", 8, 0),
        lambda: guest.mmio_write(0x1000, bytes(3)),
    ):
        with pytest.raises(KeyError, match="told to"):
            access()
        assert guest.in_(0x90, 1) == [5]
    took = threading.Event()

    def take() -> None:
        with bad.lock:
            took.set()

    run_thread(take)
    assert took.wait(DEADLINE_S)


def test_a_device_that_raises_ends_string_io_there(guest: Guest) -> None:
    device = Recorder(1, 2, KeyError, 4)
    guest.pio.map(0x80, 1, device)
    with pytest.raises(KeyError):
        guest.io(k.IN, 1, 0x80, 4)
    assert len(device.reads) == 3
    assert guest.page[k.IO_DATA : k.IO_DATA + 4] == b"\x01\x02\0\0"


@pytest.mark.parametrize(
    "raised", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, RecursionError]
)
def test_no_exception_is_special(guest: Guest, raised: type[BaseException]) -> None:
    guest.pio.map(0x80, 1, Recorder(raised))
    with pytest.raises(raised):
        guest.io(k.IN, 1, 0x80)


def test_a_vcpu_waiting_for_a_device_leaves_the_gil_to_others(guest: Guest) -> None:
    device = Recorder(7)
    guest.pio.map(0x80, 1, device)
    values: list[int] = []
    with device.lock:
        thread = run_thread(lambda: values.extend(guest.in_(0x80, 1)))
        for _ in range(100_000):  # Python goes on here while the other thread waits
            pass
        assert device.reads == []
    assert ended(thread)
    assert values == [7]


def test_many_vcpus_on_one_device_take_turns() -> None:
    class Exclusive(Device):
        inside = overlaps = count = 0

        def read(self, offset: int, size: int) -> int:
            self.inside += 1
            self.overlaps += self.inside != 1
            for _ in range(20):
                pass
            self.inside -= 1
            self.count += 1
            return 0

    device = Exclusive()
    guests = [Guest() for _ in range(4)]
    for guest in guests:
        guest.pio.map(0x80, 1, device)
    threads = [run_thread(lambda g=guest: [g.in_(0x80, 1) for _ in range(300)]) for guest in guests]  # type: ignore[misc]
    assert all(ended(t) for t in threads)
    assert (device.overlaps, device.count) == (0, 1200)


def test_regions_come_and_go_under_a_running_vcpu(guest: Guest) -> None:
    stop, seen = threading.Event(), set()

    def vcpu() -> None:
        while not stop.is_set():
            seen.update(guest.in_(0x80, 1, 3))
            seen.update(guest.mmio_read(0x1000, 1))

    thread = run_thread(vcpu)
    for n in range(200):
        port = guest.pio.map(0x80, 1, Recorder(n & 0x3F))
        memory = guest.mmio.add(0x1000, BufferRegion(bytearray([n & 0x3F])))
        guest.pio.unmap(port)
        guest.mmio.unmap(memory)
    stop.set()
    assert ended(thread)
    assert seen <= {*range(0x40), 0xFF}


# -- the reasons that move no data -----------------------------------------------------------------------


def test_hlt_goes_on_where_kvm_has_the_interrupt_controllers(guest: Guest) -> None:
    assert guest.exit(k.HLT) is None
    assert not guest.cpu.halted


def test_hlt_sleeps_where_user_space_has_them() -> None:
    guest = Guest(user_irqchip=True)
    assert guest.exit(k.HLT) is None
    assert guest.cpu.halted


@pytest.mark.parametrize("reason", [k.IRQ_WINDOW_OPEN, k.INTR])
def test_irq_window_and_intr_go_on(guest: Guest, reason: int) -> None:
    before = bytes(guest.page)
    assert guest.exit(reason) is None
    assert guest.cpu.detail == {}
    assert guest.page[k.UNION :] == before[k.UNION :]


def test_set_tpr_goes_on_and_leaves_cr8_alone(guest: Guest) -> None:
    guest.page[k.CR8] = 9
    assert guest.exit(k.SET_TPR) is None
    assert guest.page[k.CR8] == 9


def test_a_user_space_apic_hears_of_a_lowered_priority() -> None:
    guest = Guest(user_irqchip=True)
    seen: list[int] = []
    guest.cpu.on_tpr = lambda: seen.append(guest.cpu.cr8)
    guest.page[k.CR8] = 3
    assert guest.exit(k.SET_TPR) is None
    assert seen == [3]
    guest.page[k.CR8] = 5  # raised without an exit: looked at before the guest is put to sleep
    assert guest.exit(k.HLT) is None
    assert seen == [3, 5]
    guest.cpu.close()
    assert guest.cpu.on_tpr is None


def test_what_of_the_apic_is_in_kvm_run(guest: Guest) -> None:
    guest.cpu.cr8 = 7
    assert guest.page[k.CR8] == guest.cpu.cr8 == 7
    assert guest.cpu.apic_base == 0
    guest.page[k.APIC_BASE : k.APIC_BASE + 8] = (0xFEE0_0900).to_bytes(8, "little")
    assert guest.cpu.apic_base == 0xFEE0_0900


def test_tpr_access_goes_on(guest: Guest) -> None:
    assert guest.exit(k.TPR_ACCESS, "QI", 0xFFFF_F000, 1) is None


def test_shutdown(guest: Guest) -> None:
    assert guest.exit(k.SHUTDOWN) is StopReason.SHUTDOWN
    assert guest.cpu.detail == {"exit": "SHUTDOWN", "exit_reason": 8}
    assert text(guest) == "KVM_EXIT_SHUTDOWN"


@pytest.mark.parametrize(
    ("code", "vendor", "name"),
    [
        (48, INTEL, "VMX EPT_VIOLATION"),
        (0x8000_0021, INTEL, "VM entry failed"),
        (0xFFF0, INTEL, "VMX reason 65520"),
        (0x400, AMD, "SVM npf"),
        (0x7B, "HygonGenuine", "SVM io"),
        (0xFFF0, AMD, "SVM code 0xfff0"),
    ],
)
def test_unknown_decodes_the_hardwares_reason(guest: Guest, code: int, vendor: str, name: str) -> None:
    assert guest.exit(k.UNKNOWN, "Q", code) is StopReason.UNKNOWN
    assert guest.cpu.detail["hardware_exit_reason"] == code
    assert text(guest, vendor).startswith(f"KVM_EXIT_UNKNOWN, hardware_exit_reason {code:#x} (")
    assert name.lower() in text(guest, vendor).lower()


def test_fail_entry(guest: Guest) -> None:
    assert guest.exit(k.FAIL_ENTRY, "QI", 0x8000_0021, 3) is StopReason.FAIL_ENTRY
    assert guest.cpu.detail == {
        "exit": "FAIL_ENTRY",
        "exit_reason": 9,
        "hardware_entry_failure_reason": 0x8000_0021,
        "cpu": 3,
    }
    assert text(guest).startswith("KVM_EXIT_FAIL_ENTRY, hardware_entry_failure_reason 0x80000021 (VMX ")
    assert guest.exit(k.FAIL_ENTRY, "QI", U64, 0) is StopReason.FAIL_ENTRY
    assert "VMRUN refused" in text(guest, AMD)


def test_internal_error_emulation_shows_the_instructions_bytes(guest: Guest) -> None:
    code = bytes.fromhex("0f01d1") + bytes(12)
    assert guest.exit(k.INTERNAL_ERROR, "IIQB15s", 1, 3, 1, 3, code) is StopReason.INTERNAL_ERROR
    assert guest.cpu.detail["suberror_name"] == "EMULATION"
    assert text(guest) == "KVM_EXIT_INTERNAL_ERROR, suberror 1 (EMULATION), instruction 0f 01 d1"


def test_internal_error_emulation_of_the_longest_and_of_a_lying_length(guest: Guest) -> None:
    code = bytes(range(1, 16))
    guest.exit(k.INTERNAL_ERROR, "IIQB15s", 1, 3, 1, 15, code)
    assert text(guest).endswith("instruction " + code.hex(" "))
    guest.exit(k.INTERNAL_ERROR, "IIQB15s", 1, 3, 1, 0xFF, code)
    assert text(guest).endswith("instruction " + code.hex(" "))


def test_internal_error_emulation_without_the_bytes(guest: Guest) -> None:
    assert guest.exit(k.INTERNAL_ERROR, "II", 1, 0) is StopReason.INTERNAL_ERROR
    assert text(guest) == "KVM_EXIT_INTERNAL_ERROR, suberror 1 (EMULATION)"
    guest.exit(k.INTERNAL_ERROR, "IIQQQ", 1, 3, 0, 7, 8)
    assert text(guest).endswith(", data 0x0 0x7 0x8")


@pytest.mark.parametrize(
    ("suberror", "name"),
    [(2, "SIMUL_EX"), (3, "DELIVERY_EV"), (4, "UNEXPECTED_EXIT_REASON"), (77, "suberror 77")],
)
def test_internal_error_of_every_kind(guest: Guest, suberror: int, name: str) -> None:
    assert guest.exit(k.INTERNAL_ERROR, "IIQQ", suberror, 2, 0x8000_030D, 0x1F) is StopReason.INTERNAL_ERROR
    detail = guest.cpu.detail
    assert (detail["suberror"], detail["suberror_name"], detail["data"]) == (
        suberror,
        name,
        [0x8000_030D, 0x1F],
    )
    assert text(guest).endswith(f"suberror {suberror} ({name}), data 0x8000030d 0x1f")


def test_internal_error_with_an_impossible_number_of_data(guest: Guest) -> None:
    guest.exit(k.INTERNAL_ERROR, "II16Q", 3, 0xFFFF_FFFF, *range(16))
    assert guest.cpu.detail["data"] == list(range(16))


@pytest.mark.parametrize(
    ("type_", "name"),
    [
        (1, "SHUTDOWN"),
        (2, "RESET"),
        (3, "CRASH"),
        (4, "WAKEUP"),
        (5, "SUSPEND"),
        (6, "SEV_TERM"),
        (99, "type 99"),
    ],
)
def test_system_event_of_every_type(guest: Guest, type_: int, name: str) -> None:
    assert guest.exit(k.SYSTEM_EVENT, "IIQ", type_, 1, 0xABC) is StopReason.SYSTEM_EVENT
    detail = guest.cpu.detail
    assert (detail["type"], detail["data"]) == (type_, [0xABC])
    assert detail["event"] == name
    assert text(guest) == f"KVM_EXIT_SYSTEM_EVENT, event {name}"


def test_system_event_with_an_impossible_number_of_data(guest: Guest) -> None:
    guest.exit(k.SYSTEM_EVENT, "II16Q", 3, 0xFFFF_FFFF, *range(16))
    assert guest.cpu.detail["data"] == list(range(16))


def test_debug(guest: Guest) -> None:
    assert guest.exit(k.DEBUG, "IIQQQ", 1, 0, 0x1234, 0xFFFF_4FF0, 0x400) is StopReason.DEBUG
    assert guest.cpu.detail == {
        "exit": "DEBUG",
        "exit_reason": 4,
        "exception": 1,
        "pc": 0x1234,
        "dr6": 0xFFFF_4FF0,
        "dr7": 0x400,
    }
    assert text(guest) == "KVM_EXIT_DEBUG, exception 0x1"


def test_exception(guest: Guest) -> None:
    assert guest.exit(k.EXCEPTION, "II", 14, 0x18) is StopReason.EXCEPTION
    assert (guest.cpu.detail["exception"], guest.cpu.detail["error_code"]) == (14, 0x18)
    assert text(guest) == "KVM_EXIT_EXCEPTION, exception 0xe, error_code 0x18"


def test_memory_fault(guest: Guest) -> None:
    assert guest.exit(k.MEMORY_FAULT, "QQQ", 8, 0x1_0000_0000, 0x1000) is StopReason.MEMORY_FAULT
    assert guest.cpu.detail == {
        "exit": "MEMORY_FAULT",
        "exit_reason": 39,
        "flags": 8,
        "gpa": 1 << 32,
        "size": 0x1000,
    }
    assert text(guest) == "KVM_EXIT_MEMORY_FAULT, flags 0x8, gpa 0x100000000, size 0x1000"


def test_hypercall_with_nobody_to_answer_is_enosys(guest: Guest) -> None:
    assert guest.exit(k.HYPERCALL, "Q6QQ", 12, 1, 2, 3, 4, 5, 6, 0) is None
    assert guest.union("q", 56) == (-1000,)


@pytest.mark.parametrize(
    ("result", "ret"), [(0, 0), (7, 7), (-22, U64 - 21), (U64, U64), (1 << 63, 1 << 63), ((1 << 64) + 5, 5)]
)
def test_hypercall_answered(guest: Guest, result: int, ret: int) -> None:
    calls: list[tuple[int, list[int]]] = []

    def answer(nr: int, args: list[int]) -> int:
        calls.append((nr, args))
        return result

    guest.cpu.on_hypercall = answer
    assert guest.exit(k.HYPERCALL, "Q6QQ", 12, 1, 2, 3, 4, 5, U64, 0) is None
    assert calls == [(12, [1, 2, 3, 4, 5, U64])]
    assert guest.union("Q", 56) == (ret,)


def test_hypercall_answered_with_nonsense_raises(guest: Guest) -> None:
    guest.cpu.on_hypercall = lambda nr, args: None  # type: ignore[assignment,return-value]
    with pytest.raises(TypeError):
        guest.exit(k.HYPERCALL, "Q6QQ", *range(8))


class Msrs:
    """Knows one MSR, 0x10."""

    def __init__(self) -> None:
        self.value: Any = 0x1122_3344_5566_7788

    def read(self, index: int) -> int | None:
        return self.value if index == 0x10 else None

    def write(self, index: int, value: int) -> bool:
        if index != 0x10:
            return False
        self.value = value
        return True


MSR_LAYOUT = "B7xIIQ"  # error, reason, index, data


@pytest.mark.parametrize(
    ("value", "data"), [(0x1122_3344_5566_7788, 0x1122_3344_5566_7788), (0, 0), (-1, U64), (1 << 64, 0)]
)
def test_rdmsr_taken(guest: Guest, value: int, data: int) -> None:
    guest.cpu.msr_handler = Msrs()
    guest.cpu.msr_handler.value = value
    assert guest.exit(k.RDMSR, MSR_LAYOUT, 1, 2, 0x10, 0xDEAD) is None
    assert guest.union(MSR_LAYOUT) == (0, 2, 0x10, data)


def test_rdmsr_refused_is_an_error_and_leaks_no_data(guest: Guest) -> None:
    for handler in (None, Msrs()):
        guest.cpu.msr_handler = handler
        assert guest.exit(k.RDMSR, MSR_LAYOUT, 0, 2, 0x11, 0xDEAD) is None
        assert guest.union(MSR_LAYOUT) == (1, 2, 0x11, 0)


def test_wrmsr_taken(guest: Guest) -> None:
    guest.cpu.msr_handler = msrs = Msrs()
    assert guest.exit(k.WRMSR, MSR_LAYOUT, 1, 2, 0x10, 0xFEDC) is None
    assert guest.union("B") == (0,)
    assert msrs.value == 0xFEDC


def test_wrmsr_refused_is_an_error(guest: Guest) -> None:
    for handler in (None, Msrs()):
        guest.cpu.msr_handler = handler
        assert guest.exit(k.WRMSR, MSR_LAYOUT, 0, 2, 0x11, 5) is None
        assert guest.union("B") == (1,)


def test_an_msr_handler_that_raises(guest: Guest) -> None:
    guest.cpu.msr_handler = object()
    for reason in (k.RDMSR, k.WRMSR):
        with pytest.raises(AttributeError):
            guest.exit(reason, MSR_LAYOUT, 0, 2, 0x10, 5)


def test_ioapic_eoi(guest: Guest) -> None:
    assert guest.exit(k.IOAPIC_EOI, "B", 0x31) is None
    vectors: list[int] = []
    guest.cpu.on_eoi = vectors.append
    assert guest.exit(k.IOAPIC_EOI, "B", 0xEF) is None
    assert vectors == [0xEF]


HANDLED = {
    *(k.UNKNOWN, k.EXCEPTION, k.IO, k.HYPERCALL, k.DEBUG, k.HLT, k.MMIO, k.IRQ_WINDOW_OPEN, k.SHUTDOWN),
    *(k.FAIL_ENTRY, k.INTR, k.SET_TPR, k.TPR_ACCESS, k.INTERNAL_ERROR, k.SYSTEM_EVENT, k.IOAPIC_EOI),
    *(k.RDMSR, k.WRMSR, k.MEMORY_FAULT),
}


@pytest.mark.parametrize("number", sorted(EXIT_REASONS.keys() - HANDLED))
def test_known_reasons_that_nobody_handles_stop_by_name(guest: Guest, number: int) -> None:
    assert guest.exit(number) is StopReason.UNHANDLED
    assert guest.cpu.detail == {"exit": EXIT_REASONS[number], "exit_reason": number}
    assert text(guest) == f"KVM_EXIT_{EXIT_REASONS[number]}"


@pytest.mark.parametrize(
    "number", [200, 999, *range(1000, 1010), 0x7777, 1 << 31, (1 << 32) - 2, (1 << 32) - 1]
)
def test_reasons_nobody_knows_stop_by_number(guest: Guest, number: int) -> None:
    assert guest.exit(number) is StopReason.UNHANDLED
    assert guest.cpu.detail == {"exit": f"exit {number}", "exit_reason": number}
    assert text(guest) == f"exit {number}"


def test_no_exit_yet(guest: Guest) -> None:
    assert text(guest) == "no exit"


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 45), st.binary(min_size=160, max_size=160))
def test_whatever_stands_in_the_union_is_answered_and_named(reason: int, union: bytes) -> None:
    # But for what only the kernel says: where a port access has its data, and how long an MMIO access is.
    guest = Guest()
    page = bytearray(union)
    if reason == k.IO:
        page[0:2] = bytes([union[0] & 1, 1 << (union[1] % 3)])
        page[4:16] = (union[4] + 1).to_bytes(4, "little") + k.IO_DATA.to_bytes(8, "little")
    elif reason == k.MMIO:
        page[16:20] = (union[16] % 9).to_bytes(4, "little")
    stop = guest.exit(reason, "160s", bytes(page))
    if stop is not None:
        for vendor in (INTEL, AMD, ""):
            assert text(guest, vendor)


# -- the coalesced ring ----------------------------------------------------------------------------------


@pytest.fixture
def ringed(guest: Guest) -> Guest:
    guest.cpu.coalesced_ring(k.RING // k.PAGE_BYTES, DeviceLock())
    return guest


def test_gathered_writes_arrive_in_order_and_before_the_exit(ringed: Guest) -> None:
    device = Recorder()
    ringed.mmio.map(0xB8000, 0x100, device)
    ringed.pio.map(0x70, 4, device)
    ringed.ring_put(0xB8000, b"\x41\x07")
    ringed.ring_put(0x71, b"\x99", pio=True)
    ringed.ring_put(0xB8008, bytes(range(8)))
    assert ringed.mmio_write(0xB8002, b"\x55") is None
    assert device.writes == [(0, 2, 0x0741), (1, 1, 0x99), (8, 8, 0x0706_0504_0302_0100), (2, 1, 0x55)]
    assert ringed.ring_state() == (3, 3)


def test_the_ring_wraps_around(ringed: Guest) -> None:
    device = Recorder()
    ringed.mmio.map(0x1000, 4, device)
    sent = 0
    for burst in (k.RING_ENTRIES - 1, 1, 5, k.RING_ENTRIES - 1, 7):
        for _ in range(burst):
            sent += 1
            ringed.ring_put(0x1000, sent.to_bytes(4, "little"))
        assert ringed.exit(k.IRQ_WINDOW_OPEN) is None
        first, last = ringed.ring_state()
        assert first == last < k.RING_ENTRIES
    assert [value for _, _, value in device.writes] == list(range(1, sent + 1))


def test_a_device_that_raises_while_the_ring_is_drained(ringed: Guest) -> None:
    ringed.mmio.map(0x1000, 4, Recorder(KeyError))
    last = Recorder()
    ringed.mmio.map(0x2000, 4, last)
    ringed.ring_put(0x1000, b"\x01")
    ringed.ring_put(0x2000, b"\x02")
    with pytest.raises(KeyError):
        ringed.exit(k.HLT)
    assert ringed.exit(k.HLT) is None  # the one that raised is gone, the others are not lost
    assert last.writes == [(0, 1, 2)]


def test_gathered_writes_to_nobody_are_lost(ringed: Guest) -> None:
    ringed.ring_put(0x1000, b"\x01")
    ringed.ring_put(0x1000, b"\x01", pio=True)
    assert ringed.exit(k.HLT) is None
    assert ringed.ring_state() == (2, 2)


# -- making one ------------------------------------------------------------------------------------------


def test_a_page_that_will_not_do_is_refused() -> None:
    pio, mmio = AddressSpace("pio", 16), AddressSpace("mmio", 16)
    for page in (bytearray(8191), bytes(8192)):
        with pytest.raises(ConfigError, match="8192"):
            CpuExec(None, pio, mmio, page=page)
    with pytest.raises(TypeError):
        CpuExec(None, pio, mmio)
    with pytest.raises(TypeError):
        CpuExec(None, None, mmio, page=bytearray(8192))  # type: ignore[arg-type]


def test_a_loop_without_a_vcpu_does_not_run(guest: Guest) -> None:
    with pytest.raises(StateError, match="no vCPU"):
        guest.cpu.run()


def test_close_lets_go_of_the_spaces(guest: Guest) -> None:
    guest.cpu.on_eoi = print
    guest.cpu.close()
    assert guest.cpu.on_eoi is None
    guest.pio.map(0x80, 1, Recorder(1))  # tells nobody any more
    assert guest.in_(0x80, 1) == [0xFF]


# -- kicks, interrupts and sleep, on a file that stands for the vCPU's descriptor ------------------------


class FileVcpu:
    """A CpuExec over a Vcpu on a memory file: KVM_RUN fails there with ENOTTY, all else is real."""

    def __init__(self, **options: Any) -> None:
        fd = os.memfd_create("vcpu")
        os.ftruncate(fd, 3 * k.PAGE_BYTES)
        self.page = mmap.mmap(fd, 3 * k.PAGE_BYTES)
        self.vcpu = Vcpu(fd, 0, 3 * k.PAGE_BYTES)
        self.pio, self.mmio = AddressSpace("pio", 1 << 16), AddressSpace("mmio", 1 << 52)
        self.cpu = CpuExec(self.vcpu, self.pio, self.mmio, **options)

    def run_on_a_thread(self) -> tuple[threading.Thread, list[StopReason]]:
        result: list[StopReason] = []

        def main() -> None:
            CpuExec.prepare_thread()
            result.append(self.cpu.run())

        return run_thread(main), result


def test_a_failing_kvm_run_stops_with_its_errno() -> None:
    f = FileVcpu()
    assert f.cpu.run() is StopReason.RUN_FAILED
    assert f.cpu.error_number == f.cpu.detail["errno"] == errno.ENOTTY
    assert reason_text(f.cpu.detail, INTEL) == f"KVM_RUN failed, errno {errno.ENOTTY}"


def test_kick_sets_immediate_exit_and_wakes_the_sleeper() -> None:
    guest = Guest(user_irqchip=True)
    assert guest.page[k.IMMEDIATE_EXIT] == 0
    guest.cpu.kick()
    assert guest.page[k.IMMEDIATE_EXIT] == 1
    assert int.from_bytes(os.read(guest.cpu.wake_fd, 8), "little") == 1
    assert Guest().cpu.wake_fd == -1


def test_a_halted_vcpu_sleeps_until_it_is_kicked() -> None:
    f = FileVcpu(user_irqchip=True)
    f.cpu.halted = True
    thread, result = f.run_on_a_thread()
    f.cpu.interrupt(1)  # with interrupts disabled: no reason to wake up
    thread.join(0.05)
    assert thread.is_alive()
    f.cpu.kick()
    assert ended(thread)
    assert result == [StopReason.KICKED]
    assert f.cpu.halted
    assert f.page[k.IMMEDIATE_EXIT] == 0


def test_a_kick_before_the_run_is_not_lost() -> None:
    f = FileVcpu(user_irqchip=True)
    f.cpu.halted = True
    f.cpu.kick()
    thread, result = f.run_on_a_thread()
    assert ended(thread)
    assert result == [StopReason.KICKED]


def test_a_cancelled_kick_is_forgotten() -> None:
    f = FileVcpu(user_irqchip=True)
    f.cpu.halted = True
    f.cpu.kick()
    f.cpu.cancel_kick()
    thread, result = f.run_on_a_thread()
    thread.join(0.05)
    assert thread.is_alive()
    f.cpu.kick()
    assert ended(thread)
    assert result == [StopReason.KICKED]


def test_an_interrupt_wakes_a_halted_vcpu_that_takes_it() -> None:
    f = FileVcpu(user_irqchip=True)
    f.cpu.halted = True
    f.page[k.IF_FLAG] = 1
    thread, result = f.run_on_a_thread()
    thread.join(0.05)
    assert thread.is_alive()
    f.cpu.interrupt(1)
    assert ended(thread)
    assert result == [StopReason.RUN_FAILED]  # it went on into KVM_RUN
    assert not f.cpu.halted
    assert f.page[k.REQUEST_INTERRUPT_WINDOW] == 1  # the guest was not ready for it


def test_no_window_is_asked_for_without_an_interrupt() -> None:
    f = FileVcpu(user_irqchip=True)
    f.page[k.REQUEST_INTERRUPT_WINDOW] = 1
    assert f.cpu.run() is StopReason.RUN_FAILED
    assert f.page[k.REQUEST_INTERRUPT_WINDOW] == 0


def test_an_interrupt_is_acknowledged_and_injected_when_the_guest_is_ready() -> None:
    f = FileVcpu(user_irqchip=True)
    f.page[k.READY] = 1
    acknowledged: list[int] = []

    def acknowledge() -> int:
        acknowledged.append(0x21)
        f.cpu.interrupt(0)
        return 0x21

    f.cpu.acknowledge = acknowledge
    f.cpu.interrupt(1)
    with pytest.raises(KvmError, match="KVM_INTERRUPT"):  # this descriptor takes none
        f.cpu.run()
    assert acknowledged == [0x21]


def test_a_kernel_irqchip_asks_for_no_window() -> None:
    f = FileVcpu()
    f.cpu.interrupt(1)
    assert f.cpu.run() is StopReason.RUN_FAILED
    assert f.page[k.REQUEST_INTERRUPT_WINDOW] == 0
