"""The pc board without a vCPU, between fences: guard pages on both sides of the guest's memory, margins of the image on
both sides of the disk, and a backend that is slow, cancelled and broken when the driver of the test wants it.

``FencedBoard.check`` raises Escaped where anything of that has changed, or where a device has raised on another thread.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pyvmm
from pyvmm import builder
from pyvmm.block import open as block
from pyvmm.block.options import DriveOptions
from pyvmm.guest_memory import GuestMemory, RamRegion

if TYPE_CHECKING:
    from pyvmm.block.backend import BlockBackend
    from pyvmm.devices.ide.atapi import AtapiDrive

KIB, MIB = 1 << 10, 1 << 20
MEMORY_BYTES = 3 * MIB  # no multiple of a huge page: those are placed elsewhere
GUARD_BYTES = MIB
MARGIN_BYTES = 64 * KIB
ROM_BYTES = 128 * KIB
SECTOR_BYTES = 512
DISK_SECTORS = 2048
SMALL_BYTES = 300 * SECTOR_BYTES + 100  # the last sector is not all there
CD_BYTES = 700 * 2048 + 512
DISC_BYTES = 20 * 2048  # of the disc that goes in and out

WRITABLE_BYTES = 300  # of an item of fw_cfg

PRIMARY, SECONDARY = 0x1F0, 0x170
CONTROL = {PRIMARY: 0x3F6, SECONDARY: 0x376}
BUS_MASTER_BASE = 0xC000
ROM_BASE = (4 << 30) - ROM_BYTES

MAP_FIXED_NOREPLACE = 0x100000


class Escaped(AssertionError):
    """Something was written that no access of the guest may reach, or a device has raised."""


class Stuck(AssertionError):
    """A drive does not do what it is asked for."""


def pattern(size: int, salt: int) -> bytes:
    """Bytes that differ from place to place."""
    block_bytes = bytes((n * 7 + salt + (n >> 8)) & 0xFF for n in range(4096))
    return (block_bytes * (size // 4096 + 1))[:size]


# -- guest memory between guards ---------------------------------------------------------------------------------------

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Guards:
    """Writable pages filled with a pattern, directly below and above one RAM region's mapping in this process."""

    def __init__(self, region: RamRegion) -> None:
        self.places = (region.host_address - GUARD_BYTES, region.host_address + region.size_bytes)
        self.made: list[int] = []
        self.content = pattern(GUARD_BYTES, 0x5A)
        for place in self.places:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
            address = libc.mmap(place, GUARD_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
            if address != place:
                break
            self.made.append(place)
            ctypes.memmove(place, self.content, GUARD_BYTES)

    @property
    def complete(self) -> bool:
        return len(self.made) == len(self.places)

    def check(self) -> None:
        for place in self.made:
            if ctypes.string_at(place, GUARD_BYTES) != self.content:
                raise Escaped(f"host memory at {place:#x}, outside of the guest's, was written")

    def close(self) -> None:
        while self.made:
            libc.munmap(self.made.pop(), GUARD_BYTES)


def fenced_memory(size_bytes: int, **options: Any) -> tuple[GuestMemory, Guards]:
    """Guest memory whose neighbours in this process are guards."""
    # Some are made, until one has room beside it, or three lie in a row: then the one in the middle has it where the
    # outer two are given back.
    made: dict[int, GuestMemory] = {}
    try:
        for _ in range(64):
            memory = GuestMemory(size_bytes, **options)
            made[memory.ram[0].host_address] = memory
            middle = next((at for at in made if at - size_bytes in made and at + size_bytes in made), None)
            if middle is not None:
                memory = made[middle]
                for at in (middle - size_bytes, middle + size_bytes):
                    made.pop(at).close()
            guards = Guards(memory.ram[0])
            if guards.complete:
                del made[memory.ram[0].host_address]
                return memory, guards
            guards.close()
    finally:
        for memory in made.values():
            memory.close()
    raise RuntimeError("found no place for guest memory with room for guards")


# -- a backend at the driver's mercy -----------------------------------------------------------------------------------


class Held:
    """A request that has not been passed on yet."""

    def __init__(self, cb: Callable[[int], object], submit: Callable[[Callable[[int], object]], Any]) -> None:
        self.cb = cb
        self.submit = submit
        self.inner: Any = None
        self.done = False
        self.cancelled = False

    def finish(self, ret: int) -> None:
        if self.done:
            raise Escaped("a request's callback came twice")
        self.done = True
        self.cb(ret)

    def cancel(self) -> None:
        self.cancelled = True
        if self.inner is not None:
            self.inner.cancel()


class MoodyBackend:
    """A BlockBackend's face. ``mood()`` says for each request: "now", "hold" until ``release``, or an errno."""

    def __init__(self, inner: BlockBackend) -> None:
        self.inner = inner
        self.held: deque[Held] = deque()
        self.mood: Callable[[], str | int] = lambda: "now"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _request(self, cb: Callable[[int], object], submit: Callable[[Callable[[int], object]], Any]) -> Held:
        request = Held(cb, submit)
        mood = self.mood()
        if mood == "hold":
            self.held.append(request)
        elif isinstance(mood, int):
            request.finish(-mood)
        else:
            request.inner = submit(request.finish)
        return request

    def aio_readv(self, sector: int, iov: list[memoryview], cb: Callable[[int], object]) -> Held:
        return self._request(cb, lambda done: self.inner.aio_readv(sector, iov, done))

    def aio_writev(self, sector: int, iov: list[memoryview], cb: Callable[[int], object]) -> Held:
        return self._request(cb, lambda done: self.inner.aio_writev(sector, iov, done))

    def aio_flush(self, cb: Callable[[int], object]) -> Held:
        return self._request(cb, self.inner.aio_flush)

    def aio_discard(self, sector: int, count: int, cb: Callable[[int], object]) -> Held:
        return self._request(cb, lambda done: self.inner.aio_discard(sector, count, done))

    def aio_write_zeroes(self, sector: int, count: int, cb: Callable[[int], object]) -> Held:
        return self._request(cb, lambda done: self.inner.aio_write_zeroes(sector, count, done))

    def release(self, error: int = 0) -> None:
        """Pass on the oldest request that is held; or have it fail."""
        if not self.held:
            return
        request = self.held.popleft()
        if request.cancelled:
            request.finish(-errno.ECANCELED)
        elif error:
            request.finish(-error)
        else:
            request.inner = request.submit(request.finish)

    def drain(self) -> None:
        while self.held:
            self.release()
            self.inner.drain()
        self.inner.drain()


# -- the board ---------------------------------------------------------------------------------------------------------


class FencedBoard:
    """A Machine with accel="qtest" and, on IDE: a disk that is a window of its image, a small odd read-only disk, a CD
    whose image is no multiple of a block, an empty CD drive. Firmware is a ROM with a pattern.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = {
            "disk": pattern(MARGIN_BYTES + DISK_SECTORS * SECTOR_BYTES + MARGIN_BYTES, 1),
            "small": pattern(SMALL_BYTES, 2),
            "cd": pattern(CD_BYTES, 3),
            "disc": pattern(DISC_BYTES, 4),
        }
        for name, content in self.images.items():
            self.path(name).write_bytes(content)
        self.rom = pattern(ROM_BYTES, 5)
        self.guards: Guards | None = None
        self.backends: dict[str, MoodyBackend] = {}
        with (
            mock.patch.object(builder, "GuestMemory", self._memory),
            mock.patch.object(block, "open_drive", self._open_drive),
        ):
            self.machine = pyvmm.Machine(
                machine="pc",
                accel="qtest",
                memory_mib=MEMORY_BYTES // MIB,
                firmware=self.rom,
                debug_exit=None,
                drives=[
                    self.options("disk", index=0, offset=MARGIN_BYTES, size=DISK_SECTORS * SECTOR_BYTES),
                    self.options("small", index=1, read_only=True),
                    self.options("cd", index=2, media="cdrom"),
                    DriveOptions(file=None, index=3, media="cdrom"),
                ],
            )
        self.disc = self._open_drive(
            self.options("disc", media="cdrom"), loop=self.machine.event_loop, clock=self.machine.clock
        )
        fw_cfg: Any = self.machine.devices["fw_cfg"]
        self.writable_key: int = fw_cfg.add_file("opt/test/writable", pattern(WRITABLE_BYTES, 6), writable=True)
        self.pio = self.machine.pio
        self.memory = self.machine.memory
        self.memory_map = self.machine.memory_map
        if not self.guards:
            raise RuntimeError("the builder makes guest memory by another name")

    def options(self, name: str, **options: Any) -> DriveOptions:
        return DriveOptions(file=str(self.path(name)), werror="report", **options)

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.img"

    def _memory(self, size_bytes: int, **options: Any) -> GuestMemory:
        memory, self.guards = fenced_memory(size_bytes, **options)
        return memory

    def _open_drive(self, options: DriveOptions, **others: Any) -> MoodyBackend:
        backend = MoodyBackend(OPEN_DRIVE(options, **others))
        self.backends[Path(os.fspath(options.file)).stem if options.file else "empty"] = backend
        return backend

    @property
    def cd_drives(self) -> list[AtapiDrive]:
        channel: Any = self.machine.devices["ide1"]
        return [drive.device for drive in channel.drives]

    # -- what the driver does besides accesses -------------------------------------------------------------------------

    def power_up(self) -> None:
        """Reset, with everything at the places where the driver looks for it."""
        for backend in self.backends.values():
            backend.mood = lambda: "now"
        self.settle()
        self.disc.drain()
        self.machine.reset()
        self.place_bus_master()

    def config_write(self, slot: int, function: int, register: int, size: int, value: int) -> None:
        self.pio.write(0xCF8, 4, 1 << 31 | slot << 11 | function << 8 | register & 0xFC)
        self.pio.write(0xCFC + (register & 3), size, value)

    def place_bus_master(self) -> None:
        self.config_write(1, 1, 0x20, 4, BUS_MASTER_BASE)
        self.config_write(1, 1, 0x04, 2, 5)  # I/O, bus master
        self.config_write(1, 1, 0x40, 4, 0x8000_8000)  # both channels decode

    def settle(self) -> None:
        """What has been passed on to the host is over."""
        for backend in self.backends.values():
            backend.inner.drain()

    def drain(self) -> None:
        """Nothing is held any more, either."""
        for backend in self.backends.values():
            backend.drain()

    # -- a guest that knows what it does -------------------------------------------------------------------------------

    def check_alive(self) -> None:
        """After whatever went before: a software reset, and both disks and a CD can be read, by PIO and by DMA."""
        moods = {name: backend.mood for name, backend in self.backends.items()}
        for backend in self.backends.values():
            backend.mood = lambda: "now"
        self.drain()
        self.place_bus_master()
        self.change_disc(0, self.backends["cd"])
        for base in (PRIMARY, SECONDARY):
            self.pio.write(BUS_MASTER_BASE + (8 if base == SECONDARY else 0), 1, 0)
            for value in (4, 0):
                self.pio.write(CONTROL[base], 1, value)
                self.drain()
        sectors = range(0, DISK_SECTORS, 97)
        image = self.path("disk").read_bytes()[MARGIN_BYTES:]
        for lba in sectors:
            wanted = image[lba * SECTOR_BYTES : (lba + 1) * SECTOR_BYTES]
            self._expect(f"the disk's sector {lba}", self._read_pio(0, lba), wanted)
            self._expect(f"the disk's sector {lba} by DMA", self._read_dma(0, lba), wanted)
        small = self.images["small"] + bytes(SECTOR_BYTES)
        for lba in (0, SMALL_BYTES // SECTOR_BYTES):
            wanted = small[lba * SECTOR_BYTES : (lba + 1) * SECTOR_BYTES]
            self._expect(f"the small disk's sector {lba}", self._read_pio(1, lba), wanted)
        self._expect("the CD's block 16", self._read_cd(16), self.images["cd"][16 * 2048 : 17 * 2048])
        for name, backend in self.backends.items():
            backend.mood = moods[name]

    def _expect(self, what: str, got: bytes, wanted: bytes) -> None:
        if got != wanted:
            raise Stuck(f"{what} is {got[:16].hex()}..., the image has {wanted[:16].hex()}...")

    def _status(self, base: int, wanted: int) -> None:
        self.drain()
        status = self.pio.read(base + 7, 1)
        if status != wanted:
            raise Stuck(f"the drive at {base:#x} has status {status:#x}, error {self.pio.read(base + 1, 1):#x}")

    def _command(self, base: int, unit: int, opcode: int, count: int, lba: int) -> None:
        self.pio.write(base + 6, 1, 0xE0 | unit << 4)
        for offset, value in ((1, 0), (2, count), (3, lba), (4, lba >> 8), (5, lba >> 16)):
            self.pio.write(base + offset, 1, value & 0xFF)
        self.pio.write(base + 7, 1, opcode)

    def _words(self, base: int, count: int) -> bytes:
        return b"".join(self.pio.read(base, 2).to_bytes(2, "little") for _ in range(count))

    def _read_pio(self, unit: int, lba: int) -> bytes:
        self._command(PRIMARY, unit, 0x20, 1, lba)
        self._status(PRIMARY, 0x58)
        data = self._words(PRIMARY, 256)
        self._status(PRIMARY, 0x50)
        return data

    def _read_dma(self, unit: int, lba: int) -> bytes:
        table, buffer = 0x1000, 0x2002
        self.memory.write(table, buffer.to_bytes(4, "little") + (SECTOR_BYTES | 1 << 31).to_bytes(4, "little"))
        self.pio.write(BUS_MASTER_BASE, 1, 8)
        self.pio.write(BUS_MASTER_BASE + 2, 1, 6)
        self.pio.write(BUS_MASTER_BASE + 4, 4, table)
        self._command(PRIMARY, unit, 0xC8, 1, lba)
        self.pio.write(BUS_MASTER_BASE, 1, 9)
        self._status(PRIMARY, 0x50)
        if self.pio.read(BUS_MASTER_BASE + 2, 1) & 7 != 4:
            raise Stuck(f"the bus master's status is {self.pio.read(BUS_MASTER_BASE + 2, 1):#x}")
        self.pio.write(BUS_MASTER_BASE, 1, 0)
        return self.memory.read(buffer, SECTOR_BYTES)

    def _read_cd(self, block_number: int) -> bytes:
        for _ in range(3):  # a new disc shows in two steps
            status = self._packet(bytes((0x28, 0)) + block_number.to_bytes(4, "big") + bytes((0, 0, 1, 0, 0, 0)))
            if status & 0x08:
                break
            self._packet(bytes((3, 0, 0, 0, 18)) + bytes(7))
            self._words(SECONDARY, 9)
        data = self._words(SECONDARY, 1024)
        self._status(SECONDARY, 0x50)
        return data

    def _packet(self, packet: bytes) -> int:
        self._command(SECONDARY, 0, 0xA0, 0, 2048 << 8)
        self.drain()
        for at in range(0, 12, 2):
            self.pio.write(SECONDARY, 2, packet[at] | packet[at + 1] << 8)
        self.drain()
        return self.pio.read(SECONDARY + 7, 1)

    def change_disc(self, unit: int, disc: MoodyBackend | None, force: bool = True) -> None:
        """Put one in, or take it out. What is being read from the old one is over first."""
        self.drain()
        self.disc.drain()
        channel = self.machine.devices["ide1"]
        with channel.lock:
            drive = self.cd_drives[unit]
            if disc is None:
                drive.eject(force=force)
            else:
                drive.insert(disc)

    # -- the fences ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Whether everything that no guest can reach is as it was."""
        self.check_errors()
        assert self.guards is not None
        self.guards.check()
        for region in self.memory.ram:
            if region.readonly and bytes(memoryview(region)) != self.rom[-region.size_bytes :]:
                raise Escaped("the firmware's ROM was written")
        for name in ("small", "cd", "disc"):
            if self.path(name).read_bytes() != self.images[name]:
                raise Escaped(f"the read-only image {name} was written")
        self.check_margins()

    def check_margins(self) -> None:
        was, path = self.images["disk"], self.path("disk")
        if path.stat().st_size != len(was):
            raise Escaped(f"the disk's image has another size: {path.stat().st_size}, it was {len(was)}")
        with path.open("rb") as file:
            before = file.read(MARGIN_BYTES)
            file.seek(-MARGIN_BYTES, os.SEEK_END)
            behind = file.read()
        if (before, behind) != (was[:MARGIN_BYTES], was[-MARGIN_BYTES:]):
            raise Escaped("the disk's image was written outside of the drive's window")

    def check_errors(self) -> None:
        """Raise what a device has raised in a callback or a reset."""
        if self.machine.control.error is not None:
            raise Escaped(f"a device's callback raised: {self.machine.control.error!r}") from self.machine.control.error

    def close(self) -> None:
        self.drain()
        self.machine.close()
        self.disc.inner.close()
        if self.guards is not None:
            self.guards.close()


OPEN_DRIVE = block.open_drive
