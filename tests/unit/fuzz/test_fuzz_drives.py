"""Models of the drives: whatever a guest does in between, a disk holds what was written to it and a CD its image."""

from __future__ import annotations

from fuzz.harness import (
    BUS_MASTER_BASE,
    CD_BYTES,
    CONTROL,
    DISK_SECTORS,
    MARGIN_BYTES,
    MEMORY_BYTES,
    PRIMARY,
    SECONDARY,
    SECTOR_BYTES,
    FencedBoard,
    pattern,
)
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from on_board import OnBoard, run_model

# Registers and commands of ATA
ERROR, COUNT, LBA_LOW, LBA_MID, LBA_HIGH, DEVICE, STATUS = range(1, 8)
BSY, DRDY, DRQ, ERR, IDNF = 0x80, 0x40, 0x08, 0x01, 0x10
READ, READ_EXT, READ_MULTIPLE, READ_DMA, READ_DMA_EXT = 0x20, 0x24, 0xC4, 0xC8, 0x25
WRITE, WRITE_EXT, WRITE_MULTIPLE, WRITE_DMA, WRITE_DMA_EXT = 0x30, 0x34, 0xC5, 0xCA, 0x35
SET_MULTIPLE, SET_FEATURES, PACKET = 0xC6, 0xEF, 0xA0
EXT = (READ_EXT, WRITE_EXT, READ_DMA_EXT, WRITE_DMA_EXT)
MULTIPLE_SECTORS = 4

TABLE, BUFFERS, BUFFERS_END = 0x8000, 0x1_0000, 0x8_0000
TABLE_END = 1 << 31

SECTORS = st.integers(0, DISK_SECTORS - 1)
COUNTS = st.integers(1, 9)
# -- a disk ------------------------------------------------------------------------------------------------------------


class DiskModel(OnBoard):
    """``sectors`` is what the guest knows to be on the disk: of each sector all that it may hold. That is more than one
    thing where a write was broken off.
    """

    def __init__(self) -> None:
        super().__init__()
        content = self.board.path("disk").read_bytes()[MARGIN_BYTES:]
        self.sectors = [{content[n * SECTOR_BYTES : (n + 1) * SECTOR_BYTES]} for n in range(DISK_SECTORS)]
        self.salt = 0
        self.set_multiple()

    def set_multiple(self) -> None:
        self.command(SET_MULTIPLE, 0, MULTIPLE_SECTORS)
        assert self.status() == 0x50

    # How a driver does it

    def status(self) -> int:
        self.board.drain()
        return self.pio.read(PRIMARY + STATUS, 1)

    def command(self, opcode: int, lba: int, count: int) -> None:
        out, ext = self.pio.write, opcode in EXT
        out(PRIMARY + DEVICE, 1, 0xE0 | (0 if ext else lba >> 24 & 0xF))
        values = ((ERROR, 0), (COUNT, count), (LBA_LOW, lba), (LBA_MID, lba >> 8), (LBA_HIGH, lba >> 16))
        if ext:
            for register, value in (
                (COUNT, count >> 8),
                (LBA_LOW, lba >> 24),
                (LBA_MID, lba >> 32),
                (LBA_HIGH, lba >> 40),
            ):
                out(PRIMARY + register, 1, value & 0xFF)
        for register, value in values:
            out(PRIMARY + register, 1, value & 0xFF)
        out(PRIMARY + STATUS, 1, opcode)

    def blocks(self, opcode: int, count: int) -> list[int]:
        """How many sectors come with each DRQ."""
        step = MULTIPLE_SECTORS if opcode in (READ_MULTIPLE, WRITE_MULTIPLE) else 1
        return [min(step, count - at) for at in range(0, count, step)]

    def pull(self, size: int, width: int) -> bytes:
        return b"".join(self.pio.read(PRIMARY, width).to_bytes(width, "little") for _ in range(size // width))

    def push(self, data: bytes, width: int) -> None:
        for at in range(0, len(data), width):
            self.pio.write(PRIMARY, width, int.from_bytes(data[at : at + width], "little"))

    def table(self, size: int, cuts: list[int]) -> list[tuple[int, int]]:
        """A PRD table over ``size`` bytes in pieces as ``cuts`` says; the (address, length) of each."""
        pieces, address, left = [], BUFFERS, size
        for cut in cuts:
            length = min(left, cut)
            if length:
                pieces.append((address, length))
                address += length + 6 + cut % 4096 * 2
                left -= length
        if left:
            pieces.append((address, left))
        assert pieces[-1][0] + pieces[-1][1] <= BUFFERS_END
        entries = [address.to_bytes(4, "little") + length.to_bytes(4, "little") for address, length in pieces]
        last = pieces[-1][0].to_bytes(4, "little") + (pieces[-1][1] | TABLE_END).to_bytes(4, "little")
        self.board.memory.write(TABLE, b"".join((*entries[:-1], last)))
        return pieces

    def start(self, command: int) -> None:
        self.pio.write(BUS_MASTER_BASE + 4, 4, TABLE)
        self.pio.write(BUS_MASTER_BASE + 2, 1, 6)
        self.pio.write(BUS_MASTER_BASE, 1, command)

    def new_data(self, count: int) -> bytes:
        self.salt += 1
        return b"".join(
            pattern(SECTOR_BYTES - 4, self.salt + n) + self.salt.to_bytes(4, "little") for n in range(count)
        )

    def wrote(self, lba: int, data: bytes, certain: bool) -> None:
        for n in range(len(data) // SECTOR_BYTES):
            new = data[n * SECTOR_BYTES : (n + 1) * SECTOR_BYTES]
            self.sectors[lba + n] = {new} if certain else self.sectors[lba + n] | {new}

    def saw(self, lba: int, data: bytes) -> None:
        for n in range(len(data) // SECTOR_BYTES):
            got = data[n * SECTOR_BYTES : (n + 1) * SECTOR_BYTES]
            assert got in self.sectors[lba + n], f"sector {lba + n}"
            self.sectors[lba + n] = {got}

    # What goes right

    @rule(
        lba=SECTORS,
        count=COUNTS,
        opcode=st.sampled_from((READ, READ_EXT, READ_MULTIPLE)),
        width=st.sampled_from((2, 4)),
    )
    def read(self, lba: int, count: int, opcode: int, width: int) -> None:
        count = min(count, DISK_SECTORS - lba)
        self.command(opcode, lba, count)
        data = b""
        for block in self.blocks(opcode, count):
            assert self.status() == 0x58
            data += self.pull(block * SECTOR_BYTES, width)
        assert self.status() == 0x50
        self.saw(lba, data)

    @rule(
        lba=SECTORS,
        count=COUNTS,
        opcode=st.sampled_from((WRITE, WRITE_EXT, WRITE_MULTIPLE)),
        width=st.sampled_from((2, 4)),
    )
    def write(self, lba: int, count: int, opcode: int, width: int) -> None:
        count = min(count, DISK_SECTORS - lba)
        data = self.new_data(count)
        self.command(opcode, lba, count)
        at = 0
        for block in self.blocks(opcode, count):
            assert self.status() == 0x58
            self.push(data[at : at + block * SECTOR_BYTES], width)
            at += block * SECTOR_BYTES
        assert self.status() == 0x50
        self.wrote(lba, data, True)

    CUTS = st.lists(st.integers(1, 3000).map(lambda n: 2 * n), max_size=12)

    @rule(lba=SECTORS, count=COUNTS, opcode=st.sampled_from((READ_DMA, READ_DMA_EXT)), cuts=CUTS, first=st.booleans())
    def read_dma(self, lba: int, count: int, opcode: int, cuts: list[int], first: bool) -> None:
        """``first``: the bus master is started before the command."""
        count = min(count, DISK_SECTORS - lba)
        pieces = self.table(count * SECTOR_BYTES, cuts)
        before = self.board.memory.read(BUFFERS, BUFFERS_END - BUFFERS)
        if first:
            self.start(9)
        self.command(opcode, lba, count)
        if not first:
            self.start(9)
        self.ended_well()
        after = self.board.memory.read(BUFFERS, BUFFERS_END - BUFFERS)
        self.saw(lba, b"".join(after[at - BUFFERS : at - BUFFERS + length] for at, length in pieces))
        expected = bytearray(before)
        for at, length in pieces:
            expected[at - BUFFERS : at - BUFFERS + length] = after[at - BUFFERS : at - BUFFERS + length]
        assert after == expected  # between the pieces nothing was written

    @rule(lba=SECTORS, count=COUNTS, opcode=st.sampled_from((WRITE_DMA, WRITE_DMA_EXT)), cuts=CUTS, first=st.booleans())
    def write_dma(self, lba: int, count: int, opcode: int, cuts: list[int], first: bool) -> None:
        count = min(count, DISK_SECTORS - lba)
        data = self.lay_out(count, cuts)
        if first:
            self.start(1)
        self.command(opcode, lba, count)
        if not first:
            self.start(1)
        self.ended_well()
        self.wrote(lba, data, True)

    def lay_out(self, count: int, cuts: list[int]) -> bytes:
        """New data for so many sectors in memory, and the table for it."""
        data, at = self.new_data(count), 0
        for address, length in self.table(len(data), cuts):
            self.board.memory.write(address, data[at : at + length])
            at += length
        return data

    def ended_well(self) -> None:
        assert self.status() == 0x50
        assert self.pio.read(BUS_MASTER_BASE + 2, 1) & 7 == 4
        self.pio.write(BUS_MASTER_BASE, 1, 0)

    # What goes wrong

    @rule(
        lba=st.sampled_from((DISK_SECTORS - 1, DISK_SECTORS, DISK_SECTORS + 1))
        | st.integers(DISK_SECTORS, (1 << 28) - 1),
        dma=st.sampled_from((READ_DMA, WRITE_DMA)),
        pio=st.sampled_from((READ, WRITE)),
    )
    def past_the_end(self, lba: int, dma: int, pio: int) -> None:
        """Not one sector of it is moved by DMA; by PIO those in front of the end are."""
        self.lay_out(2, [])
        self.start(1)
        for opcode in (dma, pio) if lba >= DISK_SECTORS else (dma,):
            self.command(opcode, lba, 2 if lba < DISK_SECTORS else 1)
            assert self.status() == 0x51
            assert self.pio.read(PRIMARY + ERROR, 1) == IDNF
        self.pio.write(BUS_MASTER_BASE, 1, 0)

    @rule(lba=SECTORS)
    def started_too_late(self, lba: int) -> None:
        """A DMA command is forgotten by a reset; what starts the bus master after that moves nothing."""
        self.lay_out(1, [])
        self.command(WRITE_DMA, lba, 1)
        self.break_off("reset")
        self.start(1)
        assert self.status() == 0x50
        self.pio.write(BUS_MASTER_BASE, 1, 0)

    @rule(
        writes=st.lists(
            st.tuples(st.integers(ERROR, DEVICE), st.integers(0, 255)) | st.tuples(st.just(0), st.integers(0, 0xFFFF)),
            max_size=20,
        )
    )
    def registers_for_nothing(self, writes: list[tuple[int, int]]) -> None:
        for register, value in writes:
            self.pio.write(PRIMARY + register, 1 if register else 2, value)
            self.pio.read(PRIMARY + register, 1)

    @rule(lba=SECTORS, words=st.integers(0, 255 + 2 * 256), how=st.sampled_from(("reset", "diagnose", "power")))
    def broken_off_pio(self, lba: int, words: int, how: str) -> None:
        lba = min(lba, DISK_SECTORS - 4)
        data = self.new_data(4)
        self.command(WRITE, lba, 4)
        assert self.status() == 0x58
        for n in range(words):
            self.board.drain()
            self.push(data[2 * n : 2 * n + 2], 2)
        self.break_off(how)
        whole = words * 2 // SECTOR_BYTES * SECTOR_BYTES
        self.wrote(lba, data[:whole], False)

    @rule(lba=SECTORS, cuts=CUTS, how=st.sampled_from(("reset", "stop", "power", "commands")))
    def broken_off_dma(self, lba: int, cuts: list[int], how: str) -> None:
        lba = min(lba, DISK_SECTORS - 4)
        data = self.lay_out(4, cuts)
        self.board.backends["disk"].mood = lambda: "hold"
        self.command(WRITE_DMA, lba, 4)
        self.start(1)
        assert self.pio.read(PRIMARY + STATUS, 1) & BSY
        self.break_off(how)
        self.wrote(lba, data, False)

    def break_off(self, how: str) -> None:
        """In the middle of a command; after it the drive is idle."""
        self.board.backends["disk"].mood = lambda: "now"
        if how == "power":
            self.board.machine.reset()
            self.board.place_bus_master()
            self.set_multiple()
            return
        if how == "stop":
            self.pio.write(BUS_MASTER_BASE, 1, 0)
        elif how in ("commands", "diagnose"):
            for opcode in (READ, WRITE_DMA, 0x90, 0xEC, 0x10):
                self.pio.write(PRIMARY + STATUS, 1, opcode)
        self.pio.write(CONTROL[PRIMARY], 1, 4)
        self.pio.write(CONTROL[PRIMARY], 1, 0)
        assert self.status() & ~DRDY == 0x10
        self.pio.write(BUS_MASTER_BASE, 1, 0)
        self.set_multiple()

    TABLES = st.lists(
        st.tuples(
            st.sampled_from((0, 2, MEMORY_BYTES - 2, MEMORY_BYTES, 0xFFFF_FFFE, 0xFEC0_0000, TABLE, 0xA_0000)),
            st.sampled_from((2, 510, 512, 0xFFFE, 0)),
        ),
        max_size=6,
    )

    @rule(
        lba=SECTORS,
        entries=TABLES,
        at=st.sampled_from((TABLE, MEMORY_BYTES - 8, MEMORY_BYTES - 4, 0xFFFF_FFFC, 0xFFFC)),
    )
    def senseless_table(self, lba: int, entries: list[tuple[int, int]], at: int) -> None:
        """No end of the table, not enough of it, memory that is not there: the disk is only read from."""
        content = b"".join(address.to_bytes(4, "little") + size.to_bytes(4, "little") for address, size in entries)
        if at < MEMORY_BYTES:
            self.board.memory.write(at, content[: MEMORY_BYTES - at])
        self.command(READ_DMA, lba, 1)
        self.pio.write(BUS_MASTER_BASE + 4, 4, at)
        self.pio.write(BUS_MASTER_BASE + 2, 1, 6)
        self.pio.write(BUS_MASTER_BASE, 1, 9)
        self.board.drain()
        self.break_off("stop")

    @rule()
    def save_and_load(self) -> None:
        self.board.drain()
        for name in ("ide0", "ide1"):
            device = self.board.machine.devices[name]
            state = device.save()
            device.reset()
            device.load(state)
            device.after_load()

    @invariant()
    def the_two_statuses_agree(self) -> None:
        assert self.pio.read(CONTROL[PRIMARY], 1) == self.pio.read(PRIMARY + STATUS, 1)

    def teardown(self) -> None:
        super().teardown()
        content = self.board.path("disk").read_bytes()[MARGIN_BYTES:-MARGIN_BYTES]
        for n, possible in enumerate(self.sectors):
            assert content[n * SECTOR_BYTES : (n + 1) * SECTOR_BYTES] in possible, f"sector {n}"


def test_a_disk_keeps_what_was_written(shared_board: FencedBoard) -> None:
    run_model(DiskModel, shared_board)


# -- a CD --------------------------------------------------------------------------------------------------------------

CD_BLOCKS = CD_BYTES // 2048


class CdModel(OnBoard):
    """A CD reads as its image whatever is done to the drive. ``notices``: how often that still reports a new disc."""

    def __init__(self) -> None:
        super().__init__()
        self.image = self.board.images["cd"]
        self.present, self.locked = True, False
        self.board.change_disc(0, self.board.backends["cd"])
        self.notices = 2

    def packet(self, packet: bytes, limit: int = 0xFFFE, features: int = 0) -> int:
        for register, value in ((DEVICE, 0xA0), (ERROR, features), (LBA_MID, limit & 0xFF), (LBA_HIGH, limit >> 8)):
            self.pio.write(SECONDARY + register, 1, value)
        self.pio.write(SECONDARY + STATUS, 1, PACKET)
        for at in range(0, 12, 2):
            self.pio.write(SECONDARY, 2, int.from_bytes(packet.ljust(12, b"\0")[at : at + 2], "little"))
        return self.status()

    def status(self) -> int:
        self.board.drain()
        return self.pio.read(SECONDARY + STATUS, 1)

    def collect(self, status: int) -> bytes:
        data = b""
        while status & DRQ:
            size = self.pio.read(SECONDARY + LBA_MID, 1) | self.pio.read(SECONDARY + LBA_HIGH, 1) << 8
            assert size
            words = [self.pio.read(SECONDARY, 2).to_bytes(2, "little") for _ in range((size + 1) // 2)]
            data += b"".join(words)[:size]
            status = self.status()
        assert status == DRDY | 0x10
        return data

    def sense(self) -> tuple[int, int]:
        data = self.collect(self.packet(bytes((3, 0, 0, 0, 18))))
        return data[2], data[12]

    def expected_sense(self, reads: bool = True) -> tuple[int, int] | None:
        """What a command meets before it is looked at."""
        if self.present and self.notices:
            self.notices -= 1
            return (2, 0x3A) if self.notices else (6, 0x28)
        return (2, 0x3A) if reads and not self.present else None

    @rule(
        lba=st.integers(0, CD_BLOCKS - 1) | st.integers(CD_BLOCKS - 3, CD_BLOCKS + 1),
        count=st.integers(0, 4),
        limit=st.sampled_from((0xFFFE, 0xFFFF, 2048, 4000, 2)),
    )
    def read(self, lba: int, count: int, limit: int) -> None:
        status = self.packet(bytes((0x28, 0)) + lba.to_bytes(4, "big") + bytes((0, 0, count)), limit)
        wanted = self.expected_sense()
        if wanted is None and count and lba + count > CD_BLOCKS:
            wanted = (5, 0x21)
        if wanted is not None:
            assert status & (ERR | DRQ | BSY) == ERR
            assert self.pio.read(SECONDARY + ERROR, 1) >> 4 == wanted[0]
            assert self.sense() == wanted
            return
        assert self.collect(status) == self.image[lba * 2048 : (lba + count) * 2048]

    @rule(
        lba=st.integers(0, CD_BLOCKS - 4),
        count=st.integers(1, 4),
        at=st.integers(0, 1000).map(lambda n: BUFFERS + 2 * n),
    )
    def read_dma(self, lba: int, count: int, at: int) -> None:
        size = count * 2048
        self.board.memory.write(TABLE, at.to_bytes(4, "little") + (size | TABLE_END).to_bytes(4, "little"))
        ports = BUS_MASTER_BASE + 8
        self.pio.write(ports + 4, 4, TABLE)
        self.pio.write(ports + 2, 1, 6)
        self.pio.write(ports, 1, 9)
        status = self.packet(bytes((0xA8, 0)) + lba.to_bytes(4, "big") + count.to_bytes(4, "big"), features=1)
        wanted = self.expected_sense()
        if wanted is None:
            assert status == DRDY | 0x10
            assert self.pio.read(ports + 2, 1) & 7 == 4
            assert self.board.memory.read(at, size) == self.image[lba * 2048 : lba * 2048 + size]
        else:
            assert status & ERR
        self.pio.write(ports, 1, 0)
        if wanted is not None:
            assert self.sense() == wanted

    @rule(lock=st.booleans())
    def prevent(self, lock: bool) -> None:
        status = self.packet(bytes((0x1E, 0, 0, 0, lock)))
        wanted = self.expected_sense(reads=False)
        if wanted is None:
            self.locked = lock
            assert status == DRDY | 0x10
        else:
            assert self.sense() == wanted

    @precondition(lambda self: self.present)
    @rule(force=st.booleans())
    def eject(self, force: bool) -> None:
        self.board.change_disc(0, None, force=force)
        if force or not self.locked:
            self.present = self.locked = False

    @rule()
    def insert(self) -> None:
        self.board.change_disc(0, self.board.backends["cd"])
        self.present, self.notices = True, 2

    @rule(
        packet=st.binary(min_size=12, max_size=12).filter(lambda p: p[0] not in (0x03, 0x1B, 0x1E)),
        words=st.integers(0, 40),
    )
    def senseless_packet(self, packet: bytes, words: int) -> None:
        """Anything, left in the middle; the drive comes back by DEVICE RESET, which forgets the sense and the lock."""
        self.packet(packet)
        for _ in range(words):
            self.pio.write(SECONDARY, 2, 0xFFFF)
            self.pio.read(SECONDARY, 2)
        self.pio.write(SECONDARY + STATUS, 1, 0x08)
        assert self.status() & (BSY | DRQ) == 0
        self.locked, self.notices = False, 0

    @rule()
    def soft_reset(self) -> None:
        self.pio.write(CONTROL[SECONDARY], 1, 4)
        self.pio.write(CONTROL[SECONDARY], 1, 0)
        assert self.status() & (BSY | DRQ) == 0
        signature = [self.pio.read(SECONDARY + register, 1) for register in (COUNT, LBA_LOW, LBA_MID, LBA_HIGH)]
        assert signature == [1, 1, 0x14, 0xEB]
        self.locked, self.notices = False, 0


def test_a_cd_reads_as_its_image(shared_board: FencedBoard) -> None:
    run_model(CdModel, shared_board)
