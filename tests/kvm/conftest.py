"""``boot(source, mode, **options)`` makes a Guest that the test need not close."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from guests import Guest


@pytest.fixture
def boot() -> Iterator[Callable[..., Guest]]:
    made: list[Guest] = []

    def make(source: str, mode: str = "long64", **options: Any) -> Guest:
        guest = Guest(source, mode, **options)
        made.append(guest)
        return guest

    yield make
    for guest in made:
        guest.close()
