"""A test of something that this machine's Debian does not have is left out, and its report says what is missing.

Which packages those are ci/setup has found out and said (`.cache/debian/<package>.left-out`). A package that is merely
not there yet is an error, as any other.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest
from boot_assets import LeftOutError


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, LeftOutError):
        path, line, _ = item.location
        report.outcome = "skipped"
        report.longrepr = (path, (line or 0) + 1, f"left out: {call.excinfo.value}")
    return report
