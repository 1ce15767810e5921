"""SeaBIOS and boot loaders from a disk on virtio: what test_firmware_loaders.py does from IDE, by SeaBIOS's driver."""

from __future__ import annotations

import hashlib
from pathlib import Path

import disk_images
import pytest
from console import SerialLine, pyvmm_run
from disk_images import GRUB2_PROMPT, GRUB_LEGACY_PROMPT, HELLO
from test_firmware_loaders import BOOT_S, COMMAND_S, NOISE, add_vga_text, run_firmware, typed
from test_firmware_writes import CHS, EDD, LIMIT_S, copying_disk, with_written

import pyvmm

JOBS = ((CHS, CHS, 1), (EDD, EDD, 1), (EDD, CHS, 20), (CHS, EDD, 33), (EDD, EDD, 127))


def on_virtio(disk: Path, more: str = "") -> tuple[str, str]:
    return "--drive", f"file={disk},if=virtio{more}"


@pytest.mark.parametrize("interfaces", ["", ",disable-legacy=on", ",disable-modern=on"])
def test_a_boot_sector_gets_what_a_bios_hands_over(tmp_path: Path, firmware: Path, interfaces: str) -> None:
    disk = tmp_path / "handoff.img"
    disk_images.handoff(disk)
    with run_firmware(firmware, *on_virtio(disk, interfaces)) as console:
        console.expect("SeaBIOS (version", BOOT_S)
        console.expect("Booting from Hard Disk...", BOOT_S)
        assert "DL: 80 " in console.expect("Press any key", BOOT_S)


def test_grub_legacy_reads_files_and_boots_a_multiboot_kernel(tmp_path: Path, firmware: Path) -> None:
    disk = tmp_path / "grub.img"
    disk_images.grub_legacy(disk)
    line = SerialLine()
    prompt = GRUB_LEGACY_PROMPT
    drives = [f"file={disk},if=virtio"]
    with pyvmm.Machine(machine="pc", drives=drives, firmware=firmware, memory_mib=64, serial=line.chardev) as m:
        vga = add_vga_text(m.mmio)
        m.resume()
        line.expect("GNU GRUB  version 0.97", BOOT_S)
        line.expect(prompt, BOOT_S)
        assert typed(line, prompt, "cat (hd0,0)/hello.txt") == HELLO.strip()
        assert typed(line, prompt, "cmp (hd0,0)/one.bin (hd0,0)/same.bin") == ""
        assert "[Multiboot-elf, <0x100000:" in typed(line, prompt, "kernel (hd0,0)/kernel of this test")
        line.send("boot\r")
        assert "cmdline = (hd0,0)/kernel of this test" in vga.expect("Halted.", COMMAND_S)
        assert m.backends["virtio0"].stats.read.operations >= 50


def test_grub_2_reads_a_file_by_the_bios(tmp_path: Path, firmware: Path) -> None:
    disk = tmp_path / "grub2.img"
    disk_images.grub2(disk)
    with run_firmware(firmware, *on_virtio(disk)) as console:
        console.expect(GRUB2_PROMPT, BOOT_S)
        assert typed(console, GRUB2_PROMPT, "ls") == "(hd0) (hd0,msdos1)"
        assert typed(console, GRUB2_PROMPT, "cat (hd0,msdos1)/noise.txt") == NOISE


@pytest.mark.parametrize("engine", ["threads", "io_uring"])
def test_what_a_guest_writes_by_the_bios_is_in_the_image(tmp_path: Path, firmware: Path, engine: str) -> None:
    disk = tmp_path / "disk.img"
    whole = with_written(disk, copying_disk(disk, JOBS))

    with pyvmm_run(
        *on_virtio(disk, f",aio={engine}"), "--firmware", str(firmware), "--timeout", str(LIMIT_S)
    ) as console:
        assert "failed" not in console.expect("copied", LIMIT_S)
        assert console.wait(LIMIT_S) == 0
    assert hashlib.sha256(disk.read_bytes()).hexdigest() == whole
