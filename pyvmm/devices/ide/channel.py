"""IdeChannel: one ATA channel, with a drive, two or none: the ports, selection, the interrupt, resets.

ATA/ATAPI-6, chapters 7 and 9. Where the standard calls a result indeterminate QEMU's behaviour decides: while the
selected drive is busy or has data to move, commands and writes to the command block (and with them the selection of a
drive) are lost; an absent drive's status is zero. So are all its other registers: a BIOS sees at its first look that
nobody is there.

A transfer's data goes through ``data``, the compiled window at the first port (see pio.py), and through the guest's
memory by ``bus_master`` (see dma.py). A guest that polls a busy drive reads its status without Python from the second
time on: the regions have it latched until it changes.
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.devices.ide.bus_master import BusMaster
from pyvmm.devices.ide.disk import IdeDisk
from pyvmm.devices.ide.drive import Drive
from pyvmm.devices.ide.pio_buffer import PioBuffer
from pyvmm.devices.ide.registers import (
    ALWAYS_ON,
    BM_INTERRUPT,
    BSY,
    COMMAND,
    CONTROL_HOB,
    DEVICE,
    DEVICE_RESET,
    ERROR,
    HOB,
    NIEN,
    SRST,
    STATUS,
    TAKEN,
)
from pyvmm.errors import StateError
from pyvmm.region import FifoRegion, RegisterRegion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.clock import Clock
    from pyvmm.devices.ide.activity import DriveSide
    from pyvmm.devices.ide.atapi import AtapiDrive
    from pyvmm.guest_memory import GuestMemory
    from pyvmm.irq import IrqLine


DATA_BYTES = 4  # the widest access of the data port


class IdeChannel(Device):
    """The seven ports from 1F1h on are ``region``, ``read`` and ``write``; 3F6h is ``control``, ``control_read`` and
    ``control_write``. ``selected`` is the drive that answers.
    """

    impl_sizes = (1, 1)

    __slots__ = (
        "_buffer",
        "_control",
        "_hob",
        "_irq",
        "_present",
        "bus_master",
        "clock",
        "control",
        "data",
        "drives",
        "latched",
        "memory",
        "name",
        "on_data_out",
        "region",
        "selected",
    )

    def __init__(
        self,
        irq: IrqLine,
        clock: Clock,
        drives: tuple[IdeDisk | AtapiDrive | None, IdeDisk | AtapiDrive | None],
        memory: GuestMemory,
        name: str = "ide0",
    ) -> None:
        self.name = name
        self.clock = clock
        self.memory = memory
        self._irq = irq
        self._buffer: PioBuffer | None = None
        self._control = 0
        self._hob = False
        self.latched = False  # the regions answer for the status registers
        self.data = FifoRegion(1, self, self._on_window_end, wide=True, name=f"{name}.data")
        self.region = RegisterRegion(7, self, name=name, capacity=1)
        self.control = RegisterRegion(
            1, self, name=f"{name}.control", read=self.control_read, write=self.control_write, capacity=1
        )
        self.bus_master = BusMaster(self.lock, memory)
        self.on_data_out: Callable[[], object] | None = None
        """Called when the drive asks for data after it was not ready for any; the channel's lock is held."""
        made = [plug(drive) for drive in drives]
        self.drives: tuple[Drive, Drive] = (made[0], made[1])
        self._present = [drive for drive in made if drive.present]
        self.selected: Drive = made[0]
        """The drive whose registers the guest sees."""
        for unit, drive in enumerate(made):
            drive.attach(self, unit)
        self.reset()

    def gather_writes(self) -> None:
        """Before it is mapped: writes to the data port and to the registers before the command's may come late, many at
        once. They do nothing by themselves. Whoever asks for that sees to it that they come.
        """
        self.data.add_coalesced(0, DATA_BYTES)
        self.region.add_coalesced(0, COMMAND)

    # -- the ports -----------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        drive = self.selected
        if offset == STATUS:
            if drive.intrq:
                drive.intrq = False
                self._irq.set(0)
            status = drive.status
            if status & BSY:
                self._latch(status)
            return status
        if offset == ERROR:
            return drive.error
        if self._hob and offset < DEVICE:
            return drive.regs[offset + HOB]
        return drive.regs[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == COMMAND:
            self._command(value)
            return
        if self.selected.status & TAKEN:
            return
        self._hob = False
        if offset == 5:  # DEVICE
            self._select(value)
            return
        for drive in self._present:
            regs = drive.regs
            regs[offset + 8] = regs[offset]
            regs[offset] = value

    def control_read(self, offset: int, size: int) -> int:
        """Alternate status: the status, with no effect on the interrupt."""
        drive = self.selected
        status = drive.status
        if status & BSY and not drive.intrq:
            self._latch(status)
        return status

    def _latch(self, status: int) -> None:
        """The selected drive is busy and no interrupt is pending: it stays so until the backend calls back or a reset
        comes (Activity.came_back, Drive.begin_reset).
        """
        self.latched = True
        self.region.latch(STATUS, status)
        self.control.latch(0, status)

    def unlatch(self) -> None:
        """Something has happened: status reads are Python's again."""
        self.latched = False
        self.region.unlatch(STATUS)
        self.control.unlatch(0)

    def control_write(self, offset: int, size: int, value: int) -> None:
        """Device control."""
        changed = self._control ^ value
        self._control = value
        self._hob = bool(value & CONTROL_HOB)
        if changed & SRST:
            if value & SRST:
                self._begin_reset()
            else:
                self._end_reset()
        if changed & NIEN:
            self.update_irq()

    def _select(self, value: int) -> None:
        drive = self.selected
        for present in self._present:
            present.regs[DEVICE] = value | ALWAYS_ON
        self.selected = self.drives[value >> 4 & 1]
        if self.selected is not drive:
            self.update_irq()
            if self.latched:
                self.unlatch()

    def _command(self, opcode: int) -> None:
        drive = self.selected
        if drive.status & TAKEN:
            if opcode == DEVICE_RESET:
                drive.device_reset()
            return
        if drive.intrq:
            drive.intrq = False
            self._irq.set(0)
        self._hob = False
        drive.execute(opcode)

    def _on_window_end(self) -> None:
        activity = self.selected.activity
        if activity is not None:
            activity.on_end()

    # -- the interrupt -------------------------------------------------------------------------------------------------

    def interrupt(self, drive: DriveSide) -> None:
        """INTRQ of ``drive``: it reaches the line while the drive is selected and interrupts are on."""
        drive.intrq = True
        if drive is self.selected and not self._control & NIEN:
            self.bus_master.status |= BM_INTERRUPT
            self._irq.set(1)

    def update_irq(self) -> None:
        """The line follows the selected drive."""
        level = self.selected.intrq and not self._control & NIEN
        if level:
            self.bus_master.status |= BM_INTERRUPT
        self._irq.set(int(level))

    # -- resets --------------------------------------------------------------------------------------------------------

    @property
    def in_reset(self) -> bool:
        """SRST is set."""
        return bool(self._control & SRST)

    def _begin_reset(self) -> None:
        for drive in self._present:
            drive.begin_reset()
        self.data.close()
        self._select(0)
        self.update_irq()

    def _end_reset(self) -> None:
        for drive in self._present:
            drive.end_reset()

    def diagnose(self) -> None:
        """EXECUTE DEVICE DIAGNOSTIC: both drives carry it out, the first one answers for both (8.9)."""
        for drive in self._present:
            if not drive.resetting:  # else it is about to do the same
                drive.set_signature()
        self._select(0)
        if self.selected.present:
            self.interrupt(self.selected)

    def reset(self) -> None:
        """Power on. Requests that are under way are forgotten: whoever resets the machine drains its backends."""
        with self.lock:
            self._control = 0
            self._hob = False
            self._buffer = None
            for drive in self._present:
                drive.power_on()
            self.data.close()
            self.bus_master.reset()
            self.selected = self.drives[0]
            self._select(0)
            self._irq.set(0)
            self.unlatch()

    # -- for the drives ------------------------------------------------------------------------------------------------

    @property
    def buffer(self) -> PioBuffer:
        """Memory for what goes through the data port: one, because one drive at a time can use that."""
        if self._buffer is None:
            self._buffer = PioBuffer()
        return self._buffer

    def open_write(self, buffer: memoryview | bytearray, start: int, size: int | None = None) -> None:
        """Open the data port for what the guest writes."""
        self.data.open_write(buffer, start, size)
        if self.on_data_out is not None:
            self.on_data_out()

    def forget_buffer(self) -> None:
        """A request is still under way that uses it."""
        self._buffer = None

    # -- state ---------------------------------------------------------------------------------------------------------

    STATE = {"_control": 8, "_hob": "flag", "_selected_unit": 1, "bus_master": "part"}

    @property
    def _selected_unit(self) -> int:
        return self.selected.unit

    @_selected_unit.setter
    def _selected_unit(self, unit: int) -> None:
        self.selected = self.drives[unit]

    def save(self) -> dict[str, Any]:
        with self.lock:
            return {**super().save(), "drives": [drive.save() if drive.present else None for drive in self.drives]}

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import load_fields, part, value_of

        with self.lock:
            load_fields(self, self.STATE, state, ("drives",))
            self._buffer = None
            self.bus_master.transfer = None
            drives = value_of(("list", ("or none", "part"), len(self.drives)), state["drives"], "drives")
            for unit, (drive, saved) in enumerate(zip(self.drives, drives, strict=True)):
                if drive.present != (saved is not None):
                    raise StateError(f"drives[{unit}] is a drive in one of the two machines only")
                if drive.present:
                    part(f"drives[{unit}]", drive, saved)

    def after_load(self) -> None:
        with self.lock:
            self.data.close()
            self._irq.set(int(self.selected.intrq and not self._control & NIEN))
            for drive in self._present:
                drive.after_load()
            self.unlatch()


def plug(device: IdeDisk | AtapiDrive | None) -> Drive:
    """What stands for ``device`` on the channel."""
    if device is None:
        return Drive()
    if isinstance(device, Drive):
        return device
    from pyvmm.devices.ide.packet_drive import PacketDrive

    return PacketDrive(device)
