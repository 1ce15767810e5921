"""An option that is added in one place shows in all its faces."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.block import DriveOptions
from pyvmm.cli.options import from_rows, parse, usage
from pyvmm.cli.topics import topic_text
from pyvmm.config import MachineConfig
from pyvmm.config_file import from_file
from pyvmm.errors import ConfigError
from pyvmm.options import FLAG, option, whole, word
from pyvmm.spec import Spec


class Fridge(Spec):
    """A machine that keeps cool."""

    cooling: str = option(
        word("air", "water", "none", unset="none", note="there is no ice"), "air", "how it is kept cool",
        cli="--cooling")  # fmt: skip
    shelves: int = option(whole(least=1, most=9), 3, "how many things it holds", cli="--shelves -s", metavar="N")
    light: bool = option(FLAG, False, "a light in it", cli="--light")


def test_argument_attribute_and_default() -> None:
    fridge = Fridge(flat=b"\xf4", cooling="water")  # type: ignore[call-arg]  # static names are MachineOptions'
    assert (fridge.cooling, fridge.shelves, fridge.light) == ("water", 3, False)
    assert Fridge(flat=b"\xf4", cooling="none").cooling is None  # type: ignore[call-arg]
    assert (fridge.memory_mib, fridge.machine) == (256, "microvm")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("cooling", "ice", "cooling='ice': use air, water or none: there is no ice"),
        ("cooling", 5, "cooling=5: use air, water or none: there is no ice"),
        ("shelves", 0, "shelves=0: give a whole number from 1 to 9"),
        ("shelves", True, "shelves=True: give a whole number from 1 to 9"),
        ("light", "on", "light='on': give True or False"),
        ("colling", "air", "there is no option 'colling': did you mean cooling?"),
    ],
)
def test_it_is_checked(name: str, value: object, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Fridge(flat=b"\xf4", **{name: value})  # type: ignore[arg-type]
    assert str(caught.value) == sentence


def test_the_docstring() -> None:
    text = Fridge.__doc__ or ""
    assert text.startswith("A machine that keeps cool.\n\n")
    text = " ".join(text.split())
    assert "cooling air, water or none: how it is kept cool (default 'air')" in text
    assert "light a light in it" in text
    assert "memory_mib RAM" in text
    assert "cooling" not in (MachineConfig.__doc__ or "")


def test_the_command_line_and_its_help() -> None:
    options = from_rows(Fridge)
    given = parse(options, ["--cooling", "water", "-s", "0x5", "--light", "--flat", "x"], verb="cool")
    assert given == {"cooling": "water", "shelves": 5, "light": True, "flat": "x"}
    assert Fridge(**given).shelves == 5  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="--shelves x: that is no N"):
        parse(options, ["--shelves", "x"], verb="cool")
    assert "  --shelves, -s N               how many things it holds (default 3)\n" in usage("t", options)
    assert topic_text("light", options) == "  --light                       a light in it\n"


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "fridge.toml"
    path.write_text('cooling = "water"\nshelves = 2\nlight = true\n')
    assert from_file(str(path), Fridge) == {"cooling": "water", "shelves": 2, "light": True}
    with pytest.raises(ConfigError, match=r"fridge.toml:1: there is no option 'cooling'"):
        from_file(str(path))


def test_the_specification() -> None:
    fridge = Fridge(flat="x", shelves=2)  # type: ignore[call-arg]
    data = fridge.plain()
    assert (data["shelves"], data["cooling"]) == (2, "air")
    assert Fridge.from_plain(data) == fridge
    assert Fridge.from_plain({**data, "shelves": 3}) != fridge


class Crate(DriveOptions):
    """A drive in a crate."""

    wood: str = option(word("oak", "pine"), "oak", "what the crate is made of", words="crate-wood cw")


def test_a_word_of_a_drive() -> None:
    assert Crate.parse("file=x,crate-wood=pine").wood == Crate.parse("file=x,cw=pine").wood == "pine"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="drive option wood='elm': use oak or pine"):
        Crate.parse("file=x,cw=elm")
    with pytest.raises(ConfigError, match="a drive has no option 'cw'"):
        DriveOptions.parse("file=x,cw=oak")


def test_defaults_are_values_of_their_kind() -> None:
    for options in (MachineConfig, DriveOptions, Fridge, Crate):
        for name, row in options.rows.items():
            assert row.kind.take(name, row.default) == row.default
            assert row.kind.unplain(name, row.kind.plain(row.default), {}) in (row.default, [])


def test_an_option_is_explained_in_a_clause() -> None:
    for options in (MachineConfig, DriveOptions):
        for row in options.rows.values():
            assert row.help == " ".join(row.help.split())
            assert not row.help.endswith(".")


def test_attributes_that_are_no_options_can_not_be_set() -> None:
    config = MachineConfig(flat=b"\xf4")
    with pytest.raises(ConfigError, match="there is no option 'memroy_mib': did you mean memory_mib"):
        config.memroy_mib = 4  # type: ignore[attr-defined]
