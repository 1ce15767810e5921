"""What a command takes and gives: each kind of value once, for the check, the error and the schema.

Errors are QEMU's words (include/qapi/qmp/qerror.h, qapi/qobject-input-visitor.c). Names in errors are paths:
``protocol.file``, ``vcpus[0]``.
"""

from __future__ import annotations

from os import fsencode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

INT64_MAX = (1 << 63) - 1
SHOWN_CHARS = 80  # of a client's word in an error


class QmpError(Exception):
    """A command can't be carried out: the class and the description that the client is told."""

    def __init__(self, desc: str, class_: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.class_ = class_


def shown(word: str) -> str:
    """A client's word in a message, no longer than a message should be."""
    return word if len(word) <= SHOWN_CHARS else word[:SHOWN_CHARS] + "..."


class Kind:
    """``take(where, value)`` gives the value or raises QmpError. ``name`` is the schema's, ``entry()`` what it says."""

    name = ""

    def take(self, where: str, value: Any) -> Any:
        raise NotImplementedError

    def parts(self) -> Iterator[Kind]:
        """The kinds that it is made of."""
        yield from ()

    def entry(self, names: dict[Kind, str]) -> dict[str, Any]:
        """Of the schema (QEMU qapi/introspect.json, SchemaInfo), but for the name. ``names`` has those of its parts."""
        raise NotImplementedError


class Builtin(Kind):
    """One of JSON's own. ``word`` is what errors call it."""

    def __init__(self, name: str, json_type: str, word: str, *types: type) -> None:
        self.name = name
        self.json_type = json_type
        self.word = word
        self.types = types

    def take(self, where: str, value: Any) -> Any:
        if type(value) not in self.types:  # a bool is no integer here
            raise QmpError(f"Invalid parameter type for '{where}', expected: {self.word}")
        return value

    def entry(self, names: dict[Kind, str]) -> dict[str, Any]:
        return {"meta-type": "builtin", "json-type": self.json_type}


class AnyKind(Kind):
    name = "any"

    def take(self, where: str, value: Any) -> Any:
        return value

    def entry(self, names: dict[Kind, str]) -> dict[str, Any]:
        return {"meta-type": "builtin", "json-type": "value"}


class Int(Builtin):
    """A whole number from ``least`` to ``most``. All of them are the schema's one ``int``."""

    def __init__(self, least: int = -INT64_MAX - 1, most: int = INT64_MAX) -> None:
        super().__init__("int", "int", "integer", int)
        self.least = least
        self.most = most

    def take(self, where: str, value: Any) -> int:
        number: int = super().take(where, value)
        if not self.least <= number <= self.most:
            raise QmpError(f"Parameter '{shown(where)}' expects an integer from {self.least} to {self.most}")
        return number


class FileName(Builtin):
    """A path: text that the host can have for one. The schema's ``str``."""

    def __init__(self) -> None:
        super().__init__("str", "string", "string", str)

    def take(self, where: str, value: Any) -> str:
        path: str = super().take(where, value)
        try:
            usable = bool(path) and "\0" not in path and bool(fsencode(path))
        except UnicodeEncodeError:  # a lone surrogate
            usable = False
        if not usable:
            raise QmpError(f"Parameter '{where}' expects the path of a file")
        return path


STR = Builtin("str", "string", "string", str)
FILE = FileName()
BOOL = Builtin("bool", "boolean", "boolean", bool)
NUMBER = Builtin("number", "number", "number", int, float)
NULL = Builtin("null", "null", "null", type(None))
INT = Int()
SIZE = Int(0)
ANY = AnyKind()


class Enum(Kind):
    def __init__(self, *values: str) -> None:
        self.values = values

    def take(self, where: str, value: Any) -> str:
        text: str = STR.take(where, value)
        if text not in self.values:
            raise QmpError(f"Parameter '{where}' does not accept value '{shown(text)}'")
        return text

    def entry(self, names: dict[Kind, str]) -> dict[str, Any]:
        members = [{"name": value} for value in self.values]
        return {"meta-type": "enum", "values": list(self.values), "members": members}


class ListOf(Kind):
    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def take(self, where: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise QmpError(f"Invalid parameter type for '{where}', expected: array")
        return [self.kind.take(f"{where}[{n}]", each) for n, each in enumerate(value)]

    def parts(self) -> Iterator[Kind]:
        yield self.kind

    def entry(self, names: dict[Kind, str]) -> dict[str, Any]:
        return {"meta-type": "array", "element-type": names[self.kind]}


class Optional:
    """A member that may be left out."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind


class Struct(Kind):
    """Members by their names: ``Struct({"device": Optional(STR), "size": SIZE})``."""

    def __init__(self, members: dict[str, Kind | Optional], *, doc: str = "") -> None:
        self.doc = doc
        self.members = members

    def take(self, where: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise QmpError(f"Invalid parameter type for '{where}', expected: object")
        at = f"{where}." if where else ""
        taken = {}
        for name, kind in self.members.items():
            if isinstance(kind, Optional):
                if name in value:
                    taken[name] = kind.kind.take(at + name, value[name])
            elif name in value:
                taken[name] = kind.take(at + name, value[name])
            else:
                raise QmpError(f"Parameter '{at}{name}' is missing")
        for name in value:
            if name not in self.members:
                raise QmpError(f"Parameter '{at}{shown(name)}' is unexpected")
        return taken

    def parts(self) -> Iterator[Kind]:
        for kind in self.members.values():
            yield kind.kind if isinstance(kind, Optional) else kind

    def entry(self, names: dict[Kind, str]) -> dict[str, Any]:
        members = []
        for name, kind in self.members.items():
            if isinstance(kind, Optional):
                members.append({"name": name, "type": names[kind.kind], "default": None})
            else:
                members.append({"name": name, "type": names[kind]})
        return {"meta-type": "object", "members": members}


class Alternate(Kind):
    """One of several kinds that JSON tells apart."""

    def __init__(self, *kinds: Builtin) -> None:
        self.kinds = kinds

    def take(self, where: str, value: Any) -> Any:
        for kind in self.kinds:
            if type(value) in kind.types:
                return kind.take(where, value)
        raise QmpError(f"Invalid parameter type for '{where}', expected: {' or '.join(k.word for k in self.kinds)}")

    def parts(self) -> Iterator[Kind]:
        yield from self.kinds

    def entry(self, names: dict[Kind, str]) -> dict[str, Any]:
        return {"meta-type": "alternate", "members": [{"type": names[kind]} for kind in self.kinds]}


NOTHING = Struct({})
