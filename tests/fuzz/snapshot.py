"""Snapshots as a stranger may have written them: the file, its manifest, and the states of all parts in it.

    python tests/fuzz/snapshot.py [--cases N] [--seed N]      so many inputs by a generator
    python tests/fuzz/fuzz_snapshot.py [libFuzzer options]    the same target, fed by atheris

Each is an error of one sentence, or a machine that can be used and saved. No descriptor is left. A spec names the files
that a machine opens, so one that was changed is read and checked, but no machine is made of it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.cases import main
from fuzz.edits import Choices, edited

from pyvmm import Machine
from pyvmm.console_options import ConsoleOptions
from pyvmm.errors import VmmError
from pyvmm.machine_snapshot import restored_spec
from pyvmm.msgpack import pack, unpack
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot_file import MemoryWriter, SnapshotFile
from pyvmm.vsock.options import VsockOptions

MIB = 1 << 20
PORTS = (
    *(0x20, 0x21, 0x40, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x92, 0xA0, 0xA1, 0x170, 0x177, 0x1F0, 0x1F1, 0x1F2),
    *(0x1F6, 0x1F7, 0x3F6, 0x3F8, 0x3F9, 0x3FA, 0x3FD, 0x402, 0x510, 0x511, 0x514, 0x600, 0x608, 0xAFE0, 0xCF8, 0xCFC),
    *range(0xC000, 0xC010),
)
NEITHER_RESET_NOR_POWER = (0xCF9, 0x604)
ACCESSES = 24
HALT = b"\xf4"


class Target:
    """Machines of several kinds, saved once: a pc and a microvm without vCPUs, and with ``kvm`` two with one."""

    def __init__(self, *, kvm: bool = True) -> None:
        self._kvm = kvm
        self._directory = tempfile.TemporaryDirectory()
        self._files = [self._saved(number, options) for number, options in enumerate(self._kinds())]
        self._descriptors = len(os.listdir("/proc/self/fd"))

    def _kinds(self) -> list[dict[str, Any]]:
        directory = Path(self._directory.name)
        for name in ("disk", "cd", "blk"):
            (directory / name).write_bytes(bytes(64 << 10))
        parts: dict[str, Any] = {
            "balloon": 0,
            "rng": True,
            "vsock": VsockOptions(3),
            "consoles": [ConsoleOptions(None), ConsoleOptions(None, name="agent")],
        }
        blk = f"file={directory / 'blk'},if=virtio,format=raw,snapshot=on"
        disks = [f"file={directory / 'disk'},format=raw,snapshot=on", f"file={directory / 'cd'},media=cdrom,index=1"]
        kinds: list[dict[str, Any]] = [
            {"accel": "qtest", "machine": "pc", "vga": "text", "drives": [*disks, blk], **parts},
            {"accel": "qtest", "machine": "microvm", "drives": [blk], **parts},
        ]
        if self._kvm:
            kinds += [{"machine": "microvm", "flat": HALT}, {"machine": "microvm", "flat": HALT, "irqchip": "off"}]
        return kinds

    def _saved(self, number: int, options: dict[str, Any]) -> tuple[bytes, bytes]:
        """The file whole, and its manifest."""
        path = Path(self._directory.name) / f"{number}.snap"
        with Machine(memory_mib=1, **options) as m:
            m.memory.write(0, bytes(range(256)) * 16)
            m.save(path)
        with SnapshotFile(str(path)) as file:
            return path.read_bytes(), pack(file.manifest)

    def one_input(self, data: bytes) -> None:
        choices = Choices(data)
        whole, packed = self._files[choices.below(len(self._files))]
        try:
            if (what := choices.byte() % 8) == 0:
                self._read(bytes_changed(whole, choices))
            elif what == 1:
                self._read(self._file(packed, edited(packed, choices)))
            else:
                manifest = edited(packed, choices)
                if not isinstance(manifest, dict):
                    return
                manifest["spec"] = unpack(packed)["spec"]
                self._used(self._file(packed, manifest), choices)
        except VmmError as error:
            assert "\n" not in str(error), error
        assert len(os.listdir("/proc/self/fd")) <= self._descriptors

    def _file(self, packed: bytes, manifest: Any) -> SnapshotFile:
        """With right checksums, and room for a memory of the right size. StateError for what can't be packed."""
        with MemoryWriter() as file:
            file.write(file.reserve(MIB), bytes(range(256)) * 16)
            file.commit(manifest)
            return file.committed()

    def _read(self, file: SnapshotFile) -> None:
        """All but making a machine."""
        with Snapshot.in_memory(file) as snapshot:
            snapshot.check()
            restored_spec(snapshot, {})

    def _used(self, file: SnapshotFile, choices: Choices) -> None:
        with Snapshot.in_memory(file) as snapshot, Machine.restore(snapshot) as m:
            for _ in range(ACCESSES):
                port, size = PORTS[choices.below(len(PORTS))], (1, 1, 2, 4)[choices.byte() % 4]
                if choices.byte() % 2:
                    m.pio.read(port, size)
                elif not any(port <= there < port + size for there in NEITHER_RESET_NOR_POWER):
                    m.pio.write(port, size, choices.number(size))
            m.drain()
            m.save_state()


def bytes_changed(whole: bytes, choices: Choices) -> SnapshotFile:
    """The file itself: some bytes of its header or of anywhere else, or its end."""
    changed = bytearray(whole)
    for _ in range(1 + choices.below(4)):
        at = choices.below(64) if choices.byte() % 2 else choices.number(3) % len(changed)
        changed[at] = choices.byte()
    if choices.byte() % 4 == 0:
        del changed[choices.number(3) % len(changed) :]
    fd = os.memfd_create("fuzz")
    os.write(fd, changed)
    return SnapshotFile("a file", fd)


if __name__ == "__main__":
    sys.exit(main(Target().one_input, __doc__))
