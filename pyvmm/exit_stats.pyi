from collections.abc import Iterable

from typing_extensions import disjoint_base

DIRECTIONS: tuple[str, str, str]

class ExitStat:
    reason: str
    address: int | None
    direction: str
    count: int
    sum_ns: float
    min_ns: float
    max_ns: float
    histogram_ns: list[tuple[float, int]]
    def __init__(
        self,
        reason: str,
        address: int | None,
        direction: str,
        count: int,
        sum_ns: float,
        min_ns: float,
        max_ns: float,
        histogram_ns: list[tuple[float, int]],
    ) -> None: ...
    @property
    def mean_ns(self) -> float: ...
    @property
    def median_ns(self) -> float: ...

@disjoint_base
class ExitStats:
    def clear(self) -> None: ...
    def rows(self, tsc_khz: float) -> list[ExitStat]: ...

def merge(tables: Iterable[list[ExitStat]]) -> list[ExitStat]: ...
def format_table(rows: list[ExitStat], names: dict[tuple[str, int | None], str] | None = None) -> str: ...
