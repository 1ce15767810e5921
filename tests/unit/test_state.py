"""The contract of state.py, of every device: whatever the moment, another one goes on from there as this one would."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_benches import BENCHES, Bench, SerialBench
from virtio_benches import VIRTIO_BENCHES, VsockBench

from pyvmm.clock import VirtualClock
from pyvmm.errors import StateError
from pyvmm.state import known, load_all, load_fields, once, save_all, save_fields, value_of


def run(bench: Bench, steps: list[Any]) -> list[object]:
    return [bench.do(step) for step in steps]


def is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 64
    return value is None or isinstance(value, bytes | str)


@pytest.mark.parametrize("kind", (*BENCHES, *VIRTIO_BENCHES), ids=lambda kind: kind.__name__)
@given(seed=st.integers(0, 1 << 32), lengths=st.tuples(st.integers(1, 50), st.integers(1, 50)))
@settings(max_examples=100, deadline=None)
def test_another_one_goes_on_as_this_one(kind: type[Bench], seed: int, lengths: tuple[int, int]) -> None:
    before, after = kind.steps(seed, lengths[0]), kind.steps(seed + 1, lengths[1])
    one, untouched, other = kind(), kind(), kind()
    assert run(one, before) == run(untouched, before)
    state = one.save()
    assert one.save() == state
    assert is_plain(state)
    other.load(copy.deepcopy(state))
    assert other.levels() == one.levels()
    assert other.save() == state
    for bench in (one, untouched, other):
        bench.log.clear()
    results = run(untouched, after)
    assert run(one, after) == results
    assert run(other, after) == results
    assert one.log == untouched.log
    assert other.log == untouched.log
    assert one.save() == other.save() == untouched.save()


@pytest.mark.parametrize("kind", (*BENCHES, *VIRTIO_BENCHES), ids=lambda kind: kind.__name__)
@given(seed=st.integers(0, 1 << 32), lengths=st.tuples(st.integers(1, 50), st.integers(1, 50)))
@settings(max_examples=30, deadline=None)
def test_many_go_on_from_a_state_that_remembers(kind: type[Bench], seed: int, lengths: tuple[int, int]) -> None:
    """What is looked at once only is the same for each, and what one makes of it no other one sees."""
    one = kind()
    run(one, kind.steps(seed, lengths[0]))
    state = one.save()
    kept = known(state)
    for n in range(3):
        other = kind()
        other.load(kept)
        assert other.save() == state
        assert other.levels() == one.levels()
        run(other, kind.steps(seed + n, lengths[1]))
    assert kept == state


@pytest.mark.parametrize("kind", (*BENCHES, *VIRTIO_BENCHES, VsockBench), ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_hostile_state_is_refused_or_harmless(kind: type[Bench], data: st.DataObject) -> None:
    one, other = kind(), kind()
    seed = data.draw(st.integers(0, 1 << 32))
    run(one, kind.steps(seed, 20))
    state = one.save()
    spoil(state, data)
    try:
        other.load(state)
    except StateError as error:
        assert "\n" not in str(error)
    else:
        run(other, kind.steps(seed + 1, 20))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, 7, 255, 1 << 16, (1 << 64) - 1, -1, "", "moment"]),
    st.binary(max_size=4),
    st.lists(st.integers(0, 255), max_size=4),
    st.just({}),
)


def spoil(state: Any, data: st.DataObject) -> None:
    """Something in it becomes something else, or goes, or comes."""
    at: Any = state
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        inner = at[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 9)):
            at = inner
            continue
        what = data.draw(st.sampled_from(("change", "change", "change", "delete", "add")))
        if what == "change":
            at[key] = data.draw(VALUES)
        elif what == "delete":
            del at[key]
        elif isinstance(at, dict):
            at["strange"] = data.draw(VALUES)
        else:
            at.append(data.draw(VALUES))
        return


class Fields:
    """One field of each kind."""

    STATE = {
        "_byte": 8,
        "wide": 256,
        "few": range(1, 4),
        "yes": "flag",
        "since": "moment",
        "timer": "timer",
        "data": ("bytes", 4),
        "some": ("bytes", 0, 2),
        "numbers": ("list", 4, 1, 3),
        "table": ("each", {1: 8, "b": "flag"}),
        "choice": ("one of", 0, "x", None),
        "perhaps": ("or none", 8),
    }

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._byte, self.wide, self.few, self.yes = 5, 1 << 255, 3, True
        self.since = clock.now_ns() - 7
        self.timer = clock.timer(lambda: None)
        self.data, self.some, self.numbers = bytearray(b"abcd"), b"x", [1, 2]
        self.table: dict[object, object] = {1: 9, "b": True}
        self.choice: object = "x"
        self.perhaps: int | None = None


def test_each_kind_of_field() -> None:
    clock, later = VirtualClock(), VirtualClock(1000)
    one = Fields(clock)
    one.timer.arm(50)
    clock.step(20)
    state = save_fields(one, Fields.STATE)
    assert is_plain(state)
    assert (state["byte"], state["since"], state["timer"]) == (5, -27, 30)
    other = Fields(later)
    other._byte, other.data[:], other.numbers, other.table, other.perhaps = 0, b"zzzz", [3], {1: 0, "b": False}, 4
    data = other.data
    load_fields(other, Fields.STATE, state)
    assert other.data is data, "changed in place: others may refer to it"
    assert not other.timer.armed
    other.timer.go_on()
    assert (other.timer.deadline_ns, other.since) == (1030, 973)
    assert save_fields(other, Fields.STATE) == state


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("byte", 256, "byte is 256, not from 0 to 255"),
        ("byte", True, "byte is True, no whole number"),
        ("wide", bytes(31), "wide has 31 bytes, not 32"),
        ("few", 4, "few is 4, not from 1 to 3"),
        ("yes", 1, "yes is 1, not True or False"),
        ("since", 1 << 63, "since is"),
        ("timer", "soon", "timer is 'soon', no whole number"),
        ("data", b"abc", "data has 3 bytes, not 4"),
        ("data", "abcd", "data is 'abcd', no bytes"),
        ("numbers", [], "numbers has 0 entries, not 1 to 3"),
        ("numbers", [1, 16], r"numbers\[1\] is 16, not from 0 to 15"),
        ("table", {"1": 1}, "table is a dict, no dict of 1, b"),
        ("choice", False, "choice is False, none of 0, 'x', None"),
        ("perhaps", -1, "perhaps is -1"),
    ],
)
def test_what_is_no_such_field_is_named(name: str, value: object, sentence: str) -> None:
    one = Fields(VirtualClock())
    state = save_fields(one, Fields.STATE)
    state[name] = value
    one._byte = 77
    with pytest.raises(StateError, match=sentence):
        load_fields(one, Fields.STATE, state)
    assert one._byte == 77, "nothing of it was taken"


def test_names_and_versions() -> None:
    bench = SerialBench()
    state = bench.save()
    for wrong, sentence in (
        ([], "no state of a machine"),
        ({}, "the state has no clock"),
        ({**state, "sound card": {}}, "the state has a 'sound card', this machine has none"),
        ({**state, "serial": {"version": 2, "state": {}}}, "the state of serial is version 2, this pyvmm has 1"),
        ({**state, "serial": {"version": 1}}, "the state of serial is a dict"),
        ({**state, "serial": {"version": 1, "state": {}}}, "the state of serial: rbr is missing"),
        ({**state, "serial": {"version": 1, "state": 7}}, "the state of serial: 7 is no state"),
    ):
        with pytest.raises(StateError, match=sentence):
            load_all(bench.holders, wrong)
    assert list(save_all(bench.holders)) == ["clock", "serial", "console"]


def test_what_a_holder_raises_names_it() -> None:
    class Broken:
        STATE_VERSION = 1

        def save(self) -> dict[str, Any]:
            return {}

        def load(self, state: dict[str, Any]) -> None:
            raise ZeroDivisionError("it\nbroke")

        def after_load(self) -> None:
            raise AssertionError

    with pytest.raises(StateError, match=r"the state of odd can't be taken: ZeroDivisionError: it broke"):
        load_all([("odd", Broken())], {"odd": {"version": 1, "state": {}}})


def test_long_values_are_cut_in_messages() -> None:
    for value in ("x" * 10_000, 1 << 100_000, b"x" * 10_000, [1] * 10_000):
        with pytest.raises(StateError) as caught:
            value_of("flag", value, "yes")
        assert len(str(caught.value)) < 100


def test_guest_time_is_set() -> None:
    clock = VirtualClock(wall_ns=50)
    rung: list[int] = []
    timer = clock.timer(lambda: rung.append(clock.now_ns()))
    timer.arm(10)
    clock.set_time(1_000)
    assert (clock.now_ns(), clock.wall_ns(), timer.deadline_ns) == (1_000, 50, 1_010)
    clock.step(9)
    assert rung == []
    clock.step(1)
    assert rung == [1_010]
    other = VirtualClock(wall_ns=7)
    other.load(clock.save())
    assert (other.now_ns(), other.wall_ns()) == (clock.now_ns(), clock.wall_ns())
    with pytest.raises(StateError, match="now_ns is -1"):
        other.load({"now_ns": -1, "wall_ns": 0})


def test_what_is_made_of_a_known_state_is_made_once() -> None:
    state = {"a": {"b": 1}}
    kept = known(state)
    assert once(kept, "key", lambda: [1]) is once(kept, "key", lambda: [2])
    assert once(kept, "another", lambda: [2]) == [2]
    assert once(state, "key", lambda: [3]) == [3]
    assert once(state, "key", lambda: [4]) == [4]


def test_a_copy_of_a_known_state_is_whole_and_may_change() -> None:
    state = {"a": {"b": [1, {"c": b"2"}]}}
    kept = known(state)
    for copied in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert copied == state
        copied["a"]["b"].append(3)
    assert kept == state
