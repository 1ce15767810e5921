"""The session: packets in, replies out, against a target that is made up."""

from __future__ import annotations

import pytest
from gdb_fakes import FakePeer, FakeTarget

from pyvmm.breakpoints import NoMore
from pyvmm.control.gdb.packets import PACKET_BYTES, frame
from pyvmm.control.gdb.session import Session
from pyvmm.control.gdb.target import Stop, Unsupported
from pyvmm.errors import BusError, KvmError, StateError


class Bench:
    def __init__(self, cpus: int = 2) -> None:
        self.target = FakeTarget(cpus)
        self.peer = FakePeer()
        self.session = Session(self.peer, self.target)  # type: ignore[arg-type]  # what of a Target it needs
        self.session.receive(frame(b"QStartNoAckMode"))
        assert self.taken() == b"+$OK#9a"
        self.target.log.clear()

    def taken(self) -> bytes:
        sent = bytes(self.peer.sent)
        self.peer.sent.clear()
        return sent

    def ask(self, packet: str | bytes) -> str:
        """The reply; "" where it is empty, "none" where there is none."""
        self.session.receive(frame(packet.encode() if isinstance(packet, str) else packet))
        sent = self.taken()
        if not sent:
            return "none"
        assert sent == frame(sent[1:-3])
        return sent[1:-3].decode("latin-1")


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_acknowledgements() -> None:
    target, peer = FakeTarget(), FakePeer()
    session = Session(peer, target)  # type: ignore[arg-type]
    assert target.log == ["attach"]
    session.receive(b"$qAttached#00")
    assert peer.sent == b"-"
    peer.sent.clear()
    session.receive(frame(b"qAttached"))
    assert peer.sent == b"+$1#31"
    peer.sent.clear()
    session.receive(b"-")
    assert peer.sent == b"$1#31"
    peer.sent.clear()
    session.receive(b"+" + frame(b"QStartNoAckMode") + b"+" + frame(b"qAttached") + b"-$x#00")
    assert peer.sent == b"+$OK#9a$1#31"


def test_what_it_can_do(bench: Bench) -> None:
    told = bench.ask("qSupported:multiprocess+;swbreak+;vContSupported+").split(";")
    assert f"PacketSize={PACKET_BYTES:x}" in told
    assert {"QStartNoAckMode+", "qXfer:features:read+", "vContSupported+", "swbreak+", "hwbreak+"} <= set(told)
    assert bench.ask("vCont?") == "vCont;c;C;s;S"
    for unknown in ("vMustReplyEmpty", "qTStatus", "QNonStop:1", "!", "vRun;x", "R00", "qSymbol::", "", "\xff"):
        assert bench.ask(unknown) == "", unknown


def test_the_description_comes_in_parts(bench: Bench) -> None:
    text, whole = b"", bench.target.registers.xml().encode()
    while True:
        reply = bench.ask(b"qXfer:features:read:target.xml:%x,ffb" % len(text)).encode("latin-1")
        assert len(reply) <= PACKET_BYTES
        part = reply[1:].split(b"}")
        text += part[0] + b"".join(bytes((p[0] ^ 0x20,)) + p[1:] for p in part[1:])
        if reply[:1] == b"l":
            break
    assert text == whole
    assert len(bench.ask("qXfer:features:read:target.xml:0,ffffffff")) <= PACKET_BYTES
    assert bench.ask("qXfer:features:read:other.xml:0,100") == "E00"
    assert bench.ask("qXfer:features:read:target.xml:zz,1") == "E22"
    assert bench.ask("qXfer:auxv:read::0,1") == ""


@pytest.mark.parametrize(
    ("packet", "steps"),
    [
        ("c", {0: False, 1: False}),
        ("C05", {0: False, 1: False}),
        ("vCont;c", {0: False, 1: False}),
        ("vCont;c:-1", {0: False, 1: False}),
        ("vCont;C05", {0: False, 1: False}),
        ("s", {0: True}),
        ("vCont;s:2", {1: True}),
        ("vCont;s:2;c", {0: False, 1: True}),
        ("vCont;c:1;s:1", {0: False}),
        ("vCont;S05:1;c:2", {0: True, 1: False}),
        ("vCont;s", {0: True, 1: True}),
    ],
)
def test_going_on(bench: Bench, packet: str, steps: dict[int, bool]) -> None:
    assert bench.ask(packet) == "none"
    assert bench.target.log == [("resume", steps, True)]
    bench.session.look()
    assert bench.taken() == b""  # it runs
    bench.target.stopped = Stop(5, 1, "step")
    bench.session.look()
    assert bench.taken() == frame(b"T05thread:2;")
    bench.session.look()
    assert bench.taken() == b""  # told once
    assert bench.ask("qC") == "QC2"


def test_from_elsewhere(bench: Bench) -> None:
    bench.ask("c1234")
    assert bench.target.log == [("write", 0, {16: 0x1234}), ("resume", {0: False, 1: False}, True)]


@pytest.mark.parametrize("packet", ["vCont", "vCont;", "vCont;x", "vCont;c:9", "vCont;t", "vCont;c;;", "vCont;s:zz"])
def test_actions_that_there_are_not(bench: Bench, packet: str) -> None:
    assert bench.ask(packet) == "E22"
    assert bench.target.log == []


@pytest.mark.parametrize(
    ("stop", "told"),
    [
        (Stop(5, 0, "software", 0x10), "T05thread:1;swbreak:;"),
        (Stop(5, 1, "hardware", 0x10), "T05thread:2;hwbreak:;"),
        (Stop(5, 1, "write", 0xABC), "T05thread:2;watch:abc;"),
        (Stop(5, 0, "access", 0xABC), "T05thread:1;awatch:abc;"),
        (Stop(23, None), "T17thread:1;"),
        (Stop(6, None), "T06thread:1;"),
        (Stop(0, None, status=3), "W03"),
    ],
)
def test_why_it_stopped(bench: Bench, stop: Stop, told: str) -> None:
    bench.ask("qSupported:swbreak+;hwbreak+")
    bench.target.next_stop = stop
    assert bench.ask("vCont;c") == told


def test_those_who_do_not_know_the_words_do_not_get_them(bench: Bench) -> None:
    bench.target.next_stop = Stop(5, 0, "software", 0x10)
    assert bench.ask("c") == "T05thread:1;"


def test_a_guest_that_has_ended_does_not_go_on(bench: Bench) -> None:
    bench.target.stopped = Stop(6, None)
    bench.target.fails = StateError("it has ended")
    assert bench.ask("c") == "T06thread:1;"


def test_an_interrupt(bench: Bench) -> None:
    bench.session.receive(b"\x03")
    assert bench.target.log == []  # it stands
    bench.ask("c")
    bench.session.receive(b"\x03")
    assert bench.taken() == frame(b"T02thread:1;")
    assert bench.target.log[-1] == "interrupt"


def test_the_question_at_the_start(bench: Bench) -> None:
    assert bench.ask("?") == "T05thread:1;"
    assert bench.target.log == ["remove all"]
    bench.target.stopped = None  # somebody else has let it run
    assert bench.ask("?") == "T05thread:1;"
    bench.target.stopped = Stop(0, None, status=0)
    assert bench.ask("?") == "W00"


def test_threads() -> None:
    bench = Bench(cpus=600)
    found, reply = [], bench.ask("qfThreadInfo")
    while reply != "l":
        assert reply[0] == "m"
        found += [int(word, 16) for word in reply[1:].split(",")]
        reply = bench.ask("qsThreadInfo")
    assert found == list(range(1, 601))
    assert bench.ask("Hg258") == bench.ask("T258") == "OK"
    assert bench.ask("qC") == "QC258"
    assert bench.ask("Hc0") == bench.ask("Hg-1") == "OK"
    assert bench.ask("qC") == "QC258"
    assert bench.ask("T259") == bench.ask("Hgxyz") == bench.ask("Hq1") == "E22"
    assert bytes.fromhex(bench.ask("qThreadExtraInfo,3")) == b"CPU#2"


def test_registers(bench: Bench) -> None:
    table = bench.target.registers.table
    data = bytes.fromhex(bench.ask("g"))
    assert len(data) == bench.target.registers.size_bytes
    assert bench.ask("p11") == "11000000"
    changed = bytearray(data)
    changed[0] = 0x77
    assert bench.ask("G" + changed.hex()) == "OK"
    assert bench.ask("G" + data.hex()) == "OK"  # nothing is different
    assert bench.ask("P10=" + (5).to_bytes(8, "little").hex()) == "OK"
    assert bench.target.log == [("write", 0, {0: 0x77}), ("write", 0, {16: 5})]
    for wrong in ("p", "pzz", f"p{len(table):x}", "P10", "P10=00", "P10=zz", "G", "G00", "Gzz", "pffffffffffffffff1"):
        assert bench.ask(wrong) == "E22", wrong


def test_memory(bench: Bench) -> None:
    assert bench.ask("m10,4") == "10111213"
    assert bench.ask("m3ffe,8") == bytes(bench.target.memory[0x3FFE:]).hex()  # as far as there is some
    assert bench.ask("m4000,1") == "E14"
    assert bench.ask("m0,0") == ""
    assert len(bench.ask(f"m0,{PACKET_BYTES // 2 - 16:x}")) <= PACKET_BYTES
    assert bench.ask(f"m0,{PACKET_BYTES:x}") == "E22"
    bench.target.log.clear()
    assert bench.ask("M8,2:abcd") == "OK"
    assert bench.ask(b"X8,3:}\x03:\x00") == "OK"
    assert bench.ask("X0,0:") == "OK"
    assert bench.ask("Qqemu.PhyMemMode:1") == "OK"
    assert bench.ask("M8,1:ff") == "OK"
    assert bench.target.log == [
        ("write", 0, 8, b"\xab\xcd", False),
        ("write", 0, 8, b"#:\x00", False),
        ("write", 0, 8, b"\xff", True),
    ]
    assert bench.ask("qqemu.PhyMemMode") == "1"
    for wrong in ("m", "m1", "m,", "mx,1", "M8,2:ab", "M8,2", "M8,1:g0", "X8,1:", "X8,1", "Qqemu.PhyMemMode:2"):
        assert bench.ask(wrong) == "E22", wrong


def test_breakpoints(bench: Bench) -> None:
    assert bench.ask("Hg2") == bench.ask("Z0,1000,1") == bench.ask("z2,20,8;X1,00") == "OK"
    assert bench.target.log == [("insert", 1, 0, 0x1000, 1), ("remove", 2, 0x20, 8)]
    for wrong in ("Z", "Z0", "Z0,1", "Z0,1,1,1", "Zx,1,1", "z0,-1,1"):
        assert bench.ask(wrong) == "E22", wrong


@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (Unsupported(), ""),
        (NoMore("all are in use: take some away"), "E.all are in use: take some away"),
        (BusError("nothing is there"), "E14"),
        (StateError("it runs"), "E01"),
        (KvmError("KVM_SET_SREGS", 22), "E22"),
    ],
)
def test_errors(bench: Bench, error: Exception, reply: str) -> None:
    bench.target.fails = error
    assert bench.ask("Z0,1000,1") == reply


def test_steps_by_qemus_bits(bench: Bench) -> None:
    assert bench.ask("qqemu.sstepbits") == "ENABLE=1,NOIRQ=2"
    assert bench.ask("qqemu.sstep") == "0x3"
    assert bench.ask("Qqemu.sstep=1") == "OK"
    bench.ask("s")
    bench.target.stopped = Stop(5, 0)
    assert bench.ask("Qqemu.sstep=0x0") == "OK"
    bench.ask("s")
    assert bench.target.log == [("resume", {0: True}, False), ("resume", {0: False}, False)]
    assert bench.ask("Qqemu.sstep=4") == bench.ask("Qqemu.sstep=") == "E22"
    bench.target.holds_interrupts = False
    assert bench.ask("qqemu.sstepbits") == "ENABLE=1"
    assert bench.ask("Qqemu.sstep=3") == "E22"


def test_monitor(bench: Bench) -> None:
    def said(line: str) -> str:
        bench.session.receive(frame(b"qRcmd," + line.encode().hex().encode()))
        *parts, last = bench.taken().split(b"#")[:-1]
        assert last.endswith(b"$OK")
        texts = [part.partition(b"$O")[2] for part in parts]
        assert all(len(text) <= PACKET_BYTES for text in texts)
        return bytes.fromhex(b"".join(texts).decode()).decode()

    assert "nmi" in said("help") == said("")
    assert said(" kvm ") == "made up\n"
    assert "there is no 'quit'" in said("quit")
    assert "vCPU 0" in said("nmi")
    assert 1000 < len(said("dump")) < 1_000_000  # bounded
    bench.target.fails = StateError("not now")
    assert said("reset") == "not now\n"
    assert bench.ask("qRcmd,z") == bench.ask("qRcmd,0") == "E22"


def test_the_end(bench: Bench) -> None:
    assert bench.ask("D") == "OK"
    bench.session.receive(b"+")
    assert not bench.peer.closed
    bench.session.receive(frame(b"g"))
    assert (bench.peer.closed, bench.taken()) == (True, b"")
    bench.session.gone()
    assert bench.target.log == ["detach"]


@pytest.mark.parametrize(("packet", "reply"), [("k", "none"), ("vKill;1", "OK")])
def test_kill(bench: Bench, packet: str, reply: str) -> None:
    assert bench.ask(packet) == reply
    bench.session.gone()
    assert bench.target.log == ["kill"]


def test_gone_without_a_word(bench: Bench) -> None:
    bench.session.gone()
    bench.session.gone()
    assert bench.target.log == ["leave"]


def test_a_client_that_does_not_read_is_not_read(bench: Bench) -> None:
    bench.peer.crowded = True
    bench.session.receive(frame(b"qAttached") * 100)
    assert (bench.peer.held, bench.taken()) == (True, b"")
    bench.peer.crowded = False
    bench.session.roomy()
    assert (bench.peer.held, bench.taken()) == (False, frame(b"1") * 100)
