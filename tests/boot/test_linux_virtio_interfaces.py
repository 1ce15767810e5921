"""Stock Linux drives virtio functions with one interface only: no legacy one, or no modern one (virtio 1.2, 4.1.2)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import boot_assets
import pytest
from console import Console

BOOT_S = 200.0  # on the lab's clock
DATA_BYTES = 4 << 20
# What Linux takes of a device shows in its features: bit 32 is VERSION_1.
INIT = """\
n=0
while [ ! -b /dev/vda ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
for each in /sys/bus/virtio/devices/*; do
    function=$(basename $(readlink -f $each/..))
    echo "device $(cat $each/device) $(cat /sys/bus/pci/devices/$function/device) $(cut -c33 $each/features)"
done
echo "disk $(md5sum < /dev/vda)"
dd if=/dev/urandom of=/tmp/data bs=1M count=1 2> /dev/null
dd if=/tmp/data of=/dev/vda bs=64k seek=16 conv=fsync,notrunc 2> /dev/null
echo "wrote $(md5sum < /tmp/data)"
echo "random $(dd if=/dev/hwrng bs=4096 count=4 2> /dev/null | wc -c)"
echo "over: 0"
poweroff -f
"""
# Of a block device and an entropy device: what Linux calls it, and its PCI number (4.1.2.1, 4.1.2.3).
KINDS = {"0x0002": (0x1001, 0x1042), "0x0004": (0x1005, 0x1044)}


@pytest.mark.lab
@pytest.mark.parametrize("interface", ["modern", "legacy"])
def test_one_interface_only(tmp_path: Path, guest_console: Callable[..., Console], interface: str) -> None:
    kernel = boot_assets.kernel("cloud")
    modules = kernel.modules("virtio_pci", "virtio_blk", "virtio-rng")
    initrd = boot_assets.initrd(INIT, tmp_path, modules)
    image = tmp_path / "disk.img"
    before = os.urandom(DATA_BYTES)
    image.write_bytes(before)
    without = "--virtio-disable-legacy" if interface == "modern" else "--virtio-disable-modern"
    guest = ("--kernel", str(kernel.vmlinux), "--initrd", str(initrd), "--append", "console=ttyS0 quiet panic=-1")
    board = ("--machine", "pc", "--memory", "192", "--rng", without, "on")
    with guest_console(*board, "--drive", f"file={image},if=virtio", *guest) as console:
        console.expect("over: 0", BOOT_S)
        assert console.wait(BOOT_S) == 0
        output = console.output
    lines = [line.split() for line in output.splitlines() if line.strip()]
    said = {line[0]: line[1] for line in lines if len(line) > 1}
    modern = interface == "modern"
    there = {line[1]: (int(line[2], 16), line[3]) for line in lines if line[0] == "device"}
    assert there == {kind: (ids[modern], "1" if modern else "0") for kind, ids in KINDS.items()}, output
    assert said["disk"] == hashlib.md5(before).hexdigest()
    after = image.read_bytes()
    assert said["wrote"] == hashlib.md5(after[1 << 20 : 2 << 20]).hexdigest()
    assert after[: 1 << 20] + after[2 << 20 :] == before[: 1 << 20] + before[2 << 20 :]
    assert said["random"] == str(4 * 4096)
