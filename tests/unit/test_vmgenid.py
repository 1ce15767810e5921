"""The number of a machine's generation: where the guest reads it, and how it hears of another one."""

from __future__ import annotations

import pytest

from pyvmm import Machine
from pyvmm.x86 import layout

AT = layout.VM_GENERATION_ID
GPE_STATUS, GPE_ENABLE = layout.PORT_GPE0, layout.PORT_GPE0 + 2
EVENT = 1 << layout.GPE_VM_GENERATION


def number(machine: Machine) -> bytes:
    return b"".join(machine.mmio.read(AT + at, 4).to_bytes(4, "little") for at in range(0, 16, 4))


@pytest.mark.parametrize("machine", ["microvm", "pc"])
def test_another_generation(machine: str) -> None:
    with Machine(machine=machine, accel="qtest", memory_mib=1) as m, Machine(accel="qtest", memory_mib=1) as other:
        first = number(m)
        assert number(m) == first != number(other)
        m.mmio.write(AT, 4, 0)
        assert number(m) == first
        assert int.from_bytes(first[3:11], "little") == m.mmio.read(AT + 3, 8)
        assert m.pio.read(GPE_STATUS, 2) == 0
        m.reset()
        assert number(m) == first  # a reset begins no other life
        m.board.new_generation()
        assert number(m) != first
        assert m.pio.read(GPE_STATUS, 2) == EVENT


def test_a_state_that_is_loaded_is_the_same_generation() -> None:
    with Machine(accel="qtest", memory_mib=1) as one, Machine(accel="qtest", memory_mib=1) as other:
        other.load_state(one.save_state())
        assert number(other) == number(one)
        assert other.pio.read(GPE_STATUS, 2) == 0
