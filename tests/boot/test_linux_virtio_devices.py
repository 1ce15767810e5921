"""A stock Debian kernel with virtio console, balloon, vsock, network and a shared folder: each used from both sides,
over both transports. In the end the folder is the guest's root.
"""

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
from linux_net import EXCHANGE, received, serve

import pyvmm
from pyvmm.console_options import ConsoleOptions
from pyvmm.vhost_user.options import ShareOptions
from pyvmm.vsock.options import VsockOptions

LIMIT_S = 600.0
MIB = 1 << 20
ECHO_BYTES = 2 * MIB
IN_PORT, OUT_PORT = 5000, 6000
GIVEN_MIB = 64
SHARED_BYTES = 6 * MIB
NET_BYTES = 6 * MIB
HOST_IP, GUEST_IP = "10.77.0.1", "10.77.0.2"
MODULES = (
    *("virtio_mmio", "virtio_pci", "virtio_console", "virtio_balloon"),
    *("vsock", "vmw_vsock_virtio_transport", "virtio_net", "virtiofs"),
)

# Each step says a line at hvc0 and waits there for one of the host's.
INIT = f"""\
n=0; while [ ! -c /dev/hvc0 ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
exec < /dev/hvc0 > /dev/hvc0 2>&1
stty -echo
port=$(grep -l '^agent$' /sys/class/virtio-ports/*/name)
echo "port: $(cat $port)"
read word; echo "heard: $word"
read word
n=0; until stty size > /dev/null 2>&1 || [ $n -ge 600 ]; do sleep 0.1; n=$((n + 1)); done # the kernel sets it later
echo "size: $(stty size)"
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
read word
{EXCHANGE.format(me=GUEST_IP, peer=HOST_IP)}
mkdir /new; mount -t virtiofs folder /new && echo "mounted: $(md5sum < /new/given)"
head -c {SHARED_BYTES} /dev/urandom > /new/made; cp /new/given /new/copy; chmod 640 /new/copy
mkdir -p /new/a/b; mv /new/copy /new/a/b/moved; ln -s b/moved /new/a/link; rm /new/gone; sync
echo "made: $(md5sum < /new/made)"
for each in proc sys dev; do mount --move /$each /new/$each; done
exec switch_root /new /sbin/init
"""

# Process 1 once the folder is the root.
SECOND_INIT = """\
#!/bin/busybox sh
export PATH=/bin
busybox mkdir -p /bin && busybox --install -s /bin
echo "root: $(grep ' / virtiofs' /proc/mounts)"
n=0; while [ $n -lt 200 ]; do echo $n > /many/$n; n=$((n + 1)); done
echo "many: $(cat /many/* | md5sum)"
echo "errors: $(dmesg | grep -cE 'virtio.*(rror|ailed)|vsock.*(rror|ailed)|BUG|WARNING: CPU.*(virtio|fuse)')"
sync; poweroff -f
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


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def use_the_network(guest: Lines, say: Callable[[], None]) -> None:
    """A tap with the host's address: each way, with sums."""
    data = os.urandom(NET_BYTES)
    sums: list[str] = []
    all_there = threading.Event()

    def take(end: socket.socket) -> None:
        received(end, sums)
        all_there.set()

    serve(5001, lambda end: end.sendall(data), HOST_IP)
    serve(5002, take, HOST_IP)
    say()
    assert guest.after("PING ") == "5 packets received"
    assert guest.after("GOT ").split()[0] == md5(data)
    assert guest.after("ERRORS ") == "0"
    assert all_there.wait(LIMIT_S)
    assert sums == [md5(data)]


def fill_folder(folder: Path) -> bytes:
    """What the guest finds there; the bytes of ``given``."""
    for name in ("bin", "sbin", "proc", "sys", "dev", "many"):
        (folder / name).mkdir(parents=True)
    given = os.urandom(SHARED_BYTES)
    (folder / "given").write_bytes(given)
    (folder / "gone").touch()
    (folder / "bin" / "busybox").write_bytes(boot_assets.busybox().read_bytes())
    (folder / "sbin" / "init").write_text(SECOND_INIT)
    for name in ("bin/busybox", "sbin/init"):
        (folder / name).chmod(0o755)
    return given


def use_the_folder(folder: Path, given: bytes, guest: Lines) -> None:
    """What one side writes the other one reads; and the guest lives in it."""
    assert guest.after("mounted: ").split()[0] == md5(given)
    made = guest.after("made: ").split()[0]
    assert guest.after("root: ").startswith("folder / virtiofs rw")
    assert guest.after("many: ").split()[0] == md5("".join(f"{n}\n" for n in sorted(range(200), key=str)).encode())
    assert md5((folder / "made").read_bytes()) == made
    assert (folder / "a" / "link").read_bytes() == given
    assert (folder / "a" / "b" / "moved").stat().st_mode & 0o777 == 0o640
    assert not (folder / "gone").exists()
    assert (folder / "many" / "199").read_text() == "199\n"


@pytest.mark.lab
@pytest.mark.parametrize(("machine", "ring"), [("microvm", "packed"), ("pc", "split")])
def test_console_balloon_vsock_network_and_folder(
    tmp_path: Path, make_initrd: Callable[..., Path], vsock_peer: bytes, machine: str, ring: str
) -> None:
    kernel = boot_assets.kernel("cloud")
    initrd = make_initrd(INIT, kernel.modules(*MODULES), {"bin/vsock_peer": vsock_peer})
    guest, agent = Lines(), Lines()
    path = str(tmp_path / "vm.sock")
    folder = tmp_path / "folder"
    given = fill_folder(folder)
    with pyvmm.Machine(
        machine=machine,
        kernel=str(kernel.vmlinux),
        initrd=str(initrd),
        append="console=ttyS0 quiet panic=-1",
        memory_mib=256,
        consoles=[ConsoleOptions(guest.hear), ConsoleOptions(agent.hear, name="agent")],
        vsock=VsockOptions(3, path),
        balloon=0,
        shares=[ShareOptions("folder", folder)],
        nets=[f"tap=pyvmm0,address={HOST_IP}/24"],
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
        use_the_network(guest, say)
        assert m.devices["net0"].faults == 0  # type: ignore[attr-defined]
        use_the_folder(folder, given, guest)
        assert guest.after("errors: ") == "0"
        assert m.wait(LIMIT_S)
        assert m.status == 0
