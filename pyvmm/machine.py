"""Machine: one virtual machine, from its arguments to its end. What embedders use.

    with pyvmm.Machine(memory_mib=256, cpus=2, kernel="vmlinuz", initrd="initrd.gz", append="console=ttyS0") as m:
        status = m.run()

builder.py makes what is in it; RunControl (run_control.py) starts and parks its vCPUs.
"""

from __future__ import annotations

import sys
from posix import fspath, getpid

from pyvmm import builder
from pyvmm import run_control as states
from pyvmm.errors import ConfigError, StateError
from pyvmm.light import Lock, Thread
from pyvmm.options import is_int, near_match
from pyvmm.power import STATUS_READER_GONE
from pyvmm.run_control import ExitStatus, timeout_or_none
from pyvmm.run_state import RunState
from pyvmm.spec import specify
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike
    from typing import Any

    from typing_extensions import Unpack

    from pyvmm.address_space import AddressSpace
    from pyvmm.balloon import Balloon
    from pyvmm.block.backend import BlockBackend
    from pyvmm.boards.board import Board
    from pyvmm.boards.drive_places import PlacedDrive
    from pyvmm.chardev import Chardev
    from pyvmm.config import MachineConfig, MachineOptions
    from pyvmm.control.gdb.server import GdbServer
    from pyvmm.cpu import Cpu
    from pyvmm.device import Device
    from pyvmm.devices.irq_pins import ControllerPins
    from pyvmm.devices.vga_text import VgaText
    from pyvmm.event_loop import EventLoop
    from pyvmm.exit_stats import ExitStat
    from pyvmm.irq import IrqLine
    from pyvmm.irqchip import Irqchip
    from pyvmm.kvm.system import Kvm
    from pyvmm.kvm.vm import Vm
    from pyvmm.kvm_listener import KvmListener
    from pyvmm.machine_snapshot import Saved, Way
    from pyvmm.machine_state import MachineState
    from pyvmm.migration import Arrival, Departure, Migrated
    from pyvmm.reset_count import ResetCount
    from pyvmm.snapshot import Snapshot
    from pyvmm.spec import Spec
    from pyvmm.terminal import Terminal

STATUS_SHUTDOWN = states.STATUS_POWER_OFF
STATUS_RESET = states.STATUS_RESET
STATUS_IO_ERROR = states.STATUS_IO_ERROR
__all__ = ["STATUS_IO_ERROR", "STATUS_READER_GONE", "STATUS_RESET", "STATUS_SHUTDOWN", "Machine"]

CLIENTS_WAITING = 512  # a Unix socket refuses who comes beyond them
ReadOnly = type(type.__dict__)  # types.MappingProxyType, whose module nothing else needs


class Machine:
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

    _closed = True  # until there is something to close

    def __init__(
        self,
        config: MachineConfig | None = None,
        *,
        board: type[Board] | None = None,
        **options: Unpack[MachineOptions],
    ) -> None:
        self._make(specify(config, options), board)

    def _make(
        self,
        config: Spec,
        board: type[Board] | None,
        snapshot: Snapshot | None = None,
        *,
        fresh: bool = True,
        later: bool = False,
    ) -> None:
        self.config = config
        self._pid = getpid()
        self._closing = Lock()
        self._departure: Departure | None = None
        made = builder.build(config, board, self, snapshot, fresh=fresh, later=later)
        self._chassis, self.board, self._platform = made
        self._closed = False
        chassis = self._chassis
        self.pio: AddressSpace = chassis.pio
        self.mmio: AddressSpace = chassis.mmio
        self.memory = chassis.memory
        self.memory_map = self.board.memory_map
        self.clock = chassis.clock
        self.event_loop: EventLoop = chassis.loop
        self.control = chassis.control
        self.events = chassis.events
        self.drives = chassis.drives
        self.backends: Mapping[str, BlockBackend] = chassis.drives.backends
        self.consoles: Mapping[str, Chardev] = chassis.consoles.by_name
        self.cpus: list[Cpu] = self._platform.cpus
        self.irqchip: Irqchip = self._platform.irqchip

    # -- what it is made of --------------------------------------------------------------------------------

    @property
    def devices(self) -> Mapping[str, Device]:
        """The board's devices by name."""
        parts: Mapping[str, Device] = ReadOnly(dict(self.board.parts))
        return parts

    @property
    def kvm(self) -> Kvm:
        """/dev/kvm. StateError without one, as the next."""
        return self._platform.kvm

    @property
    def vm(self) -> Vm:
        return self._platform.vm

    @property
    def kvm_listener(self) -> KvmListener:
        """What tells KVM of all that is mapped; with the dirty log of memory."""
        return self._platform.listener

    @property
    def vga(self) -> VgaText | None:
        """With vga="text": ``lines()`` is what the guest has on its screen, ``cursor`` where that is."""
        return self.board.vga

    @property
    def terminal(self) -> Terminal | None:
        """Where a console is on "stdio": the owner of standard input and output."""
        return self._chassis.consoles.terminal

    @property
    def chardevs(self) -> list[Chardev]:
        """The consoles' host ends that the machine has made, and closes."""
        return self._chassis.consoles.made

    @property
    def resets(self) -> ResetCount:
        """How often the guest has reset itself, and why last."""
        return self._chassis.power.resets

    @property
    def io_error(self) -> str:
        """What failed when a drive's policy last stopped the machine."""
        return self.drives.io_error

    @property
    def irq_controllers(self) -> Mapping[str, ControllerPins]:
        """The pins of the interrupt controllers by name, where those are in Python: to watch and to drive them."""
        return self.irqchip.controllers

    # -- running -------------------------------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        """What the machine is doing: RunState tells what each value means."""
        return self.control.state

    @property
    def status(self) -> ExitStatus | None:
        """How the last run ended or was held up, whoever waits for it: what ``run`` returns, 4 or 8 where it raises.

        None before the first run and while the machine runs.
        """
        return self.control.status

    @property
    def error(self) -> BaseException | None:
        """What ``run`` raises: GuestError where the guest can't go on, DeviceError where a device raised."""
        return self.control.error

    def run(self, timeout_s: float | None = None) -> ExitStatus:
        """Run until the guest ends, and say how: an int, what ``pyvmm run`` would exit with, with its ``reason``.

        GuestError where the guest can't go on, DeviceError where a device raised; both carry the dump. TimeoutError
        after ``timeout_s`` seconds; the machine is paused then, and also when a signal's exception comes through.
        StateError where another thread closes it, and in a handler or a callback of this machine.
        """
        limit_s = timeout_or_none(timeout_s)
        self._not_from_inside("run")
        before = self.resets.count
        try:
            if not self.control.held:
                self.resume()
            finished = self.control.wait(limit_s)
            if finished and self.control.state is RunState.PRELAUNCH:
                self.resume()  # a debugger came before the guest's beginning, and went without one
                finished = self.control.wait(limit_s)
        except BaseException:
            self.control.pause()
            raise
        if not finished:
            self.control.pause()
            # It may have ended while it was being paused.
            if self.control.held or self.control.state in (RunState.PAUSED, RunState.RUNNING):
                often = self.resets.sentence(before)
                raise TimeoutError(f"the guest was still running after {timeout_s} s" + (often and f": {often}"))
        return self.control.outcome()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the machine stops running, whatever the reason: True; False after ``timeout_s`` seconds.

        ``status`` and ``error`` say how it ended. StateError in a handler or a callback of this machine.
        """
        limit_s = timeout_or_none(timeout_s)
        self._not_from_inside("wait")
        return self.control.wait(limit_s)

    def resume(self) -> None:
        """Start, or go on after a pause, and return at once. StateError where the guest has ended.

        After an io-error the requests that failed are tried again; that is all it does with accel="qtest".
        """
        self._usable("resume")
        if not self.cpus:
            self._retry_drives()
            return
        self._go_on(None)

    def _go_on(self, only: Sequence[Cpu] | None) -> None:
        """With these vCPUs, or all of them."""
        self.drives.claim()
        # Asked before the guest runs: what fails from then on stops the machine again, and is not tried at once.
        held_up = self.drives.held_up()
        for cpu in self.cpus:
            cpu.start()
        self._chassis.consoles.take_terminal()
        self.control.resume(only)
        self._chassis.runs()
        self._chassis.consoles.start()
        # After that: one that fails again stops the machine again.
        self.drives.resume(held_up)

    def _retry_drives(self) -> None:
        """resume() where nothing runs but the drives. StateError where none of them waits."""
        if not self.drives.stalled:
            raise StateError("accel='qtest' has no vCPU to run: drive the devices from outside")
        self.control.go_on_without_cpus()
        self.drives.resume(self.drives.held_up())

    def pause(self) -> None:
        """Park every vCPU, their accesses complete. Returns when they are.

        In a device's handler or a timer's callback it returns at once, and takes effect when that returns.
        """
        self._usable("pause")
        self.control.pause()

    def reset(self) -> None:
        """Power-on state, kernel loaded anew. A running machine goes on running, another is paused at the start."""
        self._usable("reset")
        self._chassis.power.reset_now()
        if self.control.state is RunState.INTERNAL_ERROR and self.control.error is not None:
            raise self.control.error

    def powerdown(self) -> None:
        """Press the ACPI power button: a guest that listens shuts itself down."""
        self._usable("powerdown")
        self.board.press_power_button()
        self.events.tell("powerdown")

    def wakeup(self) -> None:
        """Wake a guest that has suspended to RAM, as by its power button. StateError where it has not.

        From any thread; in a handler or a timer's callback it takes effect when that returns.
        """
        self._usable("wakeup")
        if not self.control.suspended:
            raise StateError(f"the guest is not suspended, the machine is in state {self.control.state}")
        self._chassis.power.wake_now()

    def nmi(self, cpu: int = 0) -> None:
        """Send a non-maskable interrupt to one vCPU; a machine that runs goes on, another has it when it does.

        The vCPUs are parked for it: KVM takes KVM_NMI between two stays in the guest, and a guest may never exit. In a
        handler or a timer's callback it takes effect when that returns.
        """
        self._usable("nmi")
        if not is_int(cpu) or not 0 <= cpu < len(self.cpus):
            raise ConfigError(f"nmi({cpu!r}): give the number of a vCPU, from 0; there are {len(self.cpus)}")
        self.control.request("nmi", self.cpus[cpu].vcpu.nmi, self.control.carry_on, wait=True)

    def block_resize(self, drive: str, size_bytes: int | None = None) -> int:
        """Tell the guest that the image of the drive called ``drive`` has become longer; with ``size_bytes`` make the
        disk so large first. Returns how many bytes the guest's disk has then.

        From any thread, while the guest runs. A disk on virtio only: IDE has no word for it. ConfigError for a drive
        that there is none of, that can't grow or would shrink. (QEMU's block_resize; OASIS virtio 1.2, 5.2.4.)
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
        if backend.grow(size_bytes):
            disk.grown()
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

    def stop(self, status: int = states.STATUS_STOPPED, reason: str = "stopped") -> None:
        """End the run with ``status``; callable from devices' handlers. What ``run`` returns.

        Once it has ended, further ends are not looked at; but an exception of the handler that asked still is.
        """
        if not is_int(status) or not isinstance(reason, str):
            raise ConfigError(f"stop({status!r}, {reason!r}): give a whole number and a word or two")
        self._same_process("stop")
        self._chassis.power.stop(status, reason)

    def dump(self) -> str:
        """Registers and code of every vCPU, taken while all of them stand; a machine that runs goes on afterwards.

        StateError in a device's handler or a callback, and where the machine is closed.
        """
        self._usable("dump")
        self._not_from_inside("dump")
        texts: list[str] = []
        self._chassis.outcomes.dump(texts.append, wait=True)
        return "".join(texts)

    def dump_later(self, hear: Callable[[str], object]) -> None:
        """As ``dump``, from anywhere: ``hear`` gets the text, on another thread, as soon as every vCPU stands."""
        self._usable("dump_later")
        self._chassis.outcomes.dump(hear)

    def save_state(self, *, memory: bool = True) -> dict[str, Any]:
        """Everything that the guest is in the middle of, as plain data (bytes, numbers, strings, lists, dicts).

        ``load_state`` of another machine, made from the same configuration with the same images, goes on from there;
        this one may be closed, or go on too. ``memory``: with the guest's RAM; without, the caller brings it there. A
        device of your own is in it if it is the board's (``m.board.add(name, device)``); drives' contents are not.

        The machine is paused: StateError while it runs and when it has ended, and for what can't be saved: guests of
        the guest's own, and writes to a drive with snapshot=on.
        """
        return self._all_state("save_state").save(memory=memory)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``save_state`` gave: paused, ``resume`` or ``run`` next. For a machine that has not run yet.

        Guest time goes on from where it stood, as after a pause. StateError, in one sentence, for a state of another
        configuration or version and for a field that can't be; the state may come from anywhere. Where a part of it had
        been loaded by then the machine has ended: reset() it, or make another one.
        """
        self._all_state("load_state").load(state)

    def save(self, path: str | PathLike[str], *, base: Snapshot | None = None) -> Saved:
        """Write a snapshot to the file ``path``: all that ``save_state`` gives, with memory, and what the machine is
        made of. ``Machine.restore`` goes on from there, any number of times. Of a machine that runs most of its memory
        is written while it does (Linux 6.7 or newer, no balloon, no ``base``); it stands for the rest and then goes on.
        ``Saved`` tells for how long it stood.

        With ``base``, an open Snapshot of the same guest, only what differs from that is written, and the base is
        needed to go on. Nothing is at ``path`` until all of it is on the disk; a snapshot that was there stays whole
        until then. What the guest wrote to its drives is on the disk too, but not in the snapshot.

        StateError for what can't be saved, as from ``save_state``; ConfigError and HostError for a path and a host that
        can't take it.
        """
        from pyvmm.machine_snapshot import save

        state = self._all_state("save")
        with self._chassis.saving:
            return save(state, self.config, self._chassis.origin, fspath(path), base)

    @classmethod
    def restore(
        cls,
        path: str | PathLike[str] | Snapshot,
        *,
        board: type[Board] | None = None,
        prepare: Callable[[Machine], object] | None = None,
        twin: bool = True,
        check: bool = False,
        eager: bool = False,
        prefetch: bool = False,
        clock: str = "saved",
        **options: Unpack[MachineOptions],
    ) -> Machine:
        """The machine of a snapshot, paused where it stood; ``resume`` or ``run`` next.

        Its memory is the file, mapped: pages are read when the guest touches them, and what it writes stays in this
        process. So the time this takes does not depend on how much there is, and machines of one snapshot share it; the
        file must not change as long as one of them lives. ``options`` take the place of those that were saved: consoles
        that were objects have to be given again, drives should be (``drives=``), since the images must be as they were.
        ``prepare`` gets the machine before its state: to add devices of your own that the first one had. The guest is
        told that it is a ``twin`` (devices/vmgenid.py), unless it is to go on as the very machine that was saved.
        A snapshot names the files and consoles that it opens, as a configuration does: look at one that a stranger has
        made (``Snapshot.spec``), or give all of them.

        ``check``: memory is compared with its checksums first, which reads all of it. ``eager``: it is read into memory
        of the machine's own, and the file is not needed afterwards. ``prefetch``: what the saved machine had in use is
        read, beside the guest. Guest time goes on from where it stood, or with ``clock="now"`` from where it would be
        had the machine run on: by the host's wall clock, for all clocks of the guest.

        ConfigError, StateError and KvmError in one sentence, and then nothing has been started.
        """
        from pyvmm.machine_snapshot import Way, restored_spec
        from pyvmm.snapshot import Snapshot

        way = Way(board, prepare, twin=twin, eager=eager, prefetch=prefetch, clock=clock)
        with path.hold() if isinstance(path, Snapshot) else Snapshot(fspath(path)) as origin:
            if check:
                origin.check()
            config = restored_spec(origin, options, copied=eager)
            return cls.of_snapshot(origin, config, way)

    @classmethod
    def of_snapshot(cls, origin: Snapshot, config: Spec, way: Way) -> Machine:
        """``restore`` with a Spec that is made of the snapshot's already (machine_snapshot.restored_spec)."""
        self = cls.__new__(cls)
        self._make(config, way.board, None if way.eager else origin, fresh=False)
        try:
            if way.prepare is not None:
                way.prepare(self)
            state = self._all_state("restore")
            origin.fill(state.memory())
            state.load(origin.state, way.passed_ns(origin))
            if way.twin:
                self.board.new_generation()
            if way.prefetch:
                control, regions = self.control, state.memory()
                work = origin.read_ahead_beside(regions, lambda: control.state is not RunState.CLOSED)
                self._chassis.in_background(work)
        except BaseException:
            self.close()
            raise
        return self

    def fork(
        self,
        count: int = 1,
        *,
        each: Callable[[int], MachineOptions] | None = None,
        prepare: Callable[[Machine], object] | None = None,
        **options: Unpack[MachineOptions],
    ) -> list[Machine]:
        """``count`` machines that go on from where this one is, paused; it goes on itself, if it ran.

        It stands for as long as its memory is copied once; from then on all of them have each page once, until one of
        them writes it. They have no console but those given, and nobody at the host's end of their vsock device; they
        may not write to the image of a drive that this one writes to: give ``vsock`` and ``drives``. ``options`` are
        for all, ``each(n)`` gives further ones for one of them; ``prepare`` as with ``restore``. Errors as from
        ``save`` and ``restore``; then there is none of them.
        """
        from pyvmm.machine_snapshot import CollectorWaits, Way, freeze, restored_spec, unshared
        from pyvmm.origin import Origin

        if not is_int(count) or count < 1:
            raise ConfigError(f"fork({count!r}): give how many machines, 1 or more")
        state = self._all_state("fork")
        made: list[Machine] = []
        if self._chassis.origin is None:
            self._chassis.origin = self._chassis.closers.add(Origin(None))
        with self._chassis.saving:
            frozen = freeze(state, self.config, self._chassis.origin)
        with frozen, CollectorWaits():
            try:
                config = None
                for n in range(count):
                    if config is None or each is not None:
                        own: MachineOptions = {**options, **(each(n) if each else {})}
                        config = restored_spec(frozen, {**unshared(self.config, own), **own})
                    made.append(Machine.of_snapshot(frozen, config, Way(type(self.board), prepare)))
            except BaseException:
                for machine in made:
                    machine.close()
                raise
        return made

    def migrate_to(self, address: str) -> Migrated:
        """Have the guest go on in another process, which waits for it at ``address``: the path of a Unix socket, or
        tcp:HOST:PORT, where ``Machine.incoming`` or ``pyvmm run --incoming`` listens.

        Most of its memory goes over while it runs; it stands for the rest, and ``Migrated`` tells for how long. This
        machine has ended then, with status 0 and the reason "migrated". Whatever is raised, it goes on here as before,
        also after ``cancel_migration`` from another thread. The one exception: where the connection breaks after the
        other side was told to go on, and before it says that it does, this machine is paused, and HostError says so.

        Its drives' images have to be at the same paths there. StateError for what can't be saved, and where the other
        side refuses: its processors lack a feature, its version is another one.
        """
        from pyvmm.migration import Departure

        state = self._all_state("migrate_to")
        with self._chassis.saving:
            self._departure = Departure(state, self.config, self._chassis.origin)
            try:
                return self._departure.go(address)
            finally:
                self._departure = None

    def cancel_migration(self) -> None:
        """The guest stays here: ``migrate_to`` raises, unless it has gone by then. StateError where none is on its way.
        """
        departure = self._departure
        if departure is None:
            raise StateError("cancel_migration(): no migration is under way")
        departure.cancel()

    @classmethod
    def incoming(
        cls,
        address: str,
        *,
        timeout_s: float | None = None,
        board: type[Board] | None = None,
        prepare: Callable[[Machine], object] | None = None,
        ready: Callable[[str], object] | None = None,
        **options: Unpack[MachineOptions],
    ) -> Machine:
        """The machine that ``migrate_to`` sends to ``address``, paused where it stood: ``run`` or ``resume`` at once.

        ``options``, ``board`` and ``prepare`` as with ``restore``. ``ready`` gets the address when somebody can come
        (tcp:HOST:0 is a port that is free). Whoever can connect says what the machine is made of, and so which files
        and consoles it opens here: a Unix socket is for this user alone, and a TCP port for whom you let in.

        TimeoutError where nobody has come within ``timeout_s`` seconds. ConfigError, StateError, HostError and KvmError
        in one sentence; then the guest goes on where it was, and nothing has been started here.
        """
        from pyvmm.migration import Arrival, Listener
        from pyvmm.migration_stream import MigrationStream

        limit_s = timeout_or_none(timeout_s)
        with Listener(address) as listener:
            if ready is not None:
                ready(listener.address)
            connection = listener.accept(limit_s)
        with MigrationStream(connection) as stream, stream.told_why():
            arrival = Arrival(stream, address)
            return cls.of_arrival(arrival, board, prepare, options)

    @classmethod
    def of_arrival(
        cls,
        arrival: Arrival,
        board: type[Board] | None,
        prepare: Callable[[Machine], object] | None,
        options: Mapping[str, Any],
    ) -> Machine:
        """``incoming``, of what has come already."""
        from pyvmm.machine_snapshot import restored_spec

        config = restored_spec(arrival, options)
        self = cls.__new__(cls)
        self._make(config, board, fresh=False, later=True)
        try:
            if prepare is not None:
                prepare(self)
            state = self._all_state("incoming")
            state.check_description(arrival.machine)
            state.load(arrival.receive(state.memory()))
            arrival.take_over(self.drives.claim)
        except BaseException:
            self.close()
            raise
        return self

    def _all_state(self, call: str) -> MachineState:
        from pyvmm.machine_state import MachineState

        self._usable(call)
        self._not_from_inside(call)
        return MachineState(self._chassis, self.board, self._platform)

    def _same_process(self, call: str) -> None:
        if getpid() != self._pid:
            raise StateError(f"{call}() in a child of fork: the VM is its parent's, close() is all that is left here")

    def _usable(self, call: str) -> None:
        self._same_process(call)
        if self.control.state is RunState.CLOSED:
            raise StateError(f"{call}(): the machine is closed: make another one")

    def _not_from_inside(self, call: str) -> None:
        self._same_process(call)
        if self._chassis.on_own_thread():
            raise StateError(f"{call}() {states.FROM_INSIDE}")

    def drain(self) -> None:
        """Return when no drive has a request under way. The caller holds no device's lock."""
        self._same_process("drain")
        self.drives.drain()

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

    # -- the end -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End everything and give it back: threads, descriptors, memory. Idempotent; a second caller waits for it.

        StateError in a handler or a callback of this machine. In a child of ``os.fork`` it closes the child's
        descriptors and mappings and does nothing else.
        """
        if self._closed:
            return
        if getpid() != self._pid:
            self._closed = True
            self.control.abandon()
            self._chassis.closers.abandon()
            return
        self._not_from_inside("close")
        with self._closing:
            if self._closed:
                return
            # Where this is interrupted the threads may still run: nothing they use has been closed, and close() can be
            # called again.
            self.control.close()
            try:
                self._chassis.closers.close()
            except Exception:
                self._closed = True  # all was given back all the same
                raise
            self._closed = True

    def __del__(self) -> None:
        # As the interpreter ends, its daemon threads stand still for good: nobody may wait for them.
        if self._closed or sys.is_finalizing():
            return
        if getpid() != self._pid:
            self.close()
            return
        import warnings

        try:
            warnings.warn(f"{self!r} was dropped without close()", ResourceWarning, source=self, stacklevel=2)
        finally:
            if self._chassis.on_own_thread():
                # The collector came by on one of its threads, which can't wait for itself.
                Thread(self.close).start()
            else:
                self.close()

    def __reduce__(self) -> str:
        raise StateError("a machine can't be copied or sent: it is descriptors, threads and memory of this process")

    def __repr__(self) -> str:
        if self._closed:
            return "<Machine closed>"
        return f"<Machine {self.config.machine}, {len(self.cpus)} vCPUs, {self.control.state}>"

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def names_within(space: AddressSpace, address: int, size: int) -> str | None:
    """Of the regions that have a part of the range; None where there are none."""
    bases = [(region.base, region) for region in space.regions]
    found = [r.name for base, r in bases if base is not None and base < address + size and address < base + r.size]
    return ", ".join(found) or None
