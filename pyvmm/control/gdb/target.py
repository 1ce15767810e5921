"""Target: a machine as a debugger sees it. Threads, registers, memory, breakpoints, and how it goes on.

Called on the server's thread. What needs parked vCPUs is a StateError while they run.
"""

from __future__ import annotations

from pyvmm.breakpoints import ACCESS, EXECUTION, WRITE, Breakpoints, where
from pyvmm.control.gdb.registers import Registers
from pyvmm.debug_probe import NO_STEP, probe, steps_here
from pyvmm.errors import BusError, ConfigError, StateError
from pyvmm.kvm.vcpu import GUESTDBG_BLOCKIRQ, GUESTDBG_ENABLE, GUESTDBG_SINGLESTEP
from pyvmm.run_control import ALIVE, ENDED
from pyvmm.run_state import RunState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pyvmm.chassis import Chassis
    from pyvmm.cpu import Cpu
    from pyvmm.memory_map import MemoryMap
    from pyvmm.platform import Platform

PAGE_BYTES = 4096
STEP = GUESTDBG_ENABLE | GUESTDBG_SINGLESTEP
# The protocol's numbers for what may be set (Z packets).
SOFTWARE, HARDWARE, WATCH_WRITE, WATCH_READ, WATCH_ACCESS = range(5)
# While a client is there a machine that fails waits for it, too; without one it only waits where a debugger left it.
STOPPED = (RunState.PRELAUNCH, RunState.PAUSED, RunState.DEBUG)
ATTACHED = (*STOPPED, RunState.INTERNAL_ERROR)
# gdb's numbers (include/gdb/signals.def), by what state the machine stands in; as QEMU's gdbstub has them.
SIGNALS = {
    RunState.PRELAUNCH: 5,
    RunState.DEBUG: 5,
    RunState.PAUSED: 2,
    RunState.IO_ERROR: 23,
    RunState.INTERNAL_ERROR: 6,
}
STATUS_KILLED = 0
XCR0, XCR0_AVX = 0, 1 << 2
CPUID_1_ECX_AVX = 1 << 28


class Unsupported(Exception):
    """There is no such thing here: an empty reply, and the debugger goes another way."""


class Unsteppable(ConfigError):
    """A vCPU can't execute a single instruction where it is."""


class Stop:
    """Why the machine stands: ``signal`` is gdb's number, ``cpu`` the vCPU it was, or None; ``kind`` and ``address`` as
    Breakpoints.judge has them. ``status`` instead: its guest has ended, by that.
    """

    __slots__ = ("address", "cpu", "kind", "signal", "status")

    def __init__(
        self, signal: int, cpu: int | None, kind: str = "", address: int = 0, *, status: int | None = None
    ) -> None:
        self.signal = signal
        self.cpu = cpu
        self.kind = kind
        self.address = address
        self.status = status


class Target:
    """``resume(cpus)`` lets these vCPUs go on and all that belongs to them, the others stay; None: all."""

    def __init__(
        self,
        chassis: Chassis,
        platform: Platform,
        memory_map: MemoryMap,
        resume: Callable[[Sequence[Cpu] | None], None],
    ) -> None:
        self._chassis = chassis
        self._control = chassis.control
        self._platform = platform
        self._memory = memory_map
        self._resume = resume
        self._breakpoints: Breakpoints | None = None
        self._wanted = False  # the guest is not to begin without a debugger
        self.cpus: Sequence[Cpu] = platform.cpus
        self.registers = Registers(any(f == 1 and c & CPUID_1_ECX_AVX for f, _, _, _, _, c, _ in self.cpus[0].cpuid))

    # -- coming and going --------------------------------------------------------------------------------------

    def want(self) -> None:
        """Nobody is there yet, and the guest waits for somebody."""
        self._wanted = True
        self._control.hold(STOPPED)

    def attach(self) -> None:
        """The machine stands, until the debugger lets it go on."""
        self._control.hold(ATTACHED, there=True)
        self._control.pause()

    def detach(self) -> None:
        """Without breakpoints, and on it goes."""
        self._without_a_trace()
        self._wanted = False
        self._control.hold(())
        if self._control.state not in ENDED:
            self._resume(None)

    def leave(self) -> None:
        """The debugger is gone without a word: its breakpoints with it, for there is nobody to hear of them. The
        machine is as it was; one that stands waits for another debugger.
        """
        self._without_a_trace()
        self._control.hold(STOPPED)
        if not self._wanted and self._control.state is RunState.PRELAUNCH:
            self._control.hold(())  # it has not begun, and its owner may have it do so
        self.went_on()

    def went_on(self) -> None:
        """With no debugger there: somebody else may have let it go on, and it is theirs again."""
        if self._control.state not in STOPPED:
            self._wanted = False
            self._control.hold(())

    def release(self, server: object) -> None:
        """No debugger can come any more: the machine is its owner's."""
        self._control.hold(())
        if self._chassis.debugger is server:
            self._chassis.debugger = None

    def kill(self) -> None:
        """The end of the guest, as QEMU's: with status 0."""
        self._without_a_trace()
        self._chassis.power.stop(STATUS_KILLED, "killed")

    def _without_a_trace(self) -> None:
        """All that the debugger has set is gone; vCPUs stand meanwhile, whatever the machine does."""
        if self._control.state is not RunState.CLOSED:
            self._control.request("gdb", self._forget, self._control.carry_on, wait=True)

    def _forget(self) -> None:
        if self._breakpoints is not None:
            self._breakpoints.clear()
            for cpu in self.cpus:
                cpu.attach(None)
            self._chassis.breakpoints = self._breakpoints = None
        self.no_steps()

    def no_steps(self) -> None:
        """Whoever lets a vCPU go on lets it run."""
        for cpu in self.cpus:
            cpu.stepping = 0

    # -- running -----------------------------------------------------------------------------------------------

    @property
    def holds_interrupts(self) -> bool:
        """Whether a step can keep interrupts away."""
        return self._debugging().facilities.holds_interrupts

    def resume(self, steps: Mapping[int, bool], hold_interrupts: bool) -> None:
        """Let vCPUs go on, by their index: True by one instruction, False until something stops them. Those that are
        not named stay. StateError where the guest has ended; Unsteppable, and then nobody has gone on.
        """
        if not self.runs and not all(steps_here(self.cpus[n].vcpu) for n, step in steps.items() if step):
            raise Unsteppable(NO_STEP)
        for cpu in self.cpus:
            step = steps.get(cpu.index, False)
            cpu.stepping = (STEP | GUESTDBG_BLOCKIRQ if hold_interrupts else STEP) if step else 0
        only = None if len(steps) == len(self.cpus) else [cpu for cpu in self.cpus if cpu.index in steps]
        self._resume(only)

    def interrupt(self) -> None:
        """Every vCPU stands when it returns."""
        self._control.pause()

    @property
    def runs(self) -> bool:
        return self._control.state in ALIVE

    def stop(self) -> Stop | None:
        """Why it stands; None while it runs, and where it was closed under its guest: that has not exited, and the
        connection ends.
        """
        state, status = self._control.state, self._control.status
        if state in ALIVE or (state is RunState.CLOSED and status is None):
            return None
        if state in (RunState.SHUTDOWN, RunState.CLOSED):
            return Stop(0, None, status=0 if status is None else int(status) & 0xFF)
        index = status.cpu if state is RunState.DEBUG and status is not None else None
        if index is None:
            return Stop(SIGNALS[state], None)
        detail = self.cpus[index].exec.detail
        return Stop(SIGNALS[state], index, str(detail.get("stop", "")), int(detail.get("address", 0)))

    # -- registers ---------------------------------------------------------------------------------------------

    def read_registers(self, index: int) -> list[int]:
        cpu = self._parked(index)
        return self.registers.read(cpu.vcpu)

    def write_registers(self, index: int, changed: dict[int, int]) -> None:
        cpu = self._parked(index)
        self.registers.write(cpu.vcpu, changed)

    def _parked(self, index: int) -> Cpu:
        """KVM would make a caller wait for the next exit of a vCPU that runs, and that may never come."""
        self._standing()
        return self.cpus[index]

    def _standing(self) -> None:
        if self.runs or not all(cpu.parked for cpu in self.cpus):
            raise StateError("the machine runs: interrupt it first")

    # -- memory ------------------------------------------------------------------------------------------------

    def read(self, index: int, address: int, size: int, *, physical: bool) -> bytes:
        """``size`` bytes as the vCPU finds them, or as many as are there. Where a device answers, it is asked."""
        data = b""
        for gpa, n in self._pieces(index, address, size, physical):
            piece = bytearray(self._memory.read(gpa, n))
            if self._breakpoints is not None:
                self._breakpoints.hide(gpa, piece)
            data += piece
        return data

    def write(self, index: int, address: int, data: bytes, *, physical: bool) -> None:
        """To RAM, and to ROM too. Where a device answers nothing is written, but by ``physical`` addresses: as QEMU.

        BusError where not all of it is mapped; nothing is written then.
        """
        pieces = list(self._pieces(index, address, len(data), physical))
        if sum(n for _, n in pieces) < len(data):
            raise BusError(f"{len(data):#x} bytes at {address:#x} are not all mapped")
        done = 0
        for gpa, n in pieces:
            self._write_piece(gpa, bytearray(data[done : done + n]), physical)
            done += n

    def _write_piece(self, gpa: int, piece: bytearray, physical: bool) -> None:
        if self._breakpoints is not None:
            self._breakpoints.keep(gpa, piece)
        while piece:
            place = self._memory.in_memory(gpa, len(piece))
            if place is not None:
                place[:] = piece[: len(place)]
                done = len(place)
            else:
                done = min(len(piece), 8 - gpa % 8)
                if physical:
                    self._memory.write(gpa, bytes(piece[:done]))
            gpa += done
            del piece[:done]

    def _pieces(self, index: int, address: int, size: int, physical: bool) -> Iterator[tuple[int, int]]:
        """Guest-physical address and size of each page's part, up to where nothing is mapped."""
        cpu = self._parked(index)
        while size:
            n = min(size, PAGE_BYTES - address % PAGE_BYTES)
            gpa = address if physical else where(address, cpu.vcpu, self._memory)
            if gpa is None or gpa + n > self._chassis.mmio.size:
                return
            yield gpa, n
            address, size = address + n & 0xFFFF_FFFF_FFFF_FFFF, size - n

    # -- breakpoints -------------------------------------------------------------------------------------------

    def _debugging(self) -> Breakpoints:
        if self._breakpoints is None:
            breakpoints = Breakpoints(self._memory, probe(self._platform.kvm))
            for cpu in self.cpus:
                cpu.attach(breakpoints)
            self._chassis.breakpoints = self._breakpoints = breakpoints
        return self._breakpoints

    def insert(self, index: int, kind: int, address: int, length: int) -> None:
        """One of the protocol's kinds. Where a software breakpoint does not do, because no memory is there yet or KVM
        stops at no byte, it is a hardware one, and the other way round; where neither does, code and data are watched
        by stepping.

        NoMore (of Breakpoints) where all are in use; Unsupported where nothing does; BusError where no memory is.
        """
        cpu = self._parked(index)
        breakpoints = self._debugging()
        before = breakpoints.flags, list(breakpoints.points)
        if kind == SOFTWARE:
            self._first_that_does(
                lambda: breakpoints.add_software(address, cpu),
                lambda: self._add_point(EXECUTION, address, 1),
                lambda: self._stepping(cpu).trap(address),
            )
        elif kind == HARDWARE:
            self._first_that_does(
                lambda: self._add_point(EXECUTION, address, 1),
                lambda: breakpoints.add_software(address, cpu),
                lambda: self._stepping(cpu).trap(address),
            )
        elif kind == WATCH_WRITE:
            self._first_that_does(
                lambda: self._add_point(WRITE, address, length),
                lambda: self._stepping(cpu).watch(address, length),
            )
        elif kind == WATCH_ACCESS and breakpoints.facilities.watchpoints:
            self._add_point(ACCESS, address, length)
        else:
            raise Unsupported
        self._program(before)

    def _stepping(self, cpu: Cpu) -> Breakpoints:
        """For what is looked at after each instruction; from where it stands, all of them are steps."""
        if not steps_here(cpu.vcpu):
            raise Unsteppable(NO_STEP)
        return self._debugging()

    @staticmethod
    def _first_that_does(*ways: Callable[[], None]) -> None:
        """That all are in use (NoMore) is no reason to take another way: it can be helped."""
        for way in ways[:-1]:
            try:
                way()
                return
            except (BusError, StateError):
                continue
        ways[-1]()

    def _add_point(self, kind: int, address: int, length: int) -> None:
        taken = max(len(cpu.breakpoints) for cpu in self.cpus)
        self._debugging().add_point(kind, address, length, taken)

    def remove(self, kind: int, address: int, length: int) -> None:
        """What ``insert`` has set, in whatever way. Nothing where nothing was."""
        self._standing()
        breakpoints = self._debugging()
        before = breakpoints.flags, list(breakpoints.points)
        if kind in (SOFTWARE, HARDWARE):
            if not breakpoints.remove_software(address) and not breakpoints.untrap(address):
                breakpoints.remove_point(EXECUTION, address, 1)
        elif kind == WATCH_WRITE:
            if not breakpoints.remove_point(WRITE, address, length):
                breakpoints.unwatch(address, length)
        elif kind == WATCH_ACCESS:
            breakpoints.remove_point(ACCESS, address, length)
        else:
            raise Unsupported
        self._program(before)

    def remove_all(self) -> None:
        if self._breakpoints:
            self._standing()
            self._breakpoints.clear()
            self._program(None)

    def _program(self, before: object) -> None:
        breakpoints = self._debugging()
        if before != (breakpoints.flags, list(breakpoints.points)):
            for cpu in self.cpus:
                cpu.program()

    # -- what a person asks ------------------------------------------------------------------------------------

    def reset(self) -> None:
        self._chassis.power.reset_now()

    def nmi(self, index: int) -> None:
        self._control.request("nmi", self.cpus[index].vcpu.nmi, self._control.carry_on, wait=True)

    def dump(self) -> str:
        texts: list[str] = []
        self._chassis.outcomes.dump(texts.append, wait=True)
        return "".join(texts)

    def describe(self) -> str:
        """What of debugging this KVM does, in a sentence or two."""
        facilities = self._debugging().facilities
        return facilities.describe()

    def describe_cpu(self, index: int) -> str:
        """A thread's name."""
        halted = self._parked(index).vcpu.mp_state == 3
        return f"CPU#{index} [{'halted' if halted else 'running'}]"
