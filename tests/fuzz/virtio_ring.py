"""Rings without sense: descriptors, indices and tables of any kind, changed at any moment, split and packed.

    python tests/fuzz/virtio_ring.py [--cases N] [--seed N]     so many inputs by a generator
    python tests/fuzz/fuzz_virtio_ring.py [libFuzzer options]   the same target, fed by atheris

The rings are compiled: a stray access is the process's end. What comes of a ring is a RingError or chains, and of a
chain all pieces are inside of memory, as its token says: what it is to read is what stands there. No more is out than
the queue holds, and what was pushed fits into the used ring.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "virtio"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from driver import DESC_BYTES, INDIRECT, NEXT, WRITE, TestDriver
from fuzz.cases import arguments, run_choices
from fuzz.guest import Choices, NoMoreChoices

from pyvmm.devices.virtio.chain import Chain
from pyvmm.devices.virtio.ring import RingError, Virtqueue
from pyvmm.errors import StateError
from pyvmm.guest_memory import GuestMemory

MEMORY_BYTES = 4 << 20
BASE = 0x10_0000
SIZE = 8
TABLE = BASE + 0x2_0000
DATA = BASE + 0x3_0000
EDGES = (0, 1, DATA, TABLE, BASE, MEMORY_BYTES - 1, MEMORY_BYTES, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1)
LENGTHS = (0, 1, 15, 16, 17, 48, 4096, 0x7FFF_FFFF, 0xFFFF_FFFF)
FLAGS = (0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, 0xFFFF)
MOST_STEPS = 120
LONGEST_VIEW = 1 << 16  # that is compared
# How often each happens.
STEPS = ("describe",) * 6 + ("take",) * 3 + ("table", "table", "index", "index", "any_bytes", "offer", "push", "state")


class Target:
    def __init__(self, **layout: bool) -> None:
        self.layout = layout
        self.memory = GuestMemory(MEMORY_BYTES)
        self.cases = self.chains = self.errors = 0

    def __call__(self, choices: Choices) -> None:
        self.cases += 1
        self.begin()
        try:
            for _ in range(MOST_STEPS):
                getattr(self, choices.pick(STEPS))(choices)
        except NoMoreChoices:
            pass

    def begin(self) -> None:
        """A driver that has done nothing wrong yet."""
        self.queue = Virtqueue(self.memory, 0, 256)
        self.driver = TestDriver(self.memory, self.queue, size=SIZE, base=BASE, **self.layout)
        self.held: list[Chain] = []

    def close(self) -> None:
        self.held.clear()
        self.memory.close()

    def put(self, at: int, size: int, value: int) -> None:
        self.driver.put(at, size, value & (1 << 8 * size) - 1)

    # -- the driver ----------------------------------------------------------------------------------------------------

    def descriptor(self, choices: Choices, at: int) -> None:
        packed = self.driver.packed
        length, flags = choices.pick(LENGTHS), choices.pick(FLAGS)
        self.put(at, 8, choices.pick(EDGES) if choices.chance(60) else DATA + choices.number(12))
        self.put(at + 8, 4, length if choices.chance(60) else 1 + choices.number(6))
        if packed:
            flags |= choices.pick((1 << 7, 1 << 7, 1 << 15, 0, 1 << 7 | 1 << 15))
        self.put(at + (14 if packed else 12), 2, flags)
        self.put(at + (12 if packed else 14), 2, choices.pick((0, 1, 2, 3, SIZE - 1, SIZE, 0xFFFF)))

    def describe(self, choices: Choices) -> None:
        self.descriptor(choices, self.driver.desc + DESC_BYTES * choices.below(SIZE))

    def table(self, choices: Choices) -> None:
        """An indirect one, and a descriptor that leads to it."""
        for n in range(1 + choices.below(4)):
            self.descriptor(choices, TABLE + DESC_BYTES * n)
        at = self.driver.desc + DESC_BYTES * choices.below(SIZE)
        self.put(at, 8, TABLE)
        self.put(at + 8, 4, choices.pick((16, 32, 48, 64, 8, 0, 1 << 20)))
        self.put(at + (14 if self.driver.packed else 12), 2, INDIRECT | choices.pick((0, 1 << 7, 1 << 15)))

    def index(self, choices: Choices) -> None:
        """What is available, and where (split); event suppression (packed)."""
        ring = self.driver.driver
        self.put(ring + 4 + 2 * choices.below(SIZE), 2, choices.pick((0, 1, 2, SIZE - 1, SIZE, 0xFFFF)))
        now = self.driver.get(ring + 2, 2)
        self.put(ring + 2, 2, choices.pick((now + 1, now + 1, now + 2, now - 1, now + SIZE, choices.number(16))))

    def any_bytes(self, choices: Choices) -> None:
        base = choices.pick((self.driver.desc, self.driver.driver, self.driver.device, TABLE))
        self.put(base + choices.below(0x120), choices.pick((1, 2, 4, 8)), choices.number(64))

    def offer(self, choices: Choices) -> None:
        """A buffer as it should be."""
        if self.driver.free >= 3 and len(self.driver._slots) < SIZE:
            self.driver.add([b"abc"], [8, 8])

    # -- the device ----------------------------------------------------------------------------------------------------

    def take(self, choices: Choices) -> None:
        try:
            chains = self.queue.take(1 + choices.below(SIZE))
        except RingError as error:
            assert "\n" not in str(error)
            self.errors += 1
            self.begin()
            return
        for chain in chains:
            self.check(chain)
        self.held += chains
        self.chains += len(chains)
        assert len(self.held) <= SIZE

    def check(self, chain: Chain) -> None:
        _, readable, writable = chain.token
        for pairs, views in ((readable, chain.readable), (writable, chain.writable)):
            assert len(pairs) == 2 * len(views)
            for n, view in enumerate(views):
                gpa, size = pairs[2 * n : 2 * n + 2]
                assert 0 < size == view.nbytes
                assert gpa + size <= MEMORY_BYTES
                assert view[:LONGEST_VIEW] == self.memory.view(gpa, size)[:LONGEST_VIEW]
        assert chain.readable_bytes == sum(readable[1::2])
        assert chain.writable_bytes == sum(writable[1::2])

    def push(self, choices: Choices) -> None:
        if self.held:
            chain = self.held.pop(choices.below(len(self.held)))
            self.queue.push(chain, choices.pick((0, 1, chain.writable_bytes, (1 << 64) - 1)))
        if choices.chance(50):
            self.queue.flush()
            if choices.chance(50):
                self.queue.enable_kicks()
            else:
                self.queue.disable_kicks()

    def state(self, choices: Choices) -> None:
        """Saved, and goes on in another one."""
        state, tokens = self.queue.save(), [chain.token for chain in self.held]
        queue = Virtqueue(self.memory, 0, 256)
        try:
            queue.load(state)
            queue.after_load(self.driver.features)
            held = [queue.retake(token) for token in tokens]
        except (RingError, StateError) as error:
            assert "\n" not in str(error)
            self.begin()
            return
        self.queue = self.driver.queue = queue
        self.held = held


def run(cases: int, seed: int, **layout: bool) -> tuple[int, int]:
    """So many inputs; how many chains were taken, and how many rings were refused."""
    target = Target(**layout)
    run_choices(target, cases, seed, layout)
    return target.chains, target.errors


def main() -> None:
    args = arguments(__doc__, cases=2000).parse_args()
    for packed in (False, True):
        chains, errors = run(args.cases, args.seed, packed=packed, event_idx=True, indirect=True)
        print(f"packed={packed}: {args.cases} inputs, {chains} chains, {errors} rings refused")


if __name__ == "__main__":
    main()
