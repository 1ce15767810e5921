"""A stock Debian kernel with virtio console, balloon and vsock: each used from both sides, over both transports."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import boot_assets
import pytest

import pyvmm
from pyvmm.console_options import ConsoleOptions
from pyvmm.vsock.options import VsockOptions

LIMIT_S = 600.0
MIB = 1 << 20
ECHO_BYTES = 2 * MIB
IN_PORT, OUT_PORT = 5000, 6000
GIVEN_MIB = 64
MODULES = (
    *("virtio_mmio", "virtio_pci", "virtio_console", "virtio_balloon"),
    *("vsock", "vmw_vsock_virtio_transport"),
)

# Each step says a line at hvc0 and waits there for one of the host's.
INIT = f"""\
n=0; while [ ! -c /dev/hvc0 ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
exec < /dev/hvc0 > /dev/hvc0 2>&1
stty -echo
port=$(grep -l '^agent$' /sys/class/virtio-ports/*/name)
echo "port: $(cat $port)"
read word; echo "heard: $word"
read word; echo "size: $(stty size)"
port=/dev/$(basename ${{port%/name}})
(read word < $port; echo "agent got $word" > $port) &
read word
dd if=/dev/urandom of=/tmp/much bs=1M count={GIVEN_MIB} 2> /dev/null; rm /tmp/much
echo "used: {GIVEN_MIB}"
read word; echo "left: $(sed -n 's/MemTotal: *\\([0-9]*\\) .*/\\1/p' /proc/meminfo)"
read word; echo "again: $(sed -n 's/MemTotal: *\\([0-9]*\\) .*/\\1/p' /proc/meminfo)"
vsock_peer serve {IN_PORT}
read word
head -c {ECHO_BYTES} /dev/urandom > /tmp/data
vsock_peer call {OUT_PORT} < /tmp/data > /tmp/back
cmp /tmp/data /tmp/back && echo "echoed: $(md5sum < /tmp/back)"
echo "errors: $(dmesg | grep -cE 'virtio.*(rror|ailed)|vsock.*(rror|ailed)|BUG|WARNING: CPU.*virtio')"
poweroff -f
"""


class Lines:
    """What a console says, a line at a time."""

    def __init__(self) -> None:
        self.said = ""
        self._changed = threading.Condition()
        self._seen = 0

    def hear(self, data: bytes) -> None:
        with self._changed:
            self.said += data.decode("latin-1")
            self._changed.notify_all()

    def after(self, start: str) -> str:
        """The rest of the next line that begins so."""
        with self._changed:
            found = self._changed.wait_for(lambda: self._next(start), LIMIT_S)
            assert found is not None, f"no {start!r}: {self.said[-2000:]}"
            return found[0]

    def _next(self, start: str) -> list[str] | None:
        *lines, _unfinished = self.said[self._seen :].split("\n")
        at = self._seen
        for line in lines:
            at += len(line) + 1
            if line.startswith(start):
                self._seen = at
                return [line[len(start) :].strip()]
        return None


@pytest.fixture(scope="module")
def vsock_peer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("vsock") / "vsock_peer"
    source = Path(__file__).with_name("vsock_peer.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-static", "-o", path, source], check=True)
    return path.read_bytes()


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def echo(listening: socket.socket) -> None:
    """One connection, until its other end has said all."""
    end, _ = listening.accept()
    with end:
        while data := end.recv(1 << 16):
            end.sendall(data)


def use_the_balloon(m: pyvmm.Machine, guest: Lines, say: Callable[[], None]) -> None:
    """What the guest gives, this process no longer has; and it can have it again."""
    given: list[int] = []
    changed = threading.Condition()

    def hear(event: pyvmm.Event) -> None:
        with changed:
            given.append(event.data["actual_bytes"])
            changed.notify_all()

    def wait_for(mib: int) -> None:
        with changed:
            assert changed.wait_for(lambda: given and given[-1] == mib * MIB, LIMIT_S), given

    m.events.listen(hear, "balloon")
    guest.after("used: ")
    before = resident_mib()
    m.set_balloon(GIVEN_MIB)
    wait_for(GIVEN_MIB)
    assert before - resident_mib() > GIVEN_MIB / 2
    say()
    left_kib = int(guest.after("left: "))
    m.set_balloon(0)
    wait_for(0)
    say()
    assert int(guest.after("again: ")) - left_kib == GIVEN_MIB * 1024


def use_the_sockets(path: str, guest: Lines, say: Callable[[], None]) -> None:
    """In and out of the guest."""
    data = os.urandom(ECHO_BYTES)
    with socket.socket(socket.AF_UNIX) as end:
        guest.after("listening")
        end.connect(path)
        end.sendall(f"CONNECT {IN_PORT}\n".encode())
        stream = end.makefile("rb")
        assert stream.readline().startswith(b"OK ")
        sending = threading.Thread(target=end.sendall, args=(data,))
        sending.start()
        assert hashlib.md5(stream.read(ECHO_BYTES)).digest() == hashlib.md5(data).digest()
        sending.join()
        end.shutdown(socket.SHUT_WR)
        assert stream.read() == b""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{path}_{OUT_PORT}")
        listening.listen()
        echoing = threading.Thread(target=echo, args=(listening,))
        echoing.start()
        say()
        assert len(guest.after("echoed: ").split()[0]) == 32
        echoing.join()


@pytest.mark.lab
@pytest.mark.parametrize(("machine", "ring"), [("microvm", "packed"), ("pc", "split")])
def test_console_balloon_and_vsock(
    tmp_path: Path, make_initrd: Callable[..., Path], vsock_peer: bytes, machine: str, ring: str
) -> None:
    kernel = boot_assets.kernel("cloud")
    initrd = make_initrd(INIT, kernel.modules(*MODULES), {"bin/vsock_peer": vsock_peer})
    guest, agent = Lines(), Lines()
    path = str(tmp_path / "vm.sock")
    with pyvmm.Machine(
        machine=machine,
        kernel=str(kernel.vmlinux),
        initrd=str(initrd),
        append="console=ttyS0 quiet panic=-1",
        memory_mib=256,
        consoles=[ConsoleOptions(guest.hear), ConsoleOptions(agent.hear, name="agent")],
        vsock=VsockOptions(3, path),
        balloon=0,
        virtio_ring=ring,
    ) as m:
        console = m.consoles["hvc0"]

        def say(word: str = "on") -> None:
            console.feed(f"{word}\n".encode())

        m.resume()
        assert guest.after("port: ") == "agent"
        say("hello")
        assert guest.after("heard: ") == "hello"
        console.resize(132, 50)
        say()
        assert guest.after("size: ") == "50 132"
        m.consoles["agent"].feed(b"there\n")
        assert agent.after("agent got ") == "there"
        say()
        use_the_balloon(m, guest, say)
        use_the_sockets(path, guest, say)
        assert guest.after("errors: ") == "0"
        assert m.wait(LIMIT_S)
        assert m.status == 0
