"""Restores machines: ``restore_child.py SNAPSHOT HOW COUNT``, as many for each line of standard input.

HOW is ``path``: each opens the file anew; ``open``: of a Template; ``fork``: of a machine that stands in this process.
Prints ns to make them, to their first exits, in all, to close them, and by how many KiB this process's part of
memory (PSS) has grown for each of them.
"""

from __future__ import annotations

import sys
import time

from pyvmm import Machine, Template


def main(path: str, how: str, count: str) -> None:
    template = Template(path)
    parent = template.start() if how == "fork" else None
    while sys.stdin.readline():
        making = running = 0
        machines: list[Machine] = []
        before_kib = pss_kib()
        began = time.perf_counter_ns()
        if parent is not None:
            machines = parent.fork(int(count))
            made = time.perf_counter_ns()
            for machine in machines:
                machine.resume()
            for machine in machines:
                machine.wait()
            making, running = made - began, max(map(first_exit_at, machines)) - made
        for _ in range(0 if machines else int(count)):
            began = time.perf_counter_ns()
            machine = Machine.restore(path) if how == "path" else template.start()
            made = time.perf_counter_ns()
            machine.run()
            machines.append(machine)
            making += made - began
            running += first_exit_at(machine) - made
        grown_kib = (pss_kib() - before_kib) // len(machines)
        ran = time.perf_counter_ns()
        for machine in machines:
            machine.close()
        print(making, running, time.perf_counter_ns() - ran, grown_kib, flush=True)


def first_exit_at(machine: Machine) -> int:
    """When the guest's first exit came, as time.perf_counter_ns() has it."""
    cpu = machine.cpus[0]
    khz = cpu.vcpu.tsc_khz
    now, since_ns = time.perf_counter_ns(), cpu.exec.stats.since_first_exit_ns(khz)
    assert since_ns is not None, "the guest has made no exit"
    return now - since_ns


def pss_kib() -> int:
    """Linux Documentation/filesystems/proc.rst, smaps_rollup."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))


if __name__ == "__main__":
    main(*sys.argv[1:])
