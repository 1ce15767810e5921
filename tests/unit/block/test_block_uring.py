"""The ring itself, with real rings where this host has them; and what is said where it has none."""

from __future__ import annotations

import gc
import mmap
import os
import random
import resource
import select
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from errno import EBADF, ECANCELED, EINVAL, ENOSPC
from pathlib import Path

import pytest
from block_drives import IO_URING_REFUSAL, LIMIT_S
from sandbox import CALLS, run_without

from pyvmm import block
from pyvmm.block.protocols import io_uring
from pyvmm.block.uring import IOV_MAX, Ring
from pyvmm.errors import ConfigError, StateError

ABI = Path(block.__file__).with_name("uring_abi.h")
TELL = "from pyvmm.block.protocols.io_uring import refusal; print(refusal())"


# -- what the kernel and we have in common ----------------------------------------------------------------


def test_the_abi_is_that_of_the_kernels_header(tmp_path: Path) -> None:
    """The compiler compares <linux/io_uring.h> and uring_abi.h; what an old header lacks can't be compared."""
    asks_for_it = subprocess.run(
        ["gcc", "-E", "-x", "c", "-"], input="#include <linux/io_uring.h>\n", capture_output=True, text=True
    )
    assert asks_for_it.returncode == 0, "linux/io_uring.h is missing here: install linux-libc-dev (Debian)"
    fields = {
        "sqe": "opcode flags ioprio fd off addr len user_data buf_index personality splice_fd_in",
        "cqe": "user_data res flags",
        "params": "sq_entries cq_entries flags features wq_fd sq_off cq_off",
        "probe_op": "op flags",
        "probe": "last_op ops_len ops",
    }
    lines = [
        f"_Static_assert(offsetof(struct uring_{name}, {field}) == offsetof(struct io_uring_{name}, {field}), "
        f'"{name}.{field}");'
        for name, members in fields.items()
        for field in members.split()
    ]
    for ours, theirs, members in (
        ("uring_sq_offsets", "io_sqring_offsets", "head tail ring_mask ring_entries flags dropped array"),
        ("uring_cq_offsets", "io_cqring_offsets", "head tail ring_mask ring_entries overflow cqes flags"),
    ):
        lines += [
            f'_Static_assert(offsetof(struct {ours}, {field}) == offsetof(struct {theirs}, {field}), "{field}");'
            for field in members.split()
        ]
    lines += [
        f'_Static_assert(sizeof(struct {ours}) == sizeof(struct {theirs}), "{ours}");'
        for ours, theirs in (
            *((f"uring_{name}", f"io_uring_{name}") for name in ("sqe", "cqe", "params", "probe_op", "probe")),
            *(("uring_sq_offsets", "io_sqring_offsets"), ("uring_cq_offsets", "io_cqring_offsets")),
        )
        if ours != "uring_probe"  # an array of no length there
    ]
    lines += [
        f'_Static_assert((unsigned long)URING_{name} == (unsigned long)IORING_{name}, "{name}");'
        for name in (
            *("OP_READV", "OP_WRITEV", "OP_FSYNC", "OP_ASYNC_CANCEL", "OP_READ", "OP_WRITE", "FSYNC_DATASYNC"),
            *("OFF_SQ_RING", "OFF_SQES", "SQ_CQ_OVERFLOW", "ENTER_GETEVENTS", "FEAT_SINGLE_MMAP", "FEAT_NODROP"),
            *("FEAT_SUBMIT_STABLE", "REGISTER_EVENTFD", "REGISTER_PROBE"),
        )
    ]
    lines.append('_Static_assert(URING_OP_SUPPORTED == IO_URING_OP_SUPPORTED, "OP_SUPPORTED");')
    lines += [f'_Static_assert(URING_NR_{n[9:].upper()} == __NR_{n} && {CALLS[n]} == __NR_{n}, "{n}");' for n in CALLS]
    text = "\n".join(
        [
            *("#include <stddef.h>", "#include <linux/io_uring.h>", "#include <asm/unistd.h>", f'#include "{ABI}"'),
            *lines,
            "",
        ]
    )
    source = tmp_path / "abi.c"
    source.write_text(text)
    done = subprocess.run(["gcc", "-c", "-o", tmp_path / "abi.o", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_unit_needs_no_header_of_the_kernels() -> None:
    assert "#include <linux" not in ABI.read_text()
    assert "<linux/" not in ABI.with_name("uring.pyx").read_text()


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "call", "words"),
    [
        ("EPERM", "io_uring_setup", "the sandbox around this process forbids it: allow io_uring_setup, io_uring_enter"),
        ("EPERM", "io_uring_register", "io_uring_register: Operation not permitted: the sandbox"),
        ("EACCES", "io_uring_setup", "io_uring_setup: Permission denied: the sandbox"),
        ("ENOSYS", "io_uring_setup", "this kernel has no io_uring_setup, or a sandbox hides it: use Linux 5.6 or"),
        ("ENOMEM", "io_uring_setup", "no memory for the ring (io_uring_setup): raise the limit of locked memory"),
        ("EMFILE", "io_uring_setup", "too many open files (io_uring_setup): raise `ulimit -n`"),
        ("EINVAL", "io_uring_register", "this kernel's io_uring is too old (no io_uring_register): use Linux 5.6"),
        ("EIO", "io_uring_setup", "io_uring_setup: Input/output error: use another kernel"),
    ],
)
def test_a_refusal_is_one_sentence_with_its_remedy(action: str, call: str, words: str) -> None:
    if IO_URING_REFUSAL and call != "io_uring_setup":
        words = IO_URING_REFUSAL  # this host refuses before that call is made
    done = run_without(action, [call], TELL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("aio=io_uring can't be had: ")
    assert words in done.stdout
    assert done.stdout.endswith(", or use aio=threads\n")


@pytest.mark.parametrize(
    ("disabled", "privileged", "words"),
    [
        (2, True, "kernel.io_uring_disabled=2 forbids it to all: sysctl kernel.io_uring_disabled=0 allows it"),
        (1, False, "kernel.io_uring_disabled=1 leaves it to CAP_SYS_ADMIN and the group kernel.io_uring_group: join"),
        (1, True, "the sandbox around this process forbids it"),
        (0, False, "the sandbox around this process forbids it"),
        (None, False, "the sandbox around this process forbids it"),
    ],
)
def test_the_two_causes_of_eperm_are_told_apart(
    disabled: int | None, privileged: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Documentation/admin-guide/sysctl/kernel.rst: 1 leaves it to CAP_SYS_ADMIN and a group, 2 to nobody.
    monkeypatch.setattr(io_uring, "number_in", lambda path: disabled)
    monkeypatch.setattr(io_uring, "has_cap_sys_admin", lambda: privileged)
    assert words in io_uring.why_refused(PermissionError(1, "Operation not permitted", "io_uring_setup"))


def test_privileges_are_read_from_proc() -> None:
    ask = "from pyvmm.block.protocols.io_uring import has_cap_sys_admin; print(has_cap_sys_admin())"
    mine = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    expected = bool(int(mine.split()[1], 16) & 1 << 21)
    assert subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout == f"{expected}\n"
    assert io_uring.number_in("/proc/self/status") is None
    assert io_uring.number_in("/no/such/file") is None


def test_a_filter_that_kills_takes_only_a_child() -> None:
    # What tests and doctor do, so that neither dies of it.
    ask = "from block_drives import IO_URING_REFUSAL; print(IO_URING_REFUSAL)"
    done = run_without("KILL", ["io_uring_setup"], ask)
    assert (done.returncode, done.stdout) == (0, "whoever asks for it dies of SIGSYS\n"), done.stderr


def test_doctor_tells() -> None:
    ask = "from pyvmm.cli.doctor import block_engines; block_engines()"
    done = run_without("EPERM", ["io_uring_setup"], ask)
    assert done.stdout.startswith("io_uring   no: aio=io_uring can't be had: io_uring_setup: Operation not permitted: ")
    assert done.stdout.endswith(", or use aio=threads\n")
    done = run_without("KILL", ["io_uring_setup"], ask)
    assert done.stdout.startswith("io_uring   no: whoever asks for it dies of SIGSYS: the sandbox around this process ")
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert done.stdout == (f"io_uring   no: {IO_URING_REFUSAL}\n" if IO_URING_REFUSAL else "io_uring   yes\n")


def test_the_command_says_it_and_ends_with_status_2(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(512))
    code = (
        "from pyvmm.cli import main; import sys\n"
        f"sys.argv = ['pyvmm', 'qtest', '--socket', {str(tmp_path / 'socket')!r}]\n"
        f"sys.argv += ['--drive', 'file={image},aio=io_uring,format=raw']\n"
        "sys.exit(main())"
    )
    done = run_without("EPERM", ["io_uring_setup"], code)
    assert done.returncode == 2
    assert done.stderr.startswith("pyvmm: aio=io_uring can't be had: io_uring_setup: Operation not permitted: ")
    assert done.stderr.count("\n") == 1


def test_arguments_that_are_refused_leave_nothing_behind() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    # Where the kernel refuses any ring, that comes before what is wrong with its depth.
    wrong = (((), TypeError), ((0,), OSError), ((1 << 20,), OSError), ((4, 1 << 20), (ValueError, OSError)))
    for arguments, error in wrong:
        with pytest.raises(error):
            Ring(*arguments)  # type: ignore[arg-type]
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before


if not IO_URING_REFUSAL:

    @pytest.fixture
    def ring() -> Iterator[Ring]:
        made = Ring(32)
        yield made
        made.close()

    @pytest.fixture
    def pipe() -> Iterator[tuple[int, int]]:
        """A read of an empty pipe stays in the kernel for as long as the test likes."""
        ends = os.pipe()
        yield ends
        for end in ends:
            os.close(end)

    @pytest.fixture
    def file(tmp_path: Path) -> Iterator[int]:
        """1 MiB of random bytes."""
        path = tmp_path / "file"
        path.write_bytes(random.Random(1).randbytes(1 << 20))
        fd = os.open(path, os.O_RDWR)
        yield fd
        os.close(fd)

    def results(ring: Ring, count: int) -> dict[object, int]:
        """So many results, as they come by the eventfd."""
        found: dict[object, int] = {}
        while len(found) < count:
            ready, _, _ = select.select([ring.event_fd], [], [], LIMIT_S)
            assert ready
            ring.acknowledge()
            for request, result in ring.reap():
                assert request not in found
                found[request] = result
        return found

    def test_reads_writes_and_flushes(ring: Ring, file: int) -> None:
        data = [b"one", memoryview(b"two"), bytearray(b"three")]
        assert ring.writev("write", file, data, 1000)
        assert ring.submit() == 0
        assert results(ring, 1) == {"write": 11}
        assert os.pread(file, 11, 1000) == b"onetwothree"
        one, pieces = bytearray(100), [bytearray(1), bytearray(0), bytearray(7), bytearray(3)]
        assert ring.readv("one", file, [one], 950)
        assert ring.readv("pieces", file, pieces, 1000)
        assert ring.readv("none", file, [], 0)
        assert ring.fdatasync("flush", file)
        assert (ring.in_flight, ring.unsubmitted) == (4, 4)
        assert ring.submit() == 0
        assert results(ring, 4) == {"one": 100, "pieces": 11, "none": 0, "flush": 0}
        assert one == os.pread(file, 100, 950)
        assert b"".join(pieces) == b"onetwothree"
        assert (ring.in_flight, ring.unsubmitted, ring.strays) == (0, 0, 0)

    def test_short_and_failed_results(ring: Ring, file: int, pipe: tuple[int, int]) -> None:
        # As preadv(2) and pwritev(2) would have it.
        buffer = bytearray(100)
        full = os.open("/dev/full", os.O_WRONLY)
        ring.readv("short", file, [buffer], (1 << 20) - 40)
        ring.readv("past", file, [buffer], 1 << 21)
        ring.readv("no file", -1, [buffer], 0)
        ring.readv("wrong way", full, [buffer], 0)
        ring.readv("offset", file, [buffer], 1 << 63)
        ring.writev("full", full, [b"x"], 0)
        ring.fdatasync("no flush", pipe[1])
        ring.readv("flags", file, [buffer], 0, 1 << 30)
        assert ring.submit() == 0
        found = results(ring, 8)
        os.close(full)
        assert found.pop("flags") < 0  # EOPNOTSUPP, or EINVAL
        assert found == {
            "short": 40,
            "past": 0,
            "no file": -EBADF,
            "wrong way": -EBADF,
            "offset": -EINVAL,
            "full": -ENOSPC,
            "no flush": -EINVAL,
        }

    def test_what_is_no_memory_is_refused_and_leaves_nothing(ring: Ring, file: int) -> None:
        good = bytearray(10)
        for iov, error in (
            ([good, b"read-only"], BufferError),
            ([good, memoryview(bytearray(10))[::2]], BufferError),
            ([good, 5], TypeError),
            ([good] * (IOV_MAX + 1), ValueError),
            (5, TypeError),
        ):
            with pytest.raises(error):
                ring.readv("never", file, iov, 0)  # type: ignore[arg-type]
        with pytest.raises(OverflowError):
            ring.readv("never", file, [good], -1)
        assert (ring.in_flight, ring.unsubmitted) == (0, 0)
        good.append(0)  # BufferError where anybody still held it
        assert ring.readv("most", file, [good] * IOV_MAX, 0)
        ring.submit()
        assert results(ring, 1) == {"most": IOV_MAX * len(good)}

    def test_memory_stays_where_it_is_until_the_result_is_taken(ring: Ring, pipe: tuple[int, int]) -> None:
        class Request:
            pass

        request, buffer = Request(), bytearray(4)
        watched = weakref.ref(request)
        ring.readv(request, pipe[0], [memoryview(buffer)[:2], memoryview(buffer)[2:]], 0)
        ring.submit()
        with pytest.raises(BufferError):
            buffer.append(0)
        del request
        gc.collect()
        assert watched() is not None
        os.write(pipe[1], b"abcd")
        assert select.select([ring.event_fd], [], [], LIMIT_S)[0]
        with pytest.raises(BufferError):
            buffer.append(0)  # the kernel is done; nobody has looked
        assert [(type(found), result) for found, result in ring.reap()] == [(Request, 4)]
        buffer.append(0)
        assert buffer == b"abcd\0"
        assert watched() is None

    def test_memory_that_nobody_else_holds_is_kept(ring: Ring, pipe: tuple[int, int]) -> None:
        area = mmap.mmap(-1, 4096)
        view = memoryview(area)
        ring.readv("read", pipe[0], [view], 0)
        ring.submit()
        del view
        with pytest.raises(BufferError):
            area.close()
        os.write(pipe[1], b"here")
        assert results(ring, 1) == {"read": 4}
        assert area[:4] == b"here"
        area.close()

    def test_full(file: int) -> None:
        ring = Ring(5)  # the kernel makes it a power of two
        assert (ring.entries, ring.depth) == (8, 8)
        buffers = [bytearray(8) for _ in range(9)]
        assert [ring.readv(n, file, [buffer], 8 * n) for n, buffer in enumerate(buffers)] == [True] * 8 + [False]
        assert not ring.fdatasync("flush", file)
        assert not ring.cancel(3)
        buffers[8].append(0)
        assert ring.submit() == 0
        assert not ring.readv(8, file, [buffers[8]], 64)  # submitted, but under way until they are reaped
        found = results(ring, 8)
        assert found == dict.fromkeys(range(8), 8)
        assert ring.readv(8, file, [buffers[8]], 64)
        ring.close()

    def test_more_results_than_the_completion_queue_holds(file: int) -> None:
        """The kernel keeps back what finds no room (IORING_FEAT_NODROP); none is lost, and order stays."""
        ring = Ring(4, 200)  # a completion queue of 8
        buffers = [bytearray(100) for _ in range(200)]
        for n, buffer in enumerate(buffers):
            if not ring.readv(n, file, [buffer], 100 * n):
                # EBUSY would be right as well: a kernel may take no more before the backlog is gone.
                assert ring.submit() == 0
                assert ring.readv(n, file, [buffer], 100 * n)
        assert ring.submit() == 0
        found: list[tuple[object, int]] = []
        while len(found) < 200:
            found += ring.reap()
        assert sorted(found) == [(n, 100) for n in range(200)]
        for n, buffer in enumerate(buffers):
            assert buffer == os.pread(file, 100, 100 * n)
        assert ring.reap() == []
        ring.close()

    def test_many_in_flight_in_any_order(file: int) -> None:
        ring = Ring(64)
        generator = random.Random(2)
        model = bytearray(os.pread(file, 1 << 20, 0))
        number, pending = 0, {}
        for _ in range(300):
            for _ in range(generator.randrange(80)):
                number += 1
                offset = number * 4096 % (1 << 20)  # no two of those in flight share a byte
                length = generator.randrange(1, 4096)
                if generator.random() < 0.5:
                    data = generator.randbytes(length)
                    cut = generator.randrange(length)
                    queued = ring.writev(number, file, [data[:cut], data[cut:]], offset)
                    entry: tuple[int, int, bytes | bytearray] = (offset, length, data)
                else:
                    buffer = bytearray(length)
                    queued = ring.readv(number, file, [buffer], offset)
                    entry = (offset, length, buffer)
                if not queued:
                    break
                pending[number] = entry
            assert ring.submit() == 0
            for request, result in ring.reap():
                offset, length, data = pending.pop(request)
                assert result == length
                if isinstance(data, bytes):
                    model[offset : offset + length] = data
                else:
                    assert data == model[offset : offset + length]
        for request, result in results(ring, ring.in_flight).items() if ring.in_flight else ():
            offset, length, data = pending.pop(request)  # type: ignore[call-overload]
            assert result == length
            if isinstance(data, bytes):
                model[offset : offset + length] = data
        assert not pending
        assert os.pread(file, 1 << 20, 0) == model
        assert ring.strays == 0
        ring.close()

    def test_taken_back(ring: Ring, file: int) -> None:
        buffers = [bytearray(8) for _ in range(5)]
        ring.readv(0, file, [buffers[0]], 0)
        ring.submit()
        for n in range(1, 5):
            ring.readv(n, file, [buffers[n]], 0)
        ring.cancel(2)
        assert (ring.unsubmitted, ring.in_flight) == (5, 5)
        assert ring.take_back() == [1, 2, 3, 4]
        assert (ring.unsubmitted, ring.in_flight) == (0, 1)
        for buffer in buffers[1:]:
            buffer.append(0)
        assert ring.submit() == 0
        assert results(ring, 1) == {0: 8}
        assert bytes(buffers[1]) == bytes(9)  # nothing was done for it
        assert ring.readv("next", file, [buffers[0]], 0)
        assert ring.submit() == 0
        assert results(ring, 1) == {"next": 8}

    def test_cancel(ring: Ring, pipe: tuple[int, int]) -> None:
        one, other = object(), object()
        buffers = {one: bytearray(4), other: bytearray(4)}
        for request, buffer in buffers.items():
            ring.readv(request, pipe[0], [buffer], 0)
        assert ring.cancel(one)
        assert not ring.cancel(object())
        assert ring.submit() == 0
        assert results(ring, 1) == {one: -ECANCELED}
        assert not ring.cancel(one)  # gone
        os.write(pipe[1], b"abcd")
        assert results(ring, 1) == {other: 4}
        assert buffers[other] == b"abcd"
        assert ring.strays == 0

    def test_a_cancellation_never_meets_the_next_request_in_the_same_slot(file: int, pipe: tuple[int, int]) -> None:
        ring = Ring(2)
        buffer = bytearray(4)
        ring.readv("done", file, [buffer], 0)
        ring.submit()
        # Its result is in the ring: the cancellation is too late, and queued only.
        assert select.select([ring.event_fd], [], [], LIMIT_S)[0]
        assert ring.cancel("done")
        assert ring.reap() == [("done", 4)]
        ring.readv("next", pipe[0], [buffer], 0)  # has that slot now
        ring.submit()
        assert ring.reap() == []
        os.write(pipe[1], b"abcd")
        assert results(ring, 1) == {"next": 4}
        ring.close()

    def test_a_result_that_nobody_waits_for_is_counted_and_dropped(
        ring: Ring, file: int, pipe: tuple[int, int]
    ) -> None:
        # No kernel does so: what it gives back as user_data is changed in the submission queue, behind our back.
        sqes = mmap.mmap(ring.fd, ring.entries * 64, offset=0x10000000)
        buffer = bytearray(8)
        ring.readv("read", pipe[0], [buffer], 0)
        ring.submit()
        for n, user_data in enumerate((0xFFFF_FFFF, 31, 0x7000_0000_0000_0000, 1 << 62), 1):
            ring.cancel("read")
            struct.pack_into("=Q", sqes, n * 64 + 16, 12345)  # what to cancel: nothing that is there
            struct.pack_into("=Q", sqes, n * 64 + 32, user_data)
        assert ring.submit() == 0
        assert ring.reap() == []
        assert (ring.strays, ring.in_flight) == (4, 1)
        os.write(pipe[1], b"12345678")
        assert results(ring, 1) == {"read": 8}
        sqes.close()

    @pytest.mark.parametrize("how", ["close", "del"])
    def test_ending_with_requests_in_flight(how: str, file: int, pipe: tuple[int, int]) -> None:
        before = set(os.listdir("/proc/self/fd"))
        ring = Ring(4, 100)
        buffers = [bytearray(64 << 10) for _ in range(20)]
        for n, buffer in enumerate(buffers):
            while not ring.readv(n, pipe[0] if n % 2 else file, [buffer], 0 if n % 2 else n * 1000):
                assert ring.submit() == 0
        assert ring.unsubmitted == 4
        if how == "close":
            found = dict(ring.close())
            assert set(found) == set(range(20))
            assert all(found[n] == (-ECANCELED if n % 2 or n >= 16 else 64 << 10) for n in range(20))
            assert ring.close() == []
            for use in (ring.submit, ring.reap, ring.take_back, ring.acknowledge, lambda: ring.cancel(1)):
                with pytest.raises(StateError, match="closed"):
                    use()  # type: ignore[operator]
            with pytest.raises(StateError, match="closed"):
                ring.fdatasync(1, file)
            assert ring.in_flight == 0
        del ring
        for buffer in buffers:
            buffer.append(0)
        assert set(os.listdir("/proc/self/fd")) == before
        os.write(pipe[1], b"x")
        assert os.read(pipe[0], 2) == b"x"  # nobody reads there any more

    def test_no_ring_and_no_request_leaves_anything(file: int) -> None:
        request, buffer = object(), bytearray(9)
        before, references = set(os.listdir("/proc/self/fd")), sys.getrefcount(request)
        for _ in range(50):
            ring = Ring(4)
            for _ in range(10):
                ring.readv(request, file, [buffer, buffer], 0)
                ring.submit()
                ring.reap()
            ring.close()
        del ring
        assert sys.getrefcount(request) == references
        assert set(os.listdir("/proc/self/fd")) == before
        buffer.append(0)

    def test_descriptors_run_out() -> None:
        code = (
            "import resource; from pyvmm.block.protocols.io_uring import refusal\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (%d, %d)); print(refusal())"
        )
        said = set()
        # From none at all to enough: whatever is the first that can't be had, it is said.
        for limit in range(3, 7):
            done = subprocess.run([sys.executable, "-c", code % (limit, limit)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            said.add(done.stdout)
        assert any("too many open files (io_uring_setup): raise `ulimit -n`" in line for line in said)
        assert any("too many open files (eventfd)" in line for line in said)
        assert "None\n" in said
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 7

    def test_two_at_once_are_refused(ring: Ring, file: int) -> None:
        uses: list[Callable[[], object]] = [ring.submit, ring.reap, ring.take_back, ring.close, ring.acknowledge]

        class Inside(list):  # type: ignore[type-arg]
            def __getitem__(self, index: object) -> bytes:
                with pytest.raises(StateError, match="two threads in one ring"):
                    uses[len(self) - 1]()
                return b"x"

        for n in range(len(uses)):
            assert ring.writev(n, file, Inside([0] * (n + 1)), 0)
        assert ring.submit() == 0
        assert results(ring, len(uses)) == {n: n + 1 for n in range(len(uses))}

    def test_a_child_has_no_part_in_its_parents_ring(tmp_path: Path) -> None:
        script = """if True:
            import os, sys
            from pyvmm.block.uring import Ring
            from pyvmm.errors import StateError
            ring = Ring(8)
            reading, writing = os.pipe()
            buffer = bytearray(4)
            ring.readv("read", reading, [buffer], 0)
            ring.submit()
            ring.readv("queued", reading, [buffer], 0)
            for how in ("close", "del", "exit"):
                child = os.fork()
                if not child:
                    uses = [ring.submit, ring.reap, ring.take_back, ring.acknowledge, lambda: ring.cancel("read")]
                    uses += [lambda: ring.readv(1, reading, [b""], 0), lambda: ring.unsubmitted]
                    for use in uses:
                        try:
                            use()
                            os._exit(1)
                        except StateError as error:
                            assert "open the drive again after a fork" in str(error)
                    if how == "close":
                        assert ring.close() == []
                        buffer.append(0)
                    elif how == "del":
                        del uses, use, ring
                    own = Ring(8)
                    own.writev("own", writing, [b"own!"], 0)
                    own.submit()
                    assert own.reap() == [("own", 4)]
                    own.close()
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0, how
                # What the child wrote the parent's request has read, or nobody: not the child's copy of it.
                found = ring.reap()
                while not found:
                    found = ring.reap()
                assert found in ([("read", 4)], [("queued", 4)]), found
                assert buffer == b"own!"
                buffer[:] = bytes(4)
                ring.readv("read", reading, [buffer], 0)
                assert ring.submit() == 0
            print(len(ring.close()))
        """
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr

    def test_a_refusal_after_the_start_leaves_the_rest_to_whoever_asks(tmp_path: Path) -> None:
        # A filter that comes when the ring is there: submit says so, what was queued can be had back, close ends.
        code = """if True:
            import os
            from errno import EPERM
            from pyvmm.block.uring import Ring
            import sandbox
            ring = Ring(8)
            reading, writing = os.pipe()
            buffer = bytearray(4)
            ring.readv("early", reading, [buffer], 0)
            assert ring.submit() == 0
            sandbox.forbid("EPERM", "io_uring_enter")
            ring.readv("late", reading, [buffer], 0)
            assert ring.submit() == EPERM
            assert ring.take_back() == ["late"]
            os.write(writing, b"abcd")
            assert ring.close() == [("early", 4)]
            print("well")
        """
        done = run_without("EPERM", [], code)
        assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr


def test_open_ring_says_what_the_host_says() -> None:
    if IO_URING_REFUSAL:
        with pytest.raises(ConfigError) as caught:
            io_uring.open_ring()
        assert str(caught.value) == IO_URING_REFUSAL
    else:
        io_uring.open_ring().close()
