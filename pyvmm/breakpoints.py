"""Breakpoints: what a debugger has set in a machine, and what a vCPU's stop means because of it.

Software ones are a byte in guest memory, in the place of an instruction's first; hardware ones are the four debug
registers, the same in every vCPU; and code and data may be watched without either, by looking after every instruction,
which is slow. What of these works differs from KVM to KVM (debug_probe.py).

All vCPUs are parked when something is set or taken away; ``judge`` is called on a vCPU's own thread.
"""

from __future__ import annotations

from pyvmm.cpu_exec import StopReason
from pyvmm.debug_probe import EMULATION, INT1, Facilities
from pyvmm.errors import BusError, ConfigError, StateError
from pyvmm.kvm.vcpu import GUESTDBG_BLOCKIRQ, GUESTDBG_SINGLESTEP, GUESTDBG_USE_SW_BP
from pyvmm.x86.paging import translate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.memory_map import MemoryMap

    class Loop(Protocol):
        def run(self) -> StopReason: ...
        @property
        def detail(self) -> dict[str, object]: ...

    class Cpu(Protocol):
        """A vCPU (cpu.py), as far as a debugger's stops concern it."""

        index: int

        @property
        def vcpu(self) -> Vcpu: ...
        @property
        def exec(self) -> Loop: ...
        @property
        def debug_points(self) -> list[Point]: ...
        @property
        def stepping(self) -> int: ...
        def linear_rip(self) -> int: ...
        def program(self) -> None: ...

    # Kind, linear address, length in bytes: one debug register.
    Point = tuple[int, int, int]

# R/W of DR7 (Intel SDM vol. 3, 17.2.4).
EXECUTION, WRITE, ACCESS = 0, 1, 3
REGISTERS = 4
# The size of a page, and of what may be watched by stepping.
PAGE_BYTES = 4096
MOST_WATCHED_BYTES = 4096
# Of so many steps that are made to look at something so many let interrupts in, one after the other. With all of them
# let in, a guest whose timer ticks faster than its handler can be stepped through would do nothing else; with none it
# would wait for ever, and a single one may always fall where the guest itself has them off.
STEPS_A_ROUND, STEPS_WITH_INTERRUPTS = 1024, 64
# So many bytes of guest memory may be other ones at a time.
MOST_SOFTWARE = 1024
DEBUG_EXCEPTION, BREAKPOINT_EXCEPTION = 1, 3
DR6_STEP = 1 << 14


class NoMore(ConfigError):
    """All of the processor's debug registers are in use."""


class Patch:
    """One byte of memory that is a breakpoint's now. ``users`` linear addresses lead there; ``there``: it is in place.
    """

    __slots__ = ("original", "there", "users")

    def __init__(self, original: int) -> None:
        self.original = original
        self.users = 0
        self.there = False


class Breakpoints:
    """Of one machine. ``memory`` is what its processors meet, and ``facilities`` what of debugging its KVM does."""

    def __init__(self, memory: MemoryMap, facilities: Facilities) -> None:
        self._memory = memory
        self.facilities = facilities
        self._patches: dict[int, Patch] = {}  # by guest-physical address
        self._software: dict[int, int] = {}  # linear address to guest-physical
        self._points: list[Point] = []
        self._watched: dict[tuple[int, int], dict[int, bytes | None]] = {}  # by range; values by vCPU
        self._traps: set[int] = set()  # linear addresses that are looked for after each step
        self._steps: dict[int, int] = {}  # made to look at something, by vCPU

    # -- what is set -------------------------------------------------------------------------------------------

    @property
    def looks(self) -> bool:
        """Whether every instruction is a step, to look at what it has done."""
        return bool(self._watched or self._traps)

    @property
    def flags(self) -> int:
        """For KVM_SET_GUEST_DEBUG, beside the debug registers'."""
        flags = GUESTDBG_USE_SW_BP if self._software else 0
        if self.looks:
            flags |= GUESTDBG_SINGLESTEP | (GUESTDBG_BLOCKIRQ if self.facilities.holds_interrupts else 0)
        return flags

    def flags_of(self, index: int) -> int:
        """Those of one vCPU, now."""
        lets_in = self._steps.get(index, 0) % STEPS_A_ROUND < STEPS_WITH_INTERRUPTS
        return self.flags & ~GUESTDBG_BLOCKIRQ if lets_in else self.flags

    @property
    def points(self) -> list[Point]:
        """For the debug registers."""
        return self._points

    def __bool__(self) -> bool:
        return bool(self._software or self._points or self.looks)

    def add_software(self, linear: int, cpu: Cpu) -> None:
        """Stop whoever comes to ``linear``, which is an address of ``cpu``. Again is fine.

        BusError where no memory shows there, StateError where this KVM stops at no byte.
        """
        if linear in self._software:
            return
        if self.facilities.byte is None:
            raise StateError("this KVM has no software breakpoints")
        if len(self._software) >= MOST_SOFTWARE:
            raise ConfigError(f"{MOST_SOFTWARE} breakpoints are set: take some away")
        gpa = where(linear, cpu.vcpu, self._memory)
        place = self._memory.in_memory(gpa, 1) if gpa is not None else None
        if gpa is None or place is None:
            raise BusError(f"no memory shows at {linear:#x}")
        patch = self._patches.get(gpa)
        if patch is None:
            patch = self._patches[gpa] = Patch(place[0])
            self._put(place, patch)
        patch.users += 1
        self._software[linear] = gpa

    def remove_software(self, linear: int) -> bool:
        """False where there was none."""
        gpa = self._software.pop(linear, None)
        if gpa is None:
            return False
        patch = self._patches[gpa]
        patch.users -= 1
        if not patch.users:
            self._take_out(gpa, patch)
            del self._patches[gpa]
        return True

    def add_point(self, kind: int, linear: int, length: int, taken: int) -> None:
        """A debug register, or for data as many as it takes, beside ``taken`` that are somebody else's. Again is fine.

        NoMore where there are not enough. StateError where this KVM does not heed them.
        """
        works = self.facilities.breakpoints if kind == EXECUTION else self.facilities.watchpoints
        if not works:
            raise StateError("this KVM does not heed the debug registers")
        new = [point for point in self._split(kind, linear, length) if point not in self._points]
        if len(self._points) + len(new) + taken > REGISTERS:
            raise NoMore(f"a processor has {REGISTERS} hardware breakpoints, and they are in use: take some away")
        self._points += new

    def remove_point(self, kind: int, linear: int, length: int) -> bool:
        gone = [point for point in self._split(kind, linear, length) if point in self._points]
        self._points = [point for point in self._points if point not in gone]
        return bool(gone)

    @staticmethod
    def _split(kind: int, linear: int, length: int) -> list[Point]:
        """Each register has an aligned 1, 2, 4 or 8 bytes (SDM vol. 3, 17.2.5)."""
        if kind == EXECUTION:
            return [(kind, linear, 1)]
        found, end = [], linear + min(length, MOST_WATCHED_BYTES)
        while linear < end:
            size = 8
            while linear % size or linear + size > end:
                size //= 2
            found.append((kind, linear, size))
            linear += size
        return found

    def watch(self, linear: int, length: int) -> None:
        """Stop whoever changes these bytes, by looking at them after each instruction. ConfigError for too many."""
        if not 1 <= length <= MOST_WATCHED_BYTES:
            raise ConfigError(f"{length} bytes to watch: at most {MOST_WATCHED_BYTES} can be watched at a time")
        if len(self._watched) >= REGISTERS and (linear, length) not in self._watched:
            raise NoMore(f"{REGISTERS} ranges are watched: take some away")
        self._watched[linear, length] = {}

    def unwatch(self, linear: int, length: int) -> bool:
        return self._watched.pop((linear, length), None) is not None

    def trap(self, linear: int) -> None:
        """Stop whoever comes to ``linear``, by looking after each instruction. NoMore for too many."""
        if len(self._traps) >= MOST_SOFTWARE:
            raise NoMore(f"{MOST_SOFTWARE} breakpoints are set: take some away")
        self._traps.add(linear)

    def untrap(self, linear: int) -> bool:
        found = linear in self._traps
        self._traps.discard(linear)
        return found

    def clear(self) -> None:
        """Take all of them away."""
        for linear in list(self._software):
            self.remove_software(linear)
        self._points = []
        self._watched.clear()
        self._traps.clear()

    # -- bytes in memory ---------------------------------------------------------------------------------------

    def _put(self, place: memoryview, patch: Patch) -> None:
        assert self.facilities.byte is not None
        place[0] = self.facilities.byte[0]
        patch.there = True

    def _take_out(self, gpa: int, patch: Patch) -> None:
        """Its instruction again, unless something else has been written there since."""
        place = self._memory.in_memory(gpa, 1)
        if patch.there and place is not None and self._is_ours(place[0]):
            place[0] = patch.original
        patch.there = False

    def _is_ours(self, byte: int) -> bool:
        return self.facilities.byte is not None and byte == self.facilities.byte[0]

    @property
    def lifted(self) -> Lifted:
        """``with breakpoints.lifted:`` memory is as the guest has it: for whoever copies it. No vCPU runs."""
        return Lifted(self)

    def lift(self) -> None:
        for gpa, patch in self._patches.items():
            self._take_out(gpa, patch)

    def put_again(self) -> None:
        """After memory was written from outside (a reset, a loaded state): where the same instruction stands, its
        breakpoint too. Where something else stands now, that is left alone.
        """
        for gpa, patch in self._patches.items():
            place = self._memory.in_memory(gpa, 1)
            if place is None:
                patch.there = False
            elif place[0] == patch.original:
                self._put(place, patch)
            elif not self._is_ours(place[0]):
                patch.there = False

    def hide(self, gpa: int, data: bytearray) -> None:
        """Of what was read at ``gpa``: the instructions, and not our bytes."""
        for at, patch in self._within(gpa, len(data)):
            if self._is_ours(data[at]):
                data[at] = patch.original

    def keep(self, gpa: int, data: bytearray) -> None:
        """Of what is to be written at ``gpa``: breakpoints stay, and what stands there in truth is noted."""
        for at, patch in self._within(gpa, len(data)):
            patch.original = data[at]
            if patch.there and self.facilities.byte is not None:
                data[at] = self.facilities.byte[0]

    def _within(self, gpa: int, size: int) -> Iterator[tuple[int, Patch]]:
        for at, patch in list(self._patches.items()):  # somebody else may set one meanwhile
            if gpa <= at < gpa + size:
                yield at - gpa, patch

    # -- a vCPU's stops ----------------------------------------------------------------------------------------

    def begin(self, cpu: Cpu) -> StopReason | None:
        """It is about to enter the guest: what it watches is noted. A reason to stop where it stands already where it
        is to stop, and nobody has had it step away: two may have come there at once, and one was told of.
        """
        for (linear, length), values in self._watched.items():
            values[cpu.index] = self._value(linear, length, cpu)
        if self._traps and not cpu.stepping and (rip := cpu.linear_rip()) in self._traps:
            self._stopped_at(cpu, rip)
            return StopReason.DEBUG
        return None

    @staticmethod
    def _stopped_at(cpu: Cpu, rip: int) -> None:
        """As if KVM had stopped it at a software breakpoint."""
        detail = cpu.exec.detail
        detail.clear()
        detail.update(exit="DEBUG", exception=BREAKPOINT_EXCEPTION, pc=rip, dr6=0, dr7=0, stop="software", address=rip)

    def _value(self, linear: int, length: int, cpu: Cpu) -> bytes | None:
        data = b""
        while length:
            size = min(length, PAGE_BYTES - linear % PAGE_BYTES)
            gpa = where(linear, cpu.vcpu, self._memory)
            place = None if gpa is None else self._memory.in_memory(gpa, size)
            if place is None:
                return None
            data += bytes(place)
            linear, length = linear + len(place), length - len(place)
        return data

    def judge(self, cpu: Cpu, reason: StopReason) -> StopReason | None:
        """What a stop of ``cpu`` is in truth; None: nothing to stop for, enter again.

        ``exec.detail`` then has ``stop`` (software, hardware, write, access or step) and ``address`` besides.
        """
        if reason is StopReason.INTERNAL_ERROR:
            return self._judge_failure(cpu, reason)
        if reason is not StopReason.DEBUG:
            return reason
        detail = cpu.exec.detail
        if detail["exception"] == BREAKPOINT_EXCEPTION:
            return self._judge_int3(cpu, reason)
        dr6 = int(detail["dr6"])  # type: ignore[call-overload]  # numbers, all of that
        for n, (kind, linear, _length) in enumerate(cpu.debug_points):
            if dr6 >> n & 1:
                name = {EXECUTION: "hardware", WRITE: "write", ACCESS: "access"}[kind]
                detail.update(stop=name, address=linear)
                return reason
        if dr6 & DR6_STEP and self.looks:
            return self._judge_step(cpu, reason)
        if cpu.stepping:
            detail.update(stop="step", address=detail["pc"])
            return reason
        if not cpu.debug_points:
            return reason
        self._reflect(cpu, DEBUG_EXCEPTION, dr6)
        return None

    def _judge_step(self, cpu: Cpu, reason: StopReason) -> StopReason | None:
        """A step that was made to look."""
        detail = cpu.exec.detail
        if self._watched and (changed := self._changed(cpu)) is not None:
            detail.update(stop="write", address=changed)
        elif cpu.stepping:
            detail.update(stop="step", address=detail["pc"])
        elif detail["pc"] in self._traps:
            detail.update(stop="software", address=detail["pc"])
        else:
            before = self.flags_of(cpu.index)
            self._steps[cpu.index] = self._steps.get(cpu.index, 0) + 1
            if self.flags_of(cpu.index) != before:
                cpu.program()
            return None
        return reason

    def _judge_failure(self, cpu: Cpu, reason: StopReason) -> StopReason:
        """Software KVM's emulator stops at the byte that it does not know."""
        detail = cpu.exec.detail
        if self.facilities.byte != INT1 or detail["suberror"] != EMULATION or not self._is_at_one(cpu):
            return reason
        # KVM has put #UD in line besides.
        cpu.vcpu.events = {"exception_injected": 0, "exception_pending": 0}
        self._stopped_at(cpu, cpu.linear_rip())
        return StopReason.DEBUG

    def _judge_int3(self, cpu: Cpu, reason: StopReason) -> StopReason | None:
        """KVM stops at the guest's own int3 too: the guest's handler is to have that (kprobes, code patching)."""
        if self._is_at_one(cpu):
            rip = cpu.linear_rip()
            cpu.exec.detail.update(stop="software", address=rip)
            return reason
        gpa = where(cpu.linear_rip(), cpu.vcpu, self._memory)
        place = None if gpa is None else self._memory.in_memory(gpa, 1)
        # One that has been taken away meanwhile is just executed again.
        if place is None or place[0] == 0xCC:
            self._reflect(cpu, BREAKPOINT_EXCEPTION, 0)
        return None

    def _is_at_one(self, cpu: Cpu) -> bool:
        rip = cpu.linear_rip()
        if rip in self._software:
            return True
        # The same byte may have another linear address too.
        return where(rip, cpu.vcpu, self._memory) in self._patches

    @staticmethod
    def _reflect(cpu: Cpu, exception: int, dr6: int) -> None:
        """The guest gets the exception that it would have had without us."""
        if exception == DEBUG_EXCEPTION:
            cpu.vcpu.debugregs = {"dr6": dr6}
        cpu.vcpu.events = {"exception_injected": 1, "exception_nr": exception, "exception_has_error_code": 0}

    def _changed(self, cpu: Cpu) -> int | None:
        """The address of a watched range that is not as it was."""
        found = None
        for (linear, length), values in self._watched.items():
            value = self._value(linear, length, cpu)
            if value != values.get(cpu.index):
                values[cpu.index] = value
                found = linear
        return found


class Lifted:
    """Breakpoints.lifted."""

    def __init__(self, breakpoints: Breakpoints) -> None:
        self._breakpoints = breakpoints

    def __enter__(self) -> None:
        self._breakpoints.lift()

    def __exit__(self, *exc: object) -> None:
        self._breakpoints.put_again()


def where(linear: int, vcpu: Vcpu, memory: MemoryMap) -> int | None:
    """Guest-physical, by the page tables of ``vcpu``; None where nothing is mapped, or the tables are nowhere."""

    def entry(gpa: int, size: int) -> bytes:
        place = memory.in_memory(gpa, size)
        if place is None or len(place) < size:
            raise BusError(f"no memory shows at {gpa:#x}")
        return bytes(place)

    try:
        return translate(linear, vcpu.sregs, entry)
    except BusError:
        return None
