"""TextWatch: says once that a guest writes to VGA's text memory, which nobody sees: it would look dead."""

from __future__ import annotations

from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine import Machine

FIRST_LOOK_NS = 50_000_000
LONGEST_NS = 1_600_000_000  # between two looks
BLANK = bytes(layout.VGA_TEXT_BYTES)  # memory as it comes up: nothing is loaded there
MESSAGE = "pyvmm: the guest writes to VGA's text memory, which is not shown: --vga text shows it"


class TextWatch:
    """Looks at the memory, or, where none is there, at the exits of writes to it: now and then, less and less often.

    Made when the guest runs already: it takes nothing from the start.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._told = False
        self._wait_ns = FIRST_LOOK_NS
        self._ram = any(s.gpa <= layout.VGA_TEXT < s.gpa + s.size for s in machine.memory_map.sections)
        self._timer = machine.event_loop.clock.timer(self._on_timer)
        self._arm()

    def look(self) -> None:
        """Say so, where it is so and has not been said."""
        if not self._told and self._written():
            self._told = True
            from pyvmm.cli.say import say

            say(MESSAGE)

    def _arm(self) -> None:
        self._timer.arm(self._machine.event_loop.clock.now_ns() + self._wait_ns)

    def _on_timer(self) -> None:
        self.look()
        if not self._told:
            self._wait_ns = min(2 * self._wait_ns, LONGEST_NS)
            self._arm()

    def _written(self) -> bool:
        if self._ram:
            return self._machine.memory_map.read(layout.VGA_TEXT, layout.VGA_TEXT_BYTES) != BLANK
        end = layout.VGA_TEXT + layout.VGA_TEXT_BYTES
        return any(
            row.reason == "MMIO"
            and row.direction == "out"
            and row.address is not None
            and layout.VGA_TEXT <= row.address < end
            and self._machine.mmio.find(row.address) is None
            for row in self._machine.exit_stats()
        )
