"""The package's own modules from one file: the same bytecode as in its many .pyc files, found and loaded all at once.

To find and load a module takes importlib 0.1 ms and more, and `pyvmm run` needs sixty before the guest runs. So
`pyvmm/modules.<cache tag>.bundle`, made by setup.py (bundle_build.py), holds the bytecode of all of them:

- `Bundle.find_spec` answers for any of them that is imported;
- `Bundle.run_ahead` runs those that every `pyvmm run` needs, in the order of their imports and without importlib.

Compiled units are in one shared object, `pyvmm/units.<ABI tag>.so`, for the same reason; a unit is known by its stub.

The .py files are what counts. A module comes from the bundle only if its source has the size and the time of
modification for which it was made; where only the time differs (installed, copied, checked out again), if it has the
same contents. Else, and where the bundle is missing, for another Python, broken, or made anew since the process began,
the interpreter's own finders load the file, as they do with -O, with PYTHONPYCACHEPREFIX, and with -X pyvmm_files.
Modules are as importlib makes them (`__file__`, `__spec__`, source lines, reload). Their bytecode does without
`from __future__ import annotations`, which was told to the compiler otherwise; so does this file, which is loaded
first: to find and load `__future__` would be the first thing that a start does.
"""

import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import MAGIC_NUMBER, ExtensionFileLoader, SourceFileLoader
from _imp import _fix_co_filename, extension_suffixes, source_hash  # type: ignore[attr-defined]
from marshal import loads
from posix import O_RDONLY, pread, stat
from posix import close as close_fd
from posix import open as open_fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, ModuleType

    Index = dict[str, "Entry"]
    # Of a source: its path in the package, whether it is a package's, its size in bytes, hash, time of modification in
    # ns; where its bytecode is.
    Entry = tuple[str, bool, int, bytes, int, int, int]

CACHE_TAG = sys.implementation.cache_tag
NAME = f"modules.{CACHE_TAG}.bundle"
UNITS = f"units{extension_suffixes()[0]}"
# Of the bytecode's format, then of ours.
HEAD = MAGIC_NUMBER + b"pyvmm 1\n"
HASH_BYTES = 8
LENGTH_BYTES = 4
INDEX_AT = len(HEAD) + HASH_BYTES + LENGTH_BYTES
FIRST_READ_BYTES = 0x8000  # more than the index


def hash_of(data: bytes) -> bytes:
    return source_hash(0, data)


def read(path: str, offset: int, count: int) -> bytes:
    """OSError. Short where the file ends."""
    fd = open_fd(path, O_RDONLY)
    try:
        return pread(fd, count, offset)
    finally:
        close_fd(fd)


def read_index(path: str) -> "tuple[Index, tuple[str, ...], int, int, bytes]":
    """The entries; the names of those that are run ahead, with the place of their bytecode; the hash of all that.
    ValueError, OSError.
    """
    data = read(path, 0, FIRST_READ_BYTES)
    if not data.startswith(HEAD):
        raise ValueError("made by another version")
    length = int.from_bytes(data[INDEX_AT - LENGTH_BYTES : INDEX_AT], "little")
    index = data[INDEX_AT : INDEX_AT + length]
    if len(index) < length:
        index = read(path, INDEX_AT, length)
    index_hash = hash_of(index)
    if index_hash != data[len(HEAD) : len(HEAD) + HASH_BYTES]:
        raise ValueError("broken")
    size_bytes, *rest = loads(index)
    if stat(path).st_size != size_bytes:
        raise ValueError("cut off")
    return (*rest, index_hash)


class Loader(SourceFileLoader):
    """Of one module in a bundle: the file's own, but that it need not read it."""

    def __init__(self, name: str, path: str, bundle: "Bundle") -> None:
        super().__init__(name, path)
        self.bundle = bundle

    def get_code(self, fullname: str) -> "CodeType | None":
        return self.bundle.code(fullname) or super().get_code(fullname)


class Bundle:
    """One of sys.meta_path, for the modules of the package in ``directory``."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.path = f"{directory}/{NAME}"
        self.units = f"{directory}/{UNITS}"
        # Why nothing is taken from it, for `pyvmm doctor`.
        self.problem = ""
        self.entries: Index = {}
        self.ahead: tuple[str, ...] = ()
        self._ahead_at = (0, 0)
        self.made = b""  # the index's hash: one that was made anew meanwhile has another, and its bytecode elsewhere
        # The times of modification of files that were looked into and found the same: bundle_build.note_times.
        self.times_ns: dict[str, int] = {}
        if sys.flags.optimize or sys.pycache_prefix is not None or "pyvmm_files" in sys._xoptions:
            self.problem = "not asked for"
            return
        try:
            self.entries, self.ahead, *at, self.made = read_index(self.path)
            self._ahead_at = (at[0], at[1])
        except (OSError, ValueError, EOFError, TypeError) as error:
            self.problem = str(error)

    def fresh(self, name: str) -> bool:
        """Whether the source is still what the bytecode was made of."""
        path, _package, size_bytes, source, time_ns, _at, _length = self.entries[name]
        try:
            now = stat(f"{self.directory}/{path}")
            if now.st_size != size_bytes:
                return False
            if now.st_mtime_ns == time_ns or now.st_mtime_ns == self.times_ns.get(name):
                return True
            if hash_of(read(f"{self.directory}/{path}", 0, size_bytes + 1)) != source:
                return False
        except OSError:
            return False
        self.times_ns[name] = now.st_mtime_ns
        return True

    def code(self, name: str) -> "CodeType | None":
        if not self.fresh(name):
            return None
        *_, at, length = self.entries[name]
        try:
            fd = open_fd(self.path, O_RDONLY)
            try:
                if pread(fd, HASH_BYTES, len(HEAD)) != self.made:
                    return None
                data = pread(fd, length, at)
            finally:
                close_fd(fd)
            return self._placed(name, loads(data))
        except (OSError, ValueError, EOFError, TypeError):
            return None

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> ModuleSpec | None:
        if name in self.entries:
            return self._spec(name) if self.fresh(name) else None
        if name.startswith("pyvmm."):
            return self._unit_spec(name)
        return None

    def run_ahead(self) -> None:
        """Run the modules that every `pyvmm run` needs. What can't be had from here is imported when it is wanted."""
        try:
            codes = self._codes_ahead()
        except (OSError, ValueError, EOFError, TypeError, ImportError) as error:
            self.problem = str(error)
            return
        modules = sys.modules
        for name, code in zip(self.ahead, codes, strict=True):
            if name in modules:
                continue
            if code is None:
                __import__(name)
                continue
            if not self.fresh(name):
                continue
            spec = self._spec(name)
            module = type(sys)(name)
            module.__spec__ = spec
            module.__loader__ = spec.loader
            module.__file__ = spec.origin
            module.__dict__["__cached__"] = spec.cached
            module.__package__ = spec.parent
            if spec.submodule_search_locations is not None:
                module.__path__ = spec.submodule_search_locations
            modules[name] = module
            try:
                exec(self._placed(name, code), module.__dict__)
            except BaseException:
                modules.pop(name, None)
                raise
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, module)

    def _codes_ahead(self) -> "tuple[CodeType | None, ...]":
        """None for a compiled unit. By way of a mapping: what is read would take a page fault for every page of it."""
        from mmap import ACCESS_READ, mmap

        fd = open_fd(self.path, O_RDONLY)
        try:
            with mmap(fd, 0, access=ACCESS_READ) as mapped, memoryview(mapped) as data:
                at, length = self._ahead_at
                if data[len(HEAD) : len(HEAD) + HASH_BYTES] != self.made:
                    raise ValueError("made anew meanwhile")
                with data[at : at + length] as part:
                    codes: tuple[CodeType | None, ...] = loads(part)
        finally:
            close_fd(fd)
        return codes

    def _unit_spec(self, name: str) -> ModuleSpec | None:
        try:
            stat(f"{self.directory}/{name[len('pyvmm.') :].replace('.', '/')}.pyi")
            stat(self.units)
        except OSError:
            return None
        spec = ModuleSpec(name, ExtensionFileLoader(name, self.units), origin=self.units)
        spec.has_location = True
        return spec

    def _spec(self, name: str) -> ModuleSpec:
        path, package, *_ = self.entries[name]
        path = f"{self.directory}/{path}"
        spec = ModuleSpec(name, Loader(name, path, self), origin=path, is_package=package)
        folder, _, file = path.rpartition("/")
        if package:
            spec.submodule_search_locations = [folder]
        spec.cached = f"{folder}/__pycache__/{file[:-2]}{CACHE_TAG}.pyc"
        spec.has_location = True
        return spec

    def _placed(self, name: str, code: "CodeType") -> "CodeType":
        """With the path of the file as it is here, which tracebacks show."""
        path = f"{self.directory}/{self.entries[name][0]}"
        if code.co_filename != path:
            _fix_co_filename(code, path)
        return code


def install(directory: str) -> None:
    """Put it before the finders that look for files."""
    sys.meta_path.insert(0, Bundle(directory))


def installed() -> Bundle | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, Bundle)), None)
