"""The picture of a trace: a bar a guest, its steps one after the other, PNG and SVG."""

from __future__ import annotations

from typing import Any

from pyvmm.errors import ConfigError
from pyvmm_benchmarks.plots import DPI, FORMATS, pyplot, subtitle
from pyvmm_benchmarks.report import Case, Report

PREFIX = "trace_"


def draw(report: Report, prefix: str) -> list[str]:
    """``prefix``-trace as PNG and SVG, where there is a trace: the paths written."""
    cases = [case for case in report.cases if case.name.startswith(PREFIX)]
    if not cases:
        return []
    plt = pyplot()
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(11, 0.5 + sum(0.9 + 0.22 * len(case.results) for case in cases)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, case in zip(axes.flat, cases, strict=True):
        waterfall(panel, case, plt.get_cmap("tab20"))
    figure.suptitle(f"pyvmm bench launch: where the time goes\n{subtitle(report)}", fontsize=10)
    written = []
    for suffix in FORMATS:
        path = f"{prefix}-trace.{suffix}"
        try:
            figure.savefig(path, dpi=DPI, metadata={"Date": None} if suffix == "svg" else None)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}: name a place that can be written") from None
        written.append(path)
    plt.close(figure)
    return written


def waterfall(panel: Any, case: Case, colours: Any) -> None:
    """Each step a row of its own, beginning where the one before it ends."""
    at = 0.0
    steps = [(result.name, result.value.value) for result in case.results if result.value is not None]
    whole = sum(ms for _, ms in steps)
    for row, (_, ms) in enumerate(steps):
        panel.barh(row, ms, left=at, color=colours(row % 20), height=0.8)
        # Beside its bar, on the side where there is room.
        late = at + ms / 2 > whole / 2
        side = "right" if late else "left"
        panel.text(at if late else at + ms, row, f" {ms:.3g} ms ", va="center", ha=side, fontsize=7)
        at += ms
    panel.set_yticks(range(len(steps)), [name for name, _ in steps], fontsize=7)
    panel.invert_yaxis()
    panel.set_xlim(0, whole * 1.02)
    panel.tick_params(axis="x", labelsize=7)
    panel.grid(True, axis="x", alpha=0.25)
    panel.set_xlabel("ms from the shell's start of the process (medians, added up)", fontsize=8)
    panel.set_title(case.title, fontsize=9)
