"""A machine that is saved and thrown away again and again, and goes on in another one each time."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pyvmm
from pyvmm import ExitStatus

# At how many moments in all of a test: more of them, by this, where that is what is to be shown.
MOMENTS = int(os.environ.get("PYVMM_MOMENTS", "20"))
MOMENTS_OF_FIRMWARE = int(os.environ.get("PYVMM_MOMENTS", "8"))  # software KVM takes a second to warm up each life

LONG_LIFE_S = 2.0
# MSR_KVM_SYSTEM_TIME and its newer number (Linux virt/kvm/x86/msr.rst): address of a pvclock_vcpu_time_info, bit 0 on.
KVMCLOCK_MSRS = ("0x12", "0x4b564d01")
KVMCLOCK_BYTES = 32
# MSR_KVM_WALL_CLOCK and its newer number: address of a pvclock_wall_clock, which KVM fills at each write of the MSR, a
# load's too, with the wall clock's time at which guest time was zero. That moves with every pause.
WALL_CLOCK_MSRS = ("0x11", "0x4b564d00")
WALL_CLOCK_BYTES = 12
PAGE = 4096
# HV_X64_MSR_VP_RUNTIME and HV_X64_MSR_TIME_REF_COUNT (Hyper-V TLFS), which KVM lists and counts for any guest.
COUNTING_MSRS = ("0x40000010", "0x40000020")
# IA32_SYSENTER_ESP and _EIP: a guest writes 64 bits, of which KVM for AMD, where long mode has no SYSENTER, takes half
# back.
HALF_MSRS = ("0x175", "0x176")


class Lives:
    """``make()`` gives the machine, each time the same. ``machine`` is the present one, paused; ``count`` have died.

    With ``restore``, each goes on from a snapshot at the path ``by``: ``restore(by)`` gives the next one.

    A life is at most ``longest_s`` long, and ``long_life_s`` once there were MOMENTS of them, so that the guest gets to
    its end: each life begins with cold page tables.
    """

    def __init__(
        self,
        make: Callable[[], pyvmm.Machine],
        seed: int,
        longest_s: float = 0.02,
        *,
        long_life_s: float = LONG_LIFE_S,
        by: Path | None = None,
        restore: Callable[[Path], pyvmm.Machine] | None = None,
    ) -> None:
        self._make = make
        self._by = by
        self._restore = restore
        self._random = random.Random(seed)
        self._longest_s = longest_s
        self._long_life_s = long_life_s
        self.machine = make()
        self.count = 0
        self.ended: ExitStatus | None = None

    def live(self) -> bool:
        """One life more. False where the guest has come to its end in it."""
        machine = self.machine
        machine.resume()
        machine.wait(self._random.uniform(0, self._longest_s) if self.count < MOMENTS else self._long_life_s)
        machine.pause()
        if machine.state in (pyvmm.RunState.SHUTDOWN, pyvmm.RunState.INTERNAL_ERROR):
            if machine.error is not None:
                raise machine.error
            self.ended = machine.status
            return False
        state = machine.save_state()
        now_ns = machine.clock.now_ns()
        if self._by is not None:
            machine.save(self._by)
        machine.close()
        self.count += 1
        self.machine = machine = self._next(state)
        assert machine.clock.now_ns() == now_ns
        different = what_changed(machine.save_state(), state)
        assert not different, different
        return True

    def _next(self, state: dict[str, Any]) -> pyvmm.Machine:
        if self._by is not None and self._restore is not None:
            return self._restore(self._by)
        machine = self._make()
        machine.load_state(state)
        return machine

    def until(self, done: Callable[[], bool], limit_s: float) -> None:
        """Live on until ``done()``. AssertionError where the guest ends before that."""
        end = time.monotonic() + limit_s
        while not done():
            assert self.live(), f"the guest has ended: {self.ended!r}"
            assert time.monotonic() < end, f"not done after {limit_s} s and {self.count} lives"

    def to_the_end(self, limit_s: float) -> ExitStatus:
        """Live on until the guest ends."""
        end = time.monotonic() + limit_s
        while self.live():
            assert time.monotonic() < end, f"still alive after {limit_s} s and {self.count} lives"
        assert self.ended is not None
        return self.ended

    def close(self) -> None:
        self.machine.close()

    def __enter__(self) -> Lives:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two states differ; not how, for that may be long."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, bytes) and isinstance(other, bytes) and len(one) == len(other):
        places = [n for n in range(len(one)) if one[n] != other[n]] if one != other else []
        return [f"{where} at {n:#x}: {one[n : n + 32].hex()}, {other[n : n + 32].hex()}" for n in places[:1]]
    return [] if one == other else [f"{where}: {one!r:.200} and {other!r:.200}"]


def what_changed(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Where two states of a machine differ in what nobody changes while its vCPUs stand."""
    clocks = kvmclocks(one) | kvmclocks(other)
    return [
        *differences(without_what_may_differ(one), without_what_may_differ(other)),
        *(place for name in one["memory"] for place in different_memory(one, other, name, clocks)),
    ]


def different_memory(one: dict[str, Any], other: dict[str, Any], name: str, clocks: set[int]) -> list[str]:
    """The first place, if any. No copy of all of it: in the lab a guest's memory takes seconds to copy."""
    here, there = one["memory"][name], other["memory"][name]
    if here == there:
        return []
    base = int(name, 16)
    for start in range(0, len(here), PAGE):
        page, same = here[start : start + PAGE], there[start : start + PAGE]
        if page != same:
            for at in range(len(page)):
                if page[at] != same[at] and base + start + at not in clocks:
                    return [f"memory at {base + start + at:#x}: {page[at:][:32].hex()}, {same[at:][:32].hex()}"]
    return []


def kvmclocks(state: dict[str, Any]) -> set[int]:
    """Addresses of the guest's copies of its clock, and of the time at which it began."""
    found: set[int] = set()
    for name, entry in state["parts"].items():
        if name.startswith("vCPU"):
            msrs = entry["state"]["msrs"]
            for enabled in (msrs.get(msr, 0) for msr in KVMCLOCK_MSRS):
                found.update(range(enabled - 1, enabled - 1 + KVMCLOCK_BYTES) if enabled & 1 else ())
            for address in filter(None, (msrs.get(msr, 0) for msr in WALL_CLOCK_MSRS)):
                found.update(range(address, address + WALL_CLOCK_BYTES))
    return found


def without_what_may_differ(state: dict[str, Any]) -> dict[str, Any]:
    """A state without its memory, but for the host's wall clock, and for what KVM does by itself while the vCPUs stand:
    its timers and counters, and which parts of the FPU are in use.
    """
    parts = {name: dict(entry["state"]) for name, entry in state["parts"].items()}
    parts["clock"].pop("wall_ns")
    parts.pop("irqchip", None)
    for name, part in parts.items():
        if name.startswith("vCPU"):
            part.pop("xsave")
            part.pop("lapic", None)
            part.pop("events")
            part["msrs"] = {
                msr: value & 0xFFFF_FFFF if msr in HALF_MSRS else value
                for msr, value in part["msrs"].items()
                if msr not in COUNTING_MSRS
            }
    return {**state, "parts": parts, "memory": {name: len(content) for name, content in state["memory"].items()}}
