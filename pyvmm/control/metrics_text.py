"""MachineCollector: what Prometheus is told of a machine, made of its counters at the moment it asks.

Names and units follow Prometheus' own rules (base units, _total for what only grows). Who receives and who sends is as
the guest sees it.
"""

from __future__ import annotations

import sys

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    StateSetMetricFamily,
)
from prometheus_client.registry import Collector, CollectorRegistry

from pyvmm.control.usage import threads
from pyvmm.run_state import RunState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Protocol

    from prometheus_client.metrics_core import Metric

    from pyvmm.block.backend import BlockBackend
    from pyvmm.cpu import Cpu
    from pyvmm.device import Device
    from pyvmm.exit_stats import ExitStat
    from pyvmm.guest_memory import GuestMemory
    from pyvmm.reset_count import ResetCount
    from pyvmm.spec import Spec

    class Watched(Protocol):
        """What of a Machine is looked at."""

        config: Spec
        memory: GuestMemory
        cpus: list[Cpu]
        backends: Mapping[str, BlockBackend]

        @property
        def devices(self) -> Mapping[str, Device]: ...
        @property
        def state(self) -> RunState: ...
        @property
        def resets(self) -> ResetCount: ...
        def exit_stats(self) -> list[ExitStat]: ...


S = 1e9  # nanoseconds
OPENMETRICS = "application/openmetrics-text"
OPERATIONS = ("read", "write", "flush", "discard")
# Upper bounds of the histogram, nanoseconds: each bucket of ours goes to the next of these, whatever the TSC's rate.
BOUNDS_NS = [1 << n for n in range(6, 37)]


def encoders(machine: Watched) -> Callable[[str], tuple[Callable[[], bytes], str]]:
    """By the Accept header of a request: what makes the text, and its content type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(MachineCollector(machine))

    def choose(accept: str) -> tuple[Callable[[], bytes], str]:
        # The library says a version back as it was asked for, and raises for one that is none: whoever asks gets one of
        # two.
        try:
            wants_openmetrics = choose_encoder(accept)[1].startswith(OPENMETRICS)
        except (TypeError, ValueError):
            wants_openmetrics = False
        encode, content_type = choose_encoder(OPENMETRICS if wants_openmetrics else "")
        return lambda: encode(registry), content_type

    return choose


class MachineCollector(Collector):
    """For a registry of prometheus_client's: an embedder's own, with other collectors beside it, or ``encoders``'."""

    def __init__(self, machine: Watched) -> None:
        self._machine = machine

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing is read to be registered

    def collect(self) -> Iterable[Metric]:
        yield from self._machine_itself()
        yield from self._exits()
        yield from self._time()
        yield from self._drives()
        yield from self._cards()

    def _machine_itself(self) -> Iterable[Metric]:
        machine = self._machine
        config = machine.config
        told = {
            "name": config.name or "",
            "machine": config.machine,
            "version": str(vars(sys.modules["pyvmm"])["__version__"]),  # the package is a layer above
        }
        yield InfoMetricFamily("pyvmm_machine", "Which machine this is", told)
        state = machine.state
        yield StateSetMetricFamily(
            "pyvmm_state", "What the machine is doing", {each.value: each is state for each in RunState}
        )
        yield GaugeMetricFamily("pyvmm_vcpus", "vCPUs of the guest", len(machine.cpus))
        yield GaugeMetricFamily("pyvmm_memory_bytes", "RAM of the guest", machine.memory.size_bytes)
        yield CounterMetricFamily("pyvmm_resets", "How often the guest has reset itself", machine.resets.count)

    def _exits(self) -> Iterable[Metric]:
        names = ["reason", "address", "region", "direction"]
        count = CounterMetricFamily("pyvmm_exits", "VM exits to user space", labels=names)
        time = CounterMetricFamily(
            "pyvmm_exit_seconds", "Time in user space, from KVM_RUN's return to the next", labels=names
        )
        spread = HistogramMetricFamily(
            "pyvmm_exit_duration_seconds", "Of each exit, the time in user space", labels=["reason"]
        )
        by_reason: dict[str, tuple[list[int], int]] = {}
        for row in self._machine.exit_stats():
            labels = [row.reason, "" if row.address is None else f"{row.address:#x}", row.region or "", row.direction]
            count.add_metric(labels, row.count)
            time.add_metric(labels, row.sum_ns / S)
            buckets, total_ns = by_reason.get(row.reason, ([0] * (len(BOUNDS_NS) + 1), 0))
            for bound_ns, n in row.histogram_ns:
                buckets[place_of(bound_ns)] += n
            by_reason[row.reason] = buckets, total_ns + row.sum_ns
        for reason, (buckets, total_ns) in by_reason.items():
            spread.add_metric([reason], cumulative(buckets), total_ns / S)
        yield from (count, time, spread)

    def _time(self) -> Iterable[Metric]:
        vcpus = {cpu.thread_id: str(cpu.index) for cpu in self._machine.cpus}
        ours = CounterMetricFamily(
            "pyvmm_vcpu_seconds",
            "Of a vCPU's thread: in the guest, in user space, in the kernel, and waiting for a processor (steal)",
            labels=["vcpu", "mode"],
        )
        other_ns = {"user": 0, "system": 0, "steal": 0}
        for use in threads():
            modes = {"user": use.user_ns, "system": use.system_ns, "steal": use.wait_ns}
            if use.thread_id in vcpus:
                for mode, ns in {"guest": use.guest_ns, **modes}.items():
                    ours.add_metric([vcpus[use.thread_id], mode], ns / S)
            else:
                other_ns = {mode: other_ns[mode] + ns for mode, ns in modes.items()}
        yield ours
        # No counter: a thread that has ended takes its time along.
        rest = GaugeMetricFamily(
            "pyvmm_other_threads_seconds", "The same of the process's other threads that are there", labels=["mode"]
        )
        for mode, ns in other_ns.items():
            rest.add_metric([mode], ns / S)
        yield rest

    def _drives(self) -> Iterable[Metric]:
        names = ["drive", "operation"]
        done = CounterMetricFamily("pyvmm_block_operations", "Requests of a drive that succeeded", labels=names)
        failed = CounterMetricFamily("pyvmm_block_failed_operations", "Requests that failed on the host", labels=names)
        moved = CounterMetricFamily("pyvmm_block_bytes", "Bytes of requests that succeeded", labels=names)
        took = CounterMetricFamily("pyvmm_block_seconds", "From submission to completion, all together", labels=names)
        busy = GaugeMetricFamily("pyvmm_block_in_flight", "Requests that are under way", labels=["drive"])
        for drive, backend in list(self._machine.backends.items()):
            stats = backend.stats
            busy.add_metric([drive], stats.in_flight)
            for operation in OPERATIONS:
                kind = getattr(stats, operation)
                done.add_metric([drive, operation], kind.operations)
                failed.add_metric([drive, operation], kind.failed)
                moved.add_metric([drive, operation], kind.bytes)
                took.add_metric([drive, operation], kind.time_ns / S)
        yield from (done, failed, moved, took, busy)

    def _cards(self) -> Iterable[Metric]:
        names = ["card", "direction"]
        packets = CounterMetricFamily("pyvmm_net_packets", "Frames of a network card", labels=names)
        moved = CounterMetricFamily("pyvmm_net_bytes", "Bytes of these", labels=names)
        lost = CounterMetricFamily("pyvmm_net_dropped", "Frames that were not passed on", labels=names)
        for net in self._machine.config.nets:
            counters = self._machine.devices[str(net.id)].counters()  # type: ignore[attr-defined]  # a card's name
            for short, direction in (("rx", "receive"), ("tx", "transmit")):
                packets.add_metric([str(net.id), direction], counters[f"{short}_packets"])
                moved.add_metric([str(net.id), direction], counters[f"{short}_bytes"])
                lost.add_metric([str(net.id), direction], counters[f"{short}_dropped"])
        yield from (packets, moved, lost)


def place_of(bound_ns: int) -> int:
    """In BOUNDS_NS the first that is no smaller; behind the last is the place of all that is longer."""
    return next((n for n, each in enumerate(BOUNDS_NS) if bound_ns <= each), len(BOUNDS_NS))


def cumulative(buckets: list[int]) -> list[tuple[str, float]]:
    """As Prometheus wants a histogram: how many were no longer than each bound, to the last, which has none."""
    sums, total = [], 0
    for bound, count in zip([*(str(ns / S) for ns in BOUNDS_NS), "+Inf"], buckets, strict=True):
        total += count
        sums.append((bound, float(total)))
    return sums
