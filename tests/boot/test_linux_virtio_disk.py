"""A stock Debian kernel with its root on a virtio disk: over mmio and PCI, with split and packed queues; fio with its
data verified, many requests in flight; and what is there afterwards."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import boot_assets
import disk_images
import pytest
from console import Console
from test_linux_disk import check_file_system

BOOT_S = 150.0  # on the lab's clock
FIO_RUN_S = int(os.environ.get("PYVMM_FIO_S", "5"))  # of each kind
FIO_S = 900.0
ROOT_MIB = 220
DATA_MIB = 64
APPEND = "console=ttyS0 quiet panic=-1"

INITRD_INIT = """\
n=0
while [ ! -b /dev/vda ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
mount -t ext4 /dev/vda /mnt || { dmesg; poweroff -f; }
exec switch_root /mnt /sbin/init
"""

# On the disk. `seconds=` of the kernel's command line says how long fio is to run on the second disk, of each kind.
ROOT_INIT = """\
#!/bin/busybox sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
echo "root: $(grep '^/dev/vda ' /proc/mounts)"
bus=$(readlink -f /sys/block/vda/device/..)
echo "transport: $(basename $(readlink $bus/driver))"
echo "features: $(cat /sys/block/vda/device/features)"
echo "entropy: $(cat /sys/class/misc/hw_random/rng_current) $(dd if=/dev/hwrng bs=4096 count=4 2>/dev/null | wc -c)"
echo "serial: $(cat /sys/block/vdb/serial)"
echo "queues: $(ls /sys/block/vdb/mq | wc -l)"
echo "blocks: $(cat /sys/block/vdb/queue/logical_block_size) $(cat /sys/block/vdb/queue/physical_block_size)"
dd if=/dev/zero of=/zeros bs=1M count=16 conv=fsync 2>/dev/null
md5sum /zeros /lib64/* | md5sum > /sums
sync
seconds=$(sed -n 's/.*seconds=\\([0-9]*\\).*/\\1/p' /proc/cmdline)
verify="--filename=/dev/vdb --ioengine=libaio --direct=1 --iodepth=32 --verify=crc32c --verify_fatal=1 --randrepeat=0"
jobs="--numjobs=4 --size=16m --offset_increment=16m --time_based --runtime=$seconds --group_reporting"
for kind in randwrite write; do
    /bin/fio --name=$kind --rw=$kind --bs=4k $verify $jobs --verify_backlog=64 --fsync=100 > /tmp/fio.txt 2>&1
    echo "fio $kind: $?"
    grep -E 'err=|verify|IOPS' /tmp/fio.txt | head -5
done
blkdiscard -z /dev/vdb 2>/dev/null || dd if=/dev/zero of=/dev/vdb bs=1M count=64 oflag=direct 2>/dev/null
cmp -n 1048576 /dev/vdb /dev/zero
echo "zeroed: $?"
echo "errors: $(dmesg | grep -cE 'I/O error|EXT4-fs error|virtio.*(error|failed)')"
mount -o remount,ro /
echo "over: $?"
poweroff -f
"""


def libraries(program: str) -> list[Path]:
    """What ldd says that a program of this machine is linked with."""
    told = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", told)]


def make_root(directory: Path) -> Path:
    """An ext4 image with busybox, fio and what that is linked with, and /sbin/init."""
    tree = directory / "tree"
    for name in ("bin", "sbin", "dev", "proc", "sys", "tmp", "lib64", "lib/x86_64-linux-gnu"):
        (tree / name).mkdir(parents=True)
    (tree / "bin/busybox").write_bytes(boot_assets.busybox().read_bytes())
    (tree / "bin/busybox").chmod(0o755)
    applets = subprocess.run([boot_assets.busybox(), "--list"], check=True, capture_output=True, text=True)
    for applet in applets.stdout.split():
        if applet != "busybox":
            (tree / "bin" / applet).symlink_to("busybox")
    fio = shutil.which("fio")
    assert fio is not None, "fio is missing: run ci/setup test"
    shutil.copy(fio, tree / "bin/fio")
    for library in libraries(fio):
        where = "lib64" if "ld-linux" in library.name else "lib/x86_64-linux-gnu"
        shutil.copy(os.path.realpath(library), tree / where / library.name)
    (tree / "sbin/init").write_text(ROOT_INIT)
    (tree / "sbin/init").chmod(0o755)
    image = directory / "root.img"
    disk_images.ext4(image, tree, ROOT_MIB)
    return image


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.parametrize(("machine", "ring"), [("microvm", "split"), ("pc", "packed")])
def test_root_on_a_virtio_disk(
    tmp_path: Path, guest_console: Callable[..., Console], machine: str, ring: str
) -> None:
    image, data = make_root(tmp_path), tmp_path / "data.img"
    data.write_bytes(b"\x55" * (DATA_MIB << 20))
    kernel = boot_assets.kernel("generic")
    modules = kernel.modules("virtio_mmio", "virtio_pci", "virtio_blk", "virtio-rng", "crc32c_generic", "ext4")
    initrd = boot_assets.initrd(INITRD_INIT, tmp_path, modules)
    drives = [f"file={image},if=virtio,index=0"]
    drives += [f"file={data},if=virtio,index=1,serial=DATA,num-queues=2,physical-block-size=4096"]
    words = [word for drive in drives for word in ("--drive", drive)]
    guest = ("--kernel", str(kernel.vmlinux), "--initrd", str(initrd), "--append", f"{APPEND} seconds={FIO_RUN_S}")
    config = tmp_path / "ring.toml"
    config.write_text(f'virtio_ring = "{ring}"\n')
    board = ("--config", str(config), "--machine", machine, "--memory", "256", "--cpus", "2", "--rng")
    with guest_console(*board, *words, *guest) as console:
        console.expect("root: ", BOOT_S)
        console.expect("fio write: ", FIO_S)
        console.expect("over: 0", BOOT_S)
        assert console.wait(BOOT_S) == 0
        output = console.output
    said = dict(line.strip().split(": ", 1) for line in output.splitlines() if ": " in line)
    assert said["root"].startswith("/dev/vda / ext4 rw"), output
    assert said["transport"] == {"microvm": "virtio-mmio", "pc": "virtio-pci"}[machine]
    assert said["features"][32] == "1"  # VIRTIO_F_VERSION_1
    assert said["features"][34] == ("1" if ring == "packed" else "0")
    name, taken = said["entropy"].split()
    assert name.startswith("virtio_rng") and int(taken) == 4 * 4096
    assert (said["serial"], said["queues"], said["blocks"]) == ("DATA", "2", "512 4096")
    assert (said["fio randwrite"], said["fio write"], said["zeroed"], said["errors"]) == ("0", "0", "0", "0"), output
    assert data.read_bytes()[: 1 << 20] == bytes(1 << 20)
    check_file_system(image)
