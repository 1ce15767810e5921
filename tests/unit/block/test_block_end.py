"""The end of a drive: what does not reach the image any more is told, once, in a sentence; nothing else is."""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import EIO, ENOSPC
from pathlib import Path

import pytest
from block_drives import SECTOR, Result, flush, write

from pyvmm.block import BlockBackend
from pyvmm.block.image_tool import create
from pyvmm.errors import ConfigError, HostError

Open = Callable[..., BlockBackend]


@pytest.fixture
def failing(tmp_path: Path, image: Path) -> Callable[..., str]:
    """``failing(event)``: the image, where these requests fail, after a while for ``stalled``."""

    def name(event: str, number: int = ENOSPC, *, stalled: bool = False) -> str:
        rules = f'[inject-stall]\nevent = "{event}"\nmilliseconds = "50"\n' if stalled else ""
        path = tmp_path / "rules"
        path.write_text(f'{rules}[inject-error]\nevent = "{event}"\nerrno = "{number}"\n')
        return f"blkdebug:{path}:{image}"

    return name


def test_a_flush_that_fails_at_the_end_is_told_once(drive: Open, failing: Callable[..., str], image: Path) -> None:
    backend = drive(failing("flush_to_disk"), format="raw", id="disk")
    assert write(backend, 0, bytes(SECTOR)) == 0
    with pytest.raises(HostError) as told:
        backend.close()
    assert str(told.value) == (
        f"drive disk: not all that was written is in {backend.options.file}: No space left on device: free some space"
        " there, or write elsewhere"
    )
    assert not backend.inserted
    backend.close()
    drive(image).close()  # it was given back


def test_a_write_that_fails_at_the_end_is_told(drive: Open, failing: Callable[..., str]) -> None:
    """It was in flight, and it is too late for a policy to put it aside."""
    backend = drive(failing("write_aio", EIO, stalled=True), format="raw", werror="stop")
    result = Result()
    backend.aio_writev(0, [memoryview(bytes(SECTOR))], result)
    with pytest.raises(HostError, match="Input/output error: see to what it is on"):
        backend.close()


@pytest.mark.parametrize("options", [{"werror": "ignore"}, {"snapshot": True}, {"cache": "unsafe"}], ids=str)
def test_what_nobody_asked_for_is_not_told(
    drive: Open, failing: Callable[..., str], options: dict[str, object]
) -> None:
    backend = drive(failing("flush_to_disk"), format="raw", **options)
    write(backend, 0, bytes(SECTOR))
    backend.close()


def test_nothing_is_told_where_nothing_was_written(drive: Open, failing: Callable[..., str]) -> None:
    backend = drive(failing("flush_to_disk"), format="raw", werror="report")
    assert flush(backend) == 0
    backend.close()


def test_tables_that_can_not_be_written_are_told_without_a_flush_too(drive: Open, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(str(path), "qcow2", 1 << 20)
    backend = drive(path, cache="unsafe")
    assert write(backend, 0, b"x" * SECTOR) == 0

    async def no_room(*_: object) -> int:
        return -ENOSPC

    backend._driver.file.co_pwritev = no_room  # type: ignore[union-attr]
    with pytest.raises(HostError, match="No space left"):
        backend.close()


def test_what_close_says_of_the_file_is_told(drive: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = drive()
    really_close = os.close

    def close(fd: int) -> None:
        really_close(fd)
        raise OSError(EIO, os.strerror(EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        with pytest.raises(HostError, match="Input/output error"):
            backend.close()


def test_a_new_image_is_on_its_disk_or_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for format in ("raw", "qcow2"):
        with pytest.raises(ConfigError, match="can't be written: No space left on device: free some space"):
            create(str(tmp_path / format), format, 1 << 20)
