"""Contenders of ``pyvmm bench disk``: a pc with one disk on virtio, in pyvmm and in QEMU, alike in all the rest."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

from pyvmm_benchmarks import environment
from pyvmm_benchmarks.contenders.exit_contender import LOOK_S, CantRun, Kind
from pyvmm_benchmarks.contenders.request_contender import ANSWER_S, OwnRequests, RequestContender
from pyvmm_benchmarks.disk_cases import MEMORY_MIB, DiskCase

CHILD = Path(__file__).with_name("request_child.py")


class Disk(RequestContender):
    """A running one."""

    server: subprocess.Popen[bytes] | None = None
    """Where its disk is, if that is another process."""

    def close(self) -> None:
        super().close()
        if self.server is not None:
            self.server.terminate()
            self.server.wait()


class OwnDisk(OwnRequests, Disk):
    """pyvmm's."""


class DiskKind(Kind):
    """``engine`` is the drive's aio; "nbd": its image is that of a qemu-nbd, at a Unix socket."""

    engine: str
    format = "raw"  # of its image

    def on_image(self, image: Path) -> DiskKind:
        """The same, on that image."""
        self.image = image
        return self

    @property
    def file(self) -> str:
        """What the drive is told."""
        return f"nbd:unix:{self.image}.nbd" if self.engine == "nbd" else str(self.image)

    def why_not(self, case: DiskCase) -> str:
        if self.engine == "nbd" and not environment.find("qemu-nbd", "PYVMM_QEMU_NBD"):
            return "no qemu-nbd (Debian: qemu-utils; or name it in PYVMM_QEMU_NBD)"
        return ""

    def serve(self) -> subprocess.Popen[bytes] | None:
        """The server of its image, listening; None where it needs none."""
        if self.engine != "nbd":
            return None
        program = environment.find("qemu-nbd", "PYVMM_QEMU_NBD")
        assert program is not None
        path = f"{self.image}.nbd"
        command = [program, "--socket", path, "--format", self.format, "--cache", "writeback", "--persistent"]
        server = subprocess.Popen([*command, str(self.image)])
        end = time.monotonic() + ANSWER_S
        while not listens(path):
            if server.poll() is not None or time.monotonic() > end:
                server.kill()
                server.wait()
                raise CantRun(f"qemu-nbd does not serve {self.image}")
            time.sleep(LOOK_S)
        return server


def listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as line:
        return not line.connect_ex(path)


class OwnKind(DiskKind):
    ours = True

    def __init__(self, engine: str = "threads") -> None:
        self.name = "pyvmm" if engine == "threads" else f"pyvmm-{engine.replace('io_', '')}"
        self.engine = engine

    def command(self, case: DiskCase, directory: Path) -> list[str]:
        nbd = self.engine == "nbd"  # qemu-nbd serves the disk in the image
        drive = {"file": self.file, "aio": "threads" if nbd else self.engine, "format": "raw" if nbd else self.format}
        work = {"rom": str(directory / "disk.rom"), "memory_mib": MEMORY_MIB, "drive": drive}
        return [sys.executable, "-P", str(CHILD), json.dumps(work)]

    def start(self, case: DiskCase, directory: Path, pin: int | None) -> Disk:
        server = self.serve()
        disk = OwnDisk(self, case, self.command(case, directory), pin)
        disk.server = server
        return disk


class QemuKind(DiskKind):
    """``iothread``: a thread of its own for the disk, which polls."""

    def __init__(self, engine: str, *, iothread: bool = False) -> None:
        self.name = f"qemu-{'iothread-' if iothread else ''}{engine.replace('io_', '')}"
        self.engine = engine
        self.iothread = iothread
        self.program = environment.find("qemu-system-x86_64", "PYVMM_QEMU")

    def version(self) -> str | None:
        return environment.version(self.program, "--version") if self.program else "not installed"

    def why_not(self, case: DiskCase) -> str:
        if not self.program:
            return "not installed (Debian: qemu-system-x86; or name it in PYVMM_QEMU)"
        return super().why_not(case)

    def command(self, case: DiskCase, directory: Path) -> list[str]:
        assert self.program is not None
        format = "raw" if self.engine == "nbd" else self.format  # qemu-nbd serves the disk in it
        drive = f"file={self.file},if=none,id=d,format={format},cache=writeback"
        drive += "" if self.engine == "nbd" else f",aio={self.engine}"
        device = "virtio-blk-pci,drive=d,addr=04.0"
        command = [self.program, "-machine", "pc", "-accel", "kvm", "-m", str(MEMORY_MIB)]
        command += ["-bios", str(directory / "disk.rom"), "-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-serial", "null", "-name", "guest,debug-threads=on", "-drive", drive]
        if self.iothread:
            command += ["-object", "iothread,id=io"]
            device += ",iothread=io"
        return [*command, "-device", device]

    def start(self, case: DiskCase, directory: Path, pin: int | None) -> Disk:
        server = self.serve()
        disk = Disk(self, case, self.command(case, directory), pin)
        disk.server = server
        return disk
