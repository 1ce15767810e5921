from collections.abc import Iterable

from typing_extensions import disjoint_base

DIRECTIONS: tuple[str, str, str]

class ExitStat:
    reason: str
    address: int | None
    direction: str
    count: int
    # Whole in what Machine.exit_stats() gives; a row of ExitStats.rows() alone has fractions.
    sum_ns: int
    min_ns: int
    max_ns: int
    histogram_ns: list[tuple[int, int]]
    region: str | None
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
        region: str | None = None,
    ) -> None: ...
    @property
    def mean_ns(self) -> int: ...
    @property
    def median_ns(self) -> int: ...

@disjoint_base
class ExitStats:
    def clear(self) -> None: ...
    def first_exit_ns(self, tsc_khz: float) -> int | None: ...
    def since_first_exit_ns(self, tsc_khz: float) -> int | None: ...
    def rows(self, tsc_khz: float) -> list[ExitStat]: ...

def merge(tables: Iterable[list[ExitStat]]) -> list[ExitStat]: ...
def format_table(rows: list[ExitStat], names: dict[tuple[str, int | None], str] | None = None) -> str: ...
