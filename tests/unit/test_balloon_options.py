"""What a user may say about the memory balloon, in all the ways there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pyvmm
from pyvmm.balloon_options import BalloonOptions
from pyvmm.config import MachineConfig
from pyvmm.config_file import from_file
from pyvmm.errors import ConfigError, StateError
from pyvmm.spec import Spec


def test_words() -> None:
    assert BalloonOptions.parse("0") == BalloonOptions()
    assert BalloonOptions.parse("512") == BalloonOptions.parse("512M") == BalloonOptions(512)
    assert BalloonOptions.parse("2g").mib == 2048
    full = BalloonOptions.parse("1G,deflate-on-oom=on,free-page-reporting=yes")
    assert full == BalloonOptions(1024, deflate_on_oom=True, free_page_reporting=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "begin with a size"),
        ("M", "begin with a size"),
        ("1.5G", "begin with a size"),
        ("deflate-on-oom=on", "begin with a size"),
        ("-1", "a number of MiB"),
        ("1,deflate-on-oom", "has no value"),
        ("1,deflate-on-oom=maybe", "use on or off"),
        ("1,deflate-on-omm=on", "did you mean deflate-on-oom"),
        ("1,mib=2", "no option 'mib'"),
    ],
)
def test_words_that_can_not_be(words: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        BalloonOptions.parse(words)


@pytest.mark.parametrize("value", [0, "0", BalloonOptions()])
def test_the_ways_to_say_it(value: Any) -> None:
    assert Spec(flat=b"\xf4", balloon=value).balloon == BalloonOptions()


@pytest.mark.parametrize("value", [None, "none"])
def test_no_balloon(value: Any) -> None:
    spec = Spec(flat=b"\xf4", balloon=value)
    assert (spec.balloon, spec.wants_virtio) == (None, False)


@pytest.mark.parametrize("value", [-1, 1.5, True, b"1", [1]])
def test_what_it_can_not_be(value: Any) -> None:
    with pytest.raises(ConfigError, match="give a number of MiB"):
        Spec(flat=b"\xf4", balloon=value)


def test_what_does_not_go_together() -> None:
    with pytest.raises(ConfigError, match="a balloon of 256 MiB leaves nothing of 256 MiB of memory: take less"):
        MachineConfig(flat=b"\xf4", balloon=256)
    with pytest.raises(ConfigError, match="pages that the host has set aside are not given back"):
        MachineConfig(flat=b"\xf4", balloon=0, huge_pages="2M")
    assert MachineConfig(flat=b"\xf4", balloon=0, huge_pages="transparent").balloon == 0


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text('balloon = "64M,free-page-reporting=on"\n')
    assert Spec(flat=b"\xf4", **from_file(str(path))).balloon == BalloonOptions(64, free_page_reporting=True)
    path.write_text("balloon = 64\n")
    assert Spec(flat=b"\xf4", **from_file(str(path))).balloon == BalloonOptions(64)


def test_written_down_and_read_again() -> None:
    spec = Spec(kernel="k", balloon="64M,deflate-on-oom=on")
    data = json.loads(json.dumps(spec.plain()))
    assert data["balloon"].items() >= {"mib": 64, "deflate_on_oom": True, "free_page_reporting": False}.items()
    assert Spec.from_plain(data) == spec
    assert Spec.from_plain(json.loads(json.dumps(Spec(kernel="k").plain()))).balloon is None


def test_a_machine_without_one() -> None:
    with pyvmm.Machine(machine="microvm", accel="qtest", memory_mib=16) as m:
        for call in (lambda: m.set_balloon(1), lambda: m.balloon_stats()):
            with pytest.raises(StateError, match="has no balloon, give it balloon=0"):
                call()


@pytest.mark.parametrize("mib", [-1, 16, 1.5, True, "1"])
def test_what_it_can_not_be_set_to(mib: Any) -> None:
    with (
        pyvmm.Machine(machine="microvm", accel="qtest", memory_mib=16, balloon=0) as m,
        pytest.raises(ConfigError, match="give a whole number of MiB, from 0 to 15"),
    ):
        m.set_balloon(mib)
