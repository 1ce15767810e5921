"""Help with one option: complete, and in every spelling."""

from __future__ import annotations

import pytest

from pyvmm.balloon_options import BalloonOptions
from pyvmm.block.options import DriveOptions
from pyvmm.cli import main
from pyvmm.cli.topics import drive_words
from pyvmm.console_options import ConsoleOptions
from pyvmm.options import Options


@pytest.mark.parametrize(
    "args",
    [["--drive", "help"], ["--help", "drive"], ["--help", "--drive"], ["-drive", "help"], ["-drive", "?"],
     ["--drive=help"], ["-h", "drive"]],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("verb", ["run", "qtest"])
def test_the_options_of_a_drive(capsys: pytest.CaptureFixture[str], verb: str, args: list[str]) -> None:
    assert main([verb, *args]) == 0
    shown = capsys.readouterr().out
    for words, meaning in drive_words():
        assert words in shown
        assert " ".join(meaning.split()) in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 120


def test_every_option_of_a_drive_is_told() -> None:
    told = " ".join(f"{words} {meaning}" for words, meaning in drive_words())
    names = {word.strip(",.:;[]()").partition("=")[0] for word in told.split()}
    assert [word for row in DriveOptions.rows.values() for word in row.words if word not in names] == []
    assert "force-share" in names
    assert [name for name, row in DriveOptions.rows.items() if not row.words] == []


@pytest.mark.parametrize("name", ["memory", "cpus", "kernel", "serial", "m", "M", "snapshot"])
def test_any_option(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["run", "--help", name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("  -")
    assert len(shown.splitlines()) <= 3


@pytest.mark.parametrize(
    ("option", "options"), [("console", ConsoleOptions), ("balloon", BalloonOptions)], ids=["console", "balloon"]
)
def test_what_has_words_of_its_own(
    capsys: pytest.CaptureFixture[str], option: str, options: type[Options]
) -> None:
    assert main(["run", f"--{option}", "help"]) == 0
    shown = capsys.readouterr().out
    for row in options.rows.values():
        assert " ".join(row.help.split()) in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 120


def test_devices_and_features(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-device", "help"]) == 0
    assert "--testdev" in capsys.readouterr().out
    assert main(["run", "-cpu", "help"]) == 0
    shown = capsys.readouterr().out.split()
    assert {"xsave", "sse4.2", "kvmclock"} <= set(shown)


def test_no_such_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help", "nosuch"]) == 2
    assert "`pyvmm run --help`" in capsys.readouterr().err
