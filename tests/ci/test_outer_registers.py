"""The one fault of the emulator that lab_plugin.py knows by a guest's dump, as it was seen."""

from __future__ import annotations

import lab_plugin
import pytest

SEEN = """\
vCPU 0, machine running
  rip ffffffffc035113c  rflags 00010246  long mode
E             cr0 80050033  cr2 ffffffffc035113c  cr3 1009a0000  cr4 710eb0  cr8 0  efer d01
"""
SOUND = """\
vCPU 1, machine running
  rip ffffffff81a0dfeb  rflags 00000246  long mode
E             cr0 80050033  cr2 0  cr3 2a10000  cr4 710ea0  cr8 1  efer d01
"""


@pytest.mark.parametrize(
    ("text", "seen"), [(SEEN, True), (SOUND, False), (SOUND + SEEN, True), ("cr3 1009a0000", False)]
)
def test_a_dump(text: str, seen: bool) -> None:
    assert lab_plugin.has_outer_registers(text) is seen
