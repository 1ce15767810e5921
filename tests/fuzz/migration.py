"""What a stranger may say to `pyvmm run --incoming`, or in answer to `migrate_to`.

    python tests/fuzz/migration.py [--cases N] [--seed N]      so many inputs by a generator
    python tests/fuzz/fuzz_migration.py [libFuzzer options]    the same target, fed by atheris

Each is an error of one sentence, or a machine, and no descriptor is left. A spec names the files that a machine opens:
of one that was changed no machine is made (as in snapshot.py).
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.cases import main
from fuzz.edits import Choices, edit, edited

from pyvmm import Machine
from pyvmm import migration_stream as ms
from pyvmm.errors import VmmError
from pyvmm.machine_snapshot import restored_spec
from pyvmm.machine_state import MachineState
from pyvmm.migration import Arrival
from pyvmm.migration_stream import FRAME, MAGIC, MigrationStream
from pyvmm.msgpack import pack, unpack

GREETING = MAGIC + ms.FORMAT.to_bytes(4, "little")
PAGE = bytes(range(256)) * 16
GPAS = (0, 4096, 1 << 20, (1 << 20) - 4096, 1, 1 << 32, 1 << 63, (1 << 64) - 4096)
SIZES = (0, 1, 4095, 4096, 8192, 1 << 20, (1 << 20) + 4096, 1 << 40, (1 << 64) - 4096)
KINDS = (*ms.NAMES, 0, 255)
MOST_FRAMES = 6
MOST_SENT = 128 << 10  # what a socket takes while nobody reads


def frame(kind: int, data: bytes = b"") -> bytes:
    return FRAME.pack(kind, len(data)) + data


class Target:
    def __init__(self) -> None:
        with Machine(accel="qtest", machine="microvm", memory_mib=1) as m:
            state = MachineState(m.board.chassis, m.board, m.board.platform)
            head = {"spec": m.config.plain(), "machine": state.description(), "images": {}}
            self._head = pack(head)
            self._parts = pack(m.save_state(memory=False)["parts"])
        self._descriptors = len(os.listdir("/proc/self/fd"))

    def one_input(self, data: bytes) -> None:
        choices = Choices(data)
        try:
            what = choices.byte() % 8
            if what == 0:
                self._answered(choices)
            elif what < 3:
                self._head_only(choices)
            else:
                self._whole(choices)
        except VmmError as error:
            assert "\n" not in str(error), error
        assert len(os.listdir("/proc/self/fd")) <= self._descriptors

    def _answered(self, choices: Choices) -> None:
        """The source waits for an answer."""
        kind = (ms.READY, ms.LOADED, ms.GOES)[choices.byte() % 3]
        said = frame(KINDS[choices.byte() % len(KINDS)], choices.blob(64)) if choices.byte() % 4 else choices.blob(32)
        with stream_that_says(said) as stream:
            stream.answer(kind)

    def _head_only(self, choices: Choices) -> None:
        """Whatever machine it is: its spec is read."""
        head = edited(self._head, choices)
        greeting = bytearray(GREETING)
        if choices.byte() % 8 == 0:
            greeting[choices.below(len(greeting))] = choices.byte()
        images = frame(ms.IMAGE, choices.blob(64)) * choices.below(3)
        with stream_that_says(bytes(greeting) + frame(ms.HEAD, pack(head)) + images) as stream:
            restored_spec(Arrival(stream, "a test"), {})

    def _whole(self, choices: Choices) -> None:
        """A machine of a spec that is as it was, with anything behind it."""
        head = unpack(self._head)
        if choices.byte() % 4 == 0:
            inside = {"machine": head["machine"], "images": head["images"]}
            edit(inside, choices)
            head = {**inside, "spec": head["spec"]}
        said = GREETING + frame(ms.HEAD, pack(head))
        for _ in range(choices.below(MOST_FRAMES)):
            said += self._frame(choices)
        if choices.byte() % 4:
            said += frame(ms.STATE, pack(edited(self._parts, choices) if choices.byte() % 4 else unpack(self._parts)))
        if choices.byte() % 4:
            said += frame(ms.GO)
        if choices.byte() % 8 == 0:
            said = changed(said, choices, len(GREETING) + FRAME.size + len(pack(head)))
        with stream_that_says(said[:MOST_SENT]) as stream, stream.told_why(), arrived(stream) as m:
            assert m.memory.size_bytes == 1 << 20
            m.save_state()

    def _frame(self, choices: Choices) -> bytes:
        gpa = GPAS[choices.byte() % len(GPAS)] if choices.byte() % 2 else choices.below(256) << 12
        kind = choices.byte() % 8
        if kind < 3:
            pages = PAGE * (1 + choices.below(3))
            return frame(ms.PAGES, gpa.to_bytes(8, "little") + pages[: len(pages) - (choices.byte() % 16 == 0)])
        if kind < 6:
            size = SIZES[choices.byte() % len(SIZES)] if choices.byte() % 2 else choices.below(8) << 12
            return frame(ms.ZEROS, gpa.to_bytes(8, "little") + size.to_bytes(8, "little"))
        return frame(KINDS[choices.byte() % len(KINDS)], choices.blob(32))


def arrived(stream: MigrationStream) -> Machine:
    return Machine.of_arrival(Arrival(stream, "a test"), None, None, {})


def changed(said: bytes, choices: Choices, since: int) -> bytes:
    """Some bytes behind the head, or the end."""
    other = bytearray(said)
    for _ in range(1 + choices.below(4)):
        other[min(since + choices.number(2), len(other) - 1)] = choices.byte()
    if choices.byte() % 2:
        del other[since + choices.number(2) % 4096 :]
    return bytes(other)


def stream_that_says(said: bytes) -> Any:
    """All of it, and then the end; what is answered nobody reads."""
    here, there = socket.socketpair()
    with there:
        there.sendall(said)
    return MigrationStream(here)


if __name__ == "__main__":
    sys.exit(main(Target().one_input, __doc__))
