"""A gdb client that says anything: packets of words that there are, and bytes that are no packets at all.

``one_input`` makes a conversation of any bytes. Nothing may raise, all that comes back is whole packets, and what waits
to be read stays small.
"""

from __future__ import annotations

from gdb_fakes import FakePeer, FakeTarget

from pyvmm.control.gdb.packets import PACKET_BYTES, frame
from pyvmm.control.gdb.session import Session
from pyvmm.control.gdb.target import Stop
from pyvmm.errors import BusError, KvmError, StateError

MOST_BYTES = 4096
# What packets begin with, so that not every one is unknown.
WORDS = (
    *(b"?", b"g", b"G", b"p", b"P", b"m", b"M", b"X", b"c", b"s", b"C", b"S", b"H", b"T", b"Z0,", b"z", b"D", b"k"),
    *(b"vCont;", b"vCont?", b"vKill", b"qSupported:swbreak+;", b"qXfer:features:read:target.xml:", b"qC", b"qAttached"),
    *(b"qfThreadInfo", b"qsThreadInfo", b"qThreadExtraInfo,", b"qRcmd,", b"QStartNoAckMode", b"qqemu.sstep"),
    *(b"Qqemu.sstep=", b"Qqemu.PhyMemMode:", b"vCont;c:", b"vCont;s:1;c", b"m0,", b"X0,1:", b"P10=", b"Z2,10,4"),
)
ERRORS = (BusError("nowhere"), StateError("it runs"), KvmError("KVM_SET_SREGS", 22))


def one_input(data: bytes) -> None:
    """AssertionError where the session is not what it should be; what it raises comes through."""
    target, peer = FakeTarget(), FakePeer()
    session = Session(peer, target)  # type: ignore[arg-type]  # what of a Target it needs
    at = 0
    while at + 2 <= len(data):
        kind, size = data[at], data[at + 1] % 32
        content = data[at + 2 : at + 2 + size]
        at += 2 + size
        if kind < 64:
            session.receive(content)
        elif kind < 224:
            word = WORDS[kind % len(WORDS)]
            session.receive(frame(word + content.replace(b"#", b"").replace(b"$", b"")))
        elif kind < 240:
            target.fails = ERRORS[kind % 3] if kind % 4 else None
        else:
            target.stopped = Stop(5, kind % 2, ("software", "write", "")[kind % 3], size) if kind % 5 else None
            session.look()
        check(session, peer)
    session.gone()


def check(session: Session, peer: FakePeer) -> None:
    assert len(session._reader._pending) <= PACKET_BYTES + MOST_BYTES
    sent = bytes(peer.sent)
    peer.sent.clear()
    while sent:
        if sent[:1] in b"+-":
            sent = sent[1:]
            continue
        body = sent[1:].partition(b"#")[0]
        assert sent.startswith(frame(body)), sent[:80]
        assert len(body) <= PACKET_BYTES
        sent = sent[len(body) + 4 :]
