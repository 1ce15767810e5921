"""TCP between a stock Linux guest and its host through a tap, pyvmm beside QEMU without vhost.

    ci/lab run -- .venv/bin/python benchmarks/net_lab.py

It needs root, and a KVM that runs Linux: the nested lab, where this machine has none. It works in a network namespace
of its own. Both guests have one vCPU, one virtio-net-pci card with what each VMM offers by itself, and the program
guests/net_io.c, which keeps one connection to a server here. They take turns, A B B A; whose turn it is not stands
still. After the timed turns there is one that is counted, by the guest (frames, interrupts) and by perf.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import measure
import told
from measure import median

sys.path.insert(0, str(measure.ROOT / "tests"))
import boot_assets

MIB = 1 << 20
PORT = 5001
TOLD_BYTES = 64
MARK = 0.7


class Case(NamedTuple):
    title: str
    what: str
    size: int  # of a call
    calls: int  # a turn
    mark: float


CASES = (
    Case("guest to host, 64 KiB calls", "send", 1 << 16, 256, MARK),
    Case("host to guest, 64 KiB calls", "receive", 1 << 16, 256, MARK),
    Case("guest to host, 1 KiB calls", "send", 1 << 10, 1500, MARK),
    Case("one byte there and back", "ping", 1, 150, MARK),
)
CONTENDERS = ("qemu", "pyvmm")
TRIES = 3
MEMORY_MIB = 192
APPEND = "console=ttyS0 quiet panic=-1 nokaslr"
GUEST_COUNTS = ("tx_packets", "tx_bytes", "rx_packets", "rx_bytes", "interrupts")
PLACES = {
    "exits": told.EXITS,
    "mmio": "kvm:kvm_mmio",
    "calls": "raw_syscalls:sys_enter",
    "switches": "sched:sched_switch",
}

INIT = """\
stty -F /dev/ttyS0 -echo raw
n=0; while [ ! -e /sys/class/net/eth0 ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
ip link set lo up; ip addr add $me/24 dev eth0; ip link set eth0 up
n=0; until ping -c 1 -W 1 $peer > /dev/null 2>&1 || [ $n -ge 60 ]; do n=$((n + 1)); done
echo "features $(cat /sys/class/net/eth0/device/features)"
/bin/net_io $peer PORT </dev/ttyS0 >/dev/ttyS0 2>&1
poweroff -f
"""


class Peer:
    """The host's end of every guest's connection."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("0.0.0.0", PORT))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            end, _ = self.listening.accept()
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(end,), daemon=True).start()

    def _serve(self, end: socket.socket) -> None:
        buffer = bytearray(1 << 16)
        while head := end.recv(TOLD_BYTES, socket.MSG_WAITALL):
            what, size, count = head.rstrip(b"\0").decode().split()
            piece, total = memoryview(buffer)[: int(size)], 0
            for n in range(int(count)):
                if what != "receive":
                    end.recv_into(piece, flags=socket.MSG_WAITALL)
                    total += piece[0]
                if what != "send":
                    piece[0] = n & 0xFF
                    end.sendall(piece)
            if what == "send":
                end.sendall(total.to_bytes(8, "little"))


class Linux(told.Guest):
    """A booted Linux whose net_io takes requests."""

    def __init__(self, contender: str, number: int, directory: Path, words: list[str]) -> None:
        self.contender = contender
        tap, self.network = f"tap-{contender}", f"10.0.{number}."
        mac = f"52:54:00:00:00:{number:02x}"
        command(["tuntap", "add", "dev", tap, "mode", "tap"])
        command(["addr", "add", f"{self.network}1/24", "dev", tap])
        command(["link", "set", tap, "up"])
        netdev = f"tap,id=n0,ifname={tap},script=no,downscript=no,vhost=off"
        card = f"virtio-net-pci,netdev=n0,mac={mac},romfile=" + "".join(f",{word}" for word in words)
        work = {
            "contender": contender,
            "memory_mib": MEMORY_MIB,
            "kernel": str(boot_assets.kernel("cloud").vmlinux),
            "initrd": str(directory / "initrd.cpio"),
            "append": f"{APPEND} me={self.network}2 peer={self.network}1",
            "place": str(directory / contender),
            "options": {"nets": [f"tap={tap},mac={mac}"]},
            "words": ["-netdev", netdev, "-device", card],
        }
        super().__init__(__file__, work)

    @property
    def pid(self) -> int:
        return int(self.hello.get("pid", self.process.pid))

    def move(self, case: Case, count: int) -> tuple[int, list[int]]:
        """Nanoseconds of ``count`` calls, and what the guest has counted."""
        said = self.turn(f"{case.what} {case.size} {count}\n".encode())["said"]
        if not said.startswith("T "):
            raise SystemExit(f"{self.contender}: {said}")
        _, ns, total, *counts = said.split()
        if int(total, 16) != sum(n & 0xFF for n in range(count)):
            raise SystemExit(f"{self.contender}: {case.title}: other bytes came than went")
        return int(ns), [int(word) for word in counts]

    def counted(self, case: Case, count: int) -> dict[str, int]:
        """One turn, in which perf counts; so it is slower."""
        with told.Counted(self.pid, list(PLACES.values())) as counted:
            ns, counts = self.move(case, count)
        found = dict(zip(GUEST_COUNTS, counts, strict=True))
        found["us"] = ns // 1000
        return found | {name: counted.counts[place] for name, place in PLACES.items() if place in counted.counts}


def command(words: list[str]) -> None:
    subprocess.run(["ip", *words], check=True)


class Found:
    """What one contender gave in one case."""

    def __init__(self) -> None:
        self.times: list[list[float]] = []
        self.counts: dict[str, int] = {}


def one_set(args: argparse.Namespace, names: list[str], number: int, directory: Path) -> list[dict[str, Found]]:
    """Fresh machines, all cases."""
    started: dict[str, Linux] = {}
    found = []
    try:
        for n, name in enumerate(names):
            started[name] = Linux(name, 10 * number + n, directory, args.words)
        for case in cases(args):
            found.append(rounds(args, case, started))
    finally:
        for each in started.values():
            with each, contextlib.suppress(OSError, subprocess.TimeoutExpired):
                each.end()
        for name in names:
            subprocess.run(["ip", "link", "del", f"tap-{name}"], check=False)
    return found


def cases(args: argparse.Namespace) -> list[Case]:
    return [case for n, case in enumerate(CASES) if not args.cases or n in args.cases]


def rounds(args: argparse.Namespace, case: Case, started: dict[str, Linux]) -> dict[str, Found]:
    found = {name: Found() for name in started}
    count = max(1, round(case.calls * args.scale))
    for guest in started.values():
        guest.move(case, count)  # warm up
    for one in found.values():
        one.times.append([])
    for _ in range(args.rounds):
        times = dict.fromkeys(started, 0)
        for name in (*started, *reversed(started)):
            times[name] += started[name].move(case, count)[0]
        for name, value in times.items():
            found[name].times[-1].append(value)
        print(case.title, *(f"{name} {value / 2e6:.0f} ms" for name, value in times.items()), flush=True)
    for name, guest in started.items():
        found[name].counts = guest.counted(case, count)
    return found


def benchmark(args: argparse.Namespace, directory: Path) -> None:
    program = directory / "net_io"
    source = str(measure.HERE / "guests" / "net_io.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-static", "-o", str(program), source], check=True)
    modules = boot_assets.kernel("cloud").modules("virtio_pci", "virtio_net")
    init = INIT.replace("PORT", str(PORT))
    boot_assets.initrd(init, directory, modules, {"bin/net_io": program.read_bytes()})
    Peer()
    names = [name for name in CONTENDERS if name in args.contenders]
    found: list[dict[str, Found]] = [{name: Found() for name in names} for _ in cases(args)]
    for number in range(1, args.sets + 1):
        for left in reversed(range(TRIES)):
            try:
                taken = one_set(args, names, number, directory)
            except told.Ended as error:
                if not left:
                    raise
                print(f"once more, after: {error}", flush=True)
                continue
            for total, one in zip(found, taken, strict=True):
                for name in names:
                    total[name].times += one[name].times
                    total[name].counts = one[name].counts
            break
    report(args, found)


def report(args: argparse.Namespace, found: list[dict[str, Found]]) -> None:
    print(f"{args.sets} sets of processes, {args.rounds} rounds each, two turns a round")
    print(f"{'':<30}{'':<7}{'MiB/s':>9}{'us/call':>9}{'x QEMU':>8} (95%)")
    for case, columns in zip(cases(args), found, strict=True):
        calls = 2 * max(1, round(case.calls * args.scale))
        for name, one in columns.items():
            seconds = median([t for each in one.times for t in each]) * 1e-9
            text = f"{case.title if name == next(iter(columns)) else '':<30}{name:<7}"
            text += f"{calls * case.size / MIB / seconds:>9.2f}{seconds * 1e6 / calls:>9.0f}"
            if name == "pyvmm" and "qemu" in columns:
                ratio, low, high = told.ratios_of(columns["qemu"].times, one.times)
                text += f"{ratio:>8.2f} ({low:.2f}-{high:.2f}) {case.mark}{'+' if ratio >= case.mark else '-'}"
            print(text)
        for name, one in columns.items():
            counts = one.counts
            moved = max(counts["tx_bytes"], counts["rx_bytes"]) / MIB
            each = [f"{name} {value / moved:.1f}" for name, value in counts.items() if not name.endswith("bytes")]
            sizes = [
                f"{way} {counts[f'{way}_bytes'] / max(1, counts[f'{way}_packets']):.0f} bytes a frame"
                for way in ("tx", "rx")
            ]
            print(f"  {name:<7}a MiB: {', '.join(each)}; {', '.join(sizes)}")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        told.child(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("contenders", nargs="*", default=list(CONTENDERS), help="of qemu, pyvmm")
    parser.add_argument("--sets", type=int, default=1, help="of fresh processes (default 1)")
    parser.add_argument("--rounds", type=int, default=6, help="a set (default 6)")
    parser.add_argument("--scale", type=float, default=1.0, help="calls a turn, times this")
    parser.add_argument("--cases", type=lambda text: [int(n) for n in text.split(",")], help="only these, by number")
    parser.add_argument("--words", type=lambda text: text.split(","), default=[], help="more for QEMU's card")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside:
        os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv, "--inside"])
    measure.print_host(None)
    command(["link", "set", "lo", "up"])
    with tempfile.TemporaryDirectory() as directory:
        benchmark(args, Path(directory))


if __name__ == "__main__":
    main()
