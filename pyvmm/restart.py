"""Restart: everything back to power-on, or out of suspend to RAM, while every vCPU is parked. Two recipes, as
builder.py's is one.
"""

from __future__ import annotations

from pyvmm.errors import DeviceError, describe, traceback_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boards.board import Board
    from pyvmm.chassis import Chassis
    from pyvmm.device import Device
    from pyvmm.platform import Platform


class Restart:
    """``reset`` and ``wake`` are what Power has RunControl carry out."""

    def __init__(self, chassis: Chassis, board: Board, platform: Platform) -> None:
        self._chassis = chassis
        self._board = board
        self._platform = platform

    def reset(self) -> None:
        """Devices, interrupt controllers, memory image and vCPUs back to power-on."""
        board = self._board
        if not board.runs_guests:
            self._chassis.drives.drain()  # else they have come to rest with guest time
        self._chassis.drives.drop_stalled()
        with board.memory_map.held:
            for device in board.all_devices():
                with device.lock:
                    reset_device(device)
            self._platform.reset()
            board.after_reset()
            self._platform.enter(board.load_guest(clean=False))
            board.first_boot = False

    def wake(self, events: int) -> None:
        """As a reset, because processors and chips have been without power. Memory has not: the guest goes on at its
        waking vector. ``events`` are bits of PM1's status.
        """
        board = self._board
        if not self._chassis.control.suspended:
            return
        self._chassis.drives.drop_stalled()
        with board.memory_map.held:
            for device in board.all_devices():
                with device.lock:
                    device.wake()
            self._platform.reset()
            board.after_wake()
            self._platform.enter(board.waking_state())
            board.woken(events)


def reset_device(device: Device) -> None:
    try:
        device.reset()
    except BaseException as error:
        text = f"{type(device).__name__}.reset raised {describe(error)}"
        raise DeviceError(text, f"{text}\n{traceback_text(error)}") from error
