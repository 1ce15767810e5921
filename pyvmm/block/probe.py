"""Image files that are no raw disks, by the bytes they begin or end with: the one place that knows.

What such a file holds is not where a raw disk has it: a guest reads rubbish, and its first write may ruin the file. So
it is refused, unless the user says format=raw. A file system, a partition table or an encrypted volume (LUKS) is what
guests make of a disk, and no reason.

Where the signatures are from: the formats' own specifications (QEMU docs/interop/qcow2.txt, qed_spec.txt and
parallels.txt; VMware's Virtual Disk Format 5.0; Microsoft's VHD 1.0, "Hard Disk Footer Format", and MS-VHDX 2.2.1;
RFC 1952, 8.1 of RFC 8878, the xz, lz4 frame, lzip and ZIP specifications), for VDI, dmg, Bochs and cloop QEMU's block/.
"""

from __future__ import annotations

HEAD_BYTES = 512
TAIL_BYTES = 512

QCOW = b"QFI\xfb"
VDI_SIGNATURE = 0xBEDA_107F
VDI_AT = 0x40
VHD = b"conectix"
VMDK_TEXT = b"# disk descriptorfile"
ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # behind 0x50 to 0x5f

# (begins with, what it is called, how its content comes out of it)
DISKS = (
    (b"QED\0", "QED", "qed"),
    (b"KDMV", "VMDK", "vmdk"),  # a sparse extent
    (b"COWD", "VMDK", "vmdk"),  # one of VMware 3 and ESX
    (VHD, "VHD", "vpc"),  # dynamic and differencing: a copy of the footer
    (b"vhdxfile", "VHDX", "vhdx"),
    (b"WithoutFreeSpace", "Parallels", "parallels"),
    (b"WithouFreSpacExt", "Parallels", "parallels"),
    (b"Bochs Virtual HD Image", "Bochs", "bochs"),
    (b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop", "cloop"),
)
PACKED = (
    (b"\x1f\x8b\x08", "gzip", "gzip -dc"),  # 8: deflate, the only method there is
    (b"\xfd7zXZ\0", "xz", "xz -dc"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc"),
    (b"\x02\x21\x4c\x18", "lz4", "lz4 -dc"),  # the legacy frame
    (b"LZIP\x01", "lzip", "lzip -dc"),
    (b"\x89LZO\0\r\n\x1a\n", "lzop", "lzop -dc"),
    (b"\x1f\x9d", "compress", "gzip -dc"),
    (b"PK\x03\x04", "zip", "unzip -p"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "7z x -so"),
)
BZIP2_BLOCKS = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")  # behind BZh and a digit: a block, or the end of an empty file


def not_raw(head: bytes, tail: bytes) -> tuple[str, str] | None:
    """(format, command) of a file that begins with ``head`` and ends with ``tail`` (512 bytes each, or all there are):
    what it is, and what makes a raw image OUT of the file IN. None where nothing says that it is not raw."""
    disk = disk_format(head, tail)
    if disk is not None:
        name, driver = disk
        return name, f"qemu-img convert -f {driver} -O raw IN OUT"
    packed = packed_format(head)
    if packed is not None:
        name, command = packed
        return name, f"{command} IN > OUT"
    return None


def disk_format(head: bytes, tail: bytes) -> tuple[str, str] | None:
    """(format, qemu-img's word for it)."""
    if head.startswith(QCOW):
        return ("QCOW1", "qcow") if head[4:8] == b"\0\0\0\1" else ("qcow2", "qcow2")
    if int.from_bytes(head[VDI_AT : VDI_AT + 4], "little") == VDI_SIGNATURE:
        return "VDI", "vdi"
    if begins_descriptor(head):
        return "VMDK", "vmdk"
    for signature, name, driver in DISKS:
        if head.startswith(signature):
            return name, driver
    # A fixed VHD is the disk with a footer behind it, of 512 bytes, or 511 by versions before Virtual PC 2004.
    if tail.startswith(VHD) or tail[1:].startswith(VHD):
        return "VHD", "vpc"
    if tail.startswith(b"koly\0\0\0\4"):
        return "dmg", "dmg"
    return None


def begins_descriptor(head: bytes) -> bool:
    """A VMDK of which this file has only the description: text, perhaps with comments and empty lines before."""
    for line in head.split(b"\n"):
        text = line.strip().lower()
        if text == VMDK_TEXT:
            return True
        if text and not text.startswith(b"#"):
            return False
    return False


def packed_format(head: bytes) -> tuple[str, str] | None:
    """(format, what writes its content to standard output)."""
    for signature, name, command in PACKED:
        if head.startswith(signature):
            return name, command
    if head[:3] == b"BZh" and head[3:4] in b"123456789" and head[4:10] in BZIP2_BLOCKS:
        return "bzip2", "bzip2 -dc"
    if head[:1] and head[0] >> 4 == 5 and head[1:4] == ZSTD_SKIPPABLE:
        return "zstd", "zstd -dc"
    return None


def refusal(path: str, head: bytes, tail: bytes) -> str | None:
    """The sentence for a file that is no raw image."""
    found = not_raw(head, tail)
    if found is None:
        return None
    name, command = found
    out = f"{path}.raw"
    drive = "file={},format=raw".format(path.replace(",", ",,"))
    words = [{"IN": quoted(path), "OUT": quoted(out)}.get(word, word) for word in command.split()]
    return (
        f"the image {path} is in the format {name}, no raw disk: convert it, {' '.join(words)}, or give format=raw"
        f" (--drive {quoted(drive)}) if its bytes are the disk as they are"
    )


def quoted(path: str) -> str:
    """As a shell takes it."""
    import shlex

    return shlex.quote(path)
