"""Rules that make a protocol fail, and what a drive makes of that."""

from __future__ import annotations

from collections.abc import Callable
from errno import ECANCELED, EIO, ENOSPC
from pathlib import Path
from time import monotonic

import pytest
from block_drives import ENGINES, SECTOR, Result, aligned, flush, read, write

from pyvmm.block import BlockBackend, DriveOptions, open_drive
from pyvmm.block.protocols.blkdebug import parse_rules, read_rules
from pyvmm.clock import VirtualClock
from pyvmm.errors import ConfigError


@pytest.fixture(params=ENGINES)
def faulty(
    request: pytest.FixtureRequest, drive: Callable[..., BlockBackend], image: Path, tmp_path: Path
) -> Callable[..., BlockBackend]:
    def open_it(rules: str, **options: object) -> BlockBackend:
        path = tmp_path / "rules"
        path.write_text(rules)
        return drive(f"blkdebug:{path}:{image}", aio=request.param, **options)

    return open_it


def attempt(backend: BlockBackend, sector: int) -> int:
    result = Result()
    backend.aio_readv(sector, [memoryview(bytearray(512))], result)
    return result.wait()


def test_an_error_on_every_write(faulty: Callable[..., BlockBackend]) -> None:
    backend = faulty('[inject-error]\nevent = "write_aio"\nerrno = "5"\n')
    before = read(backend, 0, 4)
    assert write(backend, 0, b"x" * 1024) == -EIO
    assert write(backend, 0, b"x" * 1024) == -EIO
    assert read(backend, 0, 4) == before
    assert flush(backend) == 0
    assert backend.stats.write.failed == 2


def test_an_error_at_a_sector(faulty: Callable[..., BlockBackend]) -> None:
    backend = faulty('[inject-error]\niotype = "read"\nsector = "10"\nsectors = "2"\nerrno = ENOSPC')
    assert [attempt(backend, sector) for sector in (9, 10, 11, 12)] == [0, -ENOSPC, -ENOSPC, 0]


def test_skip_times_and_once(faulty: Callable[..., BlockBackend]) -> None:
    backend = faulty(
        '[inject-error]\nevent = "read_aio"\nskip = "2"\ntimes = "2"\n'
        '[inject-error]\nevent = "flush_to_disk"\nonce = "on"\n'
    )
    assert [attempt(backend, 0) for _ in range(6)] == [0, 0, -EIO, -EIO, 0, 0]
    assert write(backend, 0, bytes(512)) == 0
    assert [flush(backend), flush(backend)] == [-EIO, 0]


def test_states(faulty: Callable[..., BlockBackend]) -> None:
    rules = (
        '[set-state]\niotype = "write"\nstate = "1"\nnew_state = "2"\n'
        '[inject-error]\niotype = "read"\nstate = "2"\nonce = "on"\nimmediately = "on"\n'
        '[set-state]\niotype = "read"\nstate = "2"\nnew_state = "1"\n'
    )
    backend = faulty(rules)
    assert attempt(backend, 0) == 0
    assert write(backend, 0, bytes(512)) == 0
    assert attempt(backend, 0) == -EIO
    assert attempt(backend, 0) == 0


def test_zeroes_and_discards(faulty: Callable[..., BlockBackend]) -> None:
    backend = faulty(
        '[inject-error]\niotype = "write-zeroes"\nonce="on"\n[inject-error]\niotype = "discard"\nonce="on"'
    )
    results = [Result() for _ in range(4)]
    backend.aio_write_zeroes(0, 8, results[0])
    backend.aio_discard(8, 8, results[1])
    assert [result.wait() for result in results[:2]] == [-EIO, -EIO]
    backend.aio_write_zeroes(0, 8, results[2])
    backend.aio_discard(8, 8, results[3])
    assert [result.wait() for result in results[2:]] == [0, 0]
    assert read(backend, 0, 8) == bytes(8 * SECTOR)


def test_short_transfers_are_made_whole(faulty: Callable[..., BlockBackend]) -> None:
    backend = faulty('[inject-short]\nbytes = "700"\n')
    data = bytes(range(256)) * 16
    assert write(backend, 5, data) == 0
    assert read(backend, 5, 8) == data
    assert backend.stats.read.failed == backend.stats.write.failed == 0


def test_a_write_that_stays_at_nothing_is_no_space(faulty: Callable[..., BlockBackend]) -> None:
    backend = faulty('[inject-short]\niotype = "write"\nbytes = "0"\nonce = "on"', werror="report")
    assert write(backend, 0, bytes(512)) == -ENOSPC
    assert write(backend, 0, bytes(512)) == 0


def test_a_stall_holds_the_request_and_not_the_caller(faulty: Callable[..., BlockBackend]) -> None:
    backend = faulty('[inject-stall]\niotype = "read"\nmilliseconds = "300"\nonce = "on"')
    held, free = Result(), Result()
    begin = monotonic()
    backend.aio_readv(0, [aligned(512)], held)
    backend.aio_readv(8, [aligned(512)], free)
    assert free.wait() == 0
    assert not held.done
    backend.drain()
    assert held.values == [0]
    assert monotonic() - begin >= 0.3


def test_a_stalled_request_can_be_cancelled(faulty: Callable[..., BlockBackend]) -> None:
    backend = faulty('[inject-stall]\niotype = "write"\nmilliseconds = "1000000"\nonce = "on"')
    result = Result()
    request = backend.aio_writev(0, [memoryview(b"x" * 512)], result)
    request.cancel()
    request.cancel()
    assert result.wait() == -ECANCELED
    assert read(backend, 0, 1) != b"x" * 512


def test_stop_and_resume_with_a_real_file(faulty: Callable[..., BlockBackend], image: Path) -> None:
    stopped: list[tuple[str, int, str]] = []
    event = Result()

    def on_error(backend: BlockBackend, operation: str, errno: int, action: str) -> None:
        stopped.append((operation, errno, action))
        event(0)

    backend = faulty('[inject-error]\niotype="write"\nerrno="ENOSPC"\nonce="on"', on_error=on_error)
    first, second = Result(), Result()
    backend.aio_writev(7, [memoryview(b"1" * 512)], first)
    event.wait()
    backend.aio_writev(7, [memoryview(b"2" * 512)], second)
    assert stopped == [("write", ENOSPC, "stop")]
    backend.drain()
    assert not first.done
    assert not second.done
    assert backend.stalled == 2
    backend.resume()
    assert [first.wait(), second.wait()] == [0, 0]
    assert image.read_bytes()[7 * 512 : 8 * 512] == b"2" * 512


def test_no_rules_and_nested_filters(drive: Callable[..., BlockBackend], image: Path) -> None:
    backend = drive(f"blkdebug::blkdebug::file:{image}")
    assert read(backend, 0, 2048) == image.read_bytes()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[inject-nothing]\n", "line 1: there is no section [inject-nothing]: use inject-error"),
        ("event = x\n", "line 1: 'event = x' is neither"),
        ("[inject-error]\nfoo\n", "line 2: 'foo' is neither"),
        ("[inject-error]\nfoo = 1\n", "line 2: [inject-error] has no 'foo'"),
        ("[inject-error]\nbytes = 1\n", "line 2: [inject-error] has no 'bytes'"),
        ("\n# why\n[inject-error]\nevent = maybe\n", "line 3: event='maybe'"),
        ("[inject-error]\niotype = maybe\n", "line 1: iotype='maybe'"),
        ("[inject-error]\nerrno = EMAYBE\n", "line 1: errno='EMAYBE' in [inject-error] is no number"),
        ("[inject-error]\nsector = x\n", "line 1: sector='x'"),
        ("[inject-error]\nonce = yes\n", "line 1: once='yes' in [inject-error]: use on or off"),
        ("[inject-error]\n[end]\n", "line 2: there is no section [end]"),
    ],
)
def test_wrong_rules_name_their_line(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_rules(text)
    assert str(caught.value).startswith(sentence)
    path = tmp_path / "rules"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_rules(str(path))
    assert str(caught.value) == f"the rules {path} of blkdebug, {sentence}" or sentence in str(caught.value)


def test_rules_are_read_as_written() -> None:
    rules = parse_rules(
        '# first\n[inject-error]\n\nevent = "pwritev"\nerrno = 28\n[inject-stall]\n[set-state]\nnew_state=5'
    )
    assert [rule.action for rule in rules] == ["inject-error", "inject-stall", "set-state"]
    assert (rules[0].io_type, rules[0].errno) == ("write", ENOSPC)
    assert (rules[1].io_type, rules[1].milliseconds) == ("", 2000)
    assert rules[2].new_state == 5


def test_files_that_are_not_there(tmp_path: Path, image: Path, loop: object) -> None:
    clock = VirtualClock()
    for file, sentence in (
        (f"blkdebug:{tmp_path}/none:{image}", "the rules"),
        ("blkdebug:rules", "write blkdebug:RULES:IMAGE"),
        ("blkdebug::", "write blkdebug:RULES:IMAGE"),
        (f"blkdebug::{tmp_path}/none", "does not exist"),
    ):
        with pytest.raises(ConfigError) as caught:
            open_drive(DriveOptions(file), loop=loop, clock=clock)  # type: ignore[arg-type]
        assert sentence in str(caught.value)
