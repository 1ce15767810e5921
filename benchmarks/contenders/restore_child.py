"""Restores machines: ``restore_child.py SNAPSHOT HOW COUNT``, as many for each line of standard input.

HOW is ``path``: each opens the file anew; ``open``: of one open Snapshot; ``fork``: of a machine that stands in this
process. Prints ns to make them, to their first exits, in all, to close them, and by how many KiB this process's part of
memory (PSS) has grown for each of them.
"""

from __future__ import annotations

import sys
import time

from pyvmm import Machine, Snapshot


def main(path: str, how: str, count: str) -> None:
    snapshot = Snapshot(path)
    parent = Machine.restore(snapshot) if how == "fork" else None
    while sys.stdin.readline():
        making = running = 0
        machines: list[Machine] = []
        before_kib = pss_kib()
        began = time.perf_counter_ns()
        if parent is not None:
            machines = parent.fork(int(count))
            made = time.perf_counter_ns()
            for machine in machines:
                machine.run()
            ran = time.perf_counter_ns()
            making, running = made - began, ran - made
        for _ in range(0 if machines else int(count)):
            began = time.perf_counter_ns()
            machine = Machine.restore(path if how == "path" else snapshot)
            made = time.perf_counter_ns()
            machine.run()
            ran = time.perf_counter_ns()
            machines.append(machine)
            making += made - began
            running += ran - made
        grown_kib = (pss_kib() - before_kib) // len(machines)
        ran = time.perf_counter_ns()
        for machine in machines:
            machine.close()
        print(making, running, time.perf_counter_ns() - ran, grown_kib, flush=True)


def pss_kib() -> int:
    """Linux Documentation/filesystems/proc.rst, smaps_rollup."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))


if __name__ == "__main__":
    main(*sys.argv[1:])
