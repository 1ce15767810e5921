"""Stock Linux that works on two processors while it is saved, goes on from the snapshot, and is saved again. By hand:

    ci/lab run -- .venv/bin/python tests/boot/saved_under_load.py 50 microvm
    ci/lab run -- .venv/bin/python tests/boot/saved_under_load.py 50 pc --transfers

It computes checksums, writes to its disk with fsync, says a line each 10 ms on a virtio console and one each 250 ms on
the serial port; with ``--transfers`` fio writes to another disk and verifies, and words go to the host and back by TCP
and over vsock. In the end nothing of all that is lost: tests/boot/saved_load.c says what its programs look for.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fcntl import ioctl
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import boot_assets
import disk_images
from test_linux_disk import check_file_system
from test_linux_virtio_disk import libraries

import pyvmm
from pyvmm import machine_snapshot
from pyvmm.console_options import ConsoleOptions
from pyvmm.net.options import NetOptions
from pyvmm.net.tap import set_up
from pyvmm.vsock.options import VsockOptions

if TYPE_CHECKING:
    from typing import Self

LIMIT_S = 600.0  # for one step, on a machine where much else runs
BEHIND_S = 60.0
MIB = 1 << 20
DISK_MIB, FIO_MIB, DATA_MIB = 32, 160, 16
HOST_IP, GUEST_IP, TAP = "10.78.0.1", "10.78.0.2", "pyvmm-saved"
TCP_PORT, VSOCK_PORT = 5003, 5004
IP_FREEBIND = 15  # Linux ip(7)
TUNSETIFF, TUNSETPERSIST, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 0x400454CB, 2, 0x1000, 0x4000
MODULES = (
    *("virtio_mmio", "virtio_pci", "virtio_blk", "virtio_console", "virtio_net"),
    *("vsock", "vmw_vsock_virtio_transport", "crc32c_generic", "ext4"),
)
# The kernel's own words for time that went wrong, a processor that did nothing for too long, or a disk that did.
COMPLAINTS = "soft lockup|stalls|watchdog:|watchdog on|timed out|hung_task|I/O error|EXT4-fs (error|warning)|"
COMPLAINTS += "BUG|WARNING|blocked for"

INIT = f"""\
n=0; while [ ! -c /dev/hvc0 -o ! -b /dev/vda ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
[ $n -lt 600 ] || dmesg | tail -40 # a module that did not come says why
exec 3<> /dev/hvc0 # its modes are lost where nobody has it open
stty -F /dev/hvc0 raw -echo
mount -t ext4 /dev/vda /mnt; dmesg -c > /dev/null
saved_load counter >&3 &
saved_load ticks > /dev/ttyS0 &
saved_load sums > /tmp/sums &
saved_load writer /mnt/blocks > /tmp/writer &
case $(cat /proc/cmdline) in *transfers*)
    ip link set lo up; ip addr add {GUEST_IP}/24 dev eth0; ip link set eth0 up
    saved_load tcp {HOST_IP} {TCP_PORT} > /tmp/tcp &
    saved_load vsock {VSOCK_PORT} > /tmp/vsock &
    (n=0; while [ ! -e /tmp/stop ]; do
        /mnt/ld-linux-x86-64.so.2 --library-path /mnt /mnt/fio --name=randwrite --rw=randwrite --bs=4k \\
            --filename=/dev/vdb --ioengine=libaio --direct=1 --iodepth=16 --size={DATA_MIB}m --io_size=2m \\
            --verify=crc32c --verify_fatal=1 --verify_backlog=64 --randrepeat=0 \\
            > /tmp/fio.txt 2>&1 || {{ echo "failed: $(grep -E 'verify|err=' /tmp/fio.txt | head -3)"; exit; }}
        n=$((n + 1))
    done; echo "runs $n wrong 0") > /tmp/fio &
esac
read word <&3
touch /tmp/stop; wait
for each in sums writer tcp vsock fio; do [ ! -e /tmp/$each ] || echo "$each: $(cat /tmp/$each)"; done
echo "complaints: $(dmesg | grep -E '{COMPLAINTS}' | head -5)"
umount /mnt; echo "unmounted: $?"
poweroff -f
"""


def make_load(directory: Path) -> bytes:
    path = directory / "saved_load"
    source = Path(__file__).with_name("saved_load.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-static", "-o", path, source], check=True)
    return path.read_bytes()


def make_disk(image: Path, transfers: bool) -> None:
    """With fio, and what that is linked with: too much for a RAM disk."""
    tree = image.with_name("tree")
    tree.mkdir()
    if transfers:
        fio = shutil.which("fio")
        assert fio is not None, "fio is missing: run ci/setup test"
        shutil.copy(fio, tree)
        for library in libraries(fio):
            shutil.copy(os.path.realpath(library), tree / library.name)
    disk_images.ext4(image, tree, DISK_MIB + (FIO_MIB if transfers else 0))


def make_initrd(directory: Path) -> Path:
    files = {"bin/saved_load": make_load(directory)}
    return boot_assets.initrd(INIT, directory, boot_assets.kernel("cloud").modules(*MODULES), files)


NOTHING = {"hvc0": b"", "serial": b""}


class Said:
    """What one machine says on both of its lines, after what those before it had said."""

    def __init__(self, before: dict[str, bytes] | None = None) -> None:
        self.lines = {name: bytearray(text) for name, text in (before or NOTHING).items()}
        self.changed = threading.Condition()

    def hear(self, name: str) -> Any:
        def hear(data: bytes) -> None:
            with self.changed:
                self.lines[name] += data
                self.changed.notify_all()

        return hear

    def all(self) -> dict[str, bytes]:
        with self.changed:
            return {name: bytes(text) for name, text in self.lines.items()}

    def wait_for(self, name: str, pattern: bytes, since: int) -> None:
        with self.changed:
            found = self.changed.wait_for(lambda: re.search(pattern, self.lines[name][since:]), LIMIT_S)
            assert found, (pattern, bytes(self.lines[name][-1000:]), bytes(self.lines["serial"][-3000:]))


class Chain:
    """``machine`` is the present one. Each of ``kinds`` brings the next one in another way."""

    def __init__(self, directory: Path, machine: str, *, transfers: bool = False, seed: int = 1) -> None:
        self.directory = directory
        self.random = random.Random(seed)
        self.said = Said()
        self.images = [directory / "root.img", *([directory / "data.img"] if transfers else [])]
        make_disk(self.images[0], transfers)
        for image in self.images[1:]:
            image.write_bytes(bytes(DATA_MIB * MIB))
        self.count = 0
        more: dict[str, Any] = {}
        if transfers:
            vsock = VsockOptions(3, str(directory / "vm.sock"))
            more = {"nets": [f"tap={TAP}"], "vsock": vsock}
        kernel = boot_assets.kernel("cloud")
        self.machine = pyvmm.Machine(
            machine=machine,
            cpus=2,
            memory_mib=192,
            kernel=str(kernel.vmlinux),
            initrd=str(make_initrd(directory)),
            # The lab may have no processor for longer than the 20 s after which a kernel complains. That guest time did
            # not go on alone while a machine stood is seen by comparing it (_check_time).
            append=f"console=ttyS0 quiet panic=-1 watchdog_thresh=60 {'transfers' if transfers else ''}",
            **self._lines(),
            **self._drives(),
            **more,
        )
        self.machine.resume()

    def _lines(self) -> Any:
        return {"serial": self.said.hear("serial"), "consoles": [ConsoleOptions(self.said.hear("hvc0"))]}

    def _drives(self) -> Any:
        return {"drives": [f"file={image},if=virtio,index={n},format=raw" for n, image in enumerate(self.images)]}

    def works(self, lines: int = 20) -> None:
        """Until the guest has said so many lines more. One that stands still shows where."""
        try:
            self.said.wait_for("hvc0", rb"(?:\nc .*){%d}\n" % lines, len(self.said.all()["hvc0"]))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.machine.dump()}\n{self.machine.exit_stats_table()}") from None

    def paused(self) -> object:
        """It stands, is saved, and ends."""
        path = self._path()
        self.machine.pause()
        self._check_time()
        saved = self.machine.save(path)
        self.machine.close()
        self.said = Said(self.said.all())
        self._goes_on(path)
        return saved

    def live(self) -> object:
        """It is saved while it runs; both go on, each with images of its own. What the first one says is checked up to
        its end, then it is the other one's turn.
        """
        path = self._path()
        first, said, images = self.machine, self.said, self.images
        copies = [self.directory / f"{self.count}-{n}.img" for n in range(len(images))]

        def copy() -> dict[str, bytes]:
            for image, other in zip(images, copies, strict=True):
                shutil.copyfile(image, other)
            return said.all()

        with at_the_moment(copy) as found:
            saved = first.save(path)
        self.said, self.images = Said(found[0]), copies
        self._goes_on(path, **self._drives())
        said.wait_for("hvc0", rb"\nc .*\n", len(said.all()["hvc0"]))
        first.close()
        check_lines(said.all())
        for image in images:
            image.unlink()
        return saved

    def migrated(self) -> object:
        """It leaves while it runs, and arrives in this process; its images are handed over."""
        self.count += 1
        address = str(self.directory / "migration.sock")
        ready = threading.Event()
        arrived: list[pyvmm.Machine] = []
        before, after = self.said, Said()
        self.said = after

        def wait() -> None:
            arrived.append(pyvmm.Machine.incoming(address, ready=lambda _: ready.set(), **self._lines()))

        thread = threading.Thread(target=wait)
        thread.start()
        assert ready.wait(LIMIT_S)
        migrated = self.machine.migrate_to(address)
        thread.join()
        self.machine.close()
        self.said.lines = {name: bytearray(text) for name, text in before.all().items()}
        self.machine = arrived[0]
        self.machine.resume()
        return migrated

    def _check_time(self) -> None:
        """Of a machine that stands: the guest's clock, which began a little after the machine's, has not run ahead of
        it, nor is it far behind.
        """
        told = re.findall(rb"\nc .* (\d+)(?=\n)", self.said.all()["hvc0"])
        behind_s = self.machine.clock.now_ns() / 1e9 - int(told[-1]) / 1e3
        assert 0 <= behind_s < BEHIND_S, behind_s

    def _path(self) -> Path:
        self.count += 1
        return self.directory / f"{self.count}.snap"

    def _goes_on(self, path: Path, **options: Any) -> None:
        self.machine = pyvmm.Machine.restore(path, twin=False, **self._lines(), **options)
        path.unlink()
        self.machine.resume()

    def stop(self) -> str:
        """The guest ends its work and itself: what it has said on its serial port."""
        self.machine.consoles["hvc0"].feed(b"stop\n")
        assert self.machine.wait(LIMIT_S), self.said.all()["serial"][-3000:]
        return self.said.all()["serial"].decode()

    def end(self) -> dict[str, str]:
        """What it says of its work in the end, by the first word."""
        told = self.stop()
        assert self.machine.status == 0
        self._check_time()
        self.machine.close()
        said = dict(re.findall(r"^(\w+): (.*?)\r?$", told, re.MULTILINE))
        lines, ticks = check_lines(self.said.all())
        assert lines > 100 and ticks > 3, told
        assert said["complaints"] == "" and said["unmounted"] == "0", told
        for name in ("sums", "writer", *(("tcp", "vsock", "fio") if len(self.images) > 1 else ())):
            found = re.fullmatch(r"\w+ (\d+) wrong 0(?: .*)?", said.get(name, ""))
            assert found and int(found[1]) > 0, (name, told[-2000:])
        check_file_system(self.images[0])
        return {**said, "lines": f"{lines} and {ticks}"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.machine.close()


def check_lines(said: dict[str, bytes]) -> tuple[int, int]:
    """Every line is there, whole and once: how many there are."""
    counted = re.findall(rb"([^\n]*)\n", said["hvc0"])
    for n, line in enumerate(counted):
        found = re.fullmatch(rb"c (\d+) (\d+) (\d+) (\d+) \d+", line)
        assert found or (line == b"end" and n == len(counted) - 1), (n, line, counted[max(0, n - 2) : n + 3])
        if found:
            number, expired, before_ms, after_ms = (int(text) for text in found.groups())
            assert number == n, (n, line, counted[max(0, n - 2) : n + 3])
            # Each expiration counts, also those that came while nobody had time to look.
            assert before_ms // 10 - 1 <= expired <= after_ms // 10 + 1, (line, counted[max(0, n - 2) : n + 3])
    ticks = re.findall(rb"tick [^\r\n]*\r\n", said["serial"])
    for n, line in enumerate(ticks):
        assert line == b"tick %08d abcdefghijklmnopqrstuvwxy\r\n" % n, (n, line)
    # But for the kernel's first words and the last ones of /init nothing else is said there.
    first = said["serial"].find(b"tick 00000000")
    if first >= 0 and (last := said["serial"].rfind(b"tick ")) >= 0:
        between = said["serial"][first:last]
        assert between == b"".join(ticks)[: len(between)], between[-2000:]
    return len(counted), len(ticks)


@contextmanager
def at_the_moment(work: Any) -> Iterator[list[Any]]:
    """What ``work`` gives while a machine stands that is saved: what can't be had from outside, for a test only."""
    found: list[Any] = []
    take = machine_snapshot.take

    def with_work(*arguments: Any) -> None:
        found.append(work())
        take(*arguments)

    machine_snapshot.take = with_work
    try:
        yield found
    finally:
        machine_snapshot.take = take


# -- the host's ends of transfers --------------------------------------------------------------------------------------


class Echoes:
    """Gives back what comes by TCP to HOST_IP and at a Unix socket, each connection on a thread of its own; the tap is
    there for as long as this is, whichever machine has it open.
    """

    def __init__(self, directory: Path) -> None:
        tap = os.open("/dev/net/tun", os.O_RDWR)
        name = struct.pack("16sH22x", TAP.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
        ioctl(tap, TUNSETIFF, name)
        ioctl(tap, TUNSETPERSIST, 1)
        os.close(tap)
        set_up(TAP, NetOptions.parse(f"tap={TAP},address={HOST_IP}/24"))
        self._name = name
        by_vsock = socket.socket(socket.AF_UNIX)
        by_vsock.bind(str(directory / f"vm.sock_{VSOCK_PORT}"))
        by_vsock.listen()
        by_tcp = socket.socket()
        by_tcp.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)  # the address comes with the machine
        by_tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        by_tcp.bind((HOST_IP, TCP_PORT))
        by_tcp.listen()
        self._listening = [by_vsock, by_tcp]
        self._changed = threading.Condition()
        self._given_back = {by_vsock: 0, by_tcp: 0}
        for each in self._listening:
            threading.Thread(target=self._accept, args=(each,), daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                end, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(listening, end), daemon=True).start()

    def _echo(self, listening: socket.socket, end: socket.socket) -> None:
        with end:
            try:
                while data := end.recv(1 << 16):
                    end.sendall(data)
                    with self._changed:
                        self._given_back[listening] += len(data)
                        self._changed.notify_all()
            except OSError:
                pass  # of a machine that is gone

    def works(self) -> bool:
        """Wait until something more has gone to and fro, on both ways: whether it has."""
        with self._changed:
            before = dict(self._given_back)
            return self._changed.wait_for(
                lambda: all(self._given_back[each] > n for each, n in before.items()), LIMIT_S
            )

    def __repr__(self) -> str:
        """How much has, by vsock and by TCP."""
        return f"<Echoes: {list(self._given_back.values())}>"

    def close(self) -> None:
        for each in self._listening:
            each.close()
        tap = os.open("/dev/net/tun", os.O_RDWR)
        ioctl(tap, TUNSETIFF, self._name)
        ioctl(tap, TUNSETPERSIST, 0)
        os.close(tap)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def run(directory: Path, machine: str, wanted: int, *, transfers: bool = False) -> dict[str, str]:
    """``wanted`` snapshots, one of each kind after the other, at random moments of the work."""
    began = time.monotonic()
    with ExitStack() as stack:
        echoes = stack.enter_context(Echoes(directory)) if transfers else None
        chain = stack.enter_context(Chain(directory, machine, transfers=transfers))
        # With a network only what is saved while nobody else goes on: there is one end of it.
        kinds = [chain.paused] if transfers else [chain.live, chain.paused, chain.migrated]
        for n in range(wanted):
            works(chain, echoes)
            time.sleep(chain.random.uniform(0, 0.5))  # which moment it is does not matter
            what = kinds[n % len(kinds)]
            print(f"{time.monotonic() - began:.0f} s: {n + 1} {what.__name__} {what()}", flush=True)
        works(chain, echoes)
        return chain.end()


def works(chain: Chain, echoes: Echoes | None) -> None:
    """Both do. Where transfers don't, the guest's programs say why."""
    chain.works()
    before = repr(echoes)
    if echoes is not None and not echoes.works():
        raise AssertionError(f"transfers stand still: {before}, {echoes}; the guest says {chain.stop()[-1500:]}")


def main() -> int:
    wanted = int(next((word for word in sys.argv[1:] if word.isdigit()), "20"))
    machine = "pc" if "pc" in sys.argv else "microvm"
    with tempfile.TemporaryDirectory() as directory:
        print(run(Path(directory), machine, wanted, transfers="--transfers" in sys.argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
