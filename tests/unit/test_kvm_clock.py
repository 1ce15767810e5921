"""What KVM keeps of guest time is put back when the machine goes on: on stand-ins for KVM whose time moves by hand."""

from __future__ import annotations

from typing import Any, cast

import pytest

from pyvmm.errors import KvmError, StateError
from pyvmm.kvm_clock import MSR_TSC, MSR_TSC_DEADLINE, KvmClock

MASK = (1 << 64) - 1


class Host:
    """Nanoseconds and TSC of the host are the same here."""

    def __init__(self) -> None:
        self.now = 1_000_000


class FakeVm:
    def __init__(self, host: Host) -> None:
        self.host = host
        self.offset_ns = 0

    def get_clock(self) -> dict[str, int]:
        return {"clock": self.host.now + self.offset_ns, "flags": 0, "realtime": 0, "host_tsc": 0}

    def set_clock(self, clock_ns: int) -> None:
        self.offset_ns = clock_ns - self.host.now


class FakeVcpu:
    """``movable`` False: an offset is taken and means nothing, as in software KVM. None: there is none to set."""

    def __init__(self, host: Host, movable: bool | None, pvclock: bool, offset: int = 0) -> None:
        self.host = host
        self.movable = movable
        self.pvclock = pvclock
        self.offset = offset
        self.deadline = 0
        self.armed_for = 0  # in host time
        self.told = 0
        self.scales = True
        self._tsc_khz = 1_000_000

    @property
    def tsc_khz(self) -> int:
        return self._tsc_khz

    @tsc_khz.setter
    def tsc_khz(self, khz: int) -> None:
        if not self.scales:
            raise KvmError("KVM_SET_TSC_KHZ", 22)
        self._tsc_khz = khz

    @property
    def tsc_offset(self) -> int:
        if self.movable is None:
            raise KvmError("KVM_GET_DEVICE_ATTR", 6)
        return self.offset & MASK

    @tsc_offset.setter
    def tsc_offset(self, value: int) -> None:
        if self.movable:
            self.offset = value

    def get_msrs(self, indices: list[int]) -> dict[int, int]:
        values = {MSR_TSC: self.host.now + self.offset & MASK, MSR_TSC_DEADLINE: self.deadline}
        return {index: values[index] for index in indices}

    def set_msrs(self, values: dict[int, int]) -> None:
        assert list(values) == [MSR_TSC_DEADLINE]
        self.deadline = values[MSR_TSC_DEADLINE]
        self.armed_for = self.deadline - self.offset & MASK

    def kvmclock_ctrl(self) -> bool:
        self.told += self.pvclock
        return self.pvclock


class Bench:
    def __init__(self, movable: bool | None = True, pvclock: tuple[bool, ...] = (True, True), offset: int = 0) -> None:
        self.host = Host()
        self.vm = FakeVm(self.host)
        self.vcpus = [FakeVcpu(self.host, movable, has, offset) for has in pvclock]
        cpus = [type("Cpu", (), {"vcpu": vcpu})() for vcpu in self.vcpus]
        self.clock = KvmClock(cast("Any", self.vm), cast("Any", cpus))

    def stand(self, ns: int) -> None:
        self.clock.stop()
        self.host.now += ns
        self.clock.start()


def test_no_time_passes_for_kvmclock() -> None:
    bench = Bench()
    before = bench.vm.get_clock()["clock"]
    bench.stand(3_000_000_000)
    assert bench.vm.get_clock()["clock"] == before
    bench.host.now += 5
    bench.stand(7)
    assert bench.vm.get_clock()["clock"] == before + 5


@pytest.mark.parametrize("offset", [0, -123_456, (1 << 63) + 5])
def test_no_time_passes_for_the_tsc_and_the_vcpus_stay_in_step(offset: int) -> None:
    bench = Bench(offset=offset)
    before = [vcpu.get_msrs([MSR_TSC])[MSR_TSC] for vcpu in bench.vcpus]
    bench.stand(3_000_000_000)
    assert [vcpu.get_msrs([MSR_TSC])[MSR_TSC] for vcpu in bench.vcpus] == before


def test_a_deadline_is_armed_anew_for_what_was_left_of_it() -> None:
    bench = Bench()
    armed, idle = bench.vcpus
    armed.set_msrs({MSR_TSC_DEADLINE: bench.host.now + 500})
    bench.clock.stop()
    bench.host.now += 3_000
    armed.deadline = 0  # the kernel's timer has gone off meanwhile
    bench.clock.start()
    assert armed.deadline == 1_000_000 + 500, "the guest reads back what it wrote"
    assert armed.armed_for == bench.host.now + 500
    assert idle.armed_for == 0


@pytest.mark.parametrize("movable", [False, None])
def test_where_the_tsc_can_t_be_moved_the_deadline_is(movable: bool | None) -> None:
    bench = Bench(movable)
    armed = bench.vcpus[1]
    armed.set_msrs({MSR_TSC_DEADLINE: bench.host.now + 500})
    bench.stand(3_000)
    assert armed.armed_for == bench.host.now + 500


def test_every_vcpu_that_has_a_kvmclock_is_told() -> None:
    bench = Bench(pvclock=(False, True, False, True))
    bench.stand(1)
    assert [vcpu.told for vcpu in bench.vcpus] == [0, 1, 0, 1]


def test_the_first_start_changes_nothing() -> None:
    bench = Bench()
    bench.clock.start()
    assert bench.vm.offset_ns == 0
    assert [vcpu.told for vcpu in bench.vcpus] == [0, 0]


def test_time_is_noted_at_the_first_of_two_stops() -> None:
    bench = Bench()
    before = bench.vm.get_clock()["clock"]
    bench.clock.stop()
    bench.host.now += 10
    bench.clock.stop()
    bench.host.now += 10
    bench.clock.start()
    assert bench.vm.get_clock()["clock"] == before


def test_a_reset_forgets_deadlines() -> None:
    bench = Bench()
    bench.vcpus[0].set_msrs({MSR_TSC_DEADLINE: bench.host.now + 500})
    bench.clock.stop()
    bench.vcpus[0].deadline = bench.vcpus[0].armed_for = 0
    bench.clock.forget_timers()
    bench.clock.start()
    assert bench.vcpus[0].armed_for == 0


def test_another_host_goes_on_from_a_saved_clock() -> None:
    """Its TSC may be ahead or far behind, as after a boot: the guest's counts on, and its vCPUs keep their distance."""
    for later in (40_000_000_000, -900_000):
        one, other = Bench(offset=5000), Bench()
        one.vcpus[1].offset += 77
        one.vcpus[1].deadline = 3_000_000
        one.clock.stop()
        state = one.clock.save()
        assert one.clock.save() == state
        saved = [vcpu.get_msrs([MSR_TSC])[MSR_TSC] for vcpu in one.vcpus]
        clock_ns = one.vm.get_clock()["clock"]
        other.host.now += later
        other.clock.load(state)
        assert [vcpu.offset for vcpu in other.vcpus] == [0, 0]
        other.clock.after_load()
        assert other.clock.save() == state
        other.host.now += 123_456
        other.clock.start()
        assert [vcpu.get_msrs([MSR_TSC])[MSR_TSC] for vcpu in other.vcpus] == saved
        assert other.vm.get_clock()["clock"] == clock_ns
        assert other.vcpus[1].deadline == 3_000_000


def test_a_tsc_of_another_frequency_is_scaled_or_refused() -> None:
    state = {**Bench().clock.save(), "tsc_khz": 2_000_000}
    other = Bench()
    other.clock.load(state)
    other.clock.after_load()
    assert [vcpu.tsc_khz for vcpu in other.vcpus] == [2_000_000] * 2
    other.clock.load({**state, "tsc_khz": 3_000_000})
    other.vcpus[0].scales = False
    with pytest.raises(StateError, match="the guest's TSC counts 3000000 kHz, this host's 2000000, and its KVM can't"):
        other.clock.after_load()
