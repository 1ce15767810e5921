"""QMP's looks at a guest that runs: its memory by its own addresses, its registers, and a core that gdb opens."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from errno import ENOSPC
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from guests import TIMEOUT_S, Guest
from qmp_peer import QmpPeer

from pyvmm import RunState

# RBX is known.
KNOWN = 0x1122334455667788
SPIN = f"""
    movabs ${KNOWN:#x}, %rbx
    movl $1, ready(%rip)
1:  pause
    jmp 1b
    .balign 8
ready: .long 0
text: .asciz "words"
"""


@pytest.fixture
def guest(boot: Callable[..., Guest], tmp_path: Path) -> Guest:
    made = boot(SPIN)
    made.machine.serve_qmp(tmp_path / "qmp.sock")
    return made


@pytest.fixture
def peer(guest: Guest, tmp_path: Path) -> Iterator[QmpPeer]:
    with QmpPeer(tmp_path / "qmp.sock") as it:
        it.get("cont")
        while not guest.value("ready"):
            it.get("query-status")
        it.events.clear()
        yield it


def test_memory_by_the_guests_addresses(peer: QmpPeer, guest: Guest, tmp_path: Path) -> None:
    text = guest.program.symbols["text"]
    assert peer.get("memsave", val=text, size=5, filename=str(tmp_path / "words")) == {}
    assert (tmp_path / "words").read_bytes() == b"words"
    line = peer.get("human-monitor-command", command_line=f"x /5cb {text:#x}")
    assert line == f"{text:016x}: 'w' 'o' 'r' 'd' 's'\r\n"
    high = peer.error("memsave", val=1 << 46, size=4, filename=str(tmp_path / "none"))
    assert high == f"Invalid addr {1 << 46:#018x}/size 1 specified"
    high = peer.error("memsave", val=-4096, size=4, filename=str(tmp_path / "none"))  # as QEMU's clients say it
    assert high == "Invalid addr 0xfffffffffffff000/size 1 specified"
    assert "at 0xfffffffffffff000" in peer.error("pmemsave", val=-4096, size=4, filename=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    assert "CPU number" in peer.error("memsave", val=text, size=1, filename=str(tmp_path / "none"), cpu_index=1)
    assert guest.machine.state is RunState.RUNNING


def test_a_file_system_that_tells_late_that_it_is_full(
    peer: QmpPeer, guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    said = peer.error("pmemsave", val=0, size=4096, filename=str(tmp_path / "memory"))
    assert said == f"writing memory to '{tmp_path / 'memory'}' failed: No space left on device"


def test_registers_of_a_guest_that_runs(peer: QmpPeer, guest: Guest) -> None:
    assert peer.get("human-monitor-command", command_line="p $rbx") == f"{KNOWN:#x}\r\n"
    assert f"rbx {KNOWN:016x}" in peer.get("human-monitor-command", command_line="info registers")
    assert "unknown register 'nix'" in peer.get("human-monitor-command", command_line="p $nix")
    for what in ("lapic", "pic", "exits", "irq"):
        assert peer.get("human-monitor-command", command_line=f"info {what}")
    assert guest.machine.state is RunState.RUNNING
    assert not peer.events


def test_statistics_of_the_kernel(peer: QmpPeer) -> None:
    results = peer.get("query-stats", target="vcpu", providers=[{"provider": "kvm", "names": ["exits"]}])
    ((only,),) = [result["stats"] for result in results]
    assert results[0]["qom-path"] == "/machine/cpus/0"
    assert only["name"] == "exits"
    assert only["value"] > 0
    schemas = {(s["provider"], s["target"]): s["stats"] for s in peer.get("query-stats-schemas")}
    assert {"name": "exits", "type": "cumulative", "exponent": 0} in schemas["kvm", "vcpu"]
    told = {stat["name"] for stat in peer.get("query-stats", target="vm")[0]["stats"]}
    assert told == {stat["name"] for stat in schemas["kvm", "vm"]}


@pytest.mark.parametrize("paging", [False, True])
def test_a_core_that_gdb_opens(peer: QmpPeer, guest: Guest, tmp_path: Path, paging: bool) -> None:
    core = tmp_path / "core"
    peer.get("stop")
    assert peer.get("dump-guest-memory", paging=paging, protocol=f"file:{core}") == {}
    regs = guest.regs()
    text = guest.program.symbols["text"]
    asked = ["info registers rbx rip rsp eflags cs", f"x/s {text:#x}", "info threads"]
    gdb = subprocess.run(
        ["gdb", "-q", "-nx", "-batch", *(word for line in asked for word in ("-ex", line)), "-c", str(core)],
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    shown = dict(re.findall(r"^(\w+) +(0x[0-9a-f]+)", gdb.stdout, re.M))
    assert int(shown["rbx"], 16) == KNOWN, gdb.stdout + gdb.stderr
    for name in ("rip", "rsp"):
        assert int(shown[name], 16) == regs[name]
    assert int(shown["eflags"], 16) == regs["rflags"]
    assert '"words' in gdb.stdout
    assert "LWP 1" in gdb.stdout


def test_what_is_in_a_core(peer: QmpPeer, guest: Guest, tmp_path: Path) -> None:
    core = tmp_path / "core"
    guest.machine.memory.write(0x5000, b"low")
    peer.get("dump-guest-memory", paging=False, protocol=f"file:{core}", begin=0x5000, length=0x2000)
    with core.open("rb") as file:
        elf = ELFFile(file)
        note, load = elf.iter_segments()
        assert [each["n_name"] for each in note.iter_notes()] == ["CORE", "QEMU"]
        assert (load["p_paddr"], load["p_vaddr"], load["p_memsz"]) == (0x5000, 0x5000, 0x2000)
        assert load.data()[:4] == b"low\0"
    assert guest.machine.state is RunState.RUNNING
    assert core.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({"protocol": "fd:x"}, "Parameter 'protocol' expects file:PATH"),
        ({"protocol": "file:/nowhere/x"}, "Could not open"),
        ({"protocol": "file:/tmp/x", "begin": 0}, "Parameter 'length' is missing"),
        ({"protocol": "file:/tmp/x", "begin": 1 << 40, "length": 1}, "no RAM in that range"),
        ({"protocol": "file:/tmp/x", "format": "kdump-zlib"}, "does not accept value"),
    ],
)
def test_cores_that_are_none(peer: QmpPeer, guest: Guest, arguments: dict[str, object], desc: str) -> None:
    assert desc in peer.error("dump-guest-memory", paging=False, **arguments)
    assert guest.machine.state is RunState.RUNNING


def test_a_snapshot_that_goes_on(peer: QmpPeer, guest: Guest, tmp_path: Path) -> None:
    import pyvmm

    saved = peer.get("snapshot-save", filename=str(tmp_path / "vm.snap"))
    assert saved["written-bytes"] > 0
    assert guest.machine.state is RunState.RUNNING
    again = peer.get("snapshot-save", filename=str(tmp_path / "next.snap"), base=str(tmp_path / "vm.snap"))
    assert again["written-bytes"] >= 0
    with pyvmm.Machine.restore(tmp_path / "vm.snap") as other:
        assert other.cpus[0].regs["rbx"] == KNOWN
    assert "nowhere" in peer.error("snapshot-save", filename="/nowhere/at/all")


def test_a_guest_moves_away(peer: QmpPeer, guest: Guest, tmp_path: Path) -> None:
    import threading

    import pyvmm

    arrived: list[pyvmm.Machine] = []
    place = tmp_path / "move.sock"
    other = threading.Thread(target=lambda: arrived.append(pyvmm.Machine.incoming(str(place))))
    other.start()
    while not place.exists():
        assert peer.get("query-migrate") == {}
    assert peer.get("migrate_cancel") == {}
    assert "expects unix:PATH" in peer.error("migrate", uri="exec:cat")
    assert peer.get("migrate", uri=f"unix:{place}") == {}
    assert peer.event("MIGRATION")["data"] == {"status": "active"}
    assert peer.event("MIGRATION")["data"] == {"status": "completed"}
    other.join(TIMEOUT_S)
    with arrived[0] as machine:
        machine.pause()
        assert machine.cpus[0].regs["rbx"] == KNOWN
    told = peer.get("query-migrate")
    assert told["status"] == "completed"
    assert told["total-time"] >= told["downtime"] >= 0
    assert guest.machine.state is RunState.SHUTDOWN


def test_a_move_to_nowhere(peer: QmpPeer, guest: Guest, tmp_path: Path) -> None:
    assert peer.get("migrate", uri=f"unix:{tmp_path}/nobody") == {}
    assert peer.event("MIGRATION")["data"] == {"status": "active"}
    assert peer.event("MIGRATION")["data"] == {"status": "failed"}
    assert "nobody" in peer.get("query-migrate")["error-desc"]
    assert peer.get("query-status")["running"]
