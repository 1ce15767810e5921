"""QEMU's savevm and -loadvm: the state of a machine inside of a qcow2 image, read as the program starts.

A migration to a file would be the other way: it loads the same state, and has to be told to go on by a client.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from pyvmm.block.image_tool import create
from pyvmm_benchmarks import launch_guests
from pyvmm_benchmarks.contenders.launch_qemu import Qemu

TAG = "one"
IMAGE_BYTES = 1 << 20  # the state lies behind the disk
LIMIT_S = 120.0


class QemuLoadvm(Qemu):
    """A machine that has not begun; its guest's first instructions end the program."""

    def saved(self, directory: Path, memory_mib: int) -> list[str]:
        """Save one; the command that goes on from it. RuntimeError with QEMU's words where it can't."""
        assert self.program is not None
        image = directory / f"{self.name}.qcow2"
        create(str(image), "qcow2", IMAGE_BYTES)
        rom = launch_guests.write_flat("loadvm", directory, launch_guests.END).file("rom")
        command = [self.program, "-accel", "kvm", "-machine", self.machine, "-m", str(memory_mib), "-bios", rom]
        command += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
        command += ["-device", "isa-debug-exit,iobase=0xf4", "-drive", f"file={image},if=none,format=qcow2,id=state"]
        told = f"savevm {TAG}\ninfo snapshots\nquit\n"
        saving = [*command, "-S", "-monitor", "stdio"]
        ran = subprocess.run(saving, input=told, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        listed = ran.stdout.rpartition("List of snapshots")[2]
        if ran.returncode or f" {TAG} " not in listed:
            raise RuntimeError(f"savevm: {(ran.stderr or ran.stdout).strip()[-300:]}")
        return [*command, "-loadvm", TAG]
