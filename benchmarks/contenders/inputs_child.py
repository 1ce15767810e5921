"""Tries inputs, each on a machine of its own: ``inputs_child.py SNAPSHOT COUNT``, as many for each line it reads.

As docs/examples/fuzz_forks.py does it: a machine of a Template, a device that has the input, the guest's run to its
end, close. Prints the ns that all of them took.
"""

from __future__ import annotations

import sys
import time

import pyvmm
from pyvmm.cli.bench import load

load()

from pyvmm_benchmarks.inputs_guest import INPUT, PORT  # noqa: E402


class Message(pyvmm.Device):
    """Gives the input, byte by byte."""

    def __init__(self) -> None:
        self.left: list[int] = []

    def read(self, offset: int, size: int) -> int:
        return self.left.pop(0) if self.left else 0


def attach(machine: pyvmm.Machine) -> None:
    machine.pio.map(PORT, 1, Message())


def main(path: str, count: str) -> None:
    with pyvmm.Template(path, prepare=attach) as template:
        while sys.stdin.readline():
            began = time.perf_counter_ns()
            for _ in range(int(count)):
                with template.start() as machine:
                    region = machine.pio.find(PORT)
                    assert region is not None and isinstance(region.device, Message)
                    region.device.left = list(INPUT)
                    status = machine.run()
                    assert int(status) == 1, status
            print(time.perf_counter_ns() - began, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
