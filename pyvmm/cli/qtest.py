"""``pyvmm qtest``: a board without a vCPU, driven through QEMU's qtest protocol. Needs no /dev/kvm."""

from __future__ import annotations

import gc

from pyvmm.cli import say
from pyvmm.cli.options import Option, parse, usage
from pyvmm.cli.run import OPTIONS as RUN_OPTIONS
from pyvmm.cli.run import announce, images, join_boot_words, read_file
from pyvmm.config import MachineConfig
from pyvmm.control.qtest import QtestServer
from pyvmm.errors import ConfigError
from pyvmm.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Of `pyvmm run`: what a board is made of; the rest is about guests and how they run.
BOARD = {
    *("machine", "drives", "cdrom", "firmware", "boot", "uuid", "memory_mib", "cpus", "fw_cfg"),
    *("serial", "debugcon", "debug_exit", "testdev"),
}

OPTIONS = (
    Option("--socket", "PATH", "listen there, and serve one client after the other"),
    Option("--connect", "PATH", "connect there, as QEMU's -qtest unix:PATH does, and end when it hangs up"),
    *(option for option in RUN_OPTIONS if option.key in BOARD),
    Option("--help -h", "", "this"),
)

TITLE = """\
usage: pyvmm qtest --socket PATH [OPTIONS] [DISK.IMG ...]

Makes a board with no vCPU running and serves the qtest line protocol (QEMU docs/devel/testing/qtest.rst): a client
reads and writes ports and memory, moves guest time and watches interrupts."""


def qtest(args: list[str]) -> int:
    import signal

    given = parse(OPTIONS, args, words="images")
    if given.pop("help", False):
        print(usage(TITLE, OPTIONS), end="")
        return 0
    listen, connect = given.pop("socket", None), given.pop("connect", None)
    if (listen is None) == (connect is None):
        raise ConfigError("one of --socket PATH (listen there) and --connect PATH is needed")
    with Machine(configure(given)) as machine:
        announce(machine)
        gc.enable()
        server = QtestServer(machine)
        before = signal.signal(signal.SIGTERM, end)
        try:
            if connect is not None:
                server.connect(connect)
            else:
                server.listen(listen)
                say(f"pyvmm: qtest on {listen}")
                server.serve()
        finally:
            server.close()
            signal.signal(signal.SIGTERM, before)
    return 0


def end(number: int, _frame: object) -> None:
    """A polite kill: the socket's path is taken away."""
    raise SystemExit(128 + number)


def configure(given: dict[str, Any]) -> MachineConfig:
    given["drives"] = [*given.get("drives", ()), *images(given.pop("images", ()), given.pop("cdrom", None))]
    join_boot_words(given)
    if "fw_cfg" in given:
        given["fw_cfg"] = {name: read_file(path) for name, path in given["fw_cfg"]}
    return MachineConfig(accel="qtest", **given)
