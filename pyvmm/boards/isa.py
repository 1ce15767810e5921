"""The legacy set: what every PC-like guest expects to find, at the ports of layout.py."""

from __future__ import annotations

from pyvmm.boards.board import Board
from pyvmm.x86 import e820, layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boards.isa_checks import Ports
    from pyvmm.devices.debug_exit import DebugExit
    from pyvmm.devices.debugcon import DebugCon
    from pyvmm.devices.pvpanic import PvPanic
    from pyvmm.devices.testdev import TestDev
    from pyvmm.spec import Spec
    from pyvmm.x86.cpu_state import BootState


class IsaBoard(Board):
    """What microvm and pc have in common. ``make_isa_devices`` maps all of it but the PM block and the reset register,
    which a chipset may have elsewhere.
    """

    debugcon: DebugCon | None = None
    debug_exit: DebugExit | None = None
    testdev: TestDev | None = None
    pvpanic: PvPanic | None = None

    @classmethod
    def check(cls, config: Spec) -> None:
        if config.fw_cfg or config.debug_exit not in (None, layout.PORT_DEBUG_EXIT):
            from pyvmm.boards.isa_checks import check_debug_exit, check_files

            check_debug_exit(config, cls.chipset_ports(), debugcon=cls.has_debugcon(config))
            check_files(config, cls.firmware_files())

    @classmethod
    def chipset_ports(cls) -> tuple[Ports, ...]:
        """(first, how many, whose) of the ports that only this kind of board has."""
        return ()

    @classmethod
    def firmware_files(cls) -> tuple[str, ...]:
        """The names of fw_cfg files that only this kind of board makes."""
        return ()

    @classmethod
    def has_debugcon(cls, config: Spec) -> bool:
        """Whether there is a debug console, also where nobody listens."""
        return True

    def make_isa_devices(self) -> None:
        """COM1, ACPI's PM block and events, the generation's number, the reset register, fw_cfg, RTC, i8042, port 0x92,
        POST codes; and what is asked for.
        """
        from pyvmm.devices.acpi_gpe import GpeBlock
        from pyvmm.devices.acpi_pm import AcpiPm
        from pyvmm.devices.fw_cfg import FwCfg
        from pyvmm.devices.reset_control import ResetControl
        from pyvmm.devices.vmgenid import ID_BYTES, VmGenId

        power = self.chassis.power
        self.serial = self.add_serial()
        pm = AcpiPm(
            self.clock,
            self.irq_line(layout.IRQ_SCI, "acpi_pm"),
            power.off,
            s5_type=layout.SLP_TYP_S5,
            s3_type=None if self.config.no_s3 else layout.SLP_TYP_S3,
            on_suspend=power.suspend,
            on_wake=power.wake,
        )
        self.pm = self.add("acpi_pm", pm)
        gpe = self.gpe = self.add("gpe0", GpeBlock(pm.general_event))
        self.map_ports(layout.PORT_GPE0, layout.PORT_GPE0_BYTES, gpe, "gpe0")
        self.vmgenid = self.add("vmgenid", VmGenId(lambda: gpe.happen(layout.GPE_VM_GENERATION)))
        self.mmio.map(layout.VM_GENERATION_ID, ID_BYTES, self.vmgenid, name="vmgenid")
        why = f"port {layout.PORT_RESET:#x}, the reset register of ACPI and PCI"
        self.reset_control = self.add("reset_control", ResetControl(lambda: power.reset(by=why)))
        self.fw_cfg = self.add("fw_cfg", FwCfg(self.memory))
        self.chassis.closers.call(self.fw_cfg.close)  # it may have views of the images
        self.map_ports(layout.PORT_FW_CFG, 2, self.fw_cfg, "fw_cfg")
        self.map_ports(layout.PORT_FW_CFG_DMA, 8, self.fw_cfg.dma, "fw_cfg.dma")
        self._make_old_chips()
        self._make_debug_devices()
        if self.config.vga == "text":
            self._make_vga()

    def _make_old_chips(self) -> None:
        from pyvmm.devices.i8042 import I8042
        from pyvmm.devices.port92 import Port92
        from pyvmm.devices.rtc import Rtc

        power = self.chassis.power
        low = min(self.memory.size_bytes, layout.RAM_HOLE)
        rtc = Rtc(
            self.irq_line(layout.IRQ_RTC, "rtc"),
            self.clock,
            ram_below_4g_bytes=low,
            ram_above_4g_bytes=self.memory.size_bytes - low,
            cpus=self.config.cpus,
            on_alarm=self.pm.rtc_alarm,
        )
        i8042 = I8042(
            self.irq_line(layout.IRQ_KEYBOARD, "i8042"),
            lambda: power.reset(by=f"port {layout.PORT_I8042_COMMAND:#x}, the keyboard controller"),
        )
        port92 = Port92(lambda: power.reset(by=f"port {layout.PORT_FAST_A20:#x}"))
        self.rtc, self.i8042, self.port92 = self.add("rtc", rtc), self.add("i8042", i8042), self.add("port92", port92)
        self.describe(rtc_aml)
        self.describe(keyboard_aml)
        self.describe(generation_aml)
        self.map_ports(layout.PORT_RTC, 2, rtc, "rtc")
        self.map_ports(layout.PORT_I8042_DATA, 1, i8042, "i8042.data")
        self.map_ports(layout.PORT_I8042_COMMAND, 1, i8042.command, "i8042.command")
        self.map_ports(layout.PORT_FAST_A20, 1, port92, "port92")

    def _make_debug_devices(self) -> None:
        """POST codes, the debug console, isa-debug-exit and, asked for, pc-testdev."""
        from pyvmm.devices.debug_exit import DebugExit
        from pyvmm.devices.debugcon import DebugCon
        from pyvmm.devices.port80 import Port80

        config = self.config
        self.port80 = self.add("port80", Port80())
        self.map_ports(layout.PORT_POST, 1, self.port80, "port80")
        if self.has_debugcon(config):
            self.debugcon = self.add("debugcon", DebugCon(self.chassis.consoles.open(config.debugcon, "debugcon")))
            # A line that has no end yet is nobody's hurry: the last one comes out when the machine is closed.
            self.chassis.closers.call(self.debugcon.flush)
            self.chassis.consoles.add_flush(self.debugcon.flush, in_a_pause=False)
            self.map_ports(layout.PORT_DEBUG_CONSOLE, 1, self.debugcon, "debugcon")
        if config.debug_exit is not None:
            self.debug_exit = self.add("debug_exit", DebugExit(self.chassis.power.debug_exit))
            self.map_ports(config.debug_exit, 4, self.debug_exit, "isa-debug-exit")
        if config.pvpanic:
            self._make_pvpanic()
        if config.testdev:
            self._make_testdev()

    def _make_pvpanic(self) -> None:
        from pyvmm.devices.pvpanic import PvPanic

        events, power = self.chassis.events, self.chassis.power

        def panicked() -> None:
            events.tell("panic", goes_on=False)
            power.panic()

        self.pvpanic = self.add("pvpanic", PvPanic(panicked, lambda: events.tell("panic", goes_on=True)))
        self.map_ports(layout.PORT_PVPANIC, 1, self.pvpanic, "pvpanic")
        self.describe(pvpanic_aml)

    def _make_testdev(self) -> None:
        from pyvmm.devices.testdev import TestDev
        from pyvmm.region import BufferRegion

        lines = [self.irq_line(gsi, "testdev") for gsi in range(layout.IOAPIC_PINS)]
        testdev = self.testdev = self.add("testdev", TestDev(self.memory.drop_mapping, lines))
        self.map_ports(layout.PORT_TESTDEV, 4, testdev, "testdev.latch")
        self.map_ports(layout.PORT_TESTDEV + 4, 4, testdev.flush, "testdev.flush")
        self.map_ports(layout.PORT_TESTDEV + 8, 4, testdev.latch_bytes, "testdev.bytes")
        self.map_ports(layout.PORT_TESTDEV_IRQ, 24, testdev.irqs, "testdev.irqs")
        self.windows.take(layout.TESTDEV_MEMORY, layout.TESTDEV_MEMORY_BYTES, "testdev.memory")
        self.mmio.add(layout.TESTDEV_MEMORY, BufferRegion(testdev.memory, name="testdev.memory"))

    def _make_vga(self) -> None:
        """VGA's text mode. Its memory is there already: part of RAM on a microvm, a region of its own on a pc."""
        from pyvmm.devices import vga_text

        memory_map = self.memory_map
        vga = vga_text.VgaText(lambda: memory_map.read(layout.VGA_TEXT, layout.VGA_TEXT_BYTES), self.clock)
        self.vga = self.add("vga", vga)
        self.map_ports(layout.PORT_VGA, vga_text.PORTS, vga, "vga")
        self.map_ports(
            layout.PORT_VGA_MONO, vga_text.MONO_PORTS, vga, "vga.mono", read=vga.read_mono, write=vga.write_mono
        )
        self.chassis.consoles.add_screen(vga.frame)

    def describe_machine(self) -> None:
        """What firmware and kvm-unit-tests ask fw_cfg for, and the embedder's own files."""
        cpus = self.config.cpus
        self.fw_cfg.describe_machine(cpus, cpus, self.memory.size_bytes, e820.pack_fw_cfg(self.memory.regions))
        for name, data in self.config.fw_cfg.items():
            self.fw_cfg.add_file(name, bytes(data))

    def make_virtio_devices(self) -> None:
        """What the Spec asks for of them."""
        if self.config.wants_virtio:
            from pyvmm.boards.virtio import make_all

            make_all(self)

    def new_generation(self) -> None:
        self.vmgenid.change()

    # -- wake-up -----------------------------------------------------------------------------------------------

    def waking_state(self) -> BootState | None:
        """Firmware finds the waking vector by itself, told so by a byte in CMOS; without firmware we enter it."""
        if self.starts_in_firmware:
            from pyvmm.devices.rtc import SHUTDOWN, SHUTDOWN_S3

            self.rtc.cmos[SHUTDOWN] = SHUTDOWN_S3
            return None
        return super().waking_state()

    def woken(self, events: int) -> None:
        self.pm.woken(events)

    def press_power_button(self) -> None:
        self.pm.press()


def rtc_aml() -> bytes:
    from pyvmm.x86 import acpi

    return acpi.rtc()


def pvpanic_aml() -> bytes:
    from pyvmm.x86 import acpi

    return acpi.pvpanic()


def generation_aml() -> bytes:
    from pyvmm.x86 import acpi

    return acpi.vm_generation_id()


def keyboard_aml() -> bytes:
    from pyvmm.x86 import acpi

    return acpi.keyboard()
