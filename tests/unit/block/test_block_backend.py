"""A drive as a device sees it: order, policies, cancel, drain, counters. On a driver that waits for the test."""

from __future__ import annotations

import threading
from errno import EACCES, ECANCELED, EINVAL, EIO, ENOMEDIUM, ENOSPC

import pytest
from block_drives import SECTOR, ManualDrive, ManualLoop, Result
from waiting import wait_for

from pyvmm.block import BlockBackend, DriveOptions, open_drive
from pyvmm.block.coroutine import AioContext
from pyvmm.clock import VirtualClock
from pyvmm.errors import HostError

# -- what the guest asks wrongly ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sector", "count", "ret"), [(2048, 1, -EIO), (2047, 2, -EIO), (-1, 1, -EIO), (1 << 60, 1, -EIO), (2048, 0, 0)]
)
def test_requests_past_the_end_fail_at_once(sector: int, count: int, ret: int) -> None:
    drive = ManualDrive(rerror="stop", werror="stop")
    assert drive.backend.sectors == 2048
    for submit in (drive.read, drive.write):
        result = submit(sector, count)
        if ret == 0:
            drive.finish()
        assert result.values == [ret]
    zeroes, discard = Result(), Result()
    drive.backend.aio_write_zeroes(sector, count, zeroes)
    drive.backend.aio_discard(sector, count, discard)
    if ret:
        assert zeroes.values == discard.values == [ret]
        assert drive.driver.log == []
        assert drive.errors == []  # no policy: it is the guest's mistake
        assert drive.backend.stats.read.failed == 1
        assert drive.backend.stats.write.failed == 2
        assert drive.backend.stats.in_flight == 0


def test_what_is_no_whole_sector_is_invalid() -> None:
    drive = ManualDrive()
    result = Result()
    drive.backend.aio_readv(0, [memoryview(bytearray(511))], result)
    assert result.values == [-EINVAL]
    result = Result()
    drive.backend.aio_discard(10, -1, result)
    assert result.values == [-EINVAL]


@pytest.mark.parametrize("options", [{"read_only": True}, {"media": "cdrom"}])
def test_a_read_only_drive_is_read_and_flushed_only(options: dict[str, object]) -> None:
    drive = ManualDrive(**options)
    assert drive.backend.read_only
    zeroes, discard = Result(), Result()
    drive.backend.aio_write_zeroes(0, 1, zeroes)
    drive.backend.aio_discard(0, 1, discard)
    assert drive.write(0).values == zeroes.values == discard.values == [-EACCES]
    assert drive.flush().values == [0]
    result = drive.read(0)
    drive.finish()
    assert result.values == [0]


def test_a_drive_without_a_medium() -> None:
    clock = VirtualClock()
    backend = open_drive(DriveOptions(None, media="cdrom", id="tray"), loop=ManualLoop(), clock=clock)
    assert not backend.inserted
    assert (backend.name, backend.sectors, backend.size_bytes) == ("tray", 0, 0)
    results = [Result() for _ in range(5)]
    backend.aio_readv(0, [memoryview(bytearray(512))], results[0])
    backend.aio_writev(0, [memoryview(bytearray(512))], results[1])
    backend.aio_flush(results[2])
    backend.aio_discard(0, 1, results[3])
    backend.aio_write_zeroes(0, 1, results[4])
    assert [result.values for result in results] == [[-ENOMEDIUM]] * 5
    backend.drain()
    backend.resume()
    backend.close()


# -- order --------------------------------------------------------------------------------------------------


def test_requests_apart_and_overlapping_reads_run_together() -> None:
    drive = ManualDrive()
    drive.write(0, 8)
    drive.write(8, 8)
    drive.read(16, 8)
    drive.read(20, 8)
    drive.flush()
    assert drive.driver.log == ["write 0+8", "write 8+8", "read 16+8", "read 20+8"]  # nothing written yet: no flush


@pytest.mark.parametrize(("first", "second"), [("write", "write"), ("write", "read"), ("read", "write")])
def test_of_overlapping_requests_the_later_one_waits(first: str, second: str) -> None:
    drive = ManualDrive()
    one = getattr(drive, first)(0, 8)
    two = getattr(drive, second)(7, 8)
    assert drive.driver.log == [f"{first} 0+8"]
    drive.finish()
    assert one.values == [0]
    assert two.values == []
    assert drive.driver.log == [f"{first} 0+8", f"{second} 7+8"]
    drive.finish()
    assert two.values == [0]


def test_a_chain_runs_in_the_order_of_submission() -> None:
    drive = ManualDrive()
    drive.write(0, 4)
    drive.write(2, 4)  # waits for the first
    drive.read(5, 1)  # waits for the second
    drive.write(0, 1)  # waits for the first
    drive.read(100)
    assert drive.driver.log == ["write 0+4", "read 100+1"]
    drive.finish()
    assert drive.driver.log[2:] == ["write 2+4", "write 0+1"]
    drive.finish(index=1)  # write 2+4
    assert drive.driver.log[4:] == ["read 5+1"]


def test_discards_and_zeroes_keep_the_order_too() -> None:
    drive = ManualDrive()
    drive.write(0)
    drive.backend.aio_discard(0, 8, Result())
    drive.backend.aio_write_zeroes(4, 8, Result())
    drive.read(11)
    for log in (["write 0+1"], ["discard 0+8"], ["unmap 4+8"], ["read 11+1"]):
        assert [repr(step) for step in drive.driver.steps] == log
        drive.finish()


def test_a_long_chain_does_not_nest() -> None:
    drive = ManualDrive()
    results = [drive.write(0) for _ in range(3000)]
    for result in results:
        drive.finish()
        assert result.values == [0]


def test_writes_in_one_block_of_o_direct_wait_for_each_other() -> None:
    drive = ManualDrive(alignment=4096)
    drive.write(0)
    drive.write(7)  # the same 4 KiB block
    drive.write(8)
    assert drive.driver.log == ["write 0+1", "write 8+1"]


# -- flush --------------------------------------------------------------------------------------------------


def test_a_flush_goes_down_only_if_something_was_written() -> None:
    drive = ManualDrive()
    assert drive.flush().values == [0]
    drive.write(0)
    assert drive.flush().values == [0]  # that write is not complete: not this flush's business
    drive.finish()
    result = drive.flush()
    assert result.values == []
    drive.finish()
    assert result.values == [0]
    assert drive.flush().values == [0]
    assert drive.driver.log == ["write 0+1", "flush 0+0"]
    assert drive.backend.stats.flush.operations == 4


def test_a_write_that_ends_during_a_flush_is_not_covered_by_it() -> None:
    drive = ManualDrive()
    drive.write(0)
    drive.write(1)
    drive.finish()
    flushed = drive.flush()
    drive.finish()  # the second write
    drive.finish()  # the flush
    assert flushed.values == [0]
    drive.flush()
    assert drive.driver.log[-1] == "flush 0+0"
    assert len(drive.driver.log) == 4


def test_a_failed_flush_is_not_forgotten() -> None:
    drive = ManualDrive()
    drive.write(0)
    drive.finish()
    failed = drive.flush()
    drive.finish(-EIO)
    assert failed.values == [-EIO]
    again = drive.flush()
    assert again.values == []
    drive.finish(-EIO)
    assert again.values == [-EIO]


def test_unsafe_flushes_nothing() -> None:
    drive = ManualDrive(cache="unsafe")
    drive.write(0)
    drive.finish()
    assert drive.flush().values == [0]
    drive.backend.close()
    assert drive.driver.log == ["write 0+1"]


@pytest.mark.parametrize(("cache", "fua"), [("writethrough", True), ("directsync", True), ("none", False)])
def test_write_through(cache: str, fua: bool) -> None:
    drive = ManualDrive(cache=cache)
    assert drive.backend.write_cache is not fua
    drive.write(0)
    assert drive.driver.log == ["write-fua 0+1" if fua else "write 0+1"]
    drive.backend.write_cache = fua  # the guest turns it
    drive.write(8)
    assert drive.driver.log[1:] == ["write 8+1" if fua else "write-fua 8+1"]


# -- zeroes and discards ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("detect", "discard", "step"),
    [
        ("off", "unmap", "write 0+8"),
        ("on", "unmap", "zero 0+8"),
        ("unmap", "unmap", "unmap 0+8"),
        ("unmap", "ignore", "zero 0+8"),
    ],
)
def test_zero_detection(detect: str, discard: str, step: str) -> None:
    drive = ManualDrive(detect_zeroes=detect, discard=discard)
    drive.write(0, 8, byte=0)
    drive.write(100, 1, byte=1)
    assert drive.driver.log == [step, "write 100+1"]


@pytest.mark.parametrize(("discard", "log"), [("unmap", ["discard 0+8", "unmap 8+8"]), ("ignore", ["zero 8+8"])])
def test_discard_and_write_zeroes(discard: str, log: list[str]) -> None:
    drive = ManualDrive(discard=discard)
    discarded, zeroed = Result(), Result()
    drive.backend.aio_discard(0, 8, discarded)
    drive.backend.aio_write_zeroes(8, 8, zeroed)
    assert drive.driver.log == log
    for _ in log:
        drive.finish()
    assert discarded.values == zeroed.values == [0]
    assert drive.backend.stats.discard.bytes == drive.backend.stats.write.bytes == 8 * SECTOR


# -- policies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rerror", "werror", "errno", "read_action", "write_action"),
    [
        ("report", "enospc", EIO, "report", "report"),
        ("report", "enospc", ENOSPC, "report", "stop"),
        ("stop", "stop", EIO, "stop", "stop"),
        ("stop", "report", ENOSPC, "stop", "report"),
        ("ignore", "ignore", EIO, "ignore", "ignore"),
        ("report", "stop", ENOSPC, "report", "stop"),
    ],
)
def test_policies(rerror: str, werror: str, errno: int, read_action: str, write_action: str) -> None:
    drive = ManualDrive(rerror=rerror, werror=werror)
    read = drive.read(0)
    drive.finish(-errno)
    assert drive.errors == [("read", errno, read_action)]
    assert read.values == {"report": [-errno], "ignore": [0], "stop": []}[read_action]
    drive.backend.drop_stalled()
    drive.errors.clear()

    write = drive.write(8)
    drive.finish(-errno)
    assert drive.errors == [("write", errno, write_action)]
    assert write.values == {"report": [-errno], "ignore": [0], "stop": []}[write_action]
    assert drive.backend.stats.write.failed == 1
    assert drive.backend.stats.in_flight == 0
    drive.backend.drop_stalled()
    drive.errors.clear()

    flush = drive.flush()
    drive.finish(-errno)
    assert drive.errors == [("flush", errno, write_action)]
    assert flush.values == {"report": [-errno], "ignore": [0], "stop": []}[write_action]


def test_a_stopped_request_is_tried_again_and_nothing_is_lost() -> None:
    drive = ManualDrive(werror="stop")
    results = [drive.write(sector) for sector in (0, 10, 0, 20)]
    drive.finish(-EIO)  # the first write 0; the second one waited for it, and now stays behind it
    drive.finish(0)  # write 10
    drive.finish(-ENOSPC)  # write 20
    later = [drive.read(0), drive.write(30)]
    assert drive.backend.stalled == 5
    assert drive.backend.stats.in_flight == 0
    assert drive.driver.log == ["write 0+1", "write 10+1", "write 20+1"]
    assert drive.errors == [("write", EIO, "stop"), ("write", ENOSPC, "stop")]
    drive.backend.drain()  # it does not wait for what was put aside

    drive.backend.resume()
    assert drive.driver.log[3:] == ["write 0+1", "write 20+1", "write 30+1"]
    drive.finish()
    assert drive.driver.log[6:] == ["write 0+1"]
    for _ in range(3):
        drive.finish()
    assert drive.driver.log[7:] == ["read 0+1"]
    drive.finish()
    assert [result.values for result in (*results, *later)] == [[0]] * 6
    assert drive.backend.stalled == 0
    assert drive.backend.stats.write.operations == 5
    assert drive.backend.stats.write.failed == 2


def test_a_request_that_fails_again_is_put_aside_again_with_what_waits_for_it() -> None:
    drive = ManualDrive(werror="stop")
    first, second = drive.write(0), drive.write(0)
    drive.finish(-EIO)
    for _ in range(3):
        drive.backend.resume()
        drive.finish(-EIO)
        assert drive.backend.stalled == 2
    drive.backend.resume()
    drive.finish()
    drive.finish()
    assert first.values == second.values == [0]
    assert drive.driver.log == ["write 0+1"] * 6


def test_dropped_requests_are_never_heard_of_again() -> None:
    drive = ManualDrive(werror="stop")
    failed, behind = drive.write(0), drive.write(0)
    drive.finish(-EIO)
    drive.backend.drop_stalled()
    failed.request.cancel()  # type: ignore[attr-defined]
    drive.backend.resume()
    drive.backend.drain()
    drive.loop.run()
    assert failed.values == behind.values == []
    assert len(drive.driver.log) == 1
    after = drive.write(0)
    drive.finish()
    assert after.values == [0]


def test_an_ignored_flush_failure_is_success_to_the_guest() -> None:
    drive = ManualDrive(werror="ignore")
    drive.write(0)
    drive.finish()
    flush = drive.flush()
    drive.finish(-EIO)
    assert flush.values == [0]


# -- cancel -------------------------------------------------------------------------------------------------


def test_cancel_of_one_that_waits_for_its_turn() -> None:
    drive = ManualDrive()
    first, second, third = drive.write(0), drive.write(0), drive.read(0)
    second.request.cancel()  # type: ignore[attr-defined]
    assert second.values == []  # never from within cancel
    drive.loop.run()
    assert second.values == [-ECANCELED]
    assert first.values == third.values == []
    drive.finish()
    assert drive.driver.log == ["write 0+1", "read 0+1"]
    drive.finish()
    assert (first.values, third.values) == ([0], [0])
    assert drive.backend.stats.write.operations == 1
    assert drive.backend.stats.write.failed == 0


def test_cancel_of_one_that_has_begun_gives_its_result_and_no_policy() -> None:
    drive = ManualDrive(rerror="stop")
    result = drive.read(0)
    result.request.cancel()  # type: ignore[attr-defined]
    drive.loop.run()
    assert result.values == []
    drive.finish(-EIO)
    assert result.values == [-EIO]
    assert drive.errors == []
    result.request.cancel()  # type: ignore[attr-defined]
    drive.loop.run()
    assert result.values == [-EIO]


def test_cancel_of_one_that_was_put_aside() -> None:
    drive = ManualDrive(werror="stop")
    first, second = drive.write(0), drive.write(0)
    drive.finish(-EIO)
    first.request.cancel()  # type: ignore[attr-defined]
    drive.backend.drain()
    assert first.values == [-ECANCELED]
    drive.backend.resume()
    drive.finish()
    assert second.values == [0]
    assert drive.driver.log == ["write 0+1"] * 2


# -- drain and close ----------------------------------------------------------------------------------------


def test_drain_runs_what_is_due_and_waits_for_the_rest() -> None:
    drive = ManualDrive()
    first, second = drive.write(0), drive.write(0)
    drive.driver.finish()  # due, and no loop to run it
    finisher = threading.Thread(target=lambda: (wait_for(lambda: bool(drive.driver.steps)), drive.driver.finish()))
    finisher.start()
    drive.backend.drain()
    finisher.join()
    assert (first.values, second.values) == ([0], [0])
    assert first.thread == second.thread == threading.get_ident()


def test_drain_waits_for_what_callbacks_submit() -> None:
    drive = ManualDrive()
    second: list[Result] = []
    drive.backend.aio_flush(lambda ret: None)
    drive.backend.aio_readv(0, [memoryview(bytearray(512))], lambda ret: second.append(drive.read(1)))
    drive.driver.finish()
    finisher = threading.Thread(target=lambda: (wait_for(lambda: bool(second)), drive.driver.finish()))
    finisher.start()
    drive.backend.drain()
    finisher.join()
    assert second[0].values == [0]


def test_two_may_drain() -> None:
    drive = ManualDrive()
    drive.read(0)
    drainers = [threading.Thread(target=drive.backend.drain) for _ in range(3)]
    for drainer in drainers:
        drainer.start()
    wait_for(lambda: len(drive.backend._context._watchers) == 3)
    drive.driver.finish()
    for drainer in drainers:
        drainer.join()
    assert drive.backend.stats.in_flight == 0


def test_close_drains_flushes_and_drops() -> None:
    drive = ManualDrive(werror="stop")
    drive.write(0)
    drive.finish()
    aside = drive.write(1)
    drive.finish(-EIO)
    drive.errors.clear()
    finisher = threading.Thread(
        target=lambda: (wait_for(lambda: bool(drive.driver.steps)), drive.driver.finish(-EIO))
    )
    finisher.start()
    with pytest.raises(HostError, match="not all that was written"):
        drive.backend.close()
    finisher.join()
    assert drive.driver.log[-1] == "flush 0+0"
    assert drive.driver.closed
    assert aside.values == []
    assert drive.errors == []
    assert drive.read(0).values == [-ENOMEDIUM]
    drive.backend.close()


# -- what goes wrong on our side ----------------------------------------------------------------------------


def test_an_exception_below_comes_out_and_leaves_nothing_in_flight() -> None:
    drive = ManualDrive()
    drive.write(0)
    behind = drive.write(0)
    drive.driver.context.fail(drive.driver.steps.pop(0), ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        drive.loop.run()
    drive.loop.run()
    drive.finish()
    assert behind.values == [0]
    assert drive.backend.stats.in_flight == 0


def test_an_exception_of_a_callback_comes_out_and_leaves_nothing_in_flight() -> None:
    drive = ManualDrive()

    def callback(ret: int) -> None:
        raise ZeroDivisionError

    drive.backend.aio_readv(0, [memoryview(bytearray(512))], callback)
    drive.driver.finish()
    with pytest.raises(ZeroDivisionError):
        drive.loop.run()
    assert drive.backend.stats.in_flight == 0
    drive.backend.drain()


# -- counters -----------------------------------------------------------------------------------------------


def test_counters() -> None:
    drive = ManualDrive()
    stats = drive.backend.stats
    drive.read(0, 4)
    drive.write(8, 2)
    assert (stats.in_flight, stats.max_in_flight) == (2, 2)
    drive.finish()
    drive.finish()
    drive.flush()
    drive.finish(-EIO)
    assert stats.in_flight == 0
    assert (stats.read.operations, stats.read.bytes, stats.read.failed) == (1, 4 * SECTOR, 0)
    assert (stats.write.operations, stats.write.bytes) == (1, 2 * SECTOR)
    assert (stats.flush.operations, stats.flush.failed) == (0, 1)
    assert stats.read.time_ns > 0
    plain = stats.as_dict()
    assert plain["max_in_flight"] == 2
    assert plain["read"] == {
        "operations": 1,
        "bytes": 4 * SECTOR,
        "merged": 0,
        "failed": 0,
        "time_ns": stats.read.time_ns,
    }


def test_names() -> None:
    context = AioContext(ManualLoop())
    for options, name in (({"id": "system"}, "system"), ({"media": "cdrom"}, "cdrom"), ({}, "disk")):
        assert BlockBackend(DriveOptions("x", **options), None, context).name == name


def test_zeros_whose_space_is_to_stay() -> None:
    drive = ManualDrive()
    for may_unmap in (True, False):
        drive.backend.aio_write_zeroes(8, 8, Result(), may_unmap=may_unmap)
        drive.finish()
    assert drive.driver.log == ["unmap 8+8", "zero 8+8"]
