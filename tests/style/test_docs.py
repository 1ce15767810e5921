"""What docs/design.md names is there: a walk through functions that have moved on would mislead."""

from __future__ import annotations

import re
from functools import cache

import pytest
from tree import PACKAGE, ROOT, code

DESIGN = (ROOT / "docs" / "design.md").read_text()
HOUSE_RULES = (ROOT / "docs" / "house-rules.md").read_text()
FILE = re.compile(r"`((?:[\w]+/)*\w+\.(?:pyx|pxd|py))`")
NAME = re.compile(r"`(\w+)\.(\w+)`")


def walk() -> str:
    return DESIGN.split("## The life of one block request\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("name", sorted(set(FILE.findall(DESIGN + HOUSE_RULES))))
def test_files_that_are_named_exist(name: str) -> None:
    assert (PACKAGE / name).exists() or (ROOT / name).exists()


@cache
def members() -> set[tuple[str, str]]:
    """(class, method) of everything in the package, inherited ones too."""
    found: set[tuple[str, str]] = set()
    bases: list[tuple[str, str]] = []
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyx")]:
        owner = ""
        for line in code(path).splitlines():
            if new := re.match(r"(?:cdef )?class (\w+)(?:\(([^)]*)\))?", line):
                owner = new[1]
                bases += [(owner, base.strip().rpartition(".")[2]) for base in (new[2] or "").split(",")]
            elif member := re.match(r"\s+(?:async )?(?:c?p?def)\s+(?:[\w *]+ )?\*?(\w+)\(", line):
                found.add((owner, member[1]))
    of: dict[str, set[str]] = {}
    for owner, name in found:
        of.setdefault(owner, set()).add(name)
    grown = True
    while grown:
        grown = False
        for owner, base in bases:
            more = of.get(base, set()) - of.setdefault(owner, set())
            of[owner] |= more
            grown = grown or bool(more)
    return {(owner, name) for owner, names in of.items() for name in names}


def walked() -> set[tuple[str, str]]:
    """What the walk names as Class.method; not the standard library's, and no files."""
    return {name for name in NAME.findall(walk()) if name[0] != "os" and name[1] not in ("py", "pyx", "img")}


@pytest.mark.parametrize("name", sorted(walked()), ids=".".join)
def test_functions_of_the_walk_exist(name: tuple[str, str]) -> None:
    assert name in members()


def test_the_walk_names_functions() -> None:
    names = walked()
    assert ("FilePosix", "paio_submit") in names
    assert ("CpuExec", "_drain_ring") in members()
