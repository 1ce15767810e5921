"""MovingMachine: a machine whose guest goes on in another process."""

from __future__ import annotations

from pyvmm.errors import StateError
from pyvmm.machine_saving import SavingMachine
from pyvmm.run_control import timeout_or_none

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike
    from typing import Any, Self

    from typing_extensions import Unpack

    from pyvmm.boards.board import Board
    from pyvmm.config import MachineOptions
    from pyvmm.migration import Arrival, Departure, Migrated


class MovingMachine(SavingMachine):
    """The calls; migration.py does the work."""

    _departure: Departure | None = None

    def migrate_to(self, address: str | PathLike[str]) -> Migrated:
        """Have the guest go on in another process, which waits for it at ``address``: the path of a Unix socket, or
        tcp:HOST:PORT, where ``Machine.incoming`` or ``pyvmm run --incoming`` listens.

        Most of its memory goes over while it runs; it stands for the rest, and ``Migrated`` tells for how long. This
        machine has ended then, with status 0 and the reason "migrated". Whatever is raised, it goes on here as before,
        also after ``cancel_migration`` from another thread. The one exception: where the connection breaks after the
        other side was told to go on, and before it says that it does, this machine is paused, and HostError says so.

        Its drives' images have to be at the same paths there. StateError for what can't be saved, and where the other
        side refuses: its processors lack a feature, its version is another one.
        """
        from pyvmm.migration import Departure, address_of

        address = address_of(address)
        state = self._all_state("migrate_to")
        with self._chassis.saving:
            self._departure = Departure(state, self.config, self._chassis.origin)
            self.events.tell("migration", state="started", address=address, why="")
            try:
                migrated = self._departure.go(address)
            except BaseException as error:
                self.events.tell("migration", state="failed", address=address, why=str(error))
                raise
            finally:
                self._departure = None
        self.events.tell("migration", state="completed", address=address, why="")
        return migrated

    def cancel_migration(self) -> None:
        """The guest stays here: ``migrate_to`` raises, unless it has gone by then. StateError where none is on its way.
        """
        departure = self._departure
        if departure is None:
            raise StateError("cancel_migration(): no migration is under way")
        departure.cancel()

    @classmethod
    def incoming(
        cls,
        address: str | PathLike[str],
        *,
        timeout_s: float | None = None,
        board: type[Board] | None = None,
        prepare: Callable[[Self], object] | None = None,
        ready: Callable[[str], object] | None = None,
        **options: Unpack[MachineOptions],
    ) -> Self:
        """The machine that ``migrate_to`` sends to ``address``, paused where it stood: ``run`` or ``resume`` at once.

        ``options``, ``board`` and ``prepare`` as with ``restore``. ``ready`` gets the address when somebody can come
        (tcp:HOST:0 is a port that is free). Whoever can connect says what the machine is made of, and so which files
        and consoles it opens here: a Unix socket is for this user alone, and a TCP port for whom you let in.

        TimeoutError where nobody has come within ``timeout_s`` seconds. ConfigError, StateError, HostError and KvmError
        in one sentence; then the guest goes on where it was, and nothing has been started here.
        """
        from pyvmm.migration import Arrival, Listener, address_of
        from pyvmm.migration_stream import MigrationStream

        address = address_of(address)
        limit_s = timeout_or_none(timeout_s)
        with Listener(address) as listener:
            if ready is not None:
                ready(listener.address)
            connection = listener.accept(limit_s)
        with MigrationStream(connection) as stream, stream.told_why():
            arrival = Arrival(stream, address)
            return cls.of_arrival(arrival, board, prepare, options)

    @classmethod
    def of_arrival(
        cls,
        arrival: Arrival,
        board: type[Board] | None,
        prepare: Callable[[Self], object] | None,
        options: Mapping[str, Any],
    ) -> Self:
        """``incoming``, of what has come already."""
        from pyvmm.machine_snapshot import restored_spec

        config = restored_spec(arrival, options)
        self = cls.__new__(cls)
        self._make(config, board, fresh=False, later=True)
        try:
            if prepare is not None:
                prepare(self)
            state = self._all_state("incoming")
            state.check_description(arrival.machine)
            state.load(arrival.receive(state.memory()))
            arrival.take_over(self.drives.claim)
            if self.board.announcer is not None:
                self.board.announcer.announce()
        except BaseException:
            self.close()
            raise
        return self
