"""Arguments of the wrong kind, or that would be silently wrong: one sentence, a ConfigError or a StateError."""

from __future__ import annotations

import enum
import math
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guests import MMIO, PASSED, PORT, Guest, Recorder

import pyvmm
from pyvmm import ConfigError, MachineConfig, StateError
from pyvmm.chardev import NullChardev

HLT = b"\xf4"


class Counter(pyvmm.Device):
    pass


def sentence(call: Callable[[], object], kind: type[BaseException] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# -- Machine's options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"kernel": 5}, "kernel=5: give a path, or the bytes"),
        ({"kernel": ""}, "give the path of a file"),
        ({"kernel": "a\0b"}, "give the path of a file"),
        ({"kernel": Path}, "give a path"),
        ({"kernel": ["vmlinuz"]}, "give a path"),
        ({"kernel": b""}, "is empty"),
        ({"kernel": memoryview(bytes(16))[::2]}, "give a path, or the bytes"),
        ({"kernel": "/dev/null"}, "device or a pipe"),
        ({"kernel": HLT, "initrd": 5}, "initrd=5"),
        ({"kernel": HLT, "append": 5}, "append=5: give a string"),
        ({"kernel": HLT, "append": b"quiet"}, "give a string"),
        ({"kernel": HLT, "append": None}, "give a string"),
        ({"kernel": HLT, "append": "a\0b"}, "give a string"),
        ({"kernel": HLT, "modules": ["a"]}, "'a' is no module: give (image, command line)"),
        ({"kernel": HLT, "modules": "ab"}, "give a list"),
        ({"kernel": HLT, "modules": 5}, "give a list"),
        ({"kernel": HLT, "modules": None}, "give a list"),
        ({"kernel": HLT, "modules": [("a", 5)]}, "is no module"),
        ({"kernel": HLT, "modules": [(5, "a")]}, "module=5"),
        ({"flat": 5}, "flat=5"),
        ({"flat": HLT, "flat_address": "0x7c00"}, "flat_address='0x7c00': give an address"),
        ({"flat": HLT, "flat_address": -1}, "flat_address=-1"),
        ({"flat": HLT, "flat_address": 1.5}, "flat_address=1.5"),
        ({"flat": HLT, "flat_address": True}, "flat_address=True"),
        ({"flat": HLT, "flat_address": 1 << 70}, "0x4"),
        ({"flat": HLT, "flat_mode": 16}, "flat_mode=16"),
        ({"flat": HLT, "flat_mode": []}, "flat_mode=[]"),
        ({"firmware": 5}, "firmware=5"),
        ({"drives": 5}, "drives=5: give a list"),
        ({"drives": "a.img"}, "give a list"),
        ({"drives": b"a.img"}, "give a list"),
        ({"drives": [5]}, "5 is no drive"),
        ({"drives": [None]}, "None is no drive"),
        ({"drives": None}, "give a list"),
        ({"flat": HLT, "boot": 5}, "boot"),
        ({"flat": HLT, "cpu": 5}, "cpu=5: give a string"),
        ({"flat": HLT, "cpu": None}, "cpu=None"),
        ({"flat": HLT, "irqchip": []}, "irqchip=[]"),
        ({"flat": HLT, "irqchip": None}, "irqchip=None"),
        ({"flat": HLT, "machine": 5}, "machine=5"),
        ({"flat": HLT, "accel": None}, "accel=None"),
        ({"flat": HLT, "serial": 5}, "serial=5: use none, stdio"),
        ({"flat": HLT, "serial": b"stdio"}, "serial=b'stdio'"),
        ({"flat": HLT, "serial": Path("log")}, "serial=PosixPath('log')"),
        ({"flat": HLT, "serial": NullChardev}, "is a class: give an instance"),
        ({"flat": HLT, "serial": list}, "is a class"),
        ({"flat": HLT, "serial": "file:"}, "file:PATH"),
        ({"flat": HLT, "serial": "tcp:1"}, "file:PATH"),
        ({"flat": HLT, "debugcon": 5}, "debugcon=5"),
        ({"flat": HLT, "debugcon": True}, "debugcon=True"),
        ({"flat": HLT, "no_reboot": "no"}, "no_reboot='no': give True or False"),
        ({"flat": HLT, "testdev": None}, "testdev=None"),
        ({"flat": HLT, "shared_memory": 2}, "shared_memory=2"),
        ({"flat": HLT, "huge_pages": 5}, "huge_pages=5"),
        ({"flat": HLT, "huge_pages": []}, "huge_pages=[]"),
        ({"flat": HLT, "fw_cfg": {"opt/x": 5}}, "fw_cfg 'opt/x': 5 are no bytes"),
        ({"flat": HLT, "fw_cfg": {"opt/x": True}}, "are no bytes"),
        ({"flat": HLT, "fw_cfg": {"opt/x": "text"}}, "is text: give bytes"),
        ({"flat": HLT, "fw_cfg": {"opt/x": [1, 2]}}, "are no bytes"),
        ({"flat": HLT, "fw_cfg": {"opt/x": None}}, "are no bytes"),
        ({"flat": HLT, "fw_cfg": {5: b"x"}}, "5 is no name"),
        ({"flat": HLT, "fw_cfg": {"": b"x"}}, "1 to 55"),
        ({"flat": HLT, "fw_cfg": [("opt/x", b"")]}, "give {name: bytes}"),
        ({"flat": HLT, "fw_cfg": None}, "give {name: bytes}"),
        ({"flat": HLT, "memory_mib": 1 << 70}, "more than a guest can address"),
        ({"flat": HLT, "memory_mib": math.nan}, "memory_mib=nan"),
        ({}, "nothing to run: give kernel, flat, drives or firmware"),
        ({"memory_mib": 16, "serial": "none"}, "nothing to run"),
    ],
    # Without addresses: a test has the same name in every process.
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", repr(value))[:50] if isinstance(value, dict) else "",
)
def test_a_machine_is_not_made(options: dict[str, Any], wanted: str) -> None:
    options = {"memory_mib": 4, **options}
    assert wanted in sentence(lambda: pyvmm.Machine(**options))


def test_what_is_meant_as_config() -> None:
    config = MachineConfig(flat=HLT, memory_mib=4)
    assert "memory_mib" in sentence(lambda: pyvmm.Machine(config, memory_mib=16))
    wrong: list[Any] = ["kernel", b"", 5, {"flat": HLT}, MachineConfig, Path("vmlinuz")]
    for value in wrong:
        assert "MachineConfig" in sentence(lambda value=value: pyvmm.Machine(value))
    config.memory_mib = "16"  # type: ignore[assignment]  # assigned afterwards: the mistake
    assert "memory_mib='16'" in sentence(lambda: pyvmm.Machine(config))
    config.memory_mib = 4
    with pyvmm.Machine(config) as machine:
        assert machine.memory.size_bytes == 4 << 20


def test_what_is_of_the_right_kind(tmp_path: Path) -> None:
    """Subclasses of it, and everything that has the buffer protocol."""

    class Number(enum.IntEnum):
        MIB = 4

    class Text(str):
        pass

    class Here:
        def __fspath__(self) -> str:
            return str(tmp_path / "flat")

    guest = b"\xb0\x03\xe6\xf4\xf4"  # mov $3, %al; out %al, $0xf4
    (tmp_path / "flat").write_bytes(guest)
    for flat in (guest, bytearray(guest), memoryview(guest), tmp_path / "flat", str(tmp_path / "flat"), Here()):
        with pyvmm.Machine(
            flat=flat, memory_mib=Number.MIB, cpu=Text("host"), fw_cfg={Text("opt/x"): memoryview(b"y")}, no_reboot=1
        ) as machine:
            assert machine.run(60) == 7


# -- its methods -----------------------------------------------------------------------------------------------


def test_times_to_wait(boot: Callable[..., Guest]) -> None:
    machine = boot("1: jmp 1b").machine
    wrong: list[Any] = [math.nan, -1, -0.001, -math.inf, "5", True, [], 1j]
    for value in wrong:
        for call in (machine.run, machine.wait):
            assert "timeout_s=" in sentence(lambda call=call, value=value: call(value))
    assert machine.state.value == "prelaunch"
    for value in (0, 0.0, 0.01):
        with pytest.raises(TimeoutError):
            machine.run(value)
    assert machine.state.value == "paused"


@pytest.mark.parametrize("limit", [math.inf, 1e12, 1 << 80])
def test_times_without_an_end(boot: Callable[..., Guest], limit: float) -> None:
    guest = boot("finish")
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(guest.machine.run(limit)))
    thread.start()
    thread.join(60)
    assert ended == [PASSED]
    assert guest.machine.wait(limit)


def test_interrupt_lines(boot: Callable[..., Guest]) -> None:
    machine = boot("finish").machine
    wrong: list[Any] = ["5", 1.5, 99, -1, 24, True, None]
    for value in wrong:
        assert "0 to 23" in sentence(lambda value=value: machine.irq_line(value))
    for irq in range(24):
        line = machine.irq_line(irq)
        line.set(5)
        assert line.level == 1
        line.lower()


def test_timers(boot: Callable[..., Guest]) -> None:
    clock = boot("finish").machine.clock
    wrong: list[Any] = [None, 5, "tick"]
    for value in wrong:
        assert "give a function" in sentence(lambda value=value: clock.timer(value))
    timer = clock.timer(print)
    wrong = [None, "5", 1.5, math.nan]
    for value in wrong:
        assert "whole nanoseconds" in sentence(lambda value=value: timer.arm(value))
    assert not timer.armed
    timer.arm(1 << 70)
    assert timer.armed


def test_nmis(boot: Callable[..., Guest]) -> None:
    machine = boot("finish").machine
    wrong: list[Any] = [3, 1, -1, "0", None, True, 0.0]
    for value in wrong:
        assert "there are 1" in sentence(lambda value=value: machine.nmi(value))


def test_stops(boot: Callable[..., Guest]) -> None:
    machine = boot("finish").machine
    wrong: list[tuple[Any, ...]] = [("5",), (1.5,), (None,), (0, 5), (True,)]
    for arguments in wrong:
        assert "give a whole number" in sentence(lambda arguments=arguments: machine.stop(*arguments))
    assert machine.state.value == "prelaunch"


@pytest.mark.parametrize("verb", ["run", "resume", "pause", "reset", "powerdown", "nmi", "irq_line", "coalesce"])
def test_after_close(boot: Callable[..., Guest], verb: str) -> None:
    machine = boot("finish").machine
    machine.run(60)
    machine.close()
    arguments = {"irq_line": (5,), "coalesce": (machine.pio, PORT, 1)}.get(verb, ())
    text = sentence(lambda: getattr(machine, verb)(*arguments), StateError)
    assert "closed" in text
    assert "reset() it first" not in text
    assert machine.wait()
    assert (machine.status, machine.error, machine.state.value) == (PASSED, None, "closed")


# -- regions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "wanted"),
    [
        ((PORT, 2, Counter), {}, "Counter is a class and no device: give an instance, Counter()"),
        ((PORT, 2, None), {}, "no device"),
        ((PORT, Counter(), 2), {}, "no device"),
        ((PORT, "2", Counter()), {}, "'2' bytes"),
        ((PORT, 1.5, Counter()), {}, "1.5 bytes"),
        ((PORT, 0, Counter()), {}, "0 bytes"),
        ((PORT, -2, Counter()), {}, "-2 bytes"),
        ((str(PORT), 2, Counter()), {}, "whole number"),
        ((None, 2, Counter()), {}, "whole number"),
        ((PORT + 0.5, 2, Counter()), {}, "whole number"),
        ((-1, 2, Counter()), {}, "leaves the pio space"),
        ((PORT, 2, Counter()), {"valid_sizes": 4}, "valid_sizes=4"),
        ((PORT, 2, Counter()), {"valid_sizes": (1, 2, 4)}, "valid_sizes="),
        ((PORT, 2, Counter()), {"impl_sizes": ("1", "4")}, "impl_sizes="),
        ((PORT, 2, Counter()), {"read": 5}, "read=5"),
        ((PORT, 2, Counter()), {"write": "write"}, "write='write'"),
        ((PORT, 2, Counter()), {"name": 5}, "name=5"),
        ((0x21, 1, Counter()), {}, "KVM's PIC"),
        ((0x40, 1, Counter()), {}, "KVM's PIT"),
        ((0xA0, 2, Counter()), {}, "KVM's PIC"),
    ],
)
def test_a_device_is_not_mapped(
    boot: Callable[..., Guest], arguments: tuple[Any, ...], options: dict[str, Any], wanted: str
) -> None:
    machine = boot("finish").machine
    before = machine.pio.regions
    assert wanted in sentence(lambda: machine.pio.map(*arguments, **options))
    assert machine.pio.regions == before


@pytest.mark.parametrize("board", ["microvm", "pc"])
@pytest.mark.parametrize("address", [0x1000, 0x3FFFFF, 0xFEC0_0000, 0xFEE0_0000, 0xFEFF_C000])
def test_a_device_where_no_access_would_reach_it(boot: Callable[..., Guest], board: str, address: int) -> None:
    machine = boot("finish", machine=board).machine
    assert "answers by itself: map it elsewhere" in sentence(lambda: machine.mmio.map(address, 4, Counter()))
    machine.mmio.map(MMIO, 4, Counter())


def test_a_device_over_the_first_bytes_of_memory_above_4_gib() -> None:
    with pyvmm.Machine(flat=HLT, memory_mib=3072 + 4) as machine:
        assert "ram-high" in sentence(lambda: machine.mmio.map((1 << 32) - 4, 8, Counter()))
        machine.mmio.map((1 << 32) + (4 << 20), 8, Counter())


def test_with_irqchip_off_the_places_of_kvm_s_are_free(boot: Callable[..., Guest]) -> None:
    machine = boot("finish", irqchip="off").machine
    assert "overlaps pic.master" in sentence(lambda: machine.pio.map(0x20, 2, Counter()))


def test_other_regions() -> None:
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: pyvmm.SinkRegion(1, 5), "callback=5"),  # type: ignore[arg-type]
        (lambda: pyvmm.SinkRegion("1", print), "'1' bytes"),  # type: ignore[arg-type]
        (lambda: pyvmm.EventRegion(1, None), "fd=None"),  # type: ignore[arg-type]
        (lambda: pyvmm.EventRegion(1, -1), "fd=-1"),
        (lambda: pyvmm.BufferRegion(5), "buffer"),  # type: ignore[arg-type]
        (lambda: pyvmm.FifoRegion(1, Counter, print), "is a class"),  # type: ignore[arg-type]
        (lambda: pyvmm.FifoRegion(1, Counter(), None), "on_end=None"),  # type: ignore[arg-type]
        (lambda: pyvmm.LatchRegion(None), "None bytes"),  # type: ignore[arg-type]
    ]
    for make, wanted in wrong:
        assert wanted in sentence(make)


# -- what a handler does wrong ---------------------------------------------------------------------------------


def test_an_end_that_a_handler_asks_for_does_not_hide_its_error(boot: Callable[..., Guest]) -> None:
    guest = boot("mov $DEVICE_PORT, %edx\n outb %al, %dx\n finish")

    class Careless(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            guest.machine.stop(0)
            raise LookupError("after all")

    guest.machine.pio.map(PORT, 1, Careless())
    with pytest.raises(pyvmm.DeviceError, match="after all"):
        guest.run()
    assert guest.machine.status == 8
    assert isinstance(guest.machine.error, pyvmm.DeviceError)


def test_a_callback_s_error_after_the_end_is_told(boot: Callable[..., Guest]) -> None:
    guest = boot("1: jmp 1b")

    def tick() -> None:
        guest.machine.stop(0)
        raise LookupError("after all")

    guest.machine.clock.timer(tick).arm(0)
    guest.start()
    guest.wait()
    over = threading.Event()
    guest.machine.event_loop.call_soon(over.set)
    assert over.wait(60)
    guest.machine.control.settle(60)
    assert "after all" in str(guest.machine.error)


class Unsayable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Mute(Exception):
    def __str__(self) -> str:
        return None  # type: ignore[return-value]  # the mistake


class Rude(BaseException):
    def __str__(self) -> str:
        raise KeyboardInterrupt


class Noteless(Exception):
    def add_note(self, note: str) -> None:
        raise RuntimeError("no notes")


@pytest.mark.parametrize("kind", [Unsayable, Mute, Rude, Noteless, SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("where", ["handler", "timer", "reset"])
def test_exceptions_of_every_kind(boot: Callable[..., Guest], kind: type[BaseException], where: str) -> None:
    guest = boot("mov $DEVICE_PORT, %edx\n outb %al, %dx\n 1: jmp 1b")

    class Careless(pyvmm.Device):
        def write(self, offset: int, size: int, value: int) -> None:
            if where == "handler":
                raise kind

        def reset(self) -> None:
            if where == "reset":
                raise kind

    def tick() -> None:
        raise kind

    guest.machine.pio.map(PORT, 1, Careless())
    if where == "timer":
        guest.machine.clock.timer(tick).arm(0)
    with pytest.raises(pyvmm.DeviceError) as caught:
        guest.machine.reset() if where == "reset" else guest.run()
    assert kind.__name__ in str(caught.value)
    assert isinstance(caught.value.__cause__, kind)
    assert "Traceback" in caught.value.dump
    if where == "reset":
        assert "Careless.reset raised" in str(caught.value)
    assert guest.machine.status == 8


class Forgetful(pyvmm.Device):
    def read(self, offset: int, size: int) -> int:
        pass

    def write(self, offset: int, size: int, value: int) -> None:
        raise LookupError("in write")

    def wide(self, offset: int, size: int) -> Any:
        return "seven"


ACCESSES = {
    "pio in": ("mov $DEVICE_PORT + 1, %edx\n inb %dx, %al", "Forgetful.read (port 0x701, 1 byte, region it) raised"),
    "pio out": ("mov $DEVICE_PORT, %edx\n outl %eax, %dx", "Forgetful.write (port 0x700, 4 bytes, region it) raised"),
    "split": (
        "mov $DEVICE_MMIO + 1, %edi\n mov %eax, (%rdi)",
        "Forgetful.write (address 0xd0000001, 1 byte, region there) raised",
    ),
    "mmio read": ("mov $DEVICE_MMIO, %edi\n mov (%rdi), %ax", "Forgetful.wide (address 0xd0000000, 2 bytes, region"),
    "sink": ("mov $10, %al\n mov $0x780, %edx\n outb %al, %dx", "SinkRegion.line (port 0x780, 1 byte, region sink)"),
    "fifo": ("mov $0x790, %edx\n inb %dx, %al", "Forgetful.ended (port 0x790, 1 byte, region fifo) raised"),
    "rep ins": (
        "mov $0x798, %edx\n mov $0x200000, %edi\n mov $4, %ecx\n rep insb",
        "Forgetful.ended (port 0x798, 1 byte, region fifo2) raised",
    ),
}


@pytest.mark.parametrize("access", ACCESSES)
def test_an_error_names_the_handler_and_the_access(boot: Callable[..., Guest], access: str) -> None:
    source, wanted = ACCESSES[access]
    guest = boot(f"{source}\n finish")
    machine, device = guest.machine, Forgetful()

    def line(data: bytes) -> None:
        raise LookupError("in the callback")

    def ended() -> None:
        raise LookupError("at the end")

    machine.pio.map(PORT, 4, device, name="it")
    machine.mmio.map(MMIO, 8, device, name="there", read=device.wide)
    machine.pio.add(0x780, pyvmm.SinkRegion(1, line))
    for port, name, size in ((0x790, "fifo", 1), (0x798, "fifo2", 4)):
        fifo = pyvmm.FifoRegion(1, device, ended, name=name)
        machine.pio.add(port, fifo)
        fifo.open_read(bytes(size))
    with pytest.raises(pyvmm.DeviceError) as caught:
        guest.run()
    assert wanted in str(caught.value)
    assert wanted in caught.value.dump
    assert wanted in caught.value.dump.splitlines()[0]


def test_a_read_without_a_return_says_so(boot: Callable[..., Guest]) -> None:
    guest = boot("mov $DEVICE_PORT, %edx\n inb %dx, %al\n finish")
    guest.machine.pio.map(PORT, 4, Forgetful())
    with pytest.raises(pyvmm.DeviceError, match=r"Forgetful\.read .* it returned None and not a number: is a return"):
        guest.run()
    with pytest.raises(TypeError) as caught:
        guest.machine.pio.read(PORT, 1)
    assert any("Forgetful.read (port 0x700" in note for note in caught.value.__notes__)


def test_one_exception_that_is_raised_for_ever_does_not_grow(boot: Callable[..., Guest]) -> None:
    error = LookupError("always the same")

    class Same(pyvmm.Device):
        def read(self, offset: int, size: int) -> int:
            raise error

    machine = boot("finish").machine
    machine.pio.map(PORT, 1, Same())
    error.add_note("the embedder's own")
    for _ in range(5):
        with pytest.raises(LookupError):
            machine.pio.read(PORT, 1)
    assert len(error.__notes__) == 2


def test_a_timer_s_callback_is_named(boot: Callable[..., Guest]) -> None:
    class Ticking(pyvmm.Device):
        def tick(self) -> None:
            raise LookupError("too late")

    guest = boot("1: jmp 1b")
    guest.machine.clock.timer(Ticking().tick).arm(0)
    with pytest.raises(pyvmm.DeviceError, match=r"Ticking\.tick raised LookupError: too late"):
        guest.run()


def test_descriptors_that_a_failed_machine_opened_are_closed() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ConfigError):
            pyvmm.Machine(flat=HLT, memory_mib=4, flat_address=1 << 70)
    assert len(os.listdir("/proc/self/fd")) == before
