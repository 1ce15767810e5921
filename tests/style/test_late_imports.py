"""What is imported late is listed in pyvmm/preload.py: a process that finds no files any more must know."""

from __future__ import annotations

import ast
from pathlib import Path

from test_layers import loaded_by, names_it
from tree import PACKAGE, sources

from pyvmm import preload

# Commands and their tools; what stands there is no part of a machine.
OUTSIDE = ("cli", "control", "guests", "pytest_plugin.py")
LISTED = {*preload.BUILDING, *preload.RUNNING, *preload.GUESTS, *preload.EXTRAS}


def late_imports(path: Path) -> set[str]:
    """What the functions of a file import."""
    found: set[str] = set()

    def walk(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if inside and isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if inside and isinstance(node, ast.ImportFrom):
            found.update(names_it(str(node.module), alias.name) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    walk(ast.parse(path.read_text()), False)
    return found


def test_every_late_import_is_listed() -> None:
    files = [path for path in sources(".py") if path.relative_to(PACKAGE).parts[0] not in OUTSIDE]
    late = set[str]().union(*map(late_imports, files))
    assert {"pyvmm.dump", "ctypes"} <= late
    at_start = loaded_by("pyvmm.machine") | {"os", "posix", "sys"}
    assert sorted(late - LISTED - at_start) == []


def test_nothing_is_listed_that_is_not_there() -> None:
    for name in LISTED:
        if name.startswith("pyvmm."):
            parts = PACKAGE.parent.joinpath(*name.split("."))
            assert parts.is_dir() or any(parts.with_suffix(s).exists() for s in (".py", ".pyx")), name
    assert len(LISTED) == sum(map(len, (preload.BUILDING, preload.RUNNING, preload.GUESTS, preload.EXTRAS)))
