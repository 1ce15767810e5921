"""SavingMachine: a machine that becomes plain data or a file, and goes on from it; once, or several times."""

from __future__ import annotations

from posix import fspath

from pyvmm.errors import ConfigError
from pyvmm.machine_running import RunningMachine
from pyvmm.options import is_int
from pyvmm.run_control import ALIVE
from pyvmm.run_state import RunState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike
    from typing import Any, Self

    from typing_extensions import Unpack

    from pyvmm.boards.board import Board
    from pyvmm.config import MachineOptions
    from pyvmm.machine_snapshot import Saved, Way
    from pyvmm.served_memory import ServedMemory
    from pyvmm.snapshot import Snapshot
    from pyvmm.spec import Spec


class SavingMachine(RunningMachine):
    """The calls; machine_state.py, machine_snapshot.py and snapshot.py do the work."""

    def save_state(self, *, memory: bool = True) -> dict[str, Any]:
        """Everything that the guest is in the middle of, as plain data (bytes, numbers, strings, lists, dicts).

        ``load_state`` of another machine, made from the same configuration with the same images, goes on from there;
        this one may be closed, or go on too. ``memory``: with the guest's RAM; without, the caller brings it there. A
        device of your own is in it if it is the board's (``m.board.add(name, device)``); drives' contents are not.

        The machine is paused: StateError while it runs and when it has ended, and for what can't be saved: guests of
        the guest's own, and writes to a drive with snapshot=on.
        """
        return self._all_state("save_state").save(memory=memory)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``save_state`` gave: paused, ``resume`` or ``run`` next. For a machine that has not run yet.

        Guest time goes on from where it stood, as after a pause. StateError, in one sentence, for a state of another
        configuration or version and for a field that can't be; the state may come from anywhere. Where a part of it had
        been loaded by then the machine has ended: reset() it, or make another one.
        """
        self._all_state("load_state").load(state)

    def save(self, path: str | PathLike[str], *, base: Snapshot | None = None) -> Saved:
        """Write a snapshot to the file ``path``: all that ``save_state`` gives, with memory, and what the machine is
        made of. ``Machine.restore`` goes on from there, any number of times. Of a machine that runs most of its memory
        is written while it does (Linux 6.7 or newer, no ``base``); it stands for the rest and then goes on.
        ``Saved`` tells for how long it stood.

        With ``base``, an open Snapshot of the same guest, only what differs from that is written, and the base is
        needed to go on. Nothing is at ``path`` until all of it is on the disk; a snapshot that was there stays whole
        until then. What the guest wrote to its drives is on the disk too, but not in the snapshot.

        StateError for what can't be saved, as from ``save_state``; ConfigError and HostError for a path and a host that
        can't take it.
        """
        from pyvmm.machine_snapshot import save

        state = self._all_state("save")
        with self._chassis.saving:
            saved = save(state, self.config, self._chassis.origin, fspath(path), base)
        self.events.tell("saved", path=fspath(path))
        return saved

    def load(self, path: str | PathLike[str] | Snapshot, *, twin: bool = True) -> None:
        """Go back to a snapshot (``save``) of this machine, or of one of the same configuration; it runs on from there
        if it ran, else it is paused there. The guest is told that it may have been there before, as a ``twin`` of
        itself (devices/vmgenid.py).

        What it wrote to its drives does not go back: StateError where their images are not as they were, and for a
        snapshot of another configuration; then nothing has changed. Where a state turns out to be damaged when a part
        of it has been loaded, the machine has ended, and ``reset`` brings it back to power-on.
        """
        from pyvmm.machine_snapshot import go_back
        from pyvmm.snapshot import Snapshot

        state = self._all_state("load")
        with path.hold() if isinstance(path, Snapshot) else Snapshot(fspath(path)) as origin, self._chassis.saving:
            ran = self.control.state in ALIVE
            self.pause()
            try:
                go_back(state, self.config, origin, twin=twin)
            finally:
                if ran and self.control.state is RunState.PAUSED:
                    self.resume()
            self.events.tell("loaded", path=origin.path)
        if self.control.state is RunState.INTERNAL_ERROR and self.control.error is not None:
            raise self.control.error

    @classmethod
    def restore(
        cls,
        path: str | PathLike[str] | Snapshot,
        *,
        board: type[Board] | None = None,
        prepare: Callable[[Self], object] | None = None,
        twin: bool = True,
        check: bool = False,
        eager: bool = False,
        userfaultfd: bool = False,
        prefetch: bool = False,
        clock: str = "saved",
        **options: Unpack[MachineOptions],
    ) -> Self:
        """The machine of a snapshot, paused where it stood; ``resume`` or ``run`` next.

        Its memory is the file, mapped: pages are read when the guest touches them, and what it writes stays in this
        process. So the time this takes does not depend on how much there is, and machines of one snapshot share it; the
        file must not change as long as one of them lives. ``options`` take the place of those that were saved: consoles
        that were objects have to be given again, drives should be (``drives=``), since the images must be as they were.
        ``prepare`` gets the machine before its state: to add devices of your own that the first one had. The guest is
        told that it is a ``twin`` (devices/vmgenid.py), and its network cards have new MAC addresses, unless it is to
        go on as the very machine that was saved, or ``nets=`` has an address for them.
        A snapshot names the files and consoles that it opens, as a configuration does: look at one that a stranger has
        made (``Snapshot.spec``), or give all of them.

        ``check``: memory is compared with its checksums first, which reads all of it. ``eager``: it is read into memory
        of the machine's own, and the file is not needed afterwards. ``userfaultfd``: it is memory of the machine's own
        too, and what is touched is read then; where that fails the machine ends with an error, and where it is saved or
        forked the rest is read first (served_memory.py; ConfigError where this user may not). ``prefetch``: what the
        saved machine had in use is read, beside the guest. Guest time goes on from where it stood, or with
        ``clock="now"`` from where it would be had the machine run on: by the host's wall clock, for all clocks of the
        guest.

        The cards of one that is no twin tell the network where they are, when it goes on (``Machine.announce_self``).

        ConfigError, StateError and KvmError in one sentence, and then nothing has been started.
        """
        from pyvmm.machine_snapshot import Way, of_twin, restored_spec
        from pyvmm.snapshot import Snapshot

        way = Way(board, prepare, twin=twin, eager=eager, userfaultfd=userfaultfd, prefetch=prefetch, clock=clock)
        with path.hold() if isinstance(path, Snapshot) else Snapshot(fspath(path)) as origin:
            if check:
                origin.check()
            config = restored_spec(origin, options, copied=eager or userfaultfd)
            if twin:
                config = of_twin(config, options)
            self = cls.of_snapshot(origin, config, way)
        # A twin is nobody who has moved: the saved machine may be on the same network, and keeps its address.
        if not twin and self.board.announcer is not None:
            self.board.announcer.announce()
        return self

    @classmethod
    def of_snapshot(cls, origin: Snapshot, config: Spec, way: Way) -> Self:
        """``restore`` with a Spec that is made of the snapshot's already (machine_snapshot.restored_spec)."""
        from pyvmm.machine_state import MachineState

        self = cls.__new__(cls)
        late = way.may_come_late(origin, config)
        served = serve(origin, config) if way.userfaultfd else None
        self._make(config, way.board, None if way.eager else served or origin, fresh=False, late=late)
        try:
            if way.prepare is not None:
                way.prepare(self)
            state = MachineState(self._chassis, self._board, self._platform)
            if served is not None:
                served.begin(state.memory(), self._chassis)
            else:
                origin.fill(state.memory())
            if late:
                state.go_on_late(origin.state["parts"], origin.untouched, twin=way.twin)
            else:
                state.load(origin.state, way.passed_ns(origin), origin.untouched)
                if way.twin:
                    self.board.new_generation()
                way.note(origin, config, rests=state.rests())
            if served is not None:
                served.check()  # a part may have found zeros in the place of its rings
            if way.prefetch:
                control, regions = self.control, state.memory()
                work = (served or origin).read_ahead_beside(regions, lambda: control.state is not RunState.CLOSED)
                self._chassis.in_background(work)
        except BaseException:
            self.close()
            raise
        return self

    @property
    def served_memory(self) -> ServedMemory | None:
        """With ``userfaultfd``: ``faults`` that were served, ``copied_bytes`` of the snapshot, ``zeroed_bytes``."""
        from pyvmm.served_memory import ServedMemory

        origin = self._chassis.origin
        return origin if isinstance(origin, ServedMemory) else None

    def fork(
        self,
        count: int = 1,
        *,
        each: Callable[[int], MachineOptions] | None = None,
        prepare: Callable[[Self], object] | None = None,
        **options: Unpack[MachineOptions],
    ) -> list[Self]:
        """``count`` machines that go on from where this one is, paused; it goes on itself, if it ran.

        It stands for as long as its memory is copied once; from then on all of them have each page once, until one of
        them writes it. They have no console but those given, and nobody at the host's end of their vsock device; they
        may not write to the image of a drive that this one writes to: give ``vsock`` and ``drives``. ``options`` are
        for all, ``each(n)`` gives further ones for one of them; ``prepare`` as with ``restore``. Errors as from
        ``save`` and ``restore``; then there is none of them.
        """
        from pyvmm.machine_snapshot import CollectorWaits, Way, freeze, of_twin, restored_spec, unshared
        from pyvmm.origin import Origin

        if not is_int(count) or count < 1:
            raise ConfigError(f"fork({count!r}): give how many machines, 1 or more")
        state = self._all_state("fork")
        if self._chassis.origin is None:
            self._chassis.origin = self._chassis.closers.add(Origin(None))
        with self._chassis.saving:
            frozen = freeze(state, self.config, self._chassis.origin)
        with frozen, CollectorWaits():
            if count > 1:
                frozen.is_for_many()
            asked: list[tuple[Spec, MachineOptions]] = []
            for n in range(1 if each is None else count):
                own: MachineOptions = {**options, **(each(n) if each else {})}
                asked.append((restored_spec(frozen, {**unshared(self.config, own), **own}), own))
            way = Way(type(self.board), prepare)
            made: list[Self] = []
            try:
                for n in range(count):
                    config, own = asked[0 if each is None else n]
                    made.append(type(self).of_snapshot(frozen, of_twin(config, own), way))
            except BaseException:
                for machine in made:
                    machine.close()
                raise
        return made


def serve(origin: Snapshot, config: Spec) -> ServedMemory:
    """ConfigError where that can't be."""
    from pyvmm.served_memory import ServedMemory, check

    check(config)
    return ServedMemory(origin)
