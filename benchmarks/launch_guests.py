"""The guests of ``pyvmm bench launch``: one of a few instructions, and Linux with a busybox initrd.

The small one writes a byte to the first serial port with its first three instructions. Then it ends, by each of the
ways that some VMM takes for the end; or it waits for ever (``waiting``), for a look at what the VMM holds.

As ROM its first instruction is the one at the reset vector; flat, it is in real mode too; the ELF has it in 32-bit mode
(PVH) or in long mode. Linux is the same kernel file and the same initrd for all: its /init writes a line, first thing,
and powers the machine off.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.kvm.kind import kvm_kind
from pyvmm.x86 import bzimage, elf
from pyvmm_benchmarks import environment
from pyvmm_benchmarks.exit_guests import (
    ELF_HEADER,
    EM_X86_64,
    ET_EXEC,
    NOTE,
    PROGRAM_HEADER,
    PT_LOAD,
    PT_NOTE,
    XEN_ELFNOTE_PHYS32_ENTRY,
)

# mov dx, 0x3f8; mov al, '!'; out dx, al. In 32- and 64-bit mode the prefix makes it mov dx again.
SAY_REAL = bytes.fromhex("baf803 b021 ee")
SAY_WIDE = bytes.fromhex("66baf803 b021 ee")
# out 0xf4, al (isa-debug-exit); mov al, 0xfe; out 0x64, al (reset by the keyboard controller); then hlt for ever.
END = bytes.fromhex("e6f4 b0fe e664 f4 ebfd")
WAIT = bytes.fromhex("f4 ebfd")
SAID = b"!"

FLAT_MEMORY_MIB = 256
ROM_BYTES = 0x1_0000
RESET_BYTES = 16  # from the reset vector to the end
ELF_LOAD = 0x10_0000

LINUX_MEMORY_MIB = 512
APPEND = "console=ttyS0 panic=-1"
# Software KVM's emulator lacks some instructions that Linux uses where it may; and it gets to its console only if that
# is early.
SOFTWARE_APPEND = "console=ttyS0 earlyprintk=serial noxsave panic=-1"
SOFTWARE_HIDDEN = ("cx16", "xsave")
CONSOLE_TEXT = b"Linux version"
INIT_TEXT = b"pyvmm-bench: this is init"
# Linux hands words of its command line that it does not know to init, as its environment.
INIT = f"""\
#!/bin/busybox sh
echo "{INIT_TEXT.decode()}"
[ "$ending" != reboot ] || /bin/busybox reboot -f
exec /bin/busybox poweroff -f
"""
PT_INTERP = 3


class Guest(NamedTuple):
    """What is launched. The small one's files are ``name``.rom, .bin, .elf (long mode) and .pvh in ``directory``."""

    name: str
    directory: Path
    memory_mib: int
    linux: Linux | None = None

    def file(self, suffix: str) -> str:
        return str(self.directory / f"{self.name}.{suffix}")


class Linux(NamedTuple):
    """Files of a Linux guest. ``full``: this KVM runs it to its init; else to its first console messages.

    ``kernel`` is the bzImage, but where KVM is software the ELF inside: unpacking it in the guest would take a minute.
    """

    bzimage: str
    initrd: str
    append: str
    full: bool
    vmlinux: str

    @property
    def kernel(self) -> str:
        return self.bzimage if self.full else self.vmlinux


# -- the small guest ---------------------------------------------------------------------------------------------


def rom(end: bytes) -> bytes:
    """64 KiB; the guest stands at the reset vector itself."""
    return bytes(ROM_BYTES - RESET_BYTES) + (SAY_REAL + end).ljust(RESET_BYTES, b"\xf4")


def elf_image(code: bytes, *, pvh: bool) -> bytes:
    """A 64-bit ELF that is entered at its first byte, in long mode or, by its PVH note, in 32-bit mode."""
    note = NOTE.pack(4, 8, XEN_ELFNOTE_PHYS32_ENTRY, b"Xen\0", ELF_LOAD) if pvh else b""
    count = 2 if pvh else 1
    note_at = ELF_HEADER.size + count * PROGRAM_HEADER.size
    code_at = 0x1000
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    sizes = (ELF_HEADER.size, PROGRAM_HEADER.size, count, 0, 0, 0)
    header = ELF_HEADER.pack(ident, ET_EXEC, EM_X86_64, 1, ELF_LOAD, ELF_HEADER.size, 0, 0, *sizes)
    segments = PROGRAM_HEADER.pack(PT_LOAD, 7, code_at, ELF_LOAD, ELF_LOAD, len(code), len(code), 0x1000)
    if pvh:
        segments += PROGRAM_HEADER.pack(PT_NOTE, 4, note_at, 0, 0, len(note), len(note), 4)
    return (header + segments + note).ljust(code_at, b"\0") + code


def write_flat(name: str, directory: Path, end: bytes) -> Guest:
    """The small guest with that end, in all its forms."""
    guest = Guest(name, directory, FLAT_MEMORY_MIB)
    Path(guest.file("rom")).write_bytes(rom(end))
    Path(guest.file("bin")).write_bytes(SAY_REAL + end)
    Path(guest.file("elf")).write_bytes(elf_image(SAY_WIDE + end, pvh=False))
    Path(guest.file("pvh")).write_bytes(elf_image(SAY_WIDE + end, pvh=True))
    return guest


# -- Linux -------------------------------------------------------------------------------------------------------


def cpio_entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0), number: int = 0) -> bytes:
    """Linux Documentation/driver-api/early-userspace/buffer-format.rst: "newc"."""
    path = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def initrd(busybox: bytes) -> bytes:
    """An archive with busybox, the console's node, and INIT."""
    directory, executable, node = 0o40755, 0o100755, 0o20600
    parts = [
        *(cpio_entry(name, directory) for name in ("bin", "dev", "proc", "sys")),
        cpio_entry("dev/console", node, device=(5, 1)),
        cpio_entry("bin/busybox", executable, busybox, number=1),
        cpio_entry("init", executable, INIT.encode(), number=2),
        cpio_entry("TRAILER!!!", 0),
    ]
    archive = b"".join(parts)
    return archive + bytes(-len(archive) % 512)


def write_linux(directory: Path, kernel: str, busybox: str, initrd_file: str = "", append: str = "") -> Guest:
    """ConfigError, with the remedy, where a piece is missing or is not what it should be."""
    full = runs_linux()
    image, vmlinux = read(kernel, "kernel"), directory / "vmlinux"
    vmlinux.write_bytes(image if image[:4] == elf.MAGIC else bzimage.extract_vmlinux(image, kernel))
    if not initrd_file:
        path = directory / "initrd.cpio"
        path.write_bytes(initrd(static_program(busybox)))
        initrd_file = str(path)
    line = append or (APPEND if full else SOFTWARE_APPEND)
    return Guest("linux", directory, LINUX_MEMORY_MIB, Linux(kernel, initrd_file, line, full, str(vmlinux)))


def runs_linux() -> bool:
    """Whether this KVM runs a stock kernel to its init."""
    return "software" not in kvm_kind()


def read(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}: name another by --{what}") from None


def static_program(path: str) -> bytes:
    """ConfigError unless it runs with no library beside it."""
    data = read(path, "busybox")
    try:
        needs_more = any(segment.type == PT_INTERP for segment in elf.Elf(memoryview(data), path).segments)
    except ConfigError:
        needs_more = True
    if needs_more:
        raise ConfigError(f"{path} is not statically linked: install busybox-static, or name one by --busybox")
    return data


def find_kernel() -> str:
    """A checkout's cache has Debian's cloud kernel (`ci/setup test`); else the one this host runs."""
    cached = newest("linux-image-cloud-amd64/boot/vmlinuz-*")
    for path in (cached, f"/boot/vmlinuz-{os.uname().release}", "/vmlinuz"):
        if path and os.access(path, os.R_OK):
            return path
    raise ConfigError("no kernel: name a bzImage by --kernel (in a checkout ci/setup test brings one)")


def find_busybox() -> str:
    found = newest("busybox-static/**/bin/busybox") or environment.find("busybox")
    if not found:
        raise ConfigError("no busybox: install busybox-static, or name one by --busybox")
    return found


def newest(pattern: str) -> str:
    """Of a checkout's cache of Debian packages, or an empty string."""
    default = Path(__file__).resolve().parents[1] / ".cache"
    found = sorted(Path(os.environ.get("PYVMM_CACHE", default), "debian").glob(pattern))
    return str(found[-1]) if found else ""


