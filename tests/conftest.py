"""Which tests run where: the marker `lab` says that a test needs a complete KVM (see ci/test).

Where this machine has no KVM for us at all, ci/test sets PYVMM_KVM_TESTS=lab, and every test of tests/kvm and
tests/boot carries that marker.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NEEDS_KVM = [Path(__file__).parent / name for name in ("kvm", "boot")]


@pytest.hookimpl(tryfirst=True)  # before pytest itself selects by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("PYVMM_KVM_TESTS") != "lab":
        return
    for item in items:
        if any(item.path.is_relative_to(directory) for directory in NEEDS_KVM):
            item.add_marker("lab")
