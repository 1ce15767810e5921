"""The process of pyvmm in ``pyvmm bench disk`` and ``net``: a pc whose firmware is the guest, and one device on virtio.

It says where guest RAM is. Then, for a line "on" or "off", it counts the calls of Python on the threads that serve the
device, or stops that, and says how many there were.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pyvmm
from pyvmm.block.options import DriveOptions


class Calls:
    """Counts calls, of Python functions and of C functions by Python, wherever one of ``entries`` has begun."""

    def __init__(self) -> None:
        self.on = False
        self.count = 0

    def watch(self, owner: Any, name: str) -> None:
        """``owner.name`` is where threads of ours enter Python."""
        inner = getattr(owner, name)

        def entered(*args: Any) -> Any:
            if not self.on:
                return inner(*args)
            sys.setprofile(self._called)
            try:
                return inner(*args)
            finally:
                sys.setprofile(None)

        setattr(owner, name, entered)

    def _called(self, frame: object, event: str, arg: object) -> None:
        if event in ("call", "c_call"):
            self.count += 1


def main() -> None:
    work = json.loads(sys.argv[1])
    calls = Calls()
    options: dict[str, Any] = {"firmware": work["rom"], "memory_mib": work["memory_mib"]}
    if "drive" in work:
        from pyvmm.block.protocols.file_posix import FilePosix
        from pyvmm.devices.virtio.blk import VirtioBlk

        options["drives"] = [DriveOptions(interface="virtio", **work["drive"])]
        calls.watch(VirtioBlk, "handle")
        calls.watch(FilePosix, "_aio_worker")
    else:
        from pyvmm.devices.virtio.net import VirtioNet

        options["nets"] = [work["net"]]
        for name in ("handle", "_on_readable", "_on_writable"):
            calls.watch(VirtioNet, name)
    with pyvmm.Machine(machine="pc", **options) as machine:
        base = machine.memory.ram[0].host_address
        khz = machine.cpus[0].vcpu.tsc_khz
        print(f"memory {base:#x} tsc_khz {khz}", flush=True)
        machine.resume()
        for line in sys.stdin:
            if line == "on\n":
                calls.count = 0
            calls.on = line == "on\n"
            print(calls.count, flush=True)


if __name__ == "__main__":
    main()
