"""Memory slots: ROM, the dirty log, RAM above 4 GiB, shared memory, a slot that comes while the guest is paused."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

from guests import PASSED, PORT, Guest, Recorder

from pyvmm.guest_memory import RamRegion
from pyvmm.kvm.vm import MEM_LOG_DIRTY_PAGES, MEM_READONLY

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
