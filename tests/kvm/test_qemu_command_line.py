"""A whole line of QEMU's words, on a terminal; and -snapshot, which leaves the images as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from console import pyvmm_run
from guests import TIMEOUT_S

LIMIT_S = TIMEOUT_S
# WRITE SECTORS of LBA 0 by PIO (ATA-5, 8.47): one sector of 0x5a5a, then isa-debug-exit 0x15.
WRITE_A_SECTOR = """
    ba f6 01 b0 e0 ee  ba f2 01 b0 01 ee  ba f3 01 b0 00 ee  ba f4 01 ee  ba f5 01 ee  ba f7 01 b0 30 ee
    ec a8 08 74 fb
    b9 00 01 b8 5a 5a ba f0 01  ef e2 fd
    ba f7 01 ec a8 80 75 fb
    b0 15 e6 f4 f4
"""
STATUS = 0x15 << 1 | 1
RESET = "b0 fe e6 64 f4"  # mov $0xfe, %al; out %al, $0x64; hlt


def flat(tmp_path: Path, code: str) -> str:
    path = tmp_path / "guest.bin"
    path.write_bytes(bytes.fromhex(code))
    return str(path)


@pytest.mark.parametrize("snapshot", [True, False])
def test_disks_in_qemu_s_words(tmp_path: Path, snapshot: bool) -> None:
    first, second = tmp_path / "a,b.img", tmp_path / "second.img"
    for image in (first, second):
        image.write_bytes(bytes(1 << 20))
    line = ["-enable-kvm", "-M", "pc,accel=kvm", "-cpu", "host", "-smp", "1", "-m", "64M", "-nographic"]
    line += ["-serial", "mon:stdio", "-monitor", "none", "-display", "none", "-vga", "none", "-net", "none"]
    line += ["-no-reboot", "-hda", str(first), "-hdd", str(second), "--flat", flat(tmp_path, WRITE_A_SECTOR)]
    with pyvmm_run(*line, *(["-snapshot"] if snapshot else [])) as console:
        assert console.wait(LIMIT_S) == STATUS, console.output
    assert first.read_bytes()[:512] == (bytes(512) if snapshot else b"\x5a" * 512)
    assert second.read_bytes() == bytes(1 << 20)


def test_no_reboot_and_debug_exit(tmp_path: Path) -> None:
    with pyvmm_run("-no-reboot", "-M", "microvm", "-nodefaults", "--flat", flat(tmp_path, RESET)) as console:
        assert console.wait(LIMIT_S) == 6
    line = ["-device", "isa-debug-exit,iobase=0x510f,iosize=4", "--flat", flat(tmp_path, "ba 0f 51 b0 03 ee f4")]
    with pyvmm_run(*line) as console:
        assert console.wait(LIMIT_S) == 7
