"""What `pyvmm top` looks at beside query-stats and query-blockstats: exits by port and page, threads, frames. Ours:
QEMU has no such commands. All are counters that are kept anyway, read when somebody asks.
"""

from __future__ import annotations

from pyvmm.control.qmp.kinds import INT, SIZE, STR, ListOf, Optional, Struct
from pyvmm.control.qmp.net import card_named
from pyvmm.control.qmp.table import command
from pyvmm.control.usage import threads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.control.qmp.subject import Served

EXIT = Struct({
    "reason": STR, "address": Optional(SIZE), "region": Optional(STR), "direction": STR, "count": SIZE,
    "time-ns": SIZE,
})  # fmt: skip
THREAD = Struct({
    "name": STR, "thread-id": INT, "vcpu": Optional(INT), "guest-ns": SIZE, "user-ns": SIZE, "system-ns": SIZE,
    "wait-ns": SIZE,
})  # fmt: skip
NET = Struct({
    "name": STR, "rx-packets": SIZE, "rx-bytes": SIZE, "rx-dropped": SIZE, "tx-packets": SIZE, "tx-bytes": SIZE,
    "tx-dropped": SIZE,
})  # fmt: skip


@command("query-exits", returns=ListOf(EXIT))
def query_exits(served: Served) -> list[dict[str, Any]]:
    """As Machine.exit_stats: by reason, port or page, and direction; the time is the one in user space."""
    return [
        {
            "reason": row.reason,
            **({} if row.address is None else {"address": row.address}),
            **({} if row.region is None else {"region": row.region}),
            "direction": row.direction,
            "count": row.count,
            "time-ns": row.sum_ns,
        }
        for row in served.machine.exit_stats()
    ]


@command("query-threads", returns=ListOf(THREAD))
def query_threads(served: Served) -> list[dict[str, Any]]:
    """Of the whole process, in which there may be other machines; ``vcpu`` is this one's."""
    vcpus = {cpu.thread_id: cpu.index for cpu in served.machine.cpus}
    return [
        {
            "name": use.name,
            "thread-id": use.thread_id,
            **({"vcpu": vcpus[use.thread_id]} if use.thread_id in vcpus else {}),
            "guest-ns": use.guest_ns,
            "user-ns": use.user_ns,
            "system-ns": use.system_ns,
            "wait-ns": use.wait_ns,
        }
        for use in threads()
    ]


@command("query-netstats", returns=ListOf(NET))
def query_netstats(served: Served) -> list[dict[str, Any]]:
    """As the guest has them: what it receives is rx."""
    return [
        {"name": name, **{key.replace("_", "-"): value for key, value in card_named(served, name).counters().items()}}
        for name in (str(net.id) for net in served.machine.config.nets)
    ]
