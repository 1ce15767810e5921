"""Pictures of a report, PNG and SVG: per case the distribution of every contender on one axis; the ratios of all cases.

matplotlib (extra ``bench``) is imported when a picture is asked for; it draws without a display.
"""

from __future__ import annotations

import textwrap
from typing import Any

from pyvmm.errors import ConfigError
from pyvmm_benchmarks.report import Case, Report

COLUMNS = 3
PANEL_INCHES = (5.2, 3.0)
FORMATS = ("png", "svg")
DPI = 110
SUBTITLE_COLUMNS = 110
CROWDED = 20  # times as much as the least
# Beyond these quantiles one stray sample would squeeze all the rest together.
SHOWN = (0.0, 0.995)


def pyplot() -> Any:
    """matplotlib.pyplot on its Agg back end. ConfigError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("a picture needs matplotlib: pip install 'pyvmm-kvm[bench]'") from None
    matplotlib.use("Agg")
    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "pyvmm"
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw(report: Report, prefix: str) -> list[str]:
    """``prefix``-distributions and ``prefix``-ratios, each as PNG and SVG: the paths written."""
    plt = pyplot()
    names = list(dict.fromkeys(result.name for case in report.cases for result in case.results if result.ran))
    colours = {name: plt.get_cmap("tab10")(n % 10) for n, name in enumerate(names)}
    figures = {"distributions": distributions(plt, report, colours), "ratios": ratios(plt, report, colours)}
    written = []
    for what, figure in figures.items():
        if figure is None:
            continue
        for suffix in FORMATS:
            path = f"{prefix}-{what}.{suffix}"
            try:
                figure.savefig(path, dpi=DPI, metadata={"Date": None} if suffix == "svg" else None)
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror}: name a place that can be written") from None
            written.append(path)
        plt.close(figure)
    return written


def subtitle(report: Report) -> str:
    kvm = str(report.host["kvm"]).split(": kernels")[0]  # what PVM does in detail is in the report
    return textwrap.fill(f"{kvm}; Linux {report.host['kernel']}; {report.host['cpu']}", SUBTITLE_COLUMNS)


def log_axis(axis: Any, values: list[float]) -> None:
    """Plain numbers; between the powers of ten only where there is room."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    crowded = not values or max(values) > CROWDED * min(values)
    axis.set_minor_formatter((lambda value, _: "") if crowded else (lambda value, _: f"{value:g}"))


def distributions(plt: Any, report: Report, colours: dict[str, Any]) -> Any:
    """A panel a case: what part of the samples took at most so long."""
    cases = [case for case in report.cases if any(shape(result) for result in case.results)]
    if not cases:
        return None
    columns = min(COLUMNS, len(cases))
    rows = -(-len(cases) // columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.9)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel, case in zip(axes.flat, cases, strict=False):
        distribution(panel, case, colours)
    for panel in list(axes.flat)[len(cases) :]:
        panel.set_axis_off()
    figure.suptitle(f"pyvmm bench {report.kind}: distribution of each contender\n{subtitle(report)}", fontsize=10)
    return figure


def shape(result: Any) -> list[float]:
    """The samples of a result; its rounds' values where it has none."""
    if result.samples:
        return list(result.samples)
    return sorted(value for each in result.sets for value in each)


def distribution(panel: Any, case: Case, colours: dict[str, Any]) -> None:
    shown: list[float] = []
    for result in case.results:
        values = shape(result)
        if not values:
            continue
        kept = values[int(SHOWN[0] * len(values)) : max(2, round(SHOWN[1] * len(values)))]
        parts = [(n + 1) / len(values) for n in range(len(kept))]
        shown += kept
        panel.step(kept, parts, where="post", label=result.name, color=colours[result.name], linewidth=1.3)
        middle = values[len(values) // 2]
        panel.plot([middle], [0.5], "o", color=colours[result.name], markersize=3.5)
    panel.set_xscale("log")
    panel.set_ylim(0, 1.02)
    panel.set_title(case.name, fontsize=9)
    panel.set_xlabel(case.unit, fontsize=8)
    panel.set_ylabel("part of the samples", fontsize=8)
    panel.tick_params(labelsize=7)
    log_axis(panel.xaxis, shown)
    panel.tick_params(which="minor", labelsize=6)
    panel.grid(True, which="both", alpha=0.25)
    panel.legend(fontsize=7, loc="lower right")


def ratios(plt: Any, report: Report, colours: dict[str, Any]) -> Any:
    """A row a case: every contender's ratio to the reference with its interval."""
    cases = [case for case in report.cases if any(r.ratio and r.name != case.reference for r in case.results)]
    if not cases:
        return None
    figure, panel = plt.subplots(figsize=(9, 0.42 * len(cases) + 1.8), layout="constrained")
    seen: set[str] = set()
    for row, case in enumerate(reversed(cases)):
        shown = [r for r in case.results if r.ratio is not None and r.name != case.reference]
        for n, result in enumerate(shown):
            assert result.ratio is not None
            value, low, high = result.ratio
            at = row + 0.3 - 0.6 * n / max(1, len(shown) - 1)
            label = None if result.name in seen else result.name
            seen.add(result.name)
            errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
            panel.errorbar([value], [at], xerr=errors, fmt="o", markersize=4, capsize=2, linewidth=1, label=label,
                           color=colours[result.name])  # fmt: skip
    panel.axvline(1.0, color="black", linewidth=0.8)
    panel.set_xscale("log")
    log_axis(panel.xaxis, [r.ratio.value for case in cases for r in case.results if r.ratio])
    panel.tick_params(which="both", labelsize=8)
    panel.set_yticks(range(len(cases)), [case.name for case in reversed(cases)], fontsize=8)
    panel.grid(True, which="both", axis="x", alpha=0.25)
    panel.set_xlabel(f"times {cases[0].reference}, median and 95% interval", fontsize=9)
    panel.set_title(f"pyvmm bench {report.kind}\n{subtitle(report)}", fontsize=10)
    panel.legend(fontsize=8, loc="best")
    return figure
