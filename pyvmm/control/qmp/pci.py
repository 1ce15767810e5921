"""The PCI bus (QEMU qapi/pci.json)."""

from __future__ import annotations

from pyvmm.control.qmp.kinds import BOOL, INT, SIZE, STR, Enum, ListOf, Optional, Struct
from pyvmm.control.qmp.table import command
from pyvmm.devices.pci import device as registers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.control.qmp.subject import Served
    from pyvmm.devices.pci.device import PciDevice

REGION = Struct({
    "bar": INT, "type": Enum("io", "memory"), "address": INT, "size": SIZE, "prefetch": Optional(BOOL),
    "mem_type_64": Optional(BOOL),
})  # fmt: skip
CLASS_INFO = Struct({"desc": Optional(STR), "class": INT})
ID = Struct({"device": INT, "vendor": INT, "subsystem": Optional(INT), "subsystem-vendor": Optional(INT)})
DEVICE = Struct({
    "bus": INT, "slot": INT, "function": INT, "class_info": CLASS_INFO, "id": ID, "irq": Optional(INT), "irq_pin": INT,
    "qdev_id": STR, "regions": ListOf(REGION),
})  # fmt: skip
BUS = Struct({"bus": INT, "devices": ListOf(DEVICE)})
CLASSES = {
    0x0100: "SCSI controller", 0x0101: "IDE controller", 0x0180: "Storage controller", 0x0200: "Ethernet controller",
    0x0500: "RAM controller", 0x0600: "Host bridge", 0x0601: "ISA bridge", 0x0680: "Bridge",
    0x0780: "Communication controller",
}  # fmt: skip
UNASSIGNED = -1


@command("query-pci", returns=ListOf(BUS))
def query_pci(served: Served) -> list[dict[str, Any]]:
    """None on a machine without a bus."""
    host = getattr(served.machine.board, "pci", None)
    if host is None:
        return []
    names = {id(device): name for name, device in served.machine.devices.items()}
    with host.lock:
        found = [about(slot, n, device, names.get(id(device), "")) for slot, n, device in host.devices]
    return [{"bus": 0, "devices": found}]


def about(slot: int, function: int, device: PciDevice, name: str) -> dict[str, Any]:
    code = device.get(registers.CLASS_CODE + 1, 2)
    pin = device.get(registers.INTERRUPT_PIN)
    told: dict[str, Any] = {
        "bus": 0,
        "slot": slot,
        "function": function,
        "class_info": {"class": code, **({"desc": CLASSES[code]} if code in CLASSES else {})},
        "id": {
            "device": device.get(registers.DEVICE_ID, 2),
            "vendor": device.get(registers.VENDOR_ID, 2),
            "subsystem": device.get(registers.SUBSYSTEM_ID, 2),
            "subsystem-vendor": device.get(registers.SUBSYSTEM_VENDOR_ID, 2),
        },
        "irq_pin": pin,
        "qdev_id": name,
        "regions": [region(device, bar) for bar in device.bars],
    }
    if pin:
        told["irq"] = device.get(registers.INTERRUPT_LINE)
    return told


def region(device: PciDevice, bar: registers.Bar) -> dict[str, Any]:
    base = device.bar_base(bar)
    told: dict[str, Any] = {
        "bar": (bar.register - registers.BAR0) // 4,
        "type": "io" if bar.flags & registers.BAR_IO else "memory",
        "address": UNASSIGNED if base is None else base,
        "size": bar.size,
    }
    if not bar.flags & registers.BAR_IO:
        told["prefetch"] = bool(bar.flags & registers.BAR_PREFETCHABLE)
        told["mem_type_64"] = bool(bar.flags & registers.BAR_64)
    return told
