"""Snapshot: a machine in a file. ``save`` writes one; an open Snapshot has what another machine goes on from.

The manifest (snapshot_file.py has the file around it):

    {"pyvmm": its version, "id": 16 bytes, "saved_ns": wall clock,
     "spec": Spec.plain(), "machine": MachineState.description(), "parts": MachineState.parts(),
     "memory": [{"gpa", "size", "offset", "runs"}], "base": None or {"id", "path"},
     "images": {option: {"offset", "size"}}, "drives": [{"name", "path", "size", "mtime_ns"}]}

A piece of memory stands in the file from ``offset`` on, byte for byte. With a base it holds only the pages that differ
from the base's piece: ``runs`` has (offset in the piece, size, offset in the file) of each. Images that the machine was
given as bytes, and that a reset loads again, are in the file too; the spec names those that are files.
"""

from __future__ import annotations

import os
import sys
from time import time_ns

from pyvmm.errors import ConfigError, HostError, StateError
from pyvmm.guest_memory import GPA_END, PAGE_BYTES, RAM_HIGH, RamRegion
from pyvmm.light import Lock
from pyvmm.machine_state import FORMAT
from pyvmm.memory_pages import data_runs, touched_runs
from pyvmm.origin import Origin
from pyvmm.snapshot_file import SnapshotFile, Writer, file_data
from pyvmm.state import check_names, known, shown, value_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any, Self

    from typing_extensions import Buffer

    from pyvmm.spec import Spec

    Run = tuple[int, int]  # offset and size, in whole pages

ID_BYTES = 16
NAMES = ("pyvmm", "id", "saved_ns", "spec", "machine", "parts", "memory", "base", "images", "drives")
# As many runs of a difference are mapped one by one; each is a mapping of the process, which may have 65,530.
MAPPED_RUNS = 1024
LONGEST_CHAIN = 32
MOST_IMAGES = 1024
ENTRY_BYTES = 8  # of /proc/self/pagemap, a page each
PAGEMAP_BYTES = 1 << 20


# -- a machine's memory ------------------------------------------------------------------------------------------------


class Piece:
    """A piece of memory in a snapshot: ``size`` bytes that stand at ``gpa`` in the guest."""

    def __init__(self, file: SnapshotFile, entry: object, base: Piece | None) -> None:
        check_names(entry, ("gpa", "size", "offset", "runs"))
        assert isinstance(entry, dict)
        self.file = file
        self.base = base
        self.gpa = pages(entry["gpa"], "gpa", 0)
        self.size = pages(entry["size"], "size", PAGE_BYTES)
        self.offset = 0
        self.runs: list[tuple[int, int, int]] = []
        if base is None:
            self.offset = file.check_range(entry["offset"], self.size)
        else:
            self.runs = [self._checked_run(run) for run in listed(entry["runs"], "runs")]
            if (base.gpa, base.size) != (self.gpa, self.size):
                raise StateError(f"snapshot {file.path} is damaged: it has other memory than its base")

    def _checked_run(self, run: object) -> tuple[int, int, int]:
        start, size, offset = value_of(("list", 63, 3), run, "run")
        pages(start, "run", 0)
        pages(size, "run", PAGE_BYTES)
        if start + size > self.size:
            raise StateError(f"snapshot {self.file.path} is damaged: a run leaves its memory")
        return start, size, self.file.check_range(offset, size)

    @property
    def source(self) -> tuple[int, int]:
        """Descriptor and offset of what is mapped first; ``complete`` does the rest."""
        return (self.file.fd, self.offset) if self.base is None else self.base.source

    def complete(self, region: RamRegion) -> None:
        """Into a region that has ``source`` already: what differs from the base."""
        if self.base is None:
            return
        self.base.complete(region)
        for start, size, offset in self.runs[:MAPPED_RUNS]:
            region.overlay(start, size, (self.file.fd, offset))
        view = memoryview(region)
        for start, size, offset in self.runs[MAPPED_RUNS:]:
            read_into(self.file, view[start : start + size], offset)

    def map(self) -> RamRegion:
        """A mapping of its own."""
        region = RamRegion(self.gpa, self.size, name="snapshot", source=self.source)
        self.complete(region)
        return region

    def data(self) -> list[Run]:
        """Where something may be that is not zero."""
        if self.base is not None:
            return joined([*self.base.data(), *((start, size) for start, size, _ in self.runs)])
        return [(at - self.offset, size) for at, size in self.file.data(self.offset, self.size)]


def whole_pages(size: int) -> int:
    return (size + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


def pages(value: object, name: str, smallest: int) -> int:
    """A hostile number that has to be whole pages inside of a guest's address space."""
    number: int = value_of(63, value, name)
    if number % PAGE_BYTES or not smallest <= number <= GPA_END:
        raise StateError(f"{name} is {number:#x}, no whole pages")
    return number


def listed(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise StateError(f"{name} is {shown(value)}, no list")
    return value


def read_into(file: SnapshotFile, view: memoryview, offset: int) -> None:
    done = 0
    while done < view.nbytes:
        try:
            got = os.preadv(file.fd, [view[done:]], offset + done)
        except OSError as error:
            raise HostError(f"snapshot {file.path}: {error.strerror}") from None
        if not got:
            raise StateError(f"snapshot {file.path} is damaged: it was cut off")
        done += got


def joined(runs: Iterable[Run]) -> list[Run]:
    """In order, those that touch or overlap as one."""
    found: list[Run] = []
    for start, size in sorted(runs):
        if found and start <= found[-1][0] + found[-1][1]:
            first = found[-1][0]
            found[-1] = first, max(found[-1][1], start + size - first)
        else:
            found.append((start, size))
    return found


def touched(region: RamRegion, *, written_only: bool) -> list[Run]:
    """What the process has touched of a region; all of it where the kernel does not tell."""
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return [(0, region.size_bytes)]
    runs: list[Run] = []
    try:
        first, count = region.host_address // PAGE_BYTES, region.size_bytes // PAGE_BYTES
        step = PAGEMAP_BYTES // ENTRY_BYTES
        for at in range(0, count, step):
            entries = os.pread(fd, min(step, count - at) * ENTRY_BYTES, (first + at) * ENTRY_BYTES)
            if len(entries) < min(step, count - at) * ENTRY_BYTES:
                return [(0, region.size_bytes)]
            runs += [(at * PAGE_BYTES + start, size) for start, size in touched_runs(entries, written_only)]
    finally:
        os.close(fd)
    return runs


def candidates(region: RamRegion, origin: Piece | None, base: Piece | None) -> list[Run]:
    """Where the region may hold something that has to be written: what is no zero, or with ``base`` no page of its.

    ``origin`` is where its memory came from, if it came from a snapshot.
    """
    if region.fd >= 0:
        mine = file_data(region.fd, 0, region.size_bytes)
    elif origin is None:
        mine = touched(region, written_only=False)
    else:
        mine = touched(region, written_only=True)
        if base is not None and base.file is origin.file:
            return mine
        mine = [*mine, *origin.data()]
    return joined([*mine, *(base.data() if base is not None else ())])


def write_piece(file: Writer, region: RamRegion, origin: Piece | None, base: Piece | None) -> dict[str, Any]:
    """The entry of one region, whose pages are in the file then."""
    runs: list[list[int]] = []
    offset = file.reserve(region.size_bytes) if base is None else 0
    before = base.map() if base is not None else None
    for at, size in candidates(region, origin, base):
        for start, length in data_runs(region, before, at, size):
            place = offset + start if base is None else file.reserve(length)
            with memoryview(region)[start : start + length] as view:
                file.write(place, view)
            if base is not None:
                runs.append([start, length, place])
    return {"gpa": region.gpa, "size": region.size_bytes, "offset": offset, "runs": runs}


# -- writing a snapshot ------------------------------------------------------------------------------------------------


class Saving:
    """One snapshot in the making. ``take`` while the machine stands, then ``commit``, while it may go on.

    Where there is no base its memory can be written before: ``write_memory`` while the machine runs, then ``rewrite``
    what has been written since, at last while it stands.
    """

    def __init__(self, file: Writer, origin: Snapshot | None, base: Snapshot | None) -> None:
        self._origin = origin
        self._base = base
        self._file = file
        self._pieces: dict[int, dict[str, Any]] = {}  # by gpa
        self._manifest: dict[str, Any] = {}
        self.id = os.urandom(ID_BYTES)

    def write_memory(self, regions: Sequence[RamRegion]) -> None:
        for region in regions:
            origin, base = piece_of(self._origin, region), piece_of(self._base, region)
            self._pieces[region.gpa] = write_piece(self._file, region, origin, base)

    def rewrite(self, region: RamRegion, runs: Iterable[Run]) -> int:
        """These pages of a memory that stands in the file already: how many bytes they are."""
        offset: int = self._pieces[region.gpa]["offset"]
        written_bytes = 0
        with memoryview(region) as memory:
            for start, size in runs:
                with memory[start : start + size] as view:
                    self._file.write(offset + start, view)
                written_bytes += size
        return written_bytes

    def take(
        self, regions: Sequence[RamRegion], machine: dict[str, Any], parts: dict[str, Any], spec: dict[str, Any],
        images: Mapping[str, Buffer], drives: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        """All of a machine that stands."""
        base = self._base
        if base is not None and base.machine != machine:
            raise StateError(f"snapshot {base.path} is of another machine: save without it as the base")
        if not self._pieces:
            self.write_memory(regions)
        self._manifest = {
            "pyvmm": version(),
            "id": self.id,
            "saved_ns": time_ns(),
            "spec": spec,
            "machine": machine,
            "parts": parts,
            "memory": [self._pieces[region.gpa] for region in regions],
            "base": None if base is None else {"id": base.id, "path": os.path.abspath(base.path)},
            "images": {name: self._image(memoryview(image).cast("B")) for name, image in images.items()},
            "drives": drives,
        }

    def _image(self, image: memoryview) -> dict[str, int]:
        offset = self._file.reserve(image.nbytes)
        self._file.write(offset, image)
        return {"offset": offset, "size": image.nbytes}

    def commit(self) -> int:
        """It is on the disk, whole: how many bytes were written."""
        self._file.commit(self._manifest)
        return self._file.written_bytes


def piece_of(snapshot: Snapshot | None, region: RamRegion) -> Piece | None:
    return None if snapshot is None else snapshot.pieces.get(region.gpa)


def version() -> str:
    """pyvmm's: the package imports all of us, so it is there."""
    return str(vars(sys.modules["pyvmm"])["__version__"])


# -- reading one -------------------------------------------------------------------------------------------------------


class Snapshot:
    """An open snapshot, with those that it is based on. Many machines may come from it, one after the other or at once;
    each holds it, and the file is closed when the last of them and whoever opened it have called ``close``.

    ``spec`` is Spec.plain()'s data, ``machine`` and ``parts`` are MachineState's; ``pieces`` the memory by its address.
    ConfigError for a path that can't be read, StateError for what is no snapshot, or damaged.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, _file: SnapshotFile | None = None, _above: Sequence[bytes] = ()
    ) -> None:
        self.path = path = os.fspath(path)
        self._lock = Lock()
        self._holders = 1
        self._state: dict[str, Any] | None = None
        self.as_it_was: Spec | None = None
        """The Spec of a machine for which nothing is given anew, once there has been one."""
        self._file = SnapshotFile(path) if _file is None else _file
        self.base: Snapshot | None = None
        try:
            self._take(self._file.manifest, _above)
        except StateError as error:
            self.close()
            raise damaged(path, error) from None
        except BaseException:
            self.close()
            raise

    @classmethod
    def in_memory(cls, file: SnapshotFile) -> Snapshot:
        """Of a MemoryWriter's file, which belongs to it from here on."""
        return cls(file.path, _file=file)

    def _take(self, manifest: dict[str, Any], above: Sequence[bytes]) -> None:
        check_names(manifest, NAMES)
        self.id: bytes = value_of(("bytes", ID_BYTES), manifest["id"], "id")
        self.saved_ns: int = value_of(63, manifest["saved_ns"], "saved_ns")
        self.version = text(manifest["pyvmm"], "pyvmm")
        for name in ("spec", "machine", "parts"):
            if not isinstance(manifest[name], dict):
                raise StateError(f"{name} is {shown(manifest[name])}, no dict")
        self.spec: dict[str, Any] = manifest["spec"]
        self.machine: dict[str, Any] = manifest["machine"]
        self.parts: dict[str, Any] = manifest["parts"]
        self.drives = [checked_drive(entry) for entry in listed(manifest["drives"], "drives")]
        self._images = {name: self._checked_image(name, entry) for name, entry in checked_images(manifest).items()}
        if manifest["base"] is not None:
            self._open_base(manifest["base"], [*above, self.id])
        self.pieces: dict[int, Piece] = {}
        for entry in listed(manifest["memory"], "memory"):
            gpa = entry.get("gpa") if isinstance(entry, dict) else None
            base = self.base.pieces.get(gpa) if self.base is not None and isinstance(gpa, int) else None
            if self.base is not None and base is None:
                raise StateError("it has memory that its base has not")
            piece = Piece(self._file, entry, base)
            if piece.gpa in self.pieces:
                raise StateError(f"it has memory at {piece.gpa:#x} twice")
            self.pieces[piece.gpa] = piece

    def _checked_image(self, name: str, entry: object) -> tuple[int, int]:
        check_names(entry, ("offset", "size"))
        assert isinstance(entry, dict)
        size: int = value_of(range(1, GPA_END), entry["size"], f"images.{name}.size")
        return self._file.check_range(entry["offset"], whole_pages(size)), size

    def image(self, name: str) -> Buffer | None:
        """The image that the machine was given as bytes for an option, or one of several: ``modules[0]``; mapped."""
        if name not in self._images:
            return None
        offset, size = self._images[name]
        region = RamRegion(0, whole_pages(size), name=name, source=(self._file.fd, offset))
        return memoryview(region)[:size].toreadonly()

    def _open_base(self, entry: object, above: Sequence[bytes]) -> None:
        """The base, where it was when this was written, or else beside this one."""
        check_names(entry, ("id", "path"))
        assert isinstance(entry, dict)
        wanted = value_of(("bytes", ID_BYTES), entry["id"], "id")
        if wanted in above or len(above) > LONGEST_CHAIN:
            raise StateError("its bases go round in a circle, or too deep")
        path = text(entry["path"], "path")
        beside = os.path.join(os.path.dirname(self.path), os.path.basename(path))
        place = path if os.path.exists(path) else beside
        self.base = Snapshot(place, _above=above)
        if self.base.id != wanted:
            raise StateError(f"its base {place} is another one than when it was saved")

    @property
    def state(self) -> dict[str, Any]:
        """For MachineState.load: all but the memory. From the second machine on that which remembers what it is."""
        if self._state is None:
            self._state = {"format": FORMAT, "machine": self.machine, "parts": self.parts, "memory": None}
        elif self._state["parts"] is self.parts:
            self._state["parts"] = known(self.parts)
        return self._state

    def origin(self) -> Origin:
        """For a machine whose memory is a mapping of it."""
        return Origin(self)

    def sources(self) -> dict[int, tuple[int, int]]:
        """By address, from where GuestMemory is to be mapped."""
        return {gpa: piece.source for gpa, piece in self.pieces.items()}

    @property
    def memory_bytes(self) -> int:
        """The guest's RAM."""
        return sum(self.pieces[gpa].size for gpa in (0, RAM_HIGH) if gpa in self.pieces)

    def fill(self, regions: Sequence[RamRegion]) -> None:
        """What of the memory is not there by ``sources``. StateError where the two are not the same memory."""
        if sorted((r.gpa, r.size_bytes) for r in regions) != sorted((p.gpa, p.size) for p in self.pieces.values()):
            raise damaged(self.path, StateError("its memory is not that of its machine"))
        for region in regions:
            piece = self.pieces[region.gpa]
            if region.from_file:
                piece.complete(region)
            else:
                memoryview(region)[:] = memoryview(piece.map())

    def share(self, regions: Sequence[RamRegion]) -> None:
        """The memory that it was taken of is a private mapping of it from here on: both have each page once, until it
        is written. Nothing may use the memory meanwhile.
        """
        for region in regions:
            if region.fd < 0:
                region.overlay(0, region.size_bytes, self.pieces[region.gpa].source)

    def check_drives(self, names: Iterable[str]) -> None:
        """StateError where the image of one of these is not what it was when this was saved."""
        for drive in self.drives:
            if drive["name"] in names:
                check_image(drive)

    def is_file(self, status: os.stat_result) -> bool:
        """Whether that is the file's. StateError where it is closed."""
        if not self._holders:
            raise StateError(f"snapshot {self.path} is closed: open it again")
        return os.path.samestat(os.fstat(self._file.fd), status)

    def hold(self) -> Self:
        """One more who will call ``close``. StateError where it is closed."""
        with self._lock:
            if not self._holders:
                raise StateError(f"snapshot {self.path} is closed: open it again")
            self._holders += 1
        return self

    def close(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders:
                return
        self.abandon()

    def abandon(self) -> None:
        """In a child of fork: its copies of the descriptors, whoever else holds it. Takes no lock."""
        self._holders = 0
        self.as_it_was = self._state = None
        self._file.close()
        if self.base is not None:
            self.base.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def checked_images(manifest: dict[str, Any]) -> dict[str, object]:
    images = manifest["images"]
    if not isinstance(images, dict) or len(images) > MOST_IMAGES:
        raise StateError(f"images is {shown(images)}, no dict of {MOST_IMAGES} at most")
    return images


def text(value: object, name: str) -> str:
    if not isinstance(value, str) or "\0" in value or len(value) > PAGE_BYTES:
        raise StateError(f"{name} is {shown(value)}, no text")
    return value


def damaged(path: str, error: StateError) -> StateError:
    said = str(error)
    return error if said.startswith("snapshot ") else StateError(f"snapshot {path} is damaged: {said}")


# -- drives ------------------------------------------------------------------------------------------------------------


def sync_image(path: str) -> None:
    """What the guest has written is on the disk, also what it has not flushed: its memory, which goes to the disk too,
    takes that for written.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # gone, or of another user's: nothing of it will be found again
    try:
        os.fdatasync(fd)
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}: what the guest wrote there does not reach the disk") from None
    finally:
        os.close(fd)


def image_identity(name: str, path: str) -> dict[str, Any]:
    """What tells whether an image is still the one that a guest's memory knows of."""
    status = os.stat(path)
    return {"name": name, "path": os.path.abspath(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def checked_drive(entry: object) -> Mapping[str, Any]:
    check_names(entry, ("name", "path", "size", "mtime_ns"))
    assert isinstance(entry, dict)
    return {
        "name": text(entry["name"], "name"),
        "path": text(entry["path"], "path"),
        "size": value_of(63, entry["size"], "size"),
        "mtime_ns": value_of(63, entry["mtime_ns"], "mtime_ns"),
    }


def check_image(drive: Mapping[str, Any]) -> None:
    try:
        now = image_identity(drive["name"], drive["path"])
    except OSError as error:
        raise ConfigError(
            f"drive {drive['name']}: {drive['path']}: {error.strerror}: give drives= with the image as it was saved"
        ) from None
    if (now["size"], now["mtime_ns"]) != (drive["size"], drive["mtime_ns"]):
        raise StateError(
            f"drive {drive['name']}: {drive['path']} has been written since the snapshot was saved, and is not the disk"
            " that the guest remembers: give drives= with a copy from that time"
        )
