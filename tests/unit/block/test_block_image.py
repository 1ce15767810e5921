"""Opening images: what they are, who else has them, what O_DIRECT asks, and the sentence for each that can't be."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from errno import EACCES, EINVAL, EIO, ELOOP, EPERM, EROFS
from pathlib import Path

import pytest
from block_drives import takes_direct, write

from pyvmm.block import BlockBackend, DriveOptions
from pyvmm.block.protocols.image import Image, in_memory, probe_alignment, why_not_opened
from pyvmm.block.protocols.locking import held_by_another, lock_image, users
from pyvmm.errors import ConfigError

SHM = Path("/dev/shm")


def refusal(drive: Callable[..., BlockBackend], file: Path | str, **options: object) -> str:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError) as caught:
        drive(file, **options)
    assert set(os.listdir("/proc/self/fd")) == before
    sentence = str(caught.value)
    assert str(file) in sentence
    assert "\n" not in sentence
    return sentence


def test_missing(drive: Callable[..., BlockBackend], tmp_path: Path) -> None:
    assert "does not exist: give the path of one" in refusal(drive, tmp_path / "none.img")


def test_a_directory(drive: Callable[..., BlockBackend], tmp_path: Path) -> None:
    assert "is a directory: give the path of an image in it" in refusal(drive, tmp_path)


def test_neither_file_nor_block_device(drive: Callable[..., BlockBackend], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "fifo", tmp_path / "socket", "/dev/null"):
            assert "is neither a file nor a block device" in refusal(drive, path)


def test_empty_and_too_small(drive: Callable[..., BlockBackend], tmp_path: Path) -> None:
    path = tmp_path / "small.img"
    path.write_bytes(b"")
    assert "is empty: make it as large as the disk" in refusal(drive, path)
    path.write_bytes(bytes(511))
    assert "is too small: 511 bytes are not one sector of 512" in refusal(drive, path)
    path.write_bytes(bytes(2047))
    assert "is too small: 2047 bytes are not one sector of 2048" in refusal(drive, path, media="cdrom")
    path.write_bytes(bytes(512))
    assert "is too small: 0 bytes" in refusal(drive, path, offset=512)
    assert "is too small: 0 bytes" in refusal(drive, path, offset=1000)
    assert "is too small: 100 bytes" in refusal(drive, path, size=100)
    assert "has 512 bytes, and offset=0, size=513 ask for 513" in refusal(drive, path, size=513)
    assert drive(path).sectors == 1


def test_a_name_that_is_none(drive: Callable[..., BlockBackend], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no path: .*embedded null"):
        drive("a\0b")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "can't be opened: Too many levels of symbolic links" in refusal(drive, tmp_path / "loop")


@pytest.mark.parametrize(
    ("errno", "flags", "sentence"),
    [
        (EACCES, os.O_RDWR, "may not be written (Permission denied): allow it, or give read-only=on"),
        (EPERM, os.O_RDWR, "may not be written (Operation not permitted): allow it, or give read-only=on"),
        (EROFS, os.O_RDWR, "may not be written (Read-only file system): allow it, or give read-only=on"),
        (EACCES, os.O_RDONLY, "may not be read (Permission denied): allow it with chmod"),
        (EINVAL, os.O_RDWR | os.O_DIRECT, "knows no O_DIRECT: use cache=writeback"),
        (EIO, os.O_RDWR, "can't be opened: Input/output error"),
        (ELOOP, os.O_RDONLY, "can't be opened: Too many levels"),
    ],
)
def test_what_the_kernel_says(errno: int, flags: int, sentence: str, image: Path) -> None:
    assert sentence in why_not_opened(str(image), flags, OSError(errno, os.strerror(errno)))


def test_what_may_not_even_be_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    assert "may not be read" in why_not_opened(missing, os.O_RDWR, OSError(EACCES, "Permission denied"))


def test_it_waits_for_its_io(image: Path) -> None:
    opened = Image(str(image), read_only=False)
    assert os.get_blocking(opened.fd)
    assert not os.get_inheritable(opened.fd)
    opened.close()
    opened.close()


# -- locks ----------------------------------------------------------------------------------------------------


def test_two_writers_two_readers_and_one_of_each(drive: Callable[..., BlockBackend], image: Path) -> None:
    writer = drive(image)
    me = "is in use by this process: end that first, or give locking=off"
    assert me in refusal(drive, image)
    assert me in refusal(drive, image, read_only=True)
    careless = drive(image, locking=False)
    assert me in refusal(drive, image)  # the careless one has set none, and has taken none away
    careless.close()
    writer.close()
    reader = drive(image, read_only=True)
    second = drive(image, media="cdrom")
    assert me in refusal(drive, image)
    reader.close()
    assert me in refusal(drive, image)
    second.close()
    drive(image)


def test_locks_end_with_the_process_that_held_them(drive: Callable[..., BlockBackend], image: Path) -> None:
    script = (
        "import sys\n"
        "from pyvmm.block.protocols.image import Image\n"
        "image = Image(sys.argv[1], read_only=False)\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    assert f"process {other.pid} (" in refusal(drive, image)
    other.kill()
    other.communicate()
    drive(image)


def test_a_refused_lock_leaves_nothing_behind(image: Path) -> None:
    fds = [os.open(image, os.O_RDWR) for _ in range(3)]
    assert lock_image(fds[0], False)
    assert not lock_image(fds[1], True)
    assert lock_image(fds[2], False)
    assert not held_by_another(fds[0], 101)
    for fd in fds:
        os.close(fd)


def test_a_file_system_without_locks_lets_everybody_in(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, command: int, argument: bytes) -> bytes:
        raise OSError(EINVAL, "Invalid argument")

    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    with open(image, "r+b") as file:
        assert lock_image(file.fileno(), True)


def test_users_are_named(image: Path) -> None:
    with open(image, "rb") as one, open(image, "rb"):
        assert users(one.fileno()) == ["this process"]
    with open(image, "rb") as one:
        assert users(one.fileno()) == []


class Qemu:
    """QEMU with an image open, stopped. It answers by QMP when it has opened everything; else it ends."""

    def __init__(self, path: Path, read_only: bool) -> None:
        drive = f"file={path},format=raw,if=none,id=d" + (",read-only=on" if read_only else "")
        self.process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", "tcg", "-display", "none", "-S", "-nodefaults", "-qmp", "stdio"),
                *("-drive", drive, "-device", "virtio-blk-pci,drive=d"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write('{"execute": "qmp_capabilities"}\n')
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        lines = [json.loads(line) for line in (self.process.stdout.readline(), self.process.stdout.readline()) if line]
        self.runs = len(lines) == 2 and lines[1] == {"return": {}}

    def __enter__(self) -> Qemu:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        _, self.said = self.process.communicate()


if shutil.which("qemu-system-x86_64"):

    def test_qemu_and_pyvmm_know_of_each_other(drive: Callable[..., BlockBackend], image: Path) -> None:
        with Qemu(image, read_only=False) as qemu:
            assert qemu.runs
            assert f"process {qemu.process.pid} (qemu-system-x86)" in refusal(drive, image)
            assert "qemu" in refusal(drive, image, read_only=True)
        with Qemu(image, read_only=True) as qemu:
            assert qemu.runs
            assert "qemu" in refusal(drive, image)
            drive(image, read_only=True).close()
        writer = drive(image)
        for read_only in (False, True):
            with Qemu(image, read_only) as qemu:
                assert not qemu.runs
            assert "lock" in qemu.said
        writer.close()
        reader = drive(image, read_only=True)
        with Qemu(image, read_only=False) as qemu:
            assert not qemu.runs
        with Qemu(image, read_only=True) as qemu:
            assert qemu.runs
        reader.close()


# -- where it lives -------------------------------------------------------------------------------------------


def test_file_systems_in_memory_are_known(tmp_path: Path, image: Path) -> None:
    if SHM.is_dir():
        path = SHM / f"pyvmm-test-{os.getpid()}"
        try:
            path.write_bytes(bytes(512))
            on_tmpfs = in_memory(path.stat())
        finally:
            path.unlink()
        assert on_tmpfs
    proc = os.stat("/proc/self/maps")
    assert not in_memory(proc)
    assert not in_memory(os.stat("/dev/null"))


def test_a_memory_image_is_never_waited_for(drive: Callable[..., BlockBackend]) -> None:
    path = SHM / f"pyvmm-test-{os.getpid()}.img"
    path.write_bytes(bytes(1 << 16))
    try:
        backend = drive(path)
        done: list[int] = []
        backend.aio_writev(3, [memoryview(b"x" * 512)], done.append)
        backend.aio_readv(3, [memoryview(bytearray(512))], done.append)
        assert done == [0, 0]
    finally:
        path.unlink()


def test_alignment_is_what_the_kernel_takes(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if takes_direct(tmp_path):
        fd = os.open(image, os.O_RDONLY | os.O_DIRECT)
        alignment = probe_alignment(str(image), fd)
        os.close(fd)
        assert alignment in (1, 512, 4096)
    real = os.preadv

    def needs_4096(fd: int, buffers: list[memoryview], offset: int) -> int:
        if (len(buffers[0]) | offset) % 4096:
            raise OSError(EINVAL, "Invalid argument")
        return real(fd, buffers, offset)

    with open(image, "rb") as file:
        monkeypatch.setattr(os, "preadv", needs_4096)
        assert probe_alignment(str(image), file.fileno()) == 4096

        def takes_nothing(fd: int, buffers: list[memoryview], offset: int) -> int:
            raise OSError(EINVAL, "Invalid argument")

        monkeypatch.setattr(os, "preadv", takes_nothing)
        with pytest.raises(ConfigError, match="use cache=writeback"):
            probe_alignment("x", file.fileno())

        def broken(fd: int, buffers: list[memoryview], offset: int) -> int:
            raise OSError(EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(ConfigError, match="can't be read: Input/output error"):
            probe_alignment("x", file.fileno())


def test_options_of_an_opened_drive(drive: Callable[..., BlockBackend], image: Path) -> None:
    backend = drive(image, id="root", serial="S1", offset=512, size=1000)
    assert (backend.name, backend.options.serial) == ("root", "S1")
    assert (backend.size_bytes, backend.sectors, backend.inserted) == (512, 1, True)
    assert write(backend, 0, b"x" * 512) == 0
    data = image.read_bytes()
    assert data[508:1028] == b"\0" * 4 + b"x" * 512 + (2).to_bytes(4, "little")
    assert isinstance(backend.options, DriveOptions)
