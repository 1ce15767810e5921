"""Machine: one virtual machine, from its arguments to its end. What embedders use.

    with pyvmm.Machine(memory_mib=256, cpus=2, kernel="vmlinuz", initrd="initrd.gz", append="console=ttyS0") as m:
        status = m.run()

builder.py makes what is in it; RunControl (run_control.py) starts and parks its vCPUs.
"""

from __future__ import annotations

from pyvmm import builder
from pyvmm import run_control as states
from pyvmm.address_space import AddressSpace
from pyvmm.config import MachineConfig
from pyvmm.cpu_exec import StopReason
from pyvmm.device import DeviceLock
from pyvmm.errors import DeviceError, GuestError, StateError
from pyvmm.event_loop import EventLoop
from pyvmm.run_control import ExitStatus, RunControl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from pyvmm.block.backend import BlockBackend
    from pyvmm.chardev import Chardev
    from pyvmm.clock import Clock
    from pyvmm.cpu import Cpu
    from pyvmm.device import Device, IrqLine, IrqWire
    from pyvmm.devices.irq_pins import ControllerPins
    from pyvmm.devices.user_irqchip import UserIrqchip
    from pyvmm.exit_stats import ExitStat
    from pyvmm.guest_memory import GuestMemory
    from pyvmm.kvm.system import Kvm
    from pyvmm.kvm.vm import Vm
    from pyvmm.light import Thread
    from pyvmm.memory_map import MemoryMap
    from pyvmm.run_state import RunState
    from pyvmm.terminal import Terminal

STATUS_SHUTDOWN = 0
STATUS_RESET = 6
STATUS_IO_ERROR = 10
STATUS_READER_GONE = 141  # what a shell says of a process that SIGPIPE has ended


class Machine:
    """A machine, built and paused at its first instruction. The arguments are MachineConfig's.

    ``pio`` and ``mmio`` are its address spaces (``m.pio.map(0x510, 2, device)``), ``memory`` its RAM, ``cpus`` its
    vCPUs, ``devices`` the board's devices by name, ``backends`` its drives by name, ``clock`` guest time. Raises
    ConfigError for what is asked wrongly and KvmError for what the host refuses.
    """

    kvm: Kvm
    vm: Vm
    memory: GuestMemory
    memory_map: MemoryMap
    cpus: list[Cpu]
    clock: Clock

    def __init__(self, config: MachineConfig | None = None, **options: Any) -> None:
        self.config = config if config is not None else MachineConfig(**options)
        self.pio = AddressSpace("pio", 1 << 16)
        self.mmio = AddressSpace("mmio", 1 << 52)
        self.event_loop = EventLoop(self._loop_raised)
        self.event_loop.clock.stop()
        self.clock = self.event_loop.clock if self.config.accel == "kvm" else builder.virtual_clock()
        self.control = RunControl(self._on_light, self.event_loop.clock.in_callback)
        self.devices: dict[str, Device] = {}
        self.backends: dict[str, BlockBackend] = {}
        self.io_error = ""
        self.first_boot = True
        """No reset yet: what firmware is told for its first boot only still holds."""
        self.chardevs: list[Chardev] = []
        self.terminal: Terminal | None = None
        self.cpus = []
        self.user_irqchip: UserIrqchip | None = None
        self._ring_lock = DeviceLock()
        self._coalesced: list[tuple[AddressSpace, int, int]] = []
        self._background: list[Thread] = []
        self._wires: dict[int, IrqWire] = {}
        self._images = builder.Images()
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

    def run(self, timeout_s: float | None = None) -> ExitStatus:
        """Run until the guest ends, and say how: an int, what ``pyvmm run`` would exit with, with its ``reason``.

        GuestError where the guest can't go on, DeviceError where a device raised; both carry the dump. TimeoutError
        after ``timeout_s`` seconds; the machine is paused then, and also when a signal's exception comes through.
        """
        try:
            self.resume()
            finished = self.wait(timeout_s)
        except BaseException:
            self.control.pause()
            raise
        if not finished:
            self.control.pause()
            # It may have ended while it was being paused.
            if self.control.state_name in (states.PAUSED, states.RUNNING):
                raise TimeoutError(f"the guest was still running after {timeout_s} s")
        if self.control.error is not None:
            raise self.control.error
        if self.control.state_name == states.IO_ERROR:
            return ExitStatus(STATUS_IO_ERROR, f"io-error: {self.io_error}")
        status = self.control.status
        return status if status is not None else ExitStatus(STATUS_SHUTDOWN, "paused")

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the machine stops running, whatever the reason: True; False after ``timeout_s`` seconds."""
        return self.control.wait(timeout_s)

    def resume(self) -> None:
        """Start, or go on after a pause, and return at once. StateError where the guest has ended.

        After an io-error the requests that failed are tried again.
        """
        if not self.cpus:
            raise StateError("accel='qtest' has no vCPU to run: drive the devices from outside")
        for cpu in self.cpus:
            cpu.start()
        if self.terminal is not None:
            self.terminal.enter_raw()  # before the guest's first character; keys only when there is a run to quit
        self.control.resume()
        if self.terminal is not None:
            self.terminal.start()
        # After that: one that fails again stops the machine again.
        for backend in self.backends.values():
            backend.resume()

    def pause(self) -> None:
        """Park every vCPU, their accesses complete. Returns when they are.

        In a device's handler or a timer's callback it returns at once, and takes effect when that returns.
        """
        self.control.pause()

    def reset(self) -> None:
        """Power-on state, kernel loaded anew. A running machine goes on running, another is paused at the start."""
        if self.control.state_name == states.CLOSED:
            raise StateError("the machine is closed")
        # A function of this call's own: it is waited for, and another thread may be asking for the same.
        self.control.request(lambda: self._reset(), wait=True)
        if self.control.state_name == states.INTERNAL_ERROR and self.control.error is not None:
            raise self.control.error

    def powerdown(self) -> None:
        """Press the ACPI power button: a guest that listens shuts itself down."""
        self.devices["acpi_pm"].press()  # type: ignore[attr-defined]  # builder made an AcpiPm

    def nmi(self, cpu: int = 0) -> None:
        """Send a non-maskable interrupt to one vCPU. The machine must be paused, or it arrives at the next exit."""
        self.cpus[cpu].vcpu.nmi()

    def stop(self, status: int = STATUS_SHUTDOWN, reason: str = "stopped") -> None:
        """End the run with ``status``; callable from devices' handlers. What ``run`` returns."""
        ended = ExitStatus(status, reason)
        self.control.request(lambda: self.control.end(ended, None, states.SHUTDOWN))

    @property
    def irq_controllers(self) -> Mapping[str, ControllerPins]:
        """The pins of the interrupt controllers by name, where those are in Python: to watch and to drive them."""
        return {} if self.user_irqchip is None else self.user_irqchip.controllers

    # -- what devices and vCPUs tell -----------------------------------------------------------------------

    def guest_shutdown(self) -> None:
        """The guest powered itself off."""
        self.stop(STATUS_SHUTDOWN, "shutdown")

    def guest_reset(self, why: str = "reset") -> None:
        """The guest asked for a reset, or fell into a triple fault."""
        if self.config.no_reboot:
            self.stop(STATUS_RESET, why)
            return

        self.control.request(self._reset)

    def drive_error(self, backend: BlockBackend, operation: str, number: int, action: str) -> None:
        """A drive's request failed; on ``stop`` it waits, and so does the machine (QEMU's rerror and werror)."""
        if action != "stop":
            return
        import os

        self.io_error = f"{backend.name}: {operation}: {os.strerror(number)}"
        self.control.request(lambda: self.control.end(None, None, states.IO_ERROR))

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
            self.guest_reset("triple fault")
        elif reason is StopReason.SYSTEM_EVENT and detail["event"] == "SHUTDOWN":
            self.guest_shutdown()
        elif reason is StopReason.SYSTEM_EVENT and detail["event"] == "RESET":
            self.guest_reset()
        elif reason is StopReason.DEBUG:
            stopped = ExitStatus(STATUS_SHUTDOWN, "debug")
            self.control.request(lambda: self.control.end(stopped, None, states.DEBUG))
        else:
            from pyvmm.dump import dump, reason_text

            text = reason_text(detail, builder.cpu_vendor(self))
            self._fail(GuestError(text, dump(cpu.vcpu, self.memory, f"vCPU {cpu.index}: {text}")))

    def _raised(self, cpu: Cpu, error: BaseException) -> None:
        """A device's handler raised: dump with its traceback, then complete the access it left half done."""
        import traceback

        from pyvmm.dump import dump

        text = f"a device raised {type(error).__name__}: {error}"
        post_mortem = dump(cpu.vcpu, self.memory, f"vCPU {cpu.index}: {text}")
        failure = DeviceError(text, post_mortem + "\n" + "".join(traceback.format_exception(error)).rstrip())
        failure.__cause__ = error
        cpu.exec.complete()
        self._fail(failure)

    def _loop_raised(self, error: BaseException) -> None:
        """A timer or descriptor callback raised on the event loop's thread."""
        failure = callback_failure(error)
        failure.__cause__ = error
        self._fail(failure)

    def _fail(self, failure: GuestError) -> None:
        self.control.request(lambda: self.control.end(None, failure, states.INTERNAL_ERROR))

    def _on_light(self, green: bool) -> None:
        if green:
            self.event_loop.clock.resume()
        else:
            self.event_loop.clock.stop()
            self.drain()
            self._flush_console()

    def _flush_console(self) -> None:
        """What the guest has said is out before anybody hears that it stands."""
        try:
            self.devices["serial"].flush()  # type: ignore[attr-defined]  # builder made a Serial
        except BaseException as error:
            raise callback_failure(error) from error

    def drain(self) -> None:
        """Return when no drive has a request under way. The caller holds no device's lock."""
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
                device.reset()
        builder.reset(self)
        self.first_boot = False
        self.memory_map.release()
        self.control.restarted()

    def _all_devices(self) -> list[Device]:
        """The board's, and whatever the embedder has mapped; each once."""
        mapped = [r.device for space in (self.pio, self.mmio) for r in space.regions if r.device is not None]
        return list({id(d): d for d in [*self.devices.values(), *mapped]}.values())

    # -- wires and counters --------------------------------------------------------------------------------

    def irq_line(self, irq: int) -> IrqLine:
        """A line to ISA interrupt ``irq`` (GSI of the same number), for a device of your own. Lines to one are ORed."""
        return builder.irq_line(self, irq)

    def coalesce(self, space: AddressSpace, address: int, size: int) -> None:
        """Let KVM gather writes to this range (KVM_REGISTER_COALESCED_MMIO): they arrive in order at the next exit."""
        builder.coalesce(self, space, address, size)

    def exit_stats(self) -> list[ExitStat]:
        """Per exit reason, port or page, and direction: count and user-space time, all vCPUs together."""
        from pyvmm.exit_stats import merge

        return merge([cpu.exec.stats.rows(self._tsc_khz) for cpu in self.cpus])

    def exit_stats_table(self) -> str:
        """exit_stats() as text, with the regions' names."""
        from pyvmm.exit_stats import format_table

        rows = self.exit_stats()
        names: dict[tuple[str, int | None], str] = {}
        for row in rows:
            if row.address is not None:
                region = (self.pio if row.reason == "IO" else self.mmio).find(row.address)
                names[row.reason, row.address] = region.name if region is not None else "(nobody)"
        return format_table(rows, names)

    # -- the end -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End everything and give it back: threads, descriptors, memory. Idempotent."""
        if self.control.state_name == states.CLOSED:
            return
        try:
            self.control.close()
        finally:
            builder.tear_down(self)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def callback_failure(error: BaseException) -> DeviceError:
    """What a device raised outside of an exit, and so without a dump."""
    import traceback

    text = f"a device's callback raised {type(error).__name__}: {error}"
    return DeviceError(text, text + "\n" + "".join(traceback.format_exception(error)).rstrip())
