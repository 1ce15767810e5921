"""Where a guest that was suspended to RAM goes on, on a board whose firmware we are: the waking vector in the FACS.

ACPI 6.5, table 5.13 (Firmware_Waking_Vector, X_Firmware_Waking_Vector) and 16.3.2 (waking). The longer vector wins
where it is not zero and is entered in flat 32-bit protected mode, paging and interrupts off; the other one in real
mode, CS:IP being the address in paragraphs and the rest of it. There is no 64-bit environment: the FACS offers none.
"""

from __future__ import annotations

from pyvmm.errors import BusError
from pyvmm.x86 import cpu_state, layout
from pyvmm.x86.cpu_state import BootState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.guest_memory import GuestMemory
    from pyvmm.x86.cpu_state import State

SIGNATURE = b"FACS"
VECTOR = 12
VECTOR_BYTES = 4
X_VECTOR = 24
X_VECTOR_BYTES = 8
FACS_READ_BYTES = 40


class WakingState(BootState):
    """The registers of the first processor at the waking vector: no stack, and no table of descriptors in memory."""

    __slots__ = ()

    def apply(self, regs: State, sregs: State) -> None:
        """As BootState.apply. Data segments begin at 0 (a BIOS leaves them so, and kvm-unit-tests' s3 counts on it)."""
        if self.mode == "real16":
            cpu_state.real_mode(regs, sregs, self.cs, self.rip)
        else:
            cpu_state.protected_mode(regs, sregs, self.rip)
            # The guest owns all memory: there is no place for a table that could be meant by GDTR.
            sregs["gdt"] = {"base": 0, "limit": 0, "padding": [0, 0, 0]}


def waking_state(memory: GuestMemory, facs_gpa: int = layout.FACS) -> WakingState | None:
    """What the FACS says now. None where there is none, or no vector that can be entered in it."""
    try:
        facs = memory.read(facs_gpa, FACS_READ_BYTES)
    except BusError:
        return None
    if not facs.startswith(SIGNATURE):
        return None
    x_vector = int.from_bytes(facs[X_VECTOR : X_VECTOR + X_VECTOR_BYTES], "little")
    if x_vector:
        return WakingState("acpi", "protected32", x_vector) if x_vector < 4 * layout.GIB else None
    vector = int.from_bytes(facs[VECTOR : VECTOR + VECTOR_BYTES], "little")
    if 0 < vector < layout.MIB:
        return WakingState("acpi", "real16", vector & 0xF, cs=vector >> 4)
    return None
