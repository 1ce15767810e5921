"""RunState: what a machine is doing. An enumeration without enum, whose import takes a tenth of a start."""

from __future__ import annotations

from pyvmm.errors import Brief

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class RunStates(Brief):
    """The type of RunState: a loop over it gives the states."""

    def __iter__(cls) -> Iterator[RunState]:
        return iter(_STATES.values())


class RunState(str, metaclass=RunStates):
    """What a machine is doing; the values are QEMU's names where it has the state.

    ``RunState("paused") is RunState.PAUSED``; ``name`` is "PAUSED", ``value`` "paused".
    """

    PRELAUNCH: RunState
    """Built, and not run yet."""
    RUNNING: RunState
    """vCPUs are in the guest, or on their way."""
    SUSPENDED: RunState
    """The guest has suspended itself to RAM: vCPUs are parked, guest time goes on. An alarm or wakeup() ends it."""
    PAUSED: RunState
    """Every vCPU is parked with its accesses complete; state may be read and changed; resume() goes on."""
    DEBUG: RunState
    """As PAUSED, because a vCPU hit a breakpoint or finished a single step."""
    IO_ERROR: RunState
    """As PAUSED, because a drive's request failed and its policy says to stop; resume() tries it again."""
    SHUTDOWN: RunState
    """The guest ended: power-off, isa-debug-exit, or a reset with no_reboot. reset() makes it runnable again."""
    INTERNAL_ERROR: RunState
    """KVM or a device can't go on; the dump tells. reset() makes it runnable again."""
    CLOSED: RunState
    """Nothing is left of it."""

    __slots__ = ()

    def __new__(cls, value: str) -> RunState:
        try:
            return _STATES[value]
        except KeyError:
            raise ValueError(f"{value!r} is no state of a machine: there are {', '.join(_STATES)}") from None

    @property
    def name(self) -> str:
        return self.upper().replace("-", "_")

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __repr__(self) -> str:
        return f"<RunState.{self.name}: {self.value!r}>"


_STATES: dict[str, RunState] = {}
for _name in RunState.__annotations__:
    _value = _name.lower().replace("_", "-")
    _STATES[_value] = str.__new__(RunState, _value)
    setattr(RunState, _name, _STATES[_value])
