"""``pyvmm bench net``: what a frame of a network card on virtio takes, in pyvmm and in QEMU without vhost.

One guest with a driver of its own (guests/net/virtio_net.S) is the firmware of a pc with one virtio-net-pci card at a
tap of its own, in a network namespace of this process. What it sends, the host's kernel lets go at once; what it
receives waited at the tap before the turn began; an ARP request is answered by the kernel as it is sent. So what is
measured is the way between guest and tap. Contenders take turns, A B C C B A, as in ``pyvmm bench disk``.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

from pyvmm.errors import ConfigError
from pyvmm_benchmarks.contenders.net_contenders import ROM, NetKind, OwnKind, QemuKind, ip
from pyvmm_benchmarks.net_cases import CASES, rom
from pyvmm_benchmarks.request_bench import RequestBench

CLONE_NEWNET = 0x4000_0000


class NetBench(RequestBench):
    verb = "net"
    unit = "frame"
    title = """\
usage: pyvmm bench net [OPTIONS]

What a frame of a network card on virtio takes, in pyvmm and in QEMU: time, system calls, wake-ups, calls of Python.
It needs root: each has a tap of its own, in a network namespace that is made for it."""
    cases = CASES

    def kinds(self) -> list[NetKind]:
        return [QemuKind("qemu", 1), OwnKind("pyvmm", 2)]

    def before_all(self, directory: Path) -> None:
        enter_namespace()
        (directory / ROM).write_bytes(rom())


def main(args: Sequence[str]) -> int:
    return NetBench().main(args)


def enter_namespace() -> None:
    """A network namespace for this process and its children (unshare(2)), in which nobody speaks of himself."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        why = os.strerror(ctypes.get_errno())
        raise ConfigError(f"a network namespace: {why}: run it as root (CAP_SYS_ADMIN)")
    for place in ("all", "default"):
        path = Path("/proc/sys/net/ipv6/conf", place, "disable_ipv6")
        if path.exists():
            path.write_text("1")
    ip("link", "set", "lo", "up")
