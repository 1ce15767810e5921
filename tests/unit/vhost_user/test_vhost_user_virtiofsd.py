"""virtiofsd itself: it is started, serves FUSE (Linux include/uapi/linux/fuse.h), and ends with whoever started it."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from boot_assets import LeftOutError
from netns import refusal

sys.path.insert(0, str(Path(__file__).parents[1] / "virtio"))
from machine_guest import MachineGuest
from waiting import wait_for

import pyvmm
from pyvmm.devices.virtio.device import NEEDS_RESET
from pyvmm.errors import ConfigError
from pyvmm.vhost_user import virtiofsd
from pyvmm.vhost_user.options import ShareOptions
from pyvmm.vhost_user.virtiofsd import Virtiofsd

REQUEST = 1
FUSE_LOOKUP, FUSE_OPEN, FUSE_READ, FUSE_INIT = 1, 14, 15, 26
ROOT = 1
IN_HEADER, OUT_HEADER = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "a, b\\"  # its options have both for themselves
    made.mkdir()
    (made / "file").write_bytes(b"what is in it")
    return made


class FuseGuest(MachineGuest):
    """A driver that speaks FUSE."""

    def __init__(self, m: pyvmm.Machine) -> None:
        super().__init__(m, "share data")
        self.start(0, 0, REQUEST)
        self.unique = 0
        self.ask(FUSE_INIT, 0, struct.pack("<IIII", 7, 31, 0, 0))

    def ask(self, opcode: int, node: int, body: bytes, most: int = 4096) -> bytes:
        """The answer's body. OSError as the program says."""
        self.unique += 1
        length = IN_HEADER.size + len(body)
        header = IN_HEADER.pack(length, opcode, self.unique, node, os.getuid(), os.getgid(), 0, 0)
        driver = self.drivers[REQUEST]
        chain = driver.add([header, body], [OUT_HEADER.size, most])
        self.notify(REQUEST)
        ((used, _),) = self.used(REQUEST)
        assert used == chain
        said = driver.data(chain)
        size, error, unique = OUT_HEADER.unpack_from(said)
        assert unique == self.unique
        if error:
            raise OSError(-error, os.strerror(-error))
        return said[OUT_HEADER.size : size]

    def read(self, name: str) -> bytes:
        (node,) = struct.unpack_from("<Q", self.ask(FUSE_LOOKUP, ROOT, name.encode() + b"\0"))
        (handle,) = struct.unpack_from("<Q", self.ask(FUSE_OPEN, node, struct.pack("<II", os.O_RDONLY, 0)))
        return self.ask(FUSE_READ, node, struct.pack("<QQIIQII", handle, 0, 4000, 0, 0, 0, 0))


@pytest.fixture
def served() -> dict[str, str]:
    """Options by which virtiofsd can serve here. In a chroot, whose root is no mount point, it can't have a root of its
    own in a namespace (pivot_root(2)); nor can a user have one by another way (unshare(2)).
    """
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    if "/" in (line.split()[4] for line in mounts):
        return {}
    if os.geteuid():
        raise LeftOutError("virtiofsd shuts itself off in a namespace, and in a chroot no user may make one")
    return {"sandbox": "chroot"}


def machine(folder: Path, **options: str) -> pyvmm.Machine:
    return pyvmm.Machine(accel="qtest", memory_mib=16, shares=[ShareOptions("data", folder, **options)])


def child_of(m: pyvmm.Machine) -> int:
    """Its pid: the first of those that serve the folder."""
    child = m.devices["share data"]._server._child  # type: ignore[attr-defined]
    assert child is not None
    return int(child.pid)


def gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_a_guest_reads_what_is_in_the_folder_and_nothing_else(
    folder: Path, served: dict[str, str], cache: str
) -> None:
    with machine(folder, cache=cache, **served) as m:
        guest = FuseGuest(m)
        assert guest.read("file") == b"what is in it"
        with pytest.raises(FileNotFoundError):
            guest.read("other")
        (folder.parent / "secret").write_bytes(b"of the host")
        with pytest.raises(OSError):  # its root has no folder above: the one in Rust looks in the folder itself
            guest.read("../secret")
        pid = child_of(m)
        assert not gone(pid)
    assert gone(pid)


def test_each_driver_has_one_of_its_own(folder: Path, served: dict[str, str]) -> None:
    """What the one before had open, and where it stood, is nobody's any more."""
    with machine(folder, **served) as m:
        before = child_of(m)
        FuseGuest(m).read("file")
        assert child_of(m) == before
        m.devices["share data"].reset()
        assert gone(before)
        assert FuseGuest(m).read("file") == b"what is in it"
        assert child_of(m) != before


def test_one_that_is_killed_leaves_a_broken_device_until_the_next_reset(folder: Path, served: dict[str, str]) -> None:
    with machine(folder, **served) as m:
        told: list[str] = []
        m.events.listen(lambda event: told.append(event.data["why"]), "device-broken")
        guest = FuseGuest(m)
        os.kill(child_of(m), signal.SIGKILL)
        wait_for(lambda: told)
        assert told[0].startswith("its back end can't be used: it has gone")
        assert guest.device.status & NEEDS_RESET
        guest.set_status(0)
        assert FuseGuest(m).read("file") == b"what is in it"


def test_it_ends_with_a_process_that_is_killed(folder: Path, served: dict[str, str]) -> None:
    program = f"""
import pyvmm, signal
from pyvmm.vhost_user.options import ShareOptions
m = pyvmm.Machine(accel="qtest", memory_mib=16, shares=[ShareOptions("data", {str(folder)!r}, **{served})])
print(m.devices["share data"]._server._child.pid, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert not gone(pid)
        process.kill()
    wait_for(lambda: gone(pid))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A program in virtiofsd's place, which a test writes."""
    path = tmp_path / "bin" / "virtiofsd"
    path.parent.mkdir()
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    monkeypatch.setattr(Virtiofsd, "_prefix", lambda self: [])  # it wants no namespace, which may not be had here
    yield path


def write(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_it_says_why_it_does_not_start(stand_in: Path, folder: Path) -> None:
    write(stand_in, "echo first >&2; echo 'unshare(CLONE_NEWPID): not here' >&2; exit 1")
    with pytest.raises(ConfigError) as caught:
        machine(folder)
    assert "share data: its back end can't be used: it has gone: unshare(CLONE_NEWPID): not here" in str(caught.value)
    assert "give sandbox=chroot as root, or socket= of one elsewhere" in str(caught.value)
    write(stand_in, "echo 'Error entering sandbox: CleanMount(Os { code: 22 })' >&2; exit 1")  # in a chroot
    with pytest.raises(ConfigError, match="give sandbox=chroot as root"):
        machine(folder)


def test_one_that_hangs_is_killed(stand_in: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtiofsd, "LONGEST_END_S", 0.2)
    monkeypatch.setattr("pyvmm.vhost_user.link.LONGEST_ANSWER_S", 0.2)
    pids = folder.parent / "pids"
    write(stand_in, f"[ \"$1\" = --print-capabilities ] && exit; echo $$ >> {pids}; trap '' TERM; exec sleep 1000")
    with pytest.raises(ConfigError, match="it does not answer"):
        machine(folder)
    assert gone(int(pids.read_text()))


def test_the_one_in_rust_is_told_in_its_own_words(stand_in: Path, folder: Path) -> None:
    features = """'{"type": "fs", "features": ["separate-options"]}'"""
    write(stand_in, f'[ "$1" != --print-capabilities ] || {{ echo {features}; exit; }}\necho "$*" >&2; exit 1')
    with pytest.raises(ConfigError) as caught:
        machine(folder, cache="none")
    assert f"--shared-dir={folder} --cache=never --sandbox=namespace --log-level=warn" in str(caught.value)


def test_a_host_without_it(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(virtiofsd, "find_program", lambda: None)
    with pytest.raises(ConfigError, match="there is no virtiofsd here: install virtiofsd"):
        machine(folder)


def test_a_folder_that_is_none(folder: Path) -> None:
    with pytest.raises(ConfigError, match="file: Not a directory: give a folder that you may read"):
        machine(folder / "file")
    with pytest.raises(ConfigError, match="No such file or directory: give a folder"):
        machine(folder / "nothing")


def test_an_ordinary_user_can_share_too(folder: Path) -> None:
    if refused := refusal("unshare", "--user"):
        raise LeftOutError(f"virtiofsd wants a user namespace, and none may be made here: {refused}")
    program = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from test_vhost_user_virtiofsd import FuseGuest, Path, machine
assert os.geteuid() == 1000
with machine(Path({str(folder)!r})) as m:
    print(FuseGuest(m).read("file").decode())
"""
    as_a_user = ["setpriv", "--clear-groups", "unshare", "--user", "--map-user=1000", "--map-group=1000"]
    done = subprocess.run([*as_a_user, sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "what is in it\n", done.stderr


def test_an_ordinary_user_has_a_namespace_of_its_own(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    server = Virtiofsd(ShareOptions("data", folder))
    server._is_of_rust = False
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert server._prefix() == []
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getgroups", list)
    assert server._prefix() == ["unshare", "--user", "--map-root-user"]
    server._is_of_rust = True
    assert server._prefix() == []
