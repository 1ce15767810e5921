"""How the tree is laid out, and the house rules of the compiled units."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from tree import PACKAGE, ROOT, code, module_name, sources

UNITS = sources(".pyx")
CYTHON = sources(".pyx", ".pxd")


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_there_are_units() -> None:
    assert len(UNITS) >= 10


@pytest.mark.parametrize("path", UNITS, ids=ids(UNITS))
def test_every_compiled_unit_has_its_stub(path: Path) -> None:
    assert path.with_suffix(".pyi").exists()


def test_stubs_stand_beside_compiled_units_only() -> None:
    assert [path for path in sources(".pyi") if not path.with_suffix(".pyx").exists()] == []


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_every_folder_with_sources_is_a_package_that_is_shipped() -> None:
    folders = {path.parent for path in sources(".py", ".pyx")}
    assert all((folder / "__init__.py").exists() for folder in folders)
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert listed
    names = set(re.findall(r'"([\w.]+)"', listed[1]))
    benchmarks = {"pyvmm_benchmarks", "pyvmm_benchmarks.contenders"}  # another folder, checked here as well
    assert all((ROOT / "benchmarks" / "/".join(name.split(".")[1:]) / "__init__.py").exists() for name in benchmarks)
    assert names - benchmarks == {module_name(folder / "__init__.py") for folder in folders}


@pytest.mark.parametrize("path", CYTHON, ids=ids(CYTHON))
def test_units_are_joined_by_cimport_and_never_by_textual_include(path: Path) -> None:
    assert not re.search(r"^\s*include\b", code(path), re.M)
    # Blanked strings leave the quotes' place empty, so look at the line itself too.
    assert not re.search(r"""^\s*include\s+["']""", path.read_text(), re.M)


@pytest.mark.parametrize("path", CYTHON, ids=ids(CYTHON))
def test_every_c_function_says_whether_it_raises(path: Path) -> None:
    # One that says nothing may take the GIL just to look for an error. One that returns an object need not.
    c_type = r"(?:int|void|bint|double|size_t|Py_ssize_t|u?int\d+_t|\w+_t \*|u?int\d+_t \*|char \*|void \*)"
    pattern = rf"^(?:    )?cp?def (?:inline )?{c_type} ?\*?\w+\((?:[^()]|\([^()]*\))*\)(?P<rest>[^:\n]*)"
    text = re.sub(r"cdef extern from[^\n]*\n(?:[ \t]+[^\n]*\n|\n)*", "", code(path))
    silent = [
        m[0] for m in re.finditer(pattern, text, re.M) if not re.search(r"\b(noexcept|except)\b", m["rest"])
    ]
    assert silent == []


@pytest.mark.parametrize("path", sources(".py", ".pyx"), ids=ids(sources(".py", ".pyx")))
def test_every_module_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert not text or text.startswith('"""')


def test_what_is_built_is_not_kept() -> None:
    kept = subprocess.run(
        ["git", "ls-files", "--", ".cache", "*.so", "*.bin", "*.o", "*.pyc", "pyvmm/*.c", "pyvmm/**/*.c"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    # Outside of a checkout (an unpacked sdist, say) nothing is kept at all.
    assert kept.stdout == ""


@pytest.mark.parametrize(("marker", "folders"), [("lab|slow", ("boot", "kvm")), ("emulator", ("ci",))])
def test_markers_are_where_ci_test_looks_for_them(marker: str, folders: tuple[str, ...]) -> None:
    """It collects for them what is there only."""
    tests = ROOT / "tests"
    marked = [p for p in tests.rglob("test_*.py") if re.search(rf"\bmark\.({marker})\b", code(p))]
    assert marked
    assert [p for p in marked if p.relative_to(tests).parts[0] not in folders] == []
