"""A host file system that is full: the drive stops, room is made, and nothing is lost. Where we may mount one."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from errno import ENOSPC
from pathlib import Path

import pytest
from block_drives import ENGINES, LEFT_OUT, SECTOR, Result, flush
from waiting import wait_for

from pyvmm.block import BlockBackend
from pyvmm.block.protocols import file_posix

SIZE_KIB = 256


def mount(directory: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_KIB}k", "pyvmm-test", str(directory)]
    return subprocess.run(command, capture_output=True).returncode == 0


def unmount(directory: Path) -> None:
    subprocess.run(["umount", str(directory)], check=True)


def we_may() -> bool:
    if not (shutil.which("mount") and shutil.which("umount")):
        return False
    with tempfile.TemporaryDirectory() as name:
        if not mount(Path(name)):
            return False
        unmount(Path(name))
    return True


if not we_may():
    LEFT_OUT.append("a full file system: this user may not mount one here")
else:

    @pytest.fixture
    def small(tmp_path: Path) -> Iterator[Path]:
        directory = tmp_path / "small"
        directory.mkdir()
        assert mount(directory)
        yield directory
        unmount(directory)

    @pytest.fixture(params=["at once", "engine"])
    def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if request.param == "engine":
            monkeypatch.setattr(file_posix, "INLINE_LIMIT_BYTES", -1)

    @pytest.mark.usefixtures("road")
    @pytest.mark.parametrize("aio", ENGINES)
    def test_enospc_stops_and_goes_on_when_there_is_room(
        small: Path, drive: Callable[..., BlockBackend], aio: str
    ) -> None:
        image, ballast = small / "disk.img", small / "ballast"
        ballast.write_bytes(bytes(64 << 10))
        with open(image, "wb") as file:
            file.truncate(224 << 10)
        stops: list[tuple[str, int, str]] = []
        backend = drive(image, aio=aio, on_error=lambda drive, *what: stops.append(what))
        # 7 times 32 KiB: more than there is beside the ballast.
        results = [Result() for _ in range(7)]
        for number, result in enumerate(results):
            backend.aio_writev(64 * number, [memoryview(bytearray([number + 1]) * (64 * SECTOR))], result)
        wait_for(lambda: bool(stops))
        backend.drain()
        assert stops[0] == ("write", ENOSPC, "stop")
        assert backend.stalled >= 1
        assert [result.values for result in results].count([]) == backend.stalled
        ballast.unlink()
        backend.resume()
        assert [result.wait() for result in results] == [0] * 7
        assert flush(backend) == 0
        backend.close()
        assert image.read_bytes() == b"".join(bytes([n + 1]) * (64 * SECTOR) for n in range(7))
