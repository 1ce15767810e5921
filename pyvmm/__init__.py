"""pyvmm: a virtual machine monitor for x86-64 Linux with KVM.

    import pyvmm

    class Counter(pyvmm.Device):
        def read(self, offset, size): ...
        def write(self, offset, size, value): ...

    with pyvmm.Machine(memory_mib=256, kernel="vmlinuz", append="console=ttyS0", serial=print) as m:
        m.pio.map(0x7F0, 2, Counter())
        status = m.run()

The vocabulary:

    Machine         one virtual machine; MachineOptions its arguments, MachineConfig the same checked, DriveOptions a
                    disk's; RunState what it is doing, ExitStatus how it ended
    Device          a device model: read, write, reset at offsets of its region, under its lock
    m.pio, m.mmio   AddressSpace: map(base, size, device) makes a MemoryRegion; LatchRegion, SinkRegion, FifoRegion,
                    EventRegion and BufferRegion answer without Python
    m.irq_line(n)   IrqLine: an interrupt;  m.irqchip  the other ways: MSIs, and eventfds that interrupt
    m.clock         Clock: guest time; clock.timer(callback) a Timer
    m.memory        GuestMemory: RAM, as views for DMA
    m.cpus          Cpu: registers, step(), breakpoints
    m.consoles      Chardev by name, with feed(bytes)
    m.events        Events: listen(function, "stop", "reset", ...) hears what happens to it, as an Event
    m.exit_stats()  ExitStat: what each kind of exit cost
    m.save(path)    a Snapshot, a machine in a file: Machine.restore(path) goes on from it, as often as you like;
                    Template(path) holds it open, and template.start() gives machines
    errors          ConfigError what was asked wrongly, StateError not now, KvmError what the host refuses,
                    GuestError and DeviceError with a dump: what ends a run

docs/design.md has the layers, and tells the lives of an exit, of a block request and of a character on the console.
To read the code, begin with an exit: cpu_exec, address_space, region, devices/serial;
then how it came to that: builder.
"""

from pyvmm.bundle import install

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.address_space import AddressSpace
    from pyvmm.block.options import DriveOptions
    from pyvmm.chardev import Chardev
    from pyvmm.clock import Clock, Timer
    from pyvmm.config import MachineConfig, MachineOptions
    from pyvmm.cpu import Cpu
    from pyvmm.device import Device
    from pyvmm.errors import BusError, ConfigError, DeviceError, GuestError, KvmError, StateError, VmmError
    from pyvmm.events import Event, Events
    from pyvmm.exit_stats import ExitStat
    from pyvmm.guest_memory import GuestMemory
    from pyvmm.irq import IrqLine
    from pyvmm.machine import Machine
    from pyvmm.region import BufferRegion, EventRegion, FifoRegion, LatchRegion, MemoryRegion, SinkRegion
    from pyvmm.run_control import ExitStatus
    from pyvmm.run_state import RunState
    from pyvmm.snapshot import Snapshot
    from pyvmm.template import Template

__version__ = "0.1.0"

install(__path__[0])  # of the finder for our own modules
del install

# Where each public name stands. They are imported when they are asked for, so that `pyvmm run` decides what is loaded
# on its way to the first guest instruction, and `import pyvmm` in a tool costs nothing until it makes a machine.
_MODULES = {
    "address_space": ("AddressSpace",),
    "block.options": ("DriveOptions",),
    "chardev": ("Chardev",),
    "clock": ("Clock", "Timer"),
    "config": ("MachineConfig", "MachineOptions"),
    "cpu": ("Cpu",),
    "device": ("Device",),
    "errors": ("BusError", "ConfigError", "DeviceError", "GuestError", "KvmError", "StateError", "VmmError"),
    "events": ("Event", "Events"),
    "exit_stats": ("ExitStat",),
    "guest_memory": ("GuestMemory",),
    "irq": ("IrqLine",),
    "machine": ("Machine",),
    "region": ("BufferRegion", "EventRegion", "FifoRegion", "LatchRegion", "MemoryRegion", "SinkRegion"),
    "run_control": ("ExitStatus",),
    "run_state": ("RunState",),
    "snapshot": ("Snapshot",),
    "template": ("Template",),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            imported = __import__(f"{__name__}.{module}", fromlist=(name,))
            value: object = getattr(imported, name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AddressSpace",
    "BufferRegion",
    "BusError",
    "Chardev",
    "Clock",
    "ConfigError",
    "Cpu",
    "Device",
    "DeviceError",
    "DriveOptions",
    "Event",
    "EventRegion",
    "Events",
    "ExitStat",
    "ExitStatus",
    "FifoRegion",
    "GuestError",
    "GuestMemory",
    "IrqLine",
    "KvmError",
    "LatchRegion",
    "Machine",
    "MachineConfig",
    "MachineOptions",
    "MemoryRegion",
    "RunState",
    "SinkRegion",
    "Snapshot",
    "StateError",
    "Template",
    "Timer",
    "VmmError",
]
