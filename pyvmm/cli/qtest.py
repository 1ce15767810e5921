"""``pyvmm qtest``: a board without a vCPU, driven through QEMU's qtest protocol. Needs no /dev/kvm."""

from __future__ import annotations

import gc

from pyvmm.cli.options import Option, parse
from pyvmm.cli.run import OPTIONS as RUN_OPTIONS
from pyvmm.cli.run import announce, help_text, join_boot_words, join_drives
from pyvmm.cli.say import say
from pyvmm.config import MachineConfig, read_file
from pyvmm.control.qtest import QtestServer
from pyvmm.errors import ConfigError, StateError
from pyvmm.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.events import Event

# Of `pyvmm run`: what a board is made of; the rest is about guests and how they run.
BOARD = {
    *("machine", "drives", "cdrom", "firmware", "boot", "uuid", "memory_mib", "cpus", "fw_cfg", "snapshot"),
    *("serial", "consoles", "debugcon", "debug_exit", "testdev", "vga", "pvpanic"),
    *("nets", "vsock", "shares", "balloon", "rng", "virtio_ring", "qmp"),
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
reads and writes ports and memory, moves guest time and watches interrupts. A request that a drive's error has put aside
(werror=stop, rerror=stop) is tried again at SIGCONT."""


def qtest(args: list[str]) -> int:
    import signal

    given = parse(OPTIONS, args, verb="qtest", words="images")
    if "help" in given:
        print(help_text(given["help"], TITLE, OPTIONS), end="")
        return 0
    listen, connect, sockets = given.pop("socket", None), given.pop("connect", None), given.pop("qmp", ())
    if (listen is None) == (connect is None):
        raise ConfigError("one of --socket PATH (listen there) and --connect PATH is needed")
    with Machine(configure(given)) as machine:
        announce(machine)
        for path in sockets:
            machine.serve_qmp(path, at_once=True)
        gc.enable()
        server = QtestServer(machine)
        before = signal.signal(signal.SIGTERM, end)
        drives = RetryAtSigcont(machine)
        try:
            if connect is not None:
                server.connect(connect)
            else:
                server.listen(listen)
                say(f"pyvmm: qtest on {listen}")
                server.serve()
        finally:
            server.close()
            drives.close()
            signal.signal(signal.SIGTERM, before)
    return 0


class RetryAtSigcont:
    """Says when a drive's policy has put a request aside, and has it tried again at SIGCONT, as QMP's ``cont`` does."""

    def __init__(self, machine: Machine) -> None:
        import os
        import signal

        self._machine = machine
        # The handler interrupts the thread that drives the devices, which may hold their locks: the loop's thread acts.
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        machine.event_loop.add_reader(self._fd, self._retry)
        machine.events.listen(self._tell, "io-error")
        self._before = signal.signal(signal.SIGCONT, lambda _number, _frame: os.eventfd_write(self._fd, 1))

    def _tell(self, event: Event) -> None:
        import os

        if event.data["action"] == "stop":
            what = self._machine.io_error
            say(f"pyvmm: io-error: {what}; the request waits: `kill -CONT {os.getpid()}` tries it again")

    def _retry(self) -> None:
        import os

        try:
            os.eventfd_read(self._fd)
            self._machine.resume()
        except (BlockingIOError, StateError):
            pass  # nothing to read any more; or no request waits, and the signal meant nothing

    def close(self) -> None:
        import os
        import signal

        signal.signal(signal.SIGCONT, self._before)
        self._machine.events.forget(self._tell)
        self._machine.event_loop.remove_reader(self._fd)
        os.close(self._fd)


def end(number: int, _frame: object) -> None:
    """A polite kill: the socket's path is taken away."""
    raise SystemExit(128 + number)


def configure(given: dict[str, Any]) -> MachineConfig:
    join_drives(given)
    join_boot_words(given)
    if "fw_cfg" in given:
        given["fw_cfg"] = {name: read_file(path) for name, path in given["fw_cfg"]}
    return MachineConfig(accel="qtest", **given)
