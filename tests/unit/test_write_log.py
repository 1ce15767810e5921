"""What has been written to a memory since the last look: by this process, and by the kernel on its behalf."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.guest_memory import RamRegion
from pyvmm.write_log import WriteLog

PAGE = 4096
MIB = 1 << 20
IS_THERE = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2]) >= (6, 7)


def test_the_kernel_has_it_or_says_so() -> None:
    """Since Linux 6.7; before that a machine stands while it is saved."""
    expected = contextlib.nullcontext() if IS_THERE else pytest.raises(OSError)
    with expected, WriteLog([RamRegion(0, MIB)]):
        pass


class TestWhereItIs:
    __test__ = IS_THERE

    def test_pages_that_were_written(self) -> None:
        region = RamRegion(0, 4 * MIB)
        memory = memoryview(region)
        memory[5 * PAGE] = 1
        with WriteLog([region]) as log:
            assert log.take(region) == []
            assert memory[5 * PAGE] == 1  # a look is no write
            assert log.take(region) == []
            memory[5 * PAGE] = 2
            memory[6 * PAGE + 4095] = 2
            memory[4 * MIB - 1] = 2
            assert log.take(region) == [(5 * PAGE, 2 * PAGE), (4 * MIB - PAGE, PAGE)]
            assert log.take(region) == []
            memory[5 * PAGE] = 3
            assert log.take(region) == [(5 * PAGE, PAGE)]

    def test_what_the_kernel_reads_into_it(self) -> None:
        """As preadv does with what a guest has asked of its disk."""
        region = RamRegion(0, MIB)
        memory = memoryview(region)
        fd = os.memfd_create("data")
        os.write(fd, b"x" * 3 * PAGE)
        with WriteLog([region]) as log:
            assert os.preadv(fd, [memory[PAGE : 3 * PAGE]], 0) == 2 * PAGE
            assert log.take(region) == [(PAGE, 2 * PAGE)]
            assert os.preadv(fd, [memory[PAGE : 3 * PAGE]], 0) == 2 * PAGE
            assert log.take(region) == [(PAGE, 2 * PAGE)]
        os.close(fd)

    def test_a_private_mapping_of_a_file(self) -> None:
        fd = os.memfd_create("data")
        os.write(fd, bytes(range(256)) * 16 * 256)
        region = RamRegion(0, MIB, source=(fd, 0))
        with WriteLog([region]) as log:
            memory = memoryview(region)
            assert memory[PAGE + 1] == 1
            assert log.take(region) == []
            memory[PAGE + 1] = 7
            assert log.take(region) == [(PAGE, PAGE)]
        os.close(fd)

    def test_many_pieces_and_many_memories(self) -> None:
        """More runs than one scan gives."""
        regions = [RamRegion(0, 8 * MIB), RamRegion(1 << 32, 8 * MIB)]
        with WriteLog(regions) as log:
            for region in regions:
                memory = memoryview(region)
                for at in range(0, 8 * MIB, 2 * PAGE):
                    memory[at] = 1
            for region in regions:
                assert log.take(region) == [(at, PAGE) for at in range(0, 8 * MIB, 2 * PAGE)]
                assert log.take(region) == []

    @given(st.lists(st.sets(st.integers(0, 255)), max_size=5))
    @settings(max_examples=50, deadline=None)
    def test_each_look_has_what_was_written_since_the_last(self, looks: list[set[int]]) -> None:
        region = RamRegion(0, 256 * PAGE)
        memory = memoryview(region)
        with WriteLog([region]) as log:
            for pages in looks:
                for page in pages:
                    memory[page * PAGE + page] = 1
                found = {at // PAGE for start, size in log.take(region) for at in range(start, start + size, PAGE)}
                assert found == pages

    def test_nothing_is_left_of_it(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        region = RamRegion(0, MIB)
        for _ in range(3):
            log = WriteLog([region])
            log.close()
            log.close()
            with pytest.raises(OSError):
                log.take(region)
        memoryview(region)[0] = 1
        assert len(os.listdir("/proc/self/fd")) == before
