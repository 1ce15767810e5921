"""A contender whose costs are known: no guest and no KVM, but the same mailbox in the memory of a process of its own.

``synthetic_child.py WORK``, JSON: ``cost_us`` an access; ``overhead_us`` a block, and a single access, takes more;
``noise``, the part by which times vary; every ``disturbed``-th block is ten times as long; ``hang``, or
``die``, in that turn; ``end`` at once, ``fade`` so that its memory is gone a while before it can be waited for;
``pause_at`` that character of its first line, negative from its end; ``tsc_khz``. Time does not pass:
tick counts are made up.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import struct
import sys
import threading
import time

MAILBOX, SAMPLES, MIB = 0x18_0000, 0x20_0000, 1 << 20
MAGIC = 0x316D_6D76_7970_2121
SYS_EXIT = 60  # of one thread
TURN, DONE, WARM_UP, COUNTS = 0x08, 0x0C, 0x10, 0x80


def fade() -> None:
    """As a process looks that ends: its first thread is gone, with what /proc shows of the memory; another lives on."""

    def end() -> None:
        time.sleep(0.3)
        os.write(2, b"no such instruction")
        os._exit(1)

    threading.Thread(target=end).start()
    ctypes.CDLL(None).syscall(SYS_EXIT, 0)


def main() -> None:
    work = json.loads(sys.argv[1])
    if work.get("end"):
        raise SystemExit("no such instruction")
    if work.get("fade"):
        fade()
    memory = mmap.mmap(-1, 64 * MIB)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if work.get("tells", True):
        line = f"memory {base:#x} tsc_khz {work['tsc_khz']}\n"
        at = work.get("pause_at", 0)
        if at:
            print(line[:at], end="", flush=True)
            time.sleep(0.05)
        print(line[at:], end="", flush=True)
    else:
        print("# some VMM 1.0", flush=True)
    struct.pack_into("<Q", memory, MAILBOX + COUNTS, 1)
    struct.pack_into("<Q", memory, MAILBOX, MAGIC)
    source = random.Random(work["cost_us"])
    tick_us = 1e3 / work["tsc_khz"]
    blocks = 0

    def ticks(accesses: int) -> int:
        nonlocal blocks
        blocks += 1
        us = (work["cost_us"] * accesses + work["overhead_us"]) * (1 + work["noise"] * abs(source.gauss(0, 1)))
        if work["disturbed"] and blocks % work["disturbed"] == 0:
            us *= 10
        return round(us / tick_us)

    turns = 0
    while True:
        turn, done = struct.unpack_from("<2I", memory, MAILBOX + TURN)
        if turn == done:
            time.sleep(0.0001)
            continue
        turns += 1
        if turns == work.get("hang"):
            time.sleep(3600)
        if turns == work.get("die"):
            os._exit(1)
        _, pairs, short, long, singles = struct.unpack_from("<5I", memory, MAILBOX + WARM_UP)
        found = [each for _ in range(pairs) for each in (ticks(short), ticks(long))]
        found += [ticks(1) for _ in range(singles)]
        struct.pack_into(f"<{len(found)}I", memory, SAMPLES, *found)
        struct.pack_into("<I", memory, MAILBOX + DONE, turn)


if __name__ == "__main__":
    main()
