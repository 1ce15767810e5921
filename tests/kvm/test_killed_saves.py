"""A process that is killed while it saves a machine: the snapshot before is there whole, or the new one.

How often: PYVMM_KILLS, of each kind of save.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import asm
import pytest
from guests import TIMEOUT_S
from test_snapshots import PAGES, is_consistent

from pyvmm import Machine, Snapshot

KILLS = int(os.environ.get("PYVMM_KILLS", "3"))
MIB = 1 << 20
NUMBER = 0x1000  # in the guest's memory: which save it is

# Saves under one name again and again, and says the number of each that is done. A difference has one base.
CHILD = """
import os, sys
from pyvmm import Machine, Snapshot
kind, code, address, directory = sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
m = Machine(flat=code, flat_address=address, flat_mode="long64", memory_mib=32)
m.memory.write(0x1000000, os.urandom(4 << 20))
m.resume()
while m.memory.read(0x2FF000, 8) == bytes(8):
    pass
base = None
if kind == "difference":
    m.save(directory + "/base")
    base = Snapshot(directory + "/base")
n = 0
while True:
    n += 1
    if kind != "live":
        m.pause()
    m.memory.write(0x1000, n.to_bytes(8, "little"))
    m.save(directory + "/a.snap", base=base)
    print(n, flush=True)
    m.resume() if kind != "live" else None
"""


@pytest.mark.parametrize("kind", ["stands", "live", "difference"])
def test_a_kill_at_any_moment_of_a_save(kind: str, tmp_path: Path) -> None:
    program = asm.assemble(PAGES, "long64")
    arguments = [kind, program.image.hex(), str(program.address), str(tmp_path)]
    source = random.Random(kind)
    between = 0
    for _ in range(KILLS):
        command = [sys.executable, "-c", CHILD, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            told = child.stdout.readline()
            assert told == b"1\n"
            time.sleep(source.uniform(0, 0.2))  # which moment it is does not matter
            child.send_signal(signal.SIGKILL)
            told += child.stdout.read()
            child.wait(TIMEOUT_S)
        done = int(told.split()[-1])
        left = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
        between += bool(left)
        with Snapshot(tmp_path / "a.snap") as snapshot, Machine.restore(snapshot) as m:
            snapshot.check()
            assert is_consistent(m) > 0
            number = int.from_bytes(m.memory.read(NUMBER, 8), "little")
            assert done <= number <= done + 1, (done, number)
            assert len(left) <= 1, left  # what the one before had left is gone
            m.save(tmp_path / "a.snap")
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    print(f"{between} of {KILLS} in the middle of a file")
