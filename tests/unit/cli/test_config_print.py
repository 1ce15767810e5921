"""``--print-config`` and ``pyvmm run machine.toml``: the file of a command line makes the machine of that line."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.cli import main
from pyvmm.cli.config_given import with_file
from pyvmm.cli.config_schema import SCHEMA
from pyvmm.cli.options import Option, parse
from pyvmm.cli.run import OPTIONS, configure
from pyvmm.config import MachineConfig
from pyvmm.errors import ConfigError
from pyvmm.options import Options

WORDS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0,"), min_size=1, max_size=8)
# What an option takes that is no word, number or flag. {} stands for text, {n} for a number from 1.
TAKES: dict[str, list[str]] = {
    "drives": [
        "file={},format=raw", "file={},if=virtio,num-queues=4", "file={},cyls=4,heads=2,secs=17,trans=lba", "{}",
        "file={},throttling.bps-total={n}k,discard=off", "file={},media=cdrom", "file={},offset=512,size={n}M",
        "file={},force-share=on,werror=stop,serial=abc", "file={},logical-block-size=4096,if=virtio",
    ],
    "nets": ["none", "passt", "passt,forward=8080:80,forward=udp:5353:53,mtu=1400", "tap=t0,queues={n}", "fd={n}",
             "unix={},server=on,mac=02:00:00:00:00:0a"],
    "vsock": ["none", "cid={n}3,path={}"],
    "shares": ["none", "tag=a,path={},xattr=on", "tag=b,socket={},cache=always"],
    "boot": ["c", "order=dc,menu=on"],
    "uuid": ["12345678-1234-1234-1234-123456789abc"],
    "modules": ["{file}", "{file} {} x"],
    "memory_mib": ["2G", "{n}G"],
    "cpu": ["host", "host,-xsave"],
    "serial": ["none", "stdio", "pty", "file:{}"],
    "debugcon": ["none", "pty", "file:{}"],
    "consoles": ["none", "stdio", "pty,name=agent{n}", "file:{}"],
    "vga": ["none", "text"],
    "debug_exit": ["none", "0x501"],
    "balloon": ["none", "{n}M", "{n}M,deflate-on-oom=on,free-page-reporting=on"],
    "fw_cfg": ["opt/{n}={exists}"],
    "timeout": ["{n}", "0.5"],
    "log": ["info", "debug,file={file}"],
    "gdb": ["{n}", "unix:{file}", "{file}"],
}  # fmt: skip
LEFT_OUT = {"cloud_init", "config", "print_config", "restore", "incoming", "help"}


@st.composite
def values(draw: st.DrawFn, option: Option, exists: str) -> str:
    if option.key in TAKES:
        pattern = draw(st.sampled_from(TAKES[option.key]))
    else:
        row = MachineConfig.rows.get(option.key)
        choices = row.kind.choices if row is not None else ()
        number = row is not None and row.kind.file == "integer"
        pattern = draw(st.sampled_from(choices)) if choices else "{n}" if number else "{file}"
    word = draw(WORDS)
    file = "".join(letter for letter in word if not letter.isspace() and letter not in "=-") or "x"
    text = pattern.replace("{file}", file).replace("{exists}", exists).replace("{n}", str(draw(st.integers(1, 9))))
    return text.replace("{}", file)


@st.composite
def command_lines(draw: st.DrawFn, exists: str) -> list[str]:
    args = []
    for option in draw(st.lists(st.sampled_from([o for o in OPTIONS if o.key not in LEFT_OUT]), max_size=8)):
        if option.one and any(name in args for name in option.names):
            continue
        args.append(draw(st.sampled_from(option.names)))
        if option.metavar:
            args.append(draw(values(option, exists)))
    for _ in range(draw(st.integers(0, 1))):
        args.append(draw(st.sampled_from(["disk.img", "./b c.img"])))
    return args


def asked(args: list[str]) -> tuple[MachineConfig, dict[str, Any]]:
    """The machine, and what the command has besides."""
    given_ = parse(OPTIONS, args, verb="run", words="images")
    if any(path.endswith(".toml") for path in given_.get("images", ())):
        with_file(given_, OPTIONS)
    command = {option.key: given_.pop(option.key) for option in OPTIONS if option.file and option.key in given_}
    return configure(given_), command


def printed(args: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["run", *args, "--print-config"]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def exists(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("fw_cfg") / "content"
    path.write_bytes(b"\x00\xff")
    return str(path)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(data=st.data())
def test_the_file_of_a_command_line_is_that_command_line(
    data: st.DataObject, exists: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    args = data.draw(command_lines(exists))
    try:
        machine, command = asked(args)
    except ConfigError:
        return  # what does not go together; the next test sees that enough does
    text = printed(args)
    path = tmp_path_factory.getbasetemp() / "machine.toml"
    path.write_text(text)
    again, command_again = asked([str(path)])
    assert again == machine, text
    assert command_again == command
    validator()(tomllib.loads(text))


def test_of_two_files_of_one_name_the_later_counts(exists: str) -> None:
    args = ["--kernel", "k", "--fw-cfg", "opt/a=/dev/null", "--fw-cfg", f"opt/a={exists}"]
    assert tomllib.loads(printed(args))["fw_cfg"] == {"opt/a": exists}


@functools.cache
def validator() -> Callable[[Any], object]:
    """Of the schema that is shipped."""
    made: Callable[[Any], object] = importlib.import_module("fastjsonschema").compile(json.loads(SCHEMA.read_text()))
    return made


def each_alone(exists: str) -> Iterator[list[str]]:
    for option in OPTIONS:
        if option.key in LEFT_OUT:
            continue
        row = MachineConfig.rows.get(option.key)
        patterns = TAKES.get(option.key) or (row.kind.choices if row is not None else ()) or ["{n}" if option.metavar in
            ("N", "ADDRESS") else "{file}"]  # fmt: skip
        guest = [] if option.key in ("kernel", "flat") else ["--kernel", "k"]
        if option.key in ("flat_address", "flat_mode"):
            guest = ["--flat", "f"]
        if option.key in ("firmware", "cdrom"):
            guest = []
        for pattern in patterns if option.metavar else [""]:
            text = pattern.replace("{file}", "f").replace("{exists}", exists).replace("{n}", "1").replace("{}", "t")
            yield [*guest, option.names[0], *([text] if option.metavar else [])]


def test_each_option_by_itself(exists: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    for args in each_alone(exists):
        machine, command = asked(args)
        path.write_text(printed(args))
        assert asked([str(path)]) == (machine, command), args


def test_what_only_a_file_can_say(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text('kernel = "k"\nvirtio_ring = "packed"\nvirtio_irqfd = "off"\n')
    again = tmp_path / "again.toml"
    again.write_text(printed([str(path)]))
    assert again.read_text() == path.read_text()


# -- beside a command line ---------------------------------------------------------------------------------------------

FILE = """
kernel = "k"
cpus = 2
drives = ["a.img"]
nets = ["passt"]
[run]
qmp = ["a.sock"]
timeout = 7
"""


def test_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(FILE)
    args = ["--cpus", "4", "--net", "none", "--qmp", "b.sock", "b.img", "--snapshot"]
    for given_ in ([str(path), *args], [*args, "--config", str(path)]):
        text = printed(given_)
        told = tomllib.loads(text)
        assert (told["kernel"], told["cpus"], "nets" in told) == ("k", 4, False)
        assert told["drives"] == [{"file": "a.img", "snapshot": True}, {"file": "b.img", "snapshot": True}]
        assert told["run"] == {"qmp": ["b.sock"], "timeout": 7.0}
    assert "drives" not in tomllib.loads(printed(["--kernel", "k"]))
    assert tomllib.loads(printed([str(path), "--drive", "c.img"]))["drives"] == [{"file": "c.img"}]


@pytest.mark.parametrize(
    ("text", "args", "said"),
    [
        ("", [], "no guest: give a disk image, --kernel FILE or --flat FILE (or see `pyvmm demo`)"),
        (FILE, ["b.toml"], "two configuration files, {path} and b.toml: a machine has one, put them together"),
        (FILE, ["--restore", "x"], "--restore beside --config ({path}): the snapshot says what"),
        (FILE, ["--flat", "x"], "both a kernel and a flat binary: give one of them"),
        ("[run]\nqpm = []", [], "{path}:2: [run] has no option 'qpm': did you mean qmp?"),
        ("[run]\ntimeout = 'x'", [], "{path}:2: timeout is 'x': give a number"),
        ("[run]\nqmp = 'x'", [], "{path}:2: qmp is 'x': give a list"),
        ("[run]\nqmp = ['x',\n5]", [], "{path}:3: qmp[1] is 5: give a string"),
        ("[run]\ngdb = 'tcp:far:1'", [], "{path}:2: gdb='tcp:far:1': that is no PATH|PORT"),
        ("run = 5", [], "{path}:1: run is 5: give a table"),
        ("[run]\nwait_gdb = 'on'", [], "{path}:2: wait_gdb is 'on': give true or false"),
    ],
)
def test_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, args: list[str], said: str
) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(text)
    assert main(["run", str(path), *args]) == 2
    assert capsys.readouterr().err.startswith(f"pyvmm: {said.format(path=path)}")


def test_a_snapshot_has_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--restore", "x", "--print-config"]) == 2
    assert "--print-config beside --restore" in capsys.readouterr().err


def test_a_path_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--kernel", "a\udcffb", "--print-config"]) == 2
    assert "is no UTF-8" in capsys.readouterr().err


def test_every_class_of_options_may_be_a_table() -> None:
    """One that is added has to be in the file too."""
    tables = {row.kind.table() for row in MachineConfig.rows.values() if row.kind.table is not None}
    assert tables == {each for each in Options.__subclasses__() if each not in (MachineConfig,) and each.thing}
