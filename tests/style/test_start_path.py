"""What `pyvmm run` loads before its guest begins: the list of it (pyvmm/bundle_build.py), and what it costs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from test_late_imports import late_imports
from test_layers import imports, ours
from tree import PACKAGE, ROOT, module_name, sources

from pyvmm.bundle_build import AHEAD, build

# Loaded by whoever has the others loaded (pyvmm/cli/__init__.py).
BEFORE = {"pyvmm", "pyvmm.bundle", "pyvmm.cli", "pyvmm.cli.say", "pyvmm.cli.way_in", "pyvmm.errors"}
# Loaded when the guest runs already.
AFTER = {"pyvmm.cli.text_watch"}
# Of the standard library, what a start does without: house-rules.md, Imports.
NOT_LOADED = {
    *("os", "struct", "heapq", "collections", "_collections_abc", "re", "enum", "functools", "threading", "typing"),
}
# Instructions of a whole `pyvmm run`, in those of an interpreter that starts and ends: 2.37 with CPython 3.11. Time
# would say what else the machine does.
COST = 2.6
GUEST = bytes.fromhex("b000 e6f4 f4")  # mov al, 0; out 0xf4, al; hlt
FILES = {module_name(path): path for path in sources(".py", ".pyx")}


def loaded_by_a_run(directory: Path) -> set[str]:
    (directory / "guest.bin").write_bytes(GUEST)
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pyvmm.cli import main
status = main(["run", "--flat", {str(directory / "guest.bin")!r}, "--memory", "16"])
print(status, *sys.modules)
"""
    command = [sys.executable, "-I", "-S", "-X", "pyvmm_files", "-c", script]
    made = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    status, *modules = made.stdout.split()
    assert status == "1", made.stderr
    return set(modules)


def at_top(name: str) -> set[str]:
    """What a module imports when it is run; a compiled one also what it takes declarations from, for their types."""
    path = FILES[name]
    if path.suffix == ".py":
        return ours(imports(path) - late_imports(path))
    declarations = path.with_suffix(".pxd")
    return ours(imports(path) | (imports(declarations) if declarations.exists() else set())) - {name}


def in_order(names: set[str]) -> list[str]:
    """Each after those of the others that it imports; there are no circles (test_layers.py)."""
    found: dict[str, None] = {}
    begun: set[str] = set()

    def visit(name: str) -> None:
        if name not in FILES or name in begun:
            return
        begun.add(name)
        if "." in name:
            visit(name.rpartition(".")[0])
        for other in sorted(at_top(name)):
            visit(other)
        found[name] = None

    for name in sorted(names):
        visit(name)
    return [name for name in found if name in names]


def test_the_list_is_what_a_run_loads(tmp_path: Path) -> None:
    loaded = loaded_by_a_run(tmp_path)
    assert not loaded & NOT_LOADED
    right = in_order(ours(loaded) - BEFORE - AFTER)
    assert list(AHEAD) == right, "NAMES_AHEAD in pyvmm/bundle_build.py is to be:\n" + " ".join(n[6:] for n in right)


def instructions(*arguments: str, status: int) -> int:
    """In user space, all threads, of an interpreter as the command starts it."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, "-I", "-S", *arguments]
    made = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    counted = re.search(r"I +refs: +([\d,]+)", made.stderr)
    assert made.returncode == status and counted, made.stderr
    return int(counted[1].replace(",", ""))


def test_what_a_start_costs(tmp_path: Path) -> None:
    build(str(PACKAGE))  # as it is after the sources were built
    guest = tmp_path / "guest.bin"
    guest.write_bytes(GUEST)
    command = str(Path(sys.prefix) / "bin/pyvmm")
    cost = instructions(command, "run", "--flat", str(guest), "--memory", "16", status=1)
    assert cost < COST * instructions("-c", "pass", status=0)
