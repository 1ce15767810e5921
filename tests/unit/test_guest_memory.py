"""GuestMemory: bounds that hold against any guest, the hole below 4 GiB, views that outlive the machine."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import BusError, ConfigError, StateError
from pyvmm.guest_memory import PAGE_BYTES, GuestMemory, RamRegion
from pyvmm.x86.layout import RAM_HIGH, RAM_HOLE

MIB = 1 << 20
GIB = 1 << 30
MASK_64 = (1 << 64) - 1


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(2 * MIB)


@pytest.fixture(scope="module")
def big() -> GuestMemory:
    """5 GiB that nobody touches: the mapping reserves nothing."""
    return GuestMemory(5 * GIB)


def test_small_memory_is_one_region_at_zero(memory: GuestMemory) -> None:
    assert memory.size_bytes == 2 * MIB
    assert memory.regions == [(0, 2 * MIB)]


def mapped_bytes() -> int:
    """The size of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES


@pytest.mark.parametrize("size", [2 * MIB, 2 * MIB + PAGE_BYTES, 63 * MIB, 5 * GIB])
def test_ram_stands_where_large_pages_can_be_mapped_and_takes_no_more_than_its_size(size: int) -> None:
    before = mapped_bytes()
    memory = GuestMemory(size)
    after = mapped_bytes()
    assert all((ram.host_address - ram.gpa) % (2 * MIB) == 0 for ram in memory.ram)
    assert size <= after - before < size + MIB
    memory.close()
    del memory
    assert abs(mapped_bytes() - before) < MIB


def test_memory_starts_as_zeros(memory: GuestMemory) -> None:
    assert memory.read(0, 2 * MIB) == bytes(2 * MIB)


def test_read_gives_what_write_took(memory: GuestMemory) -> None:
    memory.write(0x1234, b"guest")
    memory.write(2 * MIB - 3, bytearray(b"end"))
    memory.write(0x2000, memoryview(b"\1\0\2\0").cast("H"))
    assert memory.read(0x1233, 7) == b"\0guest\0"
    assert memory.read(2 * MIB - 3, 3) == b"end"
    assert memory.read(0x2000, 4) == b"\1\0\2\0"


def test_the_hole_below_4_gib(big: GuestMemory) -> None:
    assert big.size_bytes == 5 * GIB
    assert big.regions == [(0, RAM_HOLE), (RAM_HIGH, 2 * GIB)]
    big.write(RAM_HOLE - 4, b"low!")
    big.write(RAM_HIGH, b"high")
    big.write(RAM_HIGH + 2 * GIB - 3, b"top")
    assert big.read(RAM_HOLE - 4, 4) == b"low!"
    assert big.read(RAM_HIGH, 4) == b"high"
    for gpa, size in (
        (RAM_HOLE, 1),
        (RAM_HOLE - 1, 2),
        (RAM_HIGH - 1, 1),
        (RAM_HIGH - 1, 2),
        (RAM_HOLE - 1, RAM_HIGH - RAM_HOLE + 2),
        (0, 5 * GIB),
        (RAM_HIGH + 2 * GIB - 1, 2),
    ):
        with pytest.raises(BusError, match="not inside RAM"):
            big.view(gpa, size)


def test_memory_that_ends_at_the_hole() -> None:
    assert GuestMemory(RAM_HOLE).regions == [(0, RAM_HOLE)]
    assert GuestMemory(RAM_HOLE + PAGE_BYTES).regions == [
        (0, RAM_HOLE),
        (RAM_HIGH, PAGE_BYTES),
    ]


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (2 * MIB, 1),
        (2 * MIB - 1, 2),
        (0, 2 * MIB + 1),
        (-1, 1),
        (-1, 2),
        (-(2 * MIB), 4 * MIB),
        (0, -1),
        (5, -5),
        (MASK_64, 1),
        (MASK_64, 2),
        (MASK_64 - 0xFFF, 0x1000),
        (MASK_64 - 0xFFF, 0x2000),
        (0x1000, MASK_64),
        (0x1000, MASK_64 - 0xFFF),
        (0x1000, 1 << 64),
        (1 << 64, 1),
        (1 << 100, 1 << 100),
        (0, 1 << 63),
    ],
)
def test_what_leaves_ram_is_a_bus_error(memory: GuestMemory, gpa: int, size: int) -> None:
    with pytest.raises(BusError):
        memory.view(gpa, size)
    with pytest.raises(BusError):
        memory.view(gpa, size, False)
    with pytest.raises(BusError):
        memory.read(gpa, size)


def test_a_write_that_leaves_ram_changes_nothing(memory: GuestMemory) -> None:
    with pytest.raises(BusError):
        memory.write(2 * MIB - 2, b"abc")
    assert memory.read(2 * MIB - 2, 2) == b"\0\0"


near = st.one_of(
    st.integers(-2, 3 * MIB), st.integers(MASK_64 - 4 * MIB, MASK_64 + 4), st.integers(-(1 << 70), 1 << 70)
)


@settings(max_examples=300, deadline=None)
@given(near, near)
def test_a_view_is_given_exactly_where_the_range_is_inside(gpa: int, size: int) -> None:
    memory = SHARED_MEMORY
    if gpa >= 0 and size >= 0 and gpa < 2 * MIB and gpa + size <= 2 * MIB:
        assert memory.view(gpa, size).nbytes == size
    elif size != 0:  # an empty view of nowhere is harmless either way
        with pytest.raises(BusError):
            memory.view(gpa, size)


SHARED_MEMORY = GuestMemory(2 * MIB)


def test_a_view_is_the_memory_itself(memory: GuestMemory) -> None:
    view = memory.view(0x800, 0x10)
    assert (view.format, view.nbytes, view.readonly, view.contiguous) == ("B", 0x10, False, True)
    view[3] = 0xAA
    memory.write(0x804, b"\xbb")
    assert memory.read(0x803, 2) == b"\xaa\xbb"
    assert bytes(view[3:5]) == b"\xaa\xbb"


def test_views_outlive_close(memory: GuestMemory) -> None:
    memory.write(0x1000, b"still here")
    view = memory.view(0x1000, 10)
    memory.close()
    memory.close()
    gc.collect()
    assert bytes(view) == b"still here"
    view[0] = 0x53
    assert bytes(view[:5]) == b"Still"
    for use in (lambda: memory.view(0, 1), lambda: memory.read(0, 1), lambda: memory.write(0, b"x")):
        with pytest.raises(StateError, match="closed"):
            use()
    assert memory.regions == []


def mappings_at(address: int) -> bool:
    """Whether this process has anything mapped at a host address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high:
            return True
    return False


def test_the_last_view_takes_the_mapping_with_it() -> None:
    # Odd enough in size that no other mapping takes exactly its place at once.
    memory = GuestMemory(64 * MIB)
    host = memory.ram[0].host_address + 33 * MIB
    view = memory.view(0, 16)
    memory.close()
    assert mappings_at(host)
    view.release()
    del view
    gc.collect()
    assert not mappings_at(host)


def test_preadv_and_pwritev_go_straight_into_guest_memory(memory: GuestMemory, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, bytes(range(256)), 0)
        iov = [memory.view(0x1000, 100), memory.view(2 * MIB - 156, 156)]
        assert os.preadv(fd, iov, 0) == 256
        assert memory.read(0x1000, 100) == bytes(range(100))
        assert memory.read(2 * MIB - 156, 156) == bytes(range(100, 256))
        assert os.pwritev(fd, [memory.view(0x1063, 1), memory.view(0x1000, 2)], 512) == 3
        assert os.pread(fd, 3, 512) == b"\x63\x00\x01"
    finally:
        os.close(fd)


def test_shared_memory_is_a_memfd_that_another_mapping_sees() -> None:
    memory = GuestMemory(2 * MIB, shared=True)
    region = memory.ram[0]
    assert os.fstat(region.fd).st_size == 2 * MIB
    assert not os.get_inheritable(region.fd)
    with mmap.mmap(region.fd, 2 * MIB) as other:
        memory.write(0x1000, b"from here")
        assert other[0x1000:0x1009] == b"from here"
        other[0x2000:0x2002] = b"hi"
    assert memory.read(0x2000, 2) == b"hi"


def test_private_memory_has_no_descriptor(memory: GuestMemory) -> None:
    assert memory.ram[0].fd == -1


def test_a_closed_shared_memory_gives_its_descriptor_back() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(20):
        GuestMemory(MIB, shared=True).close()
    gc.collect()
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1  # listdir's own


def test_a_rom_is_read_and_never_written(memory: GuestMemory) -> None:
    rom = RamRegion(0xFFFF_0000, 0x1_0000, readonly=True, name="bios")
    memoryview(rom)[:4] = b"BIOS"  # its owner fills it
    memory.add(rom)
    assert memory.read(0xFFFF_0000, 4) == b"BIOS"
    assert memory.view(0xFFFF_FFFF, 1, write=False).readonly
    with pytest.raises(BusError):
        memory.view(0xFFFF_0000, 1)
    with pytest.raises(BusError):
        memory.write(0xFFFF_0000, b"x")
    assert memory.regions == [(0, 2 * MIB)]
    assert memory.size_bytes == 2 * MIB  # RAM only


def test_ranges_across_two_adjacent_regions_are_refused(memory: GuestMemory) -> None:
    memory.add(RamRegion(2 * MIB, PAGE_BYTES, name="next"))
    assert memory.read(2 * MIB, 1) == b"\0"
    with pytest.raises(BusError):
        memory.view(2 * MIB - 1, 2)


def test_overlapping_regions_are_refused_and_both_named(memory: GuestMemory) -> None:
    for gpa in (0, PAGE_BYTES, 2 * MIB - PAGE_BYTES):
        with pytest.raises(ConfigError, match=r"vga at .* overlaps ram at"):
            memory.add(RamRegion(gpa, 2 * PAGE_BYTES, name="vga"))
    assert memory.regions == [(0, 2 * MIB)]
    assert memory.size_bytes == 2 * MIB


@pytest.mark.parametrize("size", [0, -4096, 1, 4095, 4097, MIB + 1])
def test_sizes_that_are_no_pages_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="4096"):
        GuestMemory(size)
    with pytest.raises(ConfigError, match="4096"):
        RamRegion(0, size)


@pytest.mark.parametrize("size", [1 << 47, 1 << 62, 1 << 63, 1 << 64, 1 << 100])
def test_more_memory_than_can_be_had_is_a_config_error(size: int) -> None:
    with pytest.raises(ConfigError, match="MiB"):
        GuestMemory(size)


def test_a_region_that_wraps_around_the_top_is_refused() -> None:
    with pytest.raises(ConfigError):
        RamRegion((1 << 64) - PAGE_BYTES, 2 * PAGE_BYTES)
    with pytest.raises(ConfigError):
        RamRegion(0x800, PAGE_BYTES)


def test_an_unknown_kind_of_huge_pages_is_refused() -> None:
    with pytest.raises(ConfigError, match="'transparent', '2M' or '1G'"):
        GuestMemory(2 * MIB, huge_pages="4M")


def test_transparent_huge_pages_are_advice(memory: GuestMemory) -> None:
    GuestMemory(4 * MIB, huge_pages="transparent").write(0, b"x")


def test_huge_pages_that_nobody_reserved_name_the_remedy() -> None:
    # More 1 GiB pages than any machine that runs this has.
    with pytest.raises(ConfigError, match="nr_hugepages"):
        GuestMemory(1 << 45, huge_pages="1G")


def test_what_is_no_region_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(TypeError):
        memory.add(None)  # type: ignore[arg-type]


def test_memory_is_collected() -> None:
    class Owner:
        pass

    owner = Owner()
    owner.memory = GuestMemory(MIB)  # type: ignore[attr-defined]
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


def test_refused_arguments_close_no_descriptor_of_the_embedder() -> None:
    # Not one of theirs, and least of all 0, which a structure of zeros would name.
    script = """
import os
from pyvmm.address_space import AddressSpace
from pyvmm.cpu_exec import CpuExec
from pyvmm.guest_memory import RamRegion
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
for make in (
    lambda: RamRegion(0, 1),
    lambda: RamRegion(0, 4096, huge_pages="4M"),
    lambda: RamRegion("zero", 4096),
    lambda: RamRegion(0, 4096, nonsense=1),
    lambda: CpuExec(None, None, None),
    lambda: CpuExec(None, AddressSpace("pio", 16), AddressSpace("mmio", 16), page=bytes(8192)),
    lambda: Kvm("/dev/kvm", 1, 2),
    lambda: Kvm(5),
    lambda: Kvm("/nonexistent"),
    lambda: Vm("x", 4096),
    lambda: Vcpu("x", 0, 4096),
):
    try:
        make()
    except Exception:
        os.fstat(0)
    else:
        raise SystemExit("not refused")
"""
    subprocess.run([sys.executable, "-c", script], check=True, stdin=subprocess.DEVNULL)


# -- pages that are given back -----------------------------------------------------------------------------------------


def resident_bytes(region: RamRegion) -> int:
    """Of its mapping, as the kernel counts them (proc_pid_smaps(5)); a shared one's are its file's."""
    if region.fd >= 0:
        return os.fstat(region.fd).st_blocks * 512
    found, inside = 0, False
    end = region.host_address + region.size_bytes
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (head := line.split(maxsplit=1)[0]) and "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first < end and last > region.host_address
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.parametrize("shared", [False, True])
def test_pages_are_given_back_and_read_as_zeros(shared: bool) -> None:
    memory = GuestMemory(16 * MIB, shared=shared)
    (region,) = memory.ram
    memory.write(0, b"\x5a" * (16 * MIB))
    before = resident_bytes(region)
    assert memory.discard(MIB, 10 * MIB) == 10 * MIB
    assert before - resident_bytes(region) >= 10 * MIB
    assert memory.read(MIB, 10 * MIB) == bytes(10 * MIB)
    assert memory.read(MIB - 1, 1) == memory.read(11 * MIB, 1) == b"\x5a"
    memory.write(2 * MIB, b"again")
    assert memory.read(2 * MIB, 5) == b"again"
    assert memory.discard(0, PAGE_BYTES, zeros=True) == PAGE_BYTES


def test_pages_that_are_a_files_are_the_files_again(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(b"f" * (2 * MIB))
    with path.open("rb") as file:
        memory = GuestMemory(2 * MIB, sources={0: (file.fileno(), 0)})
    memory.write(0, b"guest")
    assert memory.discard(0, PAGE_BYTES, zeros=True) == 0
    assert memory.read(0, 5) == b"guest"
    assert memory.discard(0, PAGE_BYTES) == PAGE_BYTES
    assert memory.read(0, 5) == b"fffff"


def test_so_are_those_that_are_made_one(tmp_path: Path) -> None:
    """As a fork does with the memory it was taken of."""
    memory = GuestMemory(2 * MIB)
    path = tmp_path / "memory"
    path.write_bytes(b"f" * (2 * MIB))
    with path.open("rb") as file:
        memory.ram[0].overlay(0, 2 * MIB, (file.fileno(), 0))
    assert memory.discard(0, 2 * MIB, zeros=True) == 0
    assert memory.read(0, 1) == b"f"


@given(gpa=st.integers(0, MASK_64), size=st.integers(0, MASK_64))
@settings(max_examples=200)
def test_what_can_not_be_given_back(gpa: int, size: int) -> None:
    memory = GuestMemory(MIB)
    if gpa + size <= MIB and gpa % PAGE_BYTES == 0 and size % PAGE_BYTES == 0 and size:
        return
    with pytest.raises(BusError):
        memory.discard(gpa, size)


def test_a_rom_is_not_given_back() -> None:
    memory = GuestMemory(MIB)
    memory.add(RamRegion(8 * MIB, PAGE_BYTES, readonly=True, name="rom"))
    with pytest.raises(BusError, match="not inside RAM"):
        memory.discard(8 * MIB, PAGE_BYTES)
