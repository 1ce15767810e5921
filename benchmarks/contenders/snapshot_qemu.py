"""QEMU's savevm and -loadvm: the state of a machine inside of a qcow2 image, read as the program starts.

A migration to a file would be the other way: it loads the same state, and has to be told to go on by a client.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from pyvmm.block.image_tool import create
from pyvmm_benchmarks import inputs_guest, launch_guests
from pyvmm_benchmarks.contenders.launch_qemu import Qemu

TAG = "one"
IMAGE_BYTES = 1 << 20  # the state lies behind the disk
LIMIT_S = 60.0


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


class LoadvmAgain(Qemu):
    """One process in which `loadvm` goes back to the same state for each input, by its QMP socket. The guest of
    inputs_guest.py says by a byte to the debug console when it is done; what it reads is nothing, for nobody is at its
    port: so much less is done here.
    """

    def __init__(self, machine: str) -> None:
        super().__init__(machine)
        self._process: subprocess.Popen[bytes] | None = None
        self._open: list[Any] = []

    def start(self, directory: Path, memory_mib: int) -> None:
        """RuntimeError or OSError where it can't; ``close`` follows all the same."""
        assert self.program is not None
        image, rom = directory / f"{self.name}-again.qcow2", directory / "inputs.rom"
        create(str(image), "qcow2", IMAGE_BYTES)
        rom.write_bytes(inputs_guest.rom())
        path = directory / f"{self.name}.qmp"
        self._done, theirs = socket.socketpair()
        self._monitor = socket.socket(socket.AF_UNIX)
        self._open += [self._done, self._monitor]
        command = [self.program, "-accel", "kvm", "-machine", self.machine, "-m", str(memory_mib), "-bios", str(rom)]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-S"]
        command += ["-drive", f"file={image},if=none,format=qcow2,id=state", "-qmp", f"unix:{path},server=on,wait=off"]
        command += ["-chardev", f"socket,fd={theirs.fileno()},id=done", "-device", "isa-debugcon,chardev=done"]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        for line in (self._done, self._monitor):
            line.settimeout(LIMIT_S)
        end = time.monotonic() + LIMIT_S
        while self._monitor.connect_ex(str(path)):
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("QEMU does not listen")
            time.sleep(0.01)
        self._lines = self._monitor.makefile("rb")
        self._open.append(self._lines)
        self._lines.readline()  # the greeting
        self.ask("qmp_capabilities")
        self.human(f"savevm {TAG}")
        self.ask("cont")
        self._wait()

    def ask(self, execute: str, **arguments: object) -> Any:
        self._monitor.sendall(json.dumps({"execute": execute, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise RuntimeError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def human(self, line: str) -> None:
        """A command of the human monitor that says nothing where it has worked."""
        said = self.ask("human-monitor-command", **{"command-line": line})
        if said:
            raise RuntimeError(f"{line}: {said.strip()}")

    def _wait(self) -> None:
        if self._done.recv(1) != b"D":
            raise RuntimeError("the guest says something else")

    def attempts(self, count: int) -> int:
        """As many, from `loadvm` to the guest's word that it is done: ns in all."""
        began = time.perf_counter_ns()
        for _ in range(count):
            self.human(f"loadvm {TAG}")  # the guest ran before, and so does after it
            self._wait()
        return time.perf_counter_ns() - began

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for part in self._open:
            part.close()
