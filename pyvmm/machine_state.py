"""MachineState: a whole machine as plain data, and a machine that goes on from that. A recipe, as builder.py is one.

    {"format": 1, "machine": {...}, "parts": {name: {"version", "state"}}, "memory": {address: bytes} or None}

``machine`` says what must be the same of the two; ``parts`` are all holders of state (state.py), in their order.
"""

from __future__ import annotations

from time import monotonic_ns

from pyvmm.errors import StateError
from pyvmm.restart import reset
from pyvmm.run_control import PAUSED, RESUMABLE
from pyvmm.run_state import RunState
from pyvmm.state import (
    check_holders,
    check_names,
    load_all,
    load_each,
    load_fields,
    save_all,
    save_fields,
    shown,
    told,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import Any, TypeVar

    from pyvmm.boards.board import Board
    from pyvmm.chassis import Chassis
    from pyvmm.drives import Drives
    from pyvmm.guest_memory import RamRegion
    from pyvmm.platform import Platform
    from pyvmm.run_control import RunControl
    from pyvmm.state import Holder

    Result = TypeVar("Result")

FORMAT = 1
FEW, LONGEST_NAME = 8, 32  # of names in a message


class Run:
    """What the machine itself remembers of its guest."""

    STATE = {"_first_boot": "flag", "_suspended": "flag"}
    STATE_VERSION = 1

    def __init__(self, board: Board, control: RunControl) -> None:
        self._board = board
        self._control = control
        self._first_boot = board.first_boot
        self._suspended = control.suspended

    def save(self) -> dict[str, Any]:
        return save_fields(self, self.STATE)

    def load(self, state: dict[str, Any]) -> None:
        load_fields(self, self.STATE, state)

    def after_load(self) -> None:
        self._board.first_boot = self._first_boot
        self._control.suspended = self._suspended


class MachineState:
    """``save`` and ``load`` are for a machine whose vCPUs stand."""

    def __init__(self, chassis: Chassis, board: Board, platform: Platform) -> None:
        self._chassis = chassis
        self._board = board
        self._platform = platform
        self._hidden = False
        self.stood_ns = 0
        """For how long the machine stood in the last ``while_it_stands``."""

    @property
    def drives(self) -> Drives:
        return self._chassis.drives

    def runs(self) -> bool:
        return self._chassis.control.state is RunState.RUNNING

    def others_write(self) -> bool:
        """Whether memory may be written by another process: a back end's."""
        return bool(self._chassis.back_ends)

    def check_can_be_saved(self) -> None:
        """StateError where that is known not to be so, before anything is written."""
        for back_end in self._chassis.back_ends:
            if (why := back_end.why_not_saved()) is not None:
                raise StateError(why)

    def holders(self) -> list[tuple[str, Holder]]:
        """Guest time first, for all others count from it. Devices before the interrupt controllers, since they drive
        their lines; consoles after those, since input may raise one anew.
        """
        chassis = self._chassis
        return [
            ("clock", chassis.clock),
            ("run", Run(self._board, chassis.control)),
            *self._board.holders(),
            *((f"drive {name}", backend) for name, backend in chassis.drives.backends.items()),
            *self._platform.holders(),
            *((f"console {name}", chardev) for name, chardev in chassis.consoles.by_name.items()),
        ]

    # -- save ----------------------------------------------------------------------------------------------------

    def save(self, *, memory: bool) -> dict[str, Any]:
        """StateError where the machine runs or has ended, and where a part can't be saved."""
        return self.while_it_stands("save_state", lambda: self._save(memory))

    def while_it_stands(
        self,
        call: str,
        work: Callable[[], Result],
        states: Sequence[RunState] = RESUMABLE,
        then: Callable[[], None] | None = None,
    ) -> Result:
        """What ``work`` gives, with every vCPU parked, nothing in flight and all output out; the machine goes on
        afterwards, if it ran, or does what ``then`` says: one of the next three. StateError where it is in none of
        ``states``, or is closed meanwhile.
        """
        outcome: list[tuple[Result | None, BaseException | None]] = []
        control = self._chassis.control

        def request() -> None:
            began_ns = monotonic_ns()
            try:
                if control.state not in states:
                    raise StateError(f"{call}() of a machine in state {control.state}: pause() it first")
                with self._chassis.io_threads.paused:
                    self._chassis.drives.drain()
                    # Or this machine would say the beginning of a line as it is closed, and the other one once more.
                    self._chassis.consoles.flush(saved=True)
                    outcome.append((self._without_breakpoints(work), None))
            except BaseException as error:
                outcome.append((None, error))
            self.stood_ns = monotonic_ns() - began_ns

        control.request(call, request, then or control.carry_on, wait=True)
        if not outcome:
            raise StateError(f"{call}(): the machine was closed meanwhile")
        result, error = outcome[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # where there is no error there is a result

    def carries_on(self) -> None:
        """As before."""
        self._chassis.control.carry_on()

    def ends(self, reason: str) -> None:
        """The guest goes on elsewhere, and never here."""
        self._chassis.power.stop(0, reason)

    def stays(self) -> None:
        """Paused."""
        self._chassis.control.end(RunState.PAUSED, PAUSED)

    def _without_breakpoints(self, work: Callable[[], Result]) -> Result:
        """What a debugger has put into memory is no part of the guest's state."""
        if self._chassis.breakpoints is None:
            return work()
        with self._chassis.breakpoints.lifted:
            return work()

    def _save(self, memory: bool) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "machine": self.description(),
            "parts": save_all(self.holders()),
            "memory": {f"{r.gpa:#x}": bytes(r) for r in self.memory()} if memory else None,
        }

    def ram(self) -> list[RamRegion]:
        """Of that, what is the machine's main memory."""
        return [region for region in self._board.memory.ram if not region.readonly]

    def memory(self) -> list[RamRegion]:
        """All that the guest can write."""
        return [*(r for r in self._board.memory.ram if not r.readonly), *self._board.memory_map.own_memory]

    def description(self) -> dict[str, Any]:
        """What must be the same of two machines for the one to go on where the other stood."""
        from zlib import crc32

        config = self._board.config
        return {
            "board": type(self._board).__name__,
            "cpus": len(self._platform.cpus),
            "irqchip": "kernel" if self._platform.irqchip.in_kernel else "off",
            "cpu": config.cpu,
            "features": self._platform.cpu_features(),
            "memory": [f"{r.size_bytes:#x} bytes at {r.gpa:#x}" for r in self.memory()],
            "ROMs": [f"{crc32(r):#x} at {r.gpa:#x}" for r in self._board.memory.ram if r.readonly],
        }

    def untouched(self) -> list[str]:
        """The parts that nobody has wanted yet, and that are the same in every machine then."""
        return [name for name, holder in self.holders() if is_unmade(holder) and not holder.differs]  # type: ignore[attr-defined]

    # -- load ----------------------------------------------------------------------------------------------------

    def load(self, state: object, passed_ns: int = 0, untouched: Collection[str] = ()) -> None:
        """StateError in one sentence for what can't be taken. Where that was found before anything was changed, the
        machine is as it was; else it has ended, and a reset brings it back to power-on. ``passed_ns``: for the guest so
        much time has passed since the state was saved. ``untouched``: what that says; those are not made for it.
        """
        control = self._chassis.control
        if control.state is not RunState.PRELAUNCH:
            raise StateError(
                f"load_state() of a machine in state {control.state}: make another one, of the same configuration"
            )
        check_names(state, ("format", "machine", "parts", "memory"))
        assert isinstance(state, dict)
        if state["format"] != FORMAT:
            raise StateError(f"the state has format {shown(state['format'])}, this pyvmm reads {FORMAT}")
        surplus = self.check_description(state["machine"])
        holders, parts = self.holders(), state["parts"]
        if isinstance(parts, dict):
            left = {name for name, holder in holders if name in untouched and is_unmade(holder)} & parts.keys()
            if left:
                holders = [(name, holder) for name, holder in holders if name not in left]
                parts = {name: part for name, part in parts.items() if name not in left}
        check_holders(holders, parts)
        memory = self._checked_memory(state["memory"])
        self._chassis.join_background()
        then = control.loaded if self._platform.cpus else None
        control.request("load", lambda: self._load(holders, parts, memory, surplus, passed_ns), then, wait=True)
        if control.state is RunState.INTERNAL_ERROR and control.error is not None:
            raise control.error

    def _load(
        self,
        holders: list[tuple[str, Holder]],
        parts: object,
        memory: list[tuple[RamRegion, Any]],
        surplus: list[str],
        passed_ns: int,
    ) -> None:
        """A request; what it raises ends the machine."""
        with self._chassis.io_threads.paused:
            for region, content in memory:
                memoryview(region)[:] = content
            if self._chassis.breakpoints is not None:
                self._chassis.breakpoints.put_again()
            if surplus:
                self._hidden = True
                self._platform.hide(surplus)
            load_all(holders, parts, lambda: self._pass(passed_ns))

    # -- twins of a machine that has nothing to do but for its guest -------------------------------------------------

    def rests(self) -> bool:
        """Whether that is so of a machine that has been loaded: then another one that goes on from the same state, of
        the same configuration, needs no device before its guest, or anybody else, looks for one (``go_on_late``).
        """
        platform, board = self._platform, self._board
        late = vars(type(board)).get("may_come_late", False)  # its own word: who derives from it may do more
        lines = any(level for _gsi, level, _users in platform.irqchip.wires)
        waits = any(cpu.exec.interrupted for cpu in platform.cpus)
        return late and platform.runs_guests and self._chassis.rests and not (lines or waits or self._hidden)

    def go_on_late(self, parts: dict[str, Any], untouched: Collection[str], *, twin: bool) -> None:
        """As ``load`` of a machine whose board was installed late, where ``rests`` has been true of another one that
        loaded the same, and so without what is ``untouched``: processors and time now, the devices as they come.
        """
        chassis = self._chassis
        load_now: list[tuple[str, Holder]] = [
            ("clock", chassis.clock),
            ("run", Run(self._board, chassis.control)),
            *self._platform.holders(),
        ]
        for name, holder in load_each(load_now, parts):
            told(name, holder.after_load)
        now_ns = chassis.clock.now_ns()
        self._board.after_arrival(lambda: self._load_devices(parts, untouched, now_ns, twin=twin))
        chassis.control.loaded()

    def _load_devices(self, parts: dict[str, Any], untouched: Collection[str], now_ns: int, *, twin: bool) -> None:
        chassis = self._chassis
        holders = [
            *((name, each) for name, each in self._board.holders() if not (name in untouched and is_unmade(each))),
            *((f"console {name}", chardev) for name, chardev in chassis.consoles.by_name.items()),
        ]
        loaded: list[tuple[str, Holder]] = []
        chassis.clock.in_the_past(now_ns, lambda: loaded.extend(load_each(holders, parts)))
        for name, holder in loaded:
            told(name, holder.after_load)
        if twin:
            self._board.new_generation()

    def revert(
        self, state: dict[str, Any], check: Callable[[], None], fill: Callable[[], None], *, twin: bool
    ) -> None:
        """Go back to what was saved of this machine: to power-on, where a new one begins, and on to that; paused then.
        ``check()`` raises before anything is changed, ``fill()`` brings the memory, which ``state`` has not.
        """
        refused: list[BaseException] = []
        control = self._chassis.control

        def request() -> None:
            try:
                surplus = self.check_description(state["machine"])
                holders = self.holders()
                check_holders(holders, state["parts"])
                with self._chassis.io_threads.paused:
                    self._chassis.drives.drain()
                    self._chassis.consoles.flush(saved=True)
                    check()
            except BaseException as error:
                refused.append(error)
                return
            reset(self._chassis, self._board, self._platform)
            fill()
            self._load(holders, state["parts"], [], surplus, 0)
            if twin:
                self._board.new_generation()

        self._chassis.join_background()
        control.request("load", request, lambda: None if refused else control.loaded(), wait=True)
        if refused:
            raise refused[0]

    def _pass(self, ns: int) -> None:
        """All states have been loaded, nothing goes on yet: what is due meanwhile is so at once when it does."""
        if ns:
            clock = self._chassis.clock
            clock.set_time(clock.now_ns() + ns)
            if self._chassis.kvm_clock is not None:
                self._chassis.kvm_clock.pass_time(ns)

    def check_description(self, saved: object) -> list[str]:
        """The features that this machine's processors show, and those of the saved one do not. StateError where this
        one can't go on where that one stood.
        """
        mine = self.description()
        check_names(saved, list(mine))
        assert isinstance(saved, dict)
        features = mine.pop("features")
        for name, value in mine.items():
            if saved[name] != value:
                raise StateError(
                    f"the state is of a machine with {name} {shown(saved[name])}, this one has {shown(value)}:"
                    " give it the same configuration"
                )
        return surplus_features(saved["features"], features)

    def _checked_memory(self, saved: object) -> list[tuple[RamRegion, Any]]:
        """Which region gets which bytes; none where the state was saved without memory."""
        if saved is None:
            return []
        regions = {f"{r.gpa:#x}": r for r in self.memory()}
        check_names(saved, list(regions))
        assert isinstance(saved, dict)
        for name, region in regions.items():
            content = saved[name]
            if not isinstance(content, (bytes, bytearray, memoryview)) or len(content) != region.size_bytes:
                raise StateError(f"memory at {name} is {shown(content)}, not {region.size_bytes} bytes")
        return [(region, saved[name]) for name, region in regions.items()]


def is_unmade(holder: Holder) -> bool:
    """Whether that is a device that nobody has wanted yet (late.py)."""
    return not getattr(holder, "made", True)


def surplus_features(saved: object, mine: list[str]) -> list[str]:
    """A guest has looked at its processor once: it has to find there what it found, and is to find no more. What has to
    be hidden; StateError where something is missing.
    """
    if saved == mine:
        return []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise StateError(f"features is {shown(saved)}, no list of names")
    if missing := sorted(set(saved) - set(mine)):
        few = ", ".join(name[:LONGEST_NAME] for name in missing[:FEW]) + (", ..." if missing[FEW:] else "")
        raise StateError(
            f"the guest has seen features of its processor that there are none of here: {few}: save it from a machine"
            " that hides them (--cpu host,-NAME)"
        )
    return sorted(set(mine) - set(saved))
