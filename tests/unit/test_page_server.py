"""PageServer without a machine: whoever touches memory finds what the file has, from Python and in system calls."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError, StateError
from pyvmm.guest_memory import RamRegion
from pyvmm.page_server import PageServer
from pyvmm.served_memory import topmost

pytestmark = pytest.mark.userfaultfd
PAGE = 4096
BLOCK = 16 * PAGE
SIZE = 64 * BLOCK
WAIT_S = 60.0
FIONREAD = 0x541B  # <asm-generic/ioctls.h>: writes an int


def page(n: int) -> bytes:
    """The page of a file with that number."""
    return n.to_bytes(8, "little") * (PAGE // 8)


@pytest.fixture
def file(tmp_path: Path) -> int:
    path = tmp_path / "pages"
    path.write_bytes(b"".join(page(n + 1) for n in range(SIZE // PAGE)))
    return os.open(path, os.O_RDWR)


def served(pieces: list[tuple[int, int, int, int]], size: int = SIZE) -> tuple[PageServer, RamRegion, memoryview]:
    region = RamRegion(0, size)
    server = PageServer(FIONREAD)
    server.serve(region, pieces)
    server.start()
    return server, region, memoryview(region)


def test_a_touch_brings_what_is_around_it(file: int) -> None:
    server, region, view = served([(0, SIZE // 2, file, SIZE // 2)])
    assert (server.faults, server.copied_bytes, server.zeroed_bytes) == (0, 0, 0)
    first = SIZE // 2 // PAGE + 1
    assert bytes(view[5 * PAGE : 6 * PAGE]) == page(first + 5)
    assert (server.faults, server.copied_bytes) == (1, BLOCK)
    assert bytes(view[:PAGE]) == page(first)
    assert server.faults == 1
    view[3 * BLOCK] = 7  # a write brings the rest of its page
    assert bytes(view[3 * BLOCK : 3 * BLOCK + PAGE]) == b"\7" + page(first + 48)[1:]
    assert bytes(view[SIZE - PAGE :]) == bytes(PAGE)
    assert (server.faults, server.copied_bytes, server.zeroed_bytes) == (3, 2 * BLOCK, BLOCK)
    server.close()
    server.close()
    # What nobody had touched is zeros now, and nobody waits for it.
    assert bytes(view[10 * BLOCK : 10 * BLOCK + PAGE]) == bytes(PAGE)
    assert not server.fetch(region, 0, PAGE)
    os.close(file)


def test_the_kernel_s_accesses_are_served(file: int, tmp_path: Path) -> None:
    """As a drive's requests are: preadv into memory, pwritev out of it."""
    server, _region, view = served([(0, SIZE, file, 0)])
    with open(tmp_path / "out", "w+b", buffering=0) as out:
        assert os.pwritev(out.fileno(), [view[PAGE : 3 * BLOCK]], 0) == 3 * BLOCK - PAGE
        assert os.pread(out.fileno(), PAGE, 0) == page(2)
        assert os.preadv(out.fileno(), [view[8 * BLOCK + 100 : 8 * BLOCK + 200]], 0) == 100
    assert bytes(view[8 * BLOCK : 8 * BLOCK + PAGE]) == page(129)[:100] + page(2)[:100] + page(129)[200:]
    server.close()
    os.close(file)


@st.composite
def layered(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """Pieces that cover each other, of up to 40 pages, which come from anywhere in the file."""
    runs = draw(st.lists(st.tuples(st.integers(0, 39), st.integers(1, 12), st.integers(0, 900)), max_size=8))
    return [(at * PAGE, min(n, 40 - at) * PAGE, 0, place * PAGE) for at, n, place in runs]


@given(layered(), st.lists(st.tuples(st.integers(0, 39), st.booleans()), max_size=30))
@settings(max_examples=60, deadline=None)
def test_any_pieces_and_touches(runs: list[tuple[int, int, int, int]], touches: list[tuple[int, bool]]) -> None:
    expected = [bytes(PAGE)] * 40
    for at, size, _fd, place in runs:
        for n in range(size // PAGE):
            expected[at // PAGE + n] = page(place // PAGE + n + 1)
    fd = os.memfd_create("pages")
    os.write(fd, b"".join(page(n + 1) for n in range(920)))
    pieces = topmost([(at, size, fd, place) for at, size, _fd, place in runs])
    assert all(before[0] + before[1] <= after[0] for before, after in pairwise(pieces))
    server, region, view = served(pieces, 40 * PAGE)
    try:
        for n, fetched in touches:
            if fetched:
                assert server.fetch(region, n * PAGE, PAGE)
            else:
                assert bytes(view[n * PAGE : (n + 1) * PAGE]) == expected[n]
        assert server.complete()
        assert [bytes(view[n * PAGE : (n + 1) * PAGE]) for n in range(40)] == expected
    finally:
        server.close()
        os.close(fd)


def test_many_at_once(file: int) -> None:
    """Threads that read and write the same pages, while all of it is read beside them."""
    server, _region, view = served([(0, SIZE, file, 0)])
    wrong: list[int] = []

    def touch(first: int) -> None:
        for n in range(SIZE // PAGE):
            at = (n * 7 + first * 13) % (SIZE // PAGE)
            view[at * PAGE + 8 + first] = 0xA5
            if bytes(view[at * PAGE : at * PAGE + 8]) != page(at + 1)[:8]:
                wrong.append(at)

    threads = [threading.Thread(target=touch, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    assert server.complete()
    for thread in threads:
        thread.join()
    assert wrong == []
    for n in range(SIZE // PAGE):
        assert bytes(view[n * PAGE : n * PAGE + 16]) == page(n + 1)[:8] + b"\xa5" * 4 + page(n + 1)[12:16]
    assert server.copied_bytes == SIZE
    os.close(file)


def test_what_is_given_back_is_the_file_s_again_until_all_of_it_was_read(file: int) -> None:
    import mmap

    server, region, view = served([(0, SIZE, file, 0)])
    view[:PAGE] = b"x" * PAGE
    libc_madvise(region, 0, BLOCK, mmap.MADV_DONTNEED)
    assert bytes(view[:PAGE]) == page(1)
    assert server.complete()
    libc_madvise(region, 0, BLOCK, mmap.MADV_DONTNEED)
    assert bytes(view[:PAGE]) == bytes(PAGE)
    os.close(file)


def libc_madvise(region: RamRegion, offset: int, size: int, advice: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.madvise(ctypes.c_void_p(region.host_address + offset), ctypes.c_size_t(size), advice) == 0


FAULTS = ["cut off", "can't be read"]


def spoil(file: int, fault: str) -> None:
    if fault == "cut off":
        os.ftruncate(file, SIZE // 2)
    else:
        other = os.open("/dev/null", os.O_WRONLY)
        os.dup2(other, file)
        os.close(other)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_fails(file: int, fault: str) -> None:
    """A thread that holds the GIL is not kept waiting; it is told, once, and nothing more is read."""
    server, region, view = served([(0, SIZE, file, 0)])
    assert view[0] == 1
    spoil(file, fault)
    assert server.failure is None
    assert bytes(view[SIZE - PAGE :]) == bytes(PAGE)
    assert select.select([server.failed_fd], [], [], WAIT_S)[0]
    why, fd, where = server.failure
    assert (why == 0, fd, where) == (fault == "cut off", file, SIZE - BLOCK)
    assert bytes(view[SIZE - BLOCK : SIZE - BLOCK + PAGE]) == bytes(PAGE)
    assert not server.fetch(region, 0, PAGE)
    assert not server.complete()
    server.give_up()
    assert bytes(view[9 * BLOCK : 10 * BLOCK]) == bytes(BLOCK)
    assert bytes(view[:PAGE]) == page(1)
    server.close()
    os.close(file)


@pytest.mark.parametrize("fault", FAULTS)
def test_reading_all_of_a_file_that_fails(file: int, fault: str) -> None:
    server, _region, view = served([(0, SIZE, file, 0)])
    spoil(file, fault)
    assert not server.complete()
    assert server.failure is not None
    assert bytes(view[SIZE - PAGE :]) == bytes(PAGE)
    server.close()
    os.close(file)


def test_a_thread_in_an_ioctl_waits_until_it_is_given_up(file: int) -> None:
    """As a vCPU does: it is not to go on with zeros before somebody has seen to it."""
    import fcntl

    server, _region, view = served([(0, SIZE, file, 0)])
    heard, tell = os.pipe()
    os.write(tell, b"x")
    os.ftruncate(file, 0)
    over = threading.Event()

    def call() -> None:
        import ctypes

        # By ctypes the GIL is given away, as KVM_RUN's caller does.
        ctypes.CDLL(None).ioctl(heard, FIONREAD, ctypes.byref(ctypes.c_char.from_buffer(view, 20 * BLOCK)))
        over.set()

    assert fcntl.ioctl(heard, FIONREAD, bytes(4)) == b"\1\0\0\0"
    thread = threading.Thread(target=call)
    thread.start()
    assert select.select([server.failed_fd], [], [], WAIT_S)[0]
    assert bytes(view[:PAGE]) == bytes(PAGE)  # this one has been answered, after the other
    assert not over.is_set()
    server.give_up()
    assert over.wait(WAIT_S)
    thread.join()
    assert bytes(view[20 * BLOCK : 20 * BLOCK + 8]) == b"\1" + bytes(7)
    server.close()
    for fd in (heard, tell, file):
        os.close(fd)


def test_another_ioctl_is_not_kept_waiting(file: int) -> None:
    """It may be one that holds the GIL, as most of KVM's do."""
    import ctypes

    server, _region, view = served([(0, SIZE, file, 0)])
    os.ftruncate(file, 0)
    tiocgwinsz, terminal = 0x5413, os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
    # PyDLL's functions keep the GIL.
    to = ctypes.byref(ctypes.c_char.from_buffer(view, 20 * BLOCK))
    assert ctypes.PyDLL(None).ioctl(terminal, tiocgwinsz, to) == 0
    assert server.failure is not None
    del to
    server.close()
    os.close(terminal)
    os.close(file)


def test_pieces_that_can_t_be(file: int) -> None:
    for pieces in (
        [(0, PAGE, file, 0), (0, PAGE, file, 0)],
        [(PAGE, PAGE, file, 0), (0, PAGE, file, 0)],
        [(0, SIZE + PAGE, file, 0)],
        [(1, PAGE, file, 0)],
        [(0, 0, file, 0)],
    ):
        server = PageServer(FIONREAD)
        with pytest.raises(StateError, match="not in order, or not in ram"):
            server.serve(RamRegion(0, SIZE), pieces)
        server.close()
    server = PageServer(FIONREAD)
    for region in (RamRegion(0, SIZE, shared=True), RamRegion(0, SIZE, source=(file, 0))):
        with pytest.raises(ConfigError, match="behind, or that is shared"):
            server.serve(region, [])
    server.close()
    os.close(file)


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_left(file: int) -> None:
    before, threads = descriptors(), len(os.listdir("/proc/self/task"))
    for closed in (True, False):
        server, region, view = served([(0, SIZE, file, 0)])
        assert view[0] == 1
        if closed:
            server.close()
        del server, region, view
    assert (descriptors(), len(os.listdir("/proc/self/task"))) == (before, threads)
    os.close(file)


def test_a_child_of_fork_takes_nothing_away(file: int) -> None:
    server, _region, view = served([(0, SIZE, file, 0)])
    hold, let_go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(let_go)
        server.close()  # its parent's: nothing happens
        os.read(hold, 1)
        os._exit(0)
    os.close(hold)
    assert view[BLOCK] == 17
    # The child has the descriptor still: that keeps nobody waiting either.
    server.close()
    assert view[2 * BLOCK] == 0
    os.close(let_go)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(file)


REFUSED = """
import os
from pyvmm.errors import ConfigError
from pyvmm.page_server import PageServer
if not os.getuid():  # now that all is loaded: nobody else may look into root's home
    os.setgroups([])
    os.setuid(65534)
try:
    PageServer(0).close()
    print("taken")
except ConfigError as error:
    print(error)
"""


def test_a_user_who_may_not_is_told_the_remedy() -> None:
    may = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
    may = may or os.stat("/dev/userfaultfd").st_mode & 0o006 == 0o006
    may = may or bool(os.getuid())  # else it would be in the lab, as root
    command = [sys.executable, "-c", REFUSED]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert said == ("taken" if may else CANT)


CANT = (
    "userfaultfd: this user may not have faults of the kernel's served: run `sysctl vm.unprivileged_userfaultfd=1`,"
    " give the user /dev/userfaultfd (Linux 6.1), or leave userfaultfd out"
)


def test_signals_go_to_other_threads(file: int) -> None:
    server, _region, view = served([(0, SIZE, file, 0)])
    mine = {int(tid) for tid in os.listdir("/proc/self/task")}
    pages = [tid for tid in mine if Path(f"/proc/self/task/{tid}/comm").read_text().strip() == "pages"]
    assert len(pages) == 1
    status = Path(f"/proc/self/task/{pages[0]}/status").read_text()
    blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
    assert blocked >> signal.SIGINT - 1 & 1
    assert view[0] == 1
    server.close()
    os.close(file)
