"""Statistics: the kernel's own, and the exits as we count them (QEMU qapi/stats.json)."""

from __future__ import annotations

from pyvmm.control.qmp.kinds import ANY, INT, STR, Enum, ListOf, Optional, QmpError, Struct
from pyvmm.control.qmp.parked import while_parked
from pyvmm.control.qmp.table import command
from pyvmm.kvm.stats import KINDS, UNITS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.control.qmp.subject import Machine, Served
    from pyvmm.kvm.stats import KvmStats

KVM, PYVMM = "kvm", "pyvmm"
PROVIDER = Enum(KVM, PYVMM)
TARGET = Enum("vm", "vcpu")
REQUEST = Struct({"provider": PROVIDER, "names": Optional(ListOf(STR))})
FILTER: dict[str, Any] = {
    "target": TARGET,
    "vcpus": Optional(ListOf(STR)),
    "providers": Optional(ListOf(REQUEST)),
}
STAT = Struct({"name": STR, "value": ANY})
RESULT = Struct({"provider": PROVIDER, "qom-path": Optional(STR), "stats": ListOf(STAT)})
STAT_SCHEMA = Struct({
    "name": STR, "type": Enum(*KINDS), "unit": Optional(Enum("bytes", "seconds", "cycles", "boolean")),
    "base": Optional(INT), "exponent": INT, "bucket-size": Optional(INT),
})  # fmt: skip
SCHEMA = Struct({"provider": PROVIDER, "target": TARGET, "stats": ListOf(STAT_SCHEMA)})

NS_EXPONENT = -9

class Opened:
    """The kernel's descriptors of one machine's statistics. Opening one has the vCPU parked, reading does not."""

    def __init__(self, machine: Machine) -> None:
        self.vm = machine.vm.stats()
        self.vcpus: list[KvmStats] = while_parked(
            machine, "stats", lambda: [cpu.vcpu.stats() for cpu in machine.cpus]
        )

    def close(self) -> None:
        for stats in (self.vm, *self.vcpus):
            stats.close()

def opened(served: Served) -> Opened:
    """Once a server, which closes them. QmpError where there is no KVM."""
    if not served.machine.cpus:
        raise QmpError("this machine has no vCPU, and no KVM")
    if served.kvm_stats is None:
        served.kvm_stats = Opened(served.machine)
    made: Opened = served.kvm_stats
    return made

@command("query-stats", FILTER, ListOf(RESULT), waits=True)
def query_stats(
    served: Served,
    target: str,
    vcpus: list[str] | None = None,
    providers: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    if providers is None:
        wanted: dict[str, list[str] | None] = {**({KVM: None} if served.machine.cpus else {}), PYVMM: None}
    else:
        wanted = {each["provider"]: each.get("names") for each in providers}
    if target == "vm" and vcpus is not None:
        raise QmpError("Parameter 'vcpus' is unexpected")
    results = []
    for provider, names in wanted.items():
        for path, values in told_by(served, provider, target):
            if vcpus is not None and path not in vcpus:
                continue
            stats = [{"name": n, "value": v} for n, v in values.items() if names is None or n in names]
            if stats:
                results.append({"provider": provider, **({} if path is None else {"qom-path": path}), "stats": stats})
    return results

def told_by(served: Served, provider: str, target: str) -> list[tuple[str | None, dict[str, Any]]]:
    machine = served.machine
    if provider == KVM:
        kvm = opened(served)
        if target == "vm":
            return [(None, kvm.vm.read())]
        return [(f"/machine/cpus/{n}", stats.read()) for n, stats in enumerate(kvm.vcpus)]
    if target == "vcpu":
        return []
    rows = machine.exit_stats()
    reasons: dict[str, int] = {}
    for row in rows:
        reasons[row.reason] = reasons.get(row.reason, 0) + row.count
    totals = {"exits": sum(row.count for row in rows), "exits-time": sum(row.sum_ns for row in rows)}
    return [(None, {**totals, **{f"exits-{name.lower().replace('_', '-')}": n for name, n in reasons.items()}})]

@command("query-stats-schemas", {"provider": Optional(PROVIDER)}, ListOf(SCHEMA), waits=True)
def query_stats_schemas(served: Served, provider: str | None = None) -> list[dict[str, Any]]:
    schemas = []
    if provider == KVM or (provider is None and served.machine.cpus):
        kvm = opened(served)
        schemas.append({"provider": KVM, "target": "vm", "stats": described(kvm.vm)})
        if kvm.vcpus:
            schemas.append({"provider": KVM, "target": "vcpu", "stats": described(kvm.vcpus[0])})
    if provider in (None, PYVMM):
        exits = [{"name": name, "type": "cumulative", "exponent": 0} for name in exits_told(served)]
        for entry in exits:
            if entry["name"] == "exits-time":
                entry |= {"unit": "seconds", "base": 10, "exponent": NS_EXPONENT}
        schemas.append({"provider": PYVMM, "target": "vm", "stats": exits})
    return schemas

def exits_told(served: Served) -> list[str]:
    return [name for _, values in told_by(served, PYVMM, "vm") for name in values]

def described(stats: KvmStats) -> list[dict[str, Any]]:
    told = []
    for field in stats.fields:
        entry: dict[str, Any] = {"name": field.name, "type": KINDS[field.kind], "exponent": field.exponent}
        if UNITS[field.unit]:
            entry["unit"] = UNITS[field.unit]
        if field.exponent:
            entry["base"] = field.base
        if field.bucket_size:
            entry["bucket-size"] = field.bucket_size
        told.append(entry)
    return told
