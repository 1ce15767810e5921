"""Memory slots: ROM, the dirty log, RAM above 4 GiB, shared memory, a slot that comes while the guest is paused."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

import pytest
from guests import PASSED, PORT, Guest, Recorder

from pyvmm.errors import StateError
from pyvmm.guest_memory import RamRegion
from pyvmm.kvm.vm import MEM_LOG_DIRTY_PAGES, MEM_READONLY
from pyvmm.memory_map import BUS, RAM, RAM_READONLY, Section

ROM = 0xE000_0000


def test_writes_to_rom_are_mmio(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
        mov     $0xe0000000, %edi
        mov     (%rdi), %ebx
        movl    $0x12345678, 8(%rdi)
        mov     8(%rdi), %ecx
        finish
        """
    )
    rom = RamRegion(ROM, 4096, readonly=True, name="rom")
    memoryview(rom)[:16] = bytes(range(16))
    machine = guest.machine
    machine.memory.add(rom)
    machine.vm.set_memory_slot(1, ROM, 4096, rom.host_address, MEM_READONLY)
    device = Recorder()
    machine.mmio.map(ROM, 4096, device)
    assert guest.run() == PASSED
    assert device.log == [("write", 8, 4, 0x12345678)]
    regs = guest.regs()
    assert regs["rbx"] == 0x03020100
    assert regs["rcx"] == 0x0B0A0908


def dirty_pages(bitmap: bytes) -> list[int]:
    number = int.from_bytes(bitmap, "little")
    return [n for n in range(len(bitmap) * 8) if number >> n & 1]


def test_dirty_log(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
        mov     $DEVICE_PORT, %edx
        movl    $1, 0x300000
        movl    $1, 0x305ffe            # two pages
        outb    %al, %dx
        movl    $2, 0x300004
        outb    %al, %dx
        finish
        """
    )
    machine = guest.machine
    region = machine.memory.ram[0]
    machine.vm.set_memory_slot(0, 0, region.size_bytes, region.host_address, MEM_LOG_DIRTY_PAGES)
    logs = []

    class Looker(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            logs.append(dirty_pages(machine.vm.dirty_log(0, region.size_bytes)))

    machine.pio.map(PORT, 1, Looker())
    assert guest.run() == PASSED
    data = [{page for page in log if page >= 0x300} for log in logs]
    assert data == [{0x300, 0x305, 0x306}, {0x300}]


WRITES = """
    mov     $DEVICE_PORT, %edx
    movl    $1, 0x300000
    movl    $1, 0x305ffe            # two pages
    outb    %al, %dx
    movl    $2, 0x300004
    outb    %al, %dx
    mov     0x306000, %eax          # a read is no write
    outb    %al, %dx
    finish
"""


def written(taken: list[tuple[Section, bytes]]) -> set[int]:
    """Page numbers above what the guest's own code and stack need."""
    pages = {section.gpa // 4096 + n for section, bitmap in taken for n in dirty_pages(bitmap)}
    return {page for page in pages if page >= 0x300}


def test_the_dirty_log_of_all_memory(boot: Callable[..., Guest]) -> None:
    """Pages that the guest writes, each time since the last look; switched off and on again it begins anew."""
    guest = boot(WRITES)
    machine = guest.machine
    listener = machine.kvm_listener
    logs: list[set[int]] = []

    class Looker(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            logs.append(written(listener.take_dirty()))

    machine.pio.map(PORT, 1, Looker())
    with pytest.raises(StateError, match="the dirty log is off"):
        listener.take_dirty()
    listener.log_dirty(True)
    assert listener.take_dirty() == []
    assert guest.run() == PASSED
    assert logs == [{0x300, 0x305, 0x306}, {0x300}, set()]
    listener.log_dirty(False)
    machine.memory.write(0x30_0000, bytes(4))
    with pytest.raises(StateError, match="the dirty log is off"):
        listener.take_dirty()
    logs.clear()
    machine.reset()
    listener.log_dirty(True)
    assert guest.run() == PASSED
    assert logs == [{0x300, 0x305, 0x306}, {0x300}, set()]


def test_the_dirty_log_misses_nothing_while_the_guest_runs(boot: Callable[..., Guest]) -> None:
    """Each round writes a counter into every one of 64 pages: whoever copies what was written has the last one."""
    guest = boot(
        """
        mov     $1, %eax
    1:  mov     $0x300000, %edi
    2:  mov     %eax, (%rdi)
        add     $4096, %rdi
        cmp     $0x340000, %rdi
        jb      2b
        inc     %eax
        cmpb    $0, stop
        je      1b
        finish
    stop: .byte 0
        """
    )
    memory, listener = guest.machine.memory, guest.machine.kvm_listener
    copy = {page: memory.read(page << 12, 4096) for page in range(0x300, 0x340)}
    listener.log_dirty(True)

    def update() -> int:
        pages = written(listener.take_dirty())
        copy.update({page: memory.read(page << 12, 4096) for page in pages})
        return len(pages)

    guest.start()
    rounds = 0
    while rounds < 5:
        rounds += update() == 64
    memory.write(guest.program.symbols["stop"], b"\1")
    guest.wait()
    update()
    assert copy == {page: memory.read(page << 12, 4096) for page in range(0x300, 0x340)}


def test_the_dirty_log_of_memory_that_comes_and_goes(boot: Callable[..., Guest]) -> None:
    """A piece of the window below 1 MiB that is switched away: all of its pages count as written."""
    guest = boot("movl $1, 0x300000\n movl $1, 0xc8000\n finish", machine="pc")
    machine = guest.machine
    listener = machine.kvm_listener
    listener.log_dirty(True)
    assert guest.run() == PASSED
    machine.memory_map.set_window([(0xC_8000, 0x8000, RAM_READONLY)])
    taken = {section.gpa: dirty_pages(bitmap) for section, bitmap in listener.take_dirty()}
    assert taken[0xC_8000] == list(range(8))
    assert 0x200 in taken[0x10_0000]
    assert listener.take_dirty() == []
    machine.memory_map.set_window([(0xC_8000, 0x8000, RAM)])
    assert listener.take_dirty() == []


def test_slots_follow_the_window_under_a_running_guest(boot: Callable[..., Guest]) -> None:
    """RAM, RAM that takes no writes, and nothing at all, each as the guest finds it."""
    port = 0x7A0  # a pc has something of its own at PORT
    guest = boot(
        f"""
        mov     ${port:#x}, %edx
        mov     $0xc8000, %edi
        movl    $1, (%rdi)
        outb    %al, %dx
        movl    $2, (%rdi)              # read-only now
        mov     (%rdi), %ebx
        outb    %al, %dx
        mov     (%rdi), %ecx            # on the bus
        outb    %al, %dx
        mov     (%rdi), %esi            # RAM again
        finish
        """,
        machine="pc",
    )
    kinds = iter([RAM_READONLY, BUS, RAM])
    memory_map = guest.machine.memory_map

    class Switch(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            memory_map.set_window([(0xC_8000, 0x8000, next(kinds))])

    guest.machine.pio.map(port, 1, Switch())
    assert guest.run() == PASSED
    regs = guest.regs()
    assert (regs["rbx"], regs["rcx"], regs["rsi"]) == (1, 0xFFFF_FFFF, 1)


def test_ram_above_4_gib(boot: Callable[..., Guest]) -> None:
    """Memory past the hole at 3 GiB goes on at 4 GiB; the first and the last byte are there, the hole is not."""
    guest = boot(
        """
        mov     $0xbffffff8, %edi
        movl    $0x11111111, (%rdi)
        mov     $0xc0000000, %edi
        mov     (%rdi), %ebx            # the hole
        # The flat loader maps 4 GiB. The fifth: entry 4 of its table of level 3, and a page directory of one entry.
        movabs  $0x100000083, %rax
        mov     %rax, 0x20000
        movq    $0x20003, 0x92020
        movabs  $0x100000000, %rdi
        movl    $0x22222222, (%rdi)
        mov     (%rdi), %ecx
        finish
        """,
        memory_mib=3 * 1024 + 2,
    )
    assert guest.run() == PASSED
    memory = guest.machine.memory
    assert memory.regions == [(0, 0xC000_0000), (0x1_0000_0000, 2 << 20)]
    assert memory.read(0xBFFF_FFF8, 4) == b"\x11" * 4
    assert memory.read(0x1_0000_0000, 4) == b"\x22" * 4
    assert guest.regs()["rbx"] == 0xFFFF_FFFF
    assert guest.regs()["rcx"] == 0x2222_2222


def test_shared_memory_is_seen_by_others(boot: Callable[..., Guest]) -> None:
    guest = boot("mov 0x300000, %eax\n inc %eax\n mov %eax, 0x300004\n finish", shared_memory=True)
    fd = guest.machine.memory.ram[0].fd
    with mmap.mmap(os.dup(fd), 4 << 20) as other:
        other[0x30_0000:0x30_0004] = (41).to_bytes(4, "little")
        assert guest.run() == PASSED
        assert int.from_bytes(other[0x30_0004:0x30_0008], "little") == 42


def test_a_slot_added_and_taken_away_while_paused(boot: Callable[..., Guest]) -> None:
    """Before, between and after, the address is nobody's."""
    guest = boot(
        """
        mov     $0xe0000000, %edi
        mov     $DEVICE_PORT, %edx
        mov     (%rdi), %ebx
        outb    %al, %dx                # paused here: the slot comes
        mov     (%rdi), %ecx
        outb    %al, %dx                # and here: it goes
        mov     (%rdi), %esi
        finish
        """
    )
    machine = guest.machine

    class Pauser(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            machine.pause()

    machine.pio.map(PORT, 1, Pauser())
    extra = RamRegion(ROM, 4096, name="extra")
    memoryview(extra)[:4] = b"\x44\x33\x22\x11"
    guest.run()
    machine.vm.set_memory_slot(1, ROM, 4096, extra.host_address)
    guest.run()
    machine.vm.set_memory_slot(1, ROM, 0, extra.host_address)
    assert guest.run() == PASSED
    regs = guest.regs()
    assert (regs["rbx"], regs["rcx"], regs["rsi"]) == (0xFFFF_FFFF, 0x1122_3344, 0xFFFF_FFFF)


def test_transparent_huge_pages(boot: Callable[..., Guest]) -> None:
    guest = boot("movl $5, 0x300000\n finish", huge_pages="transparent")
    assert guest.run() == PASSED
    assert guest.machine.memory.read(0x30_0000, 1) == b"\5"


def test_drop_mapping_keeps_the_content(boot: Callable[..., Guest]) -> None:
    """pc-testdev's flush: the guest's page is faulted in again, with what was in it."""
    guest = boot(
        """
        movl    $0x600d, 0x300000
        mov     $0x300000, %eax
        mov     $0xe4, %edx
        outl    %eax, %dx
        mov     0x300000, %ebx
        finish
        """,
        testdev=True,
    )
    assert guest.run() == PASSED
    assert guest.regs()["rbx"] == 0x600D
