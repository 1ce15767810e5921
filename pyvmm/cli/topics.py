"""What ``--help OPTION``, ``--drive help`` and the like tell of one option."""

from __future__ import annotations

from pyvmm.cli.options import entry
from pyvmm.errors import ConfigError, KvmError
from pyvmm.options import wrapped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.cli.options import Option

FORCE_SHARE = ("force-share=on|off", "the contrary of locking")

DEVICE = """\
There is no -device here; a board has its devices, and some options add one:
  --net SPEC        a virtio network card
  --vsock SPEC      a virtio socket device
  --share SPEC      a folder of the host's, as a virtio file system
  --drive SPEC      an IDE disk or CD-ROM drive, or a virtio disk (if=virtio)
  --console SPEC    a virtio console, or a port for the guest's programs
  --balloon SIZE    a virtio memory balloon
  --rng             a virtio entropy device
  --debug-exit PORT isa-debug-exit
  --debugcon WHERE  isa-debugcon, at port 0x402
  --pvpanic         pvpanic, at port 0x505
  --testdev         pc-testdev
In Python: Machine.pio.map and Machine.mmio.map take a device of your own.
"""


def topic_text(topic: str, options: Sequence[Option]) -> str:
    """Help with one option, by its name with or without dashes. ConfigError where there is none of that name."""
    name = topic.lstrip("-")
    option = next((o for o in options if name in [n.lstrip("-") for n in o.names]), None)
    if name != "device" and option is None:
        raise ConfigError(f"there is no option {topic!r} to tell of: `pyvmm run --help` lists them")
    more: dict[str, Callable[[], str]] = {
        "drive": drive_text,
        "net": net_text,
        "console": console_text,
        "vsock": vsock_text,
        "share": share_text,
        "balloon": balloon_text,
        "cpu": cpu_text,
        "device": lambda: DEVICE,
    }
    text = entry(option) + "\n" if option is not None else ""
    return text + (more[name]() if name in more else "")


def drive_text() -> str:
    lines = ["", "A drive's options, with commas between them; a comma in a value is written twice:"]
    for words, meaning in drive_words():
        lines += wrapped(f"  {words}  ", 32, meaning)
    return "\n".join(lines) + "\n"


def drive_words() -> list[tuple[str, str]]:
    """Each option of --drive with its values, and what it means. A name in brackets is another spelling."""
    from pyvmm.block.options import DriveOptions

    words = []
    for row in DriveOptions.rows.values():
        value = "|".join(row.kind.choices) or row.metavar
        others = ", ".join(row.words[1:])
        words.append((f"{row.words[0]}={value}", row.help + (f" [{others}]" if others else "")))
    return [*words, FORCE_SHARE]


def net_text() -> str:
    from pyvmm.net.options import NetOptions

    lines = ["", "Of a network card, with commas between them, what it is joined to first:"]
    lines += wrapped("  tap=NAME|passt|unix=PATH|fd=N|none  ", 32, NetOptions.rows["kind"].help)
    for row in NetOptions.rows.values():
        if row.words and row.name not in ("tap", "path", "fd"):
            others = ", ".join(row.words[1:])
            lines += wrapped(f"  {row.words[0]}={row.metavar}  ", 32, row.help + (f" [{others}]" if others else ""))
    return "\n".join(lines) + "\n"


def console_text() -> str:
    from pyvmm.console_options import ConsoleOptions

    rows = ConsoleOptions.rows
    lines = ["", "Of a console, with a comma between them, the host's end first:"]
    lines += wrapped("  none|stdio|pty|file:PATH  ", 32, rows["where"].help)
    lines += wrapped("  name=NAME  ", 32, rows["name"].help)
    return "\n".join(lines) + "\n"


def vsock_text() -> str:
    from pyvmm.vsock.options import VsockOptions

    lines = ["", "Of the socket device, with commas between them; a comma in a value is written twice:"]
    for row in VsockOptions.rows.values():
        others = ", ".join(row.words[1:])
        lines += wrapped(f"  {row.words[0]}={row.metavar}  ", 32, row.help + (f" [{others}]" if others else ""))
    return "\n".join(lines) + "\n"


def share_text() -> str:
    from pyvmm.vhost_user.options import ShareOptions

    lines = ["", "Of a shared folder, with commas between them; a comma in a value is written twice:"]
    for row in ShareOptions.rows.values():
        value = "|".join(row.kind.choices) or row.metavar
        lines += wrapped(f"  {row.words[0]}={value}  ", 32, row.help)
    return "\n".join(lines) + "\n"


def balloon_text() -> str:
    from pyvmm.balloon_options import BalloonOptions

    lines = ["", "Of the balloon, with commas between them, its size first:"]
    for name, row in BalloonOptions.rows.items():
        lines += wrapped("  SIZE  " if name == "mib" else f"  {row.words[0]}={row.metavar}  ", 32, row.help)
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
    lines += [*wrapped("", 2, " ".join(offered)), "Others it may offer elsewhere:", *wrapped("", 2, " ".join(others))]
    return "\n".join(lines) + "\n"


def has(table: Sequence[tuple[int, ...]], function: int, index: int, register: int, bit: int) -> bool:
    return any(entry[:2] == (function, index) and entry[3 + register] >> bit & 1 for entry in table)
