"""Debian's gdb stops a guest again and again, in each mode: breakpoints, steps, watched data; and the registers that it
shows are those of a core.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from debian_gdb import FIRST, LIMIT_S, gdb
from guests import TIMEOUT_S, Guest

pytestmark = pytest.mark.native  # the lab's KVM has no breakpoints

TIMES = int(os.environ.get("PYVMM_STOPS", "40"))
LOOP = """
        xor     %ebx, %ebx
here:   inc     %ebx
there:  mov     %ebx, %eax
        mov     %ebx, count
after:  jmp     here
        .align  8
count:  .long   0
"""
# What gdb does, by its Python: the guest's own count says whether it went on by one round each time.
SCRIPT = """
import gdb
def number(text): return int(gdb.parse_and_eval(text)) & 0xFFFFFFFF
def do(line): return gdb.execute(line, to_string=True)
where = {places}
do("break *%d" % where["here"])
do("continue")
for n in range({times}):
    assert number("$pc") == where["here"], (n, number("$pc"))
    assert number("$rbx") == n, (n, number("$rbx"))
    do("continue")
print("breakpoints", n + 1)
for n in range({times}):
    before = number("$rbx")
    do("stepi")
    assert number("$pc") == where["there"], (n, number("$pc"))
    assert number("$rbx") == before + 1
    do("stepi 3") if n % 2 else do("continue")
    assert number("$pc") == where["here"], (n, number("$pc"))
print("steps", n + 1)
do("delete")
do("hbreak *%d" % where["there"])
for n in range({times}):
    before = number("$rbx")
    do("continue")
    assert number("$pc") == where["there"] and number("$rbx") == before + 1
print("hardware", n + 1)
do("delete")
do("watch *(int *)%d" % where["count"])
for n in range({times}):
    do("continue")
    assert number("*(int *)%d" % where["count"]) == number("$rbx"), n
print("watched", n + 1)
"""


@pytest.mark.parametrize("mode", ["real16", "protected32", "long64"])
def test_a_loop(boot: Callable[..., Guest], tmp_path: Path, mode: str) -> None:
    guest = boot(LOOP, mode)
    guest.machine.serve_gdb(tmp_path / "gdb", wait=True)
    run = threading.Thread(target=guest.machine.run, args=(TIMEOUT_S,))
    run.start()
    places = {name: guest.program.symbols[name] for name in ("here", "there", "after", "count")}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(places=json.dumps(places), times=TIMES))
    said = gdb(tmp_path / "gdb", [f"source {script}", "kill"])
    for what in ("breakpoints", "steps", "hardware", "watched"):
        assert f"{what} {TIMES}" in said, said
    run.join(TIMEOUT_S)
    assert guest.machine.status == 0


def test_a_core_has_the_registers_that_gdb_has(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot(LOOP)
    guest.machine.serve_gdb(tmp_path / "gdb", wait=True)
    guest.machine.serve_qmp(tmp_path / "qmp")
    run = threading.Thread(target=guest.machine.run, args=(TIMEOUT_S,))
    run.start()
    asked, core = "info registers", tmp_path / "core"
    values = [f"set ${name} = {n * 0x0101010101 + 1:#x}" for n, name in enumerate(GENERAL[:-1])]  # all but rip
    place = guest.program.symbols["after"]
    say = f"python import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); from qmp_peer import QmpPeer;"
    say += f" QmpPeer({str(tmp_path / 'qmp')!r}).get('dump-guest-memory', paging=True, protocol={f'file:{core}'!r})"
    live = gdb(tmp_path / "gdb", [f"break *{place}", "continue", *values, "echo ===\\n", asked, say, "kill"])
    ran = subprocess.run(
        ["gdb", "-q", "-nx", "-batch", *(w for c in FIRST for w in ("-ex", c)), "-ex", asked, "-c", str(core)],
        capture_output=True, text=True, check=False, timeout=LIMIT_S,
    )  # fmt: skip
    mine, theirs = shown(live.partition("===")[2]), shown(ran.stdout)
    assert len(mine) == len(GENERAL) + len(OTHERS)
    assert {name: theirs.get(name) for name in mine} == mine
    run.join(TIMEOUT_S)


GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)), "rip")
OTHERS = ("eflags", "cs", "ss", "ds", "es", "fs", "gs")


def shown(text: str) -> dict[str, int]:
    found = {name: int(value, 16) for name, value in re.findall(r"^(\w+) +(0x[0-9a-f]+)", text, re.M)}
    return {name: found[name] for name in (*GENERAL, *OTHERS) if name in found}
