"""How often a guest resets itself, and when that is said."""

from __future__ import annotations

import pytest

from pyvmm import reset_count
from pyvmm.reset_count import ResetCount


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    now = [5_000]
    monkeypatch.setattr(reset_count, "monotonic_ns", lambda: now[0])
    return now


def noted(clock: list[int], *gaps_ms: int) -> list[str]:
    count, said = ResetCount(), list[str]()
    count.on_often = said.append
    for gap in gaps_ms:
        clock[0] += gap * 1_000_000
        count.note("port 0xcf9")
    return said


def test_the_third_within_a_second_is_told_once(clock: list[int]) -> None:
    assert noted(clock, 0, 500) == []
    assert noted(clock, 0, 500, 500) == ["the guest resets itself again and again: 3 resets, the last by port 0xcf9"]
    assert noted(clock, 0, 500, 501) == []
    assert len(noted(clock, *[1] * 100)) == 1
    assert noted(clock, 0, 900, 900, 50, 50) == [
        "the guest resets itself again and again: 4 resets, the last by port 0xcf9"
    ]


def test_the_sentence() -> None:
    count = ResetCount()
    assert count.sentence() == ""
    count.note("port 0x92")
    assert count.sentence() == "1 reset, the last by port 0x92"
    assert count.sentence(1) == ""
    count.note("a triple fault")
    count.note("a triple fault")
    assert count.sentence() == "3 resets, the last by a triple fault"
    assert count.sentence(1) == "2 resets, the last by a triple fault"


def test_nobody_need_listen() -> None:
    count = ResetCount()
    for _ in range(10):
        count.note("a triple fault")
    assert count.count == 10
