"""`pyvmm demo`: the embedded guest runs to its end on this KVM, whichever it is, and the table follows."""

from __future__ import annotations

import pytest

from pyvmm.cli import main
from pyvmm.kvm.kind import kvm_kind


@pytest.mark.parametrize("irqchip", ["kernel", "off"])
def test_all_of_it_went_well(capfd: pytest.CaptureFixture[str], irqchip: str) -> None:
    assert main(["demo", "--irqchip", irqchip]) == 0
    told = capfd.readouterr()
    assert told.err == ""
    assert "FAILED" not in told.out
    steps = [line for line in told.out.splitlines() if line.endswith("  ok")]
    assert len(steps) == 9
    for mode in ("Real mode", "Protected mode", "Long mode", "Back in real mode after the reset"):
        assert mode in told.out
    rows = {line.split()[0] for line in told.out.split("What reached pyvmm:")[1].splitlines() if line}
    assert {"IO", "MMIO", "SHUTDOWN"} <= rows
    assert ("HLT" in rows) == (irqchip == "off")
    assert "How to read it" in told.out
    assert kvm_kind() in told.out


def test_wrong_use(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--irqchips", "off"]) == 2
    assert "did you mean --irqchip" in capfd.readouterr().err
    assert main(["demo", "--irqchip", "maybe"]) == 2
    assert main(["demo", "--help"]) == 0
