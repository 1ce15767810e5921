"""A process that finds no files any more runs its machine on: pyvmm.preload has loaded all that is imported late."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LIMIT_S = 120

PROGRAM = """
import json, sys, threading, traceback, warnings
import pyvmm
from pyvmm import preload

EXIT_3 = bytes.fromhex("b001 e6f4 f4")                  # out 0xf4: status 3
SAY = bytes.fromhex("baf803 b041 ee b00a ee") + EXIT_3  # to COM1 first
RAISE = bytes.fromhex("baf007 ee f4")                   # out 0x7f0
SUSPEND = bytes.fromhex("ba0406 b80024 ef f4")          # out 0x604, 0x2400
FAULT = bytes.fromhex("cd80")                           # in long mode without an interrupt table

class Broken(pyvmm.Device):
    def write(self, offset, size, value):
        raise ValueError("broken")

heard = []
say = pyvmm.Machine(flat=SAY, memory_mib=2, serial=heard.append, vga="text", debugcon=heard.append)
bad = pyvmm.Machine(flat=RAISE, memory_mib=2)
bad.pio.map(0x7F0, 1, Broken())
sleeper = pyvmm.Machine(flat=SUSPEND, memory_mib=2)
lost = pyvmm.Machine(flat=FAULT, flat_mode="long64", memory_mib=4, no_reboot=True)
board = pyvmm.Machine(accel="qtest", memory_mib=4, drives=[sys.argv[1]])
dropped = pyvmm.Machine(flat=SAY, memory_mib=2)

preload.load()
late = []
def watch(event, arguments):
    if event == "import" and arguments[0].partition(".")[0] not in preload.EXTRAS:
        late.append(arguments[0])
sys.addaudithook(watch)

assert say.run(30) == 3 and b"".join(heard) == b"A\\n"
say.reset()
assert say.run(30) == 3
say.vga.lines()
say.exit_stats_table(), say.dump(), say.state.name, say.cpus[0].regs, repr(say)
for wrong in (lambda: say.cpus[0].__setattr__("regs", {"rxa": 1}), lambda: pyvmm.Machine(flta=b""), say.wakeup):
    try:
        wrong()
        raise AssertionError
    except pyvmm.VmmError:
        pass
try:
    bad.run(30)
    raise AssertionError
except pyvmm.DeviceError as error:
    assert "ValueError: broken" in error.dump
bad.reset()
try:
    lost.run(30)
except pyvmm.GuestError as error:
    assert error.dump
asleep = threading.Event()
sleeper.events.listen(lambda event: asleep.set(), "suspend")
sleeper.resume()
assert asleep.wait(30)
sleeper.wakeup()
sleeper.pause()
(drive,) = board.backends.values()
done = threading.Event()
drive.aio_discard(0, 8, lambda ret: drive.aio_write_zeroes(0, 8, lambda ret: drive.aio_flush(lambda ret: done.set())))
drive.drain()
assert done.is_set()
board.reset()
with warnings.catch_warnings(record=True):
    warnings.simplefilter("always")
    del dropped
for machine in (say, bad, sleeper, lost, board):
    machine.close()
print(json.dumps(late))
"""


def test_nothing_is_imported_once_everything_is_loaded(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    command = [sys.executable, "-X", "faulthandler", "-c", PROGRAM, str(disk)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == []
