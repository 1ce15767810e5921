"""Template: a snapshot that is open, and gives machines.

    with pyvmm.Template("warm.snap") as template:
        for job in jobs:
            with template.start(serial=job.hear) as m:
                m.run()

What is the same for all of them is read, checked and put into the kernel's form once.
"""

from __future__ import annotations

import os

from pyvmm.errors import StateError
from pyvmm.machine import Machine
from pyvmm.machine_snapshot import Way, of_twin, restored_spec, unshared
from pyvmm.snapshot import Snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from typing_extensions import Unpack

    from pyvmm.boards.board import Board
    from pyvmm.config import MachineOptions


class Template:
    """``start()`` is a machine that goes on from the snapshot at ``path``, any number of times and from any thread.

    ``options`` are for all of them, the others as with ``Machine.restore``; ``check`` looks at memory once, here. The
    machines have no console but those given, and nobody at the host's end of their vsock device, since only one of them
    could have those of the machine that was saved. Each is told that it is a twin, and its network cards have addresses
    of their own.

    Close it, best by ``with``; its machines live on. ConfigError and StateError in one sentence for a path that can't
    be read, what is no snapshot, and options that can't be.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Snapshot,
        *,
        board: type[Board] | None = None,
        prepare: Callable[[Machine], object] | None = None,
        check: bool = False,
        prefetch: bool = False,
        clock: str = "saved",
        **options: Unpack[MachineOptions],
    ) -> None:
        self._way = Way(board, prepare, prefetch=prefetch, clock=clock)
        self._closed = True  # until there is something to close
        self.snapshot = path.hold() if isinstance(path, Snapshot) else Snapshot(os.fspath(path))
        """Of which the machines are: ``spec`` says what they are made of."""
        self._closed = False
        try:
            if check:
                self.snapshot.check()
            plain = restored_spec(self.snapshot, options)
            self._options: MachineOptions = {**unshared(plain, options), **options}
            self._config = restored_spec(self.snapshot, self._options)
        except BaseException:
            self.close()
            raise

    def start(self, **options: Unpack[MachineOptions]) -> Machine:
        """One more machine, paused where the saved one stood: ``run`` or ``resume`` next. ``options`` are for it alone.

        ConfigError, StateError and KvmError in one sentence, and then there is none. StateError where this is closed.
        """
        with self.snapshot.hold() as origin:
            if self._closed:
                raise StateError(f"the template of {origin.path} is closed: make another one")
            config = restored_spec(origin, {**self._options, **options}) if options else self._config
            if not options and "drives" not in self._options:
                origin.check_drives([drive.name for drive in config.drives])
            return Machine.of_snapshot(origin, of_twin(config, {**self._options, **options}), self._way)

    def close(self) -> None:
        """Give no more machines; those that there are live on. Idempotent."""
        if not self._closed:
            self._closed = True
            self.snapshot.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Template {self.snapshot.path}{', closed' if self._closed else ''}>"
