"""``pyvmm list``, ``qmp`` and ``save``: the running machines of this user, by their names (control/registry.py)."""

from __future__ import annotations

import json
import os
import sys
import time

from pyvmm.cli.options import Option, parse, usage
from pyvmm.cli.say import say
from pyvmm.control.qmp_client import NoAnswer, QmpClient, QmpRefused
from pyvmm.control.registry import Registry
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

HELP = Option("--help -h", "", "this")
STATUS_REFUSED = 1  # by the machine
GREETING_LIMIT_S = 10.0  # for a process that runs at all
LIST_LIMIT_S = 2.0  # for one that does not answer
ASKED = ("query-status", "query-cpus-fast", "query-memory-size-summary")

LIST_TITLE = """\
usage: pyvmm list [--json]

The running machines of this user that have a name (pyvmm run --name NAME): name, process, state, vCPUs, memory, and how
long they have run."""
LIST_OPTIONS = (Option("--json", "", "as JSON, with bytes and seconds"), HELP)

QMP_TITLE = """\
usage: pyvmm qmp NAME COMMAND [KEY=VALUE ... | JSON]

One QMP command to a running machine, and what it returns as JSON. VALUE is JSON, or else a string; arguments may also
be one JSON object. `pyvmm qmp NAME query-commands` lists the commands. Exit status 1 where the machine refuses it."""

SAVE_TITLE = """\
usage: pyvmm save NAME FILE [--base FILE]

Save a running machine to a file that `pyvmm run --restore FILE` goes on from; it runs on."""
SAVE_OPTIONS = (Option("--base", "FILE", "write only what differs from this snapshot of it, which is needed too"), HELP)


def connected(name: str) -> QmpClient:
    """To a running machine of that name. ConfigError where there is none, or it does not answer."""
    client = None
    try:
        client = QmpClient(Registry().find(name), GREETING_LIMIT_S)
        client.greet()
    except NoAnswer as error:
        if client is not None:
            client.close()
        raise ConfigError(f"machine {name}: {error}") from None
    return client


# -- list --------------------------------------------------------------------------------------------------------------


def list_machines(args: list[str]) -> int:
    given = parse(LIST_OPTIONS, args, verb="list")
    if "help" in given:
        print(usage(LIST_TITLE, LIST_OPTIONS), end="")
        return 0
    machines = looked_at(Registry())
    if given.get("json"):
        print(json.dumps(machines, indent=2))
        return 0
    rows = [("NAME", "PID", "STATE", "VCPUS", "MEMORY", "UPTIME"), *map(row, machines)]
    widths = [max(len(cells[n]) for cells in rows) for n in range(len(rows[0]))]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    return 0


def looked_at(registry: Registry) -> list[dict[str, Any]]:
    """What each of them is doing. All are asked before the first answer is waited for, and for all there is one time:
    one that does not answer holds up nobody else.
    """
    asked: list[tuple[dict[str, Any], QmpClient | None]] = []
    for name in registry.names():
        path = registry.qmp_path(name)
        entry: dict[str, Any] = {"name": name, "pid": None, "state": "silent", "vcpus": None, "memory-bytes": None}
        client = None
        try:
            entry["uptime-s"] = max(0, round(time.time() - os.lstat(path).st_mtime))
            client = QmpClient(path, LIST_LIMIT_S)
            for command in ASKED:
                client.send(command)
            entry["pid"] = client.pid
        except NoAnswer:
            pass
        except FileNotFoundError:  # it has ended meanwhile
            continue
        asked.append((entry, client))
    end = time.monotonic() + LIST_LIMIT_S
    for entry, client in asked:
        if client is not None:
            with client:
                client.limit_s = max(0.05, end - time.monotonic())
                try:
                    status, cpus, memory = client.receive(), client.receive(), client.receive()
                    entry |= {"state": status["status"], "vcpus": len(cpus), "memory-bytes": memory["base-memory"]}
                except (NoAnswer, QmpRefused):
                    pass
    return [entry for entry, _ in asked]


def row(entry: dict[str, Any]) -> tuple[str, ...]:
    memory = "-" if entry["memory-bytes"] is None else f"{entry['memory-bytes'] >> 20}M"
    cells = (entry["name"], entry["pid"] or "-", entry["state"], entry["vcpus"] or "-", memory)
    return (*map(str, cells), duration(entry["uptime-s"]))


def duration(seconds: int) -> str:
    """3s, 12m05s, 7h03m, 12d04h."""
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02}h"
    if hours:
        return f"{hours}h{m:02}m"
    return f"{m}m{s:02}s" if minutes else f"{s}s"


# -- qmp ---------------------------------------------------------------------------------------------------------------


def qmp(args: list[str]) -> int:
    if not args or args[0] in ("--help", "-h"):
        print(QMP_TITLE)
        return 0
    if len(args) < 2:
        raise ConfigError("pyvmm qmp NAME COMMAND: give a command, as query-status")
    name, command, *words = args
    arguments = arguments_of(words)
    with connected(name) as client:
        client.limit_s = None  # a command may take as long as it takes
        try:
            client.send(command, arguments)
            result = client.receive()
        except QmpRefused as refused:
            say(json.dumps({"error": refused.error}))
            return STATUS_REFUSED
        except NoAnswer as error:
            if command == "quit":  # and so it has
                result = {}
            else:
                raise ConfigError(f"machine {name}: {error}") from None
    print(json.dumps(result, indent=2))
    return 0


def arguments_of(words: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE of each, or one JSON object. ConfigError."""
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        try:
            whole = json.loads(words[0])
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{words[0]}: that is no JSON: {error}") from None
        assert isinstance(whole, dict)
        return whole
    arguments: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r}: give arguments as KEY=VALUE, or all of them as one JSON object")
        try:
            arguments[key] = json.loads(value)
        except (ValueError, RecursionError):
            arguments[key] = value
    return arguments


# -- save --------------------------------------------------------------------------------------------------------------


def save(args: list[str]) -> int:
    if "--help" in args or "-h" in args or not args:
        print(usage(SAVE_TITLE, SAVE_OPTIONS), end="")
        return 0
    words = []
    rest = list(args)
    while rest and not rest[0].startswith("-"):
        words.append(rest.pop(0))
    given = parse(SAVE_OPTIONS, rest, verb="save")
    if len(words) != 2:
        raise ConfigError("pyvmm save NAME FILE: give the machine's name and the file")
    name, path = words
    arguments = {"filename": os.path.abspath(path)}
    if "base" in given:
        arguments["base"] = os.path.abspath(given["base"])
    with connected(name) as client:
        client.limit_s = None
        try:
            saved = client.ask("snapshot-save", **arguments)
        except (QmpRefused, NoAnswer) as error:
            told = error.error.get("desc") if isinstance(error, QmpRefused) else error
            print(f"pyvmm: machine {name}: {told}", file=sys.stderr)
            return STATUS_REFUSED
    stood_ms = saved["stood-ns"] / 1e6
    print(f"{path}: {saved['written-bytes'] / (1 << 20):.1f} MiB written, the guest stood {stood_ms:.1f} ms")
    return 0
