"""Stock Linux guests with network cards on virtio, in a process and a network namespace of their own.

    unshare --net python tests/boot/linux_net.py WHAT MACHINE RING

WHAT is a function here; what it finds wrong is an AssertionError.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import boot_assets  # noqa: E402

import pyvmm  # noqa: E402

BOOT_AND_RUN_S = 400.0
MIB = 4
HEAD = """
ip link set lo up
n=0; while [ ! -e /sys/class/net/eth0 ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
"""


class Guest:
    """A machine whose /init ends with ``init``; ``said`` has what it said, by the first word of each line."""

    def __init__(self, name: str, init: str, card: str, machine: str, ring: str) -> None:
        kernel = boot_assets.kernel("cloud")
        modules = kernel.modules("virtio_mmio", "virtio_pci", "virtio_net")
        self.directory = tempfile.TemporaryDirectory()
        initrd = boot_assets.initrd(HEAD + init + "\npoweroff -f\n", Path(self.directory.name), modules)
        self.name = name
        self.said: dict[str, str] = {}
        self._line = bytearray()
        self.machine = pyvmm.Machine(
            machine=machine,
            kernel=kernel.bzimage,
            initrd=initrd,
            append="console=ttyS0 panic=-1 quiet",
            memory_mib=192,
            serial=self._hear,
            nets=[card],
            virtio_ring=ring,
        )

    def _hear(self, data: bytes) -> None:
        self._line += data
        while b"\n" in self._line:
            line, _, rest = bytes(self._line).partition(b"\n")
            self._line[:] = rest
            text = line.decode("latin-1").strip()
            print(f"{self.name}: {text}", flush=True)
            word, _, value = text.partition(" ")
            self.said[word] = value

    @property
    def card(self) -> Any:
        return self.machine.devices["net0"]

    def end(self) -> None:
        """It has powered itself off, and its card had no fault."""
        assert self.machine.wait(BOOT_AND_RUN_S), f"{self.name} has not come to its end"
        assert self.machine.status == 0
        assert self.card.faults == 0
        stats = self.card.stats
        print(f"{self.name}: {stats}", [(q.index, q.taken, q.notified) for q in self.card.queues], flush=True)
        assert stats["lost"] == 0
        self.machine.close()
        self.directory.cleanup()


def serve(port: int, work: Callable[[socket.socket], None], address: str = "0.0.0.0") -> None:
    """One connection, on a thread."""
    listening = socket.create_server((address, port))

    def body() -> None:
        end, _ = listening.accept()
        with end, listening:
            work(end)

    threading.Thread(target=body, daemon=True).start()


def received(end: socket.socket, into: list[str]) -> None:
    """The sum of all that comes."""
    total = hashlib.md5()
    while data := end.recv(1 << 20):
        total.update(data)
    into.append(total.hexdigest())


# What a guest does with the address {me} and a peer {peer} who gives at port 5001 and takes at 5002.
EXCHANGE = """
ip addr add {me}/24 dev eth0; ip link set eth0 up
n=0; until ping -c 1 -W 1 {peer} > /dev/null 2>&1 || [ $n -ge 60 ]; do n=$((n + 1)); done
echo "PING $(ping -c 5 -i 0.2 -s 8000 {peer} | grep -o '[0-9]* packets received')"
nc {peer} 5001 < /dev/null > /tmp/data; echo "GOT $(md5sum < /tmp/data)"
nc {peer} 5002 < /tmp/data
echo "ERRORS $(grep eth0 /proc/net/dev | awk '{{print $4 + $5 + $12 + $13}}')"
"""


def with_the_host(machine: str, ring: str) -> None:
    """A tap with the host's address: each way, with sums."""
    data, sums = os.urandom(MIB << 20), []
    serve(5001, lambda end: end.sendall(data))
    serve(5002, lambda end: received(end, sums))
    init = "echo FEATURES $(cat /sys/class/net/eth0/device/features)" + EXCHANGE.format(me="10.0.0.2", peer="10.0.0.1")
    guest = Guest("guest", init, "tap=tap0,address=10.0.0.1/24", machine, ring)
    guest.machine.resume()
    guest.end()
    digest = hashlib.md5(data).hexdigest()
    features = guest.said["FEATURES"]
    assert [features[bit] for bit in (0, 1, 7, 11, 15, 17, 32, 34)] == [*"1111111", "1" if ring == "packed" else "0"]
    assert guest.said["PING"] == "5 packets received"
    assert guest.said["GOT"].split()[0] == digest
    assert sums == [digest]
    assert guest.said["ERRORS"] == "0"


def run(what: str, machine: str, ring: str) -> None:
    """In a namespace of its own."""
    command = ["unshare", "--net", sys.executable, __file__, what, machine, ring]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:]


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
