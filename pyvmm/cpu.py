"""Cpu: one vCPU, its loop, and the thread around it."""

from __future__ import annotations

from _weakref import ref
from posix import getpid

from pyvmm.cpu_exec import CpuExec, StopReason
from pyvmm.errors import ConfigError, KindError, KvmError, StateError
from pyvmm.kvm.vcpu import (
    GUESTDBG_BLOCKIRQ,
    GUESTDBG_ENABLE,
    GUESTDBG_SINGLESTEP,
    GUESTDBG_USE_HW_BP,
)
from pyvmm.light import Thread
from pyvmm.run_control import timeout_or_none

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from pyvmm.breakpoints import Breakpoints, Point
    from pyvmm.kvm.system import CpuidEntry
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.light import Condition
    from pyvmm.run_control import ExitStatus, RunControl

# Intel SDM vol. 3, 17.2: four address registers; in DR7 L0 to L3 enable them, and R/W and LEN of 0 mean execution.
BREAKPOINTS = 4
DR7_FIXED = 1 << 10
LENGTHS = {1: 0, 2: 1, 4: 3, 8: 2}  # LEN of DR7, by bytes
EFER_LMA = 1 << 10
STEP = GUESTDBG_ENABLE | GUESTDBG_SINGLESTEP


class Cpu:
    """One vCPU. ``on_stop(cpu, reason, error)`` is called on its thread for every stop but a kick, before it parks."""

    def __init__(
        self,
        index: int,
        vcpu: Vcpu,
        exec_: CpuExec,
        control: RunControl,
        on_stop: Callable[[Cpu, StopReason, BaseException | None], None],
        cpuid: list[CpuidEntry],
    ) -> None:
        self.index = index
        self.vcpu = vcpu
        self.exec = exec_
        self.cpuid = cpuid
        self.parked = True
        self.retired = False
        """Its thread has come to its end with the guest's run."""
        self._control = control
        self._on_stop = on_stop
        self._thread: Thread | None = None
        self._breakpoints: frozenset[int] = frozenset()
        self._debugger: Breakpoints | None = None
        self.stepping = 0
        """KVM_SET_GUEST_DEBUG's flags by which it executes one instruction when it enters the guest; 0: it runs."""
        self.debug_points: list[Point] = []
        """What its debug registers are used for."""
        self._stood_at: int | None = None  # linear address of the last debug stop: the next run gets past it
        self._pid = getpid()

    # -- state, while parked -------------------------------------------------------------------------------

    def _require_parked(self) -> None:
        if getpid() != self._pid:
            raise StateError(f"vCPU {self.index} in a child of fork: the VM is its parent's")
        # Off its thread a running vCPU's state can't be had: KVM would make the caller wait for its next exit.
        if not self.parked and not self.on_own_thread:
            raise StateError(f"vCPU {self.index} is running: pause() the machine first")

    @property
    def regs(self) -> dict[str, int]:
        """General registers, rip and rflags: a copy, and a change in it is no write.

        Assign what is to change: ``cpu.regs = {"rip": 0x1000}``. What is left out stays; ConfigError for a name that
        does not exist. StateError while the vCPU runs.
        """
        self._require_parked()
        return self.vcpu.regs

    @regs.setter
    def regs(self, values: dict[str, int]) -> None:
        self._require_parked()
        self.vcpu.regs = values

    @property
    def sregs(self) -> dict[str, Any]:
        """Segments, descriptor tables and control registers, in KVM's field names: a copy, as ``regs``.

        Parts of parts may be assigned too: ``cpu.sregs = {"cs": {"base": 0}, "cr3": 0x2000}``.
        """
        self._require_parked()
        return self.vcpu.sregs

    @sregs.setter
    def sregs(self, values: dict[str, Any]) -> None:
        self._require_parked()
        self.vcpu.sregs = values

    # -- debugging, while parked ---------------------------------------------------------------------------

    @property
    def breakpoints(self) -> frozenset[int]:
        """Linear addresses of at most four instructions that this vCPU stops before, with status 14.

        Assign a set of them, or ``|=`` one; they stay over a reset. ``run`` and ``resume`` after a stop there get past
        it. While there are any, the guest's own breakpoints do nothing. ConfigError for more than four, StateError
        while the vCPU runs.
        """
        return self._breakpoints

    @breakpoints.setter
    def breakpoints(self, addresses: Iterable[int]) -> None:
        self._require_parked()
        if isinstance(addresses, (str, bytes)) or not hasattr(addresses, "__iter__"):
            raise KindError(f"breakpoints = {addresses!r}: give a set of linear addresses")
        wanted = frozenset(addresses)
        for address in wanted:
            if not isinstance(address, int) or isinstance(address, bool) or not 0 <= address < 1 << 64:
                raise KindError(f"a breakpoint at {address!r}: give a linear address")
        others = 0 if self._debugger is None else len(self._debugger.points)
        if len(wanted) + others > BREAKPOINTS:
            debugger = f", of which a debugger has {others}" if others else ""
            raise ConfigError(f"{len(wanted)} breakpoints: a processor has {BREAKPOINTS}{debugger}, take some away")
        before, self._breakpoints = self._breakpoints, wanted
        try:
            self.program()
        except BaseException:
            self._breakpoints = before
            raise

    def step(self, timeout_s: float | None = None) -> ExitStatus:
        """Execute one instruction, the other vCPUs parked: status 14, or how the guest ended by it.

        Interrupts wait meanwhile, where KVM can hold them back. Raises what ``Machine.run`` does: TimeoutError where
        the vCPU waits for an interrupt, or for its INIT, ``timeout_s`` seconds; StateError while the machine runs.
        """
        limit_s = timeout_or_none(timeout_s)
        self._require_parked()
        self._control.not_from_inside("step")
        if self._control.held:
            raise StateError(f"a debugger has the machine: let it step vCPU {self.index}")
        from pyvmm.debug_probe import NO_STEP, steps_here

        if not steps_here(self.vcpu):
            raise StateError(f"step() of vCPU {self.index}: {NO_STEP}")
        self.stepping = STEP | GUESTDBG_BLOCKIRQ
        try:
            self.start()
            self._control.resume(only=(self,))
            finished = self._control.wait(limit_s)
        except BaseException:
            self._control.pause()
            raise
        else:
            if not finished:
                self._control.pause()
                if self._control.status is None or self._control.status.reason == "paused":
                    raise TimeoutError(f"vCPU {self.index} executed nothing in {timeout_s} s")
        finally:
            self.stepping = 0
        return self._control.outcome()

    def attach(self, debugger: Breakpoints | None) -> None:
        """From now on it stops where ``debugger`` says, beside its own breakpoints. None: no more."""
        self._require_parked()
        self._debugger = debugger
        self.stepping = 0
        self.program()

    def was_reset(self) -> None:
        """It was reset: it stands at its first instruction, where no breakpoint has stopped it yet."""
        self.exec.halted = False
        self._stood_at = None

    def loaded(self, regs: dict[str, int], sregs: dict[str, Any], *, halted: bool) -> None:
        """Its registers are those of a saved state; ``halted``: it waits in HLT for the interrupt controller in Python.
        """
        self.exec.halted = halted
        self._stood_at = None
        self.exec.stands_at(regs, sregs)

    def program(self, *, own: bool = True) -> None:
        """Have KVM stop at the breakpoints, its ``own`` and a debugger's."""
        debugger = self._debugger
        points = [(0, address, 1) for address in sorted(self._breakpoints)] if own else []
        flags = 0 if own else self.stepping
        if debugger is not None:
            points += debugger.points
            flags |= debugger.flags_of(self.index)
        registers, dr7 = [0] * 7, DR7_FIXED
        for n, (kind, address, length) in enumerate(points):
            registers[n] = address
            dr7 |= 1 << 2 * n | kind << 16 + 4 * n | LENGTHS[length] << 18 + 4 * n
        if points:
            flags |= GUESTDBG_USE_HW_BP
        self.vcpu.set_guest_debug(GUESTDBG_ENABLE | flags if flags else 0, [*registers, dr7])
        self.debug_points = points

    def linear_rip(self) -> int:
        """Where its next instruction is, with the base of CS in it."""
        regs, sregs = self.vcpu.regs, self.vcpu.sregs
        if sregs["efer"] & EFER_LMA and sregs["cs"]["l"]:
            return regs["rip"]
        return int(sregs["cs"]["base"] + regs["rip"]) & 0xFFFF_FFFF

    def _run(self) -> StopReason:
        """In the guest until something stops it, on the vCPU's thread."""
        if self._debugger is None and not self.stepping and not self._breakpoints:
            return self.exec.run()
        if self.stepping:
            reason = self._single_step(self.stepping)
        else:
            reason = StopReason.DEBUG
            if self._stood_at in self._breakpoints and self.linear_rip() == self._stood_at:
                # Step over the instruction it stopped at, with no breakpoint set. RF in RFLAGS is meant for that (SDM
                # vol. 3, 17.3.1.1), but KVM's emulator does not heed it.
                reason = self._single_step(STEP | GUESTDBG_BLOCKIRQ)
            if reason is StopReason.DEBUG:
                self._stood_at = None
                reason = self._enter()
        if reason is StopReason.DEBUG:
            self._stood_at = self.linear_rip()
        return reason

    def _enter(self) -> StopReason:
        """In the guest, until something stops it that a debugger does not know better about."""
        debugger = self._debugger
        if debugger is None:
            return self.exec.run()
        if (reason := debugger.begin(self)) is not None:
            return reason
        while (reason := debugger.judge(self, self.exec.run())) is None:
            pass
        return reason

    def _single_step(self, flags: int) -> StopReason:
        """With none of its own breakpoints set; a debugger's are."""
        asked, self.stepping = self.stepping, flags
        try:
            try:
                # Interrupts are held back: else the step could end in the handler of one that arrives just now.
                self.program(own=False)
            except KvmError:
                self.stepping = flags & ~GUESTDBG_BLOCKIRQ  # a kernel before 5.12
                self.program(own=False)
            return self._enter()
        finally:
            self.stepping = asked
            self.program()

    # -- the thread ----------------------------------------------------------------------------------------

    @property
    def on_own_thread(self) -> bool:
        """Whether the caller runs on this vCPU's thread: a device's handler, say."""
        return self._thread is not None and self._thread.is_current

    @property
    def thread_id(self) -> int:
        """The kernel's number of its thread, to pin it or to look at it; 0 until the machine has first run."""
        return 0 if self._thread is None or self.retired else self._thread.native_id

    def start(self) -> None:
        """Start the thread, once a life of the guest; it parks until the machine runs."""
        if self.retired:
            self.join()
            self._thread, self.retired = None, False
        if self._thread is None:
            lock, cond = self._control.parking
            # Nothing in these refers to the Cpu: see main().
            me, index = ref(self), self.index
            self._thread = Thread(lambda: main(me, index, lock, cond))
        try:
            self._thread.start()
        except RuntimeError as error:
            raise StateError(f"vCPU {self.index}: {error}") from None

    def join(self) -> None:
        """Wait for the thread's end; not from the thread itself."""
        if self._thread is not None:
            self._thread.join()

    def _stay(self) -> bool:
        """One stay in the loop, up to the next reason to park. False: the thread is to end."""
        pid = getpid()
        error: BaseException | None = None
        try:
            reason = self._run()
        except BaseException as raised:
            reason, error = StopReason.DEVICE_RAISED, raised
        if getpid() != pid:
            # A handler has forked, and this is the child: all that it has is this thread, and the VM is its parent's.
            if error is not None:
                import traceback

                traceback.print_exception(error)
            return False
        try:
            if reason is not StopReason.KICKED:
                self._tell(reason, error)
        except BaseException as worse:
            self._control.fail(worse)
        finally:
            del error
            self._control.leave(self)
        return True

    def _tell(self, reason: StopReason, error: BaseException | None) -> None:
        try:
            self._on_stop(self, reason, error)
        except BaseException as raised:
            if error is not None:
                raise  # the callback failed too: making the dump, say
            self._on_stop(self, StopReason.DEVICE_RAISED, raised)

    def _thread_failed(self, error: BaseException) -> None:
        # Nobody above could catch it. start() makes another thread.
        self._thread = None
        self._control.fail(error)


def main(me: ref[Cpu], index: int, lock: Any, cond: Condition) -> None:
    """A vCPU's thread.

    While it is parked it holds on to nothing but the lock it waits at: a machine that nobody else refers to can then be
    freed, and ends the thread as it goes (Machine.__del__).
    """
    try:
        CpuExec.prepare_thread(index)
        while (cpu := admitted(me, lock, cond)) is not None:
            Thread.follow_threading()
            if not cpu._stay():
                return
            cpu = None
    except BaseException as error:
        if (cpu := me()) is not None:
            cpu._thread_failed(error)


def admitted(me: ref[Cpu], lock: Any, cond: Condition) -> Cpu | None:
    """Park until it may enter: the vCPU, to run its guest. None: the thread's time is over."""
    with lock:
        while (cpu := me()) is not None:
            admission = cpu._control.admit(cpu)
            if admission is not None:
                return cpu if admission else None
            cpu = None
            cond.wait()
        return None
