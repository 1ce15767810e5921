"""Contenders of ``pyvmm bench net``: a pc with one card on virtio at a tap, in pyvmm and in QEMU, otherwise alike."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from pyvmm.errors import ConfigError
from pyvmm_benchmarks import environment
from pyvmm_benchmarks.contenders.exit_contender import Kind
from pyvmm_benchmarks.contenders.request_contender import OwnRequests, RequestCase, RequestContender
from pyvmm_benchmarks.net_cases import FRAME_AT, HEADER, MEMORY_MIB, RECEIVE, NetCase

CHILD = Path(__file__).with_name("request_child.py")
SOL_PACKET, PACKET_VNET_HDR = 263, 15  # linux/if_packet.h
QUEUE_FRAMES = 5000
ROM = "net.rom"


class Net(RequestContender):
    """A running one."""

    tap: Tap

    def prepare(self, case: RequestCase, count: int) -> None:
        assert self.mailbox is not None and isinstance(case, NetCase)
        frame = case.frame(self.tap.mac, self.tap.address)
        if case.flags & RECEIVE:
            self.tap.send(case.header[: HEADER.size - 2] + frame, count)
        else:
            self.mailbox.memory.write(self.mailbox.base + FRAME_AT, case.header + frame)

    def close(self) -> None:
        super().close()
        self.tap.close()


class OwnNet(OwnRequests, Net):
    """pyvmm's."""


class Tap:
    """A tap interface with an address, and frames for whoever has it open."""

    def __init__(self, number: int) -> None:
        self.name = f"bench{number}"
        self.address = bytes([10, 98, number, 1])
        self.mac = bytes([2, 0, 0, 0, 1, number])
        ip("tuntap", "add", "dev", self.name, "mode", "tap")
        ip("addr", "add", f"{socket.inet_ntoa(self.address)}/24", "dev", self.name)
        ip("link", "set", self.name, "txqueuelen", str(QUEUE_FRAMES), "up")
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self._socket.bind((self.name, 0))

    def send(self, data: bytes, count: int) -> None:
        """So many of them wait at the tap; ``data`` has virtio's header in front, of ten bytes."""
        for _ in range(count):
            self._socket.send(data)

    def close(self) -> None:
        self._socket.close()
        ip("link", "del", self.name)


def ip(*words: str) -> None:
    try:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError("no ip, which makes interfaces (Debian: iproute2)") from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"ip {' '.join(words)}: {error.stderr.strip()}") from None


class NetKind(Kind):
    """``number`` tells its tap from those of others."""

    def __init__(self, name: str, number: int, *words: str) -> None:
        self.name = name
        self.number = number
        self.words = words

    contender: type[Net] = Net

    def start(self, case: NetCase, directory: Path, pin: int | None) -> Net:  # type: ignore[override]
        tap = Tap(self.number)
        try:
            net = self.contender(self, case, self.on(tap, directory), pin)  # type: ignore[arg-type]
        except BaseException:
            tap.close()
            raise
        net.tap = tap
        return net

    def on(self, tap: Tap, directory: Path) -> list[str]:
        """The command, at ``tap``."""
        raise NotImplementedError


class OwnKind(NetKind):
    ours = True
    contender = OwnNet

    def on(self, tap: Tap, directory: Path) -> list[str]:
        net = f"tap={tap.name},mac={tap.mac.hex(':')}"
        work = {"rom": str(directory / ROM), "memory_mib": MEMORY_MIB, "net": ",".join([net, *self.words])}
        return [sys.executable, "-P", str(CHILD), json.dumps(work)]


class QemuKind(NetKind):
    """Without vhost: the frames go through QEMU, as they go through pyvmm."""

    program = environment.find("qemu-system-x86_64", "PYVMM_QEMU")

    def version(self) -> str | None:
        return environment.version(self.program, "--version") if self.program else "not installed"

    def why_not(self, case: object) -> str:
        return "" if self.program else "not installed (Debian: qemu-system-x86; or name it in PYVMM_QEMU)"

    def on(self, tap: Tap, directory: Path) -> list[str]:
        assert self.program is not None
        netdev = f"tap,id=n,ifname={tap.name},script=no,downscript=no,vhost=off"
        device = f"virtio-net-pci,netdev=n,mac={tap.mac.hex(':')},romfile=,addr=04.0"
        command = [self.program, "-machine", "pc", "-accel", "kvm", "-m", str(MEMORY_MIB)]
        command += ["-bios", str(directory / ROM), "-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-serial", "null", "-name", "guest,debug-threads=on", "-netdev", netdev]
        return [*command, "-device", ",".join([device, *self.words])]
