"""Turns, medians and intervals: how the figures are taken. Standard library only.

Contenders take turns, A B C C B A a round, so that what slows the host down slows all of them; a contender's value of a
round is made from its two turns, and a ratio within each round. Figures are medians over rounds. Several sets
of fresh processes may be measured: where the pages of a process happen to lie makes a difference that no number of
rounds averages out. So values come as a list a set, of a value a round.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

Sets = Sequence[Sequence[float]]
Turn = TypeVar("Turn")

RESAMPLES = 1000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A median and its bootstrap 95% interval."""

    value: float
    low: float
    high: float

    def apart(self, other: Estimate) -> bool:
        """The intervals have nothing in common."""
        return self.low > other.high or self.high < other.low


def median(values: Sequence[float]) -> float:
    """The middle, or the mean of the two middle ones. ValueError where there is nothing."""
    if not values:
        raise ValueError("the median of nothing")
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def quantile(values: Sequence[float], q: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def thinned(values: Sequence[float], count: int = 201) -> list[float]:
    """At most ``count`` of the values, evenly over their order, the least and the greatest among them: their shape."""
    ordered = sorted(values)
    if len(ordered) <= count:
        return ordered
    return [ordered[round(n * (len(ordered) - 1) / (count - 1))] for n in range(count)]


def interval(groups: Sets, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95% bootstrap interval of the median. A group is what one process gave: both are resampled.

    The same values always give the same interval.
    """
    source = random.Random(1)

    def resampled() -> float:
        chosen = source.choices(groups, k=len(groups))
        return median([value for group in chosen for value in source.choices(group, k=len(group))])

    medians = sorted(resampled() for _ in range(resamples))
    tail = (1 - CONFIDENCE) / 2
    return medians[int(tail * resamples)], medians[int((1 - tail) * resamples)]


def estimate(sets: Sets, resamples: int = RESAMPLES) -> Estimate:
    """The median over all rounds of all sets."""
    return Estimate(median([value for each in sets for value in each]), *interval(sets, resamples))


def ratio(sets: Sets, reference: Sets, resamples: int = RESAMPLES) -> Estimate:
    """How many times the reference: the median of the rounds' ratios. Both must have the same rounds."""
    groups = [[a / b for a, b in zip(x, y, strict=True)] for x, y in zip(sets, reference, strict=True)]
    return estimate(groups, resamples)


def histogram_quantile(histogram: Sequence[tuple[float, int]], q: float) -> float:
    """Out of the exit profiler's [(upper bound, count)]; buckets double: interpolated on a log scale."""
    target = q * sum(count for _, count in histogram)
    seen = 0
    for bound, count in histogram:
        if seen + count >= target:
            return float(bound / 2 * 2 ** ((target - seen) / count))
        seen += count
    return 0.0


def one_round(contenders: Mapping[str, Callable[[], Turn]]) -> dict[str, tuple[Turn, Turn]]:
    """A B C C B A: the two turns of each."""
    forth = {name: take() for name, take in contenders.items()}
    back = {name: contenders[name]() for name in reversed(list(contenders))}
    return {name: (forth[name], back[name]) for name in contenders}


def rounds(
    contenders: Mapping[str, Callable[[], float]], count: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """``count`` rounds after ``warm_up`` that don't count: for each contender a value a round."""
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for n in range(-warm_up, count):
        for name, (forth, back) in one_round(contenders).items():
            if n >= 0:
                values[name].append((forth + back) / 2)
    return values
