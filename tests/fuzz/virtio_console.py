"""Buffers, messages and resets without sense to a console on virtio, whose readers are slow when they like.

    python tests/fuzz/virtio_console.py [--cases N] [--seed N]     so many inputs by a generator
    python tests/fuzz/fuzz_virtio_console.py [libFuzzer options]   the same target, fed by atheris

Nothing may raise, and nothing may grow. What a reader gets is what the guest has said, and the other way round, whole
and in order, on whatever machine it goes on; a device breaks for nothing but a buffer in the wrong direction, or one
that a message does not fit.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "virtio"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from console_bench import ConsoleBench, SlowEnd
from fuzz.cases import arguments, run_choices
from fuzz.guest import Choices, NoMoreChoices

from pyvmm.devices.virtio import console_control as control
from pyvmm.devices.virtio.console_port import BATCH, INPUT_BYTES, PIECE_BYTES

SIZES = (1, 2, 7, 8, 12, 64, 500, 4095, 4096, 4097, 70_000)
ROOMS = (1, 100, 5000, 1 << 20)
NUMBERS = (0, 1, 1, 2, 30, 0xFFFF_FFFF)
STEPS = (
    *("say", "say", "read", "read", "feed", "give", "give", "message", "listen"),
    *("resize", "emergency", "wrong", "reset", "move"),
)
MOST_STEPS = 40
RENEW_EVERY = 100  # inputs
MOST_FED = 20_000
# Bytes of a driver that are not out yet: its memory has twice as much, and buffers that come round overwrite others.
MOST_WAITING = 1 << 20


class Target:
    """``ring`` is its layout, as ConsoleBench has it."""

    def __init__(self, **ring: bool) -> None:
        self.ring = ring
        self.cases = self.bytes_said = self.bytes_heard = 0
        self.bench: ConsoleBench | None = None

    def renew(self, choices: Choices) -> ConsoleBench:
        self.close()
        self.ends = [SlowEnd(room=choices.pick(ROOMS)) for _ in range(2)]
        self.bench = bench = ConsoleBench((self.ends[0], None), (self.ends[1], "agent"), ring=self.ring)
        bench.set_up(0, 1)
        self.may_break = False
        self.said, self.fed, self.heard = [b"", b""], [b"", b""], [b"", b""]
        return bench

    def close(self) -> None:
        if self.bench is not None:
            self.bench.close()
            self.bench = None

    def __call__(self, choices: Choices) -> None:
        bench = self.bench
        try:
            if bench is None or bench.device.faults or self.cases % RENEW_EVERY == 0:
                bench = self.renew(choices)
            self.cases += 1
            for _ in range(MOST_STEPS):
                getattr(self, choices.pick(STEPS))(bench, choices)
                self.collect(bench)
                if bench.device.faults:
                    break
        except NoMoreChoices:
            pass
        bench = self.bench
        if bench is not None:
            for n in range(2):  # a fuzzer's input may end in the middle of a step
                bench.device.kick(bench.sending(n).queue)
            self.collect(bench)
            assert self.may_break or not bench.device.faults, bench.device.fault
            self.check(bench)

    def collect(self, bench: ConsoleBench) -> None:
        """As a driver does with what the device is done with."""
        if bench.device.faults:
            return
        bench.io.settle()
        for n in range(2):
            bench.sending(n).used()
            data = bench.heard(n)
            self.heard[n] += data
            self.bytes_heard += len(data)
        bench.told()
        bench.drivers[3].used()

    def check(self, bench: ConsoleBench) -> None:
        for n, port in enumerate(bench.device.ports):
            out = bytes(self.ends[n].said + self.ends[n].data)
            assert self.said[n].startswith(out), "a reader was told what nobody has said"
            assert self.fed[n].startswith(self.heard[n]), "the guest has heard what nobody has said"
            assert len(self.ends[n].data) < self.ends[n].limit + PIECE_BYTES
            state = port.save()
            assert len(state["hand"]) <= BATCH
            assert len(state["input"]) <= INPUT_BYTES
            if not bench.device.faults and self.ends[n].can_write:
                assert out == self.said[n], "it stands, and the reader does not"

    # -- steps -------------------------------------------------------------------------------------------------------

    def say(self, bench: ConsoleBench, choices: Choices) -> None:
        n = choices.below(2)
        driver = bench.sending(n)
        for _ in range(1 + choices.below(5)):
            out = len(self.ends[n].said) + len(self.ends[n].data)
            if driver.free < 6 or len(self.said[n]) - out > MOST_WAITING:
                break
            pieces = [bytes([choices.below(256)]) * choices.pick(SIZES) for _ in range(1 + choices.below(3))]
            self.said[n] += b"".join(pieces)
            self.bytes_said += sum(map(len, pieces))
            driver.add(pieces)
        bench.device.kick(driver.queue)

    def read(self, bench: ConsoleBench, choices: Choices) -> None:
        self.ends[choices.below(2)].read()

    def feed(self, bench: ConsoleBench, choices: Choices) -> None:
        n = choices.below(2)
        if self.ends[n].fed_bytes < MOST_FED:
            data = bytes([choices.below(256)]) * choices.pick(SIZES[:-1])
            self.fed[n] += data
            self.ends[n].feed(data)

    def give(self, bench: ConsoleBench, choices: Choices) -> None:
        n = choices.below(2)
        if bench.receiving(n).free > 6:
            bench.receiving(n).add([], [choices.pick(SIZES[:-1]) for _ in range(1 + choices.below(3))])
            bench.device.kick(bench.receiving(n).queue)

    def message(self, bench: ConsoleBench, choices: Choices) -> None:
        if bench.drivers[3].free > 6:
            message = control.MESSAGE.pack(choices.pick(NUMBERS), choices.below(10), choices.pick((0, 1, 1, 0xFFFF)))
            bench.drivers[3].add([message + choices.blob(choices.below(3))])
            bench.device.kick(bench.drivers[3].queue)

    def listen(self, bench: ConsoleBench, choices: Choices) -> None:
        size = choices.pick((128, 128, 128, 128, 7, 8, 12))
        if bench.drivers[2].free > 6:
            self.may_break |= size < 13  # a header, and what may follow
            bench.drivers[2].add([], [size])
            bench.device.kick(bench.drivers[2].queue)

    def resize(self, bench: ConsoleBench, choices: Choices) -> None:
        self.ends[choices.below(2)].resize(1 + choices.below(200), 1 + choices.below(100))

    def emergency(self, bench: ConsoleBench, choices: Choices) -> None:
        """Only where all is said: else it overtakes what waits."""
        size = choices.pick((1, 2, 4))
        if self.ends[0].can_write and not bench.device.ports[0].save()["hand"]:
            self.said[0] += b"!"
            with bench.device.lock:
                bench.device.write_config(8, size, ord("!"))

    def wrong(self, bench: ConsoleBench, choices: Choices) -> None:
        if not choices.chance(3):
            return
        driver = choices.pick(bench.drivers)
        if driver.free > 6:
            self.may_break = True
            driver.add([b"x"], [5])
            bench.device.kick(driver.queue)

    def reset(self, bench: ConsoleBench, choices: Choices) -> None:
        """What was not out is gone with the driver that said it."""
        if not choices.chance(10):
            return
        with bench.device.lock:
            bench.device.write_status(0)
        self.said = [bytes(end.said + end.data) for end in self.ends]
        bench.start()
        bench.set_up(0, 1)

    def move(self, bench: ConsoleBench, choices: Choices) -> None:
        if choices.chance(20):
            self.ends = bench.move(self.ends)


def run(cases: int, seed: int, **ring: bool) -> tuple[int, int]:
    """So many inputs; how many bytes were said, and how many heard."""
    target = Target(**ring)
    run_choices(target, cases, seed, ring)
    return target.bytes_said, target.bytes_heard


def main() -> None:
    args = arguments(__doc__, cases=2000).parse_args()
    for packed in (False, True):
        said, heard = run(args.cases, args.seed, packed=packed, event_idx=True)
        print(f"packed={packed}: {args.cases} inputs, {said} bytes said, {heard} heard")


if __name__ == "__main__":
    main()
