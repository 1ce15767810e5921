"""The pages make a site without a warning, and its reference has everything that can be said."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT

import pyvmm
from pyvmm.block.options import DriveOptions
from pyvmm.cli.run import OPTIONS
from pyvmm.config import MachineConfig


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(where)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr + made.stdout
    return where


def words(page: Path) -> str:
    """What a reader sees of it."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def test_every_page_is_made(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    assert pages and {path for path in pages if not (site / path).with_suffix(".html").exists()} == set()


def test_every_example_is_shown(site: Path) -> None:
    text = (site / "examples.html").read_text()
    names = [path.name for path in (ROOT / "docs" / "examples").iterdir() if path.is_file()]
    assert names
    assert [name for name in names if not re.search(rf'<h2 id="[^"]+"><code>{re.escape(name)}</code>', text)] == []


def test_the_reference_has_every_option(site: Path) -> None:
    text = words(site / "reference/options.html")
    names = [name for option in OPTIONS for name in option.names]
    names += [word for row in DriveOptions.rows.values() for word in row.words]
    assert [name for name in (*names, *MachineConfig.rows) if name not in text] == []


def test_the_reference_has_every_public_name(site: Path) -> None:
    text = (site / "reference/api.html").read_text()
    assert [name for name in pyvmm.__all__ if f'id="{name}"' not in text] == []
    for member in ("Machine.run", "Machine.fork", "AddressSpace.map", "Device.write", "Timer.arm"):
        assert f'id="{member}"' in text


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert loaded == [], page.name
