"""The machine's run states. RunControl (run_control.py) keeps them; the values are its own names for them."""

from __future__ import annotations

from enum import Enum


class RunState(Enum):
    """What a machine is doing; the values are QEMU's names where it has the state."""

    PRELAUNCH = "prelaunch"
    """Built, and not run yet."""
    RUNNING = "running"
    """vCPUs are in the guest, or on their way."""
    SUSPENDED = "suspended"
    """The guest has suspended itself to RAM: vCPUs are parked, guest time goes on. An alarm or wakeup() ends it."""
    PAUSED = "paused"
    """Every vCPU is parked with its accesses complete; state may be read and changed; resume() goes on."""
    DEBUG = "debug"
    """As PAUSED, because a vCPU hit a breakpoint or finished a single step."""
    IO_ERROR = "io-error"
    """As PAUSED, because a drive's request failed and its policy says to stop; resume() tries it again."""
    SHUTDOWN = "shutdown"
    """The guest ended: power-off, isa-debug-exit, or a reset with no_reboot. reset() makes it runnable again."""
    INTERNAL_ERROR = "internal-error"
    """KVM or a device can't go on; the dump tells. reset() makes it runnable again."""
    CLOSED = "closed"
    """Nothing is left of it."""
