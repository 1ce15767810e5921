"""A guest that gives pages back while it is saved: they are zeros in the snapshot, and nobody has written them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import PASSED, TIMEOUT_S, Guest
from test_balloon_pages import FROM, MMIO_UP
from test_balloon_pages import PAGES as COUNT
from test_snapshots import PAGES

from pyvmm import Machine
from pyvmm.machine_state import MachineState
from pyvmm.memory_rounds import MemoryWhileItRuns
from pyvmm.snapshot import Saving, Snapshot
from pyvmm.snapshot_file import MemoryWriter

MIB = 1 << 20
PAGE = 4096
DATA = 16 * MIB  # where the tests' own is
# The log of writes; on an older kernel every machine stands while it is saved.
HAS_WRITE_LOG = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2]) >= (6, 7)

# Fills its pages, gives them to the balloon, and looks that they are zeros, again and again.
GIVES = """
again_and_again:
    mov     $FIRST, %ecx
1:  mov     %rcx, %rdi
    shl     $12, %rdi
    mov     %rcx, (%rdi)
    mov     %ecx, NUMBERS - 4 * FIRST(, %rcx, 4)
    inc     %ecx
    cmp     $FIRST + PAGES, %ecx
    jb      1b
    offer   INFLATE, NUMBERS, 0x1000
    ring    0
    await   INFLATE
    incq    rounds
    mov     $FIRST, %ecx
2:  mov     %rcx, %rdi
    shl     $12, %rdi
    cmpq    $0, (%rdi)
    jne     failed
    inc     %ecx
    cmp     $FIRST + PAGES, %ecx
    jb      2b
    cmpb    $0, enough
    je      again_and_again
    finish
failed:
    finish  9
rounds: .quad   0
enough: .byte   0
"""


def saved_memory(m: Machine, meanwhile: Callable[[], object]) -> bytes:
    """All of a machine's memory as a live save has it, where ``meanwhile`` was done between two rounds."""
    state = MachineState(m.board.chassis, m.board, m.board.platform)
    origin = m.board.chassis.origin
    before = origin.snapshot if origin is not None else None
    assert before is None or isinstance(before, Snapshot)
    with MemoryWriter() as file, MemoryWhileItRuns(saving := Saving(file, before, None), state) as the_rest:
        assert (file.written_bytes >= MIB) is HAS_WRITE_LOG
        meanwhile()
        m.pause()
        the_rest()
        if not HAS_WRITE_LOG:
            saving.write_memory(state.memory())
        return os.pread(file.fd, m.memory.size_bytes, PAGE)  # the first piece, behind the header


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_a_page_that_goes_back_meanwhile_is_zeros(boot: Callable[..., Guest], shared: bool) -> None:
    guest = boot(PAGES, memory_mib=64, balloon=0, shared_memory=shared)
    memory = guest.machine.memory
    data = os.urandom(MIB)
    memory.write(DATA, data)
    guest.start()

    def give_back() -> None:
        assert memory.discard(DATA, 8 * PAGE) == 8 * PAGE
        assert memory.discard(DATA + 16 * PAGE, PAGE) == PAGE
        assert memory.discard(DATA + 16 * PAGE, PAGE) == PAGE
        memory.write(DATA + 2 * PAGE, b"since then")

    saved = saved_memory(guest.machine, give_back)
    here = saved[DATA : DATA + MIB]
    assert here == memory.read(DATA, MIB)
    expected = bytearray(data)
    expected[: 8 * PAGE] = bytes(8 * PAGE)
    expected[16 * PAGE : 17 * PAGE] = bytes(PAGE)
    expected[2 * PAGE : 2 * PAGE + 10] = b"since then"
    assert here == bytes(expected)


def test_where_a_file_is_behind_the_memory_it_is_the_files(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot(PAGES, memory_mib=64, balloon=0)
    data, newer = os.urandom(MIB), os.urandom(MIB)
    guest.machine.memory.write(DATA, data)
    guest.start()
    guest.machine.save(tmp_path / "a.snap")
    with Machine.restore(tmp_path / "a.snap") as m:
        m.memory.write(DATA, newer)
        m.resume()
        saved = saved_memory(m, lambda: m.memory.discard(DATA, 8 * PAGE))
        assert saved[DATA : DATA + MIB] == data[: 8 * PAGE] + newer[8 * PAGE :] == m.memory.read(DATA, MIB)


def test_saved_while_it_gives_again_and_again(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """Whatever moment it is: the guest that goes on finds zeros where it has given pages back."""
    guest = boot(MMIO_UP + GIVES, machine="microvm", balloon=0, memory_mib=16)
    end = guest.program.symbols["enough"]
    guest.start()
    for n in range(10):
        before = guest.value("rounds", 8)
        while guest.value("rounds", 8) == before:
            pass
        guest.machine.save(path := tmp_path / f"{n}.snap")
        with Machine.restore(path, eager=True) as m:
            m.memory.write(end, b"\1")
            assert m.run(TIMEOUT_S) == PASSED
    guest.machine.memory.write(end, b"\1")
    guest.wait()
    assert guest.machine.status == PASSED


def test_it_leaves_while_it_gives(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """The same for a guest that goes on in another machine by a migration."""
    guest = boot(MMIO_UP + GIVES, machine="microvm", balloon=0, memory_mib=16)
    guest.start()
    while not guest.value("rounds", 8):
        pass
    address, ready = str(tmp_path / "socket"), threading.Event()
    came: list[Machine] = []
    arrival = threading.Thread(
        target=lambda: came.append(Machine.incoming(address, timeout_s=TIMEOUT_S, ready=lambda _: ready.set()))
    )
    arrival.start()
    assert ready.wait(TIMEOUT_S)
    guest.machine.migrate_to(address)
    arrival.join()
    with came[0] as m:
        m.memory.write(guest.program.symbols["enough"], b"\1")
        assert m.run(TIMEOUT_S) == PASSED
    assert FROM == COUNT * PAGE  # the first page that is given, as GIVES has it
