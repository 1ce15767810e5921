"""An option is one row of a class; all its faces come from that row.

    class MachineConfig(Options):
        cpus: int = option(whole(least=1), 1, "number of vCPUs", cli="--cpus", metavar="N")

The faces: keyword argument and attribute, with the default; what it is checked for, by its kind; the class's docstring;
the command line and ``--help`` (``cli/options.py``); configuration files (``config_file.py``), their schema and their
reference (``cli/config_schema.py``); QEMU's words for a drive (``block/options.py``); its place in a Spec and in what a
Spec is written as. Only for static type checkers the names and types of MachineOptions are written once more
(config.py), which a test compares.
"""

from __future__ import annotations

from posix import fspath
from sys import getfilesystemencodeerrors, getfilesystemencoding

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from os import PathLike
    from typing import Any, Self

    from typing_extensions import TypeIs

WIDTH = 118  # of help
GIVEN = "given"  # in a Spec that was written down: what only the process had that wrote it
ON_OFF = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


# -- kinds ---------------------------------------------------------------------------------------------------------


class Kind:
    """What values an option takes.

    take       (the option's name, a value) -> the value in its one form. ConfigError, which says what to give instead,
               where it is none of this kind.
    file       what it is in a configuration file, in JSON Schema's words for types; "" where a file can't say it. A
               string beside another type is what the command line has.
    table      the class of options that it may have there as a table, or a list of tables, which it gives when asked.
    metavar    stands for a value on the command line; empty for a flag.
    from_text  what take is to get for the text of the command line or of a -drive. ValueError where that can't be.
    plain      a value from take as data that anything can write down: None, bool, int, str, lists and dicts of them.
    unplain    (name, that data, given) -> a value for take. ``given`` has, by the option's name, what could not be
               written down.
    choices    the words there are, where there are only some.
    bounds     the least and the most of a number, where there are such.
    """

    __slots__ = ("bounds", "choices", "file", "from_text", "metavar", "plain", "table", "take", "unplain")

    def __init__(
        self,
        take: Callable[[str, Any], Any],
        *,
        file: str = "string",
        table: Callable[[], type[Options]] | None = None,
        metavar: str = "TEXT",
        from_text: Callable[[str], Any] = str,
        plain: Callable[[Any], Any] | None = None,
        unplain: Callable[[str, Any, Mapping[str, Any]], Any] | None = None,
        choices: tuple[str, ...] = (),
        bounds: tuple[int | None, int | None] = (None, None),
    ) -> None:
        self.take = take
        self.file = file
        self.table = table
        self.bounds = bounds
        self.metavar = metavar
        self.from_text = from_text
        self.plain = plain or as_it_is
        self.unplain = unplain or as_it_was
        self.choices = choices


def as_it_is(value: Any) -> Any:
    return value


def as_it_was(name: str, data: Any, given: Mapping[str, Any]) -> Any:
    return data


def take_flag(name: str, value: Any) -> bool:
    if not isinstance(value, int) or value not in (0, 1):
        raise ConfigError(f"{name}={value!r}: give True or False")
    return bool(value)


FLAG = Kind(take_flag, file="boolean", metavar="")


def on_or_off(text: str) -> bool:
    if text not in ON_OFF:
        raise ValueError("use on or off")
    return ON_OFF[text]


SWITCH = Kind(take_flag, file="boolean", metavar="on|off", from_text=on_or_off)


def whole(
    *,
    least: int = 0,
    most: int | None = None,
    give: str = "",
    none: bool = False,
    from_text: Callable[[str], Any] | None = None,
    file: str = "integer",
) -> Kind:
    """A whole number; ``none``: or None. ``give`` completes the sentence, in place of the limits."""
    give = give or (f"a whole number from {least}" + ("" if most is None else f" to {most}"))

    def take(name: str, value: Any) -> int | None:
        if value is None and none:
            return None
        if not is_int(value) or value < least or (most is not None and value > most):
            shown = format(value, "d") if is_int(value) else repr(value)
            raise ConfigError(f"{name}={shown}: give {give}")
        return int(value)

    return Kind(take, file=file, metavar="N", from_text=from_text or number, bounds=(least, most))


def word(
    *choices: str, none: bool = False, unset: str = "", note: str = "", from_text: Callable[[str], Any] = str
) -> Kind:
    """One of some words. ``none``: or None; ``unset``: the word that means None. ``note`` ends the sentence."""

    def take(name: str, value: Any) -> str | None:
        if value is None and (none or unset):
            return None
        if not isinstance(value, str) or value not in choices:
            raise ConfigError(f"{name}={value!r}: use {listed(choices, 'or')}{note and f': {note}'}")
        return None if value == unset else str(value)

    return Kind(take, metavar="WORD", from_text=from_text, choices=choices)


def disable_legacy(default: str | None = None) -> Any:
    """The row by which a virtio device on PCI has no legacy interface (virtio 1.2, 1.3.1)."""
    return interface_row("legacy", word("auto", "on", "off", none=True), "auto, on or off", default)


def disable_modern(default: str | None = None) -> Any:
    """The row by which it has the legacy interface only."""
    return interface_row("modern", word("on", "off", none=True), "on or off", default)


def interface_row(which: str, kind: Kind, choices: str, default: str | None) -> Any:
    help, words, cli = f"{choices}: on PCI a virtio device has no {which} interface", f"disable-{which}", ""
    if default is None:
        help += "; without it as the machine's virtio devices"
    else:
        help, words, cli = f"{help}, where its own options do not say so", "", f"--virtio-disable-{which}"
    return option(kind, default, help, words=words, cli=cli, metavar=choices.replace(", ", "|").replace(" or ", "|"))


def text(*, none: bool = False, printable: bool = False) -> Kind:
    """A string without zeros; ``none``: or None. ``printable``: of ASCII characters that can be printed."""

    def take(name: str, value: Any) -> str | None:
        if value is None and none:
            return None
        if printable and not (isinstance(value, str) and value.isascii() and value.isprintable()):
            raise ConfigError(f"{name}={value!r}: use printable ASCII characters")
        return take_text(name, value)

    return Kind(take)


def take_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ConfigError(f"{name}={value!r}: give a string")
    return str(value)


# -- rows ----------------------------------------------------------------------------------------------------------


class Row:
    """One option.

    ``help`` is one or more clauses without a full stop; ``python`` goes on with what only Python can give. ``cli``: its
    names on the command line, none where it has none. ``many``: it may be repeated there; ``own_words``: its value has
    words of its own, which ``help`` in its place lists, and perhaps QEMU's; ``one``: why it can't be given twice.
    ``words``: how a -drive spells it.
    """

    __slots__ = (
        *("cli", "default", "help", "kind", "many", "metavar", "name", "one", "own_words", "python", "words"),
    )

    def __init__(
        self,
        kind: Kind,
        default: Any,
        help: str,
        *,
        python: str = "",
        cli: str = "",
        metavar: str | None = None,
        many: bool = False,
        own_words: bool = False,
        one: str = "",
        words: str = "",
    ) -> None:
        self.name = ""
        self.kind = kind
        self.default = default
        self.help = help
        self.python = python
        self.cli = cli
        self.metavar = kind.metavar if metavar is None else metavar
        self.many = many
        self.own_words = own_words
        self.one = one
        self.words = words.split()


    @property
    def has_default_to_tell(self) -> bool:
        """Whether there is a default that says something, and the help does not say it."""
        return self.default not in (None, (), "", False) and self.default != {} and "default" not in self.help


def option(kind: Kind, default: Any, help: str, **faces: Any) -> Any:
    """A row, in the body of a class of Options. Type checkers see the annotation in front of it."""
    return Row(kind, default, help, **faces)


class Doc:
    """A docstring with the table of the rows at its end, made when somebody reads it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __get__(self, instance: object, owner: type[Options]) -> str:
        width = max(len(name) for name in owner.rows) + 2
        lines = [self._text.rstrip(), ""]
        for name, row in owner.rows.items():
            told = all(choice in row.help for choice in row.kind.choices)
            before = "" if told else f"{listed(row.kind.choices, 'or')}: "
            after = f" (default {row.default!r})" if row.has_default_to_tell else ""
            lines += wrapped(f"    {name:<{width}}", 4 + width, before + row.help + row.python + after)
        return "\n".join(lines)


class Options:
    """Values for the rows of its class, each an attribute; those that are not given have the row's default.

    What is given is checked when an object is made. ConfigError for whatever is wrong, in one sentence that says what
    to give instead. Where ``frozen``, every value is in its one form from then on, and the object does not change; an
    object of another class may be assigned to, and is checked again by whoever uses it.
    """

    rows: dict[str, Row] = {}
    other_words: Mapping[str, tuple[str, Callable[[str], Any]]] = {}  # word: (option, its way)
    defaults: dict[str, Any] = {}
    noun = ""  # what comes before an option's name in messages
    thing = ""  # what has them, in messages
    frozen = False

    def __init_subclass__(cls) -> None:
        cls.rows = dict(cls.rows)
        for name, row in list(vars(cls).items()):
            if isinstance(row, Row):
                row.name = name
                cls.rows[name] = row
                setattr(cls, name, row.default)
        cls.defaults = {name: row.default for name, row in cls.rows.items()}
        if cls.__doc__ is not None:
            cls.__doc__ = Doc(cls.__doc__)  # type: ignore[assignment]  # it gives a string

    def __init__(self, **values: Any) -> None:
        for name in values:
            if name not in self.rows:
                raise ConfigError(self.unknown(name))
        self.__dict__.update(values)
        taken = self.taken()
        self.check_together(taken)
        if self.frozen:
            self.__dict__.update(taken)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.frozen:
            raise AttributeError(f"a {type(self).__name__} does not change: make another one, by changed({name}=...)")
        if name not in self.rows:
            raise ConfigError(self.unknown(name))
        self.__dict__[name] = value

    @classmethod
    def unknown(cls, name: str, known: Iterable[str] | None = None) -> str:
        """The sentence for an option that there is none of; ``known``: the words for those there are."""
        near = near_match(name, cls.rows if known is None else known)
        if not cls.thing:
            return f"there is no option {name!r}{near}"
        return f"{cls.thing} has no option {name!r}{near or f': see {cls.__name__} for those there are'}"

    @classmethod
    def from_words(cls, words: str | Sequence[str]) -> dict[str, Any]:
        """Values by option names, of "word=value,word=value" or its items. A comma in a value is written twice; what
        is ``many`` is gathered. ConfigError.
        """
        ways = {word: (name, row.kind.from_text) for name, row in cls.rows.items() for word in row.words}
        ways |= cls.other_words
        values: dict[str, Any] = {}
        for item in split_commas(words) if isinstance(words, str) else words:
            key, equals, value = item.partition("=")
            if not equals:
                raise ConfigError(f"{cls.noun}{item!r} has no value: write {item}=VALUE")
            if key not in ways:
                raise ConfigError(cls.unknown(key, ways))
            name, from_text = ways[key]
            try:
                taken = from_text(value)
            except ValueError as error:
                raise ConfigError(f"{cls.noun}{key}={value}: {error}") from None
            values[name] = (*values.get(name, ()), *taken) if cls.rows[name].many else taken
        return values

    def taken(self) -> dict[str, Any]:
        """Every option's value in its one form, each checked by itself. The object stays as it is."""
        values = dict(self.defaults)
        for name, value in self.__dict__.items():
            values[name] = self.rows[name].kind.take(f"{self.noun}{name}", value)
        return values

    def check_together(self, values: dict[str, Any]) -> None:
        """ConfigError for values that do not go together. Puts into ``values`` (from ``taken``) what follows from the
        others.
        """

    def given(self) -> dict[str, Any]:
        """What is not left to the defaults, as it was given."""
        return dict(self.__dict__)

    def changed(self, **changes: Any) -> Self:
        """A copy with other values for some options. ConfigError as from the constructor."""
        return type(self)(**{**self.__dict__, **changes})

    def plain(self) -> dict[str, Any]:
        """All values as data that anything can write down: msgspec, json."""
        values = self.taken()
        return {name: row.kind.plain(values[name]) for name, row in self.rows.items()}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.taken() == other.taken()

    def __repr__(self) -> str:
        changed = [f"{name}={value!r}" for name, value in self.__dict__.items() if value != self.rows[name].default]
        return f"{type(self).__name__}({', '.join(changed)})"


# -- words ---------------------------------------------------------------------------------------------------------


def wrapped(first: str, indent: int, text: str) -> list[str]:
    """``text`` behind ``first``, its further lines indented as far. Where ``first`` is longer, on lines of its own."""
    lines = [first] if len(first) <= indent else [first, " " * indent]
    lines[-1] = lines[-1].ljust(indent)
    begun = False
    for word in text.split():
        if begun and len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append(" " * indent)
            begun = False
        lines[-1] += f" {word}" if begun else word
        begun = True
    return [line.rstrip() for line in lines]


def listed(words: Iterable[str], last: str) -> str:
    """a, b or c."""
    *most, end = words
    return f"{', '.join(most)} {last} {end}" if most else end


def near_match(name: str, known: Iterable[str]) -> str:
    """What may have been meant, for the end of a sentence; empty where that is a guess."""
    import difflib

    near = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {near[0]}?" if near else ""


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_path(value: object) -> TypeIs[str | PathLike[str]]:
    """Whether it names a file. isinstance by os.PathLike says the same, at the cost of importing os."""
    return isinstance(value, str) or hasattr(type(value), "__fspath__")


def path_text(path: str | bytes | PathLike[str] | PathLike[bytes]) -> str:
    """os.fsdecode."""
    name = fspath(path)
    return name if isinstance(name, str) else name.decode(getfilesystemencoding(), getfilesystemencodeerrors())


def number(text: str) -> int:
    """Decimal, or 0x and hexadecimal."""
    return int(text, 0)


def decimal(text: str) -> int:
    try:
        return int(text, 10)
    except ValueError:
        raise ValueError("give a number") from None


def split_commas(text: str) -> list[str]:
    """At single commas; two stand for one."""
    items = [""]
    position = 0
    while position < len(text):
        if text[position] != ",":
            items[-1] += text[position]
        elif text[position : position + 2] == ",,":
            items[-1] += ","
            position += 1
        else:
            items.append("")
        position += 1
    return [item for item in items if item]
