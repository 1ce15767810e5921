"""A report as Markdown, and its place in a document: between ``<!-- pyvmm bench NAME -->`` and ``<!-- end -->``.

NAME is the benchmark, with `` lab`` behind it where it ran in the nested lab: figures from there stand apart.
"""

from __future__ import annotations

from pathlib import Path

from pyvmm.errors import ConfigError
from pyvmm_benchmarks import environment
from pyvmm_benchmarks.report import Case, Report, Result, figure

END = "<!-- end -->"
DASH = "-"


def marker(report: Report) -> str:
    return f"<!-- pyvmm bench {report.kind}{' lab' if report.host.get('in_lab') else ''} -->"


def put(report: Report, path: str | Path) -> None:
    """Replace what stands between the report's markers in the document. ConfigError where they are not there."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: name a document that can be read") from None
    before, found, rest = text.partition(marker(report))
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ConfigError(f"{path} has no {marker(report)} ... {END}: put these two lines where the figures should be")
    Path(path).write_text(f"{before}{found}\n\n{document(report)}\n{END}{after}")


def document(report: Report) -> str:
    """The host, a table of all cases, and why what is missing is missing."""
    host = ["```", *environment.lines(report.host), "```", ""]
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items())
    names = columns(report)
    reference = report.cases[0].reference if report.cases else ""
    head = [f"| case | {reference} |", "|---|---|"]
    for name in names:
        head[0] += f" {name} x {reference} (95%) |"
        head[1] += "---|"
    rows = [row(case, names) for case in report.cases]
    reasons = [f"- {reason}" for reason in missing(report)]
    return "\n".join([*host, f"Settings: {settings}.", "", *head, *rows, "", *reasons, ""])


def columns(report: Report) -> list[str]:
    """The contenders that ran in some case, but for the reference."""
    names = {r.name: None for case in report.cases for r in case.results if r.ran and r.name != case.reference}
    return list(names)


def row(case: Case, names: list[str]) -> str:
    cells = [f"`{case.name}`: {case.title}", absolute(case, case.find(case.reference))]
    return "| " + " | ".join([*cells, *(relative(case, case.find(name)) for name in names)]) + " |"


def absolute(case: Case, result: Result | None) -> str:
    return DASH if result is None or result.value is None else f"{figure(result.value.value)} {case.unit}"


def relative(case: Case, result: Result | None) -> str:
    """The ratio with its interval; the value itself where there is no reference."""
    if result is None or not result.ran:
        return DASH
    if result.ratio is None:
        return absolute(case, result)
    value, low, high = result.ratio
    return f"{value:.3f} ({low:.3f}-{high:.3f})"


def missing(report: Report) -> list[str]:
    """Reasons: once for who never ran, by case for the others."""
    found: dict[str, list[str]] = {}
    for case in report.cases:
        for result in case.results:
            if not result.ran:
                found.setdefault(f"{result.name}: {result.reason}", []).append(case.name)
    text = []
    for reason, cases in found.items():
        where = "" if len(cases) == len(report.cases) else f" ({', '.join(cases)})"
        text.append(f"{reason}{where}")
    return text
