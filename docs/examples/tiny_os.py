"""Runs tiny_os.S: an operating system of a page, two tasks and a clock that switches between them.

Change TICKS, the rate of the timer, or add a third task; then run it again. Needs GNU binutils.
"""

import subprocess
import tempfile
from pathlib import Path

import pyvmm

SOURCE = Path(__file__).with_suffix(".S")


def assembled(source):
    with tempfile.TemporaryDirectory() as directory:
        obj, flat = Path(directory, "os.o"), Path(directory, "os.bin")
        subprocess.run(["as", "--64", "-o", obj, source], check=True)
        link = ["ld", "-N", "-e", "0", "-Ttext=0x100000", "--oformat", "binary", "-o", flat, obj]
        subprocess.run(link, check=True)
        return flat.read_bytes()


if __name__ == "__main__":
    said = []
    with pyvmm.Machine(flat=assembled(SOURCE), flat_mode="long64", memory_mib=4, serial=said.append) as m:
        status = m.run(timeout_s=20)
        print(b"".join(said).decode())
        print(m.exit_stats_table())
    text = b"".join(said).decode()
    turns = text.count("ab") + text.count("ba")
    assert status == 0 and turns >= 5, (status, text)
    print(f"\nthe clock switched {turns} times between the tasks")
