"""The files that guests boot from are what they claim to be."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import boot_assets
import pytest
from elftools.elf.elffile import ELFFile

from pyvmm.x86.bzimage import extract_vmlinux

XEN_ELFNOTE_PHYS32_ENTRY = 18


def test_vmlinux_is_an_elf_image_with_the_pvh_entry(cloud_kernel: boot_assets.Kernel) -> None:
    with open(cloud_kernel.vmlinux, "rb") as file:
        elf = ELFFile(file)
        assert elf["e_machine"] == "EM_X86_64"
        notes = [note for segment in elf.iter_segments("PT_NOTE") for note in segment.iter_notes()]
    assert [note for note in notes if note["n_name"] == "Xen" and note["n_type"] == XEN_ELFNOTE_PHYS32_ENTRY]


@pytest.mark.parametrize("flavour", ["cloud", "generic"])
def test_both_extractors_agree(flavour: str) -> None:
    bzimage = boot_assets.kernel(flavour).bzimage.read_bytes()
    assert boot_assets.extract_vmlinux(bzimage) == extract_vmlinux(bzimage)


def test_modules_come_after_what_they_depend_on() -> None:
    # Of the generic kernel: what the cloud kernel has built in differs from release to release.
    kernel = boot_assets.kernel("generic")
    names = [path.name.split(".ko")[0] for path in kernel.modules("virtio_net", "ata-piix", "ext4", "i8042")]
    assert names.index("failover") < names.index("net_failover") < names.index("virtio_net")
    assert names.index("scsi_mod") < names.index("libata") < names.index("ata_piix")
    assert names.index("jbd2") < names.index("ext4")
    assert len(names) == len(set(names))
    assert "i8042" not in names  # built in


def test_a_module_that_is_not_there_is_named(cloud_kernel: boot_assets.Kernel) -> None:
    with pytest.raises(boot_assets.MissingAssetError, match="no module no_such_thing"):
        cloud_kernel.modules("no-such-thing")


def test_busybox_reads_the_archive(make_initrd: Callable[..., Path], tmp_path: Path) -> None:
    initrd = make_initrd("echo hello\n", files={"opt/data/numbers": b"12345", "opt/tool": b"#!/bin/sh\n"})
    into = tmp_path / "unpacked"
    into.mkdir()
    unpack = [boot_assets.busybox(), "cpio", "-idm"]
    subprocess.run(unpack, input=initrd.read_bytes(), cwd=into, check=True, capture_output=True)
    assert (into / "opt/data/numbers").read_bytes() == b"12345"
    assert (into / "opt/tool").stat().st_mode & 0o111
    assert (into / "init").read_text().endswith("echo hello\n")
    assert (into / "bin/mount").readlink() == Path("busybox")
    # Only root may make a device file, so it is looked up in the archive: its kind, and its number, which stands before
    # its name (c_rdevmajor and c_rdevminor of cpio's "new ASCII" format, then c_namesize and c_check).
    data = initrd.read_bytes()
    listed = subprocess.run([boot_assets.busybox(), "cpio", "-tv"], input=data, capture_output=True)
    assert re.search(rb"^crw-.* dev/console$", listed.stdout, re.M), listed.stdout
    assert re.search(rb"0{7}50{7}1[0-9A-Fa-f]{16}dev/console\0", data)
