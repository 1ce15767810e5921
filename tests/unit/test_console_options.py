"""What a user may say about a virtio console, and where it is then."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pyvmm.chardev import NullChardev
from pyvmm.cli.run import configure
from pyvmm.console_options import MOST_PORTS, ConsoleOptions, console_options, numbered, with_terminal
from pyvmm.errors import ConfigError
from pyvmm.spec import Spec


def test_words() -> None:
    assert ConsoleOptions.parse("stdio") == ConsoleOptions("stdio")
    port = ConsoleOptions.parse("pty,name=org.qemu.guest_agent.0")
    assert (port.where, port.name) == ("pty", "org.qemu.guest_agent.0")
    assert ConsoleOptions.parse("file:/tmp/a,,b=c,name=log") == ConsoleOptions("file:/tmp/a,b=c", name="log")
    assert ConsoleOptions.parse("none").where is None
    end = NullChardev()
    assert console_options(end).where is end
    assert console_options(print) == ConsoleOptions(print)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "use none, stdio, pty or file:PATH"),
        ("tcp:1", "use none, stdio, pty or file:PATH"),
        ("name=a", "use none, stdio, pty or file:PATH"),
        ("pty,name", "has no value"),
        ("pty,nam=a", "did you mean name"),
        ("pty,where=stdio", "no option 'where'"),
        ("pty,name=", "give a file name"),
        ("pty,name=a/b", "give a file name"),
        ("pty,name=a b", "give a file name"),
        ("pty,name=.a", "give a file name"),
        ("pty,name=ä", "give a file name"),
        ("pty,name=" + "x" * 101, "at most 100"),
        ("pty,name=serial", "another console's"),
        ("pty,name=hvc1", "another console's"),
    ],
)
def test_words_that_can_not_be(words: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ConsoleOptions.parse(words)


@pytest.mark.parametrize(
    ("consoles", "places"),
    [
        (["pty", "pty,name=a", "pty"], [(0, "hvc0"), (1, "a"), (2, "hvc1")]),
        (["pty,name=a", "pty,name=b", "pty"], [(1, "a"), (2, "b"), (0, "hvc0")]),
        (["pty,name=a"], [(1, "a")]),
        ([], []),
    ],
)
def test_places(consoles: list[str], places: list[tuple[int, str]]) -> None:
    made = numbered([ConsoleOptions.parse(words) for words in consoles])
    assert [(number, label) for number, label, _ in made] == places


def test_places_that_can_not_be() -> None:
    with pytest.raises(ConfigError, match="two consoles with name=a: give each its own"):
        Spec(flat=b"\xf4", consoles=["none,name=a", "pty,name=a"])
    with pytest.raises(ConfigError, match="at most 31 ports"):
        Spec(flat=b"\xf4", consoles=[f"none,name=n{n}" for n in range(MOST_PORTS)])
    assert len(Spec(flat=b"\xf4", consoles=["none"] * MOST_PORTS).consoles) == MOST_PORTS


@pytest.mark.parametrize("value", ["pty", 5, None])
def test_no_list(value: Any) -> None:
    with pytest.raises(ConfigError, match="give a list of consoles"):
        Spec(flat=b"\xf4", consoles=value)


@pytest.mark.parametrize("value", [5, b"pty", NullChardev])
def test_no_console(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"use none, stdio, pty, file:PATH|give an instance of it"):
        Spec(flat=b"\xf4", consoles=[value])


def test_written_down_and_read_again() -> None:
    heard: list[bytes] = []
    spec = Spec(kernel="k", consoles=["pty", ConsoleOptions(heard.append, name="agent")])
    data = json.loads(json.dumps(spec.plain()))
    assert data["consoles"] == [{"where": "pty", "name": None}, {"where": {"given": "object"}, "name": "agent"}]
    with pytest.raises(ConfigError, match=r"consoles\[1\] was an object of the process"):
        Spec.from_plain(data)
    assert Spec.from_plain(data, {"consoles": ["none", heard.append]}) == spec
    restored = with_terminal(data["consoles"])
    assert restored == [ConsoleOptions("pty"), ConsoleOptions("stdio", name="agent")]
    assert with_terminal(data["consoles"][:1]) is None
    for hostile in (None, 5, [5], [{}], {"where": 1}):
        assert with_terminal(hostile) is None


def test_one_that_has_the_terminal_takes_the_serial_ports_place() -> None:
    """As with cloud-hypervisor: --serial stdio says otherwise."""
    assert configure({"flat": "x"}).serial == "stdio"
    assert configure({"flat": "x", "consoles": ["pty"]}).serial == "stdio"
    assert configure({"flat": "x", "consoles": ["pty,name=a", "stdio"]}).serial == "none"
    assert configure({"flat": "x", "consoles": ["stdio"], "serial": "stdio"}).serial == "stdio"
    with pytest.raises(ConfigError, match="use none, stdio, pty or file:PATH"):
        configure({"flat": "x", "consoles": ["studio"]})
