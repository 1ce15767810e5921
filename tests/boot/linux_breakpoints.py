"""Debian's gdb and a stock Debian kernel, again and again: breakpoints by symbol and by address, steps, watched data,
each vCPU's registers; and the guest has lost nothing by it.

    linux_breakpoints.py [ROUNDS [VCPUS]]

No test of ci/test: it needs a KVM whose debug registers and int3 stop a guest with an operating system in it, which is
hardware; neither a software KVM nor the emulator of the lab is that (docs/lab.md). tests/kvm/test_gdb_many_times.py
does the like with small guests, and tests/boot/test_linux_gdb.py what the lab can of this one.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import boot_assets
import debian_gdb
from console import SerialLine

import pyvmm

BOOT_S = 300.0
NAMES = ("linux_banner", "seq_printf", "uptime_proc_show")
# Each vCPU has somebody who reads /proc/uptime, whose text is made by seq_printf, which moves seq_file.count.
INIT = """\
exec </dev/ttyS0 >/dev/ttyS0 2>&1
grep -E ' (NAMES)$' /proc/kallsyms
reads() {
    n=0
    while [ ! -e /end ]; do
        read up idle </proc/uptime && [ -n "$idle" ] || echo LOST
        n=$((n + 1))
    done
    echo reader $1 made $n
}
for cpu in $(seq $(nproc)); do reads $cpu & done
echo CPUs=$(nproc) ready
read word
echo >/end
wait
echo heard=$word
read word
""".replace("NAMES", "|".join(NAMES))
SCRIPT = """
import gdb, time
where, rounds, cpus = {where}, {rounds}, {cpus}
def number(text): return int(gdb.parse_and_eval(text)) & 0xFFFFFFFFFFFFFFFF
def do(line): return gdb.execute(line, to_string=True)
def step():
    lines = do("x/2i $pc").splitlines()
    do("stepi")
    if "call" not in lines[0] and "\\tj" not in lines[0]:
        assert number("$pc") == int(lines[1].split()[0].rstrip(":"), 16), (lines, hex(number("$pc")))
bases = {{}}
def look():
    here = gdb.selected_thread()
    for thread in gdb.selected_inferior().threads() if cpus > 1 else [here]:
        thread.switch()
        assert number("$cr3") and number("$cr0") >> 31
        base, pc = number("$gs_base"), number("$pc")
        if base >> 63 and pc >> 63:
            bases.setdefault(thread.num, set()).add(base)
    here.switch()
assert do("x/s linux_banner").count("Linux version ")
do("break uptime_proc_show")
hits, began, place = {{}}, time.monotonic(), None
for n in range(rounds):
    do("continue")
    pc = number("$pc")
    assert where["uptime_proc_show"] <= pc < where["uptime_proc_show"] + 16, (n, hex(pc))
    assert place in (None, pc), (n, hex(pc))
    place = pc
    thread = gdb.selected_thread()
    hits[thread.num] = hits.get(thread.num, 0) + 1
    file = number("$rdi")
    do("disable 1")
    step()
    step()
    look()
    do("tbreak *%d" % where["seq_printf"])
    do("continue")
    assert number("$pc") == where["seq_printf"], (n, hex(number("$pc")))
    count = "*(long *)%d" % (number("$rdi") + 24)  # seq_file.count
    before = number(count)
    do("watch " + count)
    watchpoint = gdb.breakpoints()[-1]
    assert watchpoint.type == gdb.BP_HARDWARE_WATCHPOINT
    do("continue")
    assert watchpoint.hit_count == 1 and number(count) > before, (n, watchpoint.hit_count, hex(number("$pc")))
    watchpoint.delete()
    do("enable 1")
    if n % 100 == 99:
        print("rounds", n + 1, "%.0f s" % (time.monotonic() - began), flush=True)
print("hits", hits, "bases", {{thread: [hex(b) for b in each] for thread, each in bases.items()}})
assert len(bases) == cpus and all(len(each) == 1 for each in bases.values())
assert len(set.union(*bases.values())) == cpus
do("delete")
do("detach")
print("done", n + 1)
"""


def symbol_file(directory: Path, found: dict[str, int]) -> Path:
    """An ELF file with these functions and nothing else: what gdb is given where there is no vmlinux with symbols."""
    base = min(found.values()) & ~0xFFF
    lines = ['.section .ktext, "ax", @nobits', "base:", f".skip {max(found.values()) - base + 4096}"]
    for name, address in found.items():
        lines += [f".globl {name}", f".type {name}, @function", f".set {name}, base + {address - base}"]
    obj, elf = directory / "symbols.o", directory / "symbols"
    subprocess.run(["as", "--64", "-o", obj, "-"], input="\n".join([*lines, ""]), text=True, check=True)
    subprocess.run(["ld", "-e0", f"--section-start=.ktext={base:#x}", "-o", elf, obj], check=True)
    return elf


def run_to_the_end(machine: pyvmm.Machine) -> None:
    with contextlib.suppress(pyvmm.StateError):  # closed, when all has been seen
        machine.run()


def main(rounds: int = 1000, cpus: int = 2) -> None:
    debian_gdb.LIMIT_S = 3600.0
    directory = Path(tempfile.mkdtemp())
    kernel, line = boot_assets.kernel("cloud"), SerialLine()
    with pyvmm.Machine(
        cpus=cpus, memory_mib=256, kernel=str(kernel.vmlinux), initrd=str(boot_assets.initrd(INIT, directory)),
        append="console=ttyS0 panic=-1 loglevel=4 nokaslr", serial=line.chardev,
    ) as machine:  # fmt: skip
        machine.serve_gdb(directory / "gdb")
        threading.Thread(target=run_to_the_end, args=(machine,)).start()
        line.expect(f"CPUs={cpus} ready", BOOT_S)
        listed = re.findall(r"^([0-9a-f]{16}) \w (\w+)\r?$", line.output, re.MULTILINE)
        found = {name: int(address, 16) for address, name in listed}
        script = directory / "script.py"
        script.write_text(SCRIPT.format(where=json.dumps(found), rounds=rounds, cpus=cpus))
        began = time.monotonic()
        said = debian_gdb.gdb(directory / "gdb", ["monitor kvm", f"source {script}"], symbol_file(directory, found))
        print(said[-3000:])
        assert f"done {rounds}" in said, said
        line.send("on\n")
        line.expect("heard=on", BOOT_S)
        print(*re.findall(r"reader \d+ made \d+", line.output), sep="\n")
        assert "LOST" not in line.output
    print(f"{rounds} rounds, {cpus} vCPUs: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
