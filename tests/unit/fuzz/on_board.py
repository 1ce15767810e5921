"""OnBoard: base of the models that stand beside the fuzz harness's board."""

from __future__ import annotations

from typing import ClassVar

from fuzz.harness import FencedBoard
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, run_state_machine_as_test

STEPS = settings(max_examples=40, stateful_step_count=25, deadline=None)


def run_model(model: type[OnBoard], board: FencedBoard, how: settings = STEPS) -> None:
    """Run ``model`` as a test, each example of it on ``board``, reset."""
    model.board = board
    run_state_machine_as_test(model, settings=how)  # type: ignore[no-untyped-call]


class OnBoard(RuleBasedStateMachine):
    board: ClassVar[FencedBoard]

    def __init__(self) -> None:
        super().__init__()
        self.board.power_up()
        self.pio = self.board.pio

    @invariant()
    def nothing_escaped(self) -> None:
        self.board.check_errors()
        assert self.board.guards is not None
        self.board.guards.check()

    def teardown(self) -> None:
        self.board.drain()
        self.board.check()
