"""Medians, intervals, ratios, and the order of turns."""

from __future__ import annotations

import random

import pytest

from pyvmm_benchmarks import sampling
from pyvmm_benchmarks.sampling import Estimate


def drawn(middle: float, spread: float, sets: int, rounds: int, seed: int) -> list[list[float]]:
    source = random.Random(seed)
    return [[source.gauss(middle, spread) for _ in range(rounds)] for _ in range(sets)]


def test_median_and_quantile() -> None:
    assert sampling.median([3, 1, 2]) == 2
    assert sampling.median([4, 1, 2, 3]) == 2.5
    assert sampling.quantile(range(100), 0.99) == 99
    assert sampling.quantile(range(1000), 0.5) == 500
    assert sampling.quantile([7.0], 0.99) == 7.0
    with pytest.raises(ValueError, match="nothing"):
        sampling.median([])


def test_thinned_keeps_the_shape() -> None:
    values = list(range(1000, 0, -1))
    kept = sampling.thinned(values, 101)
    assert len(kept) == 101
    assert (kept[0], kept[50], kept[-1]) == (1, 501, 1000)
    assert sampling.thinned([3.0, 1.0]) == [1.0, 3.0]


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        low, high = sampling.interval(drawn(10, 1, 1, 25, seed), resamples=200)
        covered += low <= 10 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_interval_shrinks_with_rounds_and_shows_what_differs_between_processes() -> None:
    few, many = (sampling.interval(drawn(10, 1, 1, rounds, 1)) for rounds in (10, 400))
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])
    # Four processes that differ by more than their rounds do.
    apart = [[middle + value / 100 for value in range(50)] for middle in (9.0, 10.0, 11.0, 12.0)]
    low, high = sampling.interval(apart)
    assert high - low > 1


def test_the_same_values_give_the_same_interval() -> None:
    values = drawn(10, 1, 3, 10, 5)
    assert sampling.interval(values) == sampling.interval(values)


def test_a_ratio_does_not_see_what_slows_both_down() -> None:
    source = random.Random(3)
    weather = [[source.uniform(1, 3) for _ in range(20)] for _ in range(3)]
    floor = [[10 * each for each in group] for group in weather]
    ours = [[10.5 * each for each in group] for group in weather]
    ratio = sampling.ratio(ours, floor)
    assert tuple(ratio) == pytest.approx((1.05, 1.05, 1.05))
    with pytest.raises(ValueError):
        sampling.ratio(ours, floor[:2])


def test_apart() -> None:
    assert Estimate(10, 9, 11).apart(Estimate(13, 12, 14))
    assert Estimate(13, 12, 14).apart(Estimate(10, 9, 11))
    assert not Estimate(10, 9, 11).apart(Estimate(11, 11, 12))


def test_a_round_goes_there_and_back() -> None:
    order = []

    def turn(name: str, cost: float) -> float:
        order.append(name)
        return cost + len(order)

    values = sampling.rounds({"a": lambda: turn("a", 10), "b": lambda: turn("b", 20)}, 2, warm_up=1)
    assert "".join(order) == "abba" * 3
    # A drift in time is the same to both: the middle of the two turns is.
    assert [b - a for a, b in zip(values["a"], values["b"], strict=True)] == [10, 10]


def test_histogram_quantile() -> None:
    histogram = [(128.0, 10), (256.0, 80), (512.0, 10)]
    assert 128 < sampling.histogram_quantile(histogram, 0.5) < 256
    assert sampling.histogram_quantile(histogram, 0.999) == pytest.approx(512, rel=0.02)
    assert sampling.histogram_quantile([], 0.5) == 0.0
