"""fw_cfg: both ports, the DMA interface, the directory, and guests that lie to it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.address_space import AddressSpace
from pyvmm.devices import fw_cfg as f
from pyvmm.devices.fw_cfg import FwCfg
from pyvmm.errors import ConfigError
from pyvmm.guest_memory import GuestMemory
from pyvmm.x86.e820 import pack_zero_page

RAM_BYTES = 4 << 20
ACCESS = 0x1000  # where the tests put FWCfgDmaAccess
BUFFER = 0x2000


class Bench:
    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.fw = FwCfg(memory)
        self.pio = AddressSpace("pio", 0x10000)
        self.pio.map(0x510, 2, self.fw)
        self.pio.map(0x514, 8, self.fw.dma)

    def select(self, key: int) -> None:
        self.pio.write(0x510, 2, key)

    def data(self, n: int) -> bytes:
        return bytes(self.pio.read(0x511, 1) for _ in range(n))

    def fetch(self, key: int, n: int) -> bytes:
        self.select(key)
        return self.data(n)

    def kick(self, address: int) -> None:
        """The address register, as a guest with 32-bit I/O writes it: big endian, high half first."""
        high, low = struct.unpack("<II", struct.pack(">Q", address))
        self.pio.write(0x514, 4, high)
        self.pio.write(0x518, 4, low)

    def dma(self, control: int, address: int = BUFFER, length: int = 0) -> int:
        self.memory.write(ACCESS, struct.pack(">IIQ", control, length, address))
        self.kick(ACCESS)
        return int.from_bytes(self.memory.read(ACCESS, 4), "big")

    def directory(self) -> dict[str, tuple[int, int]]:
        """name -> (key, size), as a guest reads it."""
        (count,) = struct.unpack(">I", self.fetch(f.FILE_DIR, 4))
        entries = {}
        for _ in range(count):
            size, key, reserved, name = struct.unpack(">IHH56s", self.data(64))
            assert reserved == 0
            entries[name.rstrip(b"\0").decode()] = (key, size)
        return entries


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(RAM_BYTES)
    yield memory
    memory.close()


@pytest.fixture
def bench(memory: GuestMemory) -> Bench:
    memory.write(0, bytes(0x10000))
    return Bench(memory)


# Selector and data port


def test_signature_is_selected_from_the_start(bench: Bench) -> None:
    assert bench.data(6) == b"QEMU\0\0"


def test_id_says_traditional_and_dma(bench: Bench) -> None:
    assert bench.fetch(f.ID, 4) == b"\x03\0\0\0"


def test_selecting_starts_at_the_first_byte(bench: Bench) -> None:
    bench.fw.add(f.UUID, bytes(range(16)))
    assert bench.fetch(f.UUID, 3) == b"\0\1\2"
    assert bench.data(2) == b"\3\4"
    assert bench.fetch(f.UUID, 1) == b"\0"
    assert bench.fetch(f.UUID | f.WRITE_CHANNEL, 20) == bytes(range(16)) + bytes(4)


def test_unknown_keys_read_as_zeros(bench: Bench) -> None:
    for key in (0x0010, 0x3FFF, 0xBFFF, f.ARCH_LOCAL):
        assert bench.fetch(key, 3) == bytes(3)


def test_architecture_keys_are_items_of_their_own(bench: Bench) -> None:
    bench.fw.add(f.IRQ0_OVERRIDE, b"\1\0\0\0")
    assert bench.fetch(f.IRQ0_OVERRIDE, 4) == b"\1\0\0\0"
    assert bench.fetch(f.IRQ0_OVERRIDE & ~f.ARCH_LOCAL, 4) == bytes(4)


def test_widths_of_the_ports(bench: Bench) -> None:
    bench.select(f.SIGNATURE)
    assert bench.pio.read(0x510, 1) == ord("Q"), "the ports overlap, a byte of either is data"
    assert bench.pio.read(0x510, 2) == 0
    assert bench.data(1) == b"E", "the word read nothing"
    bench.pio.write(0x511, 1, 0x55)
    bench.pio.write(0x510, 1, f.ID)
    assert bench.data(2) == b"MU", "a byte written selects nothing and changes nothing"
    assert bench.fetch(f.SIGNATURE, 4) == b"QEMU"


# What the builder puts in


def test_describe_machine(bench: Bench) -> None:
    e820 = [(0, 0x9FC00, 1), (0xF0000, 0x10000, 2), (0x1_0000_0000, 0x4000_0000, 1)]
    bench.fw.describe_machine(3, 8, 0x1234_5678_9000, pack_zero_page(e820))
    assert bench.fetch(f.NB_CPUS, 2) == b"\3\0"
    assert bench.fetch(f.MAX_CPUS, 2) == b"\x08\0"
    assert bench.fetch(f.RAM_SIZE, 8) == struct.pack("<Q", 0x1234_5678_9000)
    key, size = bench.directory()["etc/e820"]
    assert size == 60
    assert list(struct.iter_unpack("<QQI", bench.fetch(key, size))) == e820


def test_directory_lists_files_with_key_and_size(bench: Bench) -> None:
    assert bench.directory() == {}
    keys = [bench.fw.add_file(name, data) for name, data in (("bootorder", b"x" * 5), ("opt/a", b""))]
    longest = "n" * 55
    keys.append(bench.fw.add_file(longest, b"abc"))
    assert keys == [0x20, 0x21, 0x22]
    assert bench.directory() == {"bootorder": (0x20, 5), "opt/a": (0x21, 0), longest: (0x22, 3)}
    assert bench.fetch(0x22, 4) == b"abc\0"


@pytest.mark.parametrize("name", ["", "n" * 56, "caf\u00e9", "a\0b", "a\nb"])
def test_bad_file_names(bench: Bench, name: str) -> None:
    with pytest.raises(ConfigError, match="fw_cfg file name"):
        bench.fw.add_file(name, b"")


def test_keys_and_names_are_given_once(bench: Bench) -> None:
    bench.fw.add_file("a", b"")
    with pytest.raises(ConfigError, match="'a' is there already"):
        bench.fw.add_file("a", b"")
    with pytest.raises(ConfigError, match="0x0000 is there already"):
        bench.fw.add(f.SIGNATURE | f.WRITE_CHANNEL, b"")


def test_a_callable_is_asked_once_and_late(bench: Bench) -> None:
    calls = []

    def make() -> bytes:
        calls.append(1)
        return b"kernel"

    key = bench.fw.add_file("k", make, size_bytes=6)
    assert bench.directory() == {"k": (key, 6)}
    assert calls == []
    assert bench.fetch(key, 6) == b"kernel"
    assert bench.fetch(key, 6) == b"kernel"
    assert len(calls) == 1
    bench.fw.reset()
    assert bench.fetch(key, 6) == b"kernel"
    assert len(calls) == 2, "a reset machine asks again"


def test_a_callable_without_a_size_is_asked_for_the_directory(bench: Bench) -> None:
    key = bench.fw.add_file("k", lambda: b"12345")
    assert bench.directory() == {"k": (key, 5)}


def test_a_callable_that_breaks_its_word_is_an_error_of_the_host(bench: Bench) -> None:
    key = bench.fw.add_file("k", lambda: b"12345", size_bytes=4)
    with pytest.raises(ValueError, match="fw_cfg k: 5 bytes, announced 4"):
        bench.fw.write(0, 2, key)


# DMA


def test_the_dma_register_reads_as_its_signature(bench: Bench) -> None:
    assert bytes(bench.pio.read(0x514 + n, 1) for n in range(8)) == b"QEMU CFG"
    assert bench.pio.read(0x514, 4) == int.from_bytes(b"QEMU", "little")
    assert bench.pio.read(0x51A, 2) == int.from_bytes(b"FG", "little")


def test_select_and_read(bench: Bench) -> None:
    bench.fw.add(f.UUID, bytes(range(16)))
    bench.memory.write(BUFFER, b"\xee" * 32)
    assert bench.dma(f.UUID << 16 | f.DMA_SELECT | f.DMA_READ, BUFFER, 10) == 0
    assert bench.memory.read(BUFFER, 12) == bytes(range(10)) + b"\xee\xee"
    assert bench.data(1) == b"\x0a", "ports and DMA share the position"
    # Past the end there are zeros.
    assert bench.dma(f.DMA_READ, BUFFER, 8) == 0
    assert bench.memory.read(BUFFER, 9) == bytes(range(11, 16)) + bytes(3) + b"\x08"


def test_skip(bench: Bench) -> None:
    bench.fw.add(f.UUID, bytes(range(16)))
    assert bench.dma(f.UUID << 16 | f.DMA_SELECT | f.DMA_SKIP, 0, 7) == 0
    assert bench.data(1) == b"\7"
    assert bench.dma(f.DMA_SKIP, 0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF) == 0
    assert bench.data(1) == b"\0"


def test_select_alone_and_nothing_at_all(bench: Bench) -> None:
    bench.fw.add(f.UUID, b"u" * 16)
    assert bench.dma(f.UUID << 16 | f.DMA_SELECT, 0, 500) == 0
    assert bench.data(1) == b"u"
    assert bench.dma(0, 0, 500) == 0
    assert bench.data(15) == b"u" * 15, "no operation moves nothing"


def test_the_low_half_alone_starts_a_transfer_below_4_gib(bench: Bench) -> None:
    bench.memory.write(ACCESS, struct.pack(">IIQ", f.DMA_READ, 4, BUFFER))
    bench.pio.write(0x518, 4, int.from_bytes(ACCESS.to_bytes(4, "big"), "little"))
    assert bench.memory.read(BUFFER, 4) == b"QEMU"
    # The high half is forgotten after each transfer.
    bench.kick(5 << 32)
    bench.memory.write(ACCESS, struct.pack(">IIQ", f.DMA_SELECT | f.DMA_READ, 4, BUFFER + 16))
    bench.pio.write(0x518, 4, int.from_bytes(ACCESS.to_bytes(4, "big"), "little"))
    assert bench.memory.read(BUFFER + 16, 4) == b"QEMU"


def test_writes_of_other_sizes_to_the_dma_register_do_nothing(bench: Bench) -> None:
    bench.memory.write(0, struct.pack(">IIQ", f.DMA_READ, 4, BUFFER))
    for n in range(8):
        bench.pio.write(0x514 + n, 1, 0)
    for n in range(0, 8, 2):
        bench.pio.write(0x514 + n, 2, 0)
    assert bench.memory.read(BUFFER, 4) == bytes(4)


def test_a_qword_write_is_the_whole_register(bench: Bench) -> None:
    bench.memory.write(ACCESS, struct.pack(">IIQ", f.DMA_READ, 4, BUFFER))
    bench.pio.write(0x514, 8, int.from_bytes(ACCESS.to_bytes(8, "big"), "little"))
    assert bench.memory.read(BUFFER, 4) == b"QEMU"


def test_write_to_a_writable_item(bench: Bench) -> None:
    seen: list[bytes] = []
    key = bench.fw.add_file("etc/cfg", b"0123456789", writable=True, on_write=seen.append)
    bench.memory.write(BUFFER, b"abc")
    assert bench.dma(key << 16 | f.DMA_SELECT | f.DMA_SKIP, 0, 4) == 0
    assert bench.dma(f.DMA_WRITE, BUFFER, 3) == 0
    assert seen == [b"0123abc789"]
    assert bench.data(1) == b"7"
    assert bench.fetch(key, 10) == bench.fw.content(key) == b"0123abc789"
    bench.fw.reset()
    assert bench.fetch(key, 10) == b"0123456789"


def test_read_wins_over_write_wins_over_skip(bench: Bench) -> None:
    key = bench.fw.add_file("etc/cfg", b"0123", writable=True)
    select = key << 16 | f.DMA_SELECT
    assert bench.dma(select | f.DMA_READ | f.DMA_WRITE | f.DMA_SKIP, BUFFER, 4) == 0
    assert bench.memory.read(BUFFER, 4) == b"0123"
    bench.memory.write(BUFFER, b"wxyz")
    assert bench.dma(select | f.DMA_WRITE | f.DMA_SKIP, BUFFER, 4) == 0
    assert bench.fw.content(key) == b"wxyz"


def test_refused_writes_change_nothing(bench: Bench) -> None:
    seen: list[bytes] = []
    key = bench.fw.add_file("etc/cfg", b"0123", writable=True, on_write=seen.append)
    fixed = bench.fw.add_file("etc/fixed", b"0123")
    write = f.DMA_SELECT | f.DMA_WRITE
    bench.memory.write(BUFFER, b"abcdefgh")
    assert bench.dma(fixed << 16 | write, BUFFER, 2) == f.DMA_ERROR, "read-only"
    assert bench.dma(0x3000 << 16 | write, BUFFER, 2) == f.DMA_ERROR, "no such item"
    assert bench.dma(key << 16 | write, BUFFER, 5) == f.DMA_ERROR, "longer than the item"
    assert bench.dma(key << 16 | write, RAM_BYTES - 1, 2) == f.DMA_ERROR, "not in RAM"
    assert bench.dma(key << 16 | f.DMA_SELECT | f.DMA_SKIP, 0, 4) == 0
    assert bench.dma(f.DMA_WRITE, BUFFER, 1) == f.DMA_ERROR, "starts behind the end"
    assert bench.dma(fixed << 16 | write, BUFFER, 0) == 0, "nothing to write is no error"
    assert bench.fw.content(key) == bench.fw.content(fixed) == b"0123"
    assert seen == []


def test_a_read_over_the_end_of_ram_writes_nothing(bench: Bench) -> None:
    bench.fw.add(f.UUID, b"u" * 16)
    bench.memory.write(RAM_BYTES - 8, b"\xee" * 8)
    assert bench.dma(f.UUID << 16 | f.DMA_SELECT | f.DMA_READ, RAM_BYTES - 8, 16) == f.DMA_ERROR
    assert bench.memory.read(RAM_BYTES - 8, 8) == b"\xee" * 8


def test_a_read_of_all_ram_is_zeros_behind_the_item(bench: Bench) -> None:
    bench.memory.write(BUFFER, b"\xee" * 64)
    bench.memory.write(RAM_BYTES - 64, b"\xee" * 64)
    length = RAM_BYTES - BUFFER
    assert bench.dma(f.SIGNATURE << 16 | f.DMA_SELECT | f.DMA_READ, BUFFER, length) == 0
    assert bench.memory.read(BUFFER, length) == b"QEMU".ljust(length, b"\0")


def test_a_descriptor_outside_ram_is_survived(bench: Bench) -> None:
    for address in (RAM_BYTES, 1 << 32, (1 << 64) - 1, (1 << 64) - 16):
        bench.kick(address)
    # Where its control field at least is in RAM, it gets the error.
    bench.kick(RAM_BYTES - 8)
    assert bench.memory.read(RAM_BYTES - 8, 4) == b"\0\0\0\x01"


def test_a_transfer_over_its_own_descriptor_uses_the_copy(bench: Bench) -> None:
    bench.fw.add(f.UUID, b"\xff" * 16)
    assert bench.dma(f.UUID << 16 | f.DMA_SELECT | f.DMA_READ, ACCESS, 16) == 0
    assert bench.memory.read(ACCESS, 16) == bytes(4) + b"\xff" * 12


WORDS = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, ACCESS, BUFFER, RAM_BYTES - 1, RAM_BYTES, 0xC000_0000, (1 << 32) - 1, 1 << 32]),
    st.integers(0, RAM_BYTES),
)
LENGTHS = st.one_of(
    st.integers(0, 40), st.integers(0, 0xFFFF_FFFF), st.sampled_from([0xFFFF_FFFF, RAM_BYTES])
)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 0x1F),
            st.sampled_from([0, f.UUID, f.FILE_DIR, 0x20, 0x21, 0x3FFF, 0xFFFF]),
            WORDS,
            LENGTHS,
            WORDS,
        ),
        min_size=1,
        max_size=8,
    )
)
def test_no_lie_of_a_guest_raises_or_resizes_an_item(
    memory: GuestMemory, requests: list[tuple[int, int, int, int, int]]
) -> None:
    bench = Bench(memory)
    bench.fw.add_file("a", b"0123456789", writable=True)
    bench.fw.add_file("b", lambda: bytes(5000))
    for control, key, target, length, address in requests:
        access = struct.pack(">IIQ", key << 16 | control, length, target)
        in_ram = address <= RAM_BYTES - 16
        if in_ram:
            memory.write(address, access)
        bench.kick(address)
        if in_ram:
            answer = int.from_bytes(memory.read(address, 4), "big")
            reads = bool(control & f.DMA_READ) and length > 0
            writes = not reads and bool(control & f.DMA_WRITE) and length > 0
            if reads:
                assert answer == (0 if target + length <= RAM_BYTES else f.DMA_ERROR)
            elif not writes:
                assert answer == 0
            else:
                assert answer in (0, f.DMA_ERROR)
        assert len(bench.fw.content(0x20)) == 10
        assert len(bench.fw.content(0x21)) == 5000
        bench.data(1)


# State


def test_save_and_load_go_on_at_the_same_byte(bench: Bench, memory: GuestMemory) -> None:
    def build() -> Bench:
        b = Bench(memory)
        b.fw.add_file("w", b"0123456789", writable=True)
        b.fw.add_file("lazy", lambda: next(versions), size_bytes=2)
        return b

    versions = iter([b"v1", b"v2"])
    first = build()
    memory.write(BUFFER, b"ab")
    assert first.fetch(0x21, 2) == b"v1"
    assert first.dma(0x20 << 16 | f.DMA_SELECT | f.DMA_WRITE, BUFFER, 2) == 0
    first.pio.write(0x514, 4, 0x01000000)  # half of an address

    second = build()
    second.fw.load(first.fw.save())
    second.fw.after_load()
    assert second.data(8) == b"23456789"
    assert second.fetch(0x20, 3) == b"ab2"
    assert second.fetch(0x21, 2) == b"v1", "what the guest has seen stays"
    assert second.fw.dma.high == 1 << 32
    assert first.fetch(0x20, 3) == b"ab2"
    second.memory.write(BUFFER, b"xy")
    assert second.dma(0x20 << 16 | f.DMA_SELECT | f.DMA_WRITE, BUFFER, 2) == 0, "and can be written again"


def test_reset_selects_the_signature(bench: Bench) -> None:
    bench.select(f.ID)
    bench.pio.write(0x514, 4, 0x01000000)
    bench.fw.reset()
    assert bench.data(4) == b"QEMU"
    bench.memory.write(ACCESS, struct.pack(">IIQ", f.DMA_SELECT | f.DMA_READ, 4, BUFFER))
    bench.pio.write(0x518, 4, int.from_bytes(ACCESS.to_bytes(4, "big"), "little"))
    assert bench.memory.read(BUFFER, 4) == b"QEMU", "and forgets the half address"
