"""Machine: one virtual machine, from its arguments to its end. What embedders use.

    with pyvmm.Machine(memory_mib=256, cpus=2, kernel="vmlinuz", initrd="initrd.gz", append="console=ttyS0") as m:
        status = m.run()

builder.py makes what is in it; RunControl (run_control.py) starts and parks its vCPUs.
"""

from __future__ import annotations

import sys
from os import getpid

from pyvmm import builder
from pyvmm import run_control as states
from pyvmm.address_space import AddressSpace
from pyvmm.config import MachineConfig, is_int, machine_config
from pyvmm.cpu_exec import StopReason
from pyvmm.device import DeviceLock
from pyvmm.errors import ConfigError, DeviceError, GuestError, HostError, StateError, describe, traceback_text, whose
from pyvmm.event_loop import EventLoop
from pyvmm.light import Lock, Thread
from pyvmm.reset_count import ResetCount
from pyvmm.run_control import ExitStatus, RunControl, timeout_or_none
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Unpack

    from pyvmm.block.backend import BlockBackend
    from pyvmm.chardev import Chardev
    from pyvmm.clock import Clock
    from pyvmm.config import MachineOptions
    from pyvmm.cpu import Cpu
    from pyvmm.device import Device, IrqLine, IrqWire
    from pyvmm.devices.irq_pins import ControllerPins
    from pyvmm.devices.user_irqchip import UserIrqchip
    from pyvmm.devices.vga_text import VgaText
    from pyvmm.exit_stats import ExitStat
    from pyvmm.guest_memory import GuestMemory
    from pyvmm.kvm.system import Kvm
    from pyvmm.kvm.vm import Vm
    from pyvmm.kvm_clock import KvmClock
    from pyvmm.memory_map import MemoryMap
    from pyvmm.run_state import RunState
    from pyvmm.terminal import Terminal
    from pyvmm.terminal_screen import TerminalScreen

STATUS_SHUTDOWN = states.STATUS_POWER_OFF
STATUS_RESET = states.STATUS_RESET
STATUS_IO_ERROR = states.STATUS_IO_ERROR
STATUS_READER_GONE = 141  # what a shell says of a process that SIGPIPE has ended


class Machine:
    """A machine, built and paused at its first instruction. The arguments are MachineConfig's.

    ``pio`` and ``mmio`` are its address spaces (``m.pio.map(0x510, 2, device)``), ``memory`` its RAM, ``cpus`` its
    vCPUs, ``devices`` the board's devices by name, ``backends`` its drives by name, ``clock`` guest time. ``consoles``
    are the host's ends of "serial" and "debugcon": ``m.consoles["serial"].feed(b"root\\n")`` types. Raises
    ConfigError for what is asked wrongly and KvmError for what the host refuses.

    Close it, best by ``with``. One that is dropped without is freed when nothing refers to it and its guest does not
    run, with a ResourceWarning. In a child of ``os.fork`` close() gives back the child's descriptors and mappings, and
    everything else is a StateError: the VM is its parent's.
    """

    kvm: Kvm
    vm: Vm
    memory: GuestMemory
    memory_map: MemoryMap
    cpus: list[Cpu]
    clock: Clock
    _closed = True  # until there is something to close

    def __init__(self, config: MachineConfig | None = None, **options: Unpack[MachineOptions]) -> None:
        self.config = machine_config(config, options)
        self._pid = getpid()
        self._closing = Lock()
        self.pio = AddressSpace("pio", 1 << 16)
        self.mmio = AddressSpace("mmio", 1 << 52)
        self.event_loop = EventLoop(self._loop_raised)
        self.event_loop.clock.stop()
        self.clock = self.event_loop.clock if self.config.accel == "kvm" else builder.virtual_clock()
        self.control = RunControl(self._on_light, self.event_loop.clock.in_callback)
        self._closed = False
        self.devices: dict[str, Device] = {}
        self.backends: dict[str, BlockBackend] = {}
        self.io_error = ""
        self.on_io_error: Callable[[str], object] | None = None
        """Told what failed when a drive's policy has stopped the machine, by whatever thread found out."""
        self.resets = ResetCount()
        """How often the guest has reset itself, and why last."""
        self.first_boot = True
        """No reset yet: what firmware is told for its first boot only still holds."""
        self.chardevs: list[Chardev] = []
        self.consoles: dict[str, Chardev] = {}
        self.terminal: Terminal | None = None
        self.vga: VgaText | None = None
        """With vga="text": ``lines()`` is what the guest has on its screen, ``cursor`` where that is."""
        self.screen: TerminalScreen | None = None
        self.on_first_resume: Callable[[], None] | None = None
        """Called once, when the guest has been set going: for what need not be done before."""
        self.cpus = []
        self.user_irqchip: UserIrqchip | None = None
        self._ring_lock = DeviceLock()
        self._coalesced: list[tuple[AddressSpace, int, int]] = []
        self._background: list[Thread] = []
        self._wires: dict[int, IrqWire] = {}
        self._images = builder.Images()
        self.kvm_clock: KvmClock | None = None
        try:
            builder.build(self)
            # Asked for now: the ioctl waits for a vCPU that runs, and one that has halted for good never comes back.
            self._tsc_khz = self.cpus[0].vcpu.tsc_khz if self.cpus else 0
        except BaseException:
            self.close()
            raise
        self.control.cpus = self.cpus

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
            self.resume()
            finished = self.control.wait(limit_s)
        except BaseException:
            self.control.pause()
            raise
        if not finished:
            self.control.pause()
            # It may have ended while it was being paused.
            if self.control.state_name in (states.PAUSED, states.RUNNING):
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
        for cpu in self.cpus:
            cpu.start()
        if self.terminal is not None:
            self.terminal.enter_raw()  # before the guest's first character; keys only when there is a run to quit
        self.control.resume()
        if self.terminal is not None:
            self.terminal.start()
        self._say_that_it_runs()
        # After that: one that fails again stops the machine again.
        for backend in self.backends.values():
            backend.resume()

    def _say_that_it_runs(self) -> None:
        started, self.on_first_resume = self.on_first_resume, None
        if started is not None:
            started()

    def _retry_drives(self) -> None:
        """resume() where nothing runs but the drives. StateError where none of them waits."""
        if not any(backend.stalled for backend in self.backends.values()):
            raise StateError("accel='qtest' has no vCPU to run: drive the devices from outside")
        self.control.restarted()
        for backend in self.backends.values():
            backend.resume()

    def pause(self) -> None:
        """Park every vCPU, their accesses complete. Returns when they are.

        In a device's handler or a timer's callback it returns at once, and takes effect when that returns.
        """
        self._usable("pause")
        self.control.pause()

    def reset(self) -> None:
        """Power-on state, kernel loaded anew. A running machine goes on running, another is paused at the start."""
        self._usable("reset")
        # A function of this call's own: it is waited for, and another thread may be asking for the same.
        self.control.request(lambda: self._reset(), wait=True)
        if self.control.state_name == states.INTERNAL_ERROR and self.control.error is not None:
            raise self.control.error

    def powerdown(self) -> None:
        """Press the ACPI power button: a guest that listens shuts itself down."""
        self._usable("powerdown")
        self.devices["acpi_pm"].press()  # type: ignore[attr-defined]  # builder made an AcpiPm

    def wakeup(self) -> None:
        """Wake a guest that has suspended to RAM, as by its power button. StateError where it has not.

        From any thread; in a handler or a timer's callback it takes effect when that returns.
        """
        self._usable("wakeup")
        if not self.control.suspended:
            raise StateError(f"the guest is not suspended, the machine is in state {self.control.state_name}")
        self.control.request(lambda: self._wake(builder.POWER_BUTTON), wait=True)

    def nmi(self, cpu: int = 0) -> None:
        """Send a non-maskable interrupt to one vCPU; a machine that runs goes on, another has it when it does.

        The vCPUs are parked for it: KVM takes KVM_NMI between two stays in the guest, and a guest may never exit. In a
        handler or a timer's callback it takes effect when that returns.
        """
        self._usable("nmi")
        if not is_int(cpu) or not 0 <= cpu < len(self.cpus):
            raise ConfigError(f"nmi({cpu!r}): give the number of a vCPU, from 0; there are {len(self.cpus)}")
        self.control.request(lambda: self._nmi(self.cpus[cpu]), wait=True)

    def _nmi(self, cpu: Cpu) -> None:
        cpu.vcpu.nmi()
        self.control.carry_on()

    def stop(self, status: int = states.STATUS_STOPPED, reason: str = "stopped") -> None:
        """End the run with ``status``; callable from devices' handlers. What ``run`` returns.

        Once it has ended, further ends are not looked at; but an exception of the handler that asked still is.
        """
        if not is_int(status) or not isinstance(reason, str):
            raise ConfigError(f"stop({status!r}, {reason!r}): give a whole number and a word or two")
        self._same_process("stop")
        ended = ExitStatus(status, reason)
        self.control.request(lambda: self.control.end(ended, None, states.SHUTDOWN))

    def dump(self) -> str:
        """Registers and code of every vCPU, taken while all of them stand; a machine that runs goes on afterwards.

        StateError in a device's handler or a callback, and where the machine is closed.
        """
        self._usable("dump")
        self._not_from_inside("dump")
        texts: list[str] = []
        self.control.request(lambda: self._dump(texts.append), wait=True)
        return "".join(texts)

    def dump_later(self, hear: Callable[[str], object]) -> None:
        """As ``dump``, from anywhere: ``hear`` gets the text, on another thread, as soon as every vCPU stands."""
        self._usable("dump_later")
        self.control.request(lambda: self._dump(hear))

    def _dump(self, hear: Callable[[str], object]) -> None:
        from pyvmm.dump import dump

        title = f"vCPU {{}}, machine {self.control.state_name}"
        hear("\n".join(dump(cpu.vcpu, self.memory, title.format(cpu.index)) for cpu in self.cpus) + "\n")
        self.control.carry_on()

    def _same_process(self, call: str) -> None:
        if getpid() != self._pid:
            raise StateError(f"{call}() in a child of fork: the VM is its parent's, close() is all that is left here")

    def _usable(self, call: str) -> None:
        self._same_process(call)
        if self.control.state_name == states.CLOSED:
            raise StateError(f"{call}(): the machine is closed: make another one")

    def _not_from_inside(self, call: str) -> None:
        self._same_process(call)
        if self._on_own_thread():
            raise StateError(f"{call}() {states.FROM_INSIDE}")

    def _on_own_thread(self) -> bool:
        own = self.event_loop.on_loop_thread() or any(thread.is_current for thread in self._background)
        return own or self.control.inside()

    @property
    def irq_controllers(self) -> Mapping[str, ControllerPins]:
        """The pins of the interrupt controllers by name, where those are in Python: to watch and to drive them."""
        return {} if self.user_irqchip is None else self.user_irqchip.controllers

    # -- what devices and vCPUs tell -----------------------------------------------------------------------

    def guest_shutdown(self) -> None:
        """The guest powered itself off."""
        self.stop(states.STATUS_POWER_OFF, "shutdown")

    def guest_reset(self, why: str = "reset", by: str = "") -> None:
        """The guest asked for a reset, or fell into a triple fault; ``by`` what, where ``why`` does not tell."""
        if self.config.no_reboot:
            self.stop(states.STATUS_RESET, why)
            return
        self.resets.note(by or why)
        self.control.request(self._reset)

    def guest_suspend(self) -> None:
        """The guest suspends to RAM (ACPI S3)."""
        self.control.request(self.control.suspend)

    def guest_wake(self, events: int) -> None:
        """An event that the guest has enabled ends that: bits of PM1's status."""
        self.control.request(lambda: self._wake(events))

    def drive_error(self, backend: BlockBackend, operation: str, number: int, action: str) -> None:
        """A drive's request failed; on ``stop`` it waits, and so does the machine (QEMU's rerror and werror)."""
        if action != "stop":
            return
        import os

        self.io_error = f"{backend.name}: {operation}: {os.strerror(number)}"
        held_up = ExitStatus(STATUS_IO_ERROR, f"io-error: {self.io_error}")
        self.control.request(lambda: self.control.end(held_up, None, states.IO_ERROR))
        if self.on_io_error is not None:
            self.on_io_error(self.io_error)

    def reader_gone(self) -> None:
        """Nobody reads the terminal, or the pipe in its place, any more: the guest would run on unseen."""
        self.stop(STATUS_READER_GONE, "reader-gone")

    def debug_exit(self, value: int) -> None:
        """isa-debug-exit was written."""
        self.stop((value << 1) | 1, "debug-exit")

    def _cpu_stopped(self, cpu: Cpu, reason: StopReason, error: BaseException | None) -> None:
        """On the vCPU's thread, before it parks."""
        if error is not None:
            self._raised(cpu, error)
            return
        detail = cpu.exec.detail
        if reason is StopReason.SHUTDOWN:
            self.guest_reset("triple fault", by="a triple fault")
        elif reason is StopReason.SYSTEM_EVENT and detail["event"] == "SHUTDOWN":
            self.guest_shutdown()
        elif reason is StopReason.SYSTEM_EVENT and detail["event"] == "RESET":
            self.guest_reset(by="KVM's system event")
        elif reason is StopReason.DEBUG:
            stopped = ExitStatus(states.STATUS_DEBUG, "debug")
            self.control.request(lambda: self.control.end(stopped, None, states.DEBUG))
        else:
            from pyvmm.dump import dump, reason_text

            text = reason_text(detail, builder.cpu_vendor(self))
            self._fail(GuestError(text, dump(cpu.vcpu, self.memory, f"vCPU {cpu.index}: {text}")))

    def _raised(self, cpu: Cpu, error: BaseException) -> None:
        """A device's handler raised: dump with its traceback, then complete the access it left half done."""
        if isinstance(error, HostError):  # no fault of the device's, and told in one sentence
            cpu.exec.complete()
            self.control.request(lambda: self.control.fail_late(error))
            return
        from pyvmm.dump import dump

        text = f"{whose(error)} raised {describe(error)}"
        post_mortem = dump(cpu.vcpu, self.memory, f"vCPU {cpu.index}: {text}")
        failure = DeviceError(text, f"{post_mortem}\n{traceback_text(error)}")
        failure.__cause__ = error
        cpu.exec.complete()
        self.control.request(lambda: self.control.fail_late(failure))

    def _loop_raised(self, error: BaseException) -> None:
        """A timer or descriptor callback raised on the event loop's thread."""
        failure = error if isinstance(error, HostError) else callback_failure(error)
        self.control.request(lambda: self.control.fail_late(failure))

    def _fail(self, failure: GuestError) -> None:
        self.control.request(lambda: self.control.end(None, failure, states.INTERNAL_ERROR))

    def _on_light(self, green: bool) -> None:
        if green:
            if self.kvm_clock is not None:
                self.kvm_clock.start()
            self.event_loop.clock.resume()
        else:
            if self.kvm_clock is not None:
                self.kvm_clock.stop()
            self.event_loop.clock.stop()
            self.drain()
            self._flush_console()

    def _flush_console(self) -> None:
        """What the guest has said is out before anybody hears that it stands."""
        if self.screen is not None:
            self.screen.refresh()
        try:
            self.devices["serial"].flush()  # type: ignore[attr-defined]  # builder made a Serial
        except BaseException as error:
            raise callback_failure(error) from error

    def drain(self) -> None:
        """Return when no drive has a request under way. The caller holds no device's lock."""
        self._same_process("drain")
        for backend in self.backends.values():
            backend.drain()

    def _reset(self) -> None:
        """Every vCPU is parked: devices, interrupt controllers, memory image and vCPUs back to power-on.

        A machine that somebody paused meanwhile stays so.
        """
        self.drain()
        for backend in self.backends.values():
            backend.drop_stalled()
        self.memory_map.hold()
        for device in self._all_devices():
            with device.lock:
                reset_device(device)
        builder.reset(self)
        self.first_boot = False
        self.memory_map.release()
        self.control.restarted()

    def _wake(self, events: int) -> None:
        """Every vCPU is parked. As a reset, but memory stays as it is and the guest goes on at its waking vector."""
        if not self.control.suspended:
            self.control.carry_on()
            return
        for backend in self.backends.values():
            backend.drop_stalled()
        self.memory_map.hold()
        for device in self._all_devices():
            with device.lock:
                device.wake()
        builder.wake(self, events)
        self.memory_map.release()
        self.control.woken()

    def _all_devices(self) -> list[Device]:
        """The board's, and whatever the embedder has mapped; each once."""
        mapped = [r.device for space in (self.pio, self.mmio) for r in space.regions if r.device is not None]
        return list({id(d): d for d in [*self.devices.values(), *mapped]}.values())

    # -- wires and counters --------------------------------------------------------------------------------

    def irq_line(self, irq: int) -> IrqLine:
        """A line to ISA interrupt ``irq`` (GSI of the same number), for a device of your own. Lines to one are ORed.

        ConfigError where there is no such interrupt: they go from 0 to 23, the IOAPIC's pins.
        """
        self._usable("irq_line")
        if not is_int(irq) or not 0 <= irq < layout.IOAPIC_PINS:
            raise ConfigError(f"irq_line({irq!r}): give a whole number from 0 to {layout.IOAPIC_PINS - 1}")
        return builder.irq_line(self, irq)

    def coalesce(self, space: AddressSpace, address: int, size: int) -> None:
        """Let KVM gather writes to this range (KVM_REGISTER_COALESCED_MMIO): they arrive in order at the next exit."""
        self._usable("coalesce")
        builder.coalesce(self, space, address, size)

    def exit_stats(self) -> list[ExitStat]:
        """Per exit reason, port or page, and direction: count and user-space time, all vCPUs together."""
        from pyvmm.exit_stats import merge

        self._same_process("exit_stats")
        rows = merge([cpu.exec.stats.rows(self._tsc_khz) for cpu in self.cpus])
        for row in rows:
            if row.address is not None:
                space, size = (self.pio, 1) if row.reason == "IO" else (self.mmio, layout.PAGE_BYTES)
                row.region = names_within(space, row.address, size)
        return rows

    def exit_stats_table(self) -> str:
        """exit_stats() as text, with the regions' names; and how often the guest has reset itself, if it has."""
        from pyvmm.exit_stats import format_table

        rows = self.exit_stats()
        names = {(row.reason, row.address): row.region or "" for row in rows}
        names |= {key: "(nobody)" for key, name in names.items() if key[1] is not None and not name}
        often = self.resets.sentence()
        return format_table(rows, names) + (often and f"\n{often}")

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
            self.control.state_name = states.CLOSED
            builder.abandon(self)
            return
        self._not_from_inside("close")
        with self._closing:
            if self._closed:
                return
            # Interrupted here, the threads may still run: nothing is taken from under them, and close() can go on.
            self.control.close()
            try:
                builder.tear_down(self)
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
            if self._on_own_thread():
                # The collector came by on one of its threads, which can't wait for itself.
                Thread(self.close).start()
            else:
                self.close()

    def __reduce__(self) -> str:
        raise StateError("a machine can't be copied or sent: it is descriptors, threads and memory of this process")

    def __repr__(self) -> str:
        if self._closed:
            return "<Machine closed>"
        return f"<Machine {self.config.machine}, {len(self.cpus)} vCPUs, {self.control.state_name}>"

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def names_within(space: AddressSpace, address: int, size: int) -> str | None:
    """Of the regions that have a part of the range; None where there are none."""
    bases = [(region.base, region) for region in space.regions]
    found = [r.name for base, r in bases if base is not None and base < address + size and address < base + r.size]
    return ", ".join(found) or None


def callback_failure(error: BaseException) -> DeviceError:
    """What a device raised outside of an exit, and so without a dump."""
    text = f"the callback {whose(error)} raised {describe(error)}"
    failure = DeviceError(text, f"{text}\n{traceback_text(error)}")
    failure.__cause__ = error
    return failure


def reset_device(device: Device) -> None:
    try:
        device.reset()
    except BaseException as error:
        text = f"{type(device).__name__}.reset raised {describe(error)}"
        raise DeviceError(text, f"{text}\n{traceback_text(error)}") from error
