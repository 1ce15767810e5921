"""The recipe: from a MachineConfig to a machine that is paused at its first instruction, top to bottom.

The order is KVM's: memory slots before the irqchip (each slot change after it waits for an SRCU grace period), the
irqchip before the vCPUs (which get their local APICs from it).
"""

from __future__ import annotations

from pyvmm.cpu import Cpu
from pyvmm.cpu_exec import CpuExec
from pyvmm.device import IrqWire
from pyvmm.errors import ConfigError, remedy_for_path
from pyvmm.guest_memory import GuestMemory
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.vm import MEM_READONLY
from pyvmm.kvm_clock import KvmClock
from pyvmm.light import Thread
from pyvmm.memory_map import WINDOW, WINDOW_END, MemoryMap
from pyvmm.x86 import e820, layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType
    from typing import Any

    from pyvmm.address_space import AddressSpace
    from pyvmm.chardev import Chardev
    from pyvmm.clock import Clock
    from pyvmm.config import Image, Serial
    from pyvmm.device import IrqLine
    from pyvmm.kvm.system import CpuidEntry
    from pyvmm.kvm.vm import Vm
    from pyvmm.machine import Machine
    from pyvmm.terminal import Terminal
    from pyvmm.x86.boot import BootState

PIC_MASTER, PIC_SLAVE, IOAPIC = 0, 1, 2
XAPIC_CPUS = 255  # an APIC id of eight bits tells so many apart: the last value is the broadcast
X2APIC_FLAGS = 0b11  # KVM_X2APIC_API_USE_32BIT_IDS, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
KVM_IOAPIC_BYTES = 0x100  # what of its page the kernel's own decodes (IOAPIC_MEM_LENGTH)
POWER_BUTTON = 0x100  # of PM1's status (ACPI 6.5, 4.8.3.1.1)
# How long a character of console output may wait for more, after another: nobody sees that, and a write a line is far
# cheaper than a write a character.
CONSOLE_GATHER_NS = 10_000_000


class Images:
    """The files a machine boots from, mapped as long as it lives: a reset loads them again."""

    def __init__(self) -> None:
        self._open: dict[int, memoryview] = {}
        self._maps: list[Any] = []

    def get(self, image: Image, what: str) -> memoryview:
        """The bytes of a path or a buffer. ConfigError where the file can't be read, or is empty."""
        import os

        if not isinstance(image, (str, os.PathLike)):
            return memoryview(image).cast("B")
        if id(image) not in self._open:
            self._open[id(image)] = self._map(os.fspath(image), what)
        return self._open[id(image)]

    def _map(self, path: str, what: str) -> memoryview:
        import mmap
        import os
        import stat

        try:
            if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
                raise ConfigError(f"{what} {path} is a device or a pipe: give a file, or its bytes")
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except OSError as error:
            why = remedy_for_path(path, error, "give a file that can be read")
            raise ConfigError(f"{what} {path}: {why}") from None
        except ValueError:
            raise ConfigError(f"{what} {path} is empty: give a whole image") from None
        self._maps.append(mapped)
        return memoryview(mapped)

    def close(self) -> None:
        for view in self._open.values():
            view.release()
        for mapped in self._maps:
            mapped.close()
        self._open.clear()
        self._maps.clear()


def build(m: Machine) -> None:
    """All of it. On an error the machine is closed by its owner, whatever was made so far."""
    config = m.config
    m.memory = GuestMemory(
        config.memory_mib * layout.MIB, shared=config.shared_memory, huge_pages=config.huge_pages
    )
    pc = pc_board() if config.machine == "pc" else None
    if pc is not None:
        pc.add_roms(m)
    m.memory_map = MemoryMap(m.memory, m.mmio)
    if pc is not None:
        pc.open_window(m)
    reserve_memory(m)
    if config.accel == "kvm":
        open_kvm(m)
    if not in_kernel_irqchip(m):
        make_user_irqchip(m)
    make_devices(m)
    if pc is not None:
        pc.make_devices(m)
    boot = load_guest(m)
    if config.accel == "kvm":
        make_cpus(m)
        m.kvm_clock = KvmClock(m.vm, m.cpus)
        if boot is not None:
            enter_guest(m, boot)
        if m._coalesced:
            attach_ring(m, m.pio)
        if m.vm.has_irqchip or m._coalesced:
            in_background(m, lambda: settle(m))
    elif m.terminal is not None:
        m.terminal.start()


def pc_board() -> ModuleType:
    from pyvmm.boards import pc

    return pc


def reserve_memory(m: Machine) -> None:
    """No device can be where RAM or ROM answers for good; a pc's window below 1 MiB changes as the guest says."""
    window = range(WINDOW, WINDOW_END) if m.config.machine == "pc" else ()
    for section in m.memory_map.sections:
        if section.gpa not in window:
            m.mmio.reserve(section.gpa, section.size, section.region.name)


def open_kvm(m: Machine) -> None:
    """The VM, its memory slots, then its irqchip: in the order that is quick."""
    m.kvm = Kvm()
    check_limits(m)
    m.vm = m.kvm.create_vm()
    set_slot = m.vm.set_memory_slot
    m.memory_map.attach(
        lambda slot, gpa, size, host, readonly: set_slot(slot, gpa, size, host, MEM_READONLY if readonly else 0)
    )
    # Required before the first vCPU on Intel's processors (api.rst), with any irqchip.
    m.vm.set_tss_address(layout.KVM_TSS)
    m.vm.set_identity_map_address(layout.KVM_IDENTITY_MAP)
    m.mmio.reserve(layout.KVM_PAGES, layout.KVM_PAGES_BYTES, "pages of KVM's own")
    if m.config.cpus > XAPIC_CPUS:
        use_x2apic_ids(m, m.vm)
    if m.config.irqchip == "kernel":
        make_kernel_irqchip(m)


def settle(m: Machine) -> None:
    """What waits for grace periods in KVM, longer than all of the recipe: it comes last, and nothing waits for it."""
    if m.vm.has_irqchip:
        # A guest slow to take its ticks is not to be flooded with them later.
        m.vm.set_pit_reinject(False)
    for space, address, size in m._coalesced:
        m.vm.coalesce(address, size, pio=space is m.pio)


def check_limits(m: Machine) -> None:
    limit = m.kvm.check_extension("KVM_CAP_MAX_VCPUS")
    if m.config.cpus > limit:
        raise ConfigError(f"{m.config.cpus} vCPUs: this host's KVM takes at most {limit}, ask for fewer")


def use_x2apic_ids(m: Machine, vm: Vm) -> None:
    """APIC ids of 32 bits in all that KVM is told, and 255 the id of one processor: before the irqchip.

    Linux virt/kvm/api.rst, KVM_CAP_X2APIC_API.
    """
    from pyvmm.kvm.system import CAPABILITIES

    capability = "KVM_CAP_X2APIC_API"
    if m.kvm.check_extension(capability) & X2APIC_FLAGS != X2APIC_FLAGS:
        raise ConfigError(f"{m.config.cpus} vCPUs: this host's KVM has no x2APIC ids, ask for at most {XAPIC_CPUS}")
    vm.enable_cap(CAPABILITIES[capability], X2APIC_FLAGS)


# -- interrupts ------------------------------------------------------------------------------------------------


def make_kernel_irqchip(m: Machine) -> None:
    m.vm.create_irqchip()
    m.vm.create_pit()
    m.vm.set_gsi_routing(pc_routes())
    # An access there never comes to us.
    for space, address, size, name in (
        (m.pio, layout.PORT_PIC_MASTER, 2, "KVM's PIC"),
        (m.pio, layout.PORT_PIC_SLAVE, 2, "KVM's PIC"),
        (m.pio, layout.PORT_PIC_ELCR, 2, "KVM's PIC"),
        (m.pio, layout.PORT_PIT, 4, "KVM's PIT"),
        (m.pio, layout.PORT_SPEAKER, 1, "KVM's PIT"),
        (m.mmio, layout.IOAPIC, KVM_IOAPIC_BYTES, "KVM's IOAPIC"),
        (m.mmio, layout.LAPIC, layout.LAPIC_BYTES, "KVM's local APIC"),
    ):
        space.reserve(address, size, name)


def in_background(m: Machine, work: Callable[[], None]) -> None:
    """``work()`` on a thread of its own; it is over when tear_down closes the machine. What it raises ends the run."""
    def body() -> None:
        try:
            work()
        except BaseException as error:
            m._loop_raised(error)

    thread = Thread(body)
    thread.start()
    m._background.append(thread)


def pc_routes() -> list[tuple[int, str, int, int]]:
    """GSI n to pin n of the PIC pair and of the IOAPIC; but the timer's wire goes to IOAPIC pin 2, as on a PC."""
    routes = [
        (gsi, "irqchip", PIC_MASTER if gsi < 8 else PIC_SLAVE, gsi & 7) for gsi in range(layout.ISA_IRQS)
    ]
    for gsi in range(layout.IOAPIC_PINS):
        if gsi != layout.GSI_TIMER:
            pin = layout.GSI_TIMER if gsi == layout.IRQ_TIMER else gsi
            routes.append((gsi, "irqchip", IOAPIC, pin))
    return routes


def in_kernel_irqchip(m: Machine) -> bool:
    return m.config.irqchip == "kernel" and m.config.accel == "kvm"


def irq_line(m: Machine, irq: int) -> IrqLine:
    """Another line to ISA interrupt ``irq``, into whichever controller the machine has; ORed with those there are."""
    wire = m._wires.get(irq)
    if wire is None:
        set_irq = m.vm.irq_line if m.user_irqchip is None else m.user_irqchip.set_irq
        wire = m._wires[irq] = IrqWire(lambda level: set_irq(irq, level), irq)
    return wire.line()


# -- devices ---------------------------------------------------------------------------------------------------


def make_devices(m: Machine) -> None:
    """The board: what every PC-like guest expects to find, at the ports of layout.py."""
    from pyvmm.devices.acpi_pm import AcpiPm
    from pyvmm.devices.fw_cfg import FwCfg
    from pyvmm.devices.reset_control import ResetControl
    from pyvmm.devices.serial import Serial

    pio, config = m.pio, m.config
    gather_ns = CONSOLE_GATHER_NS if config.accel == "kvm" else 0
    serial = Serial(irq_line(m, layout.IRQ_COM1), chardev(m, config.serial, "serial"), m.clock, gather_ns=gather_ns)
    pm = AcpiPm(
        m.clock,
        irq_line(m, layout.IRQ_SCI),
        m.guest_shutdown,
        s5_type=layout.SLP_TYP_S5,
        s3_type=None if config.no_s3 else layout.SLP_TYP_S3,
        on_suspend=m.guest_suspend,
        on_wake=m.guest_wake,
    )
    reset = ResetControl(lambda: m.guest_reset(by=f"port {layout.PORT_RESET:#x}, the reset register of ACPI and PCI"))
    fw_cfg = FwCfg(m.memory)
    m.devices.update(serial=serial, acpi_pm=pm, reset_control=reset, fw_cfg=fw_cfg)
    pio.add(layout.PORT_COM1, serial.region)
    if config.machine == "microvm":
        # On a pc the chipset's functions say where these are.
        pio.map(layout.PORT_PM, 12, pm, name="acpi_pm")
        pio.map(layout.PORT_RESET, 1, reset, name="reset")
    pio.map(layout.PORT_FW_CFG, 2, fw_cfg, name="fw_cfg")
    pio.map(layout.PORT_FW_CFG_DMA, 8, fw_cfg.dma, name="fw_cfg.dma")
    make_legacy_devices(m)
    make_debug_devices(m)
    if config.vga == "text":
        make_vga(m)
    describe(m, fw_cfg)


def make_legacy_devices(m: Machine) -> None:
    from pyvmm.devices.i8042 import I8042
    from pyvmm.devices.port92 import Port92
    from pyvmm.devices.rtc import Rtc

    low = min(m.memory.size_bytes, layout.RAM_HOLE)
    rtc = Rtc(
        irq_line(m, layout.IRQ_RTC),
        m.clock,
        ram_below_4g_bytes=low,
        ram_above_4g_bytes=m.memory.size_bytes - low,
        cpus=m.config.cpus,
        on_alarm=m.devices["acpi_pm"].rtc_alarm,  # type: ignore[attr-defined]  # make_devices made an AcpiPm
    )
    i8042 = I8042(
        irq_line(m, layout.IRQ_KEYBOARD),
        lambda: m.guest_reset(by=f"port {layout.PORT_I8042_COMMAND:#x}, the keyboard controller"),
    )
    port92 = Port92(lambda: m.guest_reset(by=f"port {layout.PORT_FAST_A20:#x}"))
    m.devices.update(rtc=rtc, i8042=i8042, port92=port92)
    m.pio.map(layout.PORT_RTC, 2, rtc, name="rtc")
    m.pio.map(layout.PORT_I8042_DATA, 1, i8042, name="i8042.data")
    m.pio.map(layout.PORT_I8042_COMMAND, 1, i8042.command, name="i8042.command")
    m.pio.map(layout.PORT_FAST_A20, 1, port92, name="port92")


def make_user_irqchip(m: Machine) -> None:
    """irqchip='off': all controllers and the PIT in Python; their output reaches the one vCPU when that is made."""
    from pyvmm.devices.i8254 import I8254
    from pyvmm.devices.user_irqchip import UserIrqchip

    chip = UserIrqchip(m.clock, lambda level: m.cpus[0].exec.interrupt(level) if m.cpus else None)
    m.user_irqchip = chip
    pit = I8254(m.clock, irq_line(m, layout.IRQ_TIMER))
    m.devices.update(pic=chip.pic, ioapic=chip.ioapic, lapic=chip.lapic, pit=pit)
    m.pio.map(layout.PORT_PIC_MASTER, 2, chip.pic.master, name="pic.master")
    m.pio.map(layout.PORT_PIC_SLAVE, 2, chip.pic.slave, name="pic.slave")
    m.pio.map(layout.PORT_PIC_ELCR, 2, chip.pic.elcr, name="pic.elcr")
    m.mmio.map(layout.IOAPIC, layout.IOAPIC_BYTES, chip.ioapic, name="ioapic")
    m.mmio.map(layout.LAPIC, layout.LAPIC_BYTES, chip.lapic, name="lapic")
    m.pio.map(layout.PORT_PIT, 4, pit, name="pit")
    m.pio.map(layout.PORT_SPEAKER, 1, pit.speaker, name="speaker")


def make_debug_devices(m: Machine) -> None:
    """POST codes, the debug console, isa-debug-exit and, asked for, pc-testdev."""
    from pyvmm.devices.debug_exit import DebugExit
    from pyvmm.devices.debugcon import DebugCon
    from pyvmm.devices.port80 import Port80

    config = m.config
    port80 = Port80()
    m.devices["port80"] = port80
    m.pio.map(layout.PORT_POST, 1, port80, name="port80")
    if config.machine == "microvm" or config.debugcon not in (None, "none"):
        # Where it answers SeaBIOS writes a log to it, one exit a character: not for nobody.
        debugcon = DebugCon(chardev(m, config.debugcon, "debugcon"))
        m.devices["debugcon"] = debugcon
        m.pio.map(layout.PORT_DEBUG_CONSOLE, 1, debugcon, name="debugcon")
    if config.debug_exit is not None:
        debug_exit = DebugExit(m.debug_exit)
        m.devices["debug_exit"] = debug_exit
        m.pio.map(config.debug_exit, 4, debug_exit, name="isa-debug-exit")
    if config.testdev:
        make_testdev(m)


def make_vga(m: Machine) -> None:
    """Text mode. Its memory is there: part of RAM where nothing is cut out below 1 MiB, else a region of its own."""
    from pyvmm.devices import vga_text

    vga = vga_text.VgaText(lambda: m.memory_map.read(layout.VGA_TEXT, layout.VGA_TEXT_BYTES), m.clock)
    m.vga = m.devices["vga"] = vga
    m.pio.map(layout.PORT_VGA, vga_text.PORTS, vga, name="vga")
    m.pio.map(
        layout.PORT_VGA_MONO, vga_text.MONO_PORTS, vga, name="vga.mono", read=vga.read_mono, write=vga.write_mono
    )
    if m.config.raw_terminal:
        from pyvmm.terminal_screen import TerminalScreen

        line = terminal(m)
        m.screen = TerminalScreen(vga.frame, m.event_loop.clock, line.type_to_console, lambda: line.can_write)
        line.set_screen(m.screen, first=True)


def make_testdev(m: Machine) -> None:
    from pyvmm.address_space import BufferRegion
    from pyvmm.devices.testdev import TestDev

    lines = [irq_line(m, n) for n in range(layout.IOAPIC_PINS)]

    def set_gsi(n: int, level: int) -> None:
        if n < len(lines):
            lines[n].set(level)

    testdev = TestDev(m.memory.drop_mapping, set_gsi)
    m.devices["testdev"] = testdev
    m.pio.map(layout.PORT_TESTDEV, 4, testdev, name="testdev.latch")
    m.pio.map(layout.PORT_TESTDEV + 4, 4, testdev.flush, name="testdev.flush")
    m.pio.map(layout.PORT_TESTDEV + 8, 4, testdev.latch_bytes, name="testdev.bytes")
    m.pio.map(layout.PORT_TESTDEV_IRQ, 24, testdev.irqs, name="testdev.irqs")
    m.mmio.add(layout.TESTDEV_MEMORY, BufferRegion(testdev.memory, name="testdev.memory"))


def describe(m: Machine, fw_cfg: Any) -> None:
    """What firmware and kvm-unit-tests ask fw_cfg for."""
    config = m.config
    fw_cfg.describe_machine(config.cpus, config.cpus, m.memory.size_bytes, e820.pack_fw_cfg(m.memory.regions))
    if config.machine == "microvm" and config.uuid is not None:
        from pyvmm.devices.fw_cfg import UUID
        from pyvmm.x86 import smbios

        fw_cfg.add(UUID, smbios.parse_uuid(config.uuid))  # a pc's is among what it tells firmware
    for name, data in config.fw_cfg.items():
        fw_cfg.add_file(name, bytes(data))


def chardev(m: Machine, spec: Serial, name: str) -> Chardev:
    """The host's side of the console ``name``, from the words of MachineConfig.serial."""
    made = m.consoles[name] = open_chardev(m, spec, name)
    if made is not spec:
        m.chardevs.append(made)  # the embedder's own is closed by the embedder
    return made


def open_chardev(m: Machine, spec: Serial, name: str) -> Chardev:
    from pyvmm import chardev as c

    if spec is None or spec == "none":
        return c.NullChardev()
    if isinstance(spec, c.Chardev):
        return spec
    if callable(spec):
        return c.CallableChardev(spec)
    if spec == "stdio":
        return terminal(m).console(name)
    if spec == "pty":
        return c.PtyChardev(m.event_loop)
    if spec.startswith("file:") and len(spec) > len("file:"):
        return c.FileChardev(spec[len("file:") :], m.event_loop)
    raise ConfigError(f"{name} {spec!r}: use none, stdio, pty or file:PATH")


def terminal(m: Machine) -> Terminal:
    """The one owner of standard input and output. A command's has an escape, and ends the run when nobody reads."""
    if m.terminal is None:
        import os

        from pyvmm.terminal import Terminal

        raw = m.config.raw_terminal and os.isatty(0)
        made = m.terminal = Terminal(
            m.event_loop,
            raw=raw,
            escape=raw,
            on_quit=lambda: m.stop(0, "quit"),
            on_gone=m.reader_gone if m.config.raw_terminal else None,
        )
        made.add_key("w", "wake a guest that has suspended itself", lambda: wake_if_suspended(m))

        def show(text: str) -> None:
            made.show(f"\n{text}".replace("\n", "\r\n").encode())

        made.add_key("r", "registers of every vCPU", lambda: m.dump_later(show))
    return m.terminal


def wake_if_suspended(m: Machine) -> None:
    """As Machine.wakeup, without waiting for it, and for a guest that is awake as well."""
    if m.control.suspended:
        m.guest_wake(POWER_BUTTON)


# -- the guest -------------------------------------------------------------------------------------------------


def load_guest(m: Machine, *, clean: bool = True) -> BootState | None:
    """Tables and images into memory. None where there is neither kernel nor flat binary: the reset state stays."""
    from pyvmm.x86 import boot

    config, images = m.config, m._images
    if config.flat is not None:
        address = config.flat_address
        if address is None:
            address = layout.BOOT_SECTOR if config.flat_mode == "real16" else layout.KERNEL
        return boot.load(
            m.memory,
            images.get(config.flat, "flat binary"),
            name=image_name(config.flat, "flat binary"),
            flat_address=address,
            flat_mode=config.flat_mode,
            clean=clean,
        )
    if config.kernel is None or config.firmware is not None:
        return None  # firmware boots a kernel by itself, out of fw_cfg
    kernel = images.get(config.kernel, "kernel")
    modules = [(images.get(image, "module"), line) for image, line in config.modules]
    initrd = images.get(config.initrd, "initrd") if config.initrd is not None else None
    named = [image for image, _ in config.modules] or ([config.initrd] if config.initrd is not None else [])
    rsdp = write_tables(m)
    return boot.load(
        m.memory,
        kernel,
        name=image_name(config.kernel, "kernel"),
        initrd=modules or initrd,
        module_names=[image_name(image, "module") for image in named],
        append=config.append,
        acpi_rsdp=rsdp,
        clean=clean,
    )


def image_name(image: Image, otherwise: str) -> str:
    """What to call it in messages, and the first word of a multiboot kernel's or module's command line."""
    import os

    return os.fsdecode(image) if isinstance(image, (str, os.PathLike)) else otherwise


def write_tables(m: Machine) -> int:
    """ACPI and MP tables into the BIOS area; the ACPI root pointer's address."""
    if m.config.machine == "pc":
        return int(pc_board().write_tables(m))
    from pyvmm.x86 import acpi, mptable

    tables = acpi.build(m.config.cpus, s3=not m.config.no_s3, vga=m.vga is not None)
    tables.write(m.memory)
    mptable.write(m.memory, m.config.cpus)
    return tables.rsdp


def make_cpus(m: Machine) -> None:
    for index in range(m.config.cpus):
        vcpu = m.vm.create_vcpu(index)
        table = cpuid_table(m, index)
        vcpu.cpuid = table
        loop = CpuExec(vcpu, m.pio, m.mmio, user_irqchip=m.user_irqchip is not None)
        if m.user_irqchip is not None:
            loop.acknowledge = m.user_irqchip.acknowledge
            loop.on_tpr = m.user_irqchip.lapic.look_at_cpu
            m.user_irqchip.lapic.cpu = loop
        m.cpus.append(Cpu(index, vcpu, loop, m.control, m._cpu_stopped, table))
    if m.vm.has_irqchip and m.config.cpus > 1:
        # KVM makes its map of local APICs anew when one of them changes, and a new vCPU is in it only then: or INIT
        # and SIPI never reach the last one, where the guest has not touched its own APIC before.
        vcpu.lapic = vcpu.lapic


# What cpuid.build made, by its arguments: it takes longer than making the vCPU. Nothing in it is of one machine.
_cpuid_tables: dict[tuple[object, ...], list[CpuidEntry]] = {}


def cpuid_table(m: Machine, index: int) -> list[CpuidEntry]:
    config = m.config
    irqchip = config.irqchip == "kernel"
    key = (m.kvm.device, config.cpu, config.cpus, irqchip, index)
    if key not in _cpuid_tables:
        from pyvmm.x86 import cpuid

        deadline = irqchip and bool(m.kvm.check_extension("KVM_CAP_TSC_DEADLINE_TIMER"))
        _cpuid_tables[key] = cpuid.build(
            m.kvm.supported_cpuid(),
            spec=config.cpu,
            apic_id=index,
            cpus=config.cpus,
            irqchip=irqchip,
            tsc_deadline=deadline,
            brand=[m.kvm.host_cpuid(function) for function in cpuid.BRAND_STRING],
        )
    return _cpuid_tables[key]


def cpu_vendor(m: Machine) -> str:
    """The host's CPUID vendor string: whose exit codes a hardware exit reason is."""
    from pyvmm.x86 import cpuid

    return cpuid.identity(m.kvm.supported_cpuid())[2]


def cpu_identity(m: Machine) -> tuple[int, int, str] | None:
    """What a guest's inventory says of its processors. None without one."""
    from pyvmm.x86 import cpuid

    return cpuid.identity(cpuid_table(m, 0)) if m.config.accel == "kvm" else None


def enter_guest(m: Machine, boot: BootState) -> None:
    """The first vCPU at the guest's entry; the others wait for INIT and SIPI, as KVM made them."""
    vcpu = m.cpus[0].vcpu
    regs, sregs = vcpu.regs, vcpu.sregs
    boot.apply(regs, sregs)
    vcpu.sregs = sregs
    vcpu.regs = regs


# -- reset and the end -----------------------------------------------------------------------------------------


def power_on_state(m: Machine) -> dict[str, Any]:
    """The kernel's side of a machine that has just been made: read from one that is made for it and thrown away.

    Costs a few milliseconds at a reset, and nothing at the start of the many machines that never see one.
    """
    from pyvmm.x86 import vcpu_state

    indices = m.kvm.msr_indices()
    twin = m.kvm.create_vm()
    try:
        state: dict[str, Any] = {}
        if m.config.cpus > XAPIC_CPUS:
            use_x2apic_ids(m, twin)
        if m.vm.has_irqchip:
            twin.create_irqchip()
            twin.create_pit()
            state["irqchips"] = [twin.get_irqchip(chip) for chip in (PIC_MASTER, PIC_SLAVE, IOAPIC)]
            state["pit"] = twin.get_pit()
        state["vcpus"] = []
        for cpu in m.cpus:
            vcpu = twin.create_vcpu(cpu.index)
            vcpu.cpuid = cpu.cpuid
            state["vcpus"].append(vcpu_state.save(vcpu, indices, lapic=m.vm.has_irqchip))
            vcpu.close()
        return state
    finally:
        twin.close()


def reset(m: Machine) -> None:
    """The kernel's side back to power-on, the guest's images loaded anew. Every vCPU is parked."""
    if m.config.accel == "kvm":
        reset_kernel(m)
    if m.config.machine == "pc":
        pc_board().after_reset(m)
    boot = load_guest(m, clean=False)
    if boot is not None and m.cpus:
        enter_guest(m, boot)


def wake(m: Machine, events: int) -> None:
    """Out of suspend to RAM: processors and chips have been without power, memory has not. Every vCPU is parked.

    Firmware finds the way to the waking vector by itself, told by a byte in CMOS; without, we go there.
    """
    from pyvmm.x86.wake import waking_state

    if m.config.accel == "kvm":
        reset_kernel(m)
    if m.config.machine == "pc":
        pc_board().after_wake(m)
    if starts_in_firmware(m):
        from pyvmm.devices.rtc import SHUTDOWN, SHUTDOWN_S3

        m.devices["rtc"].cmos[SHUTDOWN] = SHUTDOWN_S3  # type: ignore[attr-defined]  # an Rtc
    elif m.cpus:
        # A guest that has left no vector is started again, as firmware would do.
        state = waking_state(m.memory) or load_guest(m, clean=False)
        if state is not None:
            enter_guest(m, state)
    m.devices["acpi_pm"].woken(events)  # type: ignore[attr-defined]  # an AcpiPm


def starts_in_firmware(m: Machine) -> bool:
    return m.config.machine == "pc" and bool(pc_board().uses_firmware(m))


def reset_kernel(m: Machine) -> None:
    from pyvmm.x86 import vcpu_state

    state = power_on_state(m)
    if m.vm.has_irqchip:
        for chip in state["irqchips"]:
            m.vm.set_irqchip(chip)
        m.vm.set_pit(state["pit"])
    for cpu, saved in zip(m.cpus, state["vcpus"], strict=True):
        vcpu_state.load(cpu.vcpu, saved)
        cpu.was_reset()
    if m.kvm_clock is not None:
        m.kvm_clock.forget_timers()


def coalesce(m: Machine, space: AddressSpace, address: int, size: int) -> None:
    """Register the zone, and have every vCPU drain the ring."""
    attach_ring(m, space)
    m.vm.coalesce(address, size, pio=space is m.pio)


def attach_ring(m: Machine, space: AddressSpace) -> None:
    """Every vCPU drains the ring from now on. ConfigError where KVM has none for this space."""
    offset = m.kvm.check_extension("KVM_CAP_COALESCED_PIO" if space is m.pio else "KVM_CAP_COALESCED_MMIO")
    if not offset:
        raise ConfigError(f"this host's KVM does not coalesce {space.name} writes: map the range without it")
    page = m.kvm.check_extension("KVM_CAP_COALESCED_MMIO")
    for cpu in m.cpus:
        cpu.exec.coalesced_ring(page, m._ring_lock)


def virtual_clock() -> Clock:
    """Guest time that stands still until somebody moves it; the wall clock starts at the host's."""
    from time import time_ns

    from pyvmm.clock import VirtualClock

    return VirtualClock(wall_ns=time_ns())


def tear_down(m: Machine) -> None:
    """Close what build made, in the other order. The vCPU threads have ended.

    What one step raises (the embedder's own console, say) comes out when all are done.
    """
    first: Exception | None = None
    for step in last_steps(m):
        try:
            step()
        except Exception as error:
            first = first or error
    if first is not None:
        raise first


def last_steps(m: Machine) -> Iterator[Callable[[], object]]:
    for thread in m._background:
        yield thread.join
    if "debugcon" in m.devices:
        yield m.devices["debugcon"].flush  # type: ignore[attr-defined]  # a DebugCon: its last line may have no end
    for backend in m.backends.values():
        yield backend.close
    for made in m.chardevs:
        yield made.close
    if m.terminal is not None:
        if m.screen is not None:
            yield lambda: leave_screen(m)
        yield m.terminal.close
    yield m.event_loop.close
    for cpu in m.cpus:
        yield cpu.exec.close
        yield cpu.vcpu.close
    yield from (getattr(m, name).close for name in ("memory_map", "vm", "kvm", "memory") if hasattr(m, name))
    if "fw_cfg" in m.devices:
        yield m.devices["fw_cfg"].close  # type: ignore[attr-defined]  # a FwCfg: it may have views of the images
    yield m._images.close
    for space in (m.pio, m.mmio):
        yield from (lambda region=region, space=space: space.unmap(region) for region in space.regions)
    yield m.devices.clear


def leave_screen(m: Machine) -> None:
    """The consoles again; what was on the screen stays to be read, as lines of text."""
    assert m.terminal is not None and m.screen is not None
    if m.terminal.leave_screen():
        m.terminal.show(m.screen.last_words())


def abandon(m: Machine) -> None:
    """In a child of fork: give its copies of descriptors and mappings back, and touch nothing that the parent has too.

    No lock is taken: it may have been held, at the moment of the fork, by a thread that only the parent has.
    """
    m.event_loop.abandon()
    for made in m.chardevs:
        made.abandon()
    if m.terminal is not None:
        m.terminal.abandon()
    for backend in m.backends.values():
        backend.abandon()
    for cpu in m.cpus:
        cpu.exec.abandon()
        cpu.vcpu.close()
    for name in ("memory_map", "vm", "kvm", "memory"):
        if hasattr(m, name):
            getattr(m, name).close()
    m.devices.clear()
    try:
        m._images.close()
    except BufferError:
        pass  # a device of the embedder's has a view of one: it goes with that
