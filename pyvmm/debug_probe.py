"""What of guest debugging this KVM carries out, asked of a small guest: KVM_SET_GUEST_DEBUG takes all of it everywhere.

Software KVM runs most of a guest in its instruction emulator, which knows no int3 outside of real mode and looks at no
data breakpoint. QEMU's emulated SVM intercepts no int3 and forgets its guests' debug registers. Hardware has it all.
"""

from __future__ import annotations

from pyvmm.address_space import AddressSpace
from pyvmm.cpu_exec import CpuExec, StopReason
from pyvmm.device import Device
from pyvmm.errors import KvmError
from pyvmm.guest_memory import GuestMemory
from pyvmm.kvm.kind import kvm_kind
from pyvmm.kvm.vcpu import (
    GUESTDBG_BLOCKIRQ,
    GUESTDBG_ENABLE,
    GUESTDBG_SINGLESTEP,
    GUESTDBG_USE_HW_BP,
    GUESTDBG_USE_SW_BP,
)
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.kvm.system import Kvm
    from pyvmm.kvm.vcpu import Vcpu

INT3 = b"\xcc"
# INT1 (SDM vol. 2). KVM's emulator has no code for it in any mode, so it gives up right there (KVM_INTERNAL_ERROR
# suberror 1), with the guest's registers as they were before: as good as a breakpoint.
INT1 = b"\xf1"
EMULATION = 1  # that suberror
USER_MODE = 3  # of SS.DPL, which is the CPL (SDM vol. 3, 5.5)
NO_STEP = "this KVM, in software, can't step user mode: let the guest run on, into its kernel"

# Of the probe's guest: one page of real mode, flat.
CODE, DATA, END = 0x800, 0x900, 0xA00
END_PORT = 0x10
PROGRAM = bytes.fromhex("c606000901 90 e610")  # movb $1, 0x900; nop; out %al, $0x10
AFTER_WRITE = CODE + 5


class Facilities:
    """``byte`` is what a software breakpoint is made of, None where nothing will do. ``breakpoints`` and
    ``watchpoints``: whether the debug registers stop a guest at code and at data. ``steps``: single steps;
    ``holds_interrupts``: with interrupts held back meanwhile.
    """

    __slots__ = ("breakpoints", "byte", "holds_interrupts", "steps", "watchpoints")

    def __init__(
        self, byte: bytes | None, *, breakpoints: bool, watchpoints: bool, steps: bool, holds_interrupts: bool
    ) -> None:
        self.byte = byte
        self.breakpoints = breakpoints
        self.watchpoints = watchpoints
        self.steps = steps
        self.holds_interrupts = holds_interrupts


    def describe(self) -> str:
        """In a sentence."""
        software = {INT3: "int3", INT1: "an instruction that KVM's emulator does not know"}
        fallback = "4" if self.breakpoints else "none"
        otherwise = "the hardware ones" if self.breakpoints else "by stepping (slow)"
        return (
            f"software breakpoints: {software.get(self.byte or b'', otherwise)}; hardware breakpoints: {fallback};"
            f" watchpoints: {'4' if self.watchpoints else 'of writes, by stepping (slow)'};"
            f" steps {'with' if self.holds_interrupts else 'without'} interrupts held back"
        )


class End(Device):
    """Where the probe's guest says that nothing has stopped it."""

    def __init__(self) -> None:
        self.reached: CpuExec | None = None

    def write(self, offset: int, size: int, value: int) -> None:
        if self.reached is not None:
            self.reached.kick()


class Probe:
    """A VM with one vCPU, for as long as it takes to ask: some milliseconds."""

    def __init__(self, kvm: Kvm) -> None:
        self._memory = GuestMemory(layout.PAGE_BYTES)
        self._vm = kvm.create_vm()
        self._vm.set_memory(self._memory)
        self._vm.set_tss_address(layout.KVM_TSS)
        self._vm.set_identity_map_address(layout.KVM_IDENTITY_MAP)
        self._vcpu: Vcpu = self._vm.create_vcpu(0)
        self._vcpu.sregs = {"cs": {"base": 0, "selector": 0}}
        self._end = End()
        self._pio = AddressSpace("pio", 1 << 16)
        self._pio.map(END_PORT, 1, self._end)
        self._exec = CpuExec(self._vcpu, self._pio, AddressSpace("mmio", 1 << 52))
        self._end.reached = self._exec

    def close(self) -> None:
        self._end.reached = None
        self._exec.close()
        self._vcpu.close()
        self._vm.close()
        self._memory.close()

    def stops(self, flags: int, registers: Sequence[int] = (), code: bytes = PROGRAM) -> bool:
        """Whether the guest is stopped before its end."""
        # Every exception's handler is the end, too.
        self._memory.write(0, (END).to_bytes(4, "little") * 256)
        self._memory.write(CODE, code)
        self._memory.write(END, PROGRAM[-2:])
        self._vcpu.regs = {"rip": CODE, "rsp": CODE, "rflags": 2}
        try:
            self._vcpu.set_guest_debug(GUESTDBG_ENABLE | flags, registers)
        except KvmError:
            return False
        reason = self._exec.run()
        if reason is StopReason.INTERNAL_ERROR:
            return bool(self._exec.detail["suberror"] == EMULATION and self._vcpu.regs["rip"] == CODE)
        return reason is StopReason.DEBUG

    def byte(self) -> bytes | None:
        # Only an emulator of KVM's own is asked for the second: QEMU's stops as a whole at a guest's guest's INT1.
        for byte in (INT3, INT1) if "software" in kvm_kind() else (INT3,):
            if self.stops(GUESTDBG_USE_SW_BP, code=byte + PROGRAM[1:]):
                return byte
        return None


def steps_here(vcpu: Vcpu) -> bool:
    """Whether a vCPU can be stepped where it stands. Software KVM runs user mode on the bare processor, and what the
    trap flag does there the guest's kernel has as a #DB of its own: its process would be killed, or all of it by a
    triple fault. Nor do breakpoints stop anybody there.
    """
    return vcpu.sregs["ss"]["dpl"] != USER_MODE or "software" not in kvm_kind()


def probe(kvm: Kvm) -> Facilities:
    """Ask. KvmError where no VM can be had."""
    asked = Probe(kvm)
    try:
        write_of_a_byte = 1 << 16
        return Facilities(
            asked.byte(),
            breakpoints=asked.stops(GUESTDBG_USE_HW_BP, [AFTER_WRITE, 0, 0, 0, 0, 0, 0, 0x401]),
            watchpoints=asked.stops(GUESTDBG_USE_HW_BP, [DATA, 0, 0, 0, 0, 0, 0, 0x401 | write_of_a_byte]),
            steps=asked.stops(GUESTDBG_SINGLESTEP),
            holds_interrupts=asked.stops(GUESTDBG_SINGLESTEP | GUESTDBG_BLOCKIRQ),
        )
    finally:
        asked.close()
