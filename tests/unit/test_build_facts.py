"""What a build says of itself: built.txt for `pyvmm --version`, and the bill of materials of a wheel."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pyvmm
from pyvmm.cli.version import BUILT, built, version_text

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import build_facts  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def bill(requires: list[str]) -> str:
    return build_facts.bill(build_facts.facts(), PROJECT["name"], PROJECT["version"], requires)


def test_the_bill_is_cyclonedx() -> None:
    # Here: whoever only collects the tests need not wait seconds for it.
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill(PROJECT["dependencies"])) is None
    broken = bill(PROJECT["dependencies"]).replace('"library"', '"a library"')
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None


def test_the_bill_has_what_is_compiled_in_and_what_pip_brings() -> None:
    document = json.loads(bill(PROJECT["dependencies"]))
    assert document["metadata"]["component"]["purl"] == f"pkg:pypi/pyvmm-kvm@{pyvmm.__version__}"
    names = {part["name"] for part in document["components"]}
    assert names == {"Cython", *(re.split("[<>=]", needed)[0] for needed in PROJECT["dependencies"])}
    (about,) = [entry for entry in document["dependencies"] if entry["ref"] == "pyvmm"]
    assert set(about["dependsOn"]) == {part["bom-ref"] for part in document["components"]}


def test_two_builds_of_one_source_have_one_bill() -> None:
    assert bill(PROJECT["dependencies"]) == bill(PROJECT["dependencies"])
    assert bill(PROJECT["dependencies"]) != bill([])


def test_a_source_distribution_says_what_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "SOURCE").write_text("0123456789ab\n")
    monkeypatch.setattr(build_facts, "SOURCE", tmp_path / "SOURCE")
    assert build_facts.facts()["source"] == "0123456789ab"


def test_outside_of_a_checkout_the_source_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nor is the repository asked in which somebody has unpacked it.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(build_facts, "HERE", tmp_path / "inner")
    assert build_facts.facts()["source"] == "unknown"


def test_what_was_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"source": "0123456789ab", "compiler": "gcc (Debian: 12) 12.2"}
    (tmp_path / BUILT).write_text(build_facts.text(facts))
    assert dict(built(str(tmp_path))) == facts
    monkeypatch.setattr(pyvmm, "__file__", str(tmp_path / "__init__.py"))
    text = version_text()
    assert text.startswith(f"pyvmm {pyvmm.__version__}\n")
    assert "compiler   gcc (Debian: 12) 12.2\n" in text
    assert f"package    {tmp_path}\n" in text


def test_one_that_nobody_has_built_says_what_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyvmm, "__file__", str(tmp_path / "__init__.py"))
    first, *others = version_text().splitlines()
    assert first == f"pyvmm {pyvmm.__version__}"
    assert [line.split()[0] for line in others] == ["runs", "package"]


def test_both_ways_in_say_the_same() -> None:
    ways = [[sys.executable, "-m", "pyvmm", "--version"], [str(Path(sys.prefix) / "bin/pyvmm"), "--version"]]
    texts = [subprocess.run(way, capture_output=True, text=True, check=True).stdout for way in ways]
    assert len({text.split("runs on")[0] for text in texts}) == 1
    assert texts[0].startswith(f"pyvmm {pyvmm.__version__}\n")
