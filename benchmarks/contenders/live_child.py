"""Saves a machine that runs: ``live_child.py DIRECTORY MEMORY_MIB MB_PER_S``, once for each line of standard input.

Its guest writes a word to a page, and to the next one, 64 MiB round, so many MB of pages a second. Prints ns that the
guest stood, and ns that the save took.
"""

from __future__ import annotations

import os
import sys
import time

from pyvmm import Machine

MIB = 1 << 20
PAGE_BYTES = 4096
FIRST, END = 16 * MIB, 80 * MIB


def guest(ticks_a_page: int) -> bytes:
    """For a flat guest in long mode."""
    return b"".join(
        (
            bytes.fromhex("0f31 48c1e220 4809d0 4989c0"),  # rdtsc; all 64 bits of it to r8
            bytes.fromhex("48c7c7") + FIRST.to_bytes(4, "little"),  # 1: mov $FIRST, %rdi
            bytes.fromhex("48ffc3 48891f"),  # 2: inc %rbx; mov %rbx, (%rdi)
            bytes.fromhex("0f31 48c1e220 4809d0 4c39c0 72f2"),  # 3: rdtsc, all of it; cmp %r8, %rax; jb 3b
            bytes.fromhex("4981c0") + ticks_a_page.to_bytes(4, "little"),  # add $ticks, %r8
            bytes.fromhex("4881c7") + PAGE_BYTES.to_bytes(4, "little"),  # add $4096, %rdi
            bytes.fromhex("4881ff") + END.to_bytes(4, "little"),  # cmp $END, %rdi
            bytes.fromhex("72d5 ebcc"),  # jb 2b; jmp 1b
        )
    )


def main(directory: str, memory_mib: str, mb_per_s: str) -> None:
    pages_per_s = int(mb_per_s) * 1_000_000 // PAGE_BYTES
    with Machine(memory_mib=int(memory_mib), flat=b"\xf4", flat_mode="long64") as asked:
        khz = asked.cpus[0].vcpu.tsc_khz
    code = guest(khz * 1000 // pages_per_s)
    with Machine(memory_mib=int(memory_mib), flat=code, flat_mode="long64") as machine:
        machine.memory.write(END, os.urandom(32 * MIB))
        machine.resume()
        # Once round, so that all of it is there. A guest's memory signals nobody.
        while not machine.memory.read(END - PAGE_BYTES, 8).strip(b"\0"):
            time.sleep(0.01)
        while sys.stdin.readline():
            began = time.perf_counter_ns()
            saved = machine.save(os.path.join(directory, "live.snap"))
            print(saved.stood_ns, time.perf_counter_ns() - began, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
