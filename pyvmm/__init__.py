"""pyvmm: a virtual machine monitor for x86-64 Linux with KVM.

General layout, lowest layer first; a module imports only from those above it in this list:

    errors          every exception
    kvm/            the ioctls: /dev/kvm, VM, vCPU
    light           locks and threads;  clock  guest time;  device  the contract of a device model
    guest_memory    RAM;  address_space  ports and MMIO
    cpu_exec        the run loop;  exit_stats  its profiler;  run_control, cpu  the vCPU threads;  dump  post-mortems
    x86/            guest addresses, initial state, CPUID, boot protocols, ACPI and MP tables
    event_loop      descriptors and timers;  chardev, terminal  host sides of consoles
    devices/        one chip a file
    config, builder, machine    from arguments to a running machine
    cli/            the command

One reading order: builder -> cpu_exec -> address_space -> devices/serial.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.address_space import (
        AddressSpace,
        BufferRegion,
        EventRegion,
        FifoRegion,
        LatchRegion,
        MemoryRegion,
        SinkRegion,
    )
    from pyvmm.config import MachineConfig
    from pyvmm.device import Device, IrqLine
    from pyvmm.errors import BusError, ConfigError, DeviceError, GuestError, KvmError, StateError, VmmError
    from pyvmm.machine import Machine
    from pyvmm.run_control import ExitStatus
    from pyvmm.run_state import RunState

__version__ = "0.1.0"

# Where each public name stands. They are imported when they are asked for, so that `pyvmm run` decides what is loaded
# on its way to the first guest instruction, and `import pyvmm` in a tool costs nothing until it makes a machine.
_MODULES = {
    "address_space": (
        "AddressSpace",
        "BufferRegion",
        "EventRegion",
        "FifoRegion",
        "LatchRegion",
        "MemoryRegion",
        "SinkRegion",
    ),
    "config": ("MachineConfig",),
    "device": ("Device", "IrqLine"),
    "errors": ("BusError", "ConfigError", "DeviceError", "GuestError", "KvmError", "StateError", "VmmError"),
    "machine": ("Machine",),
    "run_control": ("ExitStatus",),
    "run_state": ("RunState",),
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
    "ConfigError",
    "Device",
    "DeviceError",
    "EventRegion",
    "ExitStatus",
    "FifoRegion",
    "GuestError",
    "IrqLine",
    "KvmError",
    "LatchRegion",
    "Machine",
    "MachineConfig",
    "MemoryRegion",
    "RunState",
    "SinkRegion",
    "StateError",
    "VmmError",
]
