"""Guest memory: to files, and the balloon (QEMU qapi/machine.json, qapi/dump.json)."""

from __future__ import annotations

import os
import stat

from pyvmm.control.qmp.kinds import BOOL, FILE, INT64_MAX, SIZE, Enum, Int, ListOf, Optional, QmpError, Struct
from pyvmm.control.qmp.parked import while_parked
from pyvmm.control.qmp.table import command
from pyvmm.errors import ConfigError, StateError, remedy_for_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from pyvmm.control.qmp.subject import Machine, Served

PAGE_BYTES = 4096
PIECE_BYTES = 1 << 20  # the guest stands for no more of a memsave than that at once
# QEMU's are signed, so that a client says the kernel's half of the addresses as negative numbers.
ADDRESS = Int(-INT64_MAX - 1, (1 << 64) - 1)
MASK = (1 << 64) - 1
LENGTH = Int(1, INT64_MAX)


class OutFile:
    """A file that a client names: only this user may read what was in a guest's memory. QmpError where it can't be."""

    def __init__(self, path: str) -> None:
        if not path or "\0" in path:
            raise QmpError("Parameter 'filename' expects the path of a file")
        self._path = path
        try:
            self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise QmpError(self._why(error)) from None
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):  # a pipe may never be read
            os.close(self.fd)
            raise QmpError(f"Could not open '{path}': it is no regular file: give the path of one, or of none yet")

    def _why(self, error: OSError) -> str:
        return f"Could not open '{self._path}': {remedy_for_path(self._path, error, 'give a file that can be written')}"

    def write(self, data: bytes | memoryview) -> None:
        """All of it. QmpError where the host has no room."""
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self.fd, left) :]
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> QmpError:
        return QmpError(f"writing memory to '{self._path}' failed: {os.strerror(error.errno or 0)}")

    def __enter__(self) -> OutFile:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        """Where nothing has gone wrong before, the file is on its disk: some tell only then that there is no room."""
        try:
            if kind is None:
                os.fsync(self.fd)
        except OSError as error:
            raise self._failed(error) from None
        finally:
            os.close(self.fd)


def ram_and_rom(machine: Machine, gpa: int, size: int) -> Iterator[tuple[memoryview, int]]:
    """Views of what a processor finds there, in order, with where each begins. No register is touched. QmpError where
    a byte is neither RAM nor ROM.
    """
    at, end = gpa, gpa + size
    while at < end:
        for section in list(machine.memory_map.sections):
            if section.gpa <= at < section.gpa + section.size:
                count = min(end, section.gpa + section.size) - at
                offset = section.offset + at - section.gpa
                yield memoryview(section.region)[offset : offset + count], at
                at += count
                break
        else:
            raise QmpError(f"there is neither RAM nor ROM at {at:#x}")


def pieces(machine: Machine, gpa: int, size: int) -> Iterator[bytes | memoryview]:
    """The same in pieces, as the guest has it: without what a debugger has put there."""
    for view, begin in ram_and_rom(machine, gpa, size):
        for at in range(0, len(view), PIECE_BYTES):
            piece = view[at : at + PIECE_BYTES]
            if (breakpoints := machine.breakpoints) is None:
                yield piece
            else:
                copy = bytearray(piece)
                breakpoints.hide(begin + at, copy)
                yield bytes(copy)


def check_open(served: Served) -> None:
    if served.closing:
        raise StateError("the machine is being closed")


@command("pmemsave", {"val": ADDRESS, "size": LENGTH, "filename": FILE}, waits=True)
def pmemsave(served: Served, val: int, size: int, filename: str) -> None:
    """The guest goes on meanwhile, as with QEMU."""
    val &= MASK
    for _ in ram_and_rom(served.machine, val, size):
        pass  # a range that is not there leaves the file alone
    with OutFile(filename) as file:
        for piece in pieces(served.machine, val, size):
            check_open(served)
            file.write(piece)


@command("memsave", {"val": ADDRESS, "size": LENGTH, "filename": FILE, "cpu-index": Optional(SIZE)}, waits=True)
def memsave(served: Served, val: int, size: int, filename: str, cpu_index: int = 0) -> None:
    """By addresses of the vCPU's, through its tables; it stands for each piece."""
    machine = served.machine
    if cpu_index >= len(machine.cpus):
        raise QmpError("Parameter 'cpu-index' expects a CPU number")
    val &= MASK
    first = virtual(machine, cpu_index, val, 1)  # an address that is not there leaves the file alone
    with OutFile(filename) as file:
        assert first
        for at in range(val, val + size, PIECE_BYTES):
            check_open(served)
            file.write(virtual(machine, cpu_index, at, min(PIECE_BYTES, val + size - at)))


def virtual(machine: Machine, cpu_index: int, address: int, size: int) -> bytes:
    """``size`` bytes at a linear address. QmpError where it is not mapped, or no memory."""
    vcpu = machine.cpus[cpu_index].vcpu

    def look() -> bytes:
        data = bytearray()
        at = address
        while len(data) < size:
            count = min(size - len(data), PAGE_BYTES - at % PAGE_BYTES)
            gpa = vcpu.translate(at) if at < 1 << 64 else None
            if gpa is None:
                raise QmpError(f"Invalid addr {address:#018x}/size {size} specified")
            for view, _ in ram_and_rom(machine, gpa, count):
                data += view
            at += count
        return bytes(data)

    return while_parked(machine, "memsave", look)


# -- a core -----------------------------------------------------------------------------------------------------------

DUMP_FORMATS = Struct({"formats": ListOf(Enum("elf"))})


@command("query-dump-guest-memory-capability", returns=DUMP_FORMATS)
def query_dump_guest_memory_capability(served: Served) -> dict[str, Any]:
    return {"formats": ["elf"]}


@command(
    "dump-guest-memory",
    {"paging": BOOL, "protocol": FILE, "begin": Optional(SIZE), "length": Optional(LENGTH),
     "format": Optional(Enum("elf"))},
    waits=True,
)  # fmt: skip
def dump_guest_memory(
    served: Served,
    paging: bool,
    protocol: str,
    begin: int | None = None,
    length: int | None = None,
    format: str = "elf",
) -> None:
    """The guest stands meanwhile: registers and memory are those of one moment."""
    from pyvmm.x86.elf_core import Core

    machine = served.machine
    kind, colon, path = protocol.partition(":")
    if kind != "file" or not colon:
        raise QmpError("Parameter 'protocol' expects file:PATH")
    if (begin is None) != (length is None):
        raise QmpError(f"Parameter '{'begin' if begin is None else 'length'}' is missing")
    if not machine.cpus:
        raise QmpError("this machine has no vCPU whose registers could be dumped")

    def dump() -> None:
        core = Core([cpu.vcpu for cpu in machine.cpus], machine.memory, paging=paging)
        if begin is not None and length is not None:
            core.cut(begin, begin + length)
        if not core.segments:
            raise QmpError("there is no RAM in that range")
        with OutFile(path) as file:
            core.write(file.fd, lambda: check_open(served))

    try:
        while_parked(machine, "dump-guest-memory", dump)
    except OSError as error:
        raise QmpError(f"dump: failed to save memory: {os.strerror(error.errno or 0)}") from None


# -- the balloon ------------------------------------------------------------------------------------------------------

BALLOON = Struct({"actual": SIZE})


@command("query-balloon", returns=BALLOON)
def query_balloon(served: Served) -> dict[str, Any]:
    balloon = served.machine.board.balloon
    if balloon is None:
        raise QmpError("No balloon device has been activated", "DeviceNotActive")
    return {"actual": served.machine.memory.size_bytes - balloon.told["actual_bytes"]}


@command("balloon", {"value": Int(1)})
def balloon(served: Served, value: int) -> None:
    """``value``: how many bytes of its memory the guest is to keep."""
    device = served.machine.board.balloon
    if device is None:
        raise QmpError("No balloon device has been activated", "DeviceNotActive")
    try:
        device.leave(value)
    except ConfigError as error:
        raise QmpError(str(error)) from None
