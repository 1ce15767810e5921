"""Exits that only a KVM on real (or emulated) virtualization hardware makes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from guests import PASSED, Guest

from pyvmm.errors import GuestError


@pytest.mark.lab
def test_fail_entry(boot: Callable[..., Guest]) -> None:
    """A guest state that the processor refuses: its reason by name, and a dump."""
    guest = boot("finish")
    # 64-bit code with 32-bit operands by default: the processor checks that, KVM does not
    # (AMD APM vol. 2, 15.5.1 "Canonicalization and Consistency Checks").
    guest.machine.cpus[0].sregs = {"cs": {"db": 1}}
    with pytest.raises(GuestError) as caught:
        guest.run()
    assert caught.value.status == 4
    assert "KVM_EXIT_FAIL_ENTRY" in str(caught.value)
    assert "INVALID" in str(caught.value)
    assert re.search(r"cs .* db 1 l 1 ", caught.value.dump)


@pytest.mark.lab
def test_set_tpr(boot: Callable[..., Guest]) -> None:
    """Without the in-kernel irqchip a write that lowers CR8 is told to user space; the guest goes on with its value."""
    guest = boot(
        "mov $9, %eax\n mov %rax, %cr8\n mov $3, %eax\n mov %rax, %cr8\n mov %cr8, %rbx\n finish", irqchip="off"
    )
    assert guest.run() == PASSED
    assert guest.regs()["rbx"] == 3
    assert guest.exits("SET_TPR") == 1
