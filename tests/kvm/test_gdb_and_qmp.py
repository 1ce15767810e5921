"""A debugger and QMP's clients at one machine: who lets it go on, and what is seen of the debugger's breakpoints."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from gdb_client import RIP, GdbClient
from guests import TIMEOUT_S, Guest
from qmp_peer import QmpPeer

from pyvmm import RunState

pytestmark = pytest.mark.native  # the lab has no breakpoints

LOOP = "mov $5, %ecx\n here: inc %ebx\n there: dec %ecx\n jnz here\n jmp here"


def test_only_the_debugger_lets_it_go_on(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot(LOOP)
    machine = guest.machine
    machine.serve_gdb(tmp_path / "gdb", wait=True)
    machine.serve_qmp(tmp_path / "qmp")
    run = threading.Thread(target=machine.run, args=(TIMEOUT_S,))
    run.start()
    with QmpPeer(tmp_path / "qmp") as qmp:
        with GdbClient(tmp_path / "gdb") as gdb:
            here = guest.program.symbols["here"]
            assert gdb.ask(f"Z0,{here:x},1") == "OK"
            assert gdb.ask("vCont;c").startswith("T05")
            assert qmp.error("cont") == "a debugger has the machine: let it continue there, or detach it"
            assert machine.state is RunState.DEBUG
            assert gdb.register(RIP) == here
            # It may be brought elsewhere: the debugger finds its guest there, and its breakpoint.
            qmp.get("snapshot-save", filename=str(tmp_path / "here.snap"))
            assert gdb.ask("vCont;c").startswith("T05")
            qmp.get("snapshot-load", filename=str(tmp_path / "here.snap"))
            assert gdb.register(RIP) == here
            assert gdb.ask("vCont;c").startswith("T05")
            assert gdb.ask("D") == "OK"
        qmp.get("stop")
        assert qmp.get("query-status")["status"] == "paused"
        qmp.get("cont")
        assert qmp.get("query-status")["running"]
        qmp.get("quit")
    run.join(TIMEOUT_S)
    assert not run.is_alive()


def test_a_breakpoint_is_in_nobody_s_picture(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot(LOOP)
    machine = guest.machine
    here = guest.program.symbols["here"]
    code = guest.program.image[here - guest.program.address :][:4]
    machine.serve_gdb(tmp_path / "gdb")
    machine.serve_qmp(tmp_path / "qmp")
    run = threading.Thread(target=machine.run, args=(TIMEOUT_S,))
    run.start()
    with QmpPeer(tmp_path / "qmp") as qmp, GdbClient(tmp_path / "gdb") as gdb:
        assert gdb.ask(f"Z0,{here:x},1") == "OK"
        assert gdb.ask("vCont;c").startswith("T05")
        assert machine.memory.read(here, 4) != code
        word = int.from_bytes(code, "little")
        for line in (f"x /1xw {here:#x}", f"xp /1xw {here:#x}"):
            assert qmp.get("human-monitor-command", command_line=line) == f"{here:016x}: {word:#010x}\r\n"
        shown = f"<{code[:1].hex()}> {code[1:].hex(' ')}"
        assert shown in qmp.get("human-monitor-command", command_line="info registers")
        assert shown in machine.dump()
        for name in ("memsave", "pmemsave"):
            qmp.get(name, val=here, size=4, filename=str(tmp_path / name))
            assert (tmp_path / name).read_bytes() == code
        qmp.get("dump-guest-memory", paging=False, protocol=f"file:{tmp_path}/core")
        with (tmp_path / "core").open("rb") as file:
            segments = [s for s in ELFFile(file).iter_segments() if s["p_type"] == "PT_LOAD"]
            (holds,) = [s for s in segments if s["p_paddr"] <= here < s["p_paddr"] + s["p_filesz"]]
            assert holds.data()[here - holds["p_paddr"] :][:4] == code
        assert machine.memory.read(here, 4) != code  # it is there all the same
        assert gdb.ask("vCont;c").startswith("T05")
    machine.close()
    run.join(TIMEOUT_S)
