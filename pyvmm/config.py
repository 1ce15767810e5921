"""What a machine is made of, checked: every wrong value is one sentence that says what to give instead."""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError, remedy_for_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from typing_extensions import Buffer, TypedDict

    from pyvmm.block.options import DriveOptions
    from pyvmm.chardev import Chardev

    # A file by its path, or its content.
    Image = str | os.PathLike[str] | Buffer
    Serial = str | Chardev | Callable[[bytes], object] | None

    class MachineOptions(TypedDict, total=False):
        """What ``Machine(**options)`` takes: MachineConfig's docstring says what each is."""

        machine: str | None
        memory_mib: int
        cpus: int
        kernel: Image | None
        initrd: Image | None
        modules: Sequence[tuple[Image, str]]
        append: str
        flat: Image | None
        flat_address: int | None
        flat_mode: str
        drives: Sequence[DriveOptions | str | os.PathLike[str]]
        firmware: Image | None
        boot: str
        uuid: str | None
        cpu: str
        irqchip: str
        serial: Serial
        debugcon: Serial
        vga: str | None
        raw_terminal: bool
        no_reboot: bool
        no_s3: bool
        testdev: bool
        debug_exit: int | None
        fw_cfg: Mapping[str, bytes]
        accel: str
        shared_memory: bool
        huge_pages: str | None


FLAT_MODES = ("real16", "protected32", "long64")
IRQCHIPS = ("kernel", "off")
MACHINES = ("pc", "microvm")
ACCELERATORS = ("kvm", "qtest")
HUGE_PAGES = (None, "transparent", "2M", "1G")
# The ACPI names of processors have three hexadecimal digits.
MAX_CPUS = 0x1000
# isa-debug-exit's port as kvm-unit-tests expect it.
DEBUG_EXIT_PORT = 0xF4


class MachineConfig:
    """The arguments of Machine, with their defaults.

    machine      "pc" (i440FX, PIIX3 with IDE, firmware) or "microvm" (no PCI); None: pc where there is a drive or
                 firmware, else microvm.
    memory_mib   RAM in MiB.
    cpus         number of vCPUs.
    kernel       bzImage, ELF with a PVH note, or multiboot v1 kernel: a path, or its bytes.
    initrd       a path or bytes; for multiboot the first module.
    modules      (path or bytes, command line) of multiboot modules, instead of initrd. A module's name, its path,
                 is put before its command line, as the kernel's is before append.
    append       the kernel's command line.
    flat         a flat binary, instead of kernel: loaded at flat_address and entered there in flat_mode.
    drives       disk images: paths, DriveOptions, or QEMU's words ("file=a.img,index=1,cache=none"); on IDE.
    firmware     a BIOS image for pc; None: this host's SeaBIOS, where neither kernel nor flat
                 binary is given.
    boot         what firmware tries, in order: letters c (disk), d (CD-ROM), n (kernel), a (floppy); or QEMU's words:
                 "order=cd,once=d,menu=on,splash-time=3000,reboot-timeout=5000,strict=on" (times in ms).
    uuid         the machine's UUID, "8-4-4-4-12" hexadecimal digits, in SMBIOS and fw_cfg; None: all zeros.
    cpu          "host", and features to hide: "host,-xsave,-cx16".
    irqchip      "kernel", or "off": PIC pair, PIT, IOAPIC and local APIC in Python, one vCPU.
    serial       host side of COM1: None, "stdio", "pty", "file:PATH", a callable that takes bytes, or a Chardev.
    vga          None, or "text": VGA's text mode, 25 lines of 80 characters at 0xb8000. Machine.vga tells what they
                 say, and a command's terminal shows them.
    debugcon     the same for the debug console at port 0x402.
    raw_terminal "stdio" takes the terminal over: raw mode, with Ctrl-A x to quit. For commands, not libraries.
    no_reboot    a reset ends the run with status 6 instead of starting the guest again.
    no_s3        the guest is not offered suspend to RAM (ACPI S3).
    testdev      the registers of QEMU's pc-testdev.
    debug_exit   port of isa-debug-exit, or None.
    fw_cfg       {name: bytes} of more fw_cfg files.
    shared_memory  RAM in a memfd that other processes can map.
    accel        "kvm", or "qtest": devices only, driven from outside, no vCPU, guest time by hand.
    huge_pages   None, "transparent", "2M" or "1G".
    """

    machine: str | None = None
    memory_mib: int = 256
    cpus: int = 1
    kernel: Image | None = None
    initrd: Image | None = None
    modules: Sequence[tuple[Image, str]] = ()
    append: str = ""
    flat: Image | None = None
    flat_address: int | None = None
    flat_mode: str = "real16"
    drives: Sequence[DriveOptions | str | os.PathLike[str]] = ()
    firmware: Image | None = None
    boot: str = "cad"
    uuid: str | None = None
    cpu: str = "host"
    irqchip: str = "kernel"
    serial: Serial = None
    debugcon: Serial = None
    vga: str | None = None
    raw_terminal: bool = False
    no_reboot: bool = False
    no_s3: bool = False
    testdev: bool = False
    debug_exit: int | None = DEBUG_EXIT_PORT
    fw_cfg: Mapping[str, bytes] = {}
    accel: str = "kvm"
    shared_memory: bool = False
    huge_pages: str | None = None

    def __init__(self, **values: Any) -> None:
        known = type(self).__annotations__
        for name, value in values.items():
            if name not in known:
                import difflib

                near = difflib.get_close_matches(name, known, 1)
                raise ConfigError(f"there is no option {name!r}" + (f": did you mean {near[0]}?" if near else ""))
            setattr(self, name, value)
        self.complete()

    def complete(self) -> None:
        """Check everything, and fill in what follows from the rest. ConfigError for what can't be."""
        self.check()
        self.drives = parse_drives(self.drives)
        if self.machine is None:
            on_pc = self.drives or self.firmware is not None or self.accel == "qtest"
            self.machine = "pc" if on_pc else "microvm"
        if self.machine == "microvm" and (self.drives or self.firmware is not None):
            raise ConfigError("machine='microvm' has no IDE and no firmware: use machine='pc'")

    def check(self) -> None:
        """ConfigError for what can be told to be wrong without opening anything."""
        self.check_kinds()
        if not is_int(self.memory_mib) or self.memory_mib < 1:
            raise ConfigError(f"memory_mib={self.memory_mib!r}: give a whole number of MiB, at least 1")
        if not is_int(self.cpus) or self.cpus < 1:
            raise ConfigError(f"cpus={self.cpus!r}: give a whole number of vCPUs, at least 1")
        if self.cpus > MAX_CPUS:
            raise ConfigError(f"cpus={self.cpus}: ACPI's tables name {MAX_CPUS} processors at most here, ask for fewer")
        if self.irqchip not in IRQCHIPS:
            raise ConfigError(f"irqchip={self.irqchip!r}: use 'kernel' or 'off'")
        if self.machine is not None and self.machine not in MACHINES:
            raise ConfigError(f"machine={self.machine!r}: use 'pc' or 'microvm'")
        if self.accel not in ACCELERATORS:
            raise ConfigError(f"accel={self.accel!r}: use 'kvm' or 'qtest'")
        self.check_firmware_words()
        if self.irqchip == "off" and self.cpus > 1:
            raise ConfigError(
                f"irqchip='off' has the local APIC of one vCPU, not of {self.cpus}: use cpus=1, or irqchip='kernel'"
            )
        if self.kernel is not None and self.flat is not None:
            raise ConfigError("both a kernel and a flat binary: give one of them")
        if self.flat is not None and (self.initrd is not None or self.modules or self.append):
            raise ConfigError("a flat binary takes no initrd, no modules and no command line: leave them out")
        if self.kernel is None and (self.initrd is not None or self.modules or self.append):
            raise ConfigError("an initrd, modules or a command line without a kernel: give the kernel too")
        if self.initrd is not None and self.modules:
            raise ConfigError("both an initrd and modules: the initrd is the first module, give one of them")
        if self.flat_mode not in FLAT_MODES:
            raise ConfigError(f"flat_mode={self.flat_mode!r}: use {', '.join(FLAT_MODES)}")
        if self.vga not in (None, "none", "text"):
            raise ConfigError(f"vga={self.vga!r}: use 'text' or 'none': there is no graphics")
        if self.debug_exit is not None and (not is_int(self.debug_exit) or not 0 <= self.debug_exit < 0xFFFF):
            raise ConfigError(f"debug_exit={self.debug_exit!r}: give a port below 0xffff, or None")

    def check_kinds(self) -> None:
        """ConfigError for a value of a kind that the option does not take."""
        for name in ("append", "cpu"):
            value = getattr(self, name)
            if not isinstance(value, str) or "\0" in value:
                raise ConfigError(f"{name}={value!r}: give a string")
        for name in ("raw_terminal", "no_reboot", "no_s3", "testdev", "shared_memory"):
            value = getattr(self, name)
            if not isinstance(value, int) or value not in (0, 1):
                raise ConfigError(f"{name}={value!r}: give True or False")
        for name in ("kernel", "initrd", "flat", "firmware"):
            value = getattr(self, name)
            if value is not None:
                check_image(name, value)
        if self.flat_address is not None and (not is_int(self.flat_address) or self.flat_address < 0):
            raise ConfigError(f"flat_address={self.flat_address!r}: give an address in RAM, or None")
        if self.huge_pages not in HUGE_PAGES:
            raise ConfigError(f"huge_pages={self.huge_pages!r}: use None, 'transparent', '2M' or '1G'")
        self.modules = check_modules(self.modules)
        for name in ("serial", "debugcon"):
            check_console(name, getattr(self, name))
        check_fw_cfg(self.fw_cfg)

    def check_firmware_words(self) -> None:
        """ConfigError for what firmware could not be told."""
        if self.boot != type(self).boot:
            from pyvmm.x86.boot_options import BootOptions

            BootOptions(self.boot)
        if self.uuid is not None:
            from pyvmm.x86.smbios import parse_uuid

            if not isinstance(self.uuid, str):
                raise ConfigError(f"uuid={self.uuid!r}: give a string of 8-4-4-4-12 hexadecimal digits")
            parse_uuid(self.uuid)


def __getattr__(name: str) -> object:
    """MachineOptions for whoever looks at it: nothing on the way to the first guest instruction does."""
    if name == "MachineOptions":
        from typing import TypedDict

        # From the same table as MachineConfig's own.
        fields: Any = dict(MachineConfig.__annotations__)
        made = TypedDict("MachineOptions", fields, total=False)  # type: ignore[misc]  # and no literal
        globals()[name] = made
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check_image(what: str, image: object) -> None:
    """ConfigError where that is neither a path nor the bytes themselves."""
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        if not path or (("\0" in path) if isinstance(path, str) else (0 in path)):
            raise ConfigError(f"{what}={image!r}: give the path of a file")
        return
    try:
        size_bytes = memoryview(image).cast("B").nbytes  # type: ignore[arg-type]  # that is the question
    except TypeError:
        raise ConfigError(f"{what}={image!r}: give a path, or the bytes themselves") from None
    if not size_bytes:
        raise ConfigError(f"{what}={image!r} is empty: give a whole image")


def check_modules(modules: object) -> list[tuple[Image, str]]:
    """The (image, command line) pairs, as a list. ConfigError where they are something else."""
    if isinstance(modules, (str, bytes, os.PathLike)):
        raise ConfigError(f"modules={modules!r}: give a list of (image, command line)")
    try:
        pairs = list(modules)  # type: ignore[call-overload]  # that is the question
    except TypeError:
        raise ConfigError(f"modules={modules!r}: give a list of (image, command line)") from None
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[1], str):
            raise ConfigError(f"modules: {pair!r} is no module: give (image, command line)")
        check_image("module", pair[0])
    return [(image, line) for image, line in pairs]


def check_console(name: str, console: object) -> None:
    """ConfigError where that is no host side of a console."""
    if console is None or (callable(console) and not isinstance(console, type)):
        return
    if isinstance(console, str):
        is_file = console.startswith("file:") and len(console) > len("file:")
        if not is_file and console not in ("none", "stdio", "pty"):
            raise ConfigError(f"{name} {console!r}: use none, stdio, pty or file:PATH")
        return
    from pyvmm.chardev import Chardev

    if isinstance(console, type):
        raise ConfigError(f"{name}={console!r} is a class: give an instance of it, or a function that takes bytes")
    if not isinstance(console, Chardev):
        raise ConfigError(f"{name}={console!r}: use none, stdio, pty, file:PATH, a function of bytes, or a Chardev")


def check_fw_cfg(files: object) -> None:
    """ConfigError where that is no {name: bytes}."""
    if not hasattr(files, "items"):
        raise ConfigError(f"fw_cfg={files!r}: give {{name: bytes}}")
    for name, content in files.items():
        if not isinstance(name, str):
            raise ConfigError(f"fw_cfg: {name!r} is no name: give a string, opt/org.example/x")
        if isinstance(content, str):
            raise ConfigError(f"fw_cfg {name!r}: {content!r} is text: give bytes, as by encode()")
        try:
            memoryview(content).cast("B")
        except TypeError:
            raise ConfigError(f"fw_cfg {name!r}: {content!r} are no bytes: give what the guest is to read") from None


def parse_drives(drives: Sequence[DriveOptions | str | os.PathLike[str]]) -> list[DriveOptions]:
    """DriveOptions of each. A string with a ``=`` in it is QEMU's -drive, another a path."""
    if isinstance(drives, (list, tuple)) and not drives:
        return []
    from pyvmm.block.options import DriveOptions

    if isinstance(drives, (str, bytes, os.PathLike, DriveOptions)) or not hasattr(drives, "__iter__"):
        raise ConfigError(f"drives={drives!r}: give a list of drives")
    parsed = []
    for drive in drives:
        if isinstance(drive, DriveOptions):
            parsed.append(drive)
        elif isinstance(drive, str) and "=" in drive:
            parsed.append(DriveOptions.parse(drive))
        elif isinstance(drive, (str, os.PathLike)):
            parsed.append(DriveOptions(os.fspath(drive)))
        else:
            raise ConfigError(f"{drive!r} is no drive: give a path, DriveOptions or 'file=...,index=...'")
    refuse_twice(parsed)
    return parsed


def refuse_twice(drives: Sequence[DriveOptions]) -> None:
    """Two drives on one image, one of which writes to it. (The image's locks would say only that it is in use.)"""
    import os

    writes: dict[tuple[int, int], bool] = {}
    for drive in drives:
        if drive.file is None or not drive.locking:
            continue
        try:
            status = os.stat(os.fspath(drive.file).removeprefix("file:"))
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


def machine_config(config: MachineConfig | None, options: Mapping[str, Any]) -> MachineConfig:
    """What Machine(config) or Machine(**options) asks for. ConfigError for both at once, and for nothing to run."""
    if config is None:
        config = MachineConfig(**options)
    elif not isinstance(config, MachineConfig):
        raise ConfigError(f"Machine({config!r}): give options by name, kernel=..., or one MachineConfig")
    elif options:
        names = ", ".join(options)
        raise ConfigError(f"Machine(config, {names}=...): put {names} into the MachineConfig, or give options only")
    else:
        config.complete()  # its attributes may have been assigned to
    if config.machine == "microvm" and config.accel == "kvm" and config.kernel is None and config.flat is None:
        raise ConfigError("nothing to run: give kernel, flat, drives or firmware")
    return config


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def from_file(path: str) -> dict[str, Any]:
    """The options in a TOML or JSON file, checked against the schema: for MachineConfig(**options)."""
    import msgspec

    schema = msgspec.defstruct(
        "MachineFile",
        [
            (name, kind, msgspec.UNSET)
            for name, kind in (
                ("machine", str),
                ("drives", list[str]),
                ("firmware", str),
                ("boot", str),
                ("uuid", str),
                ("memory_mib", int),
                ("cpus", int),
                ("kernel", str),
                ("initrd", str),
                ("append", str),
                ("flat", str),
                ("flat_address", int),
                ("flat_mode", str),
                ("cpu", str),
                ("irqchip", str),
                ("accel", str),
                ("serial", str),
                ("debugcon", str),
                ("vga", str),
                ("no_reboot", bool),
                ("no_s3", bool),
                ("testdev", bool),
                ("debug_exit", int),
                ("shared_memory", bool),
                ("huge_pages", str),
            )
        ],
        forbid_unknown_fields=True,
    )
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError as error:
        why = remedy_for_path(path, error, "give a TOML or JSON file that can be read")
        raise ConfigError(f"config file {path}: {why}") from None
    decode = msgspec.json.decode if path.endswith(".json") else msgspec.toml.decode
    try:
        options = decode(data, type=schema)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"config file {path}: nested too deeply: the options are plain values") from None
    return {name: value for name, value in msgspec.structs.asdict(options).items() if value is not msgspec.UNSET}
