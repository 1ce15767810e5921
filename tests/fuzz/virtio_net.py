"""Frames, headers and commands without sense to a network card on virtio, and a peer without sense at its other end.

    python tests/fuzz/virtio_net.py [--cases N] [--seed N]     so many inputs by a generator
    python tests/fuzz/fuzz_virtio_net.py [libFuzzer options]   the same target, fed by atheris

Nothing may raise. What the guest gets is what the peer sent, and the other way round, whole and in order, some of it
left out; a card breaks for nothing but a frame without its header, a buffer without room, a command without answer.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "virtio"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.cases import arguments, run_choices
from fuzz.guest import Choices, NoMoreChoices
from net_bench import ALL, HEADER_BYTES, MAC, NetBench

from pyvmm.devices.virtio.net_features import F_MQ, F_MRG_RXBUF

SIZES = (1, 2, 9, 10, 11, 12, 13, 14, 25, 26, 27, 60, 512, 1514, 1518, 1519, 4096, 9000, 40000)
FLAGS = (0, 0, 1, 1, 2, 255)
GSO = (0, 0, 0, 1, 3, 4, 5, 0x80, 0x81, 0x84, 0x85, 255)
WORDS = (0, 1, 14, 34, 54, 1400, 65535)
ADDRESSES = (MAC, b"\xff" * 6, b"\x33\x33\0\0\0\1", b"\2\0\0\0\0\x77")
MOST_STEPS = 40
RENEW_EVERY = 200  # inputs


class Target:
    """``kind`` of port, and the ring's layout, as NetBench has them."""

    def __init__(self, kind: str, **ring: bool) -> None:
        self.kind, self.ring = kind, ring
        self.cases = self.frames = self.commands = 0
        self.bench: NetBench | None = None

    def renew(self) -> NetBench:
        self.close()
        features = ALL & ~F_MQ if self.cases % 2 else ALL & ~(F_MQ | F_MRG_RXBUF)
        self.bench = NetBench(self.kind, take=features, ring=self.ring, mtu=1500, sizes=(64, 64))
        self.may_break = False
        self.came: list[bytes] = []
        self.sent: list[bytes] = []
        return self.bench

    def close(self) -> None:
        if self.bench is not None:
            self.frames += self.bench.card.stats["sent"] + self.bench.card.stats["received"]
            self.bench.close()
            self.bench = None

    def __call__(self, choices: Choices) -> None:
        bench = self.bench
        if bench is None or bench.card.faults or not bench.backend.connected or self.cases % RENEW_EVERY == 0:
            bench = self.renew()
        self.cases += 1
        try:
            for _ in range(MOST_STEPS):
                getattr(self, choices.pick(("send", "give", "come", "come", "command", "reset")))(bench, choices)
                if bench.card.faults or not bench.backend.connected:
                    break
        except NoMoreChoices:
            pass
        assert self.may_break or not bench.card.faults, bench.card.fault
        self.check(bench)

    def check(self, bench: NetBench) -> None:
        """What arrived is a subsequence of what was sent."""
        tap = self.kind == "tap"
        if bench.card.faults or not bench.backend.connected:
            return
        for got, sent in (
            ([data for _, data in bench.received()], self.came),
            ([data[HEADER_BYTES * tap :] for data in bench.went()], self.sent),
        ):
            left = iter(sent)
            for data in got:
                assert any(data == one for one in left), f"{len(data)} bytes that nobody has sent"
            # Those that are on their way still may come next time.
        bench.tx[0].used()
        bench.control.used()
        self.came, self.sent = self.came[-500:], self.sent[-500:]

    def pieces(self, choices: Choices, data: bytes) -> list[bytes]:
        cut = choices.pick(SIZES)
        return [piece for piece in (data[:cut], data[cut:]) if piece]

    def header(self, choices: Choices) -> bytes:
        words = [choices.pick(WORDS) for _ in range(5)]
        return bytes([choices.pick(FLAGS), choices.pick(GSO)]) + b"".join(word.to_bytes(2, "little") for word in words)

    def frame(self, choices: Choices) -> bytes:
        size = choices.pick(SIZES)
        return (choices.pick(ADDRESSES) + bytes([choices.below(256)]) * size)[:size]

    def send(self, bench: NetBench, choices: Choices) -> None:
        data = self.header(choices) + self.frame(choices)
        if choices.chance(3):
            data = data[: choices.below(16)]
        pieces = self.pieces(choices, data)
        if not pieces or bench.tx[0].free < 4:
            return
        self.may_break |= len(data) < HEADER_BYTES
        self.sent.append(data[HEADER_BYTES:])
        bench.tx[0].add(pieces, [choices.pick(SIZES)] if choices.chance(5) else [])
        bench.serve(bench.tx[0])

    def give(self, bench: NetBench, choices: Choices) -> None:
        for _ in range(1 + choices.below(8)):
            if bench.rx[0].free < 4:
                return
            sizes = [choices.pick(SIZES[5:]), *([choices.pick(SIZES)] if choices.chance(20) else [])]
            if choices.chance(2):
                sizes = [choices.below(12) + 1]
                self.may_break |= sizes[0] < HEADER_BYTES
            bench.given[0][bench.rx[0].add([], sizes)] = None
        bench.serve(bench.rx[0])

    def come(self, bench: NetBench, choices: Choices) -> None:
        frames = [self.frame(choices) for _ in range(1 + choices.below(6))]
        self.came += frames
        try:
            if self.kind == "stream" and choices.chance(1):
                bench.peers[0].sendall(choices.blob(1 + choices.below(9)))
                bench.io.settle()
                bench.backend.close()  # the stream is out of step from here on
                return
            bench.comes(*frames, header=self.header(choices))
        except BlockingIOError:
            if self.kind == "stream":
                bench.backend.close()

    def command(self, bench: NetBench, choices: Choices) -> None:
        self.commands += 1
        data = choices.pick((b"", b"\0", b"\1", b"\0\0", bytes(8), choices.blob(choices.below(20))))
        if choices.chance(20):
            count = choices.pick((0, 1, 2, 64, 65, 0xFFFFFFFF))
            data = count.to_bytes(4, "little") + bytes(6 * min(count, 70)) + data
        whole = self.pieces(choices, bytes([choices.below(8), choices.below(8)]) + data)
        room = [1] if choices.chance(98) else []
        if bench.control.free < 4:
            return
        self.may_break |= not room
        bench.control.add(whole, room)
        bench.serve(bench.control)
        assert bench.card.faults or all(written == 1 for _, written in bench.control.used())

    def reset(self, bench: NetBench, choices: Choices) -> None:
        if not choices.chance(10):
            return
        bench.received()
        with bench.card.lock:
            bench.card.write_status(0)
        bench.start()


def run(kind: str, cases: int, seed: int, **ring: bool) -> tuple[int, int]:
    """So many inputs; how many frames went through, and how many commands there were."""
    target = Target(kind, **ring)
    run_choices(target, cases, seed, f"{kind}, {ring}")
    return target.frames, target.commands


def main() -> None:
    args = arguments(__doc__, cases=2000).parse_args()
    for kind in ("stream", "tap"):
        for packed in (False, True):
            frames, commands = run(kind, args.cases, args.seed, packed=packed, event_idx=True)
            print(f"{kind}, packed={packed}: {args.cases} inputs, {frames} frames, {commands} commands")


if __name__ == "__main__":
    main()
