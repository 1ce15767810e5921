"""Guest memory of a few sizes, closed at the end of the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvmm.guest_memory import GuestMemory

MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    guest = GuestMemory(64 * MIB)
    yield guest
    guest.close()


@pytest.fixture
def large_memory() -> Iterator[GuestMemory]:
    """5 GiB, of which 2 GiB stand at 4 GiB. Nothing is touched, so nothing is used."""
    guest = GuestMemory(5 << 30)
    yield guest
    guest.close()
