"""Firmware and a boot loader, saved and thrown away at random moments, go on in another machine each time."""

from __future__ import annotations

from pathlib import Path

import disk_images
from console import SerialLine
from disk_images import GRUB_LEGACY_PROMPT, HELLO, OTHER_AT
from lives import MOMENTS_OF_FIRMWARE, Lives

import pyvmm

LIMIT_S = 240.0 + 10 * MOMENTS_OF_FIRMWARE


class Loader:
    """GRUB legacy on an IDE disk, one life after the other, each from a snapshot of the one before; what is typed is
    typed while it stands.
    """

    def __init__(self, disk: Path, firmware: Path, seed: int, longest_s: float) -> None:
        self.line = SerialLine()
        self.lives = Lives(
            lambda: pyvmm.Machine(
                machine="pc", drives=[str(disk)], firmware=firmware, memory_mib=16, serial=self.line.chardev
            ),
            seed,
            longest_s,
            by=disk.with_suffix(".snap"),
            restore=lambda path: pyvmm.Machine.restore(path, twin=False, serial=self.line.chardev),
        )
        self._seen = 0

    def expect(self, text: str) -> str:
        """Live on until it has said that: what stood before."""
        output = self.line
        self.lives.until(lambda: output.output.find(text, self._seen) >= 0, LIMIT_S)
        at = output.output.find(text, self._seen)
        before = output.output[self._seen : at]
        self._seen = at + len(text)
        return before

    def typed(self, command: str) -> str:
        self.line.send(command + "\r")
        said = self.expect(GRUB_LEGACY_PROMPT).replace("\r", "")
        return said.partition("\n")[2].strip()


def test_seabios_and_grub_at_random_moments(tmp_path: Path, firmware: Path) -> None:
    """From the reset vector to the prompt, then files."""
    disk = tmp_path / "grub.img"
    disk_images.grub_legacy(disk)
    lives = 0
    for seed in range(MOMENTS_OF_FIRMWARE):
        loader = Loader(disk, firmware, seed, longest_s=5.0 / min(MOMENTS_OF_FIRMWARE, 50))
        with loader.lives:
            loader.expect("GNU GRUB  version 0.97")
            loader.expect(GRUB_LEGACY_PROMPT)
            # What SeaBIOS held back of its own console comes with a later command (test_firmware_loaders.py).
            assert HELLO.strip() in loader.typed("cat (hd0,0)/hello.txt")
            assert "Differ" not in loader.typed("cmp (hd0,0)/one.bin (hd0,0)/same.bin")
            assert f"Differ at the offset {OTHER_AT}" in loader.typed("cmp (hd0,0)/one.bin (hd0,0)/other.bin")
            lives += loader.lives.count
        if lives >= MOMENTS_OF_FIRMWARE:
            return
