"""Makes the bundle of the package's modules that bundle.py reads: for setup.py, and for who has edited much since."""

from __future__ import annotations
import __future__

import marshal
import os
import sys

from pyvmm import bundle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType

    from pyvmm.bundle import Bundle, Entry, Index

INDEX_VERSION = 2  # of marshal: without references, so that its length follows from what is in it

# What every `pyvmm run` has loaded when its guest begins, each after those that it imports:
# tests/style/test_start_path.py compares, and tells what to write here. Others are found by their names.
NAMES_AHEAD = """
device region address_space boards options images late x86 x86.layout memory_map places boards.board boards.isa
boards.microvm consoles light run_state run_control drives clock event_loop events io_thread kvm kvm.exits exit_stats
kvm.ioctl kvm.vcpu cpu_exec outcomes reset_count power chassis closers guest_memory cpu kvm.vm irq irqchip
kvm.access kvm.system kvm_clock kvm_listener platform builder chardev cli.options cli.signals console_words config
machine_base machine_running machine_saving machine_moving spec machine cli.run devices devices.debug_exit
devices.serial terminal x86.image x86.boot x86.cpu_features x86.cpu_state x86.cpuid x86.flat
"""
AHEAD = tuple(f"pyvmm.{name}" for name in NAMES_AHEAD.split())


def sources(directory: str) -> Iterator[tuple[str, str]]:
    """Name and path, within the package, of each of its modules in Python."""
    for folder, folders, files in os.walk(directory):
        folders[:] = sorted(set(folders) - {"__pycache__"})
        below = os.path.relpath(folder, directory)
        parts = [] if below == "." else below.split(os.sep)
        if folder != directory and "__init__.py" not in files:
            folders.clear()  # no package
            continue
        for file in sorted(files):
            if file.endswith(".py"):
                stem = [] if file == "__init__.py" else [file[:-3]]
                yield ".".join(["pyvmm", *parts, *stem]), "/".join([*parts, file])


def compiled(text: bytes, path: str) -> CodeType:
    """As a .pyc has it, but that ``from __future__ import annotations`` is told to the compiler and not carried out."""
    import ast

    tree = ast.parse(text, path)
    body = [
        statement
        for statement in tree.body
        if not (isinstance(statement, ast.ImportFrom) and statement.module == "__future__")
    ]
    flags = 0 if len(body) == len(tree.body) else __future__.annotations.compiler_flag
    tree.body = body
    code: CodeType = compile(tree, path, "exec", flags, dont_inherit=True, optimize=0)
    return code


def build(directory: str) -> str:
    """Write the bundle of the package in ``directory``, for this interpreter. Its path. OSError."""
    directory = os.path.realpath(directory)
    codes: dict[str, CodeType] = {}
    entries: dict[str, Entry] = {}
    blobs: list[bytes] = []
    for name, path in sources(directory):
        with open(f"{directory}/{path}", "rb") as file:
            time_ns = os.fstat(file.fileno()).st_mtime_ns
            text = file.read()
        codes[name] = compiled(text, file.name)
        blob = marshal.dumps(codes[name])
        package = os.path.basename(path) == "__init__.py"
        at = sum(map(len, blobs))
        entries[name] = (path, package, len(text), bundle.hash_of(text), time_ns, at, len(blob))
        blobs.append(blob)
    made = f"{directory}/{bundle.NAME}"
    # One marshalled value: what several modules have in common, names above all, is in it once.
    write(made, entries, AHEAD, marshal.dumps(tuple(codes.get(name) for name in AHEAD)), b"".join(blobs))
    return made


def write(path: str, entries: Index, ahead: tuple[str, ...], ahead_code: bytes, blobs: bytes) -> bytes:
    """``entries`` with places in ``blobs``. The index's hash."""

    def index_for(base: int, size_bytes: int) -> bytes:
        placed = {name: (*entry[:5], base + len(ahead_code) + entry[5], entry[6]) for name, entry in entries.items()}
        return marshal.dumps((size_bytes, placed, ahead, base, len(ahead_code)), INDEX_VERSION)

    # The index holds its own end. A number takes as many bytes as any other, as long as it has 31 bits.
    base = bundle.INDEX_AT + len(index_for(0, 0))
    size_bytes = base + len(ahead_code) + len(blobs)
    index = index_for(base, size_bytes)
    made = bundle.hash_of(index)
    head = bundle.HEAD + made + len(index).to_bytes(bundle.LENGTH_BYTES, "little")
    replace(path, head + index + ahead_code + blobs)
    return made


def note_times(read: Bundle) -> None:
    """Have the bundle know sources by their new times of modification, where they were found the same otherwise. Left
    as it is where it can't be written, and with -B.
    """
    if sys.dont_write_bytecode:
        return
    try:
        entries, ahead, at, length, made = bundle.read_index(read.path)
        with open(read.path, "rb") as file:
            data = file.read()
        base = at + length
        noted = {
            name: (*entry[:4], read.times_ns.get(name, entry[4]), entry[5] - base, entry[6])
            for name, entry in entries.items()
        }
        written = write(read.path, noted, ahead, data[at:base], data[base:])
        if read.made == made:  # its bytecode is where it was
            read.made = written
    except (OSError, ValueError):
        return


def replace(path: str, data: bytes) -> None:
    """All of it or nothing, whoever reads it meanwhile. OSError."""
    partial = f"{path}.{os.getpid()}"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
