"""``pyvmm bench launch``: from the shell to the guest and to the end of it, in pyvmm and in other VMMs.

    small     a guest of a few instructions: to its first byte, to the process gone, processor time
    linux     a distribution's kernel with a busybox initrd: to its first console message, to its init, to the end.
              Where this KVM is software, and Linux gets no further: to the message only, from the unpacked kernel
    process   in one process: Machine made, run to its first exit, closed; beside the same in C
    memory    what a VMM holds beyond guest RAM while its guest waits
    many      1, 8 and 64 launches at once: until the last one's guest has spoken, until all are gone, what each holds
    instructions  of the small guest's launch, in user space: perf's where it counts, else callgrind's
    trace     where pyvmm's time goes, step by step, and how long KVM takes to the guest's first exit

Launches take turns, A B C C B A a round (sampling.py); the clock is the parent's (stopwatch.py).
"""

from __future__ import annotations

import compileall
import contextlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyvmm
from pyvmm import bundle_build
from pyvmm.cli.options import Option, parse, usage
from pyvmm.errors import ConfigError
from pyvmm_benchmarks import environment, launch_guests
from pyvmm_benchmarks.contenders.launch_contender import Launcher
from pyvmm_benchmarks.contenders.launch_others import CloudHypervisor, Firecracker, Kvmtool
from pyvmm_benchmarks.contenders.launch_pyvmm import Pyvmm
from pyvmm_benchmarks.contenders.launch_qemu import Qemu
from pyvmm_benchmarks.launch_bench import PARTS, REFERENCE, Bench, Settings
from pyvmm_benchmarks.report import TOLERANCE, Case, Report, case_lines, print_comparison

OPTIONS = (
    Option("--quick", "", "few rounds, 1 and 8 at once, Linux only where it comes to its init"),
    Option("--cases", "A,B", f"only these of {', '.join(PARTS)}"),
    Option("--contenders", "A,B", "only these (see --list)"),
    Option("--rounds", "N", "rounds of two turns each (default 10, Linux 3; --quick 3, Linux 1)", int),
    Option("--kernel", "FILE", "bzImage of Linux (default: a checkout's, or the running one)"),
    Option("--busybox", "FILE", "a statically linked busybox for the initrd"),
    Option("--initrd", "FILE", f"another initrd, whose init first says {launch_guests.INIT_TEXT.decode()!r}"),
    Option("--append", "TEXT", f"Linux's command line (default {launch_guests.APPEND!r})"),
    Option("--json", "FILE", "write everything found to FILE"),
    Option("--plot", "PREFIX", "pictures: PREFIX-distributions, PREFIX-ratios and PREFIX-trace, each .png and .svg"),
    Option("--compare", "OLD.json", "print what changed beyond noise; exit status 1 on a regression of pyvmm"),
    Option("--tolerance", "PART", f"changes up to this part are noise (default {TOLERANCE})", float),
    Option("--from", "FILE", "measure nothing: take what --json has written (for --plot and --compare)", key="from_"),
    Option("--list", "", "the cases and the contenders"),
    Option("--help -h", "", "this"),
)

TITLE = """\
usage: pyvmm bench launch [OPTIONS]

What it takes to launch a guest: pyvmm beside QEMU, kvmtool, Firecracker and cloud-hypervisor, where they are
installed. docs/benchmarks.md has the method."""


def settings_of(given: Mapping[str, object]) -> Settings:
    quick = bool(given.get("quick"))
    rounds, linux_rounds = (3, 1) if quick else (10, 3)
    if "rounds" in given:
        rounds = linux_rounds = int(str(given["rounds"]))
    if rounds < 1:
        raise ConfigError("--rounds: give at least 1")
    return Settings(quick, rounds, linux_rounds, 1 if quick else 3, (1, 8) if quick else (1, 8, 64))


def launchers() -> list[Launcher]:
    """Every contender there may be, the reference first."""
    return [
        *(Qemu("pc"), Qemu("microvm"), Pyvmm("microvm"), Pyvmm("pc")),
        *(Kvmtool(), Firecracker(), CloudHypervisor()),
    ]


def main(args: Sequence[str]) -> int:
    given = parse(OPTIONS, args, verb="bench launch")
    if given.get("help"):
        print(usage(TITLE, OPTIONS), end="")
        return 0
    if given.get("list"):
        print((__doc__ or "").split("\n\n")[1])
        print("contenders:")
        for launcher in launchers():
            print(f"  {launcher.name:<18}{launcher.version() or 'comes with pyvmm'}")
        return 0
    old = Report.read(given["compare"], "launch") if "compare" in given else None
    if "from_" in given:
        report = Report.read(given["from_"], "launch")
        print("\n".join(environment.lines(report.host)) + "\n")
        print(report.table())
        print("\n".join(verdict(report.cases)))
    else:
        report = measured(given)
    if "json" in given:
        report.write(given["json"])
    if "plot" in given:
        from pyvmm_benchmarks import launch_plots, plots

        compared = [case for case in report.cases if not case.name.startswith(launch_plots.PREFIX)]
        drawn = plots.draw(Report(report.kind, report.host, report.settings, compared), given["plot"])
        for path in [*drawn, *launch_plots.draw(report, given["plot"])]:
            print(f"wrote {path}")
    return 0 if old is None else print_comparison(old, report, given.get("tolerance", TOLERANCE))


def measured(given: Mapping[str, object]) -> Report:
    """Measure as the options say, printing each case as it is done."""
    parts = chosen(str(given.get("cases", "")), PARTS, "case")
    all_launchers = launchers()
    names = chosen(str(given.get("contenders", "")), [each.name for each in all_launchers], "contender")
    contenders = [launcher for launcher in all_launchers if launcher.name in names]
    settings = settings_of(given)
    # As pip leaves an installed package.
    compileall.compile_dir(str(Path(pyvmm.__file__).parent), quiet=1)
    with contextlib.suppress(OSError):
        bundle_build.build(str(Path(pyvmm.__file__).parent))
    programs = {each.name: version for each in contenders if (version := each.version()) is not None}
    report = Report("launch", environment.describe(None, programs), settings._asdict())
    print("\n".join(environment.lines(report.host)) + "\n", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), contenders, settings, given)
        for part in parts:
            for case in bench.part(part):
                report.cases.append(case)
                print("\n".join(case_lines(case)) + "\n", flush=True)
    print("\n".join(verdict(report.cases)))
    report.host["took_s"] = round(time.monotonic() - started, 1)
    return report


def chosen(names: str, among: Sequence[str], what: str) -> list[str]:
    """Those of the names ("a,b"), in their own order; all where there are none."""
    wanted = [name for name in names.split(",") if name]
    for name in wanted:
        if name not in among:
            raise ConfigError(f"there is no {what} {name!r}: choose of {', '.join(among)}")
    return [name for name in among if not wanted or name in wanted]


def verdict(cases: Sequence[Case]) -> list[str]:
    """A line a case from the shell: pyvmm beside the fastest of the others."""
    lines = []
    for case in cases:
        ran = {result.name: result.value.value for result in case.results if result.value is not None}
        others = {result.name for result in case.results if not result.ours} & ran.keys()
        if case.reference == REFERENCE and "pyvmm" in ran and others:
            best = min(others, key=lambda name: ran[name])
            lines.append(f"{case.name}: pyvmm takes {ran['pyvmm'] / ran[best]:.2f} of the best other ({best})")
    return lines
