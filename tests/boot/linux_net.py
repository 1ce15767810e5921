"""Stock Linux guests with network cards on virtio, in a process and a network namespace of their own.

    unshare --net python tests/boot/linux_net.py WHAT MACHINE RING [MIB]

WHAT is between_two, with_the_host or beside_a_router; what it finds wrong is an AssertionError. MIB go each way, with
sums at both ends: 1024 is a good hand's turn, ci/test sends less.
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
from queue import SimpleQueue
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import boot_assets  # noqa: E402

import pyvmm  # noqa: E402

BOOT_AND_RUN_S = 400.0
A_MIB_S = 2.0  # at the very most
MIB = 1 << 20
PIECE_MIB = 4
LITTLE_MIB = 4
HEAD = """
ip link set lo up
n=0; while [ ! -e /sys/class/net/eth0 ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
"""


class Guest:
    """A machine whose /init ends with ``init``; ``said`` has what it said, by the first word of each line."""

    def __init__(self, name: str, init: str, card: str, machine: str, ring: str, mib: int = 0) -> None:
        self.limit_s = BOOT_AND_RUN_S + A_MIB_S * mib
        kernel = boot_assets.kernel("cloud")
        modules = kernel.modules("virtio_mmio", "virtio_pci", "virtio_net")
        self.directory = tempfile.TemporaryDirectory()
        initrd = boot_assets.initrd(HEAD + init + "\npoweroff -f\n", Path(self.directory.name), modules)
        self.name = name
        self.said: dict[str, str] = {}
        self._told = threading.Condition()
        self._line = bytearray()
        self.machine = pyvmm.Machine(
            machine=machine,
            kernel=kernel.vmlinux,
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
            with self._told:
                self.said[word] = value
                self._told.notify_all()

    def wait_for(self, word: str) -> None:
        with self._told:
            assert self._told.wait_for(lambda: word in self.said, self.limit_s), f"no {word}: {self.said}"

    @property
    def card(self) -> Any:
        return self.machine.devices["net0"]

    def end(self) -> None:
        """It has powered itself off, and its card had no fault."""
        assert self.machine.wait(self.limit_s), f"{self.name} has not come to its end"
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


# A piece of random bytes again and again, given at port 5001 and taken at 5002: {times} of them are what goes each way.
STREAMS = """
dd if=/dev/urandom of=/tmp/piece bs=1M count={pieces} 2> /dev/null
stream() {{ n=0; while [ $n -lt {times} ]; do cat /tmp/piece; n=$((n + 1)); done; }}
echo "SUM $(stream | md5sum)"
""".replace("{pieces}", str(PIECE_MIB))
# Of one who asks {peer}, and of one who waits to be asked, who ends both connections (see THROUGH_PASST).
ASKS = """
[ -p /tmp/pipe ] || mkfifo /tmp/pipe; exec 3<> /tmp/pipe
echo "GOT $(nc {peer} 5001 < /tmp/pipe | md5sum)"
stream > /tmp/pipe &
nc {peer} 5002 < /tmp/pipe; wait
echo "ERRORS $(grep eth0 /proc/net/dev | awk '{{print $4 + $5 + $12 + $13}}')"
"""
ANSWERS = """
(echo '#!/bin/sh'; echo 'n=0; while [ $n -lt {times} ]; do cat /tmp/piece; n=$((n + 1)); done') > /tmp/give
(echo '#!/bin/sh'; echo 'head -c {size} | md5sum > /tmp/taken') > /tmp/take
chmod 755 /tmp/give /tmp/take
nc -l -p 5001 -e /tmp/give & nc -l -p 5002 -e /tmp/take &
echo READY; wait
echo "GOT $(cat /tmp/taken)"
"""
ADDRESS = "ip addr add {me}/24 dev eth0; ip link set eth0 up\n"


def between_two(machine: str, ring: str, mib: str = str(LITTLE_MIB)) -> None:
    """Two machines on a bridge."""
    from pyroute2 import IPRoute

    if "PYVMM_LAB" in os.environ:
        load_into_the_lab("bridge")
    with IPRoute() as route:
        route.link("add", ifname="br0", kind="bridge")
        route.link("set", index=route.link_lookup(ifname="br0")[0], state="up")
    times = int(mib) // PIECE_MIB
    start = ADDRESS + STREAMS
    answers = start.format(me="10.0.0.1", times=times) + ANSWERS.format(times=times, size=int(mib) * MIB)
    asks = start.format(me="10.0.0.2", times=times) + ASKS.format(peer="10.0.0.1")
    one = Guest("one", answers, "tap=tap1,bridge=br0", machine, ring, int(mib))
    other = Guest("other", asks, "tap=tap2,bridge=br0", machine, ring, int(mib))
    one.machine.resume()
    one.wait_for("READY")
    other.machine.resume()
    other.end()
    one.end()
    assert one.said["SUM"] == other.said["GOT"]
    assert other.said["SUM"] == one.said["GOT"]
    assert other.said["ERRORS"] == "0"


def load_into_the_lab(*names: str) -> None:
    """Modules of its kernel, with those that they need."""
    with tempfile.TemporaryDirectory() as directory:
        plain = Path(directory, "module.ko")
        for module in boot_assets.kernel("generic").modules(*names):
            plain.write_bytes(boot_assets.module_bytes(module))
            # One that is there already is refused, and no matter.
            subprocess.run([boot_assets.busybox(), "insmod", plain], stderr=subprocess.DEVNULL, check=False)


def with_the_host(machine: str, ring: str, mib: str = str(LITTLE_MIB)) -> None:
    """A tap with the host's address."""
    given, taken = give_and_take("0.0.0.0", int(mib))
    init = "echo FEATURES $(cat /sys/class/net/eth0/device/features)\n" + ADDRESS + STREAMS + ASKS
    init = init.format(me="10.0.0.2", peer="10.0.0.1", times=int(mib) // PIECE_MIB)
    guest = Guest("guest", init, "tap=tap0,address=10.0.0.1/24", machine, ring, int(mib))
    guest.machine.resume()
    guest.end()
    features = guest.said["FEATURES"]
    assert [features[bit] for bit in (0, 1, 7, 11, 15, 17, 32, 34)] == [*"1111111", "1" if ring == "packed" else "0"]
    assert guest.said["GOT"].split()[0] == given
    assert taken.get(timeout=BOOT_AND_RUN_S) == guest.said["SUM"].split()[0]
    assert guest.said["ERRORS"] == "0"


def give_and_take(address: str, mib: int) -> tuple[str, SimpleQueue[str]]:
    """The host's ends: the sum of what it gives, and where that of what it takes comes to."""
    piece, sums = os.urandom(PIECE_MIB * MIB), SimpleQueue[str]()
    times, total = mib // PIECE_MIB, hashlib.md5()
    for _ in range(times):
        total.update(piece)

    def give(end: socket.socket) -> None:
        for _ in range(times):
            end.sendall(piece)

    def take(end: socket.socket) -> None:
        taken, left = hashlib.md5(), mib * MIB
        while left and (data := end.recv(min(left, MIB))):
            taken.update(data)
            left -= len(data)
        sums.put(taken.hexdigest())

    serve(5001, give, address)
    serve(5002, take, address)
    return total.hexdigest(), sums


# The host as passt's guest sees it: its address and its gateway's, which leads to the host's loopback.
HOST_ADDRESS, GATEWAY = "192.0.2.2", "192.0.2.1"
ECHO_PORT, FORWARDED_PORT = 5003, 8080
ECHO_BYTES = 200_000
# What DHCP offers is taken; then an echo of the host's loopback, and one for whoever comes by the forwarded port. It is
# the host that ends both: of a guest that has said that it is done, Debian 12's passt (2023-03) may close the
# connection without a word to it, when the host is done too.
THROUGH_PASST = """
cat > /tmp/lease <<'END'
#!/bin/sh
[ "$1" != bound ] || { ip addr add $ip/$mask dev $interface; ip route add default via $router; echo LEASE $ip $router; }
END
chmod 755 /tmp/lease; ip link set eth0 up
udhcpc -i eth0 -s /tmp/lease -n -q -t 20 2>&1 | grep LEASE
head -c 200000 /dev/urandom > /tmp/data
mkfifo /tmp/pipe; exec 3<> /tmp/pipe
cat /tmp/data > /tmp/pipe &
nc 192.0.2.1 5003 < /tmp/pipe > /tmp/back; echo "ECHO $(cmp /tmp/data /tmp/back && wc -c < /tmp/back)"
nc -l -p 80 -e cat &
until grep -q ':0050 0*:0000 0A' /proc/net/tcp*; do usleep 100000; done
echo LISTENING; wait
"""


def beside_a_router(machine: str, ring: str, mib: str = "0") -> None:
    """A namespace with a default route, which passt wants; then as somebody who is not root."""
    from pyroute2 import IPRoute

    with IPRoute() as route:
        route.link("add", ifname="up0", kind="tuntap", mode="tap")
        for name in ("lo", "up0"):
            route.link("set", index=route.link_lookup(ifname=name)[0], state="up")
        route.addr("add", index=route.link_lookup(ifname="up0")[0], address=HOST_ADDRESS, prefixlen=24)
        route.route("add", dst="default", gateway=GATEWAY)
    user = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    os.execvp(user[0], [*user, sys.executable, __file__, "through_passt", machine, ring, mib])


def through_passt(machine: str, ring: str, mib: str) -> None:
    """Out to a server on the host's loopback, and in by a forwarded port."""
    assert os.geteuid() == 1000
    serve(ECHO_PORT, echo, "127.0.0.1")
    init = THROUGH_PASST
    if int(mib):
        given, taken = give_and_take("127.0.0.1", int(mib))
        init += (STREAMS + ASKS).format(peer=GATEWAY, times=int(mib) // PIECE_MIB)
    guest = Guest("guest", init, f"passt,forward={FORWARDED_PORT}:80", machine, ring, int(mib))
    guest.machine.resume()
    guest.wait_for("LISTENING")
    data = os.urandom(ECHO_BYTES)
    with socket.create_connection(("127.0.0.1", FORWARDED_PORT)) as end:
        sending = threading.Thread(target=end.sendall, args=(data,))
        sending.start()
        back = bytearray()
        while len(back) < ECHO_BYTES and (part := end.recv(1 << 16)):
            back += part
        sending.join()  # and only then the end, with which the guest goes: what it had yet to send would be lost
    assert back == data
    guest.end()
    assert guest.said["LEASE"] == f"{HOST_ADDRESS} {GATEWAY}"
    assert guest.said["ECHO"] == str(ECHO_BYTES)
    if int(mib):
        assert guest.said["GOT"].split()[0] == given
        assert taken.get(timeout=BOOT_AND_RUN_S) == guest.said["SUM"].split()[0]
        assert guest.said["ERRORS"] == "0"


def echo(end: socket.socket) -> None:
    left = ECHO_BYTES
    while left and (data := end.recv(1 << 16)):
        end.sendall(data)
        left -= len(data)


def run(what: str, machine: str, ring: str) -> None:
    """In a namespace of its own."""
    assert boot_assets.kernel("cloud").vmlinux  # who is not root can't make it where somebody else's files are
    command = ["unshare", "--net", sys.executable, __file__, what, machine, ring]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:]


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
