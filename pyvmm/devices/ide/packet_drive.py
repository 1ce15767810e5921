"""PacketDrive: an ATAPI drive on its channel: the commands of the PACKET feature set, and how packets get to the drive.

ATA/ATAPI-6: 8.23 (PACKET), 9.8 and 9.9 (the protocols), 9.12 (the signature). What packets mean is in atapi.py, how
their data moves in packet_transfer.py.
"""

from __future__ import annotations

from pyvmm.devices.ide import registers as c
from pyvmm.devices.ide.atapi import CHECK, DATA_IN, DATA_OUT, PACKET_BYTES, READ
from pyvmm.devices.ide.drive import Drive
from pyvmm.devices.ide.packet_transfer import PacketActivity, PacketDmaIn, PacketDmaOut, PacketIn, PacketOut
from pyvmm.devices.ide.pio import PioBlock
from pyvmm.devices.ide.registers import (
    ABRT,
    BUSY,
    COUNT,
    DATA,
    FEATURES,
    KEEP_SETTINGS,
    PACKET_DMA,
    PACKET_OVERLAP,
    REASON,
    REASON_COD,
    REASON_IO,
    REVERT_SETTINGS,
    TRANSFER_MODE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.devices.ide.activity import Activity
    from pyvmm.devices.ide.atapi import AtapiDrive, PacketResult

SIGNATURE_MID, SIGNATURE_HIGH = 0x14, 0xEB
POWER_ACTIVE = 0xFF


class PacketDrive(Drive):
    __slots__ = ("device",)

    present = True

    def __init__(self, device: AtapiDrive) -> None:
        super().__init__()
        self.device = device

    def settings_power_on(self) -> None:
        self.transfer_mode = c.PIO_DEFAULT
        self.device.reset()

    def settings_soft_reset(self) -> None:
        self.device.reset()

    def set_signature(self) -> None:
        """With DRDY clear: a host that knows no packets must not take it for a disk."""
        super().set_signature()
        self.regs[c.LBA_MID] = SIGNATURE_MID
        self.regs[c.LBA_HIGH] = SIGNATURE_HIGH
        self.status = 0

    def execute(self, opcode: int) -> None:
        command = COMMANDS.get(opcode)
        if command is None:
            self.fail(ABRT)
            return
        self.error = 0
        command(self)

    def device_reset(self) -> None:
        if not self.channel.in_reset:
            self.begin_reset()
            self.channel.update_irq()
            self.end_reset()

    def diagnose(self) -> None:
        self.channel.diagnose()

    def abort(self) -> None:
        self.fail(ABRT)

    def not_for_packets(self) -> None:
        """IDENTIFY DEVICE and READ SECTOR(S): by the signature hosts see what this is (8.15, 8.34)."""
        self.set_signature()
        self.fail(ABRT)

    def identify_packet_device(self) -> None:
        PioBlock(self, self.device.identify_packet(self.transfer_mode)).start()
        self.channel.interrupt(self)

    def check_power_mode(self) -> None:
        self.regs[COUNT] = POWER_ACTIVE
        self.finish()

    def set_features(self) -> None:
        subcommand = self.regs[FEATURES]
        known = subcommand in (KEEP_SETTINGS, REVERT_SETTINGS)
        if known or (subcommand == TRANSFER_MODE and self.choose_transfer_mode()):
            self.finish()
        else:
            self.fail(ABRT)

    # -- packets -------------------------------------------------------------------------------------------------------

    def packet(self) -> None:
        features = self.regs[FEATURES]
        if features & PACKET_OVERLAP:
            self.fail(ABRT)
        else:
            PacketCommand(self, bool(features & PACKET_DMA)).start()

    def carry_out(self, cdb: bytes, dma: bool) -> None:
        self.status = BUSY
        self._follow(self.device.packet(cdb), dma)

    def _follow(self, result: PacketResult, dma: bool) -> None:
        """What comes after the packet, or after its data."""
        kind = result.kind
        if kind == READ or (kind == DATA_IN and result.data):
            (PacketDmaIn if dma else PacketIn)(self, result.data, result.lba, result.count).start()
        elif kind == DATA_OUT:
            (PacketDmaOut if dma else PacketOut)(self, result.length).start()
        elif kind == CHECK:
            self.check_condition()
        else:
            self.packet_done()

    def data_came(self, data: bytes) -> None:
        """The host's data of the last packet."""
        self._follow(self.device.data_out(data), False)

    def set_reason(self, reason: int) -> None:
        self.regs[REASON] = self.regs[REASON] & ~(REASON_COD | REASON_IO) | reason

    def packet_done(self) -> None:
        self.error = 0
        self.set_reason(REASON_COD | REASON_IO)
        self.finish()

    def check_condition(self) -> None:
        """The error register shows the sense key; REQUEST SENSE has the rest."""
        self.set_reason(REASON_COD | REASON_IO)
        self.fail(self.device.sense_key << 4)

    # -- state ---------------------------------------------------------------------------------------------------------

    STATE = {**Drive.STATE, "device": "part"}

    def made(self, kind: str) -> Activity | None:
        made: Callable[[PacketDrive], Activity] | None = ACTIVITIES.get(kind)
        return None if made is None else made(self)


class PacketCommand(PacketActivity):
    """The packet itself comes through the data port, with no interrupt to ask for it."""

    __slots__ = ("_dma", "_packet")

    KIND = "packet"
    STATE = {"_dma": "flag", "_packet": ("bytes", PACKET_BYTES), "_moved": range(PACKET_BYTES)}

    def __init__(self, drive: PacketDrive, dma: bool = False) -> None:
        super().__init__(drive)
        self._packet = bytearray(PACKET_BYTES)
        self._dma = dma

    def start(self) -> None:
        drive = self.packet_drive
        drive.activity = self
        drive.set_reason(REASON_COD)
        drive.status = DATA
        self.go_on()

    def go_on(self) -> None:
        self.channel.open_write(self._packet, self._skipped)

    def on_end(self) -> None:
        self.drive.activity = None
        self.packet_drive.carry_out(bytes(self._packet), self._dma)


ACTIVITIES: dict[str, Callable[[PacketDrive], Activity]] = {
    PioBlock.KIND: PioBlock,
    PacketCommand.KIND: PacketCommand,
    PacketIn.KIND: PacketIn,
    PacketOut.KIND: PacketOut,
    PacketDmaIn.KIND: PacketDmaIn,
    PacketDmaOut.KIND: PacketDmaOut,
}

COMMANDS: dict[int, Callable[[PacketDrive], None]] = {
    c.NOP: PacketDrive.abort,
    c.DEVICE_RESET: PacketDrive.device_reset,
    **dict.fromkeys(c.READ_SECTORS[:1], PacketDrive.not_for_packets),
    c.EXECUTE_DEVICE_DIAGNOSTIC: PacketDrive.diagnose,
    c.PACKET: PacketDrive.packet,
    c.IDENTIFY_PACKET_DEVICE: PacketDrive.identify_packet_device,
    **dict.fromkeys((*c.STANDBY_IMMEDIATE, *c.IDLE_IMMEDIATE, *c.STANDBY, *c.IDLE, *c.SLEEP), PacketDrive.finish),
    **dict.fromkeys(c.CHECK_POWER_MODE, PacketDrive.check_power_mode),
    c.FLUSH_CACHE: PacketDrive.finish,
    c.IDENTIFY_DEVICE: PacketDrive.not_for_packets,
    c.SET_FEATURES: PacketDrive.set_features,
}
