"""Drives on images of their own, an event loop that tells what it was given to run, and a watch over the rule which
thread a coroutine goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from block_drives import LEFT_OUT, ManualLoop, TestLoop
from lock_watch import watch_locks

from pyvmm.block import BlockBackend, DriveOptions, open_drive
from pyvmm.errors import HostError


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for what in LEFT_OUT:
        terminalreporter.write_line(f"NOT TESTED on this host: {what}")


@pytest.fixture(autouse=True)
def no_lock_is_held_where_a_coroutine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/design.md, "Which thread a coroutine goes on": in every test of the block layer."""
    watch_locks(monkeypatch)


@pytest.fixture
def loop() -> Iterator[TestLoop]:
    """A real event loop. What its callbacks raised fails the test."""
    loop = TestLoop()
    yield loop
    loop.close()
    assert loop.errors == []


@pytest.fixture
def manual_loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """1 MiB of bytes that tell their place."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(number.to_bytes(4, "little") * 128 for number in range(2048)))
    return path


@pytest.fixture
def drive(image: Path, loop: TestLoop) -> Iterator[Callable[..., BlockBackend]]:
    """``drive(cache="none")``: that image as a drive, closed in the end."""
    opened = []

    def open_it(file: Path | str | None = image, **options: object) -> BlockBackend:
        on_error = options.pop("on_error", None)
        backend = open_drive(
            DriveOptions(file, **options),
            loop=loop,
            clock=loop.clock,
            on_error=on_error,  # type: ignore[arg-type]
        )
        opened.append(backend)
        return backend

    yield open_it
    for backend in opened:
        try:
            backend.close()
        except HostError:
            pass  # of a disk that the test has taken away: test_block_end.py looks at this
