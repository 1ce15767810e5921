"""Everything back to power-on, or out of suspend to RAM. Two recipes, as builder.py's is one: what Power has RunControl
carry out, while every vCPU is parked.
"""

from __future__ import annotations

from pyvmm.errors import DeviceError, describe, traceback_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boards.board import Board
    from pyvmm.chassis import Chassis
    from pyvmm.device import Device
    from pyvmm.platform import Platform


def reset(chassis: Chassis, board: Board, platform: Platform) -> None:
    """Devices, interrupt controllers, memory image and vCPUs back to power-on."""
    with chassis.io_threads.paused, board.memory_map.held, board.pio.held, board.mmio.held:
        # They came to rest with guest time, but somebody may have driven them from outside since.
        chassis.drives.drain()
        chassis.drives.drop_stalled()
        for device in board.all_devices():
            with device.lock:
                reset_device(device)
        platform.reset()
        board.after_reset()
        platform.enter(board.load_guest(clean=False))
        board.first_boot = False
        if chassis.breakpoints is not None:
            chassis.breakpoints.put_again()


def wake(chassis: Chassis, board: Board, platform: Platform, events: int) -> None:
    """As a reset, because processors and chips have been without power. Memory has not: the guest goes on at its waking
    vector. ``events`` are bits of PM1's status.
    """
    if not chassis.control.suspended:
        return
    chassis.drives.drop_stalled()
    with chassis.io_threads.paused, board.memory_map.held, board.pio.held, board.mmio.held:
        for device in board.all_devices():
            with device.lock:
                device.wake()
        platform.reset()
        board.after_wake()
        platform.enter(board.waking_state())
        board.woken(events)


def reset_device(device: Device) -> None:
    try:
        device.reset()
    except BaseException as error:
        text = f"{type(device).__name__}.reset raised {describe(error)}"
        raise DeviceError(text, f"{text}\n{traceback_text(error)}") from error
