"""Where the package's sources are, and what their code says once comments and strings are out of the way."""

from __future__ import annotations

import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pyvmm"


def sources(*suffixes: str) -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*") if p.suffix in suffixes)


def module_name(path: Path) -> str:
    """pyvmm/kvm/vm.pyx -> pyvmm.kvm.vm; a package's __init__ is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def compiled_modules() -> list[str]:
    return [module_name(path) for path in sources(".pyx")]


def code(path: Path) -> str:
    """A Python or Cython file with comments and strings blanked: line numbers stay."""
    text = path.read_text()
    lines = [list(line) for line in text.splitlines(keepends=True)]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            (row, start), (last, end) = token.start, token.end
            while row <= last:
                line = lines[row - 1]
                stop = end if row == last else len(line) - 1
                line[start:stop] = " " * (stop - start)
                row, start = row + 1, 0
    return "".join("".join(line) for line in lines)
