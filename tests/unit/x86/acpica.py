"""ACPICA's own tools on the tables: its disassembler, compiler and interpreter."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def iasl(tmp_path: Path, *arguments: str) -> str:
    """Run ACPICA's compiler; its output, which must speak of no warning or error."""
    done = subprocess.run(["iasl", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    complaints = [line for line in output.splitlines() if re.search(r"(?i)\b(warning|error)\b", line)]
    assert [line for line in complaints if "0 Errors, 0 Warnings" not in line] == [], output
    return output


def disassemble(tmp_path: Path, name: str, data: bytes) -> str:
    """The source that iasl makes of a table."""
    (tmp_path / f"{name}.aml").write_bytes(data)
    iasl(tmp_path, "-d", f"{name}.aml")
    return (tmp_path / f"{name}.dsl").read_text()


def recompile(tmp_path: Path, data: bytes) -> bytes:
    """A DSDT taken apart and put together again. iasl would shorten what is longer than need be."""
    disassemble(tmp_path, "dsdt", data)
    iasl(tmp_path, "-p", "again", "dsdt.dsl")
    return (tmp_path / "again.aml").read_bytes()


def evaluate(tmp_path: Path, data: bytes, *commands: str) -> list[int | bytes | None]:
    """What each command of ACPICA's debugger (such as "execute \\_SB.LNKA._STA") returned, one after another in one
    namespace: a number, a buffer or nothing. Its PCI configuration space is memory that starts as zeros.
    """
    (tmp_path / "dsdt.aml").write_bytes(data)
    done = subprocess.run(
        ["acpiexec", "-b", "; ".join(commands), "dsdt.aml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    output = done.stdout + done.stderr
    assert not re.search(r"(?i)\b(error|warning|exception)\b|AE_", output), output
    results: list[int | bytes | None] = []
    for part in re.split(r"^Evaluating ", output, flags=re.M)[1:]:
        number = re.search(r"\[Integer\] = ([0-9A-F]+)", part)
        rows = re.findall(r"[0-9A-F]{4}: ((?:[0-9A-F]{2} )+)", part)
        if number:
            results.append(int(number[1], 16))
        elif rows:
            results.append(bytes.fromhex("".join(rows)))
        else:
            assert "No object was returned" in part, output
            results.append(None)
    return results
