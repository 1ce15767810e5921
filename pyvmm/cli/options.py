"""A table of options, and a parser for it.

Not argparse: importing it and building a parser takes longer than everything pyvmm itself does before the first guest
instruction.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any


class Option:
    """``--name METAVAR``, or a flag where ``metavar`` is empty. ``convert`` makes the value; ValueError refuses it."""

    __slots__ = ("convert", "help", "key", "many", "metavar", "names")

    def __init__(
        self,
        names: str,
        metavar: str,
        help: str,
        convert: Callable[[str], Any] = str,
        *,
        key: str = "",
        many: bool = False,
    ) -> None:
        self.names = names.split()
        self.metavar = metavar
        self.help = help
        self.convert = convert
        self.key = key or self.names[0].lstrip("-").replace("-", "_")
        self.many = many


def parse(options: Sequence[Option], args: Sequence[str], *, words: str = "") -> dict[str, Any]:
    """{key: value} of what was given. ConfigError names what is wrong and what to do.

    What is no option makes the list ``values[words]``, where ``words`` is given.
    """
    by_name = {name: option for option in options for name in option.names}
    values: dict[str, Any] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        name, equals, attached = word.partition("=") if word.startswith("--") else (word, "", "")
        option = by_name.get(name)
        if option is None and words and not word.startswith("-"):
            values.setdefault(words, []).append(word)
            continue
        if option is None:
            raise ConfigError(unknown(word, name, by_name))
        if not option.metavar:
            if equals:
                raise ConfigError(f"{name} takes no value: leave {attached!r} out")
            values[option.key] = True
            continue
        if not equals and not rest:
            raise ConfigError(f"{name} needs a value: {name} {option.metavar}")
        text = attached if equals else rest.pop(0)
        try:
            value = option.convert(text)
        except ValueError:
            raise ConfigError(f"{name} {text}: that is no {option.metavar} ({option.help})") from None
        if option.many:
            values.setdefault(option.key, []).append(value)
        else:
            values[option.key] = value
    return values


def unknown(word: str, name: str, by_name: dict[str, Option]) -> str:
    import difflib

    if not word.startswith("-"):
        return f"{word!r} is no option: kernels go by --kernel, flat binaries by --flat"
    near = difflib.get_close_matches(name, by_name, 1)
    return f"there is no option {name}" + (f": did you mean {near[0]}?" if near else ": `pyvmm run --help` lists them")


def usage(title: str, options: Sequence[Option]) -> str:
    lines = [title, ""]
    for option in options:
        left = "  " + ", ".join(option.names) + (f" {option.metavar}" if option.metavar else "")
        lines.append(f"{left:<30}  {option.help}" if len(left) <= 30 else f"{left}\n{'':<32}{option.help}")
    return "\n".join(lines) + "\n"


def number(text: str) -> int:
    """Decimal, or 0x and hexadecimal."""
    return int(text, 0)


def mib(text: str) -> int:
    """A size in MiB: 256, 256M or 2G."""
    unit = text[-1:].upper()
    if unit == "G":
        return int(text[:-1]) * 1024
    return int(text[:-1] if unit == "M" else text)


def port_or_none(text: str) -> int | None:
    return None if text == "none" else int(text, 0)
