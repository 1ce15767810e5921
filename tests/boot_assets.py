"""What guests boot from: Debian's kernels, their modules, busybox, the multiboot example, RAM disks.

`ci/setup test` puts the Debian packages into the cache as plain files (`.cache/debian/<package>`, or under
`PYVMM_CACHE`); everything here only reads them, and keeps what is costly to derive beside them.

    kernel = boot_assets.kernel("cloud")   # .bzimage, .vmlinux (uncompressed), .modules("virtio_blk", ...)
    boot_assets.initrd("echo hello; poweroff -f", tmp_path)
    boot_assets.initrd(boot_assets.SHELL_ON_TTYS0, tmp_path, modules=kernel.modules("virtio_blk"))

References: the Linux/x86 boot protocol (Documentation/arch/x86/boot.rst: payload_offset, payload_length), the
initramfs buffer format (Documentation/driver-api/early-userspace/buffer-format.rst: "newc").
"""

from __future__ import annotations

import lzma
import os
import stat
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

CACHE = Path(os.environ.get("PYVMM_CACHE", Path(__file__).resolve().parents[1] / ".cache"))


class MissingAssetError(Exception):
    """A file that `ci/setup test` should have brought is not in the cache."""


class LeftOutError(MissingAssetError):
    """Nor can it be: the machine's Debian has no such package, as ci/setup has said, or one that is of no use."""


def package(name: str) -> Path:
    """The root of an unpacked Debian package."""
    root = CACHE / "debian" / name
    if not root.is_dir():
        left_out = root.with_name(f"{name}.left-out")
        if left_out.exists():
            raise LeftOutError(left_out.read_text().strip())
        raise MissingAssetError(f"{root} is missing: run ci/setup test")
    return root


def _the_file(root: Path, pattern: str) -> Path:
    found = sorted(root.glob(pattern))
    if not found:
        raise MissingAssetError(f"no {pattern} under {root}: remove that directory and run ci/setup test")
    return found[-1]


def write_whole(path: Path, data: bytes) -> None:
    """Tests run side by side: a reader sees no file or the whole one."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
        os.fchmod(file.fileno(), 0o644)  # as packages have theirs: whoever runs a guest may read them
    Path(file.name).replace(path)


def busybox() -> Path:
    """The statically linked busybox."""
    return _the_file(package("busybox-static"), "**/bin/busybox")


def multiboot_kernel() -> Path:
    """The multiboot package's example kernel: ELF32, prints what it was given on the VGA text screen."""
    return _the_file(package("multiboot"), "usr/lib/multiboot/examples/kernel")


def invaders() -> Path:
    """grub-invaders: a game, and a multiboot kernel, that draws on the VGA text screen."""
    return _the_file(package("grub-invaders"), "boot/invaders.exec")


def memtest() -> Path:
    """Memtest86+, 64-bit: a bzImage, but no Linux."""
    return _the_file(package("memtest86+"), "boot/*x64.bin")


def ipxe() -> Path:
    """iPXE as a kernel that only a BIOS can start: protocol 2.07, no 32-bit entry."""
    return _the_file(package("ipxe"), "**/ipxe.lkrn")  # /boot, since Debian 13 /usr/lib/ipxe


def firmware() -> Path:
    """SeaBIOS for a pc."""
    return _the_file(package("seabios"), "usr/share/seabios/bios-256k.bin")


def bochs_firmware() -> Path:
    """Bochs' BIOS as it was before it took things over from SeaBIOS's ancestors: 64 KiB, no ACPI."""
    found = _the_file(package("bochsbios"), "usr/share/bochs/BIOS-bochs-legacy")
    if b"No VGABIOS ROM" in found.read_bytes():
        raise LeftOutError("this Debian's Bochs BIOS (3.0 or later) stops on a machine without a VGA BIOS")
    return found


# ---- kernels -------------------------------------------------------------------------------------


class Kernel:
    """One of Debian's kernels: its image in both forms and its modules."""

    def __init__(self, root: Path) -> None:
        self.bzimage = _the_file(root, "boot/vmlinuz-*")
        self.release = self.bzimage.name.removeprefix("vmlinuz-")
        self.config = root / "boot" / f"config-{self.release}"
        # Merged /usr moves the modules: bookworm has /lib/modules, later releases /usr/lib/modules.
        self._module_root = _the_file(root, f"**/lib/modules/{self.release}")
        self._module_files: dict[str, Path] = {}

    @property
    def vmlinux(self) -> Path:
        """The uncompressed ELF image, taken out of the bzImage once."""
        path = self.bzimage.with_name(f"vmlinux-{self.release}")
        if not path.exists():
            write_whole(path, extract_vmlinux(self.bzimage.read_bytes()))
        return path

    def modules(self, *names: str) -> list[Path]:
        """These modules and all they depend on, in an order that loads; what is built in is left out."""
        if not self._module_files:
            for path in self._module_root.glob("kernel/**/*.ko*"):
                self._module_files[_module_name(path.name.split(".ko")[0])] = path
        order: dict[str, Path] = {}
        for name in names:
            self._collect(_module_name(name), order)
        return list(order.values())

    def _collect(self, name: str, order: dict[str, Path]) -> None:
        if name in order:
            return
        path = self._module_files.get(name)
        if path is None:
            if name in self._builtin():
                return
            raise MissingAssetError(f"kernel {self.release} has no module {name}")
        for dependency in _modinfo(module_bytes(path), "depends").split(","):
            if dependency:
                self._collect(_module_name(dependency), order)
        order[name] = path

    def _builtin(self) -> set[str]:
        lines = (self._module_root / "modules.builtin").read_text().split()
        return {_module_name(Path(line).name.removesuffix(".ko")) for line in lines}


def kernel(flavour: str = "cloud") -> Kernel:
    """Debian's current kernel: "cloud" (small; virtio only) or "generic" (every driver, 9p among them)."""
    return Kernel(package({"cloud": "linux-image-cloud-amd64", "generic": "linux-image-amd64"}[flavour]))


def _module_name(name: str) -> str:
    """The kernel takes - and _ in a module's name for the same."""
    return name.replace("-", "_")


def module_bytes(path: Path) -> bytes:
    """A module as insmod of busybox takes it: later Debian releases keep them xz-compressed."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _modinfo(module: bytes, key: str) -> str:
    """A field of the .modinfo section: zero-terminated key=value strings, found without the section table."""
    start = module.find(b"\0" + key.encode() + b"=")
    if start < 0:
        return ""
    start += len(key) + 2
    return module[start : module.index(b"\0", start)].decode()


def _unzstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


def _unlz4(data: bytes) -> bytes:
    import lz4.block  # type: ignore[import-untyped]

    # The legacy frame: blocks of 8 MiB and a shorter last one, each behind its packed size. The word after
    # the last is the size of the whole, larger than what is left.
    blocks, at = [], 4
    while 0 < (packed := int.from_bytes(data[at : at + 4], "little")) <= len(data) - at - 4:
        blocks.append(lz4.block.decompress(data[at + 4 : at + 4 + packed], uncompressed_size=8 << 20))
        at += 4 + packed
    return b"".join(blocks)


# What distributions use, by the first bytes. Only the stream is taken: four bytes with its size follow it.
DECOMPRESSORS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": lambda data: zlib.decompressobj(wbits=31).decompress(data),
    b"\xfd7zXZ\0": lambda data: lzma.LZMADecompressor().decompress(data),
    b"\x28\xb5\x2f\xfd": _unzstd,
    b"\x02\x21\x4c\x18": _unlz4,
}


def extract_vmlinux(bzimage: bytes) -> bytes:
    """The ELF image inside a bzImage of boot protocol 2.08 or later.

    pyvmm has its own: this one serves the lab where pyvmm does not build, and tests as a second opinion.
    """
    setup_sects, magic, version = bzimage[0x1F1] or 4, bzimage[0x202:0x206], bzimage[0x206:0x208]
    if magic != b"HdrS" or int.from_bytes(version, "little") < 0x208:
        raise ValueError("no bzImage with a payload: the setup header's magic or version is wrong")
    offset, length = struct.unpack_from("<II", bzimage, 0x248)  # payload_offset, payload_length
    start = (setup_sects + 1) * 512 + offset
    payload = bzimage[start : start + length]
    for signature, decompress in DECOMPRESSORS.items():
        if payload.startswith(signature):
            return decompress(payload)
    raise ValueError(f"the kernel's payload is compressed in an unknown way: {payload[:6].hex()}")


# ---- initial RAM disks ---------------------------------------------------------------------------


class Cpio:
    """A "newc" archive, written member by member, all owned by root: device nodes take no privilege here."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def _add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._count += 1
        encoded = name.encode() + b"\0"
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._parts += [header, b"\0" * (-len(header) % 4), data, b"\0" * (-len(data) % 4)]

    def directory(self, name: str, mode: int = 0o755) -> None:
        self._add(name, stat.S_IFDIR | mode)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, data)

    def symlink(self, name: str, target: str) -> None:
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._add(name, stat.S_IFCHR | mode, device=(major, minor))

    def bytes(self) -> bytes:
        """The archive so far with its trailer, padded to the 512 bytes that boot loaders expect."""
        name = b"TRAILER!!!\0"
        header = b"070701" + b"".join(b"%08X" % (len(name) if i == 11 else i == 4) for i in range(13)) + name
        archive = b"".join(self._parts) + header
        return archive + b"\0" * (-len(archive) % 512)


# Runs as process 1. Every applet of busybox is a command; the archive's modules are loaded in their order, with their
# parameters from the kernel's command line (libata.dma=0), as modprobe does it.
INIT_HEAD = """\
#!/bin/busybox sh
export PATH=/bin HOME=/ PS1='# '
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /modules/*.ko; do
    name=${module#/modules/*-} options=
    name=${name//-/_} # kvm-amd.ko is kvm_amd on the command line
    for word in $(cat /proc/cmdline); do
        case $word in "${name%.ko}".*) options="$options ${word#*.}" ;; esac
    done
    [ ! -e "$module" ] || insmod "$module" $options
done
"""

# For initrd(): an interactive shell with job control on the first serial port; its `exit` powers off.
SHELL_ON_TTYS0 = """\
setsid -c sh -i <>/dev/ttyS0 >&0 2>&1
poweroff -f
"""


def initrd_bytes(init: str, modules: Iterable[Path] = (), files: Mapping[str, bytes] | None = None) -> bytes:
    """An uncompressed archive whose /init mounts /proc, /sys and /dev, loads `modules`, runs `init`.

    `files` are added at their paths (without the leading slash), executable.
    """
    files = files or {}
    directories = {"bin", "dev", "mnt", "modules", "proc", "root", "run", "sys", "tmp"}
    directories |= {str(parent) for name in files for parent in Path(name).parents[:-1]}
    archive = Cpio()
    for name in sorted(directories):
        archive.directory(name)
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", busybox().read_bytes(), 0o755)
    applets = subprocess.run([busybox(), "--list"], check=True, capture_output=True, text=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            archive.symlink(f"bin/{applet}", "busybox")
    for number, module in enumerate(modules):
        archive.file(f"modules/{number:02}-{module.name.split('.ko')[0]}.ko", module_bytes(module))
    archive.file("init", (INIT_HEAD + init).encode(), 0o755)
    for name, data in files.items():
        archive.file(name, data, 0o755)
    return archive.bytes()


def initrd(
    init: str, directory: Path, modules: Iterable[Path] = (), files: Mapping[str, bytes] | None = None
) -> Path:
    """`initrd_bytes` as a file in `directory`, which a test takes from pytest's tmp_path."""
    path = directory / "initrd.cpio"
    write_whole(path, initrd_bytes(init, modules, files))
    return path
