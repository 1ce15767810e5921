"""The report: the JSON's schema, the table, the comparison, the pictures."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pyvmm.errors import ConfigError
from pyvmm_benchmarks import markdown, plots, report
from pyvmm_benchmarks.report import Case, Report, Result

DOCS = Path(__file__).parents[3] / "docs" / "benchmarks.md"
HOST = {
    "time": "2026-01-01T00:00:00Z", "kvm": "a KVM", "kernel": "6.18", "cpu": "a CPU", "cpu_mhz": "2600",
    "cpus_usable": 2, "pinned_cpu": 1, "python": "CPython 3.11.7", "free_threaded": False, "load": 0.5,
    "governor": "performance", "turbo": "off", "smt": "off", "mitigations": {}, "clocksource": "tsc",
    "transparent_hugepages": "madvise", "pyvmm": "0.1.0", "programs": {},
}


def result(name: str, middle: float, *, spread: float = 0.02, seed: int = 1, **options: Any) -> Result:
    source = random.Random(seed)
    sets = [[source.gauss(middle, middle * spread) for _ in range(15)] for _ in range(3)]
    samples = [source.gauss(middle, middle * spread) for _ in range(1000)]
    return Result(name, sets, samples, **options)


def made(
    pyvmm: float = 8.4, *, floor: float = 8.0, seed: int = 1, host: dict[str, Any] = HOST, **more: Result
) -> Report:
    own = {"p50": 200.0, "p99": 900.0, "mean": 240.0, "min": 150.0}
    results = [result("c", floor, seed=seed), result("pyvmm", pyvmm, seed=seed + 1, ours=True, own=own)]
    results += [Result("kvmtool", reason="not installed"), *more.values()]
    case = Case("outl_to_python", "PIO out", "us", results)
    case.details = {"vmexit": "portio-no-eventfd:pci-io"}
    return Report("exits", host, {"quick": False, "sets": 3}, [case])


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    written = made()
    path = tmp_path / "found.json"
    written.write(path)
    read = Report.read(path, "exits")
    assert read.plain() == written.plain()
    assert read.table() == written.table()


def keys_of(data: Any) -> set[str]:
    """Every key anywhere but in what is free in form."""
    found = set()
    if isinstance(data, dict):
        for key, value in data.items():
            found.add(key)
            if key not in ("environment", "settings", "details"):
                found |= keys_of(value)
    elif isinstance(data, list):
        for value in data:
            found |= keys_of(value)
    return found


def test_the_schema_is_documented() -> None:
    text = DOCS.read_text()
    section = text[text.index("## The JSON") :]
    missing = {key for key in keys_of(made().plain()) if f"`{key}`" not in section}
    assert missing == set()
    assert report.SCHEMA in section


def test_the_schema() -> None:
    plain = json.loads(json.dumps(made().plain()))
    assert plain["schema"] == "pyvmm-bench/1"
    assert plain["benchmark"] == "exits"
    (case,) = plain["cases"]
    assert (case["name"], case["unit"], case["reference"]) == ("outl_to_python", "us", "c")
    floor, pyvmm, kvmtool = case["contenders"]
    assert floor["ratio"] is None
    assert pyvmm["ratio"]["low"] <= pyvmm["ratio"]["value"] <= pyvmm["ratio"]["high"]
    assert pyvmm["ratio"]["value"] == pytest.approx(1.05, rel=0.02)
    assert pyvmm["value"]["value"] == pytest.approx(8.4, rel=0.02)
    assert [len(values) for values in pyvmm["sets"]] == [15, 15, 15]
    assert len(pyvmm["samples"]) == 201 and pyvmm["samples"] == sorted(pyvmm["samples"])
    assert pyvmm["p50"] < pyvmm["p99"]
    assert kvmtool["ran"] is False and kvmtool["reason"] == "not installed" and kvmtool["value"] is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "is no report of `pyvmm bench exits`"),
        ('{"schema": "pyvmm-bench/1", "benchmark": "launch"}', "is no report of `pyvmm bench exits`"),
        ('{"schema": "pyvmm-bench/1", "benchmark": "exits", "cases": [{}]}', "is incomplete"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        Report.read(path, "exits")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Report.read(tmp_path / "missing.json", "exits")
    with pytest.raises(ConfigError, match="No such file"):
        made().write(tmp_path / "missing" / "new.json")


def test_a_result_needs_values_or_a_reason() -> None:
    with pytest.raises(ValueError, match="neither values nor a reason"):
        Result("pyvmm")


def test_the_table_has_every_contender() -> None:
    lines = made().table().splitlines()
    assert lines[0] == "outl_to_python: PIO out"
    assert "own ns" in lines[1]
    assert [line.split()[0] for line in lines[2:5]] == ["c", "pyvmm", "kvmtool"]
    assert "200    900    240   150" in lines[3]
    assert lines[4].endswith("- not installed")


# -- the comparison ----------------------------------------------------------------------------------------------


def changes(old: Report, new: Report, tolerance: float = report.TOLERANCE) -> list[tuple[str, bool]]:
    return [(change.text, change.regression) for change in report.compare(old, new, tolerance)]


def test_noise_is_no_change() -> None:
    for seed in range(2, 30):
        assert changes(made(), made(seed=seed)) == []


def test_a_slower_host_is_no_regression() -> None:
    # The floor has nothing to be compared with but its own time, and that is told; our ratio to it is the same.
    ((text, regression),) = changes(made(), made(8.4 * 1.7, floor=8.0 * 1.7, seed=3))
    assert text.startswith("outl_to_python, c: 69% slower") and not regression


def test_getting_slower_is_a_regression_of_ours_only() -> None:
    old = made(other=result("other", 10.0))
    slower = made(9.2, seed=7, other=result("other", 12.0, seed=4))
    found = changes(old, slower)
    assert [(text.split(":")[0], regression) for text, regression in found] == [
        ("outl_to_python, pyvmm", True),
        ("outl_to_python, other", False),
    ]
    assert all("slower" in text and "times c" in text for text, _ in found)


def test_getting_faster_is_told() -> None:
    ((text, regression),) = changes(made(), made(7.4, seed=9))
    assert "faster" in text and not regression


def test_a_small_change_counts_only_with_a_small_tolerance() -> None:
    old, new = made(8.4), made(8.4 * 1.035)
    assert changes(old, new) == []
    assert [regression for _, regression in changes(old, new, tolerance=0.01)] == [True]


def test_what_ran_and_does_not_any_more() -> None:
    old, new = made(), made()
    new.cases[0].results[1] = Result("pyvmm", reason="no end of a turn within 20 s", ours=True)
    text = "outl_to_python, pyvmm: ran, and does not any more: no end of a turn within 20 s"
    assert changes(old, new) == [(text, True)]
    assert changes(new, old) == [("outl_to_python, pyvmm: runs now", False)]


def test_cases_and_contenders_that_only_one_has_are_left_alone() -> None:
    other = Report("exits", HOST, {}, [Case("cpuid", "CPUID", "us", [result("c", 3.0)])])
    assert changes(made(), other) == []
    assert changes(other, made(20.0)) == []


def test_the_exit_status_and_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = {**HOST, "kvm": "another KVM"}
    assert report.print_comparison(made(), made(9.4, host=elsewhere)) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "another host or set-up: kvm: a KVM -> another KVM"
    assert said[1].startswith("REGRESSION  outl_to_python, pyvmm: 12% slower: 1.045 (")
    assert report.print_comparison(made(), made()) == 0
    assert capsys.readouterr().out == "nothing changed beyond noise (intervals apart and more than 5%)\n"


def test_memory_grows_and_does_not_get_slower() -> None:
    old, new = (
        Report("launch", HOST, {}, [Case("rss", "RSS", "MiB", [result("c", 2.0), result("pyvmm", mib, ours=True)])])
        for mib in (20.0, 30.0)
    )
    ((text, regression),) = changes(old, new)
    assert "50% more" in text and regression


# -- pictures ----------------------------------------------------------------------------------------------------


def test_pictures(tmp_path: Path) -> None:
    prefix = str(tmp_path / "exits")
    written = plots.draw(made(other=result("other", 10.0)), prefix)
    assert written == [f"{prefix}-{what}.{kind}" for what in ("distributions", "ratios") for kind in ("png", "svg")]
    for path in map(Path, written):
        begin = path.read_bytes()[:200]
        assert begin.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in begin
    # Each contender that ran is in the picture, by its name.
    text = Path(f"{prefix}-distributions.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("c", "pyvmm", "other"))
    assert "<!-- kvmtool -->" not in text


def test_a_report_without_samples_or_ratios_makes_what_there_is(tmp_path: Path) -> None:
    lonely = Report("exits", HOST, {}, [Case("cpuid", "CPUID", "us", [result("c", 3.0)])])
    assert [Path(path).name for path in plots.draw(lonely, str(tmp_path / "x"))] == [
        "x-distributions.png",
        "x-distributions.svg",
    ]
    nothing = Report("exits", HOST, {}, [Case("cpuid", "CPUID", "us", [Result("c", reason="hangs")])])
    assert plots.draw(nothing, str(tmp_path / "y")) == []


def test_a_place_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name a place that can be written"):
        plots.draw(made(), str(tmp_path / "missing" / "x"))


# -- in a document -----------------------------------------------------------------------------------------------


def test_a_table_in_a_document(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("before\n\n<!-- pyvmm bench exits -->\nas it was\n<!-- end -->\n\nafter <!-- end -->\n")
    for _ in range(2):  # the second time it replaces its own
        markdown.put(made(other=result("other", 10.0)), path)
        text = path.read_text()
        assert text.startswith("before\n\n<!-- pyvmm bench exits -->\n")
        assert text.endswith("<!-- end -->\n\nafter <!-- end -->\n")
        assert "as it was" not in text and text.count("| case |") == 1
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| case | c | pyvmm x c (95%) | other x c (95%) |"
    assert rows[2].startswith("| `outl_to_python`: PIO out | 8.032 us | 1.045 (1.0")
    assert all(row.count("|") == rows[0].count("|") for row in rows)
    assert "- kvmtool: not installed" in text


def test_figures_of_the_lab_stand_apart(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("<!-- pyvmm bench exits -->\n<!-- end -->\n<!-- pyvmm bench exits lab -->\n<!-- end -->\n")
    markdown.put(made(host={**HOST, "in_lab": True}), path)
    native, lab = path.read_text().split("<!-- pyvmm bench exits lab -->")
    assert "| case |" not in native and "| case |" in lab


def test_a_document_without_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("nothing\n")
    with pytest.raises(ConfigError, match="has no <!-- pyvmm bench exits -->"):
        markdown.put(made(), path)
    with pytest.raises(ConfigError, match="No such file"):
        markdown.put(made(), tmp_path / "missing.md")


def test_the_projects_own_page_has_the_markers() -> None:
    text = DOCS.read_text()
    for host in (HOST, {**HOST, "in_lab": True}):
        assert markdown.marker(made(host=host)) in text
