"""Events: what happens is told by name and with data, in order, to all who listen, and never under a lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from pyvmm import ConfigError
from pyvmm.event_loop import EventLoop
from pyvmm.events import NAMES, WAITING_MAX, Event, Events

DEADLINE_S = 30


class Bench:
    """Events on a loop of their own, and what their listeners raised."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.loop = EventLoop(self.errors.append)
        self.events = Events(self.loop.call_soon, self.errors.append)
        self.heard: list[tuple[str, dict[str, object]]] = []

    def hear(self, event: Event) -> None:
        self.heard.append((event.name, event.data))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.loop.close()


def test_by_name_with_data_in_order(bench: Bench) -> None:
    bench.events.listen(bench.hear)
    told = [(name, {"number": n}) for n, name in enumerate(NAMES * 3)]
    for name, data in told:
        bench.events.tell(name, **data)
    bench.events.flush()
    assert bench.heard == told


def test_several_listeners_each_hear_what_they_asked_for(bench: Bench) -> None:
    second: list[str] = []
    bench.events.listen(bench.hear, "stop", "reset")
    bench.events.listen(lambda event: second.append(event.name))
    for name in ("resume", "stop", "reset", "wakeup"):
        bench.events.tell(name)
    bench.events.flush()
    assert [name for name, _ in bench.heard] == ["stop", "reset"]
    assert second == ["resume", "stop", "reset", "wakeup"]


def test_who_forgets_hears_no_more(bench: Bench) -> None:
    bench.events.listen(bench.hear)
    bench.events.tell("stop")
    bench.events.flush()
    bench.events.forget(bench.hear)
    bench.events.tell("resume")
    bench.events.flush()
    assert [name for name, _ in bench.heard] == ["stop"]


def test_nobody_listens_and_no_thread_is_started(bench: Bench) -> None:
    before = threading.active_count()
    bench.events.tell("stop")
    bench.events.flush()
    assert threading.active_count() == before
    assert not bench.loop.on_loop_thread()


def test_a_listener_that_raises_keeps_nobody_from_hearing(bench: Bench) -> None:
    error = ZeroDivisionError("mine")

    def broken(event: Event) -> None:
        raise error

    bench.events.listen(broken, "stop")
    bench.events.listen(bench.hear)
    bench.events.tell("stop")
    bench.events.tell("resume")
    bench.events.flush()
    assert bench.errors == [error]
    assert [name for name, _ in bench.heard] == ["stop", "resume"]


def test_where_nobody_can_hear_of_an_error_the_next_event_comes_all_the_same(bench: Bench) -> None:
    def broken(event: Event) -> None:
        raise ZeroDivisionError

    def worse(error: BaseException) -> None:
        raise OSError(24, "Too many open files")

    failing = Events(bench.loop.call_soon, worse)
    failing.listen(broken, "stop")
    failing.listen(bench.hear, "resume")
    failing.tell("stop")
    failing.flush()
    failing.tell("resume")
    failing.flush()
    assert [name for name, _ in bench.heard] == ["resume"]
    assert [type(error) for error in bench.errors] == [OSError]


def test_a_listener_may_tell_and_listen_and_its_caller_holds_no_lock(bench: Bench) -> None:
    lock = threading.Lock()
    threads: list[bool] = []

    def again(event: Event) -> None:
        with lock:  # which whoever tells has
            threads.append(bench.loop.on_loop_thread())
        if event.name == "stop":
            bench.events.listen(bench.hear)
            bench.events.tell("resume")

    bench.events.listen(again)
    with lock:
        bench.events.tell("stop")
    bench.events.flush()
    assert threads == [True, True]
    assert [name for name, _ in bench.heard] == ["resume"]


def test_an_event_whose_teller_was_interrupted_is_told_all_the_same(bench: Bench) -> None:
    """By a signal's exception, between the event and the call for the event loop."""
    calls: list[object] = []

    def call_soon(callback: Callable[[], None]) -> None:
        calls.append(callback)
        if len(calls) == 1:
            raise KeyboardInterrupt
        bench.loop.call_soon(callback)

    events = Events(call_soon, bench.errors.append)
    events.listen(bench.hear)
    with pytest.raises(KeyboardInterrupt):
        events.tell("stop")
    events.flush()
    assert [name for name, _ in bench.heard] == ["stop"]


def test_a_slow_listener_makes_no_queue_without_end(bench: Bench) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(event: Event) -> None:
        begun.set()
        assert go_on.wait(DEADLINE_S)
        bench.hear(event)

    bench.events.listen(slow)
    bench.events.tell("reset")
    assert begun.wait(DEADLINE_S)
    for _ in range(WAITING_MAX + 5):
        bench.events.tell("reset")
    go_on.set()
    bench.events.flush()
    assert (len(bench.heard), bench.events.lost) == (WAITING_MAX + 1, 5)


def test_careless_arguments(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="there is no event 'stopp': use resume, stop, "):
        bench.events.listen(bench.hear, "stopp")
    with pytest.raises(ConfigError, match="give a function that takes an event"):
        bench.events.listen("stop")  # type: ignore[arg-type]
    assert repr(Event("stop", {"cpu": 1})) == "<Event stop {'cpu': 1}>"


def test_a_thread_that_never_began_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host has no memory for it, Python starts a thread that ends before its first line."""
    monkeypatch.setattr("pyvmm.events.BEGIN_LIMIT_S", 0.01)
    never: list[object] = []
    events = Events(never.append, never.append, lambda: False)
    events.listen(never.append)
    events.tell("stop")
    events.flush()
    assert never == [events._tell_all] * 2  # asked for by who told and by who waits, and no more
