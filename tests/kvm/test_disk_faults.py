"""Disks whose host fails, under guests that use them: what rerror and werror say happens, and nothing is lost.

The policies as QEMU's manual has them (-drive, "rerror" and "werror"): report, ignore, stop, and for writes enospc:
stop where there is no room, else report. A machine that stops is in the state io-error; resume() tries again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import disk_images
import pytest
from guests import PASSED, TIMEOUT_S, Guest

from pyvmm import RunState
from pyvmm.block import DriveOptions
from pyvmm.block.backend import BlockBackend
from pyvmm.errors import HostError
from pyvmm.machine import STATUS_IO_ERROR

SECTOR = 512
DISK_SECTORS = 2048
SOURCE, TARGET = 0x2_0000, 0x3_0000  # what the guest writes, and where it reads to
UNC, ABRT = 0x40, 0x04  # bits of the error register
ERR = 0x01

# Steps of a guest: moves by PIO, one after the other, whatever comes of them.
READ, WRITE, WRITE_MULTIPLE, FLUSH = "read", "write", "write-multiple", "flush"
Step = tuple[str, int, int]  # what, first sector, sectors


def steps_source(steps: list[Step]) -> str:
    """Writes come from SOURCE + 512 * sector, reads go to TARGET + 512 * sector: what belongs together shows.

    ``outcomes`` gets a word each: 0, or the status register and above it the error register.
    """
    lines = ["mov %cs, %ax", "mov %ax, %ds", "mov $0x7000, %sp", "call ata_open"]
    for n, (what, lba, count) in enumerate(steps):
        if what == FLUSH:
            lines += ["mov $ATA_FLUSH, %ax", "call ata_command"]
        else:
            opcode = {READ: "ATA_READ", WRITE: "ATA_WRITE", WRITE_MULTIPLE: "ATA_WRITE_MULTIPLE"}[what]
            at = (TARGET if what == READ else SOURCE) + lba * SECTOR
            lines += [
                f"mov ${at >> 4:#x}, %ax", "mov %ax, %es", "xor %di, %di", f"mov ${opcode}, %ax", f"mov ${lba}, %ebx",
                f"mov ${count}, %cx", f"mov ${16 if what == WRITE_MULTIPLE else 1}, %si",
                f"call ata_{'read' if what == READ else 'write'}",
            ]  # fmt: skip
        lines += [f"jc {n + 10}f", "xor %ax, %ax", f"{n + 10}: mov %ax, outcomes + {2 * n}"]
    return "\n".join([*lines, "finish", '.include "ide16.inc"', f"outcomes: .fill {len(steps)}, 2, 0xff"])


class Disk:
    """A guest that does ``steps`` with a disk that fails by ``rules`` (blkdebug's)."""

    def __init__(self, boot: Callable[..., Guest], directory: Path, steps: list[Step], rules: str, **options: str):
        self.content = disk_images.seeded("on the disk", DISK_SECTORS * SECTOR)
        self.data = disk_images.seeded("in memory", TARGET - SOURCE)
        self.image = directory / "disk.img"
        self.image.write_bytes(self.content)
        self.rules = directory / "rules"
        self.rules.write_text(rules)
        self.steps = steps
        drive = DriveOptions(f"blkdebug:{self.rules}:{self.image}", **options)
        self.guest = boot(steps_source(steps), "real16", machine="pc", drives=[drive])
        self.machine = self.guest.machine
        self.machine.memory.write(SOURCE, self.data)

    def run(self) -> int:
        return self.machine.run(TIMEOUT_S)

    @property
    def outcomes(self) -> list[tuple[int, int]]:
        """(status & ERR, error) of each step; (0, 0) where it went well."""
        words = memoryview(self.guest.bytes_at("outcomes", 2 * len(self.steps))).cast("H")
        return [(word & ERR, word >> 8) for word in words]

    def has_read(self, lba: int, count: int) -> bool:
        """Whether the guest has got what is on the disk there."""
        found = self.machine.memory.read(TARGET + lba * SECTOR, count * SECTOR)
        return found == self.content[lba * SECTOR : (lba + count) * SECTOR]

    def check_image(self, *written: tuple[int, int]) -> None:
        """These ranges of sectors hold the guest's data, all others what was there."""
        expected = bytearray(self.content)
        for lba, count in written:
            expected[lba * SECTOR : (lba + count) * SECTOR] = self.data[lba * SECTOR : (lba + count) * SECTOR]
        found = self.image.read_bytes()
        wrong = [n for n in range(DISK_SECTORS) if found[n * 512 : n * 512 + 512] != expected[n * 512 : n * 512 + 512]]
        assert not wrong
        assert len(found) == len(expected)


@pytest.fixture
def disk(boot: Callable[..., Guest], tmp_path: Path) -> Callable[..., Disk]:
    """disk(steps, rules, werror="stop", ...)"""

    def make(steps: list[Step], rules: str = "", **options: str) -> Disk:
        return Disk(boot, tmp_path, steps, rules, **options)

    return make


def fails(io_type: str, errno: str, **more: object) -> str:
    rule = {"iotype": io_type, "errno": errno, **more}
    return "\n".join(["[inject-error]", *(f'{key} = "{value}"' for key, value in rule.items())]) + "\n"


GOOD = (0, 0)


def test_a_disk_without_faults(disk: Callable[..., Disk]) -> None:
    """What the tests below stand on."""
    d = disk([(READ, 5, 3), (WRITE, 20, 2), (WRITE_MULTIPLE, 30, 40), (FLUSH, 0, 0), (READ, 90, 1)])
    assert d.run() == PASSED
    assert d.outcomes == [GOOD] * 5
    assert d.has_read(5, 3)
    assert d.has_read(90, 1)
    d.check_image((20, 2), (30, 40))


# ---- reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [{}, {"rerror": "report"}, {"werror": "stop"}], ids=str)
def test_a_failed_read_is_reported(disk: Callable[..., Disk], policy: dict[str, str]) -> None:
    """The default; what is said of writes does not matter. The sectors before the bad one arrive."""
    d = disk([(READ, 10, 4), (READ, 13, 1)], fails("read", "EIO", sector=12), **policy)
    assert d.run() == PASSED
    assert d.outcomes == [(ERR, UNC), GOOD]
    assert d.has_read(10, 2)
    assert d.has_read(13, 1)


def test_a_failed_read_is_ignored(disk: Callable[..., Disk]) -> None:
    """The guest goes on with whatever is there, and hears nothing."""
    d = disk([(READ, 10, 1), (READ, 20, 1)], fails("read", "EIO", sector=10), rerror="ignore")
    assert d.run() == PASSED
    assert d.outcomes == [GOOD, GOOD]
    assert d.has_read(20, 1)


def test_a_failed_read_stops_the_machine(disk: Callable[..., Disk]) -> None:
    """As often as it fails; then it is there."""
    d = disk([(READ, 10, 4), (READ, 20, 1)], fails("read", "EIO", sector=12, times=3), rerror="stop")
    for _ in range(3):
        status = d.run()
        assert status == STATUS_IO_ERROR
        assert "ide0-hd0" in status.reason and os.strerror(5) in status.reason  # type: ignore[attr-defined]
        assert d.machine.state is RunState.IO_ERROR
    assert d.run() == PASSED
    assert d.outcomes == [GOOD, GOOD]
    assert d.has_read(10, 4)
    assert d.has_read(20, 1)


def test_what_fails_while_the_machine_starts_waits_for_the_next_resume(
    disk: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest runs before what was put aside is tried again: what fails meanwhile is not of that."""
    d = disk([(READ, 10, 1)], fails("read", "EIO", sector=10, times=1), rerror="stop")
    failed = threading.Event()
    d.machine.events.listen(lambda _event: failed.set(), "io-error")
    resume = d.machine.drives.resume

    def later(held_up: list[BlockBackend]) -> None:
        assert failed.wait(TIMEOUT_S)
        resume(held_up)

    monkeypatch.setattr(d.machine.drives, "resume", later)
    assert d.run() == STATUS_IO_ERROR
    assert d.machine.drives.stalled
    monkeypatch.undo()
    assert d.run() == PASSED


# ---- writes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "errno"),
    [({}, "EIO"), ({"werror": "enospc"}, "EIO"), ({"werror": "report"}, "EIO"), ({"werror": "report"}, "ENOSPC")],
    ids=str,
)
def test_a_failed_write_is_reported(disk: Callable[..., Disk], policy: dict[str, str], errno: str) -> None:
    d = disk([(WRITE, 10, 1), (WRITE, 20, 1)], fails("write", errno, sector=10), **policy)
    assert d.run() == PASSED
    assert d.outcomes == [(ERR, ABRT), GOOD]
    d.check_image((20, 1))


@pytest.mark.parametrize("errno", ["EIO", "ENOSPC"])
def test_a_failed_write_is_ignored(disk: Callable[..., Disk], errno: str) -> None:
    d = disk([(WRITE, 10, 1), (WRITE, 20, 1)], fails("write", errno, sector=10), werror="ignore")
    assert d.run() == PASSED
    assert d.outcomes == [GOOD, GOOD]
    d.check_image((20, 1))


@pytest.mark.parametrize(
    ("policy", "errno"),
    [({}, "ENOSPC"), ({"werror": "enospc"}, "ENOSPC"), ({"werror": "stop"}, "ENOSPC"), ({"werror": "stop"}, "EIO")],
    ids=str,
)
def test_a_failed_write_stops_the_machine_and_is_not_lost(
    disk: Callable[..., Disk], policy: dict[str, str], errno: str
) -> None:
    """Twice there is no room. Nothing is missing in the end: not of that command, not from before, not from after."""
    steps = [(WRITE, 5, 1), (WRITE, 8, 16), (WRITE_MULTIPLE, 30, 64), (FLUSH, 0, 0), (READ, 100, 1)]
    d = disk(steps, fails("write", errno, sector=40, times=2), **policy)
    for _ in range(2):
        assert d.run() == STATUS_IO_ERROR
        assert d.machine.state is RunState.IO_ERROR
    assert d.run() == PASSED
    assert d.outcomes == [GOOD] * 5
    assert d.has_read(100, 1)
    d.check_image((5, 1), (8, 16), (30, 64))


# ---- flushes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [{}, {"werror": "report"}], ids=str)
def test_a_failed_flush_is_reported(disk: Callable[..., Disk], policy: dict[str, str]) -> None:
    """A flush counts as a write, and EIO is no lack of room."""
    d = disk([(WRITE, 5, 1), (FLUSH, 0, 0), (READ, 10, 1)], fails("flush", "EIO"), **policy)
    assert d.run() == PASSED
    assert d.outcomes == [GOOD, (ERR, ABRT), GOOD]
    with pytest.raises(HostError, match="not all that was written"):  # nor can it be at the end
        d.machine.close()


def test_a_failed_flush_is_ignored(disk: Callable[..., Disk]) -> None:
    d = disk([(WRITE, 5, 1), (FLUSH, 0, 0)], fails("flush", "EIO"), werror="ignore")
    assert d.run() == PASSED
    assert d.outcomes == [GOOD, GOOD]


@pytest.mark.parametrize(("werror", "errno"), [("stop", "EIO"), ("enospc", "ENOSPC")])
def test_a_failed_flush_stops_the_machine(disk: Callable[..., Disk], werror: str, errno: str) -> None:
    d = disk([(WRITE, 5, 1), (FLUSH, 0, 0), (READ, 10, 1)], fails("flush", errno, once="on"), werror=werror)
    assert d.run() == STATUS_IO_ERROR
    assert d.run() == PASSED
    assert d.outcomes == [GOOD] * 3
    assert d.machine.backends["ide0-hd0"].stats.flush.failed == 1
    d.check_image((5, 1))


# ---- short and slow ------------------------------------------------------------------------------


def test_short_transfers_are_taken_up_again(disk: Callable[..., Disk]) -> None:
    """A host that never moves more than 300 bytes at once."""
    steps = [(WRITE, 5, 3), (WRITE_MULTIPLE, 30, 16), (FLUSH, 0, 0), (READ, 50, 6)]
    d = disk(steps, "[inject-short]\nbytes = 300\n")
    assert d.run() == PASSED
    assert d.outcomes == [GOOD] * 4
    assert d.has_read(50, 6)
    d.check_image((5, 3), (30, 16))


STALLED = """
    mov     %cs, %ax
    mov     %ax, %ds
    mov     $0x7000, %sp
    call    ata_open
    mov     $ATA_DEVICE, %dx
    mov     $0xe0, %al
    outb    %al, %dx
    mov     $ATA_COUNT, %dx
    mov     $1, %al
    outb    %al, %dx
    mov     $ATA_LBA_LOW, %dx
    outb    %al, %dx
    mov     $ATA_COMMAND, %dx
    mov     $ATA_READ, %al
    outb    %al, %dx
1:  incl    polls                       # an exit to the drive itself,
    mov     $ATA_STATUS, %dx
    inb     %dx, %al
    test    $ATA_BSY, %al
    jz      2f
    mov     $0x70, %dx                  # and one to somebody else
    xor     %al, %al
    outb    %al, %dx
    jmp     1b
2:  mov     %al, status
    mov     $TARGET_SEGMENT, %ax
    mov     %ax, %es
    xor     %di, %di
    mov     $256, %cx
    mov     $ATA_DATA, %dx
    rep insw
    finish
    .include "ide16.inc"
polls:  .long 0
status: .byte 0
"""


def test_a_stall_of_two_seconds(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """The guest runs on meanwhile: it polls, sees BSY, and uses other devices."""
    content = disk_images.seeded("on the disk", 64 * SECTOR)
    image, rules = tmp_path / "disk.img", tmp_path / "rules"
    image.write_bytes(content)
    rules.write_text("[inject-stall]\nmilliseconds = 2000\n")
    drive = DriveOptions(f"blkdebug:{rules}:{image}")
    source = f".set TARGET_SEGMENT, {TARGET >> 4:#x}\n{STALLED}"
    guest = boot(source, "real16", machine="pc", drives=[drive])
    assert guest.run() == PASSED
    assert guest.value("status", 1) & 0x89 == 0x08  # DRQ, no error
    assert guest.machine.memory.read(TARGET, SECTOR) == content[SECTOR : 2 * SECTOR]
    assert guest.machine.clock.now_ns() >= 2_000_000_000
    # Some ten thousand where nothing else runs.
    assert guest.value("polls") > 100
    assert guest.machine.backends["ide0-hd0"].stats.read.time_ns >= 2_000_000_000


def test_a_pause_in_a_stall_waits_for_the_drive(disk: Callable[..., Disk]) -> None:
    """Nothing is in flight in a machine that is paused."""
    d = disk([(WRITE, 5, 1), (READ, 10, 1)], "[inject-stall]\nmilliseconds = 300\nonce = on\n")
    d.machine.resume()
    backend = d.machine.backends["ide0-hd0"]
    while not backend.stats.in_flight:
        assert not d.machine.wait(0.001)
    d.machine.pause()
    assert backend.stats.in_flight == 0
    assert backend.stats.write.operations == 1
    assert d.run() == PASSED
    assert d.outcomes == [GOOD, GOOD]
    d.check_image((5, 1))


# ---- a stopped machine ---------------------------------------------------------------------------


def test_a_reset_of_a_stopped_machine_forgets_the_request(disk: Callable[..., Disk]) -> None:
    """The guest starts anew, and its first write is the only one."""
    d = disk([(WRITE, 5, 1), (READ, 10, 1)], fails("write", "EIO", once="on"), werror="stop")
    assert d.run() == STATUS_IO_ERROR
    d.machine.reset()
    assert d.machine.state is RunState.PAUSED
    assert d.machine.backends["ide0-hd0"].stalled == 0
    d.machine.memory.write(SOURCE, d.data)
    assert d.run() == PASSED
    assert d.outcomes == [GOOD, GOOD]
    assert d.machine.backends["ide0-hd0"].stats.write.operations == 1
    d.check_image((5, 1))


def test_a_stopped_machine_can_be_closed(disk: Callable[..., Disk]) -> None:
    d = disk([(WRITE, 5, 1)], fails("write", "EIO"), werror="stop")
    assert d.run() == STATUS_IO_ERROR
    d.machine.close()
    assert d.machine.state is RunState.CLOSED
    d.check_image()


# ---- by DMA --------------------------------------------------------------------------------------

DMA = """
    .set    BUS_MASTER, 0xc000
    .set    PRD, 0x5000
# PCI configuration: BAR4 of 00:01.1, then I/O and bus master on.
    mov     $0x80000920, %eax
    mov     $BUS_MASTER, %ecx
    call    config_write
    mov     $0x80000904, %eax
    mov     $5, %ecx
    call    config_write
# One piece of memory: SECTORS sectors.
    movl    $MEMORY, PRD
    movl    $(SECTORS * 512) | 0x80000000, PRD + 4
    mov     $BUS_MASTER + 4, %edx
    mov     $PRD, %eax
    outl    %eax, %dx
    mov     $BUS_MASTER + 2, %edx           # clear what is left of before
    mov     $0x66, %al
    outb    %al, %dx
    mov     $0x3f6, %edx                    # polled
    mov     $0x0a, %al
    outb    %al, %dx
    mov     $0x1f2, %edx
    mov     $SECTORS, %al
    outb    %al, %dx
    inc     %edx
    mov     $LBA, %al
    outb    %al, %dx
    xor     %al, %al
    inc     %edx
    outb    %al, %dx
    inc     %edx
    outb    %al, %dx
    inc     %edx
    mov     $0xe0, %al
    outb    %al, %dx
    inc     %edx
    mov     $COMMAND, %al
    outb    %al, %dx
    mov     $BUS_MASTER, %edx
    mov     $START, %al
    outb    %al, %dx
    mov     $0x1f7, %edx
1:  inb     %dx, %al
    test    $0x80, %al
    jnz     1b
    mov     %al, status
    mov     $0x1f1, %edx
    inb     %dx, %al
    mov     %al, error
    mov     $BUS_MASTER + 2, %edx
    inb     %dx, %al
    mov     %al, bus_master
    finish
config_write:
    mov     $0xcf8, %edx
    outl    %eax, %dx
    mov     $0xcfc, %edx
    mov     %ecx, %eax
    outl    %eax, %dx
    ret
status: .byte 0
error:  .byte 0
bus_master: .byte 0
"""


class DmaDisk:
    """48 sectors from 100 on, in one command; the disk fails as ``rules`` says."""

    LBA, SECTORS = 100, 48

    def __init__(self, boot: Callable[..., Guest], directory: Path, command: int, rules: str, **options: str) -> None:
        self.content = disk_images.seeded("on the disk", DISK_SECTORS * SECTOR)
        self.data = disk_images.seeded("in memory", self.SECTORS * SECTOR)
        self.image = directory / "disk.img"
        self.image.write_bytes(self.content)
        rules_file = directory / "rules"
        rules_file.write_text(rules)
        reads = command == 0xC8
        symbols = {"LBA": self.LBA, "SECTORS": self.SECTORS, "COMMAND": command, "MEMORY": TARGET}
        symbols["START"] = 9 if reads else 1
        source = "\n".join(f".set {name}, {value:#x}" for name, value in symbols.items()) + DMA
        drive = DriveOptions(f"blkdebug:{rules_file}:{self.image}", **options)
        self.guest = boot(source, "protected32", machine="pc", drives=[drive])
        self.machine = self.guest.machine
        self.machine.memory.write(TARGET, self.data)

    @property
    def memory(self) -> bytes:
        return self.machine.memory.read(TARGET, self.SECTORS * SECTOR)

    @property
    def on_disk(self) -> bytes:
        return self.content[self.LBA * SECTOR : (self.LBA + self.SECTORS) * SECTOR]

    def run(self) -> int:
        return self.machine.run(TIMEOUT_S)


READ_DMA, WRITE_DMA = 0xC8, 0xCA


def test_dma_read_error_is_reported(boot: Callable[..., Guest], tmp_path: Path) -> None:
    d = DmaDisk(boot, tmp_path, READ_DMA, fails("read", "EIO", sector=120))
    assert d.run() == PASSED
    assert d.guest.value("status", 1) & ERR
    assert d.guest.value("error", 1) == UNC
    assert d.guest.value("bus_master", 1) & 1 == 0  # not active any more
    assert d.memory[: 20 * SECTOR] == d.on_disk[: 20 * SECTOR]


def test_dma_read_stops_and_goes_on(boot: Callable[..., Guest], tmp_path: Path) -> None:
    d = DmaDisk(boot, tmp_path, READ_DMA, fails("read", "EIO", sector=120, times=2), rerror="stop")
    assert d.run() == STATUS_IO_ERROR
    assert d.run() == STATUS_IO_ERROR
    assert d.run() == PASSED
    assert d.guest.value("status", 1) & ERR == 0
    assert d.memory == d.on_disk


def test_dma_write_without_room_stops_and_goes_on(boot: Callable[..., Guest], tmp_path: Path) -> None:
    d = DmaDisk(boot, tmp_path, WRITE_DMA, fails("write", "ENOSPC", sector=120, times=2))
    assert d.run() == STATUS_IO_ERROR
    assert d.run() == STATUS_IO_ERROR
    assert d.run() == PASSED
    assert d.guest.value("status", 1) & ERR == 0
    found = d.image.read_bytes()
    begin, end = d.LBA * SECTOR, (d.LBA + d.SECTORS) * SECTOR
    assert found[begin:end] == d.data
    assert found[:begin] + found[end:] == d.content[:begin] + d.content[end:]


# ---- a file system that is full ------------------------------------------------------------------

# Mounts of its own for a process; whoever is not root is so in a namespace of users.
UNSHARE = ("unshare", "--mount", *(("--user", "--map-root-user") if os.geteuid() else ()))


def may_mount() -> bool:
    command = [*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"]
    if not (shutil.which("unshare") and shutil.which("mount")):
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# Where this user may not mount, root does it in the lab.
@pytest.mark.parametrize("where", [pytest.param("here", marks=() if may_mount() else pytest.mark.lab)])
def test_a_full_file_system(where: str, tmp_path: Path) -> None:
    """Real ENOSPC: the machine stops, somebody makes room, and every sector is there."""
    here = Path(__file__).parent
    command = [*UNSHARE, sys.executable, str(here / "full_file_system.py"), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here.parents[1], here.parent, here)))}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["io-error", "io-error", "passed"]


# ---- elsewhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [(READ, 10, 4), (WRITE, 20, 2), (WRITE_MULTIPLE, 30, 40)], ids=lambda step: step[0])
def test_what_was_put_aside_is_done_by_another_machine(
    disk: Callable[..., Disk], boot: Callable[..., Guest], step: Step
) -> None:
    """The machine is saved while a request of it waits, and thrown away; where it goes on, the disk is well again."""
    what, lba, count = step
    rule = fails("read" if what == READ else "write", "EIO")
    d = disk([step, (READ, 90, 1)], rule, rerror="stop", werror="stop")
    assert d.run() == STATUS_IO_ERROR
    state = d.machine.save_state()
    d.machine.close()
    d.rules.write_text("")
    drive = DriveOptions(f"blkdebug:{d.rules}:{d.image}", rerror="stop", werror="stop")
    d.guest = boot(steps_source(d.steps), "real16", machine="pc", drives=[drive])
    d.machine = d.guest.machine
    d.machine.load_state(state)
    d.check_image()
    # As saved once more before it goes on.
    assert d.machine.save_state()["parts"]["ide0"] == state["parts"]["ide0"]
    assert d.run() == PASSED
    assert d.outcomes == [GOOD] * 2
    if what == READ:
        assert d.has_read(lba, count)
        d.check_image()
    else:
        d.check_image((lba, count))
