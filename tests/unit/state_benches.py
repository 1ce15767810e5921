"""Each device with nothing around it but a clock, a bus and a log: what the state tests save, load and drive on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from pyvmm.address_space import AddressSpace
from pyvmm.chardev import CallableChardev
from pyvmm.clock import VirtualClock
from pyvmm.device import Device
from pyvmm.devices.acpi_gpe import GpeBlock
from pyvmm.devices.acpi_pm import AcpiPm
from pyvmm.devices.debugcon import DebugCon
from pyvmm.devices.fw_cfg import FwCfg
from pyvmm.devices.i8042 import I8042
from pyvmm.devices.i8254 import I8254
from pyvmm.devices.port80 import Port80
from pyvmm.devices.port92 import Port92
from pyvmm.devices.reset_control import ResetControl
from pyvmm.devices.rtc import Rtc
from pyvmm.devices.serial import Serial
from pyvmm.devices.testdev import TestDev
from pyvmm.devices.user_irqchip import UserIrqchip
from pyvmm.devices.vga_text import VgaText
from pyvmm.guest_memory import GuestMemory
from pyvmm.irq import IrqLine
from pyvmm.state import load_all, save_all

RAM_BYTES = 0x10000
SECOND = 1_000_000_000
GATHER_NS = 10_000_000
Step = tuple[Any, ...]


class Bench:
    """``holders`` is what has state. ``log`` has what came out: (guest time, what, value)."""

    ports: Sequence[int] = ()
    sizes: Sequence[int] = (1,)
    longest_ns = 3 * SECOND

    def __init__(self) -> None:
        self.clock = VirtualClock(wall_ns=1_700_000_000 * SECOND)
        self.pio = AddressSpace("pio", 0x10000)
        self.mmio = AddressSpace("mmio", 1 << 52)
        self.log: list[tuple[int, str, object]] = []
        self.lines: dict[str, IrqLine] = {}
        self.holders: list[tuple[str, Any]] = [("clock", self.clock)]
        self.make()

    def make(self) -> None:
        raise NotImplementedError

    def add(self, name: str, device: Device) -> None:
        self.holders.append((name, device))

    def line(self, name: str = "irq") -> IrqLine:
        self.lines[name] = IrqLine(self.hears(name))
        return self.lines[name]

    def hears(self, name: str) -> Callable[..., None]:
        return lambda *values: self.log.append((self.clock.now_ns(), name, values))

    @classmethod
    def steps(cls, seed: int, count: int) -> list[Step]:
        """What happens to it: as many steps that make some sense."""
        r = Random(seed)
        return [cls.step(r) for _ in range(count)]

    @classmethod
    def step(cls, r: Random) -> Step:
        what = r.randrange(4)
        if what == 0:
            return "in", r.choice(cls.ports), r.choice(cls.sizes)
        if what == 1:
            return "out", r.choice(cls.ports), r.choice(cls.sizes), r.getrandbits(r.choice((2, 8, 32)))
        if what == 2:
            return "wait", r.randrange(r.choice((2, 100, 100_000, cls.longest_ns)))
        return cls.own_step(r)

    @classmethod
    def own_step(cls, r: Random) -> Step:
        """One that is more than an access."""
        return "in", r.choice(cls.ports), r.choice(cls.sizes)

    def do(self, step: Step) -> object:
        what, *args = step
        if what == "in":
            return self.space(args[0]).read(args[0], args[1])
        if what == "out":
            self.space(args[0]).write(args[0], args[1], args[2] & (1 << 8 * args[1]) - 1)
            return None
        if what == "wait":
            self.clock.step(args[0])
            return None
        return getattr(self, what)(*args)

    def space(self, address: int) -> AddressSpace:
        return self.pio if address < 0x10000 else self.mmio

    def levels(self) -> dict[str, int]:
        """What the lines show."""
        return {name: line.level for name, line in self.lines.items()}

    def save(self) -> dict[str, Any]:
        return save_all(self.holders)

    def load(self, state: dict[str, Any]) -> None:
        load_all(self.holders, state)


class SerialBench(Bench):
    ports = range(0x3F8, 0x400)
    longest_ns = 50_000_000
    gather_ns = 0

    def make(self) -> None:
        self.chardev = CallableChardev(self.hears("sent"))
        self.uart = Serial(self.line(), self.chardev, self.clock, gather_ns=self.gather_ns)
        self.pio.add(0x3F8, self.uart.region)
        self.add("serial", self.uart)
        self.holders.append(("console", self.chardev))

    @classmethod
    def own_step(cls, r: Random) -> Step:
        if r.randrange(2):
            return "say", bytes(r.choices(b"abc\n", k=r.randrange(40)))
        return "hear", r.randbytes(r.randrange(20))

    def say(self, text: bytes) -> None:
        for byte in text:
            self.pio.write(0x3F8, 1, byte)
            self.clock.step(10_000)

    def hear(self, data: bytes) -> None:
        self.chardev.feed(data)


class GatheringSerialBench(SerialBench):
    gather_ns = GATHER_NS


class RtcBench(Bench):
    ports = (0x70, 0x71)

    def make(self) -> None:
        self.rtc = Rtc(self.line(), self.clock, on_alarm=self.hears("alarm"))
        self.pio.map(0x70, 2, self.rtc)
        self.add("rtc", self.rtc)

    @classmethod
    def own_step(cls, r: Random) -> Step:
        index = r.randrange(r.choice((6, 14, 128)))
        what = r.randrange(3)
        if what == 0:
            return "put", index, r.choice((0, 0x02, 0x10, 0x26, 0x2F, 0x42, 0x72, 0xC0, 0xFF))
        if what == 1:
            return ("put", *r.choice(((10, 0x26), (10, 0x2F), (11, 0x72), (11, 0x12), (11, 0x22), (1, 0xC0))))
        return "get", r.choice((index, 0, 12))

    def put(self, index: int, value: int) -> None:
        self.pio.write(0x70, 1, index)
        self.pio.write(0x71, 1, value)

    def get(self, index: int) -> int:
        self.pio.write(0x70, 1, index)
        return self.pio.read(0x71, 1)


class PitBench(Bench):
    ports = (0x40, 0x41, 0x42, 0x43, 0x61)
    longest_ns = 100_000_000

    def make(self) -> None:
        self.pit = I8254(self.clock, self.line())
        self.pio.map(0x40, 4, self.pit)
        self.pio.map(0x61, 1, self.pit.speaker)
        self.add("pit", self.pit)

    @classmethod
    def own_step(cls, r: Random) -> Step:
        count = r.randrange(r.choice((30, 300, 0x10000)))
        return "program", r.choice((0, 0, 1, 2)), r.randrange(8), count, r.randrange(2)

    def program(self, counter: int, mode: int, count: int, bcd: int) -> None:
        self.pio.write(0x43, 1, counter << 6 | 0x30 | mode << 1 | bcd)
        self.pio.write(0x40 + counter, 1, count & 0xFF)
        self.pio.write(0x40 + counter, 1, count >> 8)


class IrqchipBench(Bench):
    """All controllers of irqchip="off", wired up."""

    ports = (
        *(0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0xFEC0_0000, 0xFEC0_0010),
        *(0xFEE0_0000 + n for n in (0x20, 0x80, 0xB0, 0xD0, 0xE0, 0xF0, 0x280, 0x300, 0x310, 0x320, 0x350, 0x360)),
        *(0xFEE0_0000 + n for n in (0x370, 0x380, 0x390, 0x3E0, 0x100, 0x110, 0x200, 0x210)),
    )
    sizes = (1, 4)
    longest_ns = 10_000_000

    def make(self) -> None:
        self.chip = UserIrqchip(self.clock, self.hears("intr"))
        for port, device in ((0x20, self.chip.pic.master), (0xA0, self.chip.pic.slave), (0x4D0, self.chip.pic.elcr)):
            self.pio.map(port, 2, device)
        self.mmio.map(0xFEC0_0000, 0x1000, self.chip.ioapic)
        self.mmio.map(0xFEE0_0000, 0x1000, self.chip.lapic)
        for name, device in (("pic", self.chip.pic), ("ioapic", self.chip.ioapic), ("lapic", self.chip.lapic)):
            self.add(name, device)

    @classmethod
    def own_step(cls, r: Random) -> Step:
        what = r.randrange(6)
        if what == 0:
            return "initialise", r.getrandbits(8) & r.getrandbits(8)
        if what == 1:
            entry = r.choice((0x31, 0x8031, 0x1_0031, 0x700, 0x8041, 0x2_0041, 0x131))
            return "route", r.randrange(24), entry
        if what == 2:
            count = r.randrange(r.choice((100, 100_000, 3_000_000)))
            return "count", r.choice((0x30, 0x2_0030, 0x1_0030)), count, r.choice((0, 3, 0xB))
        return ("take",) if what == 3 else ("drive", r.randrange(24), r.randrange(2))

    def drive(self, pin: int, level: int) -> None:
        self.chip.set(pin, level)

    def take(self) -> int:
        return self.chip.acknowledge() if self.chip.output else -2

    def initialise(self, mask: int) -> None:
        self.mmio.write(0xFEE0_00F0, 4, 0x1FF)
        for port, values in ((0x20, (0x11,)), (0x21, (0x20, 4, 1, mask)), (0xA0, (0x11,)), (0xA1, (0x28, 2, 1, 0))):
            for value in values:
                self.pio.write(port, 1, value)

    def route(self, pin: int, entry: int) -> None:
        for n, word in enumerate((entry, 0)):
            self.mmio.write(0xFEC0_0000, 4, 0x10 + 2 * pin + n)
            self.mmio.write(0xFEC0_0010, 4, word)

    def count(self, timer: int, count: int, divide: int) -> None:
        self.mmio.write(0xFEE0_00F0, 4, 0x1FF)
        self.mmio.write(0xFEE0_03E0, 4, divide)
        self.mmio.write(0xFEE0_0320, 4, timer)
        self.mmio.write(0xFEE0_0380, 4, count)


class KeyboardBench(Bench):
    ports = (0x60, 0x64)

    def make(self) -> None:
        self.i8042 = I8042(self.line("kbd"), self.hears("reset"), aux_irq=self.line("aux"), on_a20=self.hears("a20"))
        self.pio.map(0x60, 1, self.i8042)
        self.pio.map(0x64, 1, self.i8042.command)
        self.add("i8042", self.i8042)


class AcpiBench(Bench):
    ports = (*range(0x600, 0x60C), *range(0xAFE0, 0xAFE4))
    sizes = (1, 2, 4)
    longest_ns = 2000 * SECOND

    def make(self) -> None:
        self.pm = AcpiPm(
            *(self.clock, self.line("sci"), self.hears("off")),
            s5_type=5,
            s3_type=1,
            on_suspend=self.hears("suspend"),
            on_wake=self.hears("wake"),
        )
        self.pio.map(0x600, 12, self.pm)
        self.gpe = GpeBlock(self.pm.general_event)
        self.pio.map(0xAFE0, 4, self.gpe)
        self.add("acpi_pm", self.pm)
        self.add("gpe0", self.gpe)

    @classmethod
    def own_step(cls, r: Random) -> Step:
        return r.choice(
            (
                ("event", r.choice(("press", "rtc_alarm"))),
                ("general_event", r.randrange(16)),
                ("out", 0x604, 2, 0x2400),
                ("out", 0x602, 2, r.choice((1, 0x501, r.getrandbits(16)))),
            )
        )

    def event(self, name: str) -> None:
        getattr(self.pm, name)()

    def general_event(self, number: int) -> None:
        self.gpe.happen(number)


class FwCfgBench(Bench):
    ports = (0x510, 0x511, 0x514, 0x518)
    sizes = (1, 2, 4, 8)

    def make(self) -> None:
        self.memory = GuestMemory(RAM_BYTES)
        self.made = 0
        self.fw = FwCfg(self.memory)
        self.fw.add_file("fixed", b"0123456789")
        self.fw.add_file("writable", b"abcdefghij", writable=True, on_write=self.hears("written"))
        self.fw.add_file("made", self.make_item)
        self.pio.map(0x510, 2, self.fw)
        self.pio.map(0x514, 8, self.fw.dma)
        self.add("fw_cfg", self.fw)

    def make_item(self) -> bytes:
        self.made += 1
        return b"made once, kept"

    @classmethod
    def own_step(cls, r: Random) -> Step:
        key = r.choice((0, 1, 0x19, 0x20, 0x21, 0x22, 0x23))
        if r.randrange(2):
            return "select", key
        return "dma", key, r.randrange(0x20), r.randrange(20), r.randrange(RAM_BYTES + 9)

    def select(self, key: int) -> None:
        self.pio.write(0x510, 2, key)

    def dma(self, key: int, control: int, length: int, target: int) -> bytes:
        access = (key << 16 | control).to_bytes(4, "big") + length.to_bytes(4, "big") + target.to_bytes(8, "big")
        self.memory.write(0x100, access)
        self.pio.write(0x514, 8, int.from_bytes((0x100).to_bytes(8, "big"), "little"))
        return self.memory.read(0x100, 4)


class VgaBench(Bench):
    ports = (*range(0x3C0, 0x3E0), *range(0x3B0, 0x3BC))

    def make(self) -> None:
        self.vga = VgaText(lambda: bytes(0x8000), self.clock)
        self.pio.map(0x3C0, 32, self.vga)
        self.pio.map(0x3B0, 12, self.vga, read=self.vga.read_mono, write=self.vga.write_mono)
        self.add("vga", self.vga)


class SmallDevicesBench(Bench):
    """Those of a register or two."""

    ports = (0x80, 0x92, 0x402, 0xCF9, *range(0xE0, 0xEC), *range(0x2000, 0x2018))
    sizes = (1, 2, 4)

    def make(self) -> None:
        said = CallableChardev(self.hears("said"))
        parts = (
            ("port80", 0x80, 1, Port80()),
            ("port92", 0x92, 1, Port92(self.hears("reset"), self.hears("a20"))),
            ("debugcon", 0x402, 1, DebugCon(said)),
            ("reset_control", 0xCF9, 1, ResetControl(self.hears("reset"))),
        )
        for name, port, size, device in parts:
            self.pio.map(port, size, device)
            self.add(name, device)
        lines = [self.line(f"gsi {n}") for n in range(24)]
        testdev = TestDev(lambda gpa: None, lines)
        self.pio.map(0xE0, 4, testdev)
        self.pio.map(0xE8, 4, testdev.latch_bytes)
        self.pio.map(0x2000, 24, testdev.irqs)
        self.add("testdev", testdev)


BENCHES: tuple[type[Bench], ...] = (
    *(SerialBench, GatheringSerialBench, RtcBench, PitBench, IrqchipBench, KeyboardBench, AcpiBench, FwCfgBench),
    *(VgaBench, SmallDevicesBench),
)
