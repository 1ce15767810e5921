"""Packets and buffers without sense to a vsock device, and clients and programs without sense at its host's end.

    python tests/fuzz/virtio_vsock.py [--cases N] [--seed N]     so many inputs by a generator
    python tests/fuzz/fuzz_virtio_vsock.py [libFuzzer options]   the same target, fed by atheris

Nothing may raise, and the device comes to rest after whatever was done to it. It breaks for nothing but a packet that
ends too early and a buffer without room for a header; what it keeps is bounded; and when all have gone nothing of them
is left. What a stream carries is the beginning of what was sent, at either end.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "virtio"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.cases import arguments, run_choices
from fuzz.guest import Choices, NoMoreChoices
from vsock_bench import CID, VsockBench, header

from pyvmm.devices.virtio import vsock_packet as p
from pyvmm.devices.virtio.vsock import BATCH, MOST_REPLIES
from pyvmm.devices.virtio.vsock_callers import MOST_CALLERS
from pyvmm.devices.virtio.vsock_connection import BUFFER_BYTES

PORT = 80  # where a program listens
PORTS = (PORT, PORT, PORT, 81, 0, 1 << 30, (1 << 30) + 1, (1 << 30) + 2, 0xFFFF_FFFF)
GUEST_PORTS = (1, 1, 1, 2, 3, 0xFFFF_FFFF)
OPS = (1, 1, 2, 2, 3, 4, 4, 5, 5, 5, 5, 6, 7, 0, 8, 0xFFFF)
KINDS = (1,) * 12 + (0, 2, 0xFFFF)
CIDS = (CID,) * 12 + (0, 2, CID + 1, 1 << 32 | CID, (1 << 64) - 1)
TO_CIDS = (2,) * 12 + (0, 1, CID, 1 << 32 | 2)
ROOMS = (1 << 18, 1 << 18, 1 << 18, 0, 1, 5000, 0xFFFF_FFFF)
COUNTS = (0, 0, 0, 1, 4096, 1 << 16, 0x7FFF_FFFF, 0xFFFF_FFFF)
SIZES = (0, 1, 3, 43, 44, 45, 100, 4052, 4096, 20_000, 65_536)
LINES = (b"CONNECT 1\n", b"CONNECT 2\n", b"CONNECT 1\nahead", b"CONNECT", b" 3\n", b"x\n", b"CONNECT 9999999999\n", b"")
LIMIT = 8  # connections
MOST_STEPS = 60
RENEW_EVERY = 100  # inputs
# How often each happens.
STEPS = ("send",) * 8 + ("give", "say", "call") * 2 + ("hear", "line", "hang_up", "shut", "events", "reset")


class Target:
    """``ring``: the layout of the queues, as VsockBench has it."""

    def __init__(self, **ring: bool) -> None:
        self.ring = ring
        self.cases = self.opened = self.packets = 0
        self.bench: VsockBench | None = None
        self.folder = tempfile.TemporaryDirectory(prefix="pyvmm-fuzz-")

    def renew(self) -> VsockBench:
        self.end()
        self.bench = bench = VsockBench(Path(self.folder.name) / "vm.sock", ring=self.ring, connections=LIMIT)
        self.listener = bench.listen(PORT)
        self.listener.setblocking(False)
        self.ends: list[socket.socket] = []
        self.may_break = False
        return bench

    def end(self) -> None:
        """All go away: nothing is left, of a bench that is not renewed because its device broke."""
        bench, self.bench = self.bench, None
        if bench is None:
            return
        self.opened += bench.device.stats["opened"]
        self.packets += bench.device.stats["received"]
        self.accept()
        for end in self.ends:
            end.close()
        with bench.device.lock:
            bench.device.write_status(0)
        bench.io.settle()
        assert bench.device.connections == 0
        assert not bench.io.writers
        assert len(bench.io.readers) == len(bench.device.queues)
        self.listener.close()
        os.unlink(f"{bench.path}_{PORT}")
        bench.close()

    def close(self) -> None:
        self.end()
        self.folder.cleanup()

    def accept(self) -> None:
        try:
            while True:
                end, _ = self.listener.accept()
                end.setblocking(False)
                self.ends.append(end)
        except BlockingIOError:
            pass

    def __call__(self, choices: Choices) -> None:
        bench = self.bench
        if bench is None or bench.device.faults or self.cases % RENEW_EVERY == 0:
            bench = self.renew()
        self.cases += 1
        try:
            for _ in range(MOST_STEPS):
                getattr(self, choices.pick(STEPS))(bench, choices)
                self.check(bench)
                if bench.device.faults:
                    break
        except NoMoreChoices:
            pass

    def check(self, bench: VsockBench) -> None:
        device = bench.device
        assert self.may_break or not device.faults, device.fault
        bench.io.settle()
        assert bench.io.turn() == 0
        assert device.connections <= LIMIT
        assert len(device._line) <= len(device._connections) <= 2 * LIMIT
        assert len(device._replies) <= MOST_REPLIES + BATCH + LIMIT
        assert all(len(callers) <= MOST_CALLERS for callers in device._callers)
        for connection in (*device._connections.values(), *device._lingering.values()):
            assert len(connection._kept) <= BUFFER_BYTES
        self.accept()

    # -- the guest -----------------------------------------------------------------------------------------------------

    def send(self, bench: VsockBench, choices: Choices) -> None:
        """One to four packets at once."""
        for _ in range(1 + choices.below(4)):
            if bench.tx.free < 8:
                break
            data = bytes(choices.pick(SIZES)) if choices.chance(50) else b""
            op = choices.pick(OPS)
            size = len(data) if op == p.OP_RW and not choices.chance(3) else choices.pick((0, len(data) // 2))
            if not choices.below(500):
                size += 1
            whole = header(
                op,
                choices.pick(PORTS),
                choices.pick(GUEST_PORTS),
                size=size,
                kind=choices.pick(KINDS),
                cid=choices.pick(CIDS),
                to_cid=choices.pick(TO_CIDS),
                flags=choices.below(8),
                room=choices.pick(ROOMS),
                forwarded=choices.pick(COUNTS),
            )
            whole += data
            if not choices.below(500):
                whole = whole[: choices.below(60)]
            self.may_break |= len(whole) < p.HEADER_BYTES + size
            cut = choices.pick(SIZES)
            pieces = [piece for piece in (whole[:cut], whole[cut:]) if piece]
            if pieces:
                bench.tx.add(pieces)
        bench.kick(bench.tx)
        bench.tx.used()

    def give(self, bench: VsockBench, choices: Choices) -> None:
        """What has come, and buffers in its place."""
        for packet in bench.packets(refill=False):
            assert packet.dst_cid == CID
            assert packet.op in range(1, 8)
        while len(bench.given) < 60 and bench.rx.free > 4:
            sizes = choices.pick(([4096], [44, 4096], [10, 4000], [44], [45], [40, 40]))
            if not choices.below(1000):
                sizes = [choices.below(46) + 1]
                self.may_break |= sizes[0] < p.HEADER_BYTES
            bench.given[bench.rx.add([], sizes)] = None
        bench.kick(bench.rx)

    def events(self, bench: VsockBench, choices: Choices) -> None:
        if bench.events.free:
            bench.events.add([], [choices.pick((4, 4, 1, 100))])
            bench.kick(bench.events)

    def reset(self, bench: VsockBench, choices: Choices) -> None:
        if choices.chance(20):
            with bench.device.lock:
                bench.device.write_status(0)
            bench.io.settle()
            bench.start()

    # -- the host ------------------------------------------------------------------------------------------------------

    def say(self, bench: VsockBench, choices: Choices) -> None:
        if self.ends:
            try:
                choices.pick(self.ends).send(bytes(choices.pick(SIZES)))
            except OSError:
                pass

    def hear(self, bench: VsockBench, choices: Choices) -> None:
        for end in self.ends:
            try:
                end.recv(choices.pick(SIZES))
            except OSError:
                pass

    def call(self, bench: VsockBench, choices: Choices) -> None:
        end = socket.socket(socket.AF_UNIX)
        end.setblocking(False)
        try:
            end.connect(str(bench.path))
            end.send(choices.pick(LINES))
        except BlockingIOError:
            end.close()  # more wait than there is room for
        else:
            self.ends.append(end)

    def line(self, bench: VsockBench, choices: Choices) -> None:
        if self.ends:
            try:
                choices.pick(self.ends).send(choices.pick(LINES))
            except OSError:
                pass

    def hang_up(self, bench: VsockBench, choices: Choices) -> None:
        if self.ends:
            self.ends.pop(choices.below(len(self.ends))).close()

    def shut(self, bench: VsockBench, choices: Choices) -> None:
        if self.ends:
            try:
                choices.pick(self.ends).shutdown(choices.pick((socket.SHUT_RD, socket.SHUT_WR)))
            except OSError:
                pass


def run(cases: int, seed: int, **ring: bool) -> tuple[int, int]:
    """So many inputs; how many connections there were, and how many packets of the guest's."""
    target = Target(**ring)
    run_choices(target, cases, seed, ring)
    return target.opened, target.packets


def main() -> None:
    args = arguments(__doc__, cases=2000).parse_args()
    for packed in (False, True):
        opened, packets = run(args.cases, args.seed, packed=packed, event_idx=True)
        print(f"packed={packed}: {args.cases} inputs, {opened} connections, {packets} packets")


if __name__ == "__main__":
    main()
