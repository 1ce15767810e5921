"""Plain data with something in it changed, by choices out of a fuzzer's bytes: for what a stranger may have written."""

from __future__ import annotations

from typing import Any

from pyvmm.msgpack import unpack

VALUES = (
    *(None, True, False, -1, 0, 1, 2, 255, 4095, 4096, 1 << 31, (1 << 32) - 1, 1 << 52, (1 << 63) - 1, (1 << 64) - 1),
    *(b"", b"x", bytes(16), bytes(4096), "", "x", "\0", "\udce9".encode("utf-8", "replace").decode(), "long " * 100),
    *([], [[]], [0, 0], [0, 4096], [0, 4096, 4096], {}, {"": 0}, {"state": {}, "version": 1}),
)
MOST_EDITS = 3


class Choices:
    """Out of bytes; zeros where there are none left."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def number(self, size: int) -> int:
        return int.from_bytes(bytes(self.byte() for _ in range(size)), "little")

    def below(self, limit: int) -> int:
        return self.number(1 if limit <= 256 else 2) % limit

    def blob(self, most: int) -> bytes:
        return bytes(self.byte() for _ in range(self.below(most + 1)))


def edited(packed: bytes, choices: Choices) -> Any:
    """What ``packed`` holds, with one to three things in it changed."""
    whole = unpack(packed)
    for _ in range(1 + choices.below(MOST_EDITS)):
        edit(whole, choices)
    return whole


def edit(whole: Any, choices: Choices) -> None:
    """Somewhere in it: another value, one less, one more, or one that stands elsewhere."""
    holder, key = place_in(whole, choices)
    if holder is None:
        return
    what = choices.byte() % 8
    if what == 0:
        del holder[key]
    elif what == 1:
        other, there = place_in(whole, choices)
        # Not one that holds this one: such data has no end.
        if other is not None and not isinstance(other[there], dict | list):
            holder[key] = other[there]
    elif what == 2 and isinstance(holder, dict):
        holder["strange"] = value(choices)
    elif what == 2:
        holder.append(value(choices))
    elif what == 3 and isinstance(holder[key], bytes) and holder[key]:
        changed = bytearray(holder[key])
        for _ in range(1 + choices.below(8)):
            changed[choices.below(len(changed))] = choices.byte()
        holder[key] = bytes(changed)
    else:
        holder[key] = value(choices)


def place_in(whole: Any, choices: Choices) -> tuple[Any, Any]:
    """A list or dict and what to find one of its things by; None where there is nothing in ``whole``."""
    holder, key = None, None
    at = whole
    while isinstance(at, dict | list) and at:
        holder, key = at, choices.below(len(at))
        if isinstance(at, dict):
            key = list(at)[key]
        at = at[key]
        if choices.byte() % 16 == 0:
            break
    return holder, key


def value(choices: Choices) -> Any:
    kind = choices.byte() % 4
    if kind == 0:
        return choices.number(choices.below(9))
    if kind == 1:
        return choices.blob(32)
    return VALUES[choices.below(len(VALUES))]
