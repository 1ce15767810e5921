"""Our QMP schema beside QEMU's own: what a client may count on with QEMU it may count on here."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from qmp_peer import QmpPeer

from pyvmm.control.qmp import server  # noqa: F401  # all groups of commands
from pyvmm.control.qmp.schema import made_schema

Schema = dict[str, dict[str, Any]]
# What is not as QEMU has it, by the path that ``differences`` gives it.
QEMUS = ("job-id", "tag", "vmstate", "devices")
A_FILE = "a file of ours, and no job"
ZONES = (
    *("zone_append_bytes", "zone_append_merged", "zone_append_operations", "zone_append_total_time_ns"),
    *("failed_zone_append_operations", "invalid_zone_append_operations"),
)
KNOWN = {
    "query-status: singlestep is not told": "QEMU has taken it out (9.0)",
    "query-blockstats[].stats: wr_highest_offset is not told": "nobody counts it",
    "query-block[].inserted.image.format-specific: is no union": "qcow2 is the one that has something to say",
    "query-cpus-fast[]: is no union": "there is one target",
    # Of newer ones (10.0).
    "migrate(): uri is wanted": "QEMU takes channels in its place (8.2)",
    "query-block[].inserted: active is not told": "ours are always",
    **{f"query-blockstats[].stats: {name} is not told": "no disk of ours has zones" for name in ZONES},
    **{f"snapshot-{verb}(): {name} is not taken": A_FILE for verb in ("load", "save") for name in QEMUS},
    **{f"snapshot-{verb}(): filename is wanted": A_FILE for verb in ("load", "save")},
}


@pytest.fixture(scope="module")
def qemus(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    path = tmp_path_factory.mktemp("qemu") / "qmp.sock"
    qemu = subprocess.Popen(
        [
            *("qemu-system-x86_64", "-machine", "none", "-display", "none", "-nodefaults"),
            *("-chardev", f"socket,id=q,path={path},server=on,wait=on", "-mon", "chardev=q,mode=control"),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert qemu.stdout is not None
        qemu.stdout.readline()  # it waits for a client
        with QmpPeer(path) as peer:
            return by_name(peer.get("query-qmp-schema"))
    finally:
        qemu.kill()
        qemu.communicate()


def by_name(schema: list[dict[str, Any]]) -> Schema:
    return {entry["name"]: entry for entry in schema}


def members(schema: Schema, name: str) -> Schema:
    return {each["name"]: each for each in schema[name]["members"]}


class Comparison:
    """``differences`` of one thing's schema; ``asks``: a client says it, else it is told."""

    def __init__(self, theirs: Schema, ours: Schema, *, asks: bool) -> None:
        self.theirs = theirs
        self.ours = ours
        self.asks = asks
        self.seen: set[tuple[str, str]] = set()

    def differences(self, at: str, their: str, our: str) -> Iterator[str]:
        if (their, our) in self.seen or our == "any":
            return
        self.seen.add((their, our))
        them, us = self.theirs[their], self.ours[our]
        kinds = {them["meta-type"], us["meta-type"]}
        if "variants" in them and "variants" not in us and not self.asks:
            yield f"{at}: is no union"
        if kinds == {"builtin"} and them["json-type"] != us["json-type"]:
            yield f"{at}: {them['json-type']} is {us['json-type']}"
        elif kinds == {"array"}:
            yield from self.differences(f"{at}[]", them["element-type"], us["element-type"])
        elif kinds == {"object"}:
            yield from self.of_members(at, members(self.theirs, their), members(self.ours, our))
        elif len(kinds) > 1 and not self.both_strings(them, us):
            yield f"{at}: {them['meta-type']} is {us['meta-type']}"

    @staticmethod
    def both_strings(*kinds: dict[str, Any]) -> bool:
        return all(each["meta-type"] == "enum" or each.get("json-type") == "string" for each in kinds)

    def of_members(self, at: str, theirs: Schema, ours: Schema) -> Iterator[str]:
        for name, member in theirs.items():
            if name in ours:
                yield from self.differences(f"{at}.{name}", member["type"], ours[name]["type"])
            if self.asks and "default" not in member and name not in ours:
                yield f"{at}: {name} is not taken"
            if self.asks and "default" in member and name in ours and "default" not in ours[name]:
                yield f"{at}: {name} is wanted"
            if not self.asks and "default" not in member and (name not in ours or "default" in ours[name]):
                yield f"{at}: {name} is not told"
        for name, member in ours.items():
            if self.asks and name not in theirs and "default" not in member:
                yield f"{at}: {name} is wanted"


def test_clients_of_qemus_find_what_they_know(qemus: Schema) -> None:
    ours, found, compared = by_name(made_schema()), [], 0
    for name, entry in ours.items():
        if entry["meta-type"] not in ("command", "event") or name not in qemus:
            continue
        compared += 1
        them = qemus[name]
        asked = Comparison(qemus, ours, asks=entry["meta-type"] == "command")
        found += asked.differences(f"{name}()", them["arg-type"], entry["arg-type"])
        if entry["meta-type"] == "command":
            told = Comparison(qemus, ours, asks=False)
            found += told.differences(name, them["ret-type"], entry["ret-type"])
    assert compared > 40
    new = sorted(set(found) - KNOWN.keys())
    assert not new
