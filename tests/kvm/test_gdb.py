"""A debugger and a machine: who stops whom, what stays and what goes when either of them leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gdb_client import RBX, RIP, GdbClient
from guests import PASSED, PORT, SPIN_ON_BOTH, TIMEOUT_S, Guest, Recorder

from pyvmm import ConfigError, GuestError, Machine, RunState, StateError

LOOP = """
        mov     $5, %ecx
here:   inc     %ebx
there:  dec     %ecx
        mov     %ecx, count
after:  jnz     here
        finish
        .align  8
count:  .long   0x77
"""
ENDLESS = "mov $DEVICE_PORT, %edx\n here: inc %rbx\n outb %al, %dx\n jmp here"


class Debugged:
    """A guest that runs in a thread of its own, and a client at its socket."""

    def __init__(self, guest: Guest, path: Path, *, wait: bool = True) -> None:
        self.guest = guest
        self.machine = guest.machine
        self.symbols = guest.program.symbols
        self.path = path
        self.server = self.machine.serve_gdb(path, wait=wait)
        self.ended: list[Any] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.ended.append(self.machine.run(TIMEOUT_S))
        except BaseException as error:
            self.ended.append(error)

    def client(self) -> GdbClient:
        return GdbClient(self.path)

    def end(self) -> Any:
        """What run() has come to."""
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        return self.ended[0]

    def close(self) -> None:
        self.machine.close()
        self._thread.join(TIMEOUT_S)


Debug = Callable[..., Debugged]


@pytest.fixture
def debug(boot: Callable[..., Guest], tmp_path: Path) -> Iterator[Debug]:
    made: list[Debugged] = []

    def make(source: str, mode: str = "long64", *, wait: bool = True, **options: Any) -> Debugged:
        made.append(Debugged(boot(source, mode, **options), tmp_path / f"gdb{len(made)}", wait=wait))
        return made[-1]

    yield make
    for debugged in made:
        debugged.close()


def test_from_the_first_instruction_to_the_end(debug: Debug) -> None:
    d = debug(LOOP)
    with d.client() as gdb:
        assert gdb.ask("?") == "T05thread:1;"
        assert gdb.register(RIP) == d.guest.program.address
        assert d.machine.state is RunState.PRELAUNCH
        assert gdb.ask(f"Z0,{d.symbols['here']:x},1") == "OK"
        for n in range(5):
            assert gdb.ask("vCont;c") == "T05thread:1;"
            assert (gdb.register(RIP), gdb.register(RBX)) == (d.symbols["here"], n)
            # Over it: as gdb does, without the breakpoint.
            assert gdb.ask(f"z0,{d.symbols['here']:x},1") == "OK"
            assert gdb.ask("vCont;s:1") == "T05thread:1;"
            assert gdb.register(RIP) == d.symbols["there"]
            assert gdb.ask(f"Z0,{d.symbols['here']:x},1") == "OK"
        assert gdb.ask("vCont;c") == "W01"
    assert d.end() == PASSED


def test_what_stopped_it_is_told_to_who_wants_to_know(debug: Debug) -> None:
    d = debug(LOOP)
    with d.client() as gdb:
        supported = gdb.ask("qSupported:multiprocess+;swbreak+;hwbreak+;xmlRegisters=i386")
        assert "PacketSize=4000" in supported
        assert gdb.ask(f"Z0,{d.symbols['here']:x},1") == "OK"
        assert gdb.ask("vCont;c") == "T05thread:1;swbreak:;"
        assert gdb.ask(f"z0,{d.symbols['here']:x},1") == "OK"
        assert gdb.ask(f"Z2,{d.symbols['count']:x},4") == "OK"
        assert gdb.ask("vCont;c") == f"T05thread:1;watch:{d.symbols['count']:x};"
        assert gdb.register(RIP) == d.symbols["after"]
        assert gdb.memory(d.symbols["count"], 4) == (4).to_bytes(4, "little")
        assert gdb.ask("vCont;s:1") == "T05thread:1;"
        assert gdb.ask(f"z2,{d.symbols['count']:x},4") == "OK"
        assert gdb.ask("vCont;c") == "W01"


@pytest.mark.native
def test_hardware_breakpoints_and_when_there_are_no_more(debug: Debug) -> None:
    """The lab's emulated processor heeds no debug registers of its guests' guests."""
    d = debug(LOOP)
    with d.client() as gdb:
        gdb.ask("qSupported:swbreak+;hwbreak+")
        assert gdb.ask(f"Z1,{d.symbols['there']:x},1") == "OK"
        assert gdb.ask("vCont;c") == "T05thread:1;hwbreak:;"
        assert gdb.register(RIP) == d.symbols["there"]
        for n in range(3):
            assert gdb.ask(f"Z1,{0x5000 + n:x},1") == "OK"
        assert gdb.ask("Z1,6000,1").startswith("E.a processor has 4 hardware breakpoints")
        # The embedder's are beside them, of the same four.
        with pytest.raises(ConfigError, match="of which a debugger has 4"):
            d.machine.cpus[0].breakpoints = {1}
        assert gdb.ask("D") == "OK"
    assert d.end() == PASSED


@pytest.mark.native
def test_where_no_memory_is_yet_a_breakpoint_is_a_hardware_one(debug: Debug) -> None:
    d = debug(LOOP)
    with d.client() as gdb:
        assert gdb.ask("Z0,ffffffff81000000,1") == "OK"
        assert d.machine.cpus[0].debug_points == [(0, 0xFFFF_FFFF_8100_0000, 1)]
        assert gdb.ask("z0,ffffffff81000000,1") == "OK"
        assert d.machine.cpus[0].debug_points == []


def test_it_is_interrupted_at_any_moment(debug: Debug) -> None:
    d = debug(ENDLESS)
    with d.client() as gdb:
        gdb.no_ack()
        for _ in range(50):
            gdb.send("vCont;c")
            gdb.interrupt()
            assert gdb.reply() == "T02thread:1;"
            assert d.machine.state is RunState.PAUSED
        # Nobody waits for a stop any more.
        gdb.interrupt()
        assert gdb.ask("qAttached") == "1"


def test_a_debugger_that_comes_stops_it_and_one_that_leaves_lets_it_go(debug: Debug) -> None:
    d = debug(ENDLESS, wait=False)
    device = Recorder()
    d.machine.pio.map(PORT, 1, device)
    device.wait_for(1)
    for _ in range(2):
        with d.client() as gdb:
            assert gdb.ask("?") == "T05thread:1;"
            assert d.machine.state is RunState.PAUSED
            assert gdb.ask(f"Z0,{d.symbols['here']:x},1") == "OK"
            assert gdb.ask("D") == "OK"
        calls = len(device.log)
        device.wait_for(calls + 1)  # no breakpoint is there any more
    assert d.ended == []


@pytest.mark.parametrize("stopped", [True, False])
def test_one_that_leaves_without_a_word(debug: Debug, stopped: bool) -> None:
    """Its breakpoints go with it. A machine that stands waits for another debugger, one that runs goes on."""
    d = debug(ENDLESS)
    device = Recorder()
    d.machine.pio.map(PORT, 1, device)
    with d.client() as gdb:
        assert gdb.ask(f"Z0,{d.symbols['here']:x},1") == "OK"
        assert gdb.ask("vCont;c") == "T05thread:1;"
        if not stopped:
            assert gdb.ask(f"z0,{d.symbols['here']:x},1") == "OK"
            assert gdb.ask(f"Z0,{d.guest.program.address:x},1") == "OK"
            gdb.send("vCont;c")
            device.wait_for(1)
    with d.client() as gdb:
        # It is served when the one before it is gone for good.
        assert gdb.ask("?") == "T05thread:1;"
        here, address = d.symbols["here"], d.guest.program.address
        assert gdb.memory(address, here + 1 - address) == d.guest.program.image[: here + 1 - address]
        assert d.machine.cpus[0].debug_points == []
        assert d.ended == []
        assert gdb.ask("D") == "OK"
    device.wait_for(len(device.log) + 1)


def test_the_machine_goes_on_while_its_debugger_is_away(debug: Debug) -> None:
    d = debug(ENDLESS)
    device = Recorder()
    d.machine.pio.map(PORT, 1, device)
    gdb = d.client()
    gdb.send("vCont;c")
    device.wait_for(1)
    gdb.close()
    device.wait_for(len(device.log) + 5)
    # It is its owner's again.
    while d.machine.control.held:
        device.wait_for(len(device.log) + 1)
    d.machine.pause()
    assert d.end() == 12


def test_kill(debug: Debug) -> None:
    d = debug(ENDLESS)
    with d.client() as gdb:
        gdb.send("k")
        assert gdb.gone()
    assert (d.end(), d.machine.status.reason) == (0, "killed")  # type: ignore[union-attr]


@pytest.mark.native
def test_a_guest_that_fails_can_be_looked_at(debug: Debug) -> None:
    d = debug("mov $7, %ebx\n there: lock; incl %eax\n")  # an exception without a table of handlers: a triple fault
    with d.client() as gdb:
        gdb.ask("qSupported:swbreak+")
        assert gdb.ask(f"Z0,{d.symbols['there']:x},1") == "OK"
        # The machine resets itself at the fault: the breakpoint is there again.
        for _ in range(3):
            assert gdb.ask("vCont;c") == "T05thread:1;swbreak:;"
            assert gdb.register(RBX) == 7
            assert gdb.ask(f"z0,{d.symbols['there']:x},1") == "OK"
            assert gdb.ask(f"Z0,{d.symbols['there']:x},1") == "OK"
            d.machine.reset()
            assert gdb.register(RIP) == d.guest.program.address


@pytest.mark.native
def test_a_failure_waits_for_the_debugger(debug: Debug) -> None:
    """Software KVM has no int3 in long mode, but for a debugger's."""
    d = debug("nop\n there: int3\n")
    with d.client() as gdb:
        assert gdb.ask("vCont;c") == "T06thread:1;"
        assert d.machine.state is RunState.INTERNAL_ERROR
        assert gdb.register(RIP) == d.symbols["there"]
        assert gdb.ask("vCont;c") == "T06thread:1;"  # it can't
        assert d.ended == []
        assert gdb.ask("D") == "OK"
    assert isinstance(d.end(), GuestError)


def test_two_vcpus(debug: Debug) -> None:
    """One stops: all stop. And each does what its thread is told."""
    d = debug(SPIN_ON_BOTH, cpus=2)
    device = Recorder()
    d.machine.pio.map(PORT, 1, device)
    with d.client() as gdb:
        assert gdb.ask("qfThreadInfo") == "m1,2"
        assert gdb.ask("qsThreadInfo") == "l"
        gdb.send("vCont;c")
        device.wait_for(1)
        gdb.interrupt()
        assert gdb.reply().startswith("T02thread:")
        rips = []
        for thread in (1, 2):
            assert gdb.ask(f"T{thread}") == "OK"
            assert gdb.ask(f"Hg{thread}") == "OK"
            rips.append(gdb.register(RIP))
            assert gdb.ask("qC") == f"QC{thread}"
        # Only the one steps.
        assert gdb.ask("vCont;s:2") == "T05thread:2;"
        assert gdb.register(RIP) != rips[1]
        assert gdb.ask("Hg1") == "OK"
        assert gdb.register(RIP) == rips[0]
        assert gdb.ask("T3") == gdb.ask("Hg3") == "E22"
        # The other one runs meanwhile.
        assert gdb.ask("vCont;s:2;c") == "T05thread:2;"
        assert d.machine.cpus[0].parked
        name = bytes.fromhex(gdb.ask("qThreadExtraInfo,2")).decode()
        assert name.startswith("CPU#1 [")


def test_registers(debug: Debug) -> None:
    d = debug("mov %cr4, %rax\n or $0x200, %eax\n mov %rax, %cr4\n movdqa %xmm1, %xmm2\n next: nop\n finish")
    with d.client() as gdb:
        registers = bytes.fromhex(gdb.ask("g"))
        numbers = {r.name: n for n, r in enumerate(d.server.registers.table)}
        assert len(registers) == d.server.registers.size_bytes
        assert gdb.ask(f"P{numbers['xmm1']:x}=" + bytes(range(16)).hex()) == "OK"
        assert gdb.ask(f"P{numbers['rbx']:x}=" + (0x1122334455667788).to_bytes(8, "little").hex()) == "OK"
        assert gdb.ask(f"Z0,{d.symbols['next']:x},1") == "OK"
        gdb.ask("vCont;c")
        assert gdb.register(numbers["xmm2"]).to_bytes(16, "little") == bytes(range(16))
        pi = 0x4000_C90F_DAA2_2168_C235
        assert gdb.ask(f"P{numbers['st0']:x}=" + pi.to_bytes(10, "little").hex()) == "OK"
        assert gdb.register(numbers["st0"]) == pi
        assert d.machine.cpus[0].regs["rbx"] == 0x1122334455667788
        assert gdb.register(numbers["cr3"]) == d.machine.cpus[0].sregs["cr3"]
        assert gdb.register(numbers["efer"]) & 0x400
        # All of them back as they were, but one.
        now = bytearray.fromhex(gdb.ask("g"))
        now[8:16] = bytes(8)
        assert gdb.ask("G" + now.hex()) == "OK"
        assert d.machine.cpus[0].regs["rbx"] == 0
        assert gdb.ask("G00") == gdb.ask("p1000") == gdb.ask("P0=00") == "E22"


def test_memory_by_linear_and_physical_address(debug: Debug) -> None:
    d = debug(LOOP, machine="pc", memory_mib=16)
    address = d.guest.program.address
    with d.client() as gdb:
        assert gdb.memory(address, 8) == d.guest.program.image[:8]
        assert gdb.ask("m7fffffffffff,1") == gdb.ask("mffff800000000000,4") == "E14"
        assert gdb.ask("qqemu.PhyMemMode") == "0"
        assert gdb.ask("Qqemu.PhyMemMode:1") == "OK"
        assert gdb.ask("qqemu.PhyMemMode") == "1"
        assert gdb.memory(address, 8) == d.guest.program.image[:8]
        assert gdb.memory(1 << 40, 8) == b"\xff" * 8
        assert gdb.ask("Qqemu.PhyMemMode:0") == "OK"
        assert gdb.ask(f"M{d.symbols['count']:x},4:00010203") == "OK"
        assert gdb.ask(f"X{d.symbols['count']:x},4:".encode() + b"}\x03}\x04\x00\x01") == "OK"
        assert d.guest.bytes_at("count", 4) == b"\x23\x24\x00\x01"
        assert gdb.ask(f"X{d.symbols['count']:x},0:") == "OK"
        assert gdb.ask("M0,4:00") == gdb.ask("mzz,1") == gdb.ask("m0") == "E22"


@pytest.mark.native
def test_breakpoints_are_not_seen_in_memory(debug: Debug) -> None:
    d = debug(LOOP)
    here = d.symbols["here"]
    image = d.guest.program.image[here - d.guest.program.address :]
    with d.client() as gdb:
        assert gdb.ask(f"Z0,{here:x},1") == "OK"
        assert d.machine.memory.read(here, 1) != image[:1]
        assert gdb.memory(here, 4) == image[:4]
        # Another instruction of one byte in its place: what is written is there when the breakpoint is gone.
        assert gdb.ask(f"M{here:x},1:90") == "OK"
        assert gdb.memory(here, 1) == b"\x90"
        assert gdb.ask("vCont;c") == "T05thread:1;"
        assert gdb.register(RIP) == here
        assert gdb.ask(f"z0,{here:x},1") == "OK"
        assert d.machine.memory.read(here, 1) == b"\x90"


def test_a_snapshot_has_none(debug: Debug, tmp_path: Path) -> None:
    """Whether it is taken of a machine that runs or stands; the machine itself keeps them."""
    d = debug(LOOP.replace("jnz", "jmp"))
    with d.client() as gdb:
        assert gdb.ask(f"Z0,{d.guest.program.address:x},1") == "OK"
        assert gdb.ask("vCont;c") == "T05thread:1;"
        patched = d.machine.memory.read(d.guest.program.address, 1)
        assert gdb.ask(f"z0,{d.guest.program.address:x},1") == "OK"
        d.machine.save(tmp_path / "stands")
        assert gdb.ask(f"Z0,{d.guest.program.address:x},1") == "OK"
        gdb.send("vCont;c")
        gdb.interrupt()
        stop = gdb.reply()
        assert stop[:3] in ("T02", "T05")
        d.machine.save(tmp_path / "with")
        assert d.machine.memory.read(d.guest.program.address, 1) == patched
        code = d.guest.program.image[: d.symbols["count"] - d.guest.program.address]
        for name in ("stands", "with"):
            with Machine.restore(tmp_path / name) as copy:
                assert copy.memory.read(d.guest.program.address, len(code)) == code


@pytest.mark.native
def test_a_snapshot_of_a_running_machine_has_none(debug: Debug, tmp_path: Path) -> None:
    d = debug(ENDLESS + "\n never: nop")
    device = Recorder()
    d.machine.pio.map(PORT, 1, device)
    never, address = d.symbols["never"], d.guest.program.address
    with d.client() as gdb:
        assert gdb.ask(f"Z0,{never:x},1") == "OK"
        gdb.send("vCont;c")
        device.wait_for(1)
        d.machine.save(tmp_path / "running")
        device.wait_for(len(device.log) + 1)
        patched = d.machine.memory.read(never, 1)
        gdb.interrupt()
        assert gdb.reply() == "T02thread:1;"
    assert patched != b"\x90"
    with Machine.restore(tmp_path / "running") as copy:
        code = copy.memory.read(address, never + 1 - address)
        assert code == d.guest.program.image[: never + 1 - address]


def test_nothing_is_looked_at_while_it_runs(debug: Debug) -> None:
    """Not even by a client that does not wait for the machine to stop."""
    d = debug(ENDLESS)
    device = Recorder()
    d.machine.pio.map(PORT, 1, device)
    with d.client() as gdb:
        gdb.no_ack()
        gdb.send("vCont;c")
        device.wait_for(1)
        for packet in ("g", "p0", "m1000,4", "M1000,1:00", "Z0,1000,1", "z0,1000,1", "Z1,1000,1", "P0=" + "00" * 8):
            assert gdb.ask(packet) == "E01", packet
        assert gdb.ask("D") == "OK"
    device.wait_for(len(device.log) + 1)


def test_one_that_came_and_went_before_the_beginning(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot("finish")
    guest.machine.serve_gdb(tmp_path / "gdb")
    with GdbClient(tmp_path / "gdb") as gdb:
        assert gdb.ask("?") == "T05thread:1;"
        ended: list[int] = []
        thread = threading.Thread(target=lambda: ended.append(guest.run()))
        thread.start()
        assert gdb.ask("qAttached") == "1"
    thread.join(TIMEOUT_S)
    assert ended == [PASSED]


def test_at_a_reset_breakpoints_stay(debug: Debug) -> None:
    d = debug("mov $DEVICE_PORT, %edx\n outb %al, %dx\n here: mov $6, %al\n mov $0xcf9, %dx\n outb %al, %dx\n hlt")
    device = Recorder()
    d.machine.pio.map(PORT, 1, device)
    with d.client() as gdb:
        assert gdb.ask(f"Z0,{d.guest.program.address:x},1") == "OK"
        assert gdb.ask("vCont;c") == "T05thread:1;"
        for n in range(1, 4):
            assert gdb.ask(f"z0,{d.guest.program.address:x},1") == "OK"
            assert gdb.ask("vCont;s:1") == "T05thread:1;"
            assert gdb.ask(f"Z0,{d.guest.program.address:x},1") == "OK"
            # The guest resets itself, and comes to its first instruction again.
            assert gdb.ask("vCont;c") == "T05thread:1;"
            assert (gdb.register(RIP), device.resets) == (d.guest.program.address, n)
        assert "reset" in gdb.monitor("reset")
        assert gdb.register(RIP) == d.guest.program.address


def test_steps_hold_interrupts_or_do_not(debug: Debug) -> None:
    d = debug(LOOP)
    with d.client() as gdb:
        known = gdb.ask("qqemu.sstepbits")
        assert known in ("ENABLE=1,NOIRQ=2", "ENABLE=1")
        assert gdb.ask("Qqemu.sstep=1") == "OK"
        assert gdb.ask("qqemu.sstep") == "0x1"
        assert gdb.ask("vCont;s:1") == "T05thread:1;"
        assert gdb.ask("Qqemu.sstep=4") == gdb.ask("Qqemu.sstep=x") == "E22"
        assert gdb.ask("Qqemu.sstep=0x3") == ("OK" if "NOIRQ" in known else "E22")
        # Without ENABLE a step is none.
        assert gdb.ask("Qqemu.sstep=0") == "OK"
        assert gdb.ask("vCont;s:1") == "W01"


def test_garbage_harms_nobody(debug: Debug) -> None:
    d = debug(ENDLESS)
    with d.client() as gdb:
        for packet in ("", "vMustReplyEmpty", "vCont;x", "vCont", "QNonStop:1", "vAttach;1", "!", "qFoo", "Z9,0,0"):
            assert gdb.ask(packet) in ("", "E22"), packet
        for packet in ("Z0", "Z0,1", "Z0,x,1", "z0,,", "H", "Hx1", "Hgzz", "G", "P", "Pzz=1", "m", "m1", "M1,1"):
            assert gdb.ask(packet).startswith("E"), packet
        gdb.socket.sendall(b"noise \xff\x00 $m0,4#00")
        assert gdb.byte() == b"-"
        gdb.socket.sendall(b"$" + b"x" * 100_000 + b"#00")
        assert gdb.byte() == b"-"
        assert gdb.ask("qAttached") == "1"
        gdb.socket.sendall(b"-")
        assert gdb.reply() == "1"
    assert d.ended == []


def test_one_that_does_not_read_holds_up_itself_only(debug: Debug) -> None:
    d = debug(ENDLESS)
    with d.client() as gdb:
        gdb.no_ack()
        gdb.socket.settimeout(0.5)
        sent, packet = 0, b"$g#67" * 1000
        with pytest.raises(TimeoutError):
            while sent < 1 << 28:
                sent += gdb.socket.send(packet)
        assert d.machine.state is RunState.PRELAUNCH
    with d.client() as gdb:
        assert gdb.ask("?") == "T05thread:1;"


def test_a_machine_that_is_closed_meanwhile(debug: Debug) -> None:
    d = debug(ENDLESS)
    gdb = d.client()
    gdb.no_ack()
    gdb.send("vCont;c")
    d.machine.close()
    with pytest.raises(ConnectionError):
        gdb.reply()
    assert isinstance(d.end(), (StateError, int))
    assert not d.path.exists()


def test_where_it_can_t_be(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot("finish")
    machine = guest.machine
    wrong: list[Any] = ["", 1 << 20, -1, b"\xff" * 200, tmp_path / "no" / "where", None, 1.5, True]
    for where in wrong:
        with pytest.raises(ConfigError):
            machine.serve_gdb(where)
    assert guest.run() == PASSED  # none of them holds it
    server = machine.serve_gdb(0)
    assert isinstance(server.where, int)
    with pytest.raises(ConfigError, match="already"):
        machine.serve_gdb(tmp_path / "second")
    server.close()
    machine.serve_gdb(tmp_path / "third").close()
    with Machine(accel="qtest", flat=b"\xf4") as board, pytest.raises(StateError, match="no vCPU"):
        board.serve_gdb(0)


def test_run_gives_up_in_time(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot("finish")
    server = guest.machine.serve_gdb(tmp_path / "gdb", wait=True)
    with pytest.raises(TimeoutError):
        guest.machine.run(0.2)
    with pytest.raises(StateError, match="debugger"):
        guest.machine.cpus[0].step()
    server.close()
    assert guest.run() == PASSED


def test_debuggers_without_number(debug: Debug) -> None:
    d = debug(ENDLESS, wait=False)
    for n in range(50):
        gdb = d.client()
        if n % 2:
            gdb.send("?")
        gdb.close()
    with d.client() as gdb:
        assert gdb.ask("?") == "T05thread:1;"
        assert gdb.ask("D") == "OK"
    assert d.ended == []
