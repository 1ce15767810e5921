"""A machine that needs none, and the third one of a snapshot, has no devices before somebody looks for one: nobody can
tell.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from errno import EMFILE
from pathlib import Path
from typing import Any

import pytest
from guests import PASSED, TIMEOUT_S, Guest

from pyvmm import ConfigError, Machine, Template
from pyvmm.boards.microvm import Microvm
from pyvmm.device import Device
from pyvmm.errors import HostError
from pyvmm.run_state import RunState
from pyvmm.snapshot_file import SnapshotFile, SnapshotWriter
from pyvmm.x86 import layout

# Touches the machine's first device when a word in its memory says so.
WAIT = """
        movl    $1, here
1:      cmpl    $0, go
        je      1b
        mov     $0x71, %dx
        inb     %dx, %al
        finish
        .balign 4
here:   .long   0
go:     .long   0
"""
# Both processors wait for that word, each for its own first device.
BOTH = """
        .include "interrupts64.inc"
        .include "smp64.inc"
        start_others
        mov     $0x64, %edx
        mov     $found, %ebx
        call    look
1:      pause
        cmpl    $2, done
        jne     1b
        finish
other_main:
        mov     $0x92, %edx
        mov     $found + 1, %ebx
        call    look
2:      cli
        hlt
        jmp     2b
look:   lock incl here
3:      pause
        cmpl    $0, go
        je      3b
        inb     %dx, %al
        movb    %al, (%rbx)
        lock incl done
        ret
        .balign 4
here:   .long   0
go:     .long   0
done:   .long   0
found:  .byte   0, 0
"""
NS_PER_S = 1_000_000_000
PERIODIC = 0x40  # PIE of the RTC's register B (MC146818A)
FULL = 2  # machines of a template that are made whole: the first loads each device, the second finds what need not be


def late(machine: Machine) -> bool:
    """Without looking for a device."""
    return "a device" in [region.name for region in machine.pio.view.regions]


@pytest.fixture(params=["off", "kernel"])
def guest(request: pytest.FixtureRequest, boot: Callable[..., Guest]) -> Guest:
    return boot(WAIT, irqchip=request.param)


@pytest.fixture
def template(guest: Guest, tmp_path: Path) -> Iterator[Template]:
    guest.machine.save(tmp_path / "a")
    with Template(tmp_path / "a") as template:
        for _ in range(FULL):
            template.start().close()
        yield template


def steady(machine: Machine) -> dict[str, Any]:
    """All that is the same whenever and for whomever it is asked; times as guest time."""
    parts = machine.save_state(memory=False)["parts"]
    now_ns = parts.pop("clock")["state"]["now_ns"]
    for name in ("KVM's clock", "vmgenid", *(name for name in parts if name.startswith("vCPU"))):
        parts.pop(name)
    rtc = parts["rtc"]["state"]
    rtc["chain_start_ns"] += now_ns
    parts["acpi_pm"]["state"].pop("now_ticks")
    parts["acpi_pm"]["state"].pop("toggle", None)
    return dict(parts)


def rtc_began_ns(machine: Machine) -> int:
    """When the second of its clock began that it counts from, in guest time."""
    chain_start_ns: int = machine.devices["rtc"].save()["chain_start_ns"]
    return machine.clock.now_ns() + chain_start_ns


def test_its_devices_are_those_of_the_one_that_was_saved(guest: Guest, template: Template) -> None:
    with template.start() as m, Machine.restore(template.snapshot.path) as first:
        assert late(m)
        assert not late(first)
        wanted = steady(first)
        assert steady(m) == wanted
        assert not late(m)
        assert list(m.devices) == list(first.devices)
        assert m.devices["vmgenid"].save() != first.devices["vmgenid"].save()


def test_they_come_when_the_guest_touches_one_as_of_when_it_began(guest: Guest, template: Template) -> None:
    wanted = rtc_began_ns(guest.machine)
    with template.start() as m:
        m.resume()
        while m.memory.read(guest.program.symbols["here"], 1) != b"\1":
            assert not m.wait(0.01)
        assert late(m)
        m.memory.write(guest.program.symbols["go"], b"\1")
        assert m.wait(TIMEOUT_S)
        assert m.status == PASSED
        assert not late(m)
        assert m.clock.now_ns() > guest.machine.clock.now_ns()
        assert rtc_began_ns(m) == wanted


def test_a_reset_and_a_save_find_them(guest: Guest, template: Template, tmp_path: Path) -> None:
    with template.start() as m:
        m.save(tmp_path / "b")
        with Machine.restore(tmp_path / "b", serial=None, debugcon=None) as n:
            assert steady(n) == steady(m)
    with template.start() as m:
        m.reset()
        assert not late(m)
        m.memory.write(guest.program.symbols["go"], b"\1")
        assert m.run(TIMEOUT_S) == PASSED


def test_a_device_of_ones_own_finds_its_place_taken_or_free(guest: Guest, template: Template) -> None:
    with template.start() as m:
        with pytest.raises(ConfigError, match="overlaps rtc at 0x70-0x71"):
            m.pio.map(layout.PORT_RTC, 1, Device())
        m.pio.map(0x300, 1, Device())
    with template.start() as m, pytest.raises(ConfigError, match="which answers by itself"):
        m.mmio.map(0, 1, Device())


def test_whose_timer_runs_has_it_at_once(guest: Guest, tmp_path: Path) -> None:
    pio = guest.machine.pio
    pio.write(layout.PORT_RTC, 1, 0x0B)
    pio.write(layout.PORT_RTC + 1, 1, pio.read(layout.PORT_RTC + 1, 1) | PERIODIC)
    guest.machine.save(tmp_path / "a")
    with Template(tmp_path / "a") as template:
        for _ in range(2 * FULL):
            with template.start() as m:
                assert not late(m)


def test_forks_are_late_too(guest: Guest) -> None:
    with guest.machine as m:
        made = m.fork(FULL + 2)
        assert not late(made[0])
        assert [late(each) for each in made[FULL:]] == [True] * 2
        for each in made:
            each.memory.write(guest.program.symbols["go"], b"\1")
            assert each.run(TIMEOUT_S) == PASSED
            each.close()


def test_who_opens_the_same_file_again_has_it_late(guest: Guest, tmp_path: Path) -> None:
    guest.machine.save(tmp_path / "a")
    found = []
    for _ in range(FULL + 3):
        with Machine.restore(tmp_path / "a") as m:
            found.append(late(m))
            m.memory.write(guest.program.symbols["go"], b"\1")
            assert m.run(TIMEOUT_S) == PASSED
    assert found[0] is False
    assert found[FULL + 1 :] == [True] * 2


def made(machine: Machine) -> set[str]:
    return {name for name, _ in machine.board.holders() if machine.board.made(name) is not None}


def test_what_nobody_had_wanted_is_not_made_for_a_restore(guest: Guest, tmp_path: Path) -> None:
    first = guest.machine
    first.pio.write(layout.PORT_POST, 1, 0x42)
    touched = made(first)
    assert "port80" in touched
    assert "i8042" not in touched
    first.save(tmp_path / "a")
    assert "i8042" in made(first)  # a save looks at all
    with Machine.restore(tmp_path / "a", twin=False) as m:
        # These two are another one in each machine.
        assert made(m) == touched | {"rtc", "vmgenid"}
        assert steady(m) == steady(first)
        assert m.devices["vmgenid"].save() == first.devices["vmgenid"].save()


def rewritten(guest: Guest, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A snapshot of the guest with another manifest."""
    guest.machine.save(folder / "a")
    with SnapshotFile(str(folder / "a")) as read:
        manifest = deepcopy(read.manifest)
    change(manifest)
    with SnapshotWriter(str(folder / "b")) as file:
        data = (folder / "a").read_bytes()
        file.reserve(len(data))
        for at in range(4096, len(data), 1 << 20):
            if any(piece := data[at : at + (1 << 20)]):
                file.write(at, piece)
        file.commit(manifest)
    return folder / "b"


def test_a_snapshot_without_the_list_of_those_is_read(guest: Guest, tmp_path: Path) -> None:
    path = rewritten(guest, tmp_path, lambda manifest: manifest.pop("untouched"))
    with Machine.restore(path) as m:
        assert "i8042" in made(m)
        assert steady(m) == steady(guest.machine) | {"gpe0": steady(m)["gpe0"]}


def test_what_the_first_one_did_not_load_the_others_do_not_either(guest: Guest, tmp_path: Path) -> None:
    """A stranger's snapshot: nobody has looked at that state, and the guest runs when the device comes."""

    def spoil(manifest: dict[str, Any]) -> None:
        manifest["parts"]["i8042"]["state"] = {"no": "keyboard"}
        assert "i8042" in manifest["untouched"]

    path = rewritten(guest, tmp_path, spoil)
    found = []
    for _ in range(FULL + 2):
        with Machine.restore(path) as m:
            found.append(late(m))
            m.memory.write(guest.program.symbols["go"], b"\1")
            assert m.run(TIMEOUT_S) == PASSED
            assert m.devices["i8042"].save() == guest.machine.devices["i8042"].save()
    assert found[-1]


def test_no_room_for_them_ends_the_machine_for_good(
    guest: Guest, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_devices(self: Microvm) -> None:
        self.add_serial()
        raise OSError(EMFILE, "Too many open files")

    with template.start() as m:
        m.memory.write(guest.program.symbols["go"], b"\1")
        with monkeypatch.context() as patch:
            patch.setattr(Microvm, "make_devices", make_devices)
            with pytest.raises(HostError, match="could not be made: Too many open files: raise `ulimit -n`"):
                m.run(TIMEOUT_S)
        assert m.control.state is RunState.INTERNAL_ERROR
        # It does not go on with the half of them.
        for look in (m.reset, lambda: m.devices, lambda: m.pio.read(layout.PORT_RTC, 1)):
            with pytest.raises(HostError, match="make another machine"):
                look()
        assert m.control.state is RunState.INTERNAL_ERROR
    with template.start() as m:
        m.memory.write(guest.program.symbols["go"], b"\1")
        assert m.run(TIMEOUT_S) == PASSED


def test_two_processors_that_look_at_once_find_one_board(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot(BOTH, cpus=2)
    with guest.machine as first:
        first.resume()
        while guest.value("here") != 2:
            assert not first.wait(0.01)
        first.save(tmp_path / "a")
    with Template(tmp_path / "a") as template:
        found = []
        for _ in range(FULL + 6):
            with template.start() as m:
                found.append(late(m))
                m.resume()
                m.memory.write(guest.program.symbols["go"], b"\1")
                assert m.wait(TIMEOUT_S)
                assert m.status == PASSED
                assert m.memory.read(guest.program.symbols["found"], 2).count(0xFF) == 0
    assert all(found[FULL:])


# -- machines from nothing


@pytest.mark.parametrize("irqchip", ["off", "kernel"])
def test_a_machine_from_nothing_is_as_one_whose_devices_were_there(boot: Callable[..., Guest], irqchip: str) -> None:
    found = []
    for look_first in (True, False):
        guest = boot(WAIT, irqchip=irqchip)
        with guest.machine as m:
            assert late(m)
            if look_first:
                assert "rtc" in m.devices
                assert not late(m)
            m.resume()
            while guest.value("here") != 1:
                assert not m.wait(0.01)
            assert late(m) is not look_first
            m.memory.write(guest.program.symbols["go"], b"\1")
            assert m.wait(TIMEOUT_S)
            assert m.status == PASSED
            assert not late(m)
            began_ns = rtc_began_ns(m)
            assert -NS_PER_S < began_ns - m.board.powered_on_ns[0] <= 0
            found.append((list(m.devices), [(r.name, r.base, r.size) for r in m.pio.regions]))
    assert found[0] == found[1]


def test_one_that_only_ends_never_has_any(boot: Callable[..., Guest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Microvm, "make_devices", lambda self: pytest.fail("devices that nobody wanted"))
    with boot("finish").machine as m:
        assert m.run(TIMEOUT_S) == PASSED
        assert late(m)


class Mine(Microvm):
    pass


@pytest.mark.parametrize(
    "asked",
    [
        {"serial": "pty"},
        {"debugcon": lambda data: None},
        {"fw_cfg": {"opt/mine": b"x"}},
        {"vga": "text"},
        {"pvpanic": True},
        {"testdev": True},
        {"rng": True},
        {"consoles": ["none"]},
        {"uuid": "f4ec5dd1-2a51-44b0-95a1-3c1a4d3cf6c8"},
        {"machine": "pc"},
        {"accel": "qtest"},
        {"board": Mine},
    ],
)
def test_what_may_be_refused_or_brings_input_is_there_at_once(asked: dict[str, Any]) -> None:
    with Machine(**{"flat": b"\xf4", "memory_mib": 2, **asked}) as m:
        assert not late(m)
    with Machine(flat=b"\xf4", memory_mib=2) as m:
        assert late(m)


def test_a_reset_and_a_device_of_ones_own_find_them(boot: Callable[..., Guest]) -> None:
    guest = boot(WAIT)
    with guest.machine as m:
        m.reset()
        assert not late(m)
        m.memory.write(guest.program.symbols["go"], b"\1")
        assert m.run(TIMEOUT_S) == PASSED
    with boot(WAIT).machine as m:
        with pytest.raises(ConfigError, match="overlaps rtc at 0x70-0x71"):
            m.pio.map(layout.PORT_RTC, 1, Device())
        assert not late(m)
    with boot(WAIT).machine as m, pytest.raises(ConfigError, match="which answers by itself"):
        m.mmio.map(0, 1, Device())


TOUCHES = """
        out     %al, $0x80
        in      $0x71, %al
        mov     $0x3f8, %dx
        out     %al, %dx
        in      $0x64, %al
        in      $0x92, %al
        in      $0x61, %al
        in      $0x21, %al
        finish
"""


@pytest.mark.parametrize("irqchip", ["off", "kernel"])
def test_one_whose_guest_has_touched_them_goes_with_the_last_reference(
    boot: Callable[..., Guest], irqchip: str
) -> None:
    """What refers to itself, a device with a timer or a region of its own, keeps none of these."""
    boot(TOUCHES, irqchip=irqchip).machine.run(TIMEOUT_S)  # imports
    gc.collect()
    gc.disable()
    try:
        m = Guest(TOUCHES, irqchip=irqchip).machine
        assert m.run(TIMEOUT_S) == PASSED
        parts = m.board, m.event_loop, m.kvm_listener, m.irqchip, m.cpus[0], m.memory_map
        gone = {type(part).__name__: weakref.ref(part) for part in parts}
        m.close()
        del m, parts
        assert [name for name, part in gone.items() if part() is not None] == []
    finally:
        gc.enable()
