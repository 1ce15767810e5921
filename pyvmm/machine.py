"""Machine: one virtual machine, from its arguments to its end. What embedders use.

    with pyvmm.Machine(memory_mib=256, cpus=2, kernel="vmlinuz", initrd="initrd.gz", append="console=ttyS0") as m:
        status = m.run()

builder.py makes what is in it; RunControl (run_control.py) starts and parks its vCPUs. The class is written in five
files, each upon the one before: machine_base.py, what it is made of and its end; machine_running.py; machine_saving.py,
state, snapshots and forks; machine_moving.py, migration; and here its devices, wires and counters, and who is let in.
"""

from __future__ import annotations

from posix import fspath

from pyvmm import run_control as states
from pyvmm.errors import ConfigError, StateError
from pyvmm.machine_moving import MovingMachine
from pyvmm.options import is_int, near_match
from pyvmm.power import STATUS_READER_GONE
from pyvmm.run_control import timeout_or_none
from pyvmm.spec import specify
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from typing_extensions import Unpack

    from pyvmm.address_space import AddressSpace
    from pyvmm.balloon import Balloon
    from pyvmm.boards.board import Board
    from pyvmm.boards.drive_places import PlacedDrive
    from pyvmm.config import MachineConfig, MachineOptions
    from pyvmm.control.gdb.server import GdbServer
    from pyvmm.exit_stats import ExitStat
    from pyvmm.irq import IrqLine
    from pyvmm.tracing import Tracing


STATUS_SHUTDOWN = states.STATUS_POWER_OFF
STATUS_RESET = states.STATUS_RESET
STATUS_IO_ERROR = states.STATUS_IO_ERROR
__all__ = ["STATUS_IO_ERROR", "STATUS_READER_GONE", "STATUS_RESET", "STATUS_SHUTDOWN", "Machine"]

CLIENTS_WAITING = 512  # a Unix socket refuses who comes beyond them


class Machine(MovingMachine):
    """A machine, built and paused at its first instruction. The arguments are MachineConfig's.

    ``pio`` and ``mmio`` are its address spaces (``m.pio.map(0x510, 2, device)``), ``memory`` its RAM, ``cpus`` its
    vCPUs, ``irqchip`` its interrupt controllers, ``devices`` the board's devices by name, ``backends`` its drives by
    name, ``clock`` guest time. ``consoles`` are the host's ends of "serial", "debugcon", "hvc0", ...:
    ``m.consoles["serial"].feed(b"root\\n")`` types. ``events`` tells what happens to it. ``board``, a kind of Board,
    takes the place of the one that the option ``machine`` names. Raises ConfigError for what is asked wrongly and
    KvmError for what the host refuses.

    Close it, best by ``with``. One that is dropped without is freed when nothing refers to it and its guest does not
    run, with a ResourceWarning. In a child of ``os.fork`` close() gives back the child's descriptors and mappings, and
    everything else is a StateError: the VM is its parent's.
    """

    _tracing: Tracing | None = None  # from the first trace on

    def __init__(
        self,
        config: MachineConfig | None = None,
        *,
        board: type[Board] | None = None,
        **options: Unpack[MachineOptions],
    ) -> None:
        self._make(specify(config, options), board)

    # -- devices -------------------------------------------------------------------------------------------

    def block_resize(self, drive: str, size_bytes: int | None = None) -> int:
        """Tell the guest that the image of the drive called ``drive`` has become longer; with ``size_bytes`` make the
        disk so large, or so small, first. Returns how many bytes the guest's disk has then.

        From any thread, while the guest runs. What lies behind the end of a smaller disk is lost: have the guest give
        it up before. A disk on virtio only: IDE has no word for it. ConfigError for a drive that there is none of, or
        that has its size for good: with size=, snapshot=on or read-only=on, on NBD, and to become smaller on a block
        device. StateError once the machine has moved away. (QEMU's block_resize; OASIS virtio 1.2, 5.2.4.)
        """
        self._usable("block_resize")
        backend = self.backends.get(drive)
        if backend is None:
            raise ConfigError(f"block_resize({drive!r}): there is no such drive{near_match(drive, self.backends)}")
        disk = self.board.disks.get(drive)
        if disk is None:
            raise ConfigError(f"block_resize({drive!r}): a guest does not hear of it on IDE: give the drive if=virtio")
        if size_bytes is not None and not is_int(size_bytes):
            raise ConfigError(f"block_resize({drive!r}, {size_bytes!r}): give a number of bytes")
        if self.drives.resize(backend, size_bytes):
            disk.resized()
        return backend.size_bytes

    def set_balloon(self, mib: int) -> None:
        """Ask the guest to give ``mib`` MiB of its memory to its balloon, or to take back what is above that.

        It does so at its own pace, or not at all: event "balloon" has what it has given. From any thread. ConfigError
        for what it can't be asked, StateError on a machine without a balloon (``balloon=0``).
        """
        self._usable("set_balloon")
        self._balloon("set_balloon").set(mib)

    def balloon_stats(self, timeout_s: float = 5.0) -> dict[str, int]:
        """What the guest says of its memory, asked for now: "total_bytes", "free_bytes", "available_bytes" and others,
        as far as it knows them; "target_bytes" and "actual_bytes" of its balloon.

        TimeoutError where it does not say so within that time, as one that is paused or has no driver. StateError
        without a balloon, and in a handler or a callback of this machine.
        """
        self._usable("balloon_stats")
        self._not_from_inside("balloon_stats")
        limit_s = timeout_or_none(timeout_s)
        if limit_s is None:
            raise ConfigError("balloon_stats(None): give a number of seconds, a guest may never answer")
        return self._balloon("balloon_stats").stats(limit_s)

    def announce_self(
        self,
        initial_ms: int = 50,
        max_ms: int = 550,
        rounds: int = 5,
        step_ms: int = 100,
        *,
        interfaces: Sequence[str] | None = None,
        id: str = "",
    ) -> None:
        """Have the network cards, or those named, tell the network where they are, as after ``incoming``, or a
        ``restore`` that makes no twin: a guest that can (VIRTIO_NET_F_GUEST_ANNOUNCE) is asked to, for another one a
        RARP frame says it.

        The first of ``rounds`` is now, or when the machine goes on; the next ``initial_ms`` later, and then it takes
        ``step_ms`` longer each time, up to ``max_ms``. They take the place of those of the same ``id`` that are under
        way; ``rounds=0`` ends those. From any thread. ConfigError for a card that there is none of. (QEMU's
        announce-self.)
        """
        self._usable("announce_self")
        if self.board.announcer is not None:
            self.board.announcer.announce(initial_ms, max_ms, rounds, step_ms, interfaces=interfaces, id=id)
        elif interfaces:
            raise ConfigError(f"announce_self(interfaces={list(interfaces)}): the machine has no network card")

    def change_medium(
        self, drive: str, file: str | PathLike[str] | None, *, format: str | None = None, force: bool = False
    ) -> bool:
        """Put the image ``file`` into the CD drive of that name, in place of what is there; None: take that out, and
        leave the tray open. False where the guest holds it: it has been asked to let go; ``force`` does not ask.

        The guest is told; event "tray". ConfigError for an image that can't be had, as from Machine, and for a drive
        that there is none of, or that has no medium to change.
        """
        self._usable("change_medium")
        self._not_from_inside("change_medium")
        placed = self._drive("change_medium", drive)
        wanted = placed.changed(file=file, format=format)
        if not self.board.change_medium(wanted, force=force):
            return False
        self._drive_changed(wanted)
        return True

    def set_limits(self, drive: str, **limits: int) -> None:
        """Other limits of rate for a drive: throttle_bps and the others of DriveOptions; what is not given is no limit.
        It stands for that for a moment. ConfigError for what can't be.
        """
        self._usable("set_limits")
        self._not_from_inside("set_limits")
        wanted = self._drive("set_limits", drive).with_limits(limits)
        backend = self.backends[wanted.id]
        self.control.request(
            "limits", lambda: backend.set_limits(wanted, self.clock), self.control.carry_on, wait=True
        )
        self._drive_changed(wanted)

    def _drive(self, call: str, name: str) -> PlacedDrive:
        for drive in self.config.drives:
            if drive.id == name:
                return drive
        names = ", ".join(drive.id for drive in self.config.drives) or "none"
        raise ConfigError(f"{call}({name!r}): there is no drive of that name, there are: {names}")

    def _drive_changed(self, wanted: PlacedDrive) -> None:
        """A snapshot says what the machine is made of now."""
        drives = [wanted if drive.id == wanted.id else drive for drive in self.config.drives]
        self.config = self.config.changed(drives=drives)

    def _balloon(self, call: str) -> Balloon:
        if self.board.balloon is None:
            raise StateError(f"{call}(): the machine has no balloon, give it balloon=0")
        return self.board.balloon

    # -- wires and counters --------------------------------------------------------------------------------

    def irq_line(self, gsi: int) -> IrqLine:
        """A line to global system interrupt ``gsi`` (ISA interrupts have the same numbers), for a device of your own.

        Lines to one are ORed. ConfigError where there is no such interrupt: they go from 0 to 23, the IOAPIC's pins.
        ``irqchip`` has the other ways to interrupt: MSIs, and eventfds.
        """
        self._usable("irq_line")
        return self.irqchip.line(gsi)

    def coalesce(self, space: AddressSpace, address: int, size: int) -> None:
        """Let KVM gather writes to this range (KVM_REGISTER_COALESCED_MMIO): they arrive in order at the next exit."""
        self._usable("coalesce")
        self._platform.coalesce(space, address, size)

    def exit_stats(self) -> list[ExitStat]:
        """Per exit reason, port or page, and direction: count and user-space time, all vCPUs together."""
        from pyvmm.exit_stats import merge

        self._same_process("exit_stats")
        rows = merge([cpu.exec.stats.rows(self._platform.tsc_khz) for cpu in self.cpus])
        for row in rows:
            if row.address is not None:
                space, size = (self.pio, 1) if row.reason == "IO" else (self.mmio, layout.PAGE_BYTES)
                row.region = names_within(space, row.address, size)
        return rows

    @property
    def first_exit_ns(self) -> int | None:
        """How long the first vCPU's first stay in the guest was, nanoseconds: from its first KVM_RUN to its first exit.

        Of a guest that begins with an exit this is what KVM takes to begin with. None before that.
        """
        return self.cpus[0].exec.stats.first_exit_ns(self._platform.tsc_khz) if self.cpus else None

    def exit_stats_table(self) -> str:
        """exit_stats() as text, with the regions' names; when the first exit came; and how often the guest has reset
        itself, if it has.
        """
        from pyvmm.exit_stats import format_table

        rows = self.exit_stats()
        names = {(row.reason, row.address): row.region or "" for row in rows}
        names |= {key: "(nobody)" for key, name in names.items() if key[1] is not None and not name}
        first_ns, often = self.first_exit_ns, self.resets.sentence()
        first = "" if first_ns is None else f"\nthe first one {first_ns / 1e6:.2f} ms after the first KVM_RUN"
        return format_table(rows, names) + first + (often and f"\n{often}")

    # -- tracing -------------------------------------------------------------------------------------------

    def start_trace(self, path: str | PathLike[str]) -> None:
        """Write what the machine does into the file ``path``, from now until ``stop_trace`` or its end: exits, requests
        on their way, interrupts. ``pyvmm trace FILE`` reads it (docs/trace.md). From any thread, while the guest runs.

        ConfigError for a file that can't be written, StateError where a trace is on.
        """
        self._usable("start_trace")
        with self._adding:
            if self._tracing is None:
                from pyvmm.tracing import Tracing

                self._tracing = self._chassis.closers.add(Tracing(self._chassis, self.board, self._platform))
        self._usable("start_trace")  # or close() may have been through what there was to close
        self._tracing.start(fspath(path))

    def stop_trace(self) -> int:
        """End the trace; its file is whole then. How many records are missing in it, because they came faster than they
        could be written. StateError where none is on, HostError where the file took no more before.
        """
        self._same_process("stop_trace")
        if self._tracing is None:
            raise StateError("no trace is being written")
        return self._tracing.stop()

    # -- who is let in -------------------------------------------------------------------------------------

    def serve_qmp(self, path: str | PathLike[str], *, at_once: bool = True) -> None:
        """Let clients drive and watch the machine by QMP, as they do QEMU: at the Unix socket ``path``, which only this
        user may connect to, until the machine is closed. Any number of times, with other paths.

        ``at_once=False``: clients can connect, and are heard as soon as the guest is on its way. ConfigError for a path
        where there can't be a socket, or is one that is served.
        """
        from pyvmm.unix_socket import UnixListener

        self._usable("serve_qmp")
        listener = self._chassis.closers.add(UnixListener(fspath(path), CLIENTS_WAITING, what="qmp", mode=0o600))

        def serve() -> None:
            from pyvmm.control.qmp.server import QmpServer

            self._chassis.closers.add(QmpServer(self)).add(listener)

        if at_once:
            serve()
        else:
            self._chassis.when_it_runs(serve)

    def serve_metrics(self, where: str | int, *, at_once: bool = True) -> str | int:
        """Let Prometheus read what the machine counts, at http://.../metrics: ``where`` is a port of the loopback (0:
        any), "ADDRESS:PORT", or "unix:PATH", which only this user may connect to; until the machine is closed. Returns
        the port or the path.

        ``at_once=False``: clients can connect, and are heard as soon as the guest is on its way. ConfigError for a
        place where that can't be, and without prometheus-client (extra ``metrics``).
        """
        from pyvmm.control.metrics import check_installed, listener_at

        self._usable("serve_metrics")
        check_installed()
        listener = self._chassis.closers.add(listener_at(where))

        def serve() -> None:
            from pyvmm.control.metrics import MetricsServer

            self._chassis.closers.add(MetricsServer(self, listener))

        if at_once:
            serve()
        else:
            self._chassis.when_it_runs(serve)
        return listener.place

    def register(self) -> None:
        """Let this user's `pyvmm list`, ``attach``, ``qmp``, ``save`` and ``top`` find the machine by its ``name``, as
        soon as the guest is on its way and until the machine is closed. `pyvmm run` does it where there is a name.

        Sockets for that are in a folder that only this user may enter, ``pyvmm`` in XDG_RUNTIME_DIR. ConfigError for a
        machine without a name, where another one that is running has it, and where there can't be such a folder.
        """
        from pyvmm.control.registry import Registry

        self._usable("register")
        if self.config.name is None:
            raise ConfigError("register(): the machine has no name, give it one by name=")
        qmp, consoles = (self._chassis.closers.add(each) for each in Registry().register(self.config.name))

        def serve() -> None:
            from pyvmm.control.console import ConsoleServer
            from pyvmm.control.qmp.server import QmpServer

            self._chassis.closers.add(QmpServer(self)).add(qmp)
            self._chassis.closers.add(ConsoleServer(self.consoles, consoles))

        self._chassis.when_it_runs(serve)

    def serve_gdb(self, where: str | PathLike[str] | int, *, wait: bool = False) -> GdbServer:
        """Let gdb connect: ``target remote PATH``, or ``target remote :PORT``. ``where`` is the path of a Unix socket,
        or a port of the loopback (0: any; the result's ``where`` tells which). One debugger at a time.

        One that comes stops the machine and has it until it lets go (detach, kill): ``run`` and ``wait`` go on waiting
        meanwhile, whatever stops there are. ``wait``: the guest does not begin before a debugger says so. It ends with
        the machine, or by its ``close``. ConfigError where nobody can connect there, and where gdb is served already;
        StateError without vCPUs.
        """
        from pyvmm.control.gdb.server import serve

        self._usable("serve_gdb")
        if not self.cpus:
            raise StateError("accel='qtest' has no vCPU to debug: make the machine with accel='kvm'")
        return serve(where, self._chassis, self._platform, self.memory_map, self._go_on, wait=wait)


def names_within(space: AddressSpace, address: int, size: int) -> str | None:
    """Of the regions that have a part of the range; None where there are none."""
    bases = [(region.base, region) for region in space.regions]
    found = [r.name for base, r in bases if base is not None and base < address + size and address < base + r.size]
    return ", ".join(found) or None
