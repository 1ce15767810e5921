"""SeaBIOS on the pc board, and boot loaders that others wrote, from disks and a CD: spoken to over the serial port."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import disk_images
from console import Console, SerialLine, pyvmm_run
from disk_images import GRUB2_PROMPT, GRUB_LEGACY_PROMPT, HELLO, OTHER_AT

import pyvmm
from pyvmm.address_space import AddressSpace

# Generous: they end what hangs. Software KVM takes 2 s to the boot sector, and 10 to GRUB 2's prompt.
BOOT_S = 120.0
COMMAND_S = 120.0

NOISE = disk_images.files()["noise.txt"].decode().strip()

# Ends of "GRUB Loading stage2." and "Welcome to GRUB!", which went to the BIOS console: SeaBIOS holds the last
# characters back until a timer tick finds it at work again, and that is during a later command. No other line ends so.
LATE = (".\n", "!\n\n")

VGA_TEXT = 0xB_8000
VGA_TEXT_BYTES = 0x8000


def run_firmware(firmware: Path, *args: str) -> Console:
    return pyvmm_run("--firmware", str(firmware), "--memory", "64", "--timeout", "280", *args)


def typed(console: Console | SerialLine, prompt: str, command: str) -> str:
    """What a loader answers; its echo of the command is cut off."""
    console.send(command + "\r")
    said = console.expect(prompt, COMMAND_S).replace("\r", "")
    for late in LATE:
        said = said.replace(late, "")
    echo, _, answer = said.partition("\n")
    assert command in echo, said
    return answer.strip()


def test_a_boot_sector_gets_what_a_bios_hands_over(tmp_path: Path, firmware: Path) -> None:
    disk = tmp_path / "handoff.img"
    disk_images.handoff(disk)
    with run_firmware(firmware, str(disk)) as console:
        console.expect("SeaBIOS (version", BOOT_S)
        console.expect("Booting from Hard Disk...", BOOT_S)
        said = console.expect("Press any key", BOOT_S)
        assert "DL: 80 " in said  # the first hard disk
        assert "$PnP-F000:" in said  # its search of the BIOS's segment for the installation check
        console.send("x")  # int 16h had waited for it; then int 18h: boot from something else
        console.expect("No bootable device", BOOT_S)


class VgaText(pyvmm.Device):
    """Text memory and nothing else of a VGA: what is on the screen, and all that ever was."""

    valid_sizes = impl_sizes = (1, 8)
    unaligned = True

    def __init__(self) -> None:
        self._memory = bytearray(VGA_TEXT_BYTES)
        self._written = threading.Condition()

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._memory[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        with self._written:
            self._memory[offset : offset + size] = value.to_bytes(size, "little")
            self._written.notify_all()

    def screen(self) -> str:
        """25 lines of 80; attributes left out."""
        text = self._memory[: 80 * 25 * 2 : 2].decode("latin-1").replace("\0", " ")
        return "\n".join(text[row * 80 : row * 80 + 80].rstrip() for row in range(25))

    def expect(self, text: str, timeout_s: float) -> str:
        with self._written:
            assert self._written.wait_for(lambda: text in self.screen(), timeout_s), self.screen()
            return self.screen()


def add_vga_text(mmio: AddressSpace) -> VgaText:
    vga = VgaText()
    mmio.map(VGA_TEXT, VGA_TEXT_BYTES, vga, name="vga text")
    return vga


def signed(byte: int) -> int:
    """A byte as C's %x prints a char."""
    return (byte ^ 0x80) - 0x80 & 0xFFFF_FFFF


def test_grub_legacy_reads_files_and_boots_a_multiboot_kernel(tmp_path: Path, firmware: Path) -> None:
    disk = tmp_path / "grub.img"
    disk_images.grub_legacy(disk)
    line = SerialLine()
    prompt = GRUB_LEGACY_PROMPT
    with pyvmm.Machine(machine="pc", drives=[str(disk)], firmware=firmware, memory_mib=64, serial=line.chardev) as m:
        vga = add_vga_text(m.mmio)
        m.resume()
        line.expect("GNU GRUB  version 0.97", BOOT_S)
        line.expect(prompt, BOOT_S)

        geometry = typed(line, prompt, "geometry (hd0)")
        sectors = disk.stat().st_size // disk_images.SECTOR
        cylinders = sectors // (16 * 63) - 1  # a BIOS keeps the last for itself
        assert f"drive 0x80: C/H/S = {cylinders}/16/63, The number of sectors = {sectors}, LBA" in geometry
        assert "Partition num: 0,  Filesystem type is fat, partition type 0xe" in geometry
        assert typed(line, prompt, "cat (hd0,0)/hello.txt") == HELLO.strip()
        assert typed(line, prompt, "cmp (hd0,0)/one.bin (hd0,0)/same.bin") == ""
        one, other = (signed(disk_images.files()[name][OTHER_AT]) for name in ("one.bin", "other.bin"))
        assert typed(line, prompt, "cmp (hd0,0)/one.bin (hd0,0)/other.bin").replace("\n", "") == (
            f"Differ at the offset {OTHER_AT}: {one:#x} [(hd0,0)/one.bin], {other:#x} [(hd0,0)/other.bin]"
        )

        assert "[Multiboot-elf, <0x100000:" in typed(line, prompt, "kernel (hd0,0)/kernel of this test")
        line.send("boot\r")
        screen = vga.expect("Halted.", COMMAND_S)
        assert "cmdline = (hd0,0)/kernel of this test" in screen
        assert "boot_device = 0x8000ffff" in screen
        # What SeaBIOS made of fw_cfg's memory map: 64 MiB but for its own tables at the end.
        sizes = re.search(r"mem_lower = (\d+)KB, mem_upper = (\d+)KB", screen)
        assert sizes
        assert int(sizes[1]) == 639
        assert 63 * 1024 - 256 <= int(sizes[2]) < 63 * 1024


def test_grub_2_reads_a_file_by_the_bios_and_by_its_own_driver(tmp_path: Path, firmware: Path) -> None:
    disk = tmp_path / "grub2.img"
    disk_images.grub2(disk)
    with run_firmware(firmware, str(disk)) as console:
        console.expect("GRUB loading.", BOOT_S)
        console.expect(GRUB2_PROMPT, BOOT_S)
        assert typed(console, GRUB2_PROMPT, "ls") == "(hd0) (hd0,msdos1)"
        assert typed(console, GRUB2_PROMPT, "cat (hd0,msdos1)/hello.txt") == HELLO.strip()
        assert typed(console, GRUB2_PROMPT, "cat (hd0,msdos1)/noise.txt") == NOISE
        assert typed(console, GRUB2_PROMPT, "nativedisk pata") == ""
        assert typed(console, GRUB2_PROMPT, "ls") == "(ata0) (ata0,msdos1)"
        assert typed(console, GRUB2_PROMPT, "cat (ata0,msdos1)/noise.txt") == NOISE


def test_grub_2_from_a_cd(tmp_path: Path, firmware: Path) -> None:
    cd = tmp_path / "grub.iso"
    disk_images.grub_cd(cd)
    with run_firmware(firmware, "--cdrom", str(cd)) as console:
        console.expect("Booting from DVD/CD...", BOOT_S)
        console.expect(GRUB2_PROMPT, BOOT_S)
        assert "(cd)" in typed(console, GRUB2_PROMPT, "ls").split()
        assert typed(console, GRUB2_PROMPT, "cat (cd)/hello.txt") == HELLO.strip()
        assert typed(console, GRUB2_PROMPT, "cat (cd)/noise.txt") == NOISE
