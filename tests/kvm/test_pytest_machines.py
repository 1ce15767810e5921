"""The fixtures of the pytest plugin with a guest that runs, and what a report shows of one that has failed."""

from __future__ import annotations

import pytest

import pyvmm
from pyvmm.dialog import Dialog
from pyvmm.pytest_plugin import Machines

# mov dx, 0x3f8; then "a", "b"; mov dx, 0x604 and 0x2000 out: off.
SAYS_AB = bytes.fromhex("baf803 b061 ee b062 ee ba0406 b80020 ef f4")


@pytest.mark.kvm_any
def test_a_guest_is_heard_to_its_end(vm: Machines, console: Dialog) -> None:
    m = vm(flat=SAYS_AB, memory_mib=16)
    assert vm.console_of(m) is console
    m.resume()
    assert console.expect("b", 30) == "a"
    with pytest.raises(AssertionError, match="the machine ended"):
        console.expect("c", 30)


def test_a_report_has_the_exits_and_the_registers(vm: Machines) -> None:
    m = vm(flat=SAYS_AB, memory_mib=16)
    assert m.run(30) == 0
    shown = dict(vm.sections())
    assert shown["pyvmm: console"] == "ab"
    assert shown["pyvmm: state"].startswith("shutdown, status 0")
    assert "0x3f8" in shown["pyvmm: exits"]
    assert "rip" in shown["pyvmm: dump"]


def test_a_device_that_raised_is_in_the_report(vm: Machines) -> None:
    class Broken(pyvmm.Device):
        def write(self, offset: int, size: int, value: int) -> None:
            raise RuntimeError("it is broken")

    m = vm(flat=bytes.fromhex("baf007 ee f4"), memory_mib=16)
    m.pio.map(0x7F0, 1, Broken())
    with pytest.raises(pyvmm.DeviceError):
        m.run(30)
    shown = dict(vm.sections())
    assert "it is broken" in shown["pyvmm: state"] or "it is broken" in shown["pyvmm: dump"]
    assert "Traceback" in shown["pyvmm: dump"]
