"""IdeDisk: a hard disk on an ATA channel, its settings and its commands.

ATA/ATAPI-6 (T13 1410D), chapter 8, with the obsolete commands of ATA-1 to -5 that BIOSes and boot loaders use; DATA SET
MANAGEMENT and the FUA writes from ATA8-ACS. The transfers themselves are in pio.py and dma.py.

Errors: ABRT for what the disk does not know or cannot do, IDNF for an address it does not have, UNC for a sector that
can't be read. With the last two the registers hold the address of the first such sector, and in the count how many were
left from there on.
"""

from __future__ import annotations

from pyvmm.devices.ide import registers as c
from pyvmm.devices.ide.dma import DmaTransfer, Trim
from pyvmm.devices.ide.drive import Drive
from pyvmm.devices.ide.identify import LBA28_SECTORS, geometry, identify
from pyvmm.devices.ide.pio import PioBlock, PioReader, PioWriter
from pyvmm.devices.ide.registers import (
    ABRT,
    COUNT,
    DEVICE,
    FEATURES,
    HEAD,
    HOB,
    IDNF,
    KEEP_SETTINGS,
    LBA,
    LBA_HIGH,
    LBA_LOW,
    LBA_MID,
    LOOK_AHEAD_OFF,
    LOOK_AHEAD_ON,
    MAX_MULTIPLE,
    MAX_TRIM_BLOCKS,
    PIO_DEFAULT,
    REVERT_SETTINGS,
    TRANSFER_MODE,
    WRITE_CACHE_OFF,
    WRITE_CACHE_ON,
)
from pyvmm.devices.ide.tasks import FlushTask, VerifyTask

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.block import BlockBackend
    from pyvmm.clock import Clock
    from pyvmm.devices.ide.activity import Activity

STANDBY, IDLE, ACTIVE, SLEEPING = c.STANDBY_POWER, c.IDLE_POWER, c.ACTIVE_POWER, c.SLEEPING
NS_PER_SECOND = 1_000_000_000


class IdeDisk(Drive):
    """``backend`` is the disk's content; ``serial`` has up to 20 characters, ``model`` 40, ``revision`` 8.

    ``geometry``: (cylinders, heads, sectors a track) of the default translation; None: by the disk's size.
    ``bios_translation`` is what the board tells a BIOS about it.
    """

    __slots__ = (
        "_geometry",
        "_reader",
        "_standby_after_ns",
        "_used_at_ns",
        "_writer",
        "backend",
        "bios_translation",
        "cylinders",
        "heads",
        "look_ahead",
        "model",
        "multiple",
        "power",
        "reverts",
        "revision",
        "sectors",
        "serial",
        "track",
        "write_cache",
    )

    present = True

    def __init__(
        self,
        backend: BlockBackend,
        *,
        model: str = "pyvmm HARDDISK",
        serial: str = "PV00001",
        revision: str = "1.0",
        geometry: tuple[int, int, int] | None = None,
        bios_translation: int = 0,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.sectors = backend.sectors
        self.model = model
        self.serial = serial
        self.revision = revision
        self._geometry = geometry
        self.bios_translation = bios_translation
        self._reader: PioReader | None = None
        self._writer: PioWriter | None = None
        self.settings_power_on()

    @property
    def geometry(self) -> tuple[int, int, int]:
        """The default translation: INITIALIZE DEVICE PARAMETERS sets another until the next reset."""
        return geometry(self.sectors) if self._geometry is None else self._geometry

    def settings_power_on(self) -> None:
        self.cylinders, self.heads, self.track = self.geometry
        self.multiple = MAX_MULTIPLE
        self.transfer_mode = PIO_DEFAULT
        self.write_cache = True
        self.look_ahead = True
        self.reverts = False  # a software reset brings the settings back
        self.power = ACTIVE
        self._standby_after_ns = 0
        self._used_at_ns = 0

    def settings_soft_reset(self) -> None:
        if self.reverts:
            mode = self.transfer_mode
            self.settings_power_on()
            self.transfer_mode = mode  # only a hard reset ends it (8.46.11)
        elif self.power != IDLE:
            self.power = STANDBY if self.power == SLEEPING else self.power

    def execute(self, opcode: int) -> None:
        if self.power == SLEEPING:
            return  # nothing but a reset wakes it (6.10)
        if self._standby_after_ns:
            self._look_at_standby_timer()
        command = COMMANDS.get(opcode)
        if command is None:
            self.fail(ABRT)
            return
        self.error = 0
        command(self)

    def drop(self) -> None:
        super().drop()
        self._reader = self._writer = None  # what was dropped stays so

    # -- addresses (6.2) -----------------------------------------------------------------------------------------------

    def _address(self) -> int:
        """The LBA in the registers for a command with 28 bits; -1 for a cylinder, head and sector that can't be."""
        self.lba48 = False
        regs = self.regs
        device = regs[DEVICE]
        if device & LBA:
            return (device & HEAD) << 24 | regs[LBA_HIGH] << 16 | regs[LBA_MID] << 8 | regs[LBA_LOW]
        head, sector = device & HEAD, regs[LBA_LOW]
        if not 0 < sector <= self.track or head >= self.heads:
            return -1
        return ((regs[LBA_HIGH] << 8 | regs[LBA_MID]) * self.heads + head) * self.track + sector - 1

    def _address_ext(self) -> int:
        self.lba48 = True
        regs = self.regs
        low = regs[LBA_HIGH] << 16 | regs[LBA_MID] << 8 | regs[LBA_LOW]
        return regs[LBA_HIGH + HOB] << 40 | regs[LBA_MID + HOB] << 32 | regs[LBA_LOW + HOB] << 24 | low

    def _count_ext(self) -> int:
        return (self.regs[COUNT + HOB] << 8 | self.regs[COUNT]) or 0x10000

    def set_chs(self, lba: int) -> None:
        regs = self.regs
        track, sector = divmod(lba, self.track)
        cylinder, head = divmod(track, self.heads)
        regs[LBA_LOW] = sector + 1
        regs[LBA_MID] = cylinder & 0xFF
        regs[LBA_HIGH] = cylinder >> 8 & 0xFF
        regs[DEVICE] = regs[DEVICE] & ~HEAD | head

    def _not_found(self, lba: int, count: int) -> bool:
        """Whether there is no such range of sectors; the command has failed then."""
        if lba >= 0 and lba + count <= self.sectors:
            return False
        if lba >= 0:
            first = max(lba, self.sectors)
            self.set_lba(first)
            self.set_count(lba + count - first)
        self.fail(IDNF)
        return True

    # -- reading and writing -------------------------------------------------------------------------------------------

    def _read_pio(self, lba: int, count: int, block: int) -> None:
        self.power = ACTIVE
        reader = self._reader
        if reader is None:
            reader = self._reader = PioReader(self)
        if lba < 0:
            self.fail(IDNF)
        else:
            reader.start(lba, count, block)

    def _write_pio(self, lba: int, count: int, block: int, fua: bool = False) -> None:
        self.power = ACTIVE
        if self._writer is None:
            self._writer = PioWriter(self)
        if self.backend.read_only:
            self.fail(ABRT)
        elif lba < 0:
            self.fail(IDNF)
        else:
            self._writer.start(lba, count, block, fua or not self.write_cache)

    def _read_dma(self, lba: int, count: int) -> None:
        self.power = ACTIVE
        if not self._not_found(lba, count):
            DmaTransfer(self, True, lba, count, False).start()

    def _write_dma(self, lba: int, count: int, fua: bool = False) -> None:
        self.power = ACTIVE
        if self.backend.read_only:
            self.fail(ABRT)
        elif not self._not_found(lba, count):
            DmaTransfer(self, False, lba, count, fua or not self.write_cache).start()

    def read_sectors(self) -> None:
        self._read_pio(self._address(), self.regs[COUNT] or 256, 1)

    def read_sectors_ext(self) -> None:
        self._read_pio(self._address_ext(), self._count_ext(), 1)

    def read_multiple(self) -> None:
        if self.multiple:
            self._read_pio(self._address(), self.regs[COUNT] or 256, self.multiple)
        else:
            self.fail(ABRT)

    def read_multiple_ext(self) -> None:
        if self.multiple:
            self._read_pio(self._address_ext(), self._count_ext(), self.multiple)
        else:
            self.fail(ABRT)

    def read_dma(self) -> None:
        self._read_dma(self._address(), self.regs[COUNT] or 256)

    def read_dma_ext(self) -> None:
        self._read_dma(self._address_ext(), self._count_ext())

    def write_sectors(self) -> None:
        self._write_pio(self._address(), self.regs[COUNT] or 256, 1)

    def write_sectors_ext(self) -> None:
        self._write_pio(self._address_ext(), self._count_ext(), 1)

    def write_multiple(self) -> None:
        if self.multiple:
            self._write_pio(self._address(), self.regs[COUNT] or 256, self.multiple)
        else:
            self.fail(ABRT)

    def write_multiple_ext(self, fua: bool = False) -> None:
        if self.multiple:
            self._write_pio(self._address_ext(), self._count_ext(), self.multiple, fua)
        else:
            self.fail(ABRT)

    def write_multiple_fua_ext(self) -> None:
        self.write_multiple_ext(fua=True)

    def write_dma(self) -> None:
        self._write_dma(self._address(), self.regs[COUNT] or 256)

    def write_dma_ext(self) -> None:
        self._write_dma(self._address_ext(), self._count_ext())

    def write_dma_fua_ext(self) -> None:
        self._write_dma(self._address_ext(), self._count_ext(), fua=True)

    # -- commands about the medium, without data -----------------------------------------------------------------------

    def _verify(self, lba: int, count: int) -> None:
        self.power = ACTIVE
        if not self._not_found(lba, count):
            VerifyTask(self, lba, count).start()

    def read_verify(self) -> None:
        self._verify(self._address(), self.regs[COUNT] or 256)

    def read_verify_ext(self) -> None:
        self._verify(self._address_ext(), self._count_ext())

    def flush_cache(self) -> None:
        self.power = ACTIVE
        FlushTask(self).start()

    def seek(self) -> None:
        if not self._not_found(self._address(), 1):
            self.finish()

    def recalibrate(self) -> None:
        self.finish()

    def data_set_management(self) -> None:
        blocks = self._count_ext()
        if self.regs[FEATURES] != 1 or blocks > MAX_TRIM_BLOCKS or self.backend.read_only:
            self.fail(ABRT)
        else:
            Trim(self, blocks).start()

    def read_native_max(self) -> None:
        """The last address; in a form that is too short for it, the last that there is (8.31)."""
        self.lba48 = False
        lba = min(self.sectors, LBA28_SECTORS + 1)
        if not self.regs[DEVICE] & LBA:
            lba = min(lba, self.cylinders * self.heads * self.track)
        self.set_lba(lba - 1)
        self.finish()

    def read_native_max_ext(self) -> None:
        self.lba48 = True
        self.set_lba(self.sectors - 1)
        self.finish()

    # -- settings ------------------------------------------------------------------------------------------------------

    def identify_device(self) -> None:
        PioBlock(self, identify(self)).start()
        self.channel.interrupt(self)

    def initialize_device_parameters(self) -> None:
        """Another translation of cylinders, heads and sectors (8.16)."""
        heads, track = (self.regs[DEVICE] & HEAD) + 1, self.regs[COUNT]
        if not track:
            self.fail(ABRT)
            return
        self.heads, self.track = heads, track
        self.cylinders = min(0xFFFF, self.sectors // (heads * track))
        self.finish()

    def set_multiple(self) -> None:
        count = self.regs[COUNT]
        if count > MAX_MULTIPLE or count & (count - 1):
            self.fail(ABRT)
            return
        self.multiple = count
        self.finish()

    def set_features(self) -> None:
        subcommand = self.regs[FEATURES]
        if subcommand == WRITE_CACHE_OFF:
            self.write_cache = False
            FlushTask(self).start()  # what the cache held (8.46.10)
            return
        if subcommand == TRANSFER_MODE:
            if not self.choose_transfer_mode():
                self.fail(ABRT)
                return
        elif subcommand == WRITE_CACHE_ON:
            self.write_cache = True
        elif subcommand in (LOOK_AHEAD_ON, LOOK_AHEAD_OFF):
            self.look_ahead = subcommand == LOOK_AHEAD_ON
        elif subcommand in (KEEP_SETTINGS, REVERT_SETTINGS):
            self.reverts = subcommand == REVERT_SETTINGS
        else:
            self.fail(ABRT)
            return
        self.finish()

    # -- power (6.10) --------------------------------------------------------------------------------------------------

    def diagnose(self) -> None:
        self.channel.diagnose()

    def nop(self) -> None:
        self.fail(ABRT)  # as it must be (8.21)

    def idle(self) -> None:
        self._set_standby_timer()
        self.power = IDLE
        self.finish()

    def idle_immediate(self) -> None:
        self.power = IDLE
        self.finish()

    def standby(self) -> None:
        self._set_standby_timer()
        self.standby_immediate()

    def standby_immediate(self) -> None:
        FlushTask(self, power=STANDBY).start()

    def sleep(self) -> None:
        FlushTask(self, power=SLEEPING).start()

    def check_power_mode(self) -> None:
        self.regs[COUNT] = self.power
        self.finish()

    def _set_standby_timer(self) -> None:
        self._standby_after_ns = standby_seconds(self.regs[COUNT]) * NS_PER_SECOND
        self._used_at_ns = self.channel.clock.now_ns()

    def _look_at_standby_timer(self) -> None:
        """Nobody sees when the disk spins down, only that it has: so nothing runs meanwhile."""
        now_ns = self.channel.clock.now_ns()
        if now_ns - self._used_at_ns >= self._standby_after_ns:
            self.power = STANDBY
        self._used_at_ns = now_ns

    # -- state ---------------------------------------------------------------------------------------------------------

    STATE = {
        **Drive.STATE,
        "cylinders": 16,
        "heads": range(1, 256),
        "track": range(1, 256),
        "multiple": ("one of", 0, 1, 2, 4, 8, MAX_MULTIPLE),
        "write_cache": "flag",
        "look_ahead": "flag",
        "reverts": "flag",
        "power": c.POWERS,
        "_standby_after_ns": 46,  # 20 hours
        "_used_at_ns": "moment",
    }

    @property
    def _clock(self) -> Clock:
        return self.channel.clock

    def load(self, state: dict[str, Any]) -> None:
        self._reader = self._writer = None
        super().load(state)

    def made(self, kind: str) -> Activity | None:
        if kind == PioReader.KIND:
            self._reader = PioReader(self)
            return self._reader
        if kind == PioWriter.KIND:
            self._writer = PioWriter(self)
            return self._writer
        made = ACTIVITIES.get(kind)
        return None if made is None else made(self)


def standby_seconds(count: int) -> int:
    """The standby timer's period (8.12, table 23); 0: never."""
    if count <= 240:
        return 5 * count
    if count <= 251:
        return 1800 * (count - 240)
    return {252: 1260, 253: 28800, 255: 1275}.get(count, 0)


ACTIVITIES: dict[str, Callable[[IdeDisk], Activity]] = {
    PioBlock.KIND: PioBlock,
    DmaTransfer.KIND: DmaTransfer,
    Trim.KIND: Trim,
    VerifyTask.KIND: VerifyTask,
    FlushTask.KIND: FlushTask,
}

COMMANDS: dict[int, Callable[[IdeDisk], None]] = {
    c.NOP: IdeDisk.nop,
    c.DATA_SET_MANAGEMENT: IdeDisk.data_set_management,
    **dict.fromkeys(c.RECALIBRATE, IdeDisk.recalibrate),
    **dict.fromkeys(c.READ_SECTORS, IdeDisk.read_sectors),
    c.READ_SECTORS_EXT: IdeDisk.read_sectors_ext,
    c.READ_DMA_EXT: IdeDisk.read_dma_ext,
    c.READ_NATIVE_MAX_EXT: IdeDisk.read_native_max_ext,
    c.READ_MULTIPLE_EXT: IdeDisk.read_multiple_ext,
    **dict.fromkeys(c.WRITE_SECTORS, IdeDisk.write_sectors),
    c.WRITE_SECTORS_EXT: IdeDisk.write_sectors_ext,
    c.WRITE_DMA_EXT: IdeDisk.write_dma_ext,
    c.WRITE_MULTIPLE_EXT: IdeDisk.write_multiple_ext,
    c.WRITE_VERIFY: IdeDisk.write_sectors,
    c.WRITE_DMA_FUA_EXT: IdeDisk.write_dma_fua_ext,
    **dict.fromkeys(c.READ_VERIFY, IdeDisk.read_verify),
    c.READ_VERIFY_EXT: IdeDisk.read_verify_ext,
    **dict.fromkeys(c.SEEK, IdeDisk.seek),
    c.EXECUTE_DEVICE_DIAGNOSTIC: IdeDisk.diagnose,
    c.INITIALIZE_DEVICE_PARAMETERS: IdeDisk.initialize_device_parameters,
    c.READ_MULTIPLE: IdeDisk.read_multiple,
    c.WRITE_MULTIPLE: IdeDisk.write_multiple,
    c.SET_MULTIPLE: IdeDisk.set_multiple,
    **dict.fromkeys(c.READ_DMA, IdeDisk.read_dma),
    **dict.fromkeys(c.WRITE_DMA, IdeDisk.write_dma),
    c.WRITE_MULTIPLE_FUA_EXT: IdeDisk.write_multiple_fua_ext,
    **dict.fromkeys(c.STANDBY_IMMEDIATE, IdeDisk.standby_immediate),
    **dict.fromkeys(c.IDLE_IMMEDIATE, IdeDisk.idle_immediate),
    **dict.fromkeys(c.STANDBY, IdeDisk.standby),
    **dict.fromkeys(c.IDLE, IdeDisk.idle),
    **dict.fromkeys(c.CHECK_POWER_MODE, IdeDisk.check_power_mode),
    **dict.fromkeys(c.SLEEP, IdeDisk.sleep),
    c.FLUSH_CACHE: IdeDisk.flush_cache,
    c.FLUSH_CACHE_EXT: IdeDisk.flush_cache,
    c.IDENTIFY_DEVICE: IdeDisk.identify_device,
    c.SET_FEATURES: IdeDisk.set_features,
    c.READ_NATIVE_MAX: IdeDisk.read_native_max,
}
