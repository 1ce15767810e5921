"""The Device contract: its lock, and its defaults."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest

from pyvmm.address_space import AddressSpace
from pyvmm.device import Device, DeviceLock

DEADLINE_S = 10


def run_thread(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(DEADLINE_S)
    return not thread.is_alive()


def taken_elsewhere(lock: DeviceLock) -> bool:
    """Whether another thread can take the lock now; it lets go again."""
    took = threading.Event()

    def take() -> None:
        with lock:
            took.set()

    run_thread(take)
    return took.wait(0.05)


def test_the_lock_is_recursive() -> None:
    lock = DeviceLock()
    with lock as inner, lock, inner:
        assert inner is lock
        lock.acquire()
        lock.release()
        assert not taken_elsewhere(lock)
    assert taken_elsewhere(lock)


def test_each_acquire_needs_its_release() -> None:
    lock = DeviceLock()
    lock.acquire()
    lock.acquire()
    lock.release()
    assert not taken_elsewhere(lock)
    lock.release()
    assert taken_elsewhere(lock)


def test_the_lock_is_let_go_when_the_block_raises() -> None:
    lock = DeviceLock()
    with pytest.raises(KeyError), lock:
        raise KeyError
    assert taken_elsewhere(lock)


def test_the_lock_excludes_threads() -> None:
    lock, counter = DeviceLock(), [0]

    def count() -> None:
        for _ in range(2000):
            with lock:
                value = counter[0]
                for _i in range(3):
                    pass
                counter[0] = value + 1

    threads = [run_thread(count) for _ in range(4)]
    assert all(ended(t) for t in threads)
    assert counter == [8000]


def test_release_by_a_thread_that_does_not_hold_it_raises() -> None:
    lock = DeviceLock()
    with pytest.raises(RuntimeError, match="does not hold"):
        lock.release()
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            go_on.wait(DEADLINE_S)

    thread = run_thread(hold)
    assert held.wait(DEADLINE_S)
    with pytest.raises(RuntimeError, match="does not hold"):
        lock.release()
    assert not taken_elsewhere(lock)
    go_on.set()
    assert ended(thread)


def test_waiting_for_the_lock_does_not_keep_the_gil() -> None:
    # The owner can only let go after it has run Python while the other one waits.
    lock, about = DeviceLock(), threading.Event()
    order: list[str] = []

    def wait_for_it() -> None:
        about.set()
        with lock:
            order.append("waiter")

    with lock:
        thread = run_thread(wait_for_it)
        assert about.wait(DEADLINE_S)
        for _ in range(100_000):  # long enough for the interpreter to switch threads
            pass
        order.append("owner")
    assert ended(thread)
    assert order == ["owner", "waiter"]


def test_bus_and_lock_do_not_deadlock_with_the_gil() -> None:
    class Counter(Device):
        count = 0

        def write(self, offset: int, size: int, value: int) -> None:
            self.count += 1

    device, space = Counter(), AddressSpace("pio", 0x100)
    space.map(0, 4, device)

    def through_the_bus() -> None:
        for _ in range(1000):
            space.write(0, 1, 0)

    def as_a_timer() -> None:
        for _ in range(1000):
            with device.lock:
                device.write(0, 1, 0)

    threads = [run_thread(target) for target in (through_the_bus, as_a_timer) * 2]
    assert all(ended(t) for t in threads)
    assert device.count == 4000


def test_a_handler_may_take_its_own_lock() -> None:
    class Own(Device):
        def read(self, offset: int, size: int) -> int:
            with self.lock:
                return 0x5A

    space = AddressSpace("pio", 0x100)
    space.map(0, 1, Own())
    assert space.read(0, 1) == 0x5A


def test_two_devices_have_two_locks() -> None:
    assert Device().lock is not Device().lock


def test_the_lock_is_there_before_init() -> None:
    class Early(Device):
        def __init__(self, name: str, *, level: int) -> None:
            with self.lock:
                self.name = name

    assert Early("x", level=1).name == "x"


def test_replacing_the_lock_takes_nothing_from_under_the_bus() -> None:
    # The type says that it is not to be done; who does it all the same must not leave the bus a lock that is gone.
    class Own(Device):
        def read(self, offset: int, size: int) -> int:
            return taken_elsewhere(first)

    device, space = Own(), AddressSpace("pio", 0x100)
    first = device.lock
    space.map(0, 1, device)
    device.lock = DeviceLock()  # type: ignore[misc]
    assert space.read(0, 1) == 0  # held while the handler runs
    assert taken_elsewhere(first)

    another = Device()
    space.map(1, 1, another)
    gone = another.lock = DeviceLock()  # type: ignore[misc]
    with gone:  # the first one has no name any more: the bus keeps it
        gc.collect()
        assert space.read(1, 1) == 0xFF


def test_the_lock_comes_with_the_object_and_not_with_init() -> None:
    class Silent(Device):
        def __init__(self, *args: int, **kwargs: int) -> None:
            pass

    assert isinstance(Silent(1, key=2).lock, DeviceLock)
    assert isinstance(Device.__new__(Silent).lock, DeviceLock)


def test_attributes_of_a_device_are_its_own() -> None:
    class Plain(Device):
        pass

    one, other = Plain(), Plain()
    one.level = 1  # type: ignore[attr-defined]
    assert not hasattr(other, "level")
    assert vars(one) == {"level": 1}
    with pytest.raises(AttributeError):
        Device().level = 1  # type: ignore[attr-defined]


def test_defaults_are_a_device_that_is_not_there() -> None:
    device = Device()
    assert (device.valid_sizes, device.impl_sizes, device.unaligned) == ((1, 4), (1, 4), False)
    assert [device.read(0, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFF_FFFF]
    device.write(0, 4, 0)
    device.reset()
    device.load(device.save())
    assert device.save() == {}


def test_devices_can_be_referred_to_weakly_and_are_collected() -> None:
    class Cyclic(Device):
        def __init__(self) -> None:
            self.me = self

    device = Cyclic()
    gone = weakref.ref(device)
    del device
    gc.collect()
    assert gone() is None
