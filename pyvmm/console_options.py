"""What a user may say about a console on virtio: the rows of ConsoleOptions, and the way to write them, ``--console``.

A console without a name is one for the guest's kernel, hvc0 and so on; one with a name is a port that programs open, as
/dev/virtio-ports/NAME.
"""

from __future__ import annotations

from pyvmm.console_words import CONSOLE, unplain_console
from pyvmm.errors import ConfigError
from pyvmm.options import Kind, Options, option, split_commas

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from pyvmm.console_words import HostEnd

LONGEST_NAME = 100
# One device has all of them, with a pair of queues each. QEMU's number.
MOST_PORTS = 31
TAKEN = ("serial", "debugcon")  # what Machine.consoles has besides


def take_name(name: str, value: Any) -> str | None:
    """A port's name: Linux puts it into sysfs, and udev makes a file name of it."""
    if value is None:
        return None
    good = isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isascii() and value.isprintable()
    if not good or "/" in value or " " in value or value.startswith("."):
        raise ConfigError(
            f"{name}={value!r}: give a file name of at most {LONGEST_NAME} ASCII characters, as org.qemu.guest_agent.0"
        )
    if value in TAKEN or is_hvc(value):
        raise ConfigError(f"{name}={value!r} is another console's: give another name")
    return str(value)


def is_hvc(name: str) -> bool:
    return name.startswith("hvc") and name[3:].isdigit()


NAME = Kind(take_name, metavar="NAME")


class ConsoleOptions(Options):
    """One console. An object does not change: ``changed`` makes another one.

    The host's end comes first: ``ConsoleOptions("pty")``, ``ConsoleOptions(hear, name="agent")``.
    """

    noun = "console option "
    thing = "a console"
    frozen = True

    where: HostEnd = option(
        CONSOLE, None, "the host's end: none, stdio, pty or file:PATH",
        python="; in Python also a function that takes bytes, or a Chardev")  # fmt: skip
    name: str | None = option(
        NAME, None, "makes it a port for the guest's programs, /dev/virtio-ports/NAME; without a name it is a console"
        " of its kernel, hvc0, hvc1, ... in this order", words="name")  # fmt: skip

    def __init__(self, where: HostEnd = None, **values: Any) -> None:
        super().__init__(where=where, **values)

    @classmethod
    def parse(cls, text: str) -> ConsoleOptions:
        """From "stdio", "pty,name=agent" or "file:PATH". A comma in a value is written twice. ConfigError."""
        where, *rest = split_commas(text) or [""]
        return cls(CONSOLE.take("console", where), **cls.from_words(rest))


def console_options(value: Any) -> ConsoleOptions:
    """From whatever a list of consoles may have in it."""
    if isinstance(value, ConsoleOptions):
        return value
    return ConsoleOptions.parse(value) if isinstance(value, str) else ConsoleOptions(value)


def unplain(name: str, data: Any, given: Mapping[str, Any]) -> list[ConsoleOptions]:
    """What was written down. A console that was an object is the one in its place of ``given``, where that has one."""
    again = given.get(name) or ()
    made = []
    for n, console in enumerate(data):
        one = f"{name}[{n}]"
        objects = {one: console_options(again[n]).where} if n < len(again) else {}
        made.append(ConsoleOptions(**{**console, "where": unplain_console(one, console["where"], objects)}))
    return made


# -- what a Spec says of them ------------------------------------------------------------------------------------------


def numbered(consoles: Sequence[ConsoleOptions]) -> list[tuple[int, str, ConsoleOptions]]:
    """(the port's number, its name among Machine.consoles) of each. Port 0 is the first console of the kernel's: a
    driver that knows of one port only has that. ConfigError for two with one name, and for too many.
    """
    first = next((n for n, console in enumerate(consoles) if console.name is None), None)
    numbers = iter(range(1, len(consoles) + 1))
    places: list[tuple[int, str, ConsoleOptions]] = []
    kernels = 0
    for n, console in enumerate(consoles):
        label = console.name
        if label is None:
            label, kernels = f"hvc{kernels}", kernels + 1
        if any(label == other for _, other, _ in places):
            raise ConfigError(f"two consoles with name={label}: give each its own")
        places.append((0 if n == first else next(numbers), label, console))
    if places and max(number for number, _, _ in places) >= MOST_PORTS:
        raise ConfigError(f"{len(consoles)} consoles: a virtio console has at most {MOST_PORTS} ports, ask for fewer")
    return places


def on_terminal(consoles: Sequence[Any]) -> bool:
    """Whether one of them, as --console or a configuration file has it, is on the command's terminal."""
    return any(console_options(console).where == "stdio" for console in consoles)


def with_terminal(saved: object) -> list[ConsoleOptions] | None:
    """The consoles of a saved Spec, with the terminal in the place of what were objects; None where nothing was."""
    if not isinstance(saved, list) or not all(isinstance(console, dict) for console in saved):
        return None  # whoever reads all of it says so
    ends = [console.get("where") for console in saved]
    if not any(isinstance(end, dict) for end in ends):
        return None
    names = [console.get("name") for console in saved]
    return [
        ConsoleOptions("stdio" if isinstance(end, dict) else end, name=name)
        for end, name in zip(ends, names, strict=True)
    ]
