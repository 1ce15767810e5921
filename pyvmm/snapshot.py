"""Snapshot: a machine in a file. ``save`` writes one; an open Snapshot has what another machine goes on from.

The manifest (snapshot_file.py has the file around it):

    {"pyvmm": its version, "id": 16 bytes, "saved_ns": wall clock,
     "spec": Spec.plain(), "machine": MachineState.description(), "parts": MachineState.parts(),
     "memory": [{"gpa", "size", "offset", "runs", "sums", "used"}], "base": None or {"id", "path"},
     "images": {option: {"offset", "size", "sum"}}, "drives": [{"name", "path", "size", "mtime_ns"}],
     "untouched": [name]}

``untouched`` are the parts that nobody had wanted (late.py): one that is made anew has the same state.

A piece of memory stands in the file from ``offset`` on, byte for byte. With a base it holds only the pages that differ
from the base's piece: ``runs`` has (offset in the piece, size, offset in the file) of each. Images that the machine was
given as bytes, and that a reset loads again, are in the file too; the spec names those that are files.
"""

from __future__ import annotations

import posix
import sys
from time import time_ns
from zlib import crc32

from pyvmm.errors import ConfigError, HostError, StateError
from pyvmm.guest_memory import GPA_END, PAGE_BYTES, RAM_HIGH, RamRegion
from pyvmm.light import Lock
from pyvmm.machine_state import FORMAT
from pyvmm.origin import Origin
from pyvmm.snapshot_file import SnapshotFile, Writer
from pyvmm.snapshot_piece import SnapshotPiece, listed, piece_sums, read_into, run_sums, whole_pages, write_piece
from pyvmm.state import Known, check_names, known, shown, value_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from os import PathLike
    from typing import Any, Self

    from typing_extensions import Buffer

    from pyvmm.snapshot_piece import Run
    from pyvmm.spec import Spec

ID_BYTES = 16
NAMES = ("pyvmm", "id", "saved_ns", "spec", "machine", "parts", "memory", "base", "images", "drives")
LONGEST_CHAIN = 32
MOST_IMAGES = 1024
KEPT_IMAGE_BYTES = 1 << 20  # so much is copied, for all who open the same snapshot


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
        self.id = posix.urandom(ID_BYTES)

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

    def clear(self, region: RamRegion, runs: Iterable[Run]) -> int:
        """These pages are zeros by now: how many bytes of them had something else in the file."""
        offset: int = self._pieces[region.gpa]["offset"]
        return sum(self._file.clear(offset + start, size) for start, size in runs)

    def take(
        self, regions: Sequence[RamRegion], machine: dict[str, Any], parts: dict[str, Any], spec: dict[str, Any],
        images: Mapping[str, Buffer], drives: list[dict[str, Any]], untouched: list[str] | None = None,
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
            "base": None if base is None else {"id": base.id, "path": absolute(base.path)},
            "images": {name: self._image(memoryview(image).cast("B")) for name, image in images.items()},
            "drives": drives,
            "untouched": untouched or [],
        }

    def _image(self, image: memoryview) -> dict[str, int]:
        offset = self._file.reserve(image.nbytes)
        self._file.write(offset, image)
        return {"offset": offset, "size": image.nbytes, "sum": crc32(image)}

    def commit(self) -> int:
        """It is on the disk, whole: how many bytes were written."""
        if self._file.lasting:
            for entry in self._manifest["memory"]:
                if self._base is None:
                    entry["sums"] = piece_sums(self._file.fd, entry["offset"], entry["size"])
                else:
                    entry["sums"] = run_sums(self._file.fd, entry["runs"])
        self._file.commit(self._manifest)
        return self._file.written_bytes


def piece_of(snapshot: Snapshot | None, region: RamRegion) -> SnapshotPiece | None:
    return None if snapshot is None else snapshot.pieces.get(region.gpa)


def version() -> str:
    """pyvmm's: the package imports all of us, so it is there."""
    return str(vars(sys.modules["pyvmm"])["__version__"])


# -- reading one -------------------------------------------------------------------------------------------------------


# What is taken of a manifest; and `parts`, which the next reader finds as a Known.
TAKEN = ("_images", "copies_images", "drives", "id", "machine", "saved_ns", "spec", "untouched", "version")


class Snapshot:
    """An open snapshot, with those that it is based on. Many machines may come from it, one after the other or at once;
    each holds it, and the file is closed when the last of them and whoever opened it have called ``close``.

    ``spec`` is Spec.plain()'s data, ``machine`` and ``parts`` are MachineState's; ``pieces`` the memory by its address.
    ConfigError for a path that can't be read, StateError for what is no snapshot, or damaged.
    """

    def __init__(
        self, path: str | PathLike[str], *, _file: SnapshotFile | None = None, _above: Sequence[bytes] = ()
    ) -> None:
        self.path = path = posix.fspath(path)
        self._lock = Lock()
        self._holders = 1
        self._state: dict[str, Any] | None = None
        self._file = SnapshotFile(path) if _file is None else _file
        self._kept = self._file.kept
        self._at_rest: tuple[object, ...] | None = None
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
        self.pieces: dict[int, SnapshotPiece] = {}
        if (known := self._kept.get("taken")) is None:
            self._check(manifest, above)
            if self.base is None:
                self._kept["taken"] = {name: getattr(self, name) for name in TAKEN}, self.pieces
        else:
            # The same bytes, read once more: all is right that does not depend on the file that they are in.
            fields, pieces = known
            self.__dict__.update(fields)
            for offset, size, _crc in self._images.values():
                self._file.check_range(offset, whole_pages(size))
            self.pieces = {gpa: piece.again(self._file) for gpa, piece in pieces.items()}
        self.parts: dict[str, Any] = manifest["parts"]

    def _check(self, manifest: dict[str, Any], above: Sequence[bytes]) -> None:
        # Older ones have no such list.
        check_names(manifest, [*NAMES, *(name for name in manifest if name == "untouched")])
        names = listed(manifest.get("untouched", []), "untouched")
        self.untouched = frozenset(text(name, "untouched") for name in names)
        self.id: bytes = value_of(("bytes", ID_BYTES), manifest["id"], "id")
        self.saved_ns: int = value_of(63, manifest["saved_ns"], "saved_ns")
        self.version = text(manifest["pyvmm"], "pyvmm")
        for name in ("spec", "machine", "parts"):
            if not isinstance(manifest[name], dict):
                raise StateError(f"{name} is {shown(manifest[name])}, no dict")
        self.spec: dict[str, Any] = manifest["spec"]
        self.machine: dict[str, Any] = manifest["machine"]
        self.drives = [checked_drive(entry) for entry in listed(manifest["drives"], "drives")]
        self._images: dict[str, tuple[int, int, int]]
        self._images = {name: self._checked_image(name, entry) for name, entry in checked_images(manifest).items()}
        self.copies_images = sum(size for _offset, size, _crc in self._images.values()) <= KEPT_IMAGE_BYTES
        """Whether they are small, and so are not mapped: then its Spec can be kept for the next one who opens it."""
        if not self.copies_images:
            self._kept = {}
        if manifest["base"] is not None:
            self._open_base(manifest["base"], [*above, self.id])
        for entry in listed(manifest["memory"], "memory"):
            gpa = entry.get("gpa") if isinstance(entry, dict) else None
            base = self.base.pieces.get(gpa) if self.base is not None and isinstance(gpa, int) else None
            if self.base is not None and base is None:
                raise StateError("it has memory that its base has not")
            piece = SnapshotPiece(self._file, entry, base)
            if piece.gpa in self.pieces:
                raise StateError(f"it has memory at {piece.gpa:#x} twice")
            self.pieces[piece.gpa] = piece

    def _checked_image(self, name: str, entry: object) -> tuple[int, int, int]:
        check_names(entry, ("offset", "size", "sum"))
        assert isinstance(entry, dict)
        size: int = value_of(range(1, GPA_END), entry["size"], f"images.{name}.size")
        crc: int = value_of(32, entry["sum"], f"images.{name}.sum")
        return self._file.check_range(entry["offset"], whole_pages(size)), size, crc

    def image(self, name: str) -> Buffer | None:
        """The image that the machine was given as bytes for an option, or one of several: ``modules[0]``; mapped."""
        if name not in self._images:
            return None
        offset, size, _crc = self._images[name]
        region = RamRegion(0, whole_pages(size), name=name, source=(self._file.fd, offset))
        return memoryview(region)[:size].toreadonly()

    def image_copy(self, name: str) -> bytes | None:
        """The same, read: a file that has become shorter meanwhile is a StateError, where a mapping would be a SIGBUS.
        """
        if name not in self._images:
            return None
        offset, size, _crc = self._images[name]
        found = bytearray(size)
        read_into(self._file, memoryview(found), offset)
        return bytes(found)

    def _open_base(self, entry: object, above: Sequence[bytes]) -> None:
        """The base, where it was when this was written, or else beside this one."""
        check_names(entry, ("id", "path"))
        assert isinstance(entry, dict)
        wanted = value_of(("bytes", ID_BYTES), entry["id"], "id")
        if wanted in above or len(above) > LONGEST_CHAIN:
            raise StateError("its bases go round in a circle, or too deep")
        import os

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
        elif not isinstance(self._state["parts"], Known):
            self._state["parts"] = known(self.parts)
        return self._state

    def is_for_many(self) -> None:
        """Several machines are going to come from it: ``state`` remembers what it is from the first one on."""
        if self.state["parts"] is self.parts:
            self.state["parts"] = known(self.parts)

    @property
    def as_it_was(self) -> Spec | None:
        """The Spec of a machine for which nothing is given anew, once there has been one."""
        return self._kept.get("spec")

    @as_it_was.setter
    def as_it_was(self, spec: Spec) -> None:
        self._kept["spec"] = spec

    @property
    def at_rest(self) -> tuple[object, ...] | None:
        """Of a machine that came from it and had nothing to do but for its guest: its Spec, and which way it came
        (machine_snapshot.py).
        """
        return self._at_rest or self._kept.get("at rest")

    @at_rest.setter
    def at_rest(self, way: tuple[object, ...]) -> None:
        if way[0] is self.as_it_was:
            self._kept["at rest"] = way
        else:
            self._at_rest = way  # it may have objects of the embedder's, which nobody keeps after this is closed

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

    def check_memory(self, regions: Sequence[RamRegion]) -> None:
        """StateError where the two are not the same memory."""
        if sorted((r.gpa, r.size_bytes) for r in regions) != sorted((p.gpa, p.size) for p in self.pieces.values()):
            raise damaged(self.path, StateError("its memory is not that of its machine"))

    def read_over(self, regions: Sequence[RamRegion]) -> None:
        """All of the memory, into one that has been in use. It is the same, as ``check_memory`` says."""
        for region in regions:
            self.pieces[region.gpa].read_over(region)

    def fill(self, regions: Sequence[RamRegion]) -> None:
        """What of the memory is not there by ``sources``. StateError where the two are not the same memory."""
        self.check_memory(regions)
        for region in regions:
            piece = self.pieces[region.gpa]
            if region.from_file:
                piece.complete(region)
            else:
                piece.read(region)

    def check(self) -> None:
        """Read all of it: StateError where memory or an image is not what was saved. Of the manifest that is known."""
        for piece in self.pieces.values():
            piece.check()
        for name, (_offset, _size, crc) in self._images.items():
            image = self.image_copy(name)
            if image is None or crc32(image) != crc:
                raise StateError(f"snapshot {self.path} is damaged: its {name} has been changed")

    def read_ahead_beside(self, regions: Iterable[RamRegion], goes_on: Callable[[], bool]) -> Callable[[], None]:
        """What has all that the saved machine had in use read, and mapped, for as long as ``goes_on()``: to be called
        once, on a thread of its own, while somebody holds this.
        """
        mapped = [(self.pieces[region.gpa], region) for region in regions if region.from_file]

        def work() -> None:
            for piece, region in mapped:
                piece.read_ahead(region, goes_on)

        return work

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

    def is_file(self, status: posix.stat_result) -> bool:
        """Whether that is the file's. StateError where it is closed."""
        if not self._holders:
            raise StateError(f"snapshot {self.path} is closed: open it again")
        mine = posix.fstat(self._file.fd)
        return (mine.st_dev, mine.st_ino) == (status.st_dev, status.st_ino)

    def has(self, fd: int) -> bool:
        """Whether that is the file's descriptor."""
        return self._file.fd == fd

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
        self._kept = {}
        self._state = self._at_rest = None
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
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return  # gone, or of another user's: nothing of it will be found again
    try:
        posix.fdatasync(fd)
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}: what the guest wrote there does not reach the disk") from None
    finally:
        posix.close(fd)


def absolute(path: str) -> str:
    """From every folder."""
    import os

    return os.path.abspath(path)


def image_identity(name: str, path: str) -> dict[str, Any]:
    """What tells whether an image is still the one that a guest's memory knows of."""
    status = posix.stat(path)
    return {"name": name, "path": absolute(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


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
