"""The microvm board: the legacy set and no more. It boots a kernel or a flat binary; there is neither PCI nor firmware.
"""

from __future__ import annotations

from pyvmm.boards.isa import IsaBoard
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boards.isa_checks import Ports
    from pyvmm.spec import Spec


class Microvm(IsaBoard):
    may_come_late = True
    pm_port = layout.PORT_PM
    reset_port = layout.PORT_RESET

    @classmethod
    def begins_late(cls, config: Spec) -> bool:
        """A kernel finds the devices in its tables, and what is asked for may be refused, or bring input."""
        asked = (config.fw_cfg, config.uuid, config.vga, config.testdev, config.pvpanic, config.drives)
        silent = all(end in (None, "none") for end in (config.serial, config.debugcon))
        flat = config.flat is not None and config.accel == "kvm"
        return cls is Microvm and flat and silent and not any(asked) and not config.wants_virtio

    @classmethod
    def chipset_ports(cls) -> tuple[Ports, ...]:
        from pyvmm.boards.isa_checks import MICROVM

        return MICROVM

    def make_devices(self) -> None:
        self.make_isa_devices()
        self.make_virtio_devices()
        if self.config.uuid is not None:
            from pyvmm.devices.fw_cfg import UUID
            from pyvmm.x86 import smbios

            self.fw_cfg.add(UUID, smbios.parse_uuid(self.config.uuid))

    def write_tables(self) -> int:
        """ACPI and MP tables."""
        from pyvmm.x86 import acpi, mptable

        config = self.config
        tables = acpi.build(
            config.cpus, devices=self.acpi_devices(), s3=not config.no_s3, vga=self.vga is not None
        )
        tables.write(self.memory)
        mptable.write(self.memory, config.cpus)
        return tables.rsdp
