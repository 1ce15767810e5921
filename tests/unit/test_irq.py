"""Interrupt lines and the wires they drive: levels ORed, edges in order, whatever the wire leads to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.device import DeviceLock
from pyvmm.errors import KindError
from pyvmm.irq import IrqLine, IrqWire

DEADLINE_S = 10


def test_a_line_forwards_changes_only() -> None:
    levels: list[int] = []
    line = IrqLine(levels.append, 4)
    assert (line.gsi, line.level) == (4, 0)
    line.lower()
    line.raise_()
    line.set(1)
    assert line.level == 1
    line.set(0)
    line.lower()
    assert levels == [1, 0]


def test_a_pulse_is_an_edge_even_where_the_line_is_up() -> None:
    levels: list[int] = []
    line = IrqLine(levels.append)
    line.pulse()
    line.raise_()
    line.pulse()
    assert levels == [1, 0, 1, 0]
    assert line.level == 0


def test_a_line_with_no_sink_remembers() -> None:
    line = IrqLine()
    line.raise_()
    assert (line.gsi, line.level) == (-1, 1)


def test_lines_of_one_wire_are_ored() -> None:
    levels: list[int] = []
    wire = IrqWire(levels.append, 11)
    first = wire.line()
    first.raise_()  # before anybody shares it
    second, third = wire.line(), wire.line()
    assert (first.gsi, second.gsi, third.level) == (11, 11, 0)
    second.raise_()
    third.pulse()
    first.lower()
    assert levels == [1]
    first.pulse()
    assert levels == [1]
    second.lower()
    assert levels == [1, 0]


def test_a_wire_with_one_line_takes_its_edges() -> None:
    levels: list[int] = []
    line = IrqWire(levels.append).line()
    line.pulse()
    line.pulse()
    assert levels == [1, 0, 1, 0]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans())))
def test_a_wire_against_a_model(steps: list[tuple[int, bool]]) -> None:
    levels: list[int] = []
    wire = IrqWire(levels.append)
    lines = [wire.line() for _ in range(4)]
    up: set[int] = set()
    expected: list[int] = []
    for n, level in steps:
        before = bool(up)
        (up.add if level else up.discard)(n)
        if bool(up) != before:
            expected.append(int(bool(up)))
        lines[n].set(level)
        assert wire.level == int(bool(up))
        assert [line.level for line in lines] == [int(k in up) for k in range(4)]
    assert levels == expected


@pytest.mark.parametrize("level", [2, "x", [0], -1])
def test_all_that_is_true_is_up(level: object) -> None:
    levels: list[int] = []
    line = IrqLine(levels.append)
    line.set(level)
    line.set(1)
    assert levels == [1]
    line.set([])
    assert levels == [1, 0]


def test_a_line_knows_its_wire() -> None:
    wire = IrqWire(gsi=9)
    assert wire.line().wire is wire
    assert IrqLine(wire).gsi == 9


# -- a wire that is a line of another one: how an interrupt router has it ----------------------------------------------


def test_a_wire_may_be_one_more_line_of_another() -> None:
    levels: list[int] = []
    isa = IrqWire(levels.append, 10)
    own, pci = isa.line(), IrqWire(isa)
    function = pci.line()
    function.raise_()
    own.raise_()
    function.lower()
    assert levels == [1]
    own.lower()
    assert levels == [1, 0]


def test_another_sink_gets_the_level_there_is() -> None:
    first: list[int] = []
    second: list[int] = []
    wire = IrqWire(first.append)
    line = wire.line()
    wire.connect(second.append)
    assert (first, second) == ([], [])
    line.raise_()
    wire.connect(first.append)
    assert (first, second) == ([1], [1, 0])
    wire.connect(None)
    line.lower()
    line.raise_()
    assert (first, second) == ([1, 0], [1, 0])
    wire.connect(second.append)
    assert second == [1, 0, 1]


def test_the_same_sink_again_is_no_edge() -> None:
    levels: list[int] = []
    isa = IrqWire(levels.append)
    pci = IrqWire()
    pci.line().raise_()
    pci.connect(isa)
    pci.connect(isa)
    assert levels == [1]


@given(st.lists(st.one_of(
    st.tuples(st.just("pin"), st.integers(0, 3), st.integers(0, 1)),
    st.tuples(st.just("route"), st.integers(0, 1), st.integers(0, 2)),
)))  # fmt: skip
def test_routes_against_a_model(steps: list[tuple[str, int, int]]) -> None:
    """Four lines on two wires, which go to either of two others, or nowhere."""
    shown = [0, 0]
    inputs = [IrqWire(lambda level, n=n: shown.__setitem__(n, level)) for n in range(2)]  # type: ignore[misc]
    wires = [IrqWire(), IrqWire()]
    lines = [wires[n // 2].line() for n in range(4)]
    levels, routes = [0] * 4, [2, 2]
    for what, a, b in steps:
        if what == "pin":
            levels[a] = b
            lines[a].set(b)
        else:
            routes[a] = b
            wires[a].connect([*inputs, None][b])
        expected = [int(any(levels[k] for k in range(4) if routes[k // 2] == n)) for n in range(2)]
        assert shown == expected


def test_what_a_wire_can_lead_to() -> None:
    for wrong in (5, "irq", IrqLine()):
        with pytest.raises(KindError, match="IrqWire, a Vm, or a function"):
            IrqWire(wrong)  # type: ignore[arg-type]
        with pytest.raises(KindError):
            IrqWire().connect(wrong)  # type: ignore[arg-type]


# -- what a sink does --------------------------------------------------------------------------------------------------


class Sink:
    """Notes levels, after whatever is to happen then."""

    def __init__(self, act: Callable[[int], object]) -> None:
        self.levels: list[int] = []
        self.act = act

    def __call__(self, level: int) -> None:
        self.levels.append(level)
        self.act(level)


def test_what_a_sink_raises_comes_out_of_set() -> None:
    def refuse(level: int) -> None:
        raise OSError("no")

    line = IrqLine(refuse)
    for act in (lambda: line.set(1), line.lower):
        with pytest.raises(OSError, match="no"):
            act()
    assert line.level == 0
    shared = IrqWire(IrqWire(refuse)).line()
    with pytest.raises(OSError, match="no"):
        shared.raise_()


def test_a_sink_may_drive_the_wire_it_stands_behind() -> None:
    """As a device does that answers an interrupt's end at once."""
    wire = IrqWire()
    first, second = wire.line(), wire.line()
    sink = Sink(lambda level: second.set(1) if level else None)
    wire.connect(sink)
    first.raise_()
    first.lower()
    assert (sink.levels, wire.level) == ([1], 1)


# -- threads -----------------------------------------------------------------------------------------------------------


def run_together(*targets: Callable[[], object]) -> None:
    raised: list[BaseException] = []

    def body(target: Callable[[], object]) -> None:
        try:
            target()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=body, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert raised == []


def test_levels_arrive_one_at_a_time_and_in_order() -> None:
    levels: list[int] = []
    inside = []

    def sink(level: int) -> None:
        inside.append(threading.get_ident())
        levels.append(level)
        assert inside == [threading.get_ident()]
        inside.pop()

    wire = IrqWire(IrqWire(sink))
    lines = [wire.line() for _ in range(4)]

    def pulse(line: IrqLine) -> None:
        for _ in range(500):
            line.pulse()

    run_together(*(lambda line=line: pulse(line) for line in lines))
    assert levels
    assert levels == [1, 0] * (len(levels) // 2)


def test_a_sink_that_wants_a_lock_and_one_who_has_it_wait_for_each_other_without_the_gil() -> None:
    """The wire is waited for with the GIL given back: its owner may be in Python."""
    lock, inside, ready = DeviceLock(), threading.Event(), threading.Event()

    def sink(level: int) -> None:
        if level:
            inside.set()
            assert ready.wait(DEADLINE_S)
            with lock:
                pass

    wire = IrqWire(sink)
    first, second = wire.line(), wire.line()

    def other() -> None:
        assert inside.wait(DEADLINE_S)
        ready.set()
        second.set(1)

    run_together(first.raise_, other)
    assert (first.level, second.level, wire.level) == (1, 1, 1)


def test_routes_change_while_lines_are_driven() -> None:
    counts: list[Any] = [0, 0]

    def sink(n: int) -> Callable[[int], None]:
        def drive(level: int) -> None:
            counts[n] += 1 if level else -1

        return drive

    inputs = [IrqWire(sink(0)), IrqWire(sink(1))]
    wire = IrqWire(inputs[0])
    line = wire.line()
    over = threading.Event()

    def drive() -> None:
        for _ in range(2000):
            line.pulse()
        line.raise_()
        over.set()

    def route() -> None:
        while not over.is_set():
            for n in (1, 0):
                wire.connect(inputs[n])

    run_together(drive, route)
    assert counts == [1, 0]
