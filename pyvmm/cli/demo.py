"""``pyvmm demo``: the guest of guests/demo.S with a device in Python, and what its exits cost."""

from __future__ import annotations

from collections import deque

from pyvmm import Device, GuestError, Machine
from pyvmm.cli.options import Option, parse, usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.irq import IrqLine

# As guests/demo.S has them.
GUEST_ADDRESS = 0x7C00
NOTEBOOK_PORT = 0x700
NOTEBOOK_MMIO = 0xD000_0000
NOTEBOOK_BYTES = 24
NOTEBOOK_IRQ = 5

OPTIONS = (
    Option("--irqchip", "kernel|off", "interrupt controllers and PIT in KVM (default), or in Python"),
    Option("--timeout", "SECONDS", "give up after that long (default 60); status 124", float),
    Option("--help -h", "", "this"),
)

TITLE = """\
usage: pyvmm demo [OPTIONS]

Runs a small guest that is part of pyvmm: real, protected and long mode, and an exit of every kind that works
on any KVM. Then shows what the exits cost. Exit status 0 if all went well."""

HOW_TO_READ = (
    "How to read it: a row is one kind of exit that reached pyvmm, by port (IO) or page (MMIO) and direction, "
    "and the time from leaving KVM_RUN to entering it again; what KVM answers itself is not in it, nor is the "
    "way through the kernel."
)


class Notebook(Device):
    """The guest's device: a queue, and a count of the calls. Written to show how little that takes."""

    QUEUE = 0
    COUNT = 8
    RESETS = 16
    TSC_KHZ = 20

    valid_sizes = (1, 8)
    impl_sizes = (1, 8)
    # What Machine.save_state keeps of it (pyvmm/state.pyx).
    STATE = {"queue": ("list", 64, 0, 1000), "calls": 64, "resets": 64, "tsc_khz": 32}

    def __init__(self, irq: IrqLine, tsc_khz: int) -> None:
        self.irq = irq
        self.tsc_khz = tsc_khz
        self.queue: deque[int] = deque()
        self.calls = 0
        self.resets = 0

    def read(self, offset: int, size: int) -> int:
        self.calls += 1
        if offset == self.QUEUE and self.queue:
            return self.queue.popleft()
        return {self.COUNT: self.calls, self.RESETS: self.resets, self.TSC_KHZ: self.tsc_khz}.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        self.calls += 1
        if offset == self.QUEUE:
            self.queue.append(value)
        elif offset == self.COUNT:
            self.irq.pulse()

    def reset(self) -> None:
        self.resets += 1
        self.queue.clear()


def demo(args: list[str]) -> int:
    given = parse(OPTIONS, args, verb="demo")
    if given.pop("help", False):
        print(usage(TITLE, OPTIONS), end="")
        return 0
    from pyvmm.guests import image
    from pyvmm.kvm.kind import kvm_kind

    timeout_s = given.pop("timeout", 60.0)
    shown = Shown()
    with Machine(
        flat=image("demo"), flat_address=GUEST_ADDRESS, flat_mode="real16", memory_mib=2, serial=shown, **given
    ) as machine:
        shown.on_error = machine.stop
        notebook = Notebook(machine.irq_line(NOTEBOOK_IRQ), machine.cpus[0].vcpu.tsc_khz)
        machine.pio.map(NOTEBOOK_PORT, NOTEBOOK_BYTES, notebook, name="notebook")
        machine.mmio.map(NOTEBOOK_MMIO, NOTEBOOK_BYTES, notebook, name="notebook")
        status = run(machine, timeout_s)
        if shown.error is not None:
            raise shown.error
        print(f"\nThe Python device was called {notebook.calls} times. What reached pyvmm:\n")
        print(machine.exit_stats_table())
        print(f"\n{HOW_TO_READ}")
        print(f"Measured on {kvm_kind()}.")
    return status


def run(machine: Machine, timeout_s: float) -> int:
    from pyvmm.cli.say import STATUS_TIMEOUT, say

    try:
        return int(machine.run(timeout_s))
    except GuestError as error:
        say(error.dump or str(error))
        return error.status
    except TimeoutError as error:
        say(f"pyvmm: {error}")
        return STATUS_TIMEOUT


class Shown:
    """The guest's serial port: to our standard output, a line at a time as it comes."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.on_error: Callable[[], object] = lambda: None

    def __call__(self, data: bytes) -> None:
        text = data.decode("ascii", "replace").replace("\r", "")
        try:
            print(text, end="", flush="\n" in text)
        except OSError as error:  # no fault of the device's: its reader has gone, or the disk is full
            self.error = error
            self.on_error()
