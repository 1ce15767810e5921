"""What QMP's commands give and do, on a pc without a vCPU: drives, cards, memory, the bus, the tree, the monitor."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qmp_peer import QmpPeer

from pyvmm import Machine
from pyvmm.block.image_tool import create
from pyvmm.control.qmp.table import COMMANDS

MIB = 1 << 20
NO_LIMITS = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    (tmp_path / "disk.img").write_bytes(b"d" * MIB)
    (tmp_path / "virtio.img").write_bytes(b"v" * MIB)
    (tmp_path / "one.iso").write_bytes(b"1" * 2048 * 100)
    (tmp_path / "two.iso").write_bytes(b"2" * 2048 * 200)
    with Machine(
        accel="qtest",
        memory_mib=4,
        drives=[
            tmp_path / "disk.img",
            f"file={tmp_path}/virtio.img,if=virtio,id=v",
            f"file={tmp_path}/one.iso,media=cdrom,id=cd",
        ],
        nets=[f"unix={tmp_path}/net.sock,server=on,mac=02:00:00:00:00:01"],
        consoles=["none"],
        balloon=0,
    ) as made:
        made.serve_qmp(tmp_path / "qmp.sock")
        yield made


@pytest.fixture
def peer(machine: Machine, tmp_path: Path) -> Iterator[QmpPeer]:
    with QmpPeer(tmp_path / "qmp.sock") as it:
        yield it


def test_what_is_returned_is_what_the_schema_says(peer: QmpPeer) -> None:
    asked = 0
    for name, command in COMMANDS.items():
        if name.startswith("query-"):
            arguments = {"target": "vm"} if name == "query-stats" else {}
            command.returns.take("", peer.get(name, **arguments))
            asked += 1
    assert asked >= 19


# Drives


def by_name(answer: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {each["device"]: each for each in answer}


def test_drives(peer: QmpPeer, machine: Machine, tmp_path: Path) -> None:
    drives = by_name(peer.get("query-block"))
    assert list(drives) == ["ide0-hd0", "cd", "v"]
    assert drives["v"]["inserted"]["image"]["virtual-size"] == MIB
    assert drives["v"]["inserted"]["file"] == f"{tmp_path}/virtio.img"
    assert not drives["v"]["removable"]
    assert drives["cd"]["inserted"]["ro"]
    assert (drives["cd"]["tray_open"], drives["cd"]["locked"]) == (False, False)
    done: list[int] = []
    machine.backends["v"].aio_readv(0, [bytearray(512)], done.append)
    machine.drain()
    stats = by_name(peer.get("query-blockstats"))["v"]["stats"]
    assert (stats["rd_operations"], stats["rd_bytes"], done) == (1, 512, [0])


def test_an_image_that_stands_on_others(tmp_path: Path) -> None:
    (tmp_path / "base.img").write_bytes(bytes(MIB))
    create(f"{tmp_path}/middle.qcow2", "qcow2", None, backing="base.img", backing_format="raw")
    create(f"{tmp_path}/top.qcow2", "qcow2", None, backing="middle.qcow2", backing_format="qcow2")
    with Machine(accel="qtest", memory_mib=4, drives=[f"file={tmp_path}/top.qcow2,if=virtio,id=d"]) as made:
        made.serve_qmp(tmp_path / "qmp.sock")
        with QmpPeer(tmp_path / "qmp.sock") as peer:
            answer = peer.get("query-block")
            COMMANDS["query-block"].returns.take("", answer)
            told = answer[0]["inserted"]
            assert (told["backing_file"], told["backing_file_depth"]) == (f"{tmp_path}/middle.qcow2", 2)
            lines = peer.get("human-monitor-command", command_line="info block")
            assert f"Backing file: {tmp_path}/middle.qcow2 (chain depth: 2)" in lines
    image, names = told["image"], []
    qemus = json.loads(
        subprocess.run(
            ["qemu-img", "info", "--output=json", "--backing-chain", tmp_path / "top.qcow2"],
            check=True, capture_output=True,
        ).stdout
    )  # fmt: skip
    for theirs in qemus:
        names.append(image["filename"])
        below = image.pop("backing-image", {})
        assert image["format"] == theirs["format"]
        same = image.keys() & theirs.keys() - {"format-specific", "actual-size"}
        assert {"filename", "virtual-size"} <= same
        assert {name: image[name] for name in same} == {name: theirs[name] for name in same}
        if "format-specific" in theirs and theirs["format"] == "qcow2":
            assert image["format-specific"]["data"].items() <= theirs["format-specific"]["data"].items()
        image = below
    assert names == [f"{tmp_path}/{name}" for name in ("top.qcow2", "middle.qcow2", "base.img")]


def read_cd(machine: Machine) -> bytes:
    """The first byte of the disc that is in the drive."""
    data = bytearray(2048)
    machine.backends["cd"].aio_readv(0, [data], lambda ret: None)
    machine.drain()
    return bytes(data[:1])


def test_a_disc_comes_out_and_another_goes_in(peer: QmpPeer, machine: Machine, tmp_path: Path) -> None:
    peer.get("blockdev-change-medium", id="cd", filename=f"{tmp_path}/two.iso")  # the event loop has begun
    peer.events.clear()
    before = len(os.listdir("/proc/self/fd"))
    assert peer.get("eject", device="cd") == {}
    assert peer.event("DEVICE_TRAY_MOVED")["data"] == {"device": "cd", "id": "cd", "tray-open": True}
    drive = by_name(peer.get("query-block"))["cd"]
    assert "inserted" not in drive
    assert drive["tray_open"]
    assert len(os.listdir("/proc/self/fd")) < before
    for name, byte in (("two", b"2"), ("one", b"1"), ("two", b"2")):
        peer.get("blockdev-change-medium", id="cd", filename=f"{tmp_path}/{name}.iso")
        assert read_cd(machine) == byte
    assert by_name(peer.get("query-block"))["cd"]["inserted"]["file"] == f"{tmp_path}/two.iso"
    assert len(os.listdir("/proc/self/fd")) == before
    assert machine.config.drives[1].file == f"{tmp_path}/two.iso"  # as a snapshot has it


def test_the_guest_holds_the_tray(peer: QmpPeer, machine: Machine, tmp_path: Path) -> None:
    machine.board.units[2].locked = True
    why = "Device 'cd' is locked and force was not specified, wait for tray to open and try again"
    assert peer.error("eject", device="cd") == why
    assert peer.error("blockdev-change-medium", device="cd", filename=f"{tmp_path}/two.iso") == why
    assert read_cd(machine) == b"1"
    assert not peer.events
    peer.get("blockdev-change-medium", device="cd", filename=f"{tmp_path}/two.iso", force=True)
    assert [event["data"]["tray-open"] for event in peer.events] == [True, False]
    assert read_cd(machine) == b"2"


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({"device": "x"}, "Device 'x' not found"),
        ({"device": "v"}, "Device 'v' is not removable"),
        ({}, "Need exactly one of 'device' and 'id'"),
        ({"device": "cd", "id": "cd"}, "Need exactly one of 'device' and 'id'"),
    ],
)
def test_what_can_not_be_ejected(peer: QmpPeer, arguments: dict[str, str], desc: str) -> None:
    assert peer.error("eject", **arguments) == desc


def test_a_disc_that_is_not_there_leaves_the_old_one(peer: QmpPeer, machine: Machine, tmp_path: Path) -> None:
    assert (
        peer.error("blockdev-change-medium", device="cd", filename=__file__, format="vmdk") == "Unknown driver 'vmdk'"
    )
    assert "nothing.iso" in peer.error("blockdev-change-medium", device="cd", filename=f"{tmp_path}/nothing.iso")
    none = "Parameter 'filename' expects the path of a file"
    assert peer.error("blockdev-change-medium", device="cd", filename="a\0b") == none
    assert read_cd(machine) == b"1"
    assert not peer.events


def test_limits_of_rate(peer: QmpPeer, machine: Machine) -> None:
    answer = peer.ask("block_set_io_throttle", {"id": "v", **NO_LIMITS, "bps": 1000, "iops_wr": 7, "bps_max": 5000})
    assert answer == {"return": {}}
    about = by_name(peer.get("query-block"))["v"]["inserted"]
    assert (about["bps"], about["iops_wr"], about["bps_max"], about["iops"]) == (1000, 7, 5000, 0)
    lane = machine.backends["v"].lane()
    assert lane is None or lane.kinds == 0
    assert (
        "give the total"
        in peer.ask("block_set_io_throttle", {"id": "v", **NO_LIMITS, "bps": 1, "bps_rd": 1})["error"]["desc"]
    )
    assert peer.ask("block_set_io_throttle", {"id": "v", **NO_LIMITS}) == {"return": {}}
    assert by_name(peer.get("query-block"))["v"]["inserted"]["bps"] == 0


def test_what_waits_for_a_limit_goes_through_when_it_goes(peer: QmpPeer, machine: Machine) -> None:
    assert peer.ask("block_set_io_throttle", {"id": "v", **NO_LIMITS, "iops": 1}) == {"return": {}}
    done: list[int] = []
    for _ in range(5):  # guest time stands: all but the first wait for ever
        machine.backends["v"].aio_readv(0, [bytearray(512)], done.append)
    assert len(done) < 5
    assert peer.ask("block_set_io_throttle", {"id": "v", **NO_LIMITS}) == {"return": {}}
    machine.drain()
    assert done == [0] * 5


def test_a_disk_grows(peer: QmpPeer, tmp_path: Path) -> None:
    assert peer.get("block_resize", device="v", size=2 * MIB) == {}
    (name,) = {each["inserted"]["node-name"] for each in peer.get("query-block") if each["device"] == "v"}
    assert peer.get("block_resize", node_name=name, size=2 * MIB) == {}
    assert "exactly one" in peer.error("block_resize", size=2 * MIB)
    assert (tmp_path / "virtio.img").stat().st_size == 2 * MIB
    assert "IDE" in peer.error("block_resize", device="ide0-hd0", size=2 * MIB)


# Network, consoles, the bus


def test_the_link(peer: QmpPeer, machine: Machine) -> None:
    card: Any = machine.devices["net0"]
    assert peer.get("set_link", name="net0", up=False) == {}
    assert not card._link_wanted
    assert peer.get("set_link", name="net0", up=True) == {}
    assert card._link_wanted
    assert peer.error("set_link", name="net1", up=True) == "Device 'net1' not found"
    rounds = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
    assert peer.get("announce-self", **rounds) == peer.get("announce-self", interfaces=["net0"], id="x", **rounds) == {}
    assert "no such card" in peer.error("announce-self", interfaces=["net1"], **rounds)
    assert peer.error("announce-self", initial=50, max=550, step=1) == "Parameter 'rounds' is missing"


def test_the_filter_is_news_until_somebody_looks(peer: QmpPeer, machine: Machine) -> None:
    card: Any = machine.devices["net0"]
    for _ in range(3):
        card.filter.promisc = False
        card.filter.set_tables([b"\2\0\0\0\0\7"], None)
        if not card._filter_told:  # what a command of the guest's does
            card._filter_told = True
            card.on_filter()
    machine.events.flush()
    told = peer.get("query-rx-filter", name="net0")[0]
    assert [event["event"] for event in peer.events] == ["NIC_RX_FILTER_CHANGED"]
    assert peer.events[0]["data"] == {"name": "net0", "path": "/machine/devices/net0"}
    assert not told["promiscuous"]
    assert told["unicast-table"] == ["02:00:00:00:00:07"]
    assert told["multicast-overflow"]
    assert told["main-mac"] == "02:00:00:00:00:01"
    assert not card._filter_told


def test_consoles(peer: QmpPeer) -> None:
    assert {each["label"]: each["filename"] for each in peer.get("query-chardev")} == {"serial": "null", "hvc0": "null"}


def test_the_bus(peer: QmpPeer) -> None:
    (bus,) = peer.get("query-pci")
    devices = {each["qdev_id"]: each for each in bus["devices"]}
    bridge = devices["i440fx"]["id"]
    assert bridge == {"vendor": 0x8086, "device": 0x1237, "subsystem-vendor": 0x1AF4, "subsystem": 0x1100}
    assert devices["piix3_ide"]["class_info"] == {"class": 0x0101, "desc": "IDE controller"}
    assert [region["type"] for region in devices["blk0.pci"]["regions"]][-1] == "memory"


# Memory


def test_physical_memory_to_a_file(peer: QmpPeer, machine: Machine, tmp_path: Path) -> None:
    machine.memory.write(0x1000, b"guest")
    path = tmp_path / "memory"
    assert peer.get("pmemsave", val=0x1000, size=5000, filename=str(path)) == {}
    assert path.read_bytes() == b"guest".ljust(5000, b"\0")
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("val", "size"), [(4 * MIB, 1), (4 * MIB - 1, 2), (0xFEC0_0000, 4), (1 << 63, 1 << 40)])
def test_memory_that_is_none(peer: QmpPeer, tmp_path: Path, val: int, size: int) -> None:
    assert "neither RAM nor ROM" in peer.error("pmemsave", val=val, size=size, filename=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["", "a\0b", "/nowhere/at/all", "/dev/null", "."])
def test_files_that_are_none(peer: QmpPeer, name: str) -> None:
    desc = peer.error("pmemsave", val=0, size=1, filename=name)
    assert "Could not open" in desc or "expects the path" in desc


def test_a_pipe_that_nobody_reads_holds_up_nobody(peer: QmpPeer, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "Could not open" in peer.error("pmemsave", val=0, size=1, filename=str(tmp_path / "pipe"))


def test_the_balloon(peer: QmpPeer, machine: Machine) -> None:
    assert peer.get("query-balloon") == {"actual": 4 * MIB}
    assert peer.get("balloon", value=3 * MIB) == {}
    assert machine.board.balloon is not None
    assert machine.board.balloon.told["target_bytes"] == MIB
    peer.get("balloon", value=1 << 60)
    assert machine.board.balloon.told["target_bytes"] == 0
    machine.events.tell("balloon", actual_bytes=MIB)
    machine.events.flush()
    assert peer.event("BALLOON_CHANGE")["data"] == {"actual": 3 * MIB}


def test_no_balloon(tmp_path: Path) -> None:
    with Machine(accel="qtest", memory_mib=4) as machine:
        machine.serve_qmp(tmp_path / "plain.sock")
        with QmpPeer(tmp_path / "plain.sock") as peer:
            for name, arguments in (("query-balloon", {}), ("balloon", {"value": 1})):
                answer = peer.ask(name, arguments)
                assert answer["error"]["class"] == "DeviceNotActive"


# The tree


def test_the_tree(peer: QmpPeer, machine: Machine) -> None:
    assert [each["name"] for each in peer.get("qom-list", path="/")] == ["type", "machine"]
    assert {"name": "devices", "type": "child<container>"} in peer.get("qom-list", path="/machine")
    names = [each["name"] for each in peer.get("qom-list", path="/machine/devices")]
    assert names == ["type", *machine.devices]
    for path in ("", "/machine", *(f"/machine/{part}" for part in ("cpus", "devices", "drives", "consoles"))):
        assert "type" in [each["name"] for each in peer.get("qom-list", path=path or "/")]
    assert peer.get("qom-get", path="/", property="type") == "container"
    for name in names[1:]:
        for prop in peer.get("qom-list", path=f"/machine/devices/{name}"):
            value = peer.get("qom-get", path=f"/machine/devices/{name}", property=prop["name"])
            assert type(value) is {"string": str, "int": int, "bool": bool}[prop["type"]]
    assert peer.get("qom-get", path="/machine/devices/rtc", property="type") == "Rtc"
    assert peer.get("qom-get", path="/machine/drives/v", property="size-bytes") == MIB
    assert peer.get("qom-get", path="/machine", property="drives") == "/machine/drives"


@pytest.mark.parametrize("path", ["", "machine", "/nothing", "/machine/devices/x", "/machine/state", "/machine/", "//"])
def test_paths_that_lead_nowhere(peer: QmpPeer, path: str) -> None:
    assert peer.error("qom-list", path=path) == f"Device '{path}' not found"
    assert peer.error("qom-get", path=path, property="x") == f"Device '{path}' not found"


def test_a_property_that_there_is_none_of(peer: QmpPeer) -> None:
    assert peer.error("qom-get", path="/machine", property="x") == "Property 'pc-machine.x' not found"


# Statistics


def test_statistics_without_kvm(peer: QmpPeer) -> None:
    (result,) = peer.get("query-stats", target="vm")
    assert result == {"provider": "pyvmm", "stats": [{"name": "exits", "value": 0}, {"name": "exits-time", "value": 0}]}
    assert peer.error("query-stats", target="vm", vcpus=[]) == "Parameter 'vcpus' is unexpected"
    assert "no KVM" in peer.error("query-stats", target="vm", providers=[{"provider": "kvm"}])
    (schema,) = peer.get("query-stats-schemas")
    assert [each["name"] for each in schema["stats"]] == ["exits", "exits-time"]


# The monitor's lines


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("", ""),
        ("p 1 + 2*3", "0x7\r\n"),
        ("print/d 0-1", "-1\r\n"),
        ("p /x ~0", "0xffffffffffffffff\r\n"),
        ("p 010", "0x8\r\n"),
        ("p 7/2", "0x3\r\n"),
        ("p 1/0", "invalid expression: '1/0'\r\n"),
        ("p __import__('os')", "invalid expression: '__import__('os')'\r\n"),
        ("p 2**9999", "invalid expression: '2**9999'\r\n"),
        ("p 'a'", "invalid expression: ''a''\r\n"),
        ("p", "invalid expression: ''\r\n"),
        ("p $rip", "No CPU available\r\n"),
        ("x/4xw 0", "No CPU available\r\n"),
        ("xp/2xw 0x1000", "0000000000001000: 0x64636261 0x00000065\r\n"),
        ("xp /4cb 0x1000", "0000000000001000: 'a' 'b' 'c' 'd'\r\n"),
        ("xp/1dg 0x1000", "0000000000001000: 435475931745\r\n"),
        ("xp/q 0", "invalid char in format: 'q'\r\n"),
        ("xp 0x400000", "there is neither RAM nor ROM at 0x400000\r\n"),
        ("xp/999999 0", "999999 units: at most 16384 at once\r\n"),
        ("i/b 0x80", "portb[0x0080] = 0x00\r\n"),
        ("o/b 0x80 0x5a", ""),
        ("i 0x10000", "0x10000 is no port\r\n"),
        ("i/g 0x80", "give [/b|h|w] PORT\r\n"),
        ("o 0x80", "give [/b|h|w] PORT VALUE\r\n"),
        ("xp/9cx 0x1000", "0000000000001000: 0x61 0x62 0x63 0x64 0x65 0x00 0x00 0x00\r\n0000000000001008: 0x00\r\n"),
        ("xp/2c 0x1000", "0000000000001000: 'a' 'b'\r\n"),
        ("info nonsense", "unknown command: 'info nonsense'\r\n"),
        ("info status", "VM status: paused (prelaunch)\r\n"),
        ("info registers", "No CPU available\r\n"),
        ("quit", "unknown command: 'quit'\r\n"),
    ],
)
def test_lines(peer: QmpPeer, machine: Machine, line: str, answer: str) -> None:
    machine.memory.write(0x1000, b"abcde")
    assert peer.get("human-monitor-command", command_line=line) == answer


def test_a_port_is_the_guests_own(peer: QmpPeer) -> None:
    peer.get("human-monitor-command", command_line="o/b 0x80 0x5a")
    assert peer.get("human-monitor-command", command_line="i/b 0x80") == "portb[0x0080] = 0x5a\r\n"


def test_info(peer: QmpPeer, tmp_path: Path) -> None:
    def info(what: str) -> str:
        text = peer.get("human-monitor-command", command_line=f"info {what}")
        assert "\n" not in text.replace("\r\n", "")
        return str(text)

    assert "00000000-000000000009ffff: ram" in info("mtree")
    assert "  03f8-03ff: serial" in info("mtree")
    assert "GSI  4: low   serial" in info("irq")
    assert "imr" in info("pic")
    assert f"cd: {tmp_path}/one.iso (raw, read-only)" in info("block")
    assert "net0: unix, macaddr=02:00:00:00:00:01, link down" in info("network")
    assert "0 exits" in info("exits")
    assert "info mtree" in info("")
    assert "xp /4xw" in peer.get("human-monitor-command", command_line="help")
