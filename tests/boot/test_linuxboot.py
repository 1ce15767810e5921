"""A kernel out of fw_cfg, booted by SeaBIOS through the option ROM: made up ones that say what they were given."""

from __future__ import annotations

import struct
import threading
from pathlib import Path

import asm
import boot_assets
import disk_images
import pytest
from console import SerialLine

import pyvmm
from pyvmm import guests
from pyvmm.x86 import linuxboot

LIMIT_S = 240.0
MIB = 1 << 20
SETUP_SECTORS = 4
HEADER_END = 0x26C
INITRD_ADDR_MAX = 0x37FF_FFFF  # as kernels of the 2.6 series had it

# Entered as a kernel's real-mode part is: stores what it finds in its registers, asks the BIOS for the size of extended
# memory, and ends the machine.
SETUP = """
entry:
        mov     %ax, %cs:scratch
        mov     %cs, %ax
        mov     %ax, %cs:results
        mov     %ds, %cs:results + 2
        mov     %es, %cs:results + 4
        mov     %fs, %cs:results + 6
        mov     %gs, %cs:results + 8
        mov     %ss, %cs:results + 10
        mov     %esp, %cs:results + 12
        pushf
        pop     %ax
        mov     %ax, %cs:results + 16
        mov     $0xe801, %ax
        int     $0x15
        mov     %bx, %cs:results + 18
        finish  0x15
        .balign 16
scratch:
        .word   0
results:
        .fill   20
"""


# Resets the machine at its first boot, which it remembers in a byte of CMOS that the battery keeps.
RESETS_ONCE = """
        mov     $0x7e, %al
        outb    %al, $0x70
        inb     $0x71, %al
        cmp     $0x5a, %al
        je      entry
        mov     $0x7e, %al
        outb    %al, $0x70
        mov     $0x5a, %al
        outb    %al, $0x71
        mov     $6, %al
        mov     $0xcf9, %dx
        outb    %al, %dx
1:      hlt
        jmp     1b
"""


class Kernel:
    """A kernel with SETUP in its real-mode part and a pattern behind that; ``high`` False: a zImage."""

    def __init__(
        self, initrd_addr_max: int = INITRD_ADDR_MAX, before: str = "", version: int = 0x20F, high: bool = True
    ) -> None:
        # The real-mode part is entered 0x20 paragraphs into its segment: offsets count from there.
        program = asm.assemble(before + SETUP, "real16", HEADER_END - 0x200)
        self.results = program.symbols["results"] + 0x200
        setup = bytearray((SETUP_SECTORS + 1) * 512)
        self.code = bytes((n * 7 >> 3) & 0xFF for n in range(3 * MIB + 48 if high else 0x7_0000))
        struct.pack_into("<BHI", setup, 0x1F1, SETUP_SECTORS, 0, len(self.code) // 16)
        struct.pack_into("<H2s4sH", setup, 0x1FE, 0xAA55, b"\xeb\x6a", b"HdrS", version)
        struct.pack_into("<B", setup, 0x211, high)
        if version >= 0x203:
            struct.pack_into("<I", setup, 0x22C, initrd_addr_max)
        if version >= 0x20A:
            struct.pack_into("<IBBHI", setup, 0x230, 0x20_0000, 1, 21, 1, 2047)
            struct.pack_into("<QI", setup, 0x258, 0x10_0000, 4 * MIB)
        setup[HEADER_END : HEADER_END + len(program.image)] = program.image
        self.image = bytes(setup) + self.code


def ended(m: pyvmm.Machine) -> int:
    """The status of a machine that ends by itself."""
    timer = threading.Timer(LIMIT_S, lambda: m.stop(99, "time limit"))
    timer.start()
    try:
        return m.run()
    finally:
        timer.cancel()


@pytest.mark.parametrize(
    ("memory_mib", "initrd_bytes", "initrd_addr_max"),
    [
        (64, 0, INITRD_ADDR_MAX),
        (64, 5 * MIB + 123, INITRD_ADDR_MAX),
        (64, 1, 32 * MIB - 1),  # a kernel that wants it low
        (1100, 4096, INITRD_ADDR_MAX),  # more memory than the kernel lets it be in
        (64, 100, 0xFFFF_FFFF),
    ],
)
def test_a_kernel_is_entered_as_the_boot_protocol_says(
    firmware: Path, memory_mib: int, initrd_bytes: int, initrd_addr_max: int
) -> None:
    kernel = Kernel(initrd_addr_max)
    initrd = bytes(n * 11 & 0xFF for n in range(initrd_bytes)) or None
    with pyvmm.Machine(
        machine="pc",
        memory_mib=memory_mib,
        firmware=firmware,
        kernel=kernel.image,
        initrd=initrd,
        append="console=ttyS0 the=line",
    ) as m:
        assert ended(m) == 0x15 << 1 | 1
        setup = m.memory.read(0x10000, len(kernel.image) - len(kernel.code))
        cs, ds, es, fs, gs, ss, esp, flags, above_16m = struct.unpack_from("<6HI2H", setup, kernel.results)
        assert cs == 0x1020
        assert {ds, es, fs, gs, ss} == {0x1000}
        assert esp == 0xFFF0
        assert flags & 0x200 == 0  # no interrupts
        assert m.memory.read(0x20000, 23) == b"console=ttyS0 the=line\0"
        assert m.memory.read(0x100000, len(kernel.code)) == kernel.code
        place, size = struct.unpack_from("<II", setup, 0x218)
        assert size == initrd_bytes
        if initrd is None:
            assert place == 0
            return
        assert m.memory.read(place, size) == initrd
        # The highest page of what the firmware left and the kernel takes.
        top = min(16 * MIB + (above_16m << 16), initrd_addr_max + 1)
        assert place % 4096 == 0
        assert top - 0x10000 < place + size + 4096
        assert place + size <= min(initrd_addr_max + 1, memory_mib * MIB - 4096)


@pytest.mark.parametrize(
    ("version", "high", "real_mode"),
    [(0x200, False, 0x90000), (0x201, True, 0x90000), (0x202, True, 0x10000), (0x207, True, 0x10000),
     (0x207, False, 0x90000)],
)  # fmt: skip
def test_a_kernel_that_only_a_bios_can_start(firmware: Path, version: int, high: bool, real_mode: int) -> None:
    """Old protocols, zImages, and programs that look like a kernel (no 32-bit entry): all their real-mode code."""
    kernel = Kernel(version=version, high=high)
    with pytest.raises(pyvmm.ConfigError, match=r"started by a BIOS.*--firmware"):
        pyvmm.Machine(memory_mib=64, kernel=kernel.image)
    initrd = bytes(n * 11 & 0xFF for n in range(70_000))
    with pyvmm.Machine(
        machine="pc", memory_mib=64, firmware=firmware, kernel=kernel.image, initrd=initrd, append="the=line"
    ) as m:
        assert ended(m) == 0x15 << 1 | 1
        setup = m.memory.read(real_mode, len(kernel.image) - len(kernel.code))
        cs, ds, es, fs, gs, ss, esp = struct.unpack_from("<6HI", setup, kernel.results)
        assert cs == (real_mode >> 4) + 0x20
        assert {ds, es, fs, gs, ss} == {real_mode >> 4}
        if version >= 0x202:
            (line,) = struct.unpack_from("<I", setup, 0x228)
        else:
            magic, offset = struct.unpack_from("<HH", setup, 0x20)
            assert magic == 0xA33F
            line = real_mode + offset
        assert m.memory.read(line, 9) == b"the=line\0"
        assert len(setup) < esp < line - real_mode
        assert m.memory.read(0x100000 if high else 0x10000, len(kernel.code)) == kernel.code
        place, size = struct.unpack_from("<II", setup, 0x218)
        assert place >= MIB
        assert m.memory.read(place, size) == initrd


def test_grub_in_a_kernel_s_clothes(firmware: Path, tmp_path: Path) -> None:
    """GRUB's lnxboot.img before its core image: protocol 2.03, whose real-mode code moves all of it to 0x8000."""
    core = disk_images.grub_mkimage("i386-pc", "(hd0)/grub", ("biosdisk", *disk_images.GRUB2_MODULES))
    kernel = (disk_images.grub2_directory() / "lnxboot.img").read_bytes() + bytes(core)
    line = SerialLine()
    with pyvmm.Machine(
        machine="pc", memory_mib=64, firmware=firmware, kernel=kernel, serial=line.chardev
    ) as m:
        m.resume()
        line.expect("Booting from ROM...", LIMIT_S)
        line.expect("grub rescue>", LIMIT_S)


@pytest.mark.lab
def test_memdisk_starts_a_floppy_out_of_an_initrd(firmware: Path) -> None:
    """syslinux's memdisk: protocol 2.03, hooks int 13h, boots what it was given. Software KVM lacks its IRET."""
    sector = asm.assemble("finish 0x17\n.org 510\n.word 0xaa55", "real16").image
    memdisk = boot_assets.package("syslinux-common") / "usr/lib/syslinux/memdisk"
    with pyvmm.Machine(
        machine="pc",
        memory_mib=64,
        firmware=firmware,
        kernel=memdisk,
        initrd=sector + bytes(1440 * 1024 - len(sector)),
        append="floppy raw",
    ) as m:
        assert ended(m) == 0x17 << 1 | 1


def test_after_a_reset_it_is_booted_again(firmware: Path) -> None:
    log = bytearray()
    kernel = Kernel(before=RESETS_ONCE)
    with pyvmm.Machine(
        machine="pc", memory_mib=64, firmware=firmware, kernel=kernel.image, initrd=b"module", debugcon=log.extend
    ) as m:
        assert ended(m) == 0x15 << 1 | 1
        assert log.count(b"Booting from ROM...") == 2
        (place,) = struct.unpack("<I", m.memory.read(0x10218, 4))
        assert m.memory.read(place, 6) == b"module"


def test_a_kernel_waits_for_its_turn(firmware: Path, tmp_path: Path) -> None:
    disk = tmp_path / "boots.img"
    disk_images.program(disk, asm.assemble("finish 0x16\n.org 510\n.word 0xaa55", "real16"))
    for order, status in (("cn", 0x16), ("nc", 0x15), ("c", 0x15)):
        with pyvmm.Machine(
            machine="pc", memory_mib=64, firmware=firmware, drives=[str(disk)], kernel=Kernel().image, boot=order
        ) as m:
            assert ended(m) == status << 1 | 1


def test_a_rom_without_a_kernel_lets_the_bios_go_on(firmware: Path) -> None:
    line = SerialLine()
    rom = linuxboot.option_rom(guests.image("linuxboot"))
    with pyvmm.Machine(
        machine="pc",
        memory_mib=64,
        firmware=firmware,
        fw_cfg={"genroms/linuxboot.bin": rom},
        serial=line.chardev,
    ) as m:
        m.resume()
        line.expect("Booting from ROM...", LIMIT_S)
        line.expect("linuxboot: no kernel in fw_cfg", LIMIT_S)
        line.expect("No bootable device.", LIMIT_S)


def test_what_firmware_can_not_boot(firmware: Path) -> None:
    with pytest.raises(pyvmm.ConfigError, match="no bzImage"):
        pyvmm.Machine(machine="pc", memory_mib=64, firmware=firmware, kernel=b"\x7fELF" + bytes(1000))
    with pytest.raises(pyvmm.ConfigError, match="takes no modules"):
        pyvmm.Machine(
            machine="pc", memory_mib=64, firmware=firmware, kernel=Kernel().image, modules=[(b"module", "line")]
        )
