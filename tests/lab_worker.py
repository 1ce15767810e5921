"""Runs in the lab: tests that use /dev/kvm in their own process, for a pytest outside (lab_plugin.py).

A line of standard input is a JSON list of node ids. For each report of pytest's a line goes out, and one that says
that the list is over. One process serves all, so that pytest and pyvmm are imported once.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import TextIO

import pytest

# No plugin of the virtual environment's but ours: to load those of hypothesis and pytest-benchmark takes as long as all
# of pytest, there ten seconds.
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
OPTIONS = (
    *("-q", "-p", "no:cacheprovider", "-p", "no:terminalreporter", "-p", "pyvmm.pytest_plugin"),
    *("-o", "faulthandler_timeout=300"),
)


class Reporter:
    """Sends each report of a run as it comes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.send(report=self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.send(collection=f"{report.nodeid}:\n{report.longreprtext}")

    def send(self, **what: object) -> None:
        self._out.write(json.dumps(what) + "\n")
        self._out.flush()


def main() -> None:
    """Until standard input ends. What tests print without pytest's capture goes to standard error."""
    # Beside the directory that is shared with the pytest outside, which may only be read but for that.
    os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.mkdtemp(prefix="worker-")
    with os.fdopen(os.dup(0)) as lists, os.fdopen(os.dup(1), "w") as out:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(2, 1)
        for line in lists:
            reporter = Reporter(out)
            status = pytest.main([*json.loads(line), *OPTIONS], plugins=[reporter])
            reporter.send(over=int(status))


if __name__ == "__main__":
    sys.exit(main())
