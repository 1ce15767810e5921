"""``while_parked``: what is to be looked at while no vCPU runs."""

from __future__ import annotations

from pyvmm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from pyvmm.control.qmp.subject import Machine

    Result = TypeVar("Result")


def while_parked(machine: Machine, name: str, work: Callable[[], Result]) -> Result:
    """What ``work()`` gives, with every vCPU parked and memory as the guest has it, without a debugger's breakpoints; a
    machine that ran goes on. What it raises comes out here. StateError where the machine is closed meanwhile.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def look() -> None:
        try:
            if machine.breakpoints is None:
                results.append(work())
                return
            with machine.breakpoints.lifted:
                results.append(work())
        except BaseException as error:  # not the machine's: a request that raises ends the run
            errors.append(error)

    machine.control.request(name, look, machine.control.carry_on, wait=True)
    if errors:
        raise errors[0]
    if not results:
        raise StateError(f"{name}: the machine is being closed")
    return results[0]
