"""Makes machines: ``cycle_child.py IMAGE MEMORY_MIB IRQCHIP``, one for each line of standard input.

Prints ns to make it, to its first exit and stopped, to close it.
"""

from __future__ import annotations

import sys
import time

from pyvmm import Machine


def main(path: str, memory_mib: str, irqchip: str) -> None:
    with open(path, "rb") as file:
        image = file.read()
    while sys.stdin.readline():
        t0 = time.perf_counter_ns()
        machine = Machine(memory_mib=int(memory_mib), flat=image, irqchip=irqchip)
        t1 = time.perf_counter_ns()
        machine.run()
        t2 = time.perf_counter_ns()
        machine.close()
        print(t1 - t0, t2 - t1, time.perf_counter_ns() - t2, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
