"""The schema that is shipped and the reference in the documentation: they are what the options say."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyvmm
from pyvmm.cli.config_schema import BEGIN, END, REFERENCE, SCHEMA, schema, schema_text, with_reference
from pyvmm.cli.run import OPTIONS
from pyvmm.config import MachineConfig

ROOT = Path(pyvmm.__file__).parent.parent
WRITE = "write them: python -m pyvmm.cli.config_schema"


@pytest.fixture(scope="module")
def complaint() -> Callable[[Any], str]:
    """What a validator of other people's says of a document; empty where it is right."""
    fastjsonschema = importlib.import_module("fastjsonschema")
    validate = fastjsonschema.compile(json.loads(SCHEMA.read_text()))

    def look(document: Any) -> str:
        try:
            validate(document)
        except fastjsonschema.JsonSchemaException as error:
            return str(error)
        return ""

    return look


def test_the_schema_that_is_shipped() -> None:
    assert SCHEMA.read_text() == schema_text(), WRITE


def test_the_reference() -> None:
    page = REFERENCE.read_text()
    assert page.count(BEGIN) == page.count(END) == 1
    assert page == with_reference(page), WRITE


def test_it_is_shipped() -> None:
    assert '"machine.schema.json"' in (ROOT / "pyproject.toml").read_text()


def test_every_option_is_there() -> None:
    told = schema()["properties"]
    assert set(told) == set(MachineConfig.rows) - {"raw_terminal"} | {"run", "$schema"}
    assert {option.key for option in OPTIONS if option.file} == set(told["run"]["properties"])
    # What a command line only can say.
    assert {option.key for option in OPTIONS if not option.file} - set(MachineConfig.rows) == {
        *("cdrom", "snapshot", "cloud_init", "config", "print_config", "restore", "incoming", "help")
    }


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"kernel": "k", "memory_mib": "2G", "cpus": 2, "debug_exit": "none", "no_reboot": True},
        {"drives": ["a.img", {"file": "b.img", "interface": "virtio", "size": "1M"}], "nets": [{"kind": "passt"}]},
        {"balloon": 64, "vsock": "none"},
        {"balloon": {"mib": 64}, "vsock": {"cid": 3, "path": "x"}, "fw_cfg": {"opt/x": "y"}, "modules": ["a b"]},
        {"run": {"qmp": ["a"], "gdb": 1234, "timeout": 5, "exit_stats": True}, "$schema": "machine.schema.json"},
    ],
)
def test_a_validator_takes_what_is_right(complaint: Callable[[Any], str], document: Any) -> None:
    assert complaint(document) == ""


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"memroy_mib": 1},
        {"cpus": 0},
        {"cpus": "1"},
        {"irqchip": "split"},
        {"drives": [{"fiel": "x"}]},
        {"drives": "a.img"},
        {"nets": [5]},
        {"fw_cfg": {"opt/x": 5}},
        {"run": {"qmp": "a"}},
        {"run": {"restore": "x.snap"}},
        {"raw_terminal": True},
    ],
)
def test_a_validator_refuses_what_is_wrong(complaint: Callable[[Any], str], document: Any) -> None:
    assert complaint(document) != ""


def test_what_writes_them(tmp_path: Path) -> None:
    """In a copy: nothing is changed there, for it is written already."""
    copy = tmp_path / "pyvmm"
    copy.mkdir()
    subprocess.run(["cp", "-r", f"{ROOT / 'pyvmm'}/.", copy], check=True)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "configuration.md"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    (copy / "machine.schema.json").unlink()
    subprocess.run([sys.executable, "-m", "pyvmm.cli.config_schema"], cwd=tmp_path, check=True, timeout=60)
    assert (copy / "machine.schema.json").read_text() == SCHEMA.read_text()
    assert page.read_text().startswith(f"before\n{BEGIN}\n### Of a machine\n")
    assert page.read_text().endswith(f"{END}after\n")
