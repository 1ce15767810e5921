"""Single steps of a guest in user mode: where KVM runs that on the bare processor they would be the guest's traps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from gdb_client import RIP, GdbClient
from guests import TIMEOUT_S, Guest

from pyvmm import Machine, RunState, StateError
from pyvmm.kvm.kind import kvm_kind

# To CPL 3 by IRETQ, with no handler for whatever comes from there.
USER = """
        lgdt    gdt_pointer(%rip)
        lea     stack(%rip), %rax
        lea     user(%rip), %rbx
        pushq   $0x23
        push    %rax
        pushq   $2
        pushq   $0x1b
        push    %rbx
        iretq
user:   incl    count(%rip)
        nop
        jmp     user
        .align  8
gdt:    .quad   0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00affb000000ffff, 0x00cff3000000ffff
gdt_pointer:
        .word   39
        .quad   gdt
        .align  8
count:  .long   0
        .space  64
stack:  .quad   0
"""
PRESENT_USER, LARGE, ADDRESS = 0x5, 0x80, 0xF_FFFF_FFFF_F000


def give_to_user_mode(machine: Machine, table: int, level: int = 4) -> None:
    for at in range(table, table + 4096, 8):
        entry = int.from_bytes(machine.memory.read(at, 8), "little")
        if entry & 1:
            machine.memory.write(at, (entry | PRESENT_USER).to_bytes(8, "little"))
            if level > 1 and not entry & LARGE:
                give_to_user_mode(machine, entry & ADDRESS, level - 1)


@pytest.fixture
def guest(boot: Callable[..., Guest]) -> Guest:
    """It stands somewhere in its loop."""
    made = boot(USER)
    give_to_user_mode(made.machine, made.machine.cpus[0].sregs["cr3"] & ADDRESS)
    made.machine.resume()
    while not made.value("count"):
        assert made.machine.state is RunState.RUNNING
    made.machine.pause()
    assert made.machine.cpus[0].sregs["cs"]["dpl"] == 3
    return made


def test_a_step_is_one_or_is_refused(guest: Guest) -> None:
    cpu, before = guest.machine.cpus[0], guest.regs()["rip"]
    if "software" in kvm_kind():
        with pytest.raises(StateError, match="can't step user mode"):
            cpu.step(TIMEOUT_S)
        assert guest.regs()["rip"] == before
    else:
        assert cpu.step(TIMEOUT_S) == 14
        assert guest.regs()["rip"] != before
    assert guest.machine.resets.count == 0
    so_far = guest.value("count")
    guest.machine.resume()
    while guest.value("count") == so_far:
        assert guest.machine.state is RunState.RUNNING


def test_gdb_is_told(guest: Guest, tmp_path: Path) -> None:
    guest.machine.serve_gdb(tmp_path / "gdb", wait=True)
    run = threading.Thread(target=guest.machine.run, args=(TIMEOUT_S,))
    run.start()
    with GdbClient(tmp_path / "gdb") as gdb:
        before = gdb.register(RIP)
        if "software" in kvm_kind():
            assert gdb.ask("vCont;s:1").startswith("E.this KVM, in software, can't step user mode")
            assert gdb.register(RIP) == before
            assert gdb.ask(f"Z2,{guest.program.symbols['count']:x},4").startswith("E.this KVM, in software")
        else:
            assert gdb.ask("vCont;s:1").startswith("T05")
            assert gdb.register(RIP) != before
        assert gdb.ask("vCont;s:1")[:2] in ("E.", "T0")
        gdb.send("vCont;c")
        gdb.interrupt()
        assert gdb.reply().startswith("T02")
        assert guest.machine.resets.count == 0
    guest.machine.close()
    run.join(TIMEOUT_S)
