"""State dicts of a vCPU: names that do not exist and values that are none are refused, and nothing is written then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from guests import Guest

from pyvmm import ConfigError, StateError


@pytest.mark.parametrize(
    ("what", "value", "wanted"),
    [
        ("regs", {"eax": 1}, "there is no 'eax': did you mean rax?"),
        ("regs", {"RAX": 1}, "there is no 'RAX'"),
        ("regs", {"rip": 1, "xmm0": 1}, "there is no 'xmm0'"),
        ("regs", {5: 1}, "there is no 5"),
        ("regs", {"rax": -1}, "0 to 2**64 - 1"),
        ("regs", {"rax": 1 << 64}, "0 to 2**64 - 1"),
        ("regs", {"rax": "1"}, "whole number"),
        ("regs", {"rax": 1.0}, "whole number"),
        ("regs", {"rax": None}, "whole number"),
        ("regs", [1, 2], "give a dict"),
        ("regs", None, "give a dict"),
        ("sregs", {"cr1": 0}, "there is no 'cr1'"),
        ("sregs", {"cs": {"bas": 0}}, "sregs, cs: there is no 'bas': did you mean base?"),
        ("sregs", {"cs": 5}, "give a dict"),
        ("sregs", {"cs": {"selector": 1 << 16}}, "more bits than its register"),
        ("sregs", {"gdt": {"limit": 1 << 16}}, "more bits"),
        ("sregs", {"interrupt_bitmap": [0]}, "give a list of 4"),
        ("sregs", {"interrupt_bitmap": 0}, "give a list of 4"),
        ("debugregs", {"dr7": 0, "dr8": 0}, "there is no 'dr8'"),
        ("debugregs", {"db": [0, 0, 0, "x"]}, "whole number"),
        ("events", {"nmi": 1}, "there is no 'nmi'"),
        ("events", {"nmi_pending": 256}, "more bits"),
        ("xcrs", dict.fromkeys(range(17), 1), "at most 16"),
        ("xcrs", [1], "at most 16"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, (dict, list)) else "",
)
def test_what_is_no_state(boot: Callable[..., Guest], what: str, value: Any, wanted: str) -> None:
    cpu = boot("finish").machine.cpus[0]
    before = (cpu.regs, cpu.sregs, cpu.vcpu.events, cpu.vcpu.debugregs)
    for owner in [cpu.vcpu, cpu] if what in ("regs", "sregs") else [cpu.vcpu]:
        with pytest.raises(ConfigError) as caught:
            setattr(owner, what, value)
        assert wanted in str(caught.value)
        assert "\n" not in str(caught.value)
    assert (cpu.regs, cpu.sregs, cpu.vcpu.events, cpu.vcpu.debugregs) == before


def test_parts(boot: Callable[..., Guest]) -> None:
    cpu = boot("finish").machine.cpus[0]
    sregs, regs = cpu.sregs, cpu.regs
    cpu.sregs = {"ds": {"base": 0x1000, "selector": 0x18}}
    assert cpu.sregs["ds"] == sregs["ds"] | {"base": 0x1000, "selector": 0x18}
    assert cpu.sregs | {"ds": sregs["ds"]} == sregs
    cpu.regs = {}
    assert cpu.regs == regs
    cpu.regs["rax"] = 5  # a copy, and no write
    assert cpu.regs == regs
    events = cpu.vcpu.events
    cpu.vcpu.events = {"nmi_masked": 1}
    assert cpu.vcpu.events["nmi_masked"] == 1
    assert cpu.vcpu.events | {"nmi_masked": 0} == events


def test_more_than_the_kernel_s_structures_hold(boot: Callable[..., Guest]) -> None:
    """These were written past the end of them."""
    machine = boot("finish").machine
    with pytest.raises(ConfigError, match="at most 8"):
        machine.cpus[0].vcpu.set_guest_debug(0, range(100))
    with pytest.raises(ConfigError, match="at most 4"):
        machine.vm.enable_cap(0, *range(100))


def test_after_close(boot: Callable[..., Guest]) -> None:
    cpu = boot("finish").machine.cpus[0]
    regs = cpu.regs
    boot("finish").machine.close()
    guest = boot("finish")
    guest.machine.close()
    for attempt in (lambda: guest.machine.cpus[0].regs, lambda: setattr(guest.machine.cpus[0], "regs", regs)):
        with pytest.raises(StateError, match="closed"):
            attempt()
