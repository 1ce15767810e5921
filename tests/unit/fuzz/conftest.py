"""One fenced board for all tests of a module; they reset it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzz.harness import FencedBoard


@pytest.fixture(scope="module")
def shared_board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FencedBoard]:
    made = FencedBoard(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.close()
