"""The legacy set: what every PC-like guest expects to find, at the ports of layout.py."""

from __future__ import annotations

from pyvmm.boards.board import Board, made_of, part_of, serial_aml
from pyvmm.late import Late
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boards.isa_checks import Ports
    from pyvmm.chardev import Chardev
    from pyvmm.devices.acpi_gpe import GpeBlock
    from pyvmm.devices.acpi_pm import AcpiPm
    from pyvmm.devices.debug_exit import DebugExit
    from pyvmm.devices.debugcon import DebugCon
    from pyvmm.devices.fw_cfg import FwCfg
    from pyvmm.devices.i8042 import I8042
    from pyvmm.devices.port80 import Port80
    from pyvmm.devices.port92 import Port92
    from pyvmm.devices.pvpanic import PvPanic
    from pyvmm.devices.reset_control import ResetControl
    from pyvmm.devices.rtc import Rtc
    from pyvmm.devices.serial import Serial
    from pyvmm.devices.testdev import TestDev
    from pyvmm.devices.vmgenid import VmGenId
    from pyvmm.late import Place
    from pyvmm.spec import Spec
    from pyvmm.x86.cpu_state import BootState


class IsaBoard(Board):
    """What microvm and pc have in common: ``make_isa_devices``."""

    pm_port: int | None = None
    """Where ACPI's PM block is on a board without a chipset that has it elsewhere."""
    reset_port: int | None = None
    """The same of the reset register."""
    debug_exit: DebugExit | None = None
    testdev: TestDev | None = None
    pvpanic: PvPanic | None = None
    _fw_cfg: FwCfg | None = None  # once it is made

    @classmethod
    def check(cls, config: Spec) -> None:
        if config.fw_cfg or config.debug_exit not in (None, layout.PORT_DEBUG_EXIT):
            from pyvmm.boards.isa_checks import check_debug_exit, check_files

            check_debug_exit(config, cls.chipset_ports(), debugcon=cls.has_debugcon(config))
            check_files(config, cls.firmware_files())
        if config.wants_virtio:
            from pyvmm.boards import virtio_interfaces

            virtio_interfaces.check(config)

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

    def make_first_devices(self) -> None:
        """The end of many a guest is its first and only access."""
        if self.config.debug_exit is not None:
            self._map_debug_exit(self.config.debug_exit)

    def make_isa_devices(self) -> None:
        """COM1; ACPI's PM block and events, the generation's number, the reset register, fw_cfg, RTC, i8042, port 0x92,
        POST codes, all of which are made when somebody wants them; and what is asked for.
        """
        self._add_com1()
        # What others may ask about before that: who has which interrupt, what memory there was.
        self._sci = self.irq_line(layout.IRQ_SCI, "acpi_pm")
        self._rtc_irq = self.irq_line(layout.IRQ_RTC, "rtc")
        self._keyboard_irq = self.irq_line(layout.IRQ_KEYBOARD, "i8042")
        self._ram = self.memory.regions
        self.chassis.closers.call(self._close_fw_cfg)
        self.add_late(
            {
                "acpi_pm": Late(self._make_pm, *self.places_at(self.pm_port, layout.PM_BYTES, "acpi_pm")),
                "gpe0": Late(self._make_gpe, *self.places_at(layout.PORT_GPE0, layout.PORT_GPE0_BYTES, "gpe0")),
                "vmgenid": Late(
                    self._make_vmgenid, (self.mmio, layout.VM_GENERATION_ID, 16, "vmgenid", ""), differs=True
                ),
                "reset_control": Late(self._make_reset_control, *self.places_at(self.reset_port, 1, "reset")),
                "fw_cfg": Late(
                    self._make_fw_cfg,
                    *self.places_at(layout.PORT_FW_CFG, 2, "fw_cfg"),
                    *self.places_at(layout.PORT_FW_CFG_DMA, 8, "fw_cfg.dma", "dma"),
                ),
                "rtc": Late(self._make_rtc, *self.places_at(layout.PORT_RTC, 2, "rtc"), differs=True),
                "i8042": Late(
                    self._make_i8042,
                    *self.places_at(layout.PORT_I8042_DATA, 1, "i8042.data"),
                    *self.places_at(layout.PORT_I8042_COMMAND, 1, "i8042.command", "command"),
                ),
                "port92": Late(self._make_port92, *self.places_at(layout.PORT_FAST_A20, 1, "port92")),
                "port80": Late(self._make_port80, *self.places_at(layout.PORT_POST, 1, "port80")),
            }
        )
        self.describe(rtc_aml)
        self.describe(keyboard_aml)
        self.describe(generation_aml)
        if self.config.fw_cfg:
            self.part("fw_cfg")  # what is wrong with somebody's files is told now
        self._make_debug_devices()
        if self.config.vga == "text":
            self._make_vga()

    def places_at(self, port: int | None, size: int, name: str, part: str = "") -> tuple[Place, ...]:
        """``size`` ports from ``port`` on are those of ``part`` of a device that is made late. None: there are none."""
        if port is None:
            return ()
        return ((self.pio, self.ports.take(port, size, name), size, name, part),)

    # -- the devices, by name ----------------------------------------------------------------------------------

    @property
    def serial(self) -> Serial:
        serial: Serial = self.part("serial")
        return serial

    @property
    def debugcon(self) -> DebugCon | None:
        debugcon: DebugCon | None = self.part("debugcon") if self.has("debugcon") else None
        return debugcon

    @property
    def pm(self) -> AcpiPm:
        pm: AcpiPm = self.part("acpi_pm")
        return pm

    @property
    def gpe(self) -> GpeBlock:
        gpe: GpeBlock = self.part("gpe0")
        return gpe

    @property
    def vmgenid(self) -> VmGenId:
        vmgenid: VmGenId = self.part("vmgenid")
        return vmgenid

    @property
    def reset_control(self) -> ResetControl:
        reset_control: ResetControl = self.part("reset_control")
        return reset_control

    @property
    def fw_cfg(self) -> FwCfg:
        fw_cfg: FwCfg = self.part("fw_cfg")
        return fw_cfg

    @property
    def rtc(self) -> Rtc:
        rtc: Rtc = self.part("rtc")
        return rtc

    @property
    def i8042(self) -> I8042:
        i8042: I8042 = self.part("i8042")
        return i8042

    @property
    def port92(self) -> Port92:
        port92: Port92 = self.part("port92")
        return port92

    @property
    def port80(self) -> Port80:
        port80: Port80 = self.part("port80")
        return port80

    # -- how they are made: what they call knows the parts of the board, which are none when all is closed, and not the
    # -- board, so that a device that refers to itself by its region or its timer keeps no machine

    def _make_pm(self) -> AcpiPm:
        from pyvmm.devices.acpi_pm import AcpiPm

        power = self.chassis.power
        return AcpiPm(
            self.clock,
            self._sci,
            power.off,
            s5_type=layout.SLP_TYP_S5,
            s3_type=None if self.config.no_s3 else layout.SLP_TYP_S3,
            on_suspend=power.suspend,
            on_wake=power.wake,
            powered_on_ns=self.powered_on_ns[0],
        )

    def _make_gpe(self) -> GpeBlock:
        from pyvmm.devices.acpi_gpe import GpeBlock

        parts = self._parts

        def tell(pending: bool) -> None:
            if pending or made_of(parts, "acpi_pm") is not None:  # else it begins with none
                part_of(parts, "acpi_pm").general_event(pending)

        return GpeBlock(tell)

    def _make_vmgenid(self) -> VmGenId:
        from pyvmm.devices.vmgenid import VmGenId

        parts = self._parts
        return VmGenId(lambda: part_of(parts, "gpe0").happen(layout.GPE_VM_GENERATION))

    def _make_reset_control(self) -> ResetControl:
        from pyvmm.devices.reset_control import ResetControl

        why, power = f"port {layout.PORT_RESET:#x}, the reset register of ACPI and PCI", self.chassis.power
        return ResetControl(lambda: power.reset(by=why))

    def _make_fw_cfg(self) -> FwCfg:
        """With what firmware and kvm-unit-tests ask for, and the embedder's own files."""
        from pyvmm.devices.fw_cfg import FwCfg
        from pyvmm.x86 import e820

        cpus = self.config.cpus
        made = FwCfg(self.memory)
        made.describe_machine(cpus, cpus, self.memory.size_bytes, e820.pack_fw_cfg(self._ram))
        for name, data in self.config.fw_cfg.items():
            made.add_file(name, bytes(data))
        self._fw_cfg = made
        return made

    def _close_fw_cfg(self) -> None:
        """It may have views of the images."""
        if self._fw_cfg is not None:
            self._fw_cfg.close()

    def _make_rtc(self) -> Rtc:
        from pyvmm.devices.rtc import Rtc

        low = min(self.memory.size_bytes, layout.RAM_HOLE)
        parts = self._parts
        return Rtc(
            self._rtc_irq,
            self.clock,
            ram_below_4g_bytes=low,
            ram_above_4g_bytes=self.memory.size_bytes - low,
            cpus=self.config.cpus,
            on_alarm=lambda: part_of(parts, "acpi_pm").rtc_alarm(),
            powered_on_ns=self.powered_on_ns,
        )

    def _make_i8042(self) -> I8042:
        from pyvmm.devices.i8042 import I8042

        why, power = f"port {layout.PORT_I8042_COMMAND:#x}, the keyboard controller", self.chassis.power
        return I8042(self._keyboard_irq, lambda: power.reset(by=why))

    def _make_port92(self) -> Port92:
        from pyvmm.devices.port92 import Port92

        why, power = f"port {layout.PORT_FAST_A20:#x}", self.chassis.power
        return Port92(lambda: power.reset(by=why))

    def _make_port80(self) -> Port80:
        from pyvmm.devices.port80 import Port80

        return Port80()

    def _add_com1(self) -> None:
        """With a console at once. A guest that has none may never look at it; then input makes it, a program's."""
        if self.config.serial not in (None, "none"):
            self.add_serial()
            return
        consoles = self.chassis.consoles
        irq, console = self.irq_line(layout.IRQ_COM1, "serial"), consoles.open(None, "serial")

        def wanted() -> int:
            self.part("serial")  # it tells the console by itself how much it takes, and is asked again
            return 0

        def on_break() -> None:
            self.part("serial")
            console.send_break()

        console.set_receiver(lambda data: None, wanted, on_break)
        place = self.places_at(layout.PORT_COM1, 8, "serial", "region")
        self.add_late({"serial": Late(lambda: self.make_serial(irq, console), *place)})
        consoles.add_flush(lambda: self._flush("serial"))
        self.describe(serial_aml)

    def _flush(self, name: str) -> None:
        """What a device keeps back for a while, if it is made."""
        if (device := self.made(name)) is not None:
            device.flush()

    def _make_debug_devices(self) -> None:
        """The debug console, isa-debug-exit and, asked for, pvpanic and pc-testdev."""
        config = self.config
        if self.has_debugcon(config):
            console = self.chassis.consoles.open(config.debugcon, "debugcon")
            place = self.places_at(layout.PORT_DEBUG_CONSOLE, 1, "debugcon")
            self.add_late({"debugcon": Late(lambda: self._make_debugcon(console), *place)})
            # A line that has no end yet is nobody's hurry: the last one comes out when the machine is closed.
            self.chassis.closers.call(lambda: self._flush("debugcon"))
            self.chassis.consoles.add_flush(lambda: self._flush("debugcon"), in_a_pause=False)
        if config.debug_exit is not None:
            self.add("debug_exit", self.debug_exit or self._map_debug_exit(config.debug_exit))
        if config.pvpanic:
            self._make_pvpanic()
        if config.testdev:
            self._make_testdev()

    def _map_debug_exit(self, port: int) -> DebugExit:
        from pyvmm.devices.debug_exit import DebugExit

        made = self.debug_exit = DebugExit(self.chassis.power.debug_exit)
        self.map_ports(port, 4, made, "isa-debug-exit")
        return made

    def _make_debugcon(self, console: Chardev) -> DebugCon:
        from pyvmm.devices.debugcon import DebugCon

        return DebugCon(console)

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

    def make_virtio_devices(self) -> None:
        """What the Spec asks for of them."""
        if self.config.wants_virtio:
            from pyvmm.boards.virtio import make_all

            make_all(self)

    def new_generation(self) -> None:
        super().new_generation()
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
