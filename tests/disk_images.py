"""Disks and CDs that tests boot, made on the host: no installer runs, in a guest or here, and nothing is mounted.

Debian's boot loaders come out of the cache (see boot_assets and ci/setup); each function writes one image file:

    disk_images.grub_legacy(path)   # MBR, FAT16 partition with files, GRUB 0.97 in the gap before it
    disk_images.grub2(path)         # the same partition, GRUB 2.06 with a small core
    disk_images.grub_cd(path)       # ISO 9660 with El Torito and GRUB 2
    disk_images.handoff(path)       # syslinux's boot sector that prints what the BIOS hands over
    disk_images.program(path, asm)  # a boot sector of ours, and the sectors it loads

Each is small and sparse where nothing is written, and the same again in the next run.

References: GRUB 0.97's manual, "Embedded data" (the layout of stage1 and stage2); GRUB 2's
grub-core/boot/i386/pc/{boot,diskboot}.S for the places that grub-bios-setup fills; El Torito 1.0.
"""

from __future__ import annotations

import functools
import hashlib
import os
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import asm
import boot_assets

SECTOR = 512
MIB = 1 << 20
PARTITION_SECTOR = 2048  # where partitions begin: room for a boot loader before the first
DISK_MIB = 16  # FAT16 needs more than 4084 clusters
EPOCH = 1_700_000_000  # every file's date

HELLO = "Hello from a file on the disk\n"
SERIAL_SPEED = 115200


def seeded(seed: str, size: int) -> bytes:
    """The same noise for the same seed: nothing in it repeats, so a sector in a wrong place shows."""
    return hashlib.shake_128(seed.encode()).digest(size)


ONE_BYTES = 256 << 10  # many tracks
OTHER_AT = 200_001


def files() -> dict[str, bytes]:
    """What is on every FAT partition and CD."""
    one = seeded("one", ONE_BYTES)
    other = bytearray(one)
    other[OTHER_AT] ^= 1
    lines = [seeded(f"line {n}", 30).hex() for n in range(200)]  # some sectors that a loader can print
    return {
        "hello.txt": HELLO.encode(),
        "noise.txt": "\n".join([*lines, ""]).encode(),
        "one.bin": one,
        "same.bin": one,
        "other.bin": bytes(other),
        "kernel": boot_assets.multiboot_kernel().read_bytes(),
    }


# ---- partitions and file systems -----------------------------------------------------------------


def write_mbr(disk: Path, boot_code: bytes, kind: int = 0x0E) -> None:
    """The boot sector with one active partition, from PARTITION_SECTOR to the end of the disk.

    Its type 0x0e is FAT16 by LBA; the CHS fields say that LBA counts.
    """
    sectors = disk.stat().st_size // SECTOR - PARTITION_SECTOR
    no_chs = b"\xfe\xff\xff"
    entry = struct.pack("<B3sB3sII", 0x80, no_chs, kind, no_chs, PARTITION_SECTOR, sectors)
    sector = boot_code[:440].ljust(440, b"\0") + struct.pack("<IH", 0x50564D4D, 0) + entry + bytes(48) + b"\x55\xaa"
    with disk.open("r+b") as image:
        image.write(sector)


def write_at(disk: Path, sector: int, data: bytes) -> None:
    with disk.open("r+b") as image:
        image.seek(sector * SECTOR)
        image.write(data)


def mtools(command: str, *args: str | Path) -> None:
    tool = boot_assets.package("mtools") / "usr/bin/mtools"
    env = {**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH), "MTOOLS_SKIP_CHECK": "1", "TZ": "UTC"}
    # The tool goes by the name it is called by.
    subprocess.run([command, *args], executable=tool, env=env, check=True)


def fat_disk(disk: Path, contents: Mapping[str, bytes]) -> None:
    """An empty disk with one FAT16 partition that holds these files, each in one piece."""
    with disk.open("wb") as image:
        image.truncate(DISK_MIB * MIB)
    write_mbr(disk, b"")
    sectors = DISK_MIB * MIB // SECTOR - PARTITION_SECTOR
    drive = f"{disk}@@{PARTITION_SECTOR * SECTOR}"
    layout = ("-T", str(sectors), "-h", "16", "-s", "63", "-H", str(PARTITION_SECTOR), "-c", "4")
    mtools("mformat", "-i", drive, "-N", "50564d4d", *layout, "::")
    folders = {str(parent) for name in contents for parent in Path(name).parents[:-1]}
    for folder in sorted(folders):
        mtools("mmd", "-i", drive, f"::{folder}")
    with tempfile.TemporaryDirectory() as directory:
        for name, data in contents.items():
            source = Path(directory, Path(name).name)
            source.write_bytes(data)
            os.utime(source, (EPOCH, EPOCH))
            mtools("mcopy", "-m", "-i", drive, source, f"::{name}")


def ext4(path: Path, tree: Path, size_mib: int, label: str = "root") -> None:
    """A file system without a partition table, filled from a directory; all of it belongs to root."""
    path.unlink(missing_ok=True)
    options = f"root_owner=0:0,hash_seed=50564d4d-0000-4000-8000-{EPOCH:012x},lazy_itable_init=0,lazy_journal_init=0"
    identity = ("-L", label, "-U", f"50564d4d-0000-4000-8000-{EPOCH:012x}")
    command = ["mke2fs", "-q", "-t", "ext4", "-E", options, *identity, "-d", str(tree), str(path), f"{size_mib}M"]
    where = os.pathsep.join(["/usr/sbin", "/sbin", os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": where, "E2FSPROGS_FAKE_TIME": str(EPOCH), "SOURCE_DATE_EPOCH": str(EPOCH)}
    subprocess.run(command, env=env, check=True)


# ---- GRUB legacy ---------------------------------------------------------------------------------

# stage2 as it comes is made to lie on sector 1 and after, as "install" of the GRUB shell would put it there: its
# block list says so. What is filled in is where its configuration is.
INSTALLED_PARTITION = 0x208  # u32: drive 0xff (the one it was booted from), subpartition 0xff, partition
CONFIG_FILE = 0x217  # a path, zero-terminated
FIRST_PARTITION = 0x0000_FFFF

MENU_LST = f"serial --unit=0 --speed={SERIAL_SPEED}\nterminal --dumb --no-edit serial\n"
GRUB_LEGACY_PROMPT = "grub> "


def grub_legacy(disk: Path) -> None:
    """GRUB 0.97 that asks for commands on the first serial port."""
    loader = boot_assets.package("grub-legacy") / "usr/lib/grub/x86_64-pc"
    if not (loader / "stage1").exists():
        raise boot_assets.LeftOutError("this Debian's package grub-legacy (13 or later) has no boot loader any more")
    stage1 = (loader / "stage1").read_bytes()
    stage2 = bytearray((loader / "stage2").read_bytes())
    struct.pack_into("<I", stage2, INSTALLED_PARTITION, FIRST_PARTITION)
    path = stage2[CONFIG_FILE:].split(b"\0", 1)[0].decode()
    assert path == "/boot/grub/menu.lst", path
    start, length, _segment = struct.unpack_from("<IHH", stage2, 0x1F8)
    assert (start, length) == (2, -(-len(stage2) // SECTOR) - 1)
    fat_disk(disk, {path[1:]: MENU_LST.encode(), **files()})
    write_mbr(disk, stage1)
    write_at(disk, 1, bytes(stage2))


# ---- GRUB 2 --------------------------------------------------------------------------------------

KERNEL_SECTOR = 0x5C  # u64 in boot.img: where the core begins
BLOCK_LIST = 0x1F4  # in the core's first sector: u64 where the rest begins, u16 sectors, u16 segment
GRUB2_PROMPT = "grub rescue> "

# Runs before the prompt. With no "normal" module there is no script language, and the core is small: unpacking a
# full one takes long where every instruction of the guest is emulated.
GRUB2_CONFIG = f"""\
serial --unit=0 --speed={SERIAL_SPEED}
terminal_input serial
terminal_output serial
"""
GRUB2_MODULES = ("serial", "terminal", "cat")


def grub_mkimage(kind: str, prefix: str, modules: tuple[str, ...]) -> bytes:
    return _grub_mkimage(boot_assets.CACHE, kind, prefix, modules)


@functools.cache
def _grub_mkimage(_cache: Path, kind: str, prefix: str, modules: tuple[str, ...]) -> bytes:
    (libraries,) = (boot_assets.package("libdevmapper1.02.1")).glob("**/x86_64-linux-gnu")
    with tempfile.TemporaryDirectory() as directory:
        config, core = Path(directory, "config"), Path(directory, "core")
        config.write_text(GRUB2_CONFIG)
        command: list[str | Path] = [
            boot_assets.package("grub-common") / "usr/bin/grub-mkimage",
            "-d", grub2_directory(), "-O", kind, "-p", prefix, "-c", config, "-o", core, *modules,
        ]  # fmt: skip
        subprocess.run(command, env={**os.environ, "LD_LIBRARY_PATH": str(libraries)}, check=True)
        return core.read_bytes()


def grub2_directory() -> Path:
    return boot_assets.package("grub-pc-bin") / "usr/lib/grub/i386-pc"


def grub2(disk: Path) -> None:
    """GRUB 2.06 that asks for commands on the first serial port; `nativedisk pata` finds its modules on the disk."""
    directory = grub2_directory()
    modules = ("biosdisk", "part_msdos", "fat", "nativedisk", *GRUB2_MODULES)
    core = bytearray(grub_mkimage("i386-pc", "(hd0,msdos1)/grub", modules))
    sectors = -(-len(core) // SECTOR)
    struct.pack_into("<Q", core, BLOCK_LIST, 2)
    assert struct.unpack_from("<HH", core, BLOCK_LIST + 8) == (sectors - 1, 0x820)
    assert sectors < PARTITION_SECTOR
    boot = bytearray((directory / "boot.img").read_bytes())
    struct.pack_into("<Q", boot, KERNEL_SECTOR, 1)
    native = {f"grub/i386-pc/{name}.mod": (directory / f"{name}.mod").read_bytes() for name in NATIVE_MODULES}
    fat_disk(disk, {**files(), **native})
    write_mbr(disk, bytes(boot))
    write_at(disk, 1, bytes(core))


NATIVE_MODULES = ("scsi", "ata", "pci", "pata")


def grub_cd(path: Path) -> None:
    """GRUB 2.06 on a CD, started by El Torito without emulation."""
    import io

    import pycdlib

    core = grub_mkimage("i386-pc-eltorito", "(cd)/grub", ("biosdisk", "iso9660", *GRUB2_MODULES))
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, vol_ident="PYVMM", rock_ridge="1.09")
    iso.add_directory("/BOOT", rr_name="boot")
    contents = {"boot/core.img": core, **files()}
    for name, data in contents.items():
        upper = name.upper()
        iso.add_fp(
            io.BytesIO(data), len(data), f"/{upper}{'' if '.' in upper else '.'};1", rr_name=Path(name).name
        )
    # The first 2 KiB sector is loaded and started; it finds the rest by the table that is written into it.
    iso.add_eltorito("/BOOT/CORE.IMG;1", boot_load_size=4, boot_info_table=True, bootcatfile="/BOOT/BOOT.CAT;1")
    iso.write(str(path))
    iso.close()


# ---- boot sectors --------------------------------------------------------------------------------


def handoff(disk: Path) -> None:
    """syslinux's handoff.bin prints the registers and the partition entry that it was started with."""
    code = boot_assets.package("syslinux-common") / "usr/lib/syslinux/mbr/diag/handoff/handoff.bin"
    with disk.open("wb") as image:
        image.truncate(4 * MIB)
    write_mbr(disk, code.read_bytes())


def program(disk: Path, code: asm.Program, size_mib: int = 4) -> None:
    """Real-mode code linked at 0x7c00 whose first sector is the boot sector; the rest lies on the sectors after."""
    assert code.image[510:512] == b"\x55\xaa", "the boot sector has no signature"
    with disk.open("wb") as image:
        image.write(code.image)
        image.truncate(size_mib * MIB)
