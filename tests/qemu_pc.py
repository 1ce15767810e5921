"""The same image in QEMU, for comparison: a pc without a display, its BIOS console on the first serial port.

No test runs this; benchmarks do, and whoever wants to know what another machine makes of an image.
"""

from __future__ import annotations

import struct
from pathlib import Path

# Software KVM refuses to set the MSR behind this feature.
CPU = "host,-arch-capabilities"


def command(
    image: Path,
    sercon: Path,
    *,
    media: str = "disk",
    memory_mib: int = 64,
    firmware: Path | None = None,
    options: tuple[str, ...] = (),
) -> list[str]:
    """QEMU's command line; ``sercon`` is a file that this writes: the port of the BIOS console."""
    sercon.write_bytes(struct.pack("<H", 0x3F8))
    return [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot",
        "-machine", "pc", "-accel", "kvm", "-cpu", CPU, "-m", str(memory_mib),
        "-vga", "none", "-display", "none", "-serial", "stdio",
        "-fw_cfg", f"name=etc/sercon-port,file={sercon}",
        "-drive", f"file={image},if=ide,format=raw,media={media},id=drive0",
        *(("-bios", str(firmware)) if firmware else ()),
        *options,
    ]  # fmt: skip
