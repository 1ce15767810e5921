"""pyvmm: a virtual machine monitor for x86-64 Linux with KVM.

General layout, lowest layer first; a module imports only from those above it in this list:

    errors          every exception
    kvm/            the ioctls: /dev/kvm, VM, vCPU
    light           locks and threads;  clock  guest time;  device  the contract of a device model
    guest_memory    RAM;  address_space  ports and MMIO
    cpu_exec        the run loop;  exit_stats  its profiler;  run_control, cpu  the vCPU threads;  dump  post-mortems
    x86/            guest addresses, initial state, CPUID, boot protocols, ACPI and MP tables
    event_loop      descriptors and timers;  chardev  host sides of consoles
    devices/        one chip a file
    config, builder, machine    from arguments to a running machine
    cli/            the command

One reading order: builder -> cpu_exec -> address_space -> devices/serial.
"""

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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.run_state import RunState

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # The one public name that is made when it is asked for: importing enum takes a tenth of the time to a guest.
    if name == "RunState":
        from pyvmm.run_state import RunState

        return RunState
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
