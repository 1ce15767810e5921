"""Two recipes: from a machine to a snapshot, and from a snapshot to the Spec of a machine that goes on from it."""

from __future__ import annotations

import gc
import posix
from time import time_ns

from pyvmm.config import INTERNAL
from pyvmm.errors import ConfigError, StateError, VmmError, describe
from pyvmm.run_control import ALIVE, RESUMABLE
from pyvmm.snapshot import Saving, Snapshot, image_identity, sync_image
from pyvmm.snapshot_file import MemoryWriter, SnapshotWriter
from pyvmm.spec import Spec
from pyvmm.state import save_all
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, Protocol

    from typing_extensions import Buffer

    from pyvmm.boards.board import Board
    from pyvmm.config import MachineOptions
    from pyvmm.machine_state import MachineState
    from pyvmm.net.options import NetOptions
    from pyvmm.origin import Origin

    class SpecSource(Protocol):
        """A Snapshot, or what has come of a machine by a stream (migration.py)."""

        path: str
        spec: dict[str, Any]
        @property
        def as_it_was(self) -> Spec | None: ...
        @as_it_was.setter
        def as_it_was(self, spec: Spec) -> None: ...
        @property
        def copies_images(self) -> bool: ...
        @property
        def memory_bytes(self) -> int: ...
        def image(self, name: str) -> Buffer | None: ...
        def image_copy(self, name: str) -> bytes | None: ...
        def check_drives(self, names: Iterable[str]) -> None: ...

STATES = (*RESUMABLE, *ALIVE)  # in which a machine can be saved
CLOCKS = ("saved", "now")  # where a restored machine's go on from
FILES = ("kernel", "initrd", "firmware", "flat")


class Saved:
    """What came of a ``save``: ``written_bytes`` went into the file, and the guest stood for ``stood_ns``."""

    __slots__ = ("stood_ns", "written_bytes")

    def __init__(self, written_bytes: int, stood_ns: int) -> None:
        self.written_bytes = written_bytes
        self.stood_ns = stood_ns

    def __repr__(self) -> str:
        return f"<Saved: {self.written_bytes >> 10} KiB written, the guest stood {self.stood_ns / 1e6:.1f} ms>"


class Way:
    """How a machine comes of a snapshot: Machine.restore has what each of these does."""

    __slots__ = ("board", "clock", "eager", "prefetch", "prepare", "twin", "userfaultfd")

    def __init__(
        self,
        board: type[Board] | None = None,
        prepare: Callable[[Any], object] | None = None,
        *,
        twin: bool = True,
        eager: bool = False,
        userfaultfd: bool = False,
        prefetch: bool = False,
        clock: str = CLOCKS[0],
    ) -> None:
        if eager and userfaultfd:
            raise ConfigError("eager beside userfaultfd: memory is read before or when it is touched, leave one out")
        if clock not in CLOCKS:
            raise ConfigError(f"clock={clock!r}: use {' or '.join(CLOCKS)}")
        self.board = board
        self.prepare = prepare
        self.twin = twin
        self.eager = eager
        self.userfaultfd = userfaultfd
        self.prefetch = prefetch
        self.clock = clock

    def may_come_late(self, origin: Snapshot, config: Spec) -> bool:
        """Whether the devices of a machine that comes this way may be made when somebody looks for them."""
        if origin.at_rest is None or self.userfaultfd:
            return False
        known, *way = origin.at_rest
        return known is config and way == self._which()

    def note(self, origin: Snapshot, config: Spec, *, rests: bool) -> None:
        """A machine has come this way, and ``rests`` (MachineState)."""
        if rests and self.prepare is None and not self.eager and not self.userfaultfd and self.clock == CLOCKS[0]:
            origin.at_rest = config, *self._which()

    def _which(self) -> list[object]:
        """Who has the same comes the same way."""
        return [self.board, self.twin, self.clock, self.eager, self.prepare]

    def passed_ns(self, origin: Snapshot) -> int:
        """How much time has passed for the guest since it was saved. None where the host's clock has gone back."""
        return 0 if self.clock == CLOCKS[0] else max(0, time_ns() - origin.saved_ns)


def save(state: MachineState, config: Spec, origin: Origin | None, path: str, base: Snapshot | None) -> Saved:
    """Machine.save has what it does."""
    from pyvmm.memory_rounds import MemoryWhileItRuns

    check_apart(path, base)
    state.check_can_be_saved()
    images = image_paths(config).values()
    with SnapshotWriter(path) as file:
        saving = Saving(file, snapshot_of(origin), base)
        for image in images:
            sync_image(image)  # most of it while the guest runs
        with MemoryWhileItRuns(saving, state, whole=base is None) as the_rest:

            def stand() -> None:
                the_rest()
                for image in images:
                    sync_image(image)
                take(saving, state, config)

            state.while_it_stands("save", stand, STATES)
        return Saved(saving.commit(), state.stood_ns)


def check_apart(path: str, base: Snapshot | None) -> None:
    """ConfigError where the snapshot at ``path`` is the base, or one of those that it is based on itself: what is based
    on a file can't take its place.
    """
    try:
        there = posix.stat(path)
    except OSError:
        return
    except ValueError:
        raise ConfigError(f"snapshot {path!r}: no file has such a name: give another path") from None
    while base is not None:
        if base.is_file(there):
            raise ConfigError(f"snapshot {path} is the base, or one of its bases: save to another path")
        base = base.base


def go_back(state: MachineState, config: Spec, origin: Snapshot, *, twin: bool) -> None:
    """Machine.load has what it does."""
    images = image_paths(config)

    def check() -> None:
        origin.check_memory(state.memory())
        for image in images.values():
            sync_image(image)
        origin.check_drives(images)

    state.revert(origin.state, check, lambda: origin.read_over(state.memory()), twin=twin)


def freeze(state: MachineState, config: Spec, origin: Origin) -> Snapshot:
    """A snapshot in memory, of which the machine's own memory is a mapping from here on."""
    from pyvmm.memory_rounds import MemoryWhileItRuns

    state.check_can_be_saved()
    with MemoryWriter() as file:
        saving = Saving(file, snapshot_of(origin), None)
        with MemoryWhileItRuns(saving, state) as the_rest:

            def stand() -> Snapshot:
                the_rest()
                take(saving, state, config)
                saving.commit()
                frozen = Snapshot.in_memory(file.committed())
                try:
                    # First: memory that is a mapping of it, in a part of it too, needs its file.
                    origin.take(frozen)
                    frozen.share(state.ram())
                except BaseException:
                    frozen.close()
                    raise
                return frozen

            return state.while_it_stands("fork", stand, STATES)


class CollectorWaits:
    """``with CollectorWaits():`` no collection of garbage: of what many machines are made of none is any, and looking
    at all of it again and again took a third of the time of a hundred of them.
    """

    def __enter__(self) -> None:
        self._ran = gc.isenabled()
        gc.disable()

    def __exit__(self, *exc: object) -> None:
        if self._ran:
            gc.enable()


def snapshot_of(origin: Origin | None) -> Snapshot | None:
    snapshot = origin.snapshot if origin is not None else None
    assert snapshot is None or isinstance(snapshot, Snapshot)
    return snapshot


def take(saving: Saving, state: MachineState, config: Spec) -> None:
    """All of a machine that stands."""
    untouched = state.untouched()  # a save makes them
    saving.take(
        state.memory(),
        state.description(),
        save_all(state.holders()),
        absolute(config.plain()),
        images_of(config),
        [image_identity(name, image) for name, image in image_paths(config).items()],
        untouched,
    )


def image_paths(config: Spec) -> dict[str, str]:
    """The image of each drive that has one, by the drive's name."""
    from pyvmm.block.open import image_path

    return {drive.name: image_path(drive) for drive in config.drives if drive.file is not None}


def images_of(config: Spec) -> dict[str, Buffer]:
    """The images that were given as bytes, by the name of their option."""
    images = {name: getattr(config, name) for name in FILES}
    images |= {f"modules[{n}]": image for n, (image, _line) in enumerate(config.modules)}
    return {name: image for name, image in images.items() if image is not None and not isinstance(image, str)}


def given_images(origin: SpecSource, *, copied: bool) -> dict[str, Any]:
    """The same out of a snapshot, as Spec.from_plain wants them."""

    image: Callable[[str], Buffer | None] = origin.image_copy if copied else origin.image
    given: dict[str, Any] = {name: found for name in FILES if (found := image(name)) is not None}
    modules = origin.spec.get("modules")
    if isinstance(modules, list) and modules:
        given["modules"] = [(image(f"modules[{n}]"), "") for n in range(len(modules))]
    return given


def absolute(spec: dict[str, Any]) -> dict[str, Any]:
    """A plain Spec whose files are found from every folder."""
    import os

    for name in FILES:
        if isinstance(spec[name], str):
            spec[name] = os.path.abspath(spec[name])
    spec["modules"] = [
        [os.path.abspath(image) if isinstance(image, str) else image, line] for image, line in spec["modules"]
    ]
    for drive in spec["drives"]:
        if drive["file"] is not None and os.path.exists(drive["file"]):
            drive["file"] = os.path.abspath(drive["file"])
    return spec


def check_nets(nets: Iterable[NetOptions]) -> None:
    """ConfigError for a card at a descriptor: in this process it may be anything, or that of the machine itself."""
    for net in nets:
        if net.fd is not None:
            raise ConfigError(
                f"{net.id} was at descriptor {net.fd} of the process that saved it: give nets=, with a new end for it"
            )


def is_left(name: str, value: object) -> bool:
    """Whether an option is for the code that makes the machine, or has its default: there is nothing to look at then.
    """
    row = Spec.rows.get(name)
    if row is None:
        return False
    plain = [] if row.default == () else row.default
    return row.kind is INTERNAL or (type(value) is type(plain) and value == plain)


def unshared(config: Spec, given: Mapping[str, Any]) -> MachineOptions:
    """What a copy of a machine has in the place of what only one can have, and nobody has given."""
    own: MachineOptions = {"serial": None, "debugcon": None}
    if config.consoles and "consoles" not in given:
        own["consoles"] = [console.changed(where=None) for console in config.consoles]
    if config.vsock is not None and "vsock" not in given:
        own["vsock"] = config.vsock.changed(path=None)
    return own


def restored_spec(origin: SpecSource, options: Mapping[str, Any], *, copied: bool = False) -> Spec:
    """The Spec that the snapshot has, with ``options`` in the place of what was saved; ``copied``: images that are in
    the file are copied, not mapped.

    ConfigError for options that can't be, or are missing; StateError for a manifest that can't be read.
    """
    if options or copied:
        config = specified(origin, options, copied=copied)
    else:
        config = origin.as_it_was = origin.as_it_was or specified(origin, options, copied=origin.copies_images)
    if "drives" not in options:
        origin.check_drives([drive.name for drive in config.drives])
    return config


def of_twin(config: Spec, options: Mapping[str, Any]) -> Spec:
    """The same Spec for a twin: what tells it from others on a network is its own."""
    if not config.nets:
        return config
    from pyvmm.net.options import twin_macs

    given = Spec.rows["nets"].kind.take("nets", options["nets"]) if "nets" in options else ()
    return config.changed(nets=twin_macs(config.nets, given))


def specified(origin: SpecSource, options: Mapping[str, Any], *, copied: bool) -> Spec:
    for name in options:
        if name not in Spec.rows:
            raise ConfigError(Spec.unknown(name))
    given = {**given_images(origin, copied=copied), **options}
    try:
        saved = {name: value for name, value in origin.spec.items() if name not in options and not is_left(name, value)}
        config = Spec(**{**Spec.unplain(saved, given), **options})
    except VmmError:
        raise
    except Exception as error:  # no Kind expects what a hostile manifest may have
        raise StateError(f"snapshot {origin.path} is damaged: its spec can't be read: {describe(error)}") from None
    if config.memory_mib * layout.MIB != origin.memory_bytes:
        mib = origin.memory_bytes // layout.MIB
        raise StateError(f"snapshot {origin.path} has {mib} MiB of memory: leave memory_mib out")
    if "nets" not in options:
        check_nets(config.nets)
    return config
