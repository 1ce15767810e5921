"""The file of a snapshot: written whole or not at all; whatever else is read is one sentence."""

from __future__ import annotations

import os
import posix
import random
import signal
import subprocess
import sys
import time
from errno import EACCES, ENOLCK
from pathlib import Path
from zlib import crc32

import pytest

from pyvmm.errors import ConfigError, HostError, StateError
from pyvmm.snapshot_file import HEADER_BYTES, MAGIC, PAGE_BYTES, SnapshotFile, SnapshotWriter

MANIFEST = {"hello": [1, 2, None], "bytes": b"\0\1"}


def write(path: Path, pages: dict[int, bytes], size: int = 64 * PAGE_BYTES) -> int:
    """A file with a piece of ``size`` bytes that has these pages; where the piece is."""
    with SnapshotWriter(str(path)) as file:
        offset = file.reserve(size)
        for page, data in pages.items():
            file.write(offset + page * PAGE_BYTES, data)
        file.commit(MANIFEST)
    return offset


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.snap"
    offset = write(path, {3: b"x" * PAGE_BYTES})
    with SnapshotFile(str(path)) as file:
        assert file.manifest == MANIFEST
        assert file.check_range(offset, 64 * PAGE_BYTES) == offset
        assert os.pread(file.fd, 2 * PAGE_BYTES, offset + 2 * PAGE_BYTES) == bytes(PAGE_BYTES) + b"x" * PAGE_BYTES
        found = list(file.data(offset, 64 * PAGE_BYTES))
        assert any(at <= offset + 3 * PAGE_BYTES < at + size for at, size in found)
        assert all(at % PAGE_BYTES == size % PAGE_BYTES == 0 for at, size in found)
    assert [p.name for p in tmp_path.iterdir()] == ["a.snap"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_pages_of_zeros_take_no_room(tmp_path: Path) -> None:
    write(tmp_path / "a.snap", {0: b"x", 4000: b"y"}, 1 << 30)
    assert (tmp_path / "a.snap").stat().st_blocks * 512 < 1 << 20


def test_without_a_commit_nothing_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.snap"
    path.write_bytes(b"the one before")
    with pytest.raises(ZeroDivisionError), SnapshotWriter(str(path)) as file:
        file.write(file.reserve(PAGE_BYTES), b"x")
        raise ZeroDivisionError
    assert path.read_bytes() == b"the one before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.snap"]


KILLED = """
import sys
from pyvmm.snapshot_file import SnapshotWriter
n = 0
while True:
    n += 1
    with SnapshotWriter(sys.argv[1]) as file:
        for _ in range(20):
            file.write(file.reserve(1 << 16), bytes([n % 256]) * (1 << 16))
        file.commit({"n": n})
    if n == 1:
        print("one is there", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "a.snap"
    source = random.Random(1)
    for _ in range(20):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline()
        time.sleep(source.uniform(0, 0.05))  # which moment it is does not matter
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        with SnapshotFile(str(path)) as file:
            content = file.manifest["n"] % 256
            assert set(os.pread(file.fd, 20 << 16, PAGE_BYTES)) == {content}
    write(path, {})  # which removes what the killed ones have left
    assert [p.name for p in tmp_path.iterdir()] == ["a.snap"]


def test_a_file_that_somebody_writes_is_not_taken_for_a_left_one(tmp_path: Path) -> None:
    path = tmp_path / "a.snap"
    with SnapshotWriter(str(path)) as slow:
        slow.write(slow.reserve(PAGE_BYTES), b"slow")
        write(path, {0: b"fast"})
        slow.commit({"who": "slow"})
    with SnapshotFile(str(path)) as file:
        assert file.manifest == {"who": "slow"}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def flock(fd: int, operation: int) -> None:
        raise OSError(ENOLCK, os.strerror(ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    other = SnapshotWriter(str(tmp_path / "a.snap"))
    write(tmp_path / "a.snap", {0: b"x"})
    other.commit(MANIFEST)
    other.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.snap"]
    with SnapshotFile(str(tmp_path / "a.snap")) as file:
        assert file.manifest == MANIFEST


def test_a_folder_that_can_not_be_synced_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECTORY:
            raise PermissionError(EACCES, os.strerror(EACCES))
        return real_open(path, flags, *mode)

    monkeypatch.setattr(posix, "open", refuse)
    with pytest.raises(HostError, match=f"folder {tmp_path}: "):
        write(tmp_path / "a.snap", {0: b"x"})


def test_any_byte_that_is_not_memory_is_covered(tmp_path: Path) -> None:
    path, other = tmp_path / "a.snap", tmp_path / "b.snap"
    write(path, {0: b"x"}, PAGE_BYTES)
    good = path.read_bytes()
    manifest = 2 * PAGE_BYTES
    for n in [*range(HEADER_BYTES), *range(manifest, len(good.rstrip(b"\0")))]:
        other.write_bytes(good[:n] + bytes([good[n] ^ 1 << n % 8]) + good[n + 1 :])
        with pytest.raises(StateError, match=r"is no snapshot|is damaged"):
            SnapshotFile(str(other))


def test_one_that_was_cut_off_anywhere(tmp_path: Path) -> None:
    path, other = tmp_path / "a.snap", tmp_path / "b.snap"
    write(path, {0: b"x"}, PAGE_BYTES)
    good = path.read_bytes()
    used = len(good.rstrip(b"\0"))
    for n in range(0, used, 7):
        other.write_bytes(good[:n])
        with pytest.raises(StateError, match=r"is no snapshot|was cut off|cut off$"):
            SnapshotFile(str(other))


def head(form: int, offset: int, length: int, checksum: int) -> bytes:
    fields = ((form, 4), (offset, 8), (length, 8), (checksum, 4))
    data = MAGIC + b"".join(n.to_bytes(size, "little") for n, size in fields)
    return data + crc32(data).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no snapshot"),
        (b"#!/bin/sh\n" * 900, "no snapshot"),
        (head(1, 0, 0, 0), "format 1, this pyvmm reads 2"),
        (head(2, 0, 1 << 62, 0), "cut off"),
        (head(2, (1 << 64) - 1, 1, 0), "cut off"),
        (head(2, 4096, 3, crc32(b"\x93\1\2")) + bytes(4096 - HEADER_BYTES) + b"\x93\1\2", "ends early"),
        (head(2, 4096, 1, crc32(b"\1")) + bytes(4096 - HEADER_BYTES) + b"\1", "its manifest is no dict"),
    ],
)
def test_what_a_stranger_wrote(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.snap"
    path.write_bytes(content)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StateError, match=said) as caught:
        SnapshotFile(str(path))
    assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("offset", [0, 1, PAGE_BYTES - 1, 2 * PAGE_BYTES + 8, 1 << 63, -PAGE_BYTES, True, None, "0"])
def test_memory_that_is_not_in_it(tmp_path: Path, offset: object) -> None:
    write(tmp_path / "a.snap", {})
    with SnapshotFile(str(tmp_path / "a.snap")) as file, pytest.raises(StateError, match="memory that it names is not"):
        file.check_range(offset, PAGE_BYTES)


def test_what_no_file_can_be(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in ((tmp_path, "a folder"), (tmp_path / "pipe", "a device or a pipe"), (tmp_path / "no", "No such")):
        with pytest.raises(ConfigError, match=said):
            SnapshotFile(str(path))
    with pytest.raises(ConfigError, match="is a folder"):
        SnapshotWriter(str(tmp_path))
    with pytest.raises(ConfigError, match="No such file"):
        SnapshotWriter(str(tmp_path / "no" / "a.snap"))


def test_no_room(tmp_path: Path) -> None:
    """A limit of the process's own, so that it does not depend on the host's disk."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pyvmm.snapshot_file import SnapshotWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "with SnapshotWriter(sys.argv[1]) as file: file.write(file.reserve(2 << 20), bytes(2 << 20))\n"
    )
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.snap")], capture_output=True, text=True)
    assert HostError.__name__ in child.stderr
    assert "ulimit -f" in child.stderr
    assert not list(tmp_path.iterdir())
