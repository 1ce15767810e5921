"""What firmware is told about booting, in QEMU's -boot words, and the machine's UUID: in fw_cfg and CMOS.

The values are those of QEMU's boot-order-test and fw_cfg-test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyvmm import ConfigError, Machine
from pyvmm.cli.options import parse
from pyvmm.cli.run import OPTIONS, configure
from pyvmm.devices import fw_cfg as keys
from pyvmm.devices.fw_cfg import FwCfg

UUID = "4600cb32-38ec-4b2f-8acb-81c6ea54f2d8"
DISK, CD = b"/pci@i0cf8/ide@1,1/drive@0/disk@0", b"/pci@i0cf8/ide@1,1/drive@1/disk@0"


def board(**options: Any) -> Machine:
    return Machine(accel="qtest", memory_mib=4, **options)


def order(m: Machine) -> int:
    """Both bytes as boot-order-test reads them."""
    values = []
    for index in (0x38, 0x3D):
        m.pio.write(0x70, 1, index)
        values.append(m.pio.read(0x71, 1))
    return values[0] | values[1] << 8


def item(m: Machine, key: int) -> bytes:
    device = m.devices["fw_cfg"]
    assert isinstance(device, FwCfg)
    return device.content(key)


def files(m: Machine) -> dict[str, bytes]:
    directory = item(m, keys.FILE_DIR)
    found = {}
    for at in range(4, len(directory), 64):
        name = directory[at + 8 : at + 64].rstrip(b"\0").decode()
        found[name] = item(m, int.from_bytes(directory[at + 4 : at + 6], "big"))
        assert len(found[name]) == int.from_bytes(directory[at : at + 4], "big")
    return found


@pytest.mark.parametrize(
    ("words", "boot", "reboot"),
    [
        (None, 0x1230, 0x1230),
        (["c"], 0x0200, 0x0200),
        (["nda"], 0x3410, 0x3410),
        (["order="], 0, 0),
        (["order=", "order=c"], 0x0200, 0x0200),
        (["once=a"], 0x0100, 0x1230),
        (["once=a,order=c"], 0x0100, 0x0200),
        (["once=d", "order=nda"], 0x0300, 0x3410),
        (["once=a", "once=b", "once=c"], 0x0200, 0x1230),
    ],
)
def test_boot_order_test(words: list[str] | None, boot: int, reboot: int) -> None:
    args = ["--firmware", "x", *(part for each in words or () for part in ("--boot", each))]
    config = configure(parse(OPTIONS, args, verb="run", words="images"))
    with board(boot=config.boot) as m:
        assert order(m) == boot
        m.pio.write(0xCF9, 1, 6)
        assert order(m) == reboot
        m.pio.write(0x70, 1, 0x3D)
        m.pio.write(0x71, 1, 0x33)  # from now on it is the guest's
        m.pio.write(0xCF9, 1, 6)
        assert order(m) >> 8 == 0x33


def test_once_in_the_file_of_paths(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(2048))
    drives = [str(image), f"file={image},media=cdrom,index=2,locking=off"]
    with board(drives=drives, boot="cd,once=dc") as m:
        for _ in range(2):
            assert files(m)["bootorder"] == CD + b"\n" + DISK + b"\0"
        for _ in range(2):
            m.pio.write(0xCF9, 1, 6)
            assert files(m)["bootorder"] == DISK + b"\n" + CD + b"\0"


@pytest.mark.parametrize(
    ("boot", "content"),
    [
        ("cad", DISK + b"\n" + CD + b"\0"),
        ("dc", CD + b"\n" + DISK + b"\0"),
        ("d,strict=on", CD + b"\nHALT\0"),
        ("a", None),
        ("", None),
        ("a,strict=on", None),
    ],
)
def test_paths(tmp_path: Path, boot: str, content: bytes | None) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(2048))
    with board(drives=[str(image), f"file={image},media=cdrom,index=2,locking=off"], boot=boot) as m:
        assert files(m).get("bootorder") == content


@pytest.mark.parametrize(
    ("boot", "fail_wait"),
    [
        ("cad", b"\xff\xff\xff\xff"),
        ("reboot-timeout=-1", b"\xff\xff\xff\xff"),
        ("reboot-timeout=15", b"\x0f\0\0\0"),
        ("reboot-timeout=0", bytes(4)),
        ("reboot-timeout=65535", b"\xff\xff\0\0"),
    ],
)
def test_reboot_timeout(boot: str, fail_wait: bytes) -> None:
    with board(boot=boot) as m:
        assert files(m)["etc/boot-fail-wait"] == fail_wait


def test_menu_and_splash_time() -> None:
    with board() as m:
        assert item(m, keys.BOOT_MENU) == b"\0\0"
        assert "etc/boot-menu-wait" not in files(m)
    with board(boot="menu=on,splash-time=12") as m:
        assert item(m, keys.BOOT_MENU) == b"\1\0"
        assert files(m)["etc/boot-menu-wait"] == b"\x0c\0"
        assert order(m) == 0x1230


def test_uuid() -> None:
    with board() as m:
        assert item(m, keys.UUID) == bytes(16)
    plain = bytes.fromhex(UUID.replace("-", ""))
    with board(uuid=UUID) as m:
        assert item(m, keys.UUID) == plain
        # SMBIOS 2.6, 7.2.1: its first three fields are little-endian numbers.
        assert plain[3::-1] + plain[5:3:-1] + plain[7:5:-1] + plain[8:] in files(m)["etc/smbios/smbios-tables"]
    with board(machine="microvm", uuid=UUID) as m:
        assert item(m, keys.UUID) == plain


def test_the_command_takes_a_uuid() -> None:
    config = configure(parse(OPTIONS, ["--firmware", "x", "--uuid", UUID], verb="run", words="images"))
    assert config.uuid == UUID


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"boot": "cdan"}, "boot order='cdan': use up to 3 different letters of c (disk)"),
        ({"boot": "cc"}, "boot order='cc': use up to 3 different letters"),
        ({"boot": "once=z"}, "boot once='z': use up to 3 different letters"),
        ({"boot": "order=C"}, "boot order='C': use"),
        ({"boot": "menu=maybe"}, "boot menu=maybe: use on or off"),
        ({"boot": "strict=1"}, "boot strict=1: use on or off"),
        ({"boot": "splash-time=-1"}, "boot splash-time=-1: give milliseconds from 0 to 65535"),
        ({"boot": "splash-time=65536"}, "boot splash-time=65536: give milliseconds from 0 to 65535"),
        ({"boot": "splash-time=soon"}, "boot splash-time=soon: give milliseconds"),
        ({"boot": "reboot-timeout=-2"}, "boot reboot-timeout=-2: give milliseconds from 0 to 65535, or -1 for never"),
        ({"boot": "reboot-timeout=65536"}, "boot reboot-timeout=65536: give milliseconds from 0 to 65535, or -1"),
        ({"boot": "splash=x.jpg"}, "boot has no word 'splash': use order, once, menu"),
        ({"boot": 5}, "boot=5: give a string"),
        ({"boot": None}, "boot=None: give a string"),
        ({"uuid": "4600cb32"}, "UUID '4600cb32': write it as 8-4-4-4-12 hexadecimal digits"),
        ({"uuid": UUID[:-1] + "g"}, "write it as 8-4-4-4-12"),
        ({"uuid": 5}, "uuid=5: give a string of 8-4-4-4-12 hexadecimal digits"),
    ],
)
def test_mistakes_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        board(**options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
