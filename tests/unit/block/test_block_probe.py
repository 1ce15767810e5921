"""Files that are no raw images: refused in one sentence with the way out, unless the user says format=raw.

The bytes are the formats' own (see pyvmm/block/probe.py), made by Python's compressors where it has one.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shlex
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from block_drives import read, write

from pyvmm.block import BlockBackend, DriveOptions
from pyvmm.block.probe import not_raw
from pyvmm.errors import ConfigError

Open = Callable[..., BlockBackend]
MIB = 1 << 20
DISK = bytes(range(256)) * 4096


def refused(drive: Open, path: Path, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        drive(path, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "or give format=raw" in sentence
    return sentence


def zipped(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("disk.img", DISK)
    return path.read_bytes()


HEADS = [
    ("QCOW1", "qemu-img convert -f qcow ", b"QFI\xfb\0\0\0\1"),
    ("QED", "-f qed ", b"QED\0"),
    ("VMDK", "-f vmdk ", b"KDMV\1\0\0\0"),
    ("VMDK", "-f vmdk ", b"COWD\1\0\0\0"),
    ("VMDK", "-f vmdk ", b"# Disk DescriptorFile\nversion=1\n"),
    ("VMDK", "-f vmdk ", b"\n# a comment\n  # Disk DescriptorFile\r\nversion=1\n"),
    ("VDI", "-f vdi ", b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe"),
    ("VHD", "-f vpc ", b"conectix\0\0\0\2"),
    ("VHDX", "-f vhdx ", b"vhdxfile"),
    ("Parallels", "-f parallels ", b"WithoutFreeSpace"),
    ("Parallels", "-f parallels ", b"WithouFreSpacExt"),
    ("Bochs", "-f bochs ", b"Bochs Virtual HD Image"),
    ("cloop", "-f cloop ", b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0"),
    ("gzip", "gzip -dc ", gzip.compress(DISK)),
    ("xz", "xz -dc ", lzma.compress(DISK)),
    ("zstd", "zstd -dc ", b"\x28\xb5\x2f\xfd\x04\x58"),
    ("zstd", "zstd -dc ", b"\x53\x2a\x4d\x18\x04\0\0\0"),  # a skippable frame first, as pzstd writes
    ("bzip2", "bzip2 -dc ", bz2.compress(DISK)),
    ("bzip2", "bzip2 -dc ", bz2.compress(b"")),
    ("lz4", "lz4 -dc ", b"\x04\x22\x4d\x18\x64\x40"),
    ("lz4", "lz4 -dc ", b"\x02\x21\x4c\x18"),
    ("lzip", "lzip -dc ", b"LZIP\x01\x0c"),
    ("lzop", "lzop -dc ", b"\x89LZO\0\r\n\x1a\n"),
    ("compress", "gzip -dc ", b"\x1f\x9d\x90"),
    ("7z", "7z x -so ", b"7z\xbc\xaf\x27\x1c\0\4"),
]


@pytest.mark.parametrize(("name", "command", "head"), HEADS)
@pytest.mark.parametrize(
    "options", [{}, {"read_only": True}, {"media": "cdrom"}, {"cache": "none"}, {"snapshot": True}]
)
def test_what_begins_so(
    drive: Open, tmp_path: Path, name: str, command: str, head: bytes, options: dict[str, object]
) -> None:
    path = tmp_path / "my disk"
    content = head.ljust(8192, b"\0")
    path.write_bytes(content)
    sentence = refused(drive, path, **options)
    assert sentence.startswith(f"the image {path} is in the format {name}, no raw disk: convert it, ")
    assert command in sentence
    assert f"'{path}'" in sentence  # the command can be pasted
    assert path.read_bytes() == content


def test_zip(drive: Open, tmp_path: Path) -> None:
    path = tmp_path / "disk.zip"
    zipped(path)
    assert "is in the format zip" in refused(drive, path)
    assert f"unzip -p {path} > {path}.raw" in refused(drive, path)


@pytest.mark.parametrize(("footer", "name"), [(512, "VHD"), (511, "VHD")])
def test_a_fixed_vhd_by_its_footer(drive: Open, tmp_path: Path, footer: int, name: str) -> None:
    path = tmp_path / "fixed.vhd"
    path.write_bytes(bytes(MIB) + b"conectix".ljust(footer, b"\0"))
    assert f"is in the format {name}" in refused(drive, path)
    assert "is in the format VHD" in refused(drive, path, cache="none")


def test_a_dmg_by_its_trailer(drive: Open, tmp_path: Path) -> None:
    path = tmp_path / "disk.dmg"
    path.write_bytes(bytes(MIB) + b"koly\0\0\0\4\0\0\2\0".ljust(512, b"\0"))
    assert "qemu-img convert -f dmg -O raw" in refused(drive, path)


def test_format_raw_is_the_users_word(drive: Open, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"QFI\xfb\0\0\0\3".ljust(4096, b"\0"))
    backend = drive(path, format="raw")
    assert read(backend, 0, 1).startswith(b"QFI\xfb")
    assert write(backend, 0, b"x" * 512) == 0
    assert DriveOptions.parse("file=x,format=raw").format == "raw"
    assert DriveOptions.parse("file=x").format is None


def test_both_remedies_can_be_pasted(drive: Open, tmp_path: Path) -> None:
    path = tmp_path / "it's, my disk"
    path.write_bytes(gzip.compress(DISK))
    sentence = refused(drive, path)
    convert = sentence.partition("convert it, ")[2].partition(", or give")[0]
    subprocess.run(convert, shell=True, check=True)
    assert read(drive(f"{path}.raw"), 0, 2) == DISK[:1024]
    word = shlex.split(sentence.partition("(--drive ")[2].partition(") if its bytes")[0])
    (spec,) = word
    options = DriveOptions.parse(spec)
    assert (options.file, options.format) == (str(path), "raw")


def test_behind_blkdebug_too(drive: Open, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"QED\0".ljust(4096, b"\0"))
    assert f"the image {path} is in the format QED" in refused(drive, f"blkdebug::{path}")  # type: ignore[arg-type]


def boot_sector(code: bytes) -> bytes:
    return code.ljust(510, b"\0") + b"\x55\xaa" + bytes(3 * 512)


@pytest.mark.parametrize(
    "content",
    [
        bytes(4096),
        boot_sector(b"\xeb\x3c\x90mkfs.fat"),
        boot_sector(b"\xfa\x33\xc0\x8e\xd0"),
        b"LUKS\xba\xbe\0\2".ljust(4096, b"\0"),  # what a guest makes of its disk itself
        b"hsqs".ljust(4096, b"\0"),
        b"\x1f\x8b\x00".ljust(512, b"\0"),  # no gzip method
        b"BZh0".ljust(512, b"\0"),
        b"BZh9 hello".ljust(512, b"\0"),
        b"# Disk".ljust(512, b"\0"),
        b"hello # Disk DescriptorFile\n".ljust(512, b"\0"),
        b"KDM".ljust(512, b"\0"),
        b"x".ljust(1024, b"\0") + b"xxconectix".ljust(512, b"\0"),  # no footer begins there
        b"\x7fELF".ljust(512, b"\0"),
    ],
)
def test_disks_are_none_of_them(drive: Open, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(content)
    assert drive(path, read_only=True).inserted


def test_short_files() -> None:
    for data in (b"", b"Q", b"BZh", b"\x5f", b"#"):
        assert not_raw(data, data) is None
