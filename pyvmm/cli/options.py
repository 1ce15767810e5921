"""A table of options, and a parser for it.

Not argparse: importing it and building a parser takes longer than everything pyvmm itself does before the first guest
instruction.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.options import wrapped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.options import Options, Row


HELP_COLUMN = 32


class Option:
    """``--name METAVAR``, or a flag where ``metavar`` is empty. ``convert`` makes the value; ValueError refuses it.

    ``file``: what it is in the table [run] of a configuration file, as Kind.file has it; "" where it is not there.
    ``words``: the value has words of its own, which ``help`` in its place lists, and perhaps QEMU's. Of two values the
    last counts, unless ``one`` says why there can be one only.
    """

    __slots__ = ("convert", "file", "help", "key", "many", "metavar", "names", "one", "words")

    def __init__(
        self,
        names: str,
        metavar: str,
        help: str,
        convert: Callable[[str], Any] = str,
        *,
        key: str = "",
        many: bool = False,
        words: bool = False,
        one: str = "",
        file: str | None = None,
    ) -> None:
        self.names = names.split()
        self.metavar = metavar
        self.help = help
        self.convert = convert
        self.key = key or self.names[0].lstrip("-").replace("-", "_")
        self.many = many
        self.words = words
        self.one = one
        self.file = ("string" if metavar else "boolean") if file is None else file


def from_row(row: Row) -> Option:
    """An option of a class of Options, where it has a name on the command line."""
    shown = f" (default {row.default})" if row.has_default_to_tell else ""
    return Option(
        row.cli, row.metavar, row.help + shown, row.kind.from_text, key=row.name, many=row.many, words=row.own_words,
        one=row.one, file="",
    )  # fmt: skip


def from_rows(options: type[Options]) -> list[Option]:
    """All that have a name on the command line."""
    return [from_row(row) for row in options.rows.values() if row.cli]


def parse(options: Sequence[Option], args: Sequence[str], *, verb: str, words: str = "") -> dict[str, Any]:
    """{key: value} of what was given. ConfigError names what is wrong and what to do.

    What is no option makes the list ``values[words]``, where ``words`` is given; such a verb has a board, and takes
    QEMU's options too. ``values["help"]`` is what help is asked for, or True.
    """
    by_name = {name: option for option in options for name in option.names}
    values: dict[str, Any] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        name, equals, attached = word.partition("=") if word.startswith("--") else (word, "", "")
        option = by_name.get(name)
        if option is None:
            if not words:
                raise ConfigError(unknown(word, name, by_name, verb))
            if word[:1] == "-" and len(word) > 1:
                from pyvmm.cli.qemu_words import rewrite

                rest = rewrite(word, rest, by_name, verb)
            else:
                values.setdefault(words, []).append(word)
            continue
        if not option.metavar:
            if equals:
                raise ConfigError(f"{name} takes no value: leave {attached!r} out")
            if option.key == "help":
                return {"help": rest[0] if rest else True}
            values[option.key] = True
            continue
        if not equals and not rest:
            raise ConfigError(f"{name} needs a value: {name} {option.metavar}")
        text = attached if equals else rest.pop(0)
        if option.words:
            if text in ("help", "?"):
                return {"help": option.names[0]}
            if not text.isalnum() or text in ("null", "user", "nic", "stdio"):
                from pyvmm.cli.qemu_words import value_words

                theirs = value_words(option.names[0], text)
                if theirs is not None:
                    rest = [*theirs, *rest]
                    continue
        try:
            value = option.convert(text)
        except ValueError:
            raise ConfigError(f"{name} {text}: that is no {option.metavar} ({option.help})") from None
        if option.one and option.key in values:
            raise ConfigError(f"{name} is given twice: {option.one}")
        if option.many:
            values.setdefault(option.key, []).append(value)
        else:
            values[option.key] = value
    return values


def unknown(word: str, name: str, by_name: dict[str, Option], verb: str) -> str:
    from pyvmm.cli.qemu_words import nearest

    lists = f"`pyvmm {verb} --help` lists what it takes"
    if not word.startswith("-"):
        return f"pyvmm {verb} takes no {word!r}: {lists}"
    near = nearest(name.lstrip("-"), by_name)
    return f"pyvmm {verb} has no option {name}: " + (f"did you mean {near}?" if near else lists)


def usage(title: str, options: Sequence[Option]) -> str:
    return "\n".join([title, "", *map(entry, options)]) + "\n"


def entry(option: Option) -> str:
    """An option and what it means."""
    left = "  " + ", ".join(option.names) + (f" {option.metavar}" if option.metavar else "")
    return "\n".join(wrapped(f"{left}  ", HELP_COLUMN, option.help + ("; may be repeated" if option.many else "")))
