"""A stock Debian kernel with its root on an IDE disk: DMA by its ata_piix driver, PIO, and what is there afterwards."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import boot_assets
import disk_images
import pytest
from console import Console

BOOT_S = 120.0  # on the lab's clock
MOVE_S = 300.0
DISK_MIB = 200
APPEND = "console=ttyS0 quiet panic=-1"

FILE_BYTES = 4 << 20
DMA_FILES = 8  # 34 MB
PIO_FILES = 1  # 4 MB

# From the RAM disk to the file system on the disk.
INITRD_INIT = """\
n=0
while [ ! -b /dev/sda ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
mount -t ext4 /dev/sda /mnt || { dmesg; poweroff -f; }
exec switch_root /mnt /sbin/init
"""

# On the disk. `tasks=` of the kernel's command line says what to do: "DIRECTORY:FILES" writes that many and reads them,
# "DIRECTORY" reads. Every file is the noise rotated by its number of times 4099 bytes.
ROOT_INIT = """\
#!/bin/busybox sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
echo "root: $(grep '^/dev/sda ' /proc/mounts)"
echo "transfer mode: $(cat /sys/class/ata_device/dev1.0/xfer_mode)"
echo "controller: $(basename $(readlink /sys/bus/pci/devices/0000:00:01.1/driver))"
for task in $(sed -n 's/.*tasks=\\([^ ]*\\).*/\\1/p' /proc/cmdline | tr , ' '); do
    directory=/${task%:*}
    if [ "$task" != "${task%:*}" ]; then
        mkdir $directory
        n=0
        while [ $n -lt ${task#*:} ]; do
            { tail -c +$((n * 4099 + 1)) /noise; head -c $((n * 4099)) /noise; } > $directory/$n
            n=$((n + 1))
        done
        sync
        echo 3 > /proc/sys/vm/drop_caches
    fi
    md5sum $directory/*
done
echo "errors: $(dmesg | grep -cE 'ata[0-9].*(exception|failed|error|timeout)|EXT4-fs error')"
mount -o remount,ro /
echo "over: $?"
poweroff -f
"""


def make_root(directory: Path) -> Path:
    """An ext4 image with busybox, the noise and /sbin/init."""
    tree = directory / "tree"
    for name in ("bin", "sbin", "dev", "proc", "sys"):
        (tree / name).mkdir(parents=True)
    (tree / "bin/busybox").write_bytes(boot_assets.busybox().read_bytes())
    (tree / "bin/busybox").chmod(0o755)
    applets = subprocess.run([boot_assets.busybox(), "--list"], check=True, capture_output=True, text=True)
    for applet in applets.stdout.split():
        if applet != "busybox":
            (tree / "bin" / applet).symlink_to("busybox")
    (tree / "noise").write_bytes(noise())
    (tree / "sbin/init").write_text(ROOT_INIT)
    (tree / "sbin/init").chmod(0o755)
    image = directory / "root.img"
    disk_images.ext4(image, tree, DISK_MIB)
    return image


@functools.cache
def noise() -> bytes:
    return disk_images.seeded("test_linux_disk", FILE_BYTES)


def sums(directory: str, files: int) -> set[str]:
    """md5sum's lines for what the guest has been told to write."""
    found = set()
    for n in range(files):
        at = n * 4099 % FILE_BYTES
        found.add(f"{hashlib.md5(noise()[at:] + noise()[:at]).hexdigest()}  /{directory}/{n}")
    return found


class Booted:
    """What one boot said."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.lines = [line.strip() for line in output.splitlines()]
        self.said = dict(line.split(": ", 1) for line in self.lines if ": " in line)
        self.sums = {line for line in self.lines if len(line.split("  /")[0]) == 32}


def boot(
    guest_console: Callable[..., Console], image: Path, initrd: Path, tasks: Iterable[str], append: str = ""
) -> Booted:
    """To the power-off, which must be an orderly one."""
    guest = ("--kernel", str(boot_assets.kernel("generic").vmlinux), "--initrd", str(initrd))
    board = ("--machine", "pc", "--memory", "256", "--drive", f"file={image}")
    with guest_console(*board, *guest, "--append", f"{APPEND} {append} tasks={','.join(tasks)}") as console:
        console.expect("transfer mode: ", BOOT_S)
        console.expect("over: 0", MOVE_S)
        assert console.wait(BOOT_S) == 0
        return Booted(console.output)


def check_file_system(image: Path) -> None:
    """On the host: nothing to repair, nothing to replay."""
    checked = subprocess.run(["/sbin/e2fsck", "-f", "-n", str(image)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "journal" not in checked.stderr


def in_the_image(image: Path, name: str, directory: Path) -> set[str]:
    """md5sum's lines for the files of one folder, by the host's tools."""
    subprocess.run(["/sbin/debugfs", "-R", f"rdump /{name} {directory}", str(image)], capture_output=True, check=True)
    files = (directory / name).iterdir()
    return {f"{hashlib.md5(file.read_bytes()).hexdigest()}  /{name}/{file.name}" for file in files}


@pytest.mark.lab
@pytest.mark.slow
def test_root_on_an_ide_disk(tmp_path: Path, guest_console: Callable[..., Console]) -> None:
    """4 MB by PIO (libata.dma=0), read by DMA in the next boot; 34 MB by DMA, there afterwards; a clean file system."""
    directory = tmp_path
    image = make_root(directory)
    initrd = boot_assets.initrd(
        INITRD_INIT, directory, boot_assets.kernel("generic").modules("ata_piix", "sd_mod", "crc32c_generic", "ext4")
    )

    by_pio = boot(guest_console, image, initrd, [f"pio:{PIO_FILES}"], "libata.dma=0")
    assert by_pio.said["transfer mode"].startswith("XFER_PIO"), by_pio.output
    assert by_pio.said["errors"] == "0", by_pio.output
    assert by_pio.sums == sums("pio", PIO_FILES)
    check_file_system(image)

    by_dma = boot(guest_console, image, initrd, [f"dma:{DMA_FILES}", "pio"])
    assert by_dma.said["root"].startswith("/dev/sda / ext4 rw"), by_dma.output
    assert by_dma.said["controller"] == "ata_piix"
    assert "DMA" in by_dma.said["transfer mode"]
    assert by_dma.said["errors"] == "0", by_dma.output
    assert by_dma.sums == sums("dma", DMA_FILES) | sums("pio", PIO_FILES)
    check_file_system(image)
    assert in_the_image(image, "dma", directory) == sums("dma", DMA_FILES)
