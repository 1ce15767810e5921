"""What ``--help OPTION``, ``--drive help`` and the like tell of one option."""

from __future__ import annotations

from pyvmm.cli.options import entry
from pyvmm.errors import ConfigError, KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.cli.options import Option

WIDTH = 118

# Each option of --drive, with its values and what they mean. A name in brackets is QEMU's older spelling.
DRIVE = (
    ("file=PATH", "image or block device; file:PATH, or blkdebug:RULES:PATH, which fails as RULES says. A CD drive may"
     " have none"),
    ("format=raw", "the image is the disk's bytes, whatever they look like; without it what looks like qcow2, VMDK, ..."
     " is refused"),
    ("if=ide", "the bus"),
    ("index=0|1|2|3", "primary master and slave, secondary master and slave; default: the next that is free"),
    ("bus=0|1, unit=0|1", "the same in two numbers"),
    ("media=disk|cdrom", "a disk, or a CD-ROM drive"),
    ("id=NAME", "its name; default: its place, ide0-hd0"),
    ("cache=writeback|none|writethrough|directsync|unsafe", "the host's page cache with the guest's flushes; O_DIRECT;"
     " the same two with every write on stable storage before it is complete; flushes left out"),
    ("aio=threads|io_uring", "how the host is asked"),
    ("discard=unmap|ignore", "what the guest discards becomes a hole in the image, or nothing (also on, off)"),
    ("detect-zeroes=off|on|unmap", "writes of zeros are told as such; and become holes"),
    ("read-only=on|off", "the guest may not write [readonly]"),
    ("snapshot=on|off", "the guest's writes go to a temporary file that is gone in the end"),
    ("rerror=report|ignore|stop", "what follows when the host can't read: the guest is told; or not; or it stops until"
     " SIGCONT"),
    ("werror=enospc|report|ignore|stop", "the same of writes; enospc: stop for lack of room, else report"),
    ("locking=on|off|auto", "refuse an image that another program uses [file.locking, force-share=on for off]"),
    ("offset=BYTES, size=BYTES", "the window of the image that is the disk"),
    ("cyls=N, heads=N, secs=N", "the geometry the disk shows; default: guessed from its partition table, as QEMU does"),
    ("trans=auto|none|lba|large|rechs", "how the BIOS translates it [bios-chs-trans]"),
    ("throttling.bps-total=N", "bytes a second, reads and writes together; or -read, -write; with -max the rate of"
     " bursts [bps, bps_rd, bps_wr, bps_max, bps_max_rd, ...]"),
    ("throttling.iops-total=N", "operations a second, in the same way [iops, iops_rd, iops_wr, iops_max, ...]"),
    ("serial=TEXT, model=TEXT, ver=TEXT", "what the drive calls itself, and its firmware's revision"),
)  # fmt: skip

DEVICE = """\
There is no -device here; a board has its devices, and some options add one:
  --drive SPEC      an IDE disk or CD-ROM drive
  --debug-exit PORT isa-debug-exit
  --debugcon WHERE  isa-debugcon, at port 0x402
  --testdev         pc-testdev
In Python: Machine.pio.map and Machine.mmio.map take a device of your own.
"""


def topic_text(topic: str, options: Sequence[Option]) -> str:
    """Help with one option, by its name with or without dashes. ConfigError where there is none of that name."""
    name = topic.lstrip("-")
    option = next((o for o in options if name in [n.lstrip("-") for n in o.names]), None)
    if name != "device" and option is None:
        raise ConfigError(f"there is no option {topic!r} to tell of: `pyvmm run --help` lists them")
    more: dict[str, Callable[[], str]] = {"drive": drive_text, "cpu": cpu_text, "device": lambda: DEVICE}
    text = entry(option) + "\n" if option is not None else ""
    return text + (more[name]() if name in more else "")


def drive_text() -> str:
    lines = ["", "A drive's options, with commas between them; a comma in a value is written twice:"]
    for words, meaning in DRIVE:
        lines += [f"  {words}", *wrapped(meaning.split(), 6)]
    return "\n".join(lines) + "\n"


def cpu_text() -> str:
    """The names of features: those this host's KVM offers, and the others."""
    from pyvmm.x86 import cpu_features

    names = dict.fromkeys(word for _, words in cpu_features.WORDS for word in words.split() if word != ".")
    try:
        from pyvmm.kvm.system import Kvm

        with Kvm() as kvm:
            table = kvm.supported_cpuid()
    except KvmError:
        table = []
    offered = [name for name in names if any(has(table, *bit) for bit in cpu_features.bits(name))]
    others = [name for name in names if name not in offered]
    lines = ["", "host is what KVM offers of this processor; -NAME or NAME=off hides a feature and those that stand"]
    lines += ["on it; +NAME insists on one; kvm=off hides KVM's own. Features that KVM offers here:"]
    lines += [*wrapped(offered, 2), "Others it may offer elsewhere:", *wrapped(others, 2)]
    return "\n".join(lines) + "\n"


def has(table: Sequence[tuple[int, ...]], function: int, index: int, register: int, bit: int) -> bool:
    return any(entry[:2] == (function, index) and entry[3 + register] >> bit & 1 for entry in table)


def wrapped(words: Sequence[str], indent: int) -> list[str]:
    lines = [" " * (indent - 1)]
    for word in words:
        if len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append(" " * (indent - 1))
        lines[-1] += f" {word}"
    return lines
