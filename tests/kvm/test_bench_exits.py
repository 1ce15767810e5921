"""pyvmm bench exits on this machine's KVM: every guest takes its turns, in every contender and from every beginning.

Nothing here looks at how long anything took.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyvmm
from pyvmm.cli.bench import load

load()

from pyvmm_benchmarks import exit_guests, exits, mailbox  # noqa: E402
from pyvmm_benchmarks.cases import CASES, ExitCase, find  # noqa: E402
from pyvmm_benchmarks.contenders.c_floor import Floor  # noqa: E402
from pyvmm_benchmarks.contenders.exit_contender import Contender, Kind  # noqa: E402
from pyvmm_benchmarks.contenders.ours import Pyvmm  # noqa: E402
from pyvmm_benchmarks.contenders.python_loops import Loop  # noqa: E402
from pyvmm_benchmarks.contenders.qemu import Qemu  # noqa: E402
from pyvmm_benchmarks.mailbox import Mailbox, Memory, Plan  # noqa: E402

# Dozens of interpreters are started here: too much for an emulated host.
pytestmark = pytest.mark.native

PLAN = Plan(warm_up=3, pairs=2, short=2, long=6, singles=20)
LIMIT_S = 120.0
# Software virtualization hangs in a hypercall at CPL 0, in any VMM.
HANGS = {"vmcall"}
KINDS: list[Kind] = [Floor(), Pyvmm(), Loop("fcntl"), Loop("ctypes")]


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled floor, and the guests."""
    return tmp_path_factory.mktemp("exits")


@pytest.fixture
def started(directory: Path) -> Iterator[Callable[[Kind, ExitCase], Contender]]:
    contenders: list[Contender] = []

    def start(kind: Kind, case: ExitCase) -> Contender:
        exits.write_images(case, directory)
        contender = kind.start(case, directory, None)
        contenders.append(contender)
        contender.wait_until_ready()
        return contender

    yield start
    for contender in contenders:
        contender.close()


def take_turns(contender: Contender, case: ExitCase) -> None:
    plan = PLAN if case.blocks else PLAN._replace(pairs=0, short=0, long=0)
    for _ in range(2):
        ticks = contender.turn(plan, LIMIT_S)
        assert len(ticks.short) == len(ticks.long) == plan.pairs
        assert len(ticks.singles) == plan.singles
        assert all(ticks.singles) and all(ticks.short) and all(ticks.long)
    assert all(contender.others())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.name))
@pytest.mark.parametrize("case", [c for c in CASES if c.name not in HANGS], ids=lambda case: str(case.name))
def test_every_case(started: Callable[[Kind, ExitCase], Contender], case: ExitCase, kind: Kind) -> None:
    contender = started(kind, case)
    take_turns(contender, case)
    if case.has_own_share and kind.name == "pyvmm":
        own = contender.own()
        assert own is not None and 0 < own["min"] <= own["mean"] and own["p50"] <= own["p99"]


@pytest.mark.parametrize("machine", ["microvm", "pc"])
@pytest.mark.parametrize("name", ["outl_to_python", "mmio_read_python", "coalesced_pio", "outl_to_python_x2"])
def test_qemu(started: Callable[[Kind, ExitCase], Contender], machine: str, name: str) -> None:
    case = find(name)
    assert case is not None
    kind = Qemu(machine)
    assert kind.why_not(case) == "", "ci/setup test installs QEMU"
    take_turns(started(kind, case), case)


def test_qemus_own_doorbell(started: Callable[[Kind, ExitCase], Contender]) -> None:
    """The guest finds pci-testdev and gives it its place: what it rings is no exit, as nobody else has that port."""
    case = find("portio-wildcard-eventfd")
    assert case is not None
    take_turns(started(Qemu("pc"), case), case)
    assert Qemu("microvm").why_not(case)


def test_the_floors_own_share(started: Callable[[Kind, ExitCase], Contender]) -> None:
    case = find("inl_from_qemu")
    assert case is not None
    contender = started(Floor(share=True), case)
    take_turns(contender, case)
    own = contender.own()
    assert own is not None and 0 <= own["min"] <= own["p50"] <= own["p99"]


# -- the other beginnings ----------------------------------------------------------------------------------------


def ready(machine: pyvmm.Machine) -> Mailbox:
    """Run until the guest waits for a turn."""
    box = Mailbox(Memory(os.getpid()), machine.memory.ram[0].host_address)
    end = time.monotonic() + LIMIT_S
    machine.resume()
    while not box.ready:
        assert time.monotonic() < end, "the guest was not ready"
        time.sleep(0.001)
    return box


def test_elf_with_a_pvh_note() -> None:
    """As cloud-hypervisor would boot it."""
    image = exit_guests.elf("inl_from_qemu", pvh=True)
    with pyvmm.Machine(kernel=image, memory_mib=mailbox.MEMORY_MIB) as machine:
        box = ready(machine)
        assert len(box.take(PLAN, LIMIT_S).singles) == PLAN.singles
        box.memory.close()
        machine.pause()


@pytest.mark.parametrize("entry", [(0x1000, 0x200), (0x1020, 0)], ids=["kvmtool", "boot protocol"])
def test_bzimage_in_real_mode(entry: tuple[int, int]) -> None:
    """As a boot loader of Linux, or kvmtool, would enter it: the setup part at 64 KiB, the rest at 1 MiB."""
    image = exit_guests.bzimage("inl_from_qemu")
    setup_bytes = (image[0x1F1] + 1) * 512
    with pyvmm.Machine(flat=b"\xf4", memory_mib=mailbox.MEMORY_MIB) as machine:
        machine.memory.write(0x1_0000, image[:setup_bytes])
        machine.memory.write(exit_guests.LOAD, image[setup_bytes:])
        segment, offset = entry
        sregs: dict[str, Any] = machine.cpus[0].sregs
        for name in ("ds", "es", "ss"):
            sregs[name] |= {"selector": 0x1000, "base": 0x1_0000}
        sregs["cs"] |= {"selector": segment, "base": segment << 4}
        machine.cpus[0].sregs = sregs
        machine.cpus[0].regs = machine.cpus[0].regs | {"rip": offset, "rsp": 0x8000}
        box = ready(machine)
        assert len(box.take(PLAN, LIMIT_S).singles) == PLAN.singles
        box.memory.close()
        machine.pause()


# -- the whole command -------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shutil.which("gcc")
    path, prefix = str(tmp_path / "found.json"), str(tmp_path / "exits")
    command = ["--quick", "--rounds", "3", "--cases", "outl_to_python,kick", "--json", path, "--plot", prefix]
    assert exits.main(command) == 0
    said = capsys.readouterr().out
    for kind in exits.kinds():
        assert said.count(f"\n  {kind.name} ") == 2, kind.name
    assert "a kick of its vCPU can't be timed from outside" in said
    assert len(list(tmp_path.glob("exits-*"))) == 4
    # Against itself nothing has changed.
    assert exits.main(["--from", path, "--compare", path]) == 0
    assert "nothing changed beyond noise" in capsys.readouterr().out
