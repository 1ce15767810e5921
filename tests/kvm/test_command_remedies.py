"""What ``pyvmm`` says of a mistake, or of a host that lacks something, helps: each remedy is tried here."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import TIMEOUT_S

LIMIT_S = TIMEOUT_S
SAY_AND_EXIT = "ba f8 03 b0 2e ee b0 0a ee b0 15 e6 f4 f4"  # '.', '\n' on COM1; isa-debug-exit 0x15
STATUS = 0x15 << 1 | 1


@pytest.fixture
def flat(tmp_path: Path) -> str:
    path = tmp_path / "guest.bin"
    path.write_bytes(bytes.fromhex(SAY_AND_EXIT))
    return str(path)


def pyvmm(*args: str, limit: Callable[[], None] | None = None, cwd: Path | None = None) -> tuple[int, str]:
    """Status, and the last line on standard error; there is never a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        preexec_fn=limit,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.strip()


def refused(*args: str, cwd: Path | None = None) -> str:
    """The one sentence of a refusal."""
    status, said = pyvmm(*args, cwd=cwd)
    assert status == 2
    assert said.startswith("pyvmm: ")
    assert len(said.splitlines()) == 1
    return said


def command_in(sentence: str) -> list[str]:
    return shlex.split(sentence.split("`")[1])


# -- limits of the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("disk", [False, True])
def test_few_descriptors(flat: str, tmp_path: Path, disk: bool) -> None:
    """From the fewest that Python itself starts with up to enough: either it runs, or it says which limit to raise."""
    args = ["run", "--flat", flat, "--memory", "16"]
    if disk:
        (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
        args.append(str(tmp_path / "disk.img"))
    ends = []
    for most in range(5, 14):
        status, said = pyvmm(*args, limit=lambda n=most: resource.setrlimit(resource.RLIMIT_NOFILE, (n, n)))  # type: ignore[misc]
        if status != STATUS:
            assert (status, len(said.splitlines())) == (2, 1)
            assert "raise `ulimit -n`" in said
        ends.append(status)
    assert ends[0] == 2 and ends[-1] == STATUS


def test_little_address_space(flat: str) -> None:
    ends = []
    for most_mib in (*range(20, 60, 3), 100):
        status, said = pyvmm(
            *("run", "--flat", flat, "--memory", "16"),
            limit=lambda n=most_mib << 20: resource.setrlimit(resource.RLIMIT_AS, (n, n)),  # type: ignore[misc]
        )
        if status != STATUS:
            assert (status, len(said.splitlines())) == (2, 1)
            assert "raise `ulimit -v`" in said
        ends.append(status)
    assert ends[0] == 2 and ends[-1] == STATUS


def test_more_memory_than_address_space(flat: str) -> None:
    """Both that the sentence proposes: less memory, and a higher limit."""
    limit = 200 << 20
    status, said = pyvmm(
        "run", "--flat", flat, limit=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    )
    assert status == 2
    assert "ask for less memory, or raise `ulimit -v`" in said
    less = pyvmm(
        *("run", "--flat", flat, "--memory", "64"),
        limit=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert less == (STATUS, "")
    assert pyvmm("run", "--flat", flat) == (STATUS, "")


# -- images -------------------------------------------------------------------------------------------------


def test_a_missing_image(flat: str, tmp_path: Path) -> None:
    """The command makes one; where it could not, or a CD is wanted, it is not proposed."""
    image = tmp_path / "a disk.img"
    said = refused("run", "--flat", flat, str(image))
    subprocess.run(shlex.split(said.partition("make an empty one: ")[2]), check=True)
    assert pyvmm("run", "--flat", flat, str(image)) == (STATUS, "")
    assert "truncate" not in refused("run", "--flat", flat, str(tmp_path / "nowhere" / "disk.img"))
    assert "truncate" not in refused("run", "--flat", flat, "--cdrom", str(tmp_path / "cd.iso"))


@pytest.mark.parametrize("what", ["--drive", "--cdrom", "--kernel", "--initrd", "--firmware", "--flat", "--config", ""])
@pytest.mark.parametrize("url", ["https://localhost:1/a.img?x=1&y", "http://localhost:1/a.img"])
def test_a_url(tmp_path: Path, what: str, url: str) -> None:
    """curl is named with an address that the shell leaves as it is; then the file is there."""
    value = f"file={url}" if what == "--drive" else url
    kernel = ["--kernel", sys.executable] if what == "--initrd" else []
    said = refused("run", *kernel, *([what] if what else []), value)
    assert command_in(said) == ["curl", "-LO", url]
    assert "truncate" not in said


def test_a_file_url_and_a_protocol(flat: str) -> None:
    said = refused("run", "--flat", f"file://{flat}")
    assert pyvmm("run", "--flat", said.rpartition("give the path, ")[2]) == (STATUS, "")
    assert "not there yet, give a local image" in refused("run", "--flat", flat, "rbd:pool/image")


def test_an_empty_disk_and_an_empty_cd(flat: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    said = refused("run", "--flat", flat, str(empty))
    assert "truncate -s SIZE" in said
    said = refused("run", "--flat", flat, "--cdrom", str(empty))
    assert "truncate" not in said and "disk" not in said.replace(str(empty), "")
    assert "without a disc: --drive media=cdrom" in said
    assert pyvmm("run", "--flat", flat, "--drive", "media=cdrom") == (STATUS, "")


@pytest.mark.parametrize("second", ["the same", "a link", "a hard link"])
def test_one_image_for_two_drives(flat: str, tmp_path: Path, second: str) -> None:
    image, other = tmp_path / "disk.img", tmp_path / "other.img"
    image.write_bytes(bytes(1 << 20))
    if second == "the same":
        other = image
    elif second == "a link":
        other.symlink_to(image)
    else:
        other.hardlink_to(image)
    said = refused("run", "--flat", flat, str(image), str(other))
    assert "given to two drives" in said and "this process" not in said
    copy = tmp_path / "copy.img"
    subprocess.run(["cp", str(image), str(copy)], check=True)
    assert pyvmm("run", "--flat", flat, str(image), str(copy)) == (STATUS, "")
    both = [word for path in (image, other) for word in ("--drive", f"file={path},read-only=on")]
    assert pyvmm("run", "--flat", flat, *both) == (STATUS, "")
    one = ["--drive", f"file={image},read-only=on", str(other)]
    assert "read-only=on to both" in refused("run", "--flat", flat, *one)


# -- words --------------------------------------------------------------------------------------------------


def test_a_cpu_feature_that_is_none(flat: str) -> None:
    said = refused("run", "--flat", flat, "--cpu", "host,-qqqqqqqq")
    assert command_in(said) == ["pyvmm", "run", "--cpu", "help"]
    assert pyvmm("run", "--flat", flat, "--cpu", "host") == (STATUS, "")
    assert "did you mean xsave?" in refused("run", "--flat", flat, "--cpu", "host,-xsav")
