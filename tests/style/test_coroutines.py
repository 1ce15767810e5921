"""A coroutine holds no lock of threads while it awaits: it may go on on another thread (docs/design.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tree import PACKAGE, ROOT

MODULES = sorted((PACKAGE / "block").rglob("*.py"))


def awaits_under_a_lock(tree: ast.AST) -> list[int]:
    """The lines of ``with`` statements on a lock in whose body something is awaited."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            on_lock = any("lock" in ast.unparse(item.context_expr).lower() for item in node.items)
            if on_lock and any(isinstance(inner, ast.Await) for inner in ast.walk(node)):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(ROOT)) for path in MODULES])
def test_nothing_is_awaited_under_a_lock(path: Path) -> None:
    assert awaits_under_a_lock(ast.parse(path.read_text())) == []


def test_it_would_be_noticed() -> None:
    text = "async def f(self):\n    with self._lock:\n        await g()\n"
    assert awaits_under_a_lock(ast.parse(text)) == [2]
