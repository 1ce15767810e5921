"""A guest that does as it pleases: whole commands with senseless arguments, and accesses that make no sense at all.

What it does next comes from a ``Choices``: a random number generator's, or the bytes of a fuzzer.
"""

from __future__ import annotations

import errno
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from fuzz.harness import (
    BUS_MASTER_BASE,
    CONTROL,
    DISK_SECTORS,
    KIB,
    MEMORY_BYTES,
    PRIMARY,
    ROM_BASE,
    SECONDARY,
    FencedBoard,
)
from fuzz.memory_watch import flood

T = TypeVar("T")

# Registers of the command block
DATA, ERROR, COUNT, LBA_LOW, LBA_MID, LBA_HIGH, DEVICE, COMMAND = range(8)
BSY, DRQ, ERR = 0x80, 0x08, 0x01

NON_DATA = (0x00, 0x10, 0x40, 0x42, 0x70, 0x90, 0x91, 0xC6, 0xE0, 0xE1, 0xE2, 0xE3, 0xE5, 0xE6, 0xE7, 0xEA, 0xEF, 0x27)
PIO_IN = (0x20, 0x21, 0x24, 0x29, 0xC4, 0xEC, 0xA1, 0xE4)
PIO_OUT = (0x30, 0x31, 0x34, 0x39, 0xC5, 0xE8, 0xCE)
DMA = (0xC8, 0xC9, 0xCA, 0xCB, 0x25, 0x35, 0x06, 0x3D)
PACKET, DEVICE_RESET, DATA_SET_MANAGEMENT = 0xA0, 0x08, 0x06
FEATURES = (0, 1, 0x02, 0x03, 0x55, 0x66, 0x82, 0xAA, 0xCC, 0xFF)
PACKETS = (
    *(0x00, 0x03, 0x12, 0x15, 0x1A, 0x1B, 0x1E, 0x25, 0x28, 0x28, 0x28, 0x2B, 0x42, 0x43, 0x44, 0x46, 0x4A),
    *(0x51, 0x52, 0x55, 0x5A, 0xA8, 0xA8, 0xAD, 0xBB, 0xBD, 0xBE, 0xBE),
)
LBAS = (0, 1, 63, 298, 299, 300, 301, DISK_SECTORS - 1, DISK_SECTORS, DISK_SECTORS - 9, (1 << 28) - 1, (1 << 48) - 1)
COUNTS = (0, 1, 1, 2, 8, 16, 17, 128, 255)

# Where a table or a buffer may lie, and what there is
ADDRESSES = (
    *(0, 1, 2, 0xFFE, 0x1000, 0xFFF8, 0xFFFC, 0x1_0000, 0x8_0000, 0x9_FFFE, 0xA_0000, 0xF_0000, 0x10_0000),
    *(MEMORY_BYTES - 0x1_0000, MEMORY_BYTES - 512, MEMORY_BYTES - 8, MEMORY_BYTES - 4, MEMORY_BYTES - 2),
    *(MEMORY_BYTES, MEMORY_BYTES + 4, 0x4000_0000, 0xFEC0_0000, 0xFEE0_0000, ROM_BASE, ROM_BASE + 0x1000),
    *(0xFFFF_FFF8, 0xFFFF_FFFE, 0xFFFF_FFFF),
)
BYTE_COUNTS = (0, 1, 2, 4, 254, 512, 510, 514, 2048, 4096, 0x8000, 0xFFFE, 0xFFFF)
TABLE_END = 0x8000_0000
FLOOD = 300  # writes of one value, one after the other
# Ports where some values reset the machine, which takes long, and a value that does not.
RESETS = {0x64: 0x20, 0x92: 0, 0xCF9: 0}


class NoMoreChoices(Exception):
    """A fuzzer's input is used up."""


class Choices:
    """Where decisions come from: here, seeded."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, limit: int) -> int:
        return int(self._random.random() * limit)

    def blob(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def number(self, bits: int) -> int:
        return int.from_bytes(self.blob((bits + 7) // 8), "little") & ((1 << bits) - 1)


class BytesChoices(Choices):
    """From a fuzzer's input: each choice takes as many bytes of it as it needs. NoMoreChoices at its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def below(self, limit: int) -> int:
        size = max(1, ((limit - 1).bit_length() + 7) // 8)
        return int.from_bytes(self.blob(size), "little") % limit

    def blob(self, size: int) -> bytes:
        piece = self._data[self._position : self._position + size]
        self._position += size
        if len(piece) < size:
            raise NoMoreChoices
        return piece


class Guest:
    """``step`` does one thing, of some accesses. ``accesses`` counts those to the buses; ``log`` has the last."""

    def __init__(self, board: FencedBoard, choices: Choices) -> None:
        self.board = board
        self.choices = choices
        self.accesses = 0
        self.log: deque[tuple[str, int, int, int]] = deque(maxlen=5000)
        self.steps: dict[str, int] = {}
        self._weighted: list[Callable[[], None]] = [
            action
            for action, weight in (
                *((self.ata_command, 22), (self.dma_command, 18), (self.packet_command, 18), (self.any_register, 14)),
                *((self.data_burst, 10), (self.bus_master_register, 6), (self.pci_config, 10), (self.fw_cfg, 6)),
                *((self.fw_cfg_dma, 6), (self.any_port, 6), (self.memory_bus, 3), (self.host_io, 12), (self.time, 2)),
                *((self.rare, 2), (self.flood, 1)),
            )
            for _ in range(weight)
        ]
        self._moods = Choices(0)
        for backend in board.backends.values():
            backend.mood = self.mood

    def step(self) -> None:
        action = self.choices.pick(self._weighted)
        self._moods = Choices(self.choices.number(8))
        self.steps[action.__name__] = self.steps.get(action.__name__, 0) + 1
        self.log.append((action.__name__, 0, 0, 0))
        action()
        self.board.settle()

    def last_accesses(self, limit: int = 60) -> str:
        """The end of the log, with the rest of a run through one port left out."""
        lines: list[str] = []
        run = 0
        before = ("", -1)
        for kind, port, size, value in self.log:
            run = run + 1 if (kind, port) == before else 0
            before = kind, port
            if run < 3:
                lines.append(f"  {kind} {port:#x}, {size}, {value:#x}" if size else f"{kind}:")
            elif run == 3:
                lines.append("  ...")
        return "\n".join(lines[-limit:])

    def mood(self) -> str | int:
        # From choices of its own: it is asked on other threads too, and in the middle of devices' work.
        what = self._moods.below(20)
        if what < 13:
            return "now"
        return "hold" if what < 18 else self._moods.pick((errno.EIO, errno.ENOSPC))

    # -- accesses ------------------------------------------------------------------------------------------------------

    def read(self, port: int, size: int = 1) -> int:
        self.accesses += 1
        self.log.append(("in", port, size, 0))
        return self.board.pio.read(port, size)

    def write(self, port: int, size: int, value: int) -> None:
        self.accesses += 1
        self.log.append(("out", port, size, value))
        self.board.pio.write(port, size, value)

    def memory(self, gpa: int, data: bytes) -> None:
        """The guest's own write to its RAM, as far as there is RAM."""
        if gpa < MEMORY_BYTES:
            self.board.memory.write(gpa, data[: MEMORY_BYTES - gpa])

    def address(self) -> int:
        if self.choices.chance(50):
            return self.choices.below(MEMORY_BYTES)
        return (self.choices.pick(ADDRESSES) + self.choices.below(3) * 2) & 0xFFFF_FFFF

    def channel(self) -> int:
        return PRIMARY if self.choices.chance(75) else SECONDARY

    # -- ATA -----------------------------------------------------------------------------------------------------------

    def address_registers(self, base: int) -> None:
        """Drive, sector and count of the next command, by one of the three kinds of address."""
        choices = self.choices
        if choices.chance(50):
            lba, count = choices.below(DISK_SECTORS), choices.below(4) + 1
        else:
            lba = choices.pick(LBAS) if choices.chance(80) else choices.number(48)
            count = choices.pick(COUNTS) if choices.chance(90) else choices.number(16)
        unit = 0x10 if choices.chance(30) else 0
        self.write(base + DEVICE, 1, unit | (0xE0 if choices.chance(85) else choices.below(256) & 0xEF))
        if choices.chance(30):  # 48 bits: each register takes two
            for register, byte in (
                (COUNT, count >> 8),
                (LBA_LOW, lba >> 24),
                (LBA_MID, lba >> 32),
                (LBA_HIGH, lba >> 40),
            ):
                self.write(base + register, 1, byte & 0xFF)
        elif choices.chance(50):
            self.write(base + DEVICE, 1, 0xE0 | unit | lba >> 24 & 0xF)
        for register, byte in ((COUNT, count), (LBA_LOW, lba), (LBA_MID, lba >> 8), (LBA_HIGH, lba >> 16)):
            self.write(base + register, 1, byte & 0xFF)

    def ata_command(self) -> None:
        base = self.channel()
        choices = self.choices
        if choices.chance(90):
            self.address_registers(base)
        if choices.chance(20):
            self.write(base + ERROR, 1, choices.pick(FEATURES))
        kinds: tuple[Sequence[int], ...] = (NON_DATA, NON_DATA, NON_DATA, PIO_IN, PIO_OUT, PIO_OUT, range(256))
        opcode = choices.pick(choices.pick(kinds))
        self.write(base + COMMAND, 1, opcode)
        if choices.chance(70):
            self.transfer(base, opcode in PIO_OUT)

    def transfer(self, base: int, out: bool) -> None:
        """As a driver does it: as long as there is DRQ, a sector; with a mistake now and then."""
        for _ in range(self.choices.pick((1, 2, 8, 20))):
            status = self.read(base + COMMAND)
            if status & BSY and self.choices.chance(70):
                self.host_io()
                status = self.read(base + COMMAND)
            if not status & DRQ and self.choices.chance(95):
                return
            size = self.choices.pick((2, 2, 2, 4))
            count = 512 // size if self.choices.chance(95) else self.choices.below(600)
            if out:
                for n in range(count):
                    self.write(base, size, n * 0x01010101 & (1 << 8 * size) - 1)
            else:
                for _n in range(count):
                    self.read(base, size)

    def data_burst(self) -> None:
        base, size = self.channel(), self.choices.pick((1, 2, 2, 4))
        write = self.choices.chance(50)
        for _ in range(self.choices.below(self.choices.pick((10, 30, 600)))):
            if write:
                self.write(base, size, 0xA5A5A5A5 & (1 << 8 * size) - 1)
            else:
                self.read(base, size)

    def any_register(self) -> None:
        base = self.channel()
        for _ in range(self.choices.below(8) + 1):
            port = base + self.choices.below(8) if self.choices.chance(85) else CONTROL[base]
            size = 1 if self.choices.chance(80) else self.choices.pick((2, 4))
            if self.choices.chance(50):
                self.read(port, size)
            elif port == CONTROL[base]:
                self.write(port, size, self.choices.pick((0, 2, 4, 6, 0x80, 0x84, 0x08)))
            else:
                self.write(port, size, self.choices.number(8 * size))

    # -- ATAPI ---------------------------------------------------------------------------------------------------------

    def packet_command(self) -> None:
        choices = self.choices
        unit = choices.below(2)
        dma = choices.chance(40)
        self.write(SECONDARY + DEVICE, 1, 0xA0 | unit << 4)
        self.write(SECONDARY + ERROR, 1, dma if choices.chance(90) else choices.below(256))
        limit = choices.pick((0xFFFE, 0xFFFF, 0x800, 0x80, 2, 1, 0, 0x7FF))
        self.write(SECONDARY + LBA_MID, 1, limit & 0xFF)
        self.write(SECONDARY + LBA_HIGH, 1, limit >> 8)
        if dma:
            self.bus_master_program(SECONDARY)
        self.write(SECONDARY + COMMAND, 1, PACKET)
        packet = bytearray(choices.blob(12))
        if choices.chance(90):
            packet[0] = choices.pick(PACKETS)
        if choices.chance(70):  # a place on the disc
            packet[2:6] = (choices.pick((0, 16, 699, 700, 1 << 31))).to_bytes(4, "big")
            packet[6:9] = bytes((0, 0, choices.pick(COUNTS)))
        for at in range(0, 12, 2):
            self.write(SECONDARY, 2, packet[at] | packet[at + 1] << 8)
        if choices.chance(80):
            self.packet_transfer(packet[0] in (0x15, 0x55))

    def packet_transfer(self, out: bool) -> None:
        for _ in range(self.choices.below(5) + 1):
            if not self.read(SECONDARY + COMMAND) & DRQ:
                return
            count = self.read(SECONDARY + LBA_MID) | self.read(SECONDARY + LBA_HIGH) << 8
            for _n in range(min((count + 1) // 2, 1100)):
                if out:
                    self.write(SECONDARY, 2, 0x0106)
                else:
                    self.read(SECONDARY, 2)

    # -- the bus master ------------------------------------------------------------------------------------------------

    def prd_table(self) -> int:
        """A table in RAM of entries that are mostly wrong somewhere; its address."""
        choices = self.choices
        at = self.address() & 0xFFFF_FFFC
        if choices.chance(40):
            at = choices.below(0x100) * 0x1000
        kind = choices.below(10)
        entries = []
        if kind < 4:  # as it should be
            buffer = choices.below(MEMORY_BYTES - 0x2_0000) & 0xFFFF_FFFE
            entries.append((buffer, choices.pick((512, 4096, 0x8000, 0)) | TABLE_END))
        elif kind < 5:  # over itself
            entries = [(at & 0xFFFF_FFF0, choices.pick(BYTE_COUNTS))] * (choices.below(8) + 1)
        elif kind < 6:  # very many, without an end
            entries = [(choices.below(MEMORY_BYTES) & 0xFFFF_FFFE, choices.pick((2, 2, 4, 6, 512)))] * 3000
        elif kind < 9:
            for _ in range(choices.below(12)):
                entries.append(
                    (self.address(), choices.pick(BYTE_COUNTS) | choices.below(2) * choices.number(15) << 16)
                )
            if entries and choices.chance(70):
                entries[-1] = entries[-1][0], entries[-1][1] | TABLE_END
        self.memory(at, b"".join(a.to_bytes(4, "little") + c.to_bytes(4, "little") for a, c in entries))
        return at

    def bus_master_program(self, base: int) -> None:
        """Table, direction and status, as a driver sets them before the command; the start bit at times."""
        ports = BUS_MASTER_BASE + (8 if base == SECONDARY else 0)
        self.write(ports + 4, 4, self.prd_table())
        self.write(ports + 2, 1, 0x66)
        self.write(ports, 1, self.choices.pick((0, 8)) | self.choices.below(2))

    def dma_command(self) -> None:
        base = self.channel()
        choices = self.choices
        ports = BUS_MASTER_BASE + (8 if base == SECONDARY else 0)
        self.address_registers(base)
        self.bus_master_program(base)
        opcode = choices.pick(DMA)
        if opcode == DATA_SET_MANAGEMENT:
            self.trim(base, ports)
        self.write(base + COMMAND, 1, opcode)
        if choices.chance(90):
            self.write(ports, 1, choices.pick((1, 9)))
        if choices.chance(40):
            self.host_io()
        if choices.chance(30):
            self.any_register()
        self.read(ports + 2)
        self.read(base + COMMAND)
        if choices.chance(80):
            self.write(ports, 1, 0)

    def trim(self, base: int, ports: int) -> None:
        """The rest of a DATA SET MANAGEMENT, with ranges where the table says, most of them on the disk."""
        choices = self.choices
        at = choices.below(MEMORY_BYTES - 0x2000) & ~7
        ranges = b""
        for _ in range(64):
            lba = choices.below(DISK_SECTORS) if choices.chance(99) else choices.number(48)
            ranges += lba.to_bytes(6, "little") + choices.pick((0, 0, 0, 1, 8)).to_bytes(2, "little")
        self.memory(at + 64, ranges)
        self.memory(at, (at + 64).to_bytes(4, "little") + (512 | TABLE_END).to_bytes(4, "little"))
        self.write(ports + 4, 4, at)
        self.write(base + COUNT, 1, 0)
        self.write(base + COUNT, 1, 1)
        self.write(base + ERROR, 1, 1)

    def bus_master_register(self) -> None:
        for _ in range(self.choices.below(6) + 1):
            port = BUS_MASTER_BASE + self.choices.below(17)
            size = self.choices.pick((1, 2, 4))
            if self.choices.chance(50):
                self.read(port, size)
            else:
                self.write(port, size, self.choices.number(8 * size))

    # -- PCI and fw_cfg ------------------------------------------------------------------------------------------------

    def pci_config(self) -> None:
        choices = self.choices
        for _ in range(choices.below(6) + 1):
            what = choices.below(10)
            where = 1 << 31 | choices.below(2) << 11 | choices.below(4) << 8 | choices.below(256)
            if what == 0:
                where = choices.number(32)
            self.write(0xCF8, 4, where)
            size = choices.pick((1, 2, 4))
            port = 0xCFC + choices.below(4) if choices.chance(90) else 0xCF8 + choices.below(8)
            if port == 0xCF9 and size == 1 and choices.chance(90):
                continue  # the reset register: seldom is enough
            if choices.chance(60):
                self.write(port, size, choices.pick((0, 1, 5, 7, 0xFFFFFFFF, choices.number(32))) & (1 << 8 * size) - 1)
            else:
                self.read(port, size)
        if choices.chance(60):
            self.board.place_bus_master()
            self.accesses += 6

    def fw_cfg(self) -> None:
        choices = self.choices
        writable = self.board.writable_key
        key = choices.pick((0, 1, 3, 5, 0x11, 0x19, 0x20, 0x21, writable, 0x8002, 0xC001, choices.number(16)))
        self.write(0x510, 2, key)
        for _ in range(choices.below(40)):
            self.read(0x511 if choices.chance(95) else 0x510, choices.pick((1, 1, 1, 2, 4)))
        if choices.chance(20):
            self.write(0x511, 1, choices.below(256))
        if choices.chance(20):
            self.read(0x514 + choices.below(8), choices.pick((1, 2, 4)))

    def fw_cfg_dma(self) -> None:
        choices = self.choices
        key = self.board.writable_key if choices.chance(30) else choices.below(0x40)
        control = key << 16 | choices.below(32)
        length = choices.pick((0, 300, 1, 4, 64, 4096, 0x1_0000, MEMORY_BYTES, MEMORY_BYTES + 1, 0xFFFF_FFFF))
        access = control.to_bytes(4, "big") + length.to_bytes(4, "big") + self.address().to_bytes(8, "big")
        if choices.chance(5):
            access = choices.blob(16)
        at = self.address()
        self.memory(at, access)
        self.write(0x514, 4, 0 if choices.chance(95) else choices.number(32))
        self.write(0x518, 4, int.from_bytes(at.to_bytes(4, "big"), "little"))

    # -- the rest ------------------------------------------------------------------------------------------------------

    def any_port(self) -> None:
        for _ in range(self.choices.below(6) + 1):
            port, size = self.choices.number(16), self.choices.pick((1, 2, 4))
            if self.choices.chance(30):
                port = self.choices.pick((0x20, 0x40, 0x60, 0x64, 0x70, 0x80, 0x92, 0xB2, 0x3F8, 0x4D0, 0x600, 0xCF8))
                port += self.choices.below(4)
            if port + size > 1 << 16:
                continue
            if self.choices.chance(60):
                self.read(port, size)
            else:
                self.write(port, size, self.choices.number(8 * size))

    def flood(self) -> None:
        """One register, one value, again and again, nothing read: whoever keeps what is sent has to have a bound."""
        choices = self.choices
        region = choices.pick(self.board.pio.regions)
        port = region.base + choices.below(region.size)
        value = choices.below(256)
        if port in RESETS and choices.chance(95):
            value = RESETS[port]
        self.log.append(("flood", port, 1, value))
        self.accesses += FLOOD
        flood(self.board.pio, port, 1, value, FLOOD)

    def memory_bus(self) -> None:
        """As the processor sees it: the window below 1 MiB, the ROM, the interrupt controllers, nobody."""
        for _ in range(self.choices.below(4) + 1):
            gpa, size = self.address(), self.choices.pick((1, 2, 4, 8, 64))
            if self.choices.chance(40):
                gpa = 0xA_0000 + self.choices.below(0x6_0000)
            self.accesses += 1
            self.log.append(("mmio", gpa, size, 0))
            if self.choices.chance(50):
                self.board.memory_map.read(gpa, size)
            else:
                self.board.memory_map.write(gpa, self.choices.blob(size))

    def host_io(self) -> None:
        """The host is done with a request that it has had in hand, or has failed to do it."""
        backend = self.choices.pick(sorted(self.board.backends))
        error = self.choices.pick((errno.EIO, errno.ENOSPC)) if self.choices.chance(10) else 0
        for _ in range(self.choices.below(3) + 1):
            self.board.backends[backend].release(error)

    def time(self) -> None:
        self.board.machine.clock.step(self.choices.pick((1, 1000, 1_000_000, 50_000_000)))  # type: ignore[attr-defined]

    def rare(self) -> None:
        what = self.choices.below(8)
        if what == 0:
            self.board.machine.reset()
            self.board.place_bus_master()
        elif what == 1:
            self.save_and_load()
        elif what == 2:
            self.board.drain()
        elif what < 6:
            disc = self.choices.pick((None, None, self.board.disc, self.board.backends["cd"]))
            self.board.change_disc(self.choices.below(2), disc, force=self.choices.chance(30))
        else:
            self.memory(self.choices.below(MEMORY_BYTES), self.choices.blob(4 * KIB))

    def save_and_load(self) -> None:
        """The devices go on from what they have saved."""
        self.board.drain()
        devices = self.board.machine.devices
        saved = {name: device.save() for name, device in devices.items()}
        for name, device in devices.items():
            device.load(saved[name])
        for device in devices.values():
            device.after_load()
