"""What --restore says beside the file."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm.cli.restored import ways_of
from pyvmm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "path", "ways"),
    [
        ("a.snap", "a.snap", {}),
        ("a,,b.snap", "a,b.snap", {}),
        ("a.snap,check=on,eager=off", "a.snap", {"check": True, "eager": False}),
        ("a.snap,prefetch,clock=now", "a.snap", {"prefetch": True, "clock": "now"}),
    ],
)
def test_words(text: str, path: str, ways: dict[str, Any]) -> None:
    assert ways_of(text) == (path, ways)


@pytest.mark.parametrize("text", ["a.snap,chek=on", "a.snap,check=maybe", "a.snap,clock=then", ",check=on", ""])
def test_other_words_are_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"give FILE\[,check=on\]"):
        ways_of(text)
