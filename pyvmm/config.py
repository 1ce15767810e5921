"""What a machine is made of: the rows of MachineConfig, checked. Every wrong value is one sentence that says what to
give instead. What is made of it before anything is opened is a Spec (spec.py).
"""

from __future__ import annotations

from posix import stat

from pyvmm.console_words import CONSOLE
from pyvmm.errors import ConfigError, remedy_for_path
from pyvmm.options import (
    FLAG,
    GIVEN,
    Kind,
    Options,
    disable_legacy,
    disable_modern,
    is_path,
    number,
    option,
    path_text,
    take_flag,
    take_text,
    text,
    whole,
    word,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike
    from typing import Any

    from typing_extensions import Buffer, TypedDict, Unpack

    from pyvmm.balloon_options import BalloonOptions
    from pyvmm.block.options import DriveOptions
    from pyvmm.console_options import ConsoleOptions
    from pyvmm.console_words import HostEnd
    from pyvmm.net.options import NetOptions
    from pyvmm.vhost_user.options import ShareOptions
    from pyvmm.vsock.options import VsockOptions

    # A file by its path, or its content.
    Image = str | PathLike[str] | Buffer

    class MachineOptions(TypedDict, total=False):
        """What ``Machine(**options)`` takes: MachineConfig's docstring says what each is."""

        machine: str | None
        drives: Sequence[DriveOptions | str | PathLike[str]]
        nets: Sequence[NetOptions | str]
        vsock: VsockOptions | str | None
        shares: Sequence[ShareOptions | str]
        firmware: Image | None
        boot: str
        name: str | None
        uuid: str | None
        kernel: Image | None
        initrd: Image | None
        append: str
        modules: Sequence[tuple[Image, str]]
        flat: Image | None
        flat_address: int | None
        flat_mode: str
        memory_mib: int
        cpus: int
        cpu: str
        irqchip: str
        serial: HostEnd
        consoles: Sequence[ConsoleOptions | HostEnd]
        debugcon: HostEnd
        vga: str | None
        debug_exit: int | None
        testdev: bool
        pvpanic: bool
        rng: bool
        balloon: BalloonOptions | int | str | None
        fw_cfg: Mapping[str, bytes]
        no_reboot: bool
        no_s3: bool
        huge_pages: str | None
        shared_memory: bool
        raw_terminal: bool
        virtio_ring: str
        virtio_ioeventfd: str
        virtio_irqfd: str
        virtio_disable_legacy: str
        virtio_disable_modern: str
        accel: str


# The ACPI names of processors have three hexadecimal digits.
MAX_CPUS = 0x1000
# isa-debug-exit's port as kvm-unit-tests expect it.
DEBUG_EXIT_PORT = 0xF4


# -- kinds of values ---------------------------------------------------------------------------------------------------


def take_file(name: str, value: Any) -> Any:
    """A file that a machine boots from: its path, or its bytes."""
    if value is None:
        return None
    if is_path(value):
        path = path_text(value)
        if not path or "\0" in path:
            raise ConfigError(f"{name}={value!r}: give the path of a file")
        return path
    try:
        size_bytes = memoryview(value).cast("B").nbytes
    except TypeError:
        raise ConfigError(f"{name}={value!r}: give a path, or the bytes themselves") from None
    if not size_bytes:
        raise ConfigError(f"{name}={value!r} is empty: give a whole image")
    return value


def plain_file(value: Any) -> Any:
    """A path as it is, bytes by their number."""
    return value if value is None or isinstance(value, str) else {GIVEN: memoryview(value).nbytes}


def unplain_file(name: str, data: Any, given: Mapping[str, Any]) -> Any:
    if not isinstance(data, dict):
        return data
    image = given.get(name)
    if image is None or is_path(image) or memoryview(image).nbytes != data[GIVEN]:
        raise ConfigError(f"{name} was given as {data[GIVEN]} bytes: give the same bytes again")
    return image


FILE = Kind(take_file, metavar="FILE", plain=plain_file, unplain=unplain_file)


def take_modules(name: str, value: Any) -> tuple[tuple[Image, str], ...]:
    """(file, command line) of each."""
    if isinstance(value, bytes) or is_path(value) or not hasattr(value, "__iter__"):
        raise ConfigError(f"{name}={value!r}: give a list of (image, command line)")
    pairs = list(value)
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[1], str):
            raise ConfigError(f"{name}: {pair!r} is no module: give (image, command line)")
    return tuple((take_file("module", image), line) for image, line in pairs)


def split_module(text: str) -> tuple[str, str]:
    """'FILE ARGUMENTS': the file, and its command line."""
    path, _, line = text.partition(" ")
    return path, line


def unplain_modules(name: str, data: Any, given: Mapping[str, Any]) -> Any:
    again = {f"{name}[{n}]": image for n, (image, _line) in enumerate(given.get(name, ()))}
    return [(unplain_file(f"{name}[{n}]", image, again), line) for n, (image, line) in enumerate(data)]


MODULES = Kind(
    take_modules,
    file="array",
    metavar="'FILE ARGS'",
    from_text=split_module,
    plain=lambda modules: [[plain_file(image), line] for image, line in modules],
    unplain=unplain_modules,
)


def list_of(options: Callable[[], Any], take: Callable[[Any], Any], things: str) -> Kind:
    """A row with objects of the class ``options()``, which is imported when there is one; ``take(value)`` makes one of
    what a user gives, or None of what asks for nothing.
    """

    def take_all(name: str, value: Any) -> tuple[Any, ...]:
        if isinstance(value, (list, tuple)) and not value:
            return ()
        if isinstance(value, (bytes, options())) or is_path(value) or not hasattr(value, "__iter__"):
            raise ConfigError(f"{name}={value!r}: give a list of {things}")
        return tuple(taken for each in value if (taken := take(each)) is not None)

    def unplain(name: str, data: Any, given: Mapping[str, Any]) -> list[Any]:
        return [options()(**each) for each in data]

    return Kind(
        take_all,
        file="array",
        table=options,
        metavar="SPEC",
        plain=lambda taken: [each.plain() for each in taken],
        unplain=unplain,
    )


def drive_options() -> type[DriveOptions]:
    from pyvmm.block.options import DriveOptions

    return DriveOptions


def take_drive(value: Any) -> DriveOptions:
    """DriveOptions, QEMU's words for one, or a path. A string with a ``=`` in it is QEMU's -drive, another a path."""
    options = drive_options()
    if isinstance(value, options):
        return value
    if isinstance(value, str) and "=" in value:
        return options.parse(value)
    if is_path(value):
        return options(value)
    raise ConfigError(f"{value!r} is no drive: give a path, DriveOptions or 'file=...,index=...'")


DRIVES = list_of(drive_options, take_drive, "drives")


def net_options() -> type[NetOptions]:
    from pyvmm.net.options import NetOptions

    return NetOptions


def take_net(value: Any) -> NetOptions | None:
    """NetOptions, or the words of --net; "none" asks for nothing."""
    options = net_options()
    if isinstance(value, options):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"{value!r} is no network card: give NetOptions, or 'tap=NAME,..', 'passt', 'unix=PATH'")
    return None if value == "none" else options.parse(value)


NETS = list_of(net_options, take_net, "network cards")


def share_options() -> type[ShareOptions]:
    from pyvmm.vhost_user.options import ShareOptions

    return ShareOptions


def take_share(value: Any) -> ShareOptions | None:
    """ShareOptions, or the words of --share; "none" asks for nothing."""
    options = share_options()
    if isinstance(value, options):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"{value!r} is no shared folder: give ShareOptions, or 'tag=NAME,path=FOLDER'")
    return None if value == "none" else options.parse(value)


SHARES = list_of(share_options, take_share, "shared folders")


def vsock_options() -> type[VsockOptions]:
    from pyvmm.vsock.options import VsockOptions

    return VsockOptions


def take_vsock(name: str, value: Any) -> VsockOptions | None:
    """VsockOptions, or the words of --vsock; "none" asks for nothing."""
    if value is None or value == "none":
        return None
    options = vsock_options()
    if isinstance(value, str):
        return options.parse(value)
    if not isinstance(value, options):
        raise ConfigError(f"{name}={value!r}: give VsockOptions, or 'cid=3,path=/run/vm.sock'")
    return value


def unplain_vsock(name: str, data: Any, given: Mapping[str, Any]) -> VsockOptions | None:
    return None if data is None else vsock_options()(**data)


VSOCK = Kind(
    take_vsock,
    table=vsock_options,
    metavar="SPEC",
    plain=lambda vsock: None if vsock is None else vsock.plain(),
    unplain=unplain_vsock,
)


def take_balloon(name: str, value: Any) -> BalloonOptions | None:
    if value is None:
        return None
    from pyvmm.balloon_options import balloon_options

    return balloon_options(name, value)


def balloon_class() -> type[BalloonOptions]:
    from pyvmm.balloon_options import BalloonOptions

    return BalloonOptions


def unplain_balloon(name: str, data: Any, given: Mapping[str, Any]) -> BalloonOptions | None:
    return None if data is None else balloon_class()(**data)


BALLOON = Kind(
    take_balloon,
    file="integer string",
    table=balloon_class,
    metavar="SIZE",
    plain=lambda balloon: None if balloon is None else balloon.plain(),
    unplain=unplain_balloon,
)


def take_boot(name: str, value: Any) -> str:
    from pyvmm.x86.boot_options import BootOptions

    BootOptions(value)
    return str(value)


BOOT = Kind(take_boot, metavar="WORDS")


def take_uuid(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ConfigError(f"{name}={value!r}: give a string of 8-4-4-4-12 hexadecimal digits")
    from pyvmm.x86.smbios import parse_uuid

    parse_uuid(value)
    return value


UUID = Kind(take_uuid, metavar="UUID")


def take_cpu(name: str, value: Any) -> str:
    """A model and features, each known by its name. Whether this host's KVM has them shows when it is asked."""
    if value != "host":
        from pyvmm.x86.cpuid import parse

        parse(take_text(name, value))
    return str(value)


CPU = Kind(take_cpu, metavar="SPEC")
NAME_CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"
LONGEST_NAME = 64  # it is part of a socket's path


def is_machine_name(text: str) -> bool:
    return text[:1].isalnum() and len(text) <= LONGEST_NAME and all(char in NAME_CHARS for char in text)


def take_machine_name(name: str, value: Any) -> str | None:
    """A name that is one of a file too (control/registry.py)."""
    if value is None:
        return None
    if not isinstance(value, str) or not is_machine_name(value):
        raise ConfigError(
            f"{name}={value!r}: give a letter or a digit and then letters, digits, '.', '-' and '_',"
            f" {LONGEST_NAME} characters at most"
        )
    return str(value)


NAME = Kind(take_machine_name, metavar="NAME")
INTERNAL = Kind(take_flag, file="", metavar="")  # for the code that makes the machine: no file says it


def console_class() -> type[ConsoleOptions]:
    from pyvmm.console_options import ConsoleOptions

    return ConsoleOptions


def take_consoles(name: str, value: Any) -> tuple[ConsoleOptions, ...]:
    """ConsoleOptions, the words of --console, or what a serial port may have as its host's end."""
    if isinstance(value, (list, tuple)) and not value:
        return ()
    from pyvmm.console_options import console_options

    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ConfigError(f"{name}={value!r}: give a list of consoles")
    return tuple(console_options(console) for console in value)


def unplain_consoles(name: str, data: Any, given: Mapping[str, Any]) -> list[ConsoleOptions]:
    from pyvmm.console_options import unplain

    return unplain(name, data, given)


CONSOLES = Kind(
    take_consoles,
    file="array",
    table=console_class,
    metavar="SPEC",
    plain=lambda consoles: [console.plain() for console in consoles],
    unplain=unplain_consoles,
)


def take_files(name: str, value: Any) -> dict[str, Any]:
    """{name: bytes} of fw_cfg files."""
    if not hasattr(value, "items"):
        raise ConfigError(f"{name}={value!r}: give {{name: bytes}}")
    files = dict(value.items())
    for file, content in files.items():
        if not isinstance(file, str):
            raise ConfigError(f"{name}: {file!r} is no name: give a string, opt/org.example/x")
        from pyvmm.devices.fw_cfg import check_file_name

        check_file_name(file)
        if isinstance(content, str):
            raise ConfigError(f"{name} {file!r}: {content!r} is text: give bytes, as by encode()")
        try:
            memoryview(content).cast("B")
        except TypeError:
            raise ConfigError(f"{name} {file!r}: {content!r} are no bytes: give what the guest is to read") from None
    return files


def split_fw_cfg(text: str) -> tuple[str, str]:
    """'NAME=FILE': both."""
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise ValueError(text)
    return name, path


def read_file(path: str) -> bytes:
    """The content of a file for fw_cfg. ConfigError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        why = remedy_for_path(path, error, "give a file that can be read")
        raise ConfigError(f"fw_cfg file {path}: {why}") from None


FILES = Kind(
    take_files,
    file="object",
    metavar="NAME=FILE",
    from_text=split_fw_cfg,
    plain=lambda files: {name: bytes(content).hex() for name, content in files.items()},
    unplain=lambda name, data, given: {file: bytes.fromhex(content) for file, content in data.items()},
)


def mib(text: str) -> int:
    """A size in MiB: 256, 256M, 1.5G, 2T, or 262144K."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    unit = text[-1:].upper()
    size_bytes = float(text[:-1]) * units[unit] if unit in units else float(int(text) << 20)
    size, odd = divmod(size_bytes, 1 << 20)
    if odd or size_bytes < 0:
        raise ValueError(text)
    return int(size)


def port_or_none(text: str) -> int | None:
    return None if text == "none" else number(text)


# -- the options -------------------------------------------------------------------------------------------------------


class MachineConfig(Options):
    """What a machine is to be made of: the arguments of Machine."""

    machine: str | None = option(
        word("pc", "microvm", none=True), None, "pc (i440FX, PIIX3 with IDE, firmware) or microvm (no PCI); without it"
        " a microvm where there is a kernel or a flat binary, no firmware, and no drive but with if=virtio",
        cli="--machine -M", metavar="KIND", own_words=True)  # fmt: skip
    drives: Sequence[DriveOptions | str | PathLike[str]] = option(
        DRIVES, (), "disks as QEMU words them: file=a.img,index=1,cache=none,werror=stop", cli="--drive", many=True,
        own_words=True, python="; in Python also paths and DriveOptions")  # fmt: skip
    nets: Sequence[NetOptions | str] = option(
        NETS, (), "network cards: tap=NAME, passt or unix=PATH, with mac=..,mtu=..,queues=N,forward=HOST:GUEST; or"
        " none", cli="--net", many=True, own_words=True, python="; in Python also NetOptions")  # fmt: skip
    vsock: VsockOptions | str | None = option(
        VSOCK, None, "a virtio socket device, which joins ports of the guest's to Unix sockets of the host's:"
        " cid=N,path=PATH, or none", cli="--vsock", own_words=True, one="a guest has one address, give one",
        python="; in Python also VsockOptions")  # fmt: skip
    shares: Sequence[ShareOptions | str] = option(
        SHARES, (), "folders of the host's for the guest, by virtiofsd: tag=NAME,path=FOLDER or socket=PATH, with"
        " cache=auto|always|none, sandbox=..,xattr=on; `mount -t virtiofs NAME /mnt`; or none", cli="--share",
        many=True, own_words=True, python="; in Python also ShareOptions")  # fmt: skip
    firmware: Image | None = option(
        FILE, None, "a BIOS image for a pc; without it this host's SeaBIOS, where there is neither kernel nor flat"
        " binary", cli="--firmware", python=": a path, or its bytes")  # fmt: skip
    boot: str = option(
        BOOT, "cad", "what firmware tries in turn: c disk, d CD-ROM, n kernel, a floppy; or QEMU's words: order=cd,"
        "once=d,menu=on,splash-time=3000,reboot-timeout=5000,strict=on (times in ms)", cli="--boot", many=True,
        own_words=True)  # fmt: skip
    name: str | None = option(
        NAME, None, "the machine's: with one `pyvmm run` lets this user's `pyvmm list`, attach, qmp, save and top find"
        " it, once the guest is on its way", cli="--name", own_words=True, python="; Machine.register does it in"
        " Python")  # fmt: skip
    uuid: str | None = option(
        UUID, None, "the machine's, for SMBIOS and fw_cfg, in 8-4-4-4-12 hexadecimal digits; without it all zeros",
        cli="--uuid")  # fmt: skip
    kernel: Image | None = option(
        FILE, None, "bzImage, ELF with a PVH note, or multiboot v1 kernel", cli="--kernel -k",
        python=": a path, or its bytes")  # fmt: skip
    initrd: Image | None = option(
        FILE, None, "initial RAM disk; for multiboot the first module", cli="--initrd",
        python=": a path, or its bytes")  # fmt: skip
    append: str = option(text(), "", "the kernel's command line", cli="--append")
    modules: Sequence[tuple[Image, str]] = option(
        MODULES, (), "multiboot modules with their command lines, instead of an initrd; a module's path is put before"
        " its command line, as the kernel's is before append", cli="--module", many=True,
        python=": [(path or bytes, command line)]")  # fmt: skip
    flat: Image | None = option(
        FILE, None, "a flat binary instead of a kernel", cli="--flat", python=": a path, or its bytes")  # fmt: skip
    flat_address: int | None = option(
        whole(none=True, give="an address in RAM, or None"), None, "where it is loaded and entered; without it 0x7c00"
        " in real mode, else 0x100000", cli="--flat-address", metavar="ADDRESS")  # fmt: skip
    flat_mode: str = option(
        word("real16", "protected32", "long64"), "real16", "real16, protected32 or long64: how it is entered",
        cli="--flat-mode", metavar="MODE")  # fmt: skip
    memory_mib: int = option(
        whole(least=1, give="a whole number of MiB, at least 1", from_text=mib, file="integer string"), 256,
        "RAM: 256, 256M or 2G (default 256 MiB)", cli="--memory -m",
        metavar="SIZE", own_words=True, python="; in Python a number of MiB")  # fmt: skip
    cpus: int = option(
        whole(least=1, most=MAX_CPUS, give=f"a whole number of vCPUs, at least 1; ACPI's tables name {MAX_CPUS}"
        " processors at most here, ask for fewer"), 1, "number of vCPUs", cli="--cpus", own_words=True)  # fmt: skip
    cpu: str = option(
        CPU, "host", "host, and features to hide: host,-xsave,-cx16", cli="--cpu", own_words=True)  # fmt: skip
    irqchip: str = option(
        word("kernel", "off"), "kernel", "interrupt controllers and PIT in KVM, or (off, for one vCPU) in Python",
        cli="--irqchip", metavar="kernel|off")  # fmt: skip
    serial: HostEnd = option(
        CONSOLE, None, "COM1: stdio (the default of pyvmm run), none, pty, file:PATH", cli="--serial", own_words=True,
        one="a second serial port is not there yet, give one",
        python="; in Python also a function that takes bytes, or a Chardev")  # fmt: skip
    consoles: Sequence[ConsoleOptions | HostEnd] = option(
        CONSOLES, (), "virtio consoles, each none, stdio, pty or file:PATH: hvc0, hvc1, ... for the kernel, or with"
        " ,name=NAME the guest's /dev/virtio-ports/NAME", cli="--console", many=True, own_words=True,
        python="; in Python also ConsoleOptions, and as serial")  # fmt: skip
    debugcon: HostEnd = option(
        CONSOLE, None, "debug console at port 0x402: none, stdio, pty, file:PATH", cli="--debugcon", own_words=True,
        python="; in Python as serial")  # fmt: skip
    vga: str | None = option(
        word("text", "none", unset="none", note="there is no graphics"), None, "none, or text: VGA's text mode, 25"
        " lines of 80 characters at 0xb8000, on the terminal; Ctrl-A v changes between it and the serial console",
        cli="--vga", metavar="KIND", python="; Machine.vga tells what they say")  # fmt: skip
    debug_exit: int | None = option(
        whole(most=0xFFFF - 1, none=True, give="a port below 0xffff, or None", from_text=port_or_none,
              file="integer string"), DEBUG_EXIT_PORT,
        "port of isa-debug-exit, or none (default 0xf4)", cli="--debug-exit", metavar="PORT")  # fmt: skip
    testdev: bool = option(FLAG, False, "the registers of QEMU's pc-testdev", cli="--testdev")
    pvpanic: bool = option(
        FLAG, False, "QEMU's pvpanic at port 0x505, by which a kernel says that it has panicked: the run ends with"
        " status 18", cli="--pvpanic")  # fmt: skip
    rng: bool = option(
        FLAG, False, "a virtio entropy device, filled by the host's generator", cli="--rng")  # fmt: skip
    balloon: BalloonOptions | int | str | None = option(
        BALLOON, None, "a virtio memory balloon that takes so much of the guest's memory at first, 0 or 512M, with"
        " deflate-on-oom=on, free-page-reporting=on; Machine.set_balloon changes how much", cli="--balloon",
        own_words=True, python="; in Python a number of MiB or BalloonOptions")  # fmt: skip
    fw_cfg: Mapping[str, bytes] = option(
        FILES, {}, "more fw_cfg files", cli="--fw-cfg", many=True, own_words=True,
        python=": {name: bytes}")  # fmt: skip
    no_reboot: bool = option(
        FLAG, False, "a reset ends the run with status 6, instead of starting the guest again", cli="--no-reboot")
    no_s3: bool = option(FLAG, False, "do not offer the guest suspend to RAM (ACPI S3)", cli="--no-s3")
    huge_pages: str | None = option(
        word("transparent", "2M", "1G", none=True), None, "back RAM by transparent, 2M or 1G pages",
        cli="--huge-pages", metavar="KIND")  # fmt: skip
    shared_memory: bool = option(
        FLAG, False, "RAM in a memfd that other processes can map", cli="--shared-memory")
    raw_terminal: bool = option(
        INTERNAL, False, "stdio takes the terminal over: raw mode, with Ctrl-A x to quit; for commands, not libraries"
    )
    virtio_ring: str = option(
        word("split", "packed"), "split", "split, or packed: offer drivers the packed ring layout too")
    virtio_ioeventfd: str = option(
        word("on", "off"), "on", "on, or off: each doorbell is an exit to user space, for comparison")
    virtio_irqfd: str = option(
        word("on", "off"), "on", "on, or off: interrupts of queues by a call of ours each, for comparison")
    virtio_disable_legacy: str = disable_legacy("auto")
    virtio_disable_modern: str = disable_modern("off")
    accel: str = option(
        word("kvm", "qtest"), "kvm", "kvm, or qtest: devices only, driven from outside, no vCPU, guest time by hand")

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[MachineOptions]) -> None: ...

    def check_together(self, values: dict[str, Any]) -> None:
        kernel, flat, initrd = values["kernel"], values["flat"], values["initrd"]
        modules, append = values["modules"], values["append"]
        if values["irqchip"] == "off" and values["cpus"] > 1:
            raise ConfigError(
                f"irqchip='off' has the local APIC of one vCPU, not of {values['cpus']}: use cpus=1, or"
                " irqchip='kernel'"
            )
        if kernel is not None and flat is not None:
            raise ConfigError("both a kernel and a flat binary: give one of them")
        if flat is not None and (initrd is not None or modules or append):
            raise ConfigError("a flat binary takes no initrd, no modules and no command line: leave them out")
        if kernel is None and (initrd is not None or modules or append):
            raise ConfigError("an initrd, modules or a command line without a kernel: give the kernel too")
        if initrd is not None and modules:
            raise ConfigError("both an initrd and modules: the initrd is the first module, give one of them")
        if modules and values["firmware"] is not None:
            raise ConfigError("a kernel that firmware boots takes no modules: give an initrd, or leave firmware out")
        if values["machine"] == "microvm" and values["firmware"] is not None:
            raise ConfigError("machine='microvm' has no firmware: use machine='pc'")
        if values["machine"] == "microvm" and any(on_ide(drive) for drive in values["drives"]):
            raise ConfigError("machine='microvm' has no IDE: use if=virtio for a disk, or machine='pc'")
        if values["balloon"] is not None:
            from pyvmm.balloon_options import check_balloon

            check_balloon(values["balloon"], values["memory_mib"], values["huge_pages"])
        refuse_twice(values["drives"])


def on_ide(drive: DriveOptions) -> bool:
    return drive.interface == "ide" or (drive.interface is None and drive.media == "cdrom")


def refuse_twice(drives: Sequence[DriveOptions]) -> None:
    """Two drives on one image, one of which writes to it. (The image's locks would say only that it is in use.)"""
    if len(drives) < 2:
        return
    from pyvmm.block.open import image_path

    writes: dict[tuple[int, int], bool] = {}
    for drive in drives:
        if drive.file is None or not drive.locking:
            continue
        try:
            status = stat(image_path(drive))
        except (OSError, ValueError):
            continue  # whoever opens it says what is wrong
        image = status.st_dev, status.st_ino
        mine = not drive.read_only and not drive.snapshot
        if image in writes and (mine or writes[image]):
            raise ConfigError(
                f"the image {drive.file} is given to two drives: give it to one of them, a copy (cp) to the other, or"
                " read-only=on to both"
            )
        writes[image] = mine or writes.get(image, False)


def __getattr__(name: str) -> object:
    """MachineOptions for whoever looks at it: nothing on the way to the first guest instruction does."""
    if name == "MachineOptions":
        from typing import TypedDict

        # From the same table as MachineConfig's own.
        fields: Any = {name: MachineConfig.__annotations__[name] for name in MachineConfig.rows}
        made = TypedDict("MachineOptions", fields, total=False)  # type: ignore[misc]  # and no literal
        globals()[name] = made
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
