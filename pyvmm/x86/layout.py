"""Every guest-physical address, I/O port and interrupt line of the machine, each with its reason.

The first MiB, as a directly booted kernel finds it (with firmware only the ports and the 32-bit holes apply):

    0x00000  IVT, BDA              left zero: no BIOS ran
    0x00500  conventional memory   flat images and multiboot kernels may load anywhere up to BOOT_AREA
    0x07000  multiboot info
    0x90000  BOOT_AREA             zero page, page tables, PVH start info, GDT, command line
    0x9d000  trampolines           left free: Linux puts its own here
    0x9fc00  BIOS area             reserved in the memory map: ACPI 0xe0000, MP table 0xf0000, SMBIOS 0xf8000
    0x100000 the kernel
"""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE_BYTES = 4096

# Real mode: 256 interrupt vectors, then the BIOS data area. Nothing of ours lies here, so that a guest that starts in
# real mode or returns to it owns both; zeros in the BDA mean "no EBDA, no COM ports" to whoever looks.
IVT = 0x0000
BDA = 0x0400
BDA_END = 0x0500

# The multiboot information, its strings and lists: above the BDA, below 0x8000-0xdfff where small kernels and
# stage-2 loaders are linked. multiboot.py goes elsewhere when the kernel itself wants this page.
MULTIBOOT_INFO = 0x7000
MULTIBOOT_KEEP_CLEAR = (0x8000, 0xE000)

# Where a real-mode image starts by the BIOS's own habit; also the first stack of a flat guest grows down from here.
BOOT_SECTOR = 0x7C00

# What a loader leaves for a kernel to read once. High in conventional memory, so that flat images linked low miss it.
BOOT_AREA = 0x9_0000
BOOT_STACK_TOP = BOOT_AREA  # grows down into free conventional memory
ZERO_PAGE = 0x9_0000  # struct boot_params; the Linux boot protocol's classic place for its real-mode part
PAGE_TABLES = 0x9_1000  # PML4, PDPT and four page directories: 4 GiB one-to-one in 2 MiB pages
PAGE_TABLES_BYTES = 6 * PAGE_BYTES
PVH_START_INFO = 0x9_7000  # start info, then module list, then memory map: one page holds them
BOOT_GDT = 0x9_8000
CMDLINE = 0x9_9000  # command lines, of the kernel and of the modules
CMDLINE_BYTES = 0x4000
# 0x9d000-0x9f000 stays free: Linux's decompressor puts its mode-switch trampoline in the two pages below 0x9f000.
BOOT_AREA_END = CMDLINE + CMDLINE_BYTES

# The last KiB of conventional memory is where an EBDA would start, and from here to 1 MiB is not RAM on a PC
# (video, option ROMs, BIOS). Here it is RAM that holds tables, so the memory map calls it reserved.
EBDA = 0x9_FC00
BIOS_AREA_END = 0x10_0000
# ACPI 6.5, 5.2.5.1: the root pointer is searched on 16-byte boundaries in 0xe0000-0xfffff.
ACPI_RSDP = 0xE_0000
ACPI_TABLES = 0xE_0040  # the FACS in them wants 64-byte alignment
FACS = ACPI_TABLES  # the first of them: where the guest leaves its waking vector
ACPI_TABLES_END = 0xF_0000
# MP spec 1.4, 4: the floating pointer is searched in the EBDA, the last KiB of base memory and
# 0xf0000-0xfffff. The last one: a configuration table for many processors is larger than the other two.
MP_TABLE = 0xF_0000
MP_TABLE_END = 0xF_8000
# SMBIOS 2.8, 5.2.1: the entry point is searched on 16-byte boundaries in 0xf0000-0xfffff. The structures follow it.
SMBIOS = 0xF_8000
SMBIOS_END = 0x10_0000

# What an i440FX switches between RAM, ROM and the bus: 128 KiB of legacy video, then what the PAM registers govern, one
# 16 KiB half a nibble, and PAM0 the last 64 KiB alone.
WINDOW = 0xA_0000
WINDOW_END = 0x10_0000
PAM = 0xC_0000
PAM_BYTES = 0x8000  # what one PAM register governs, but for the last
PAM_LAST = 0xF_0000  # PAM0's 64 KiB

# VGA's text memory, in colour modes.
VGA_TEXT = 0xB_8000
VGA_TEXT_BYTES = 0x8000

# Protected-mode kernels go to 1 MiB: the first address that is RAM on any PC and all that boot loaders promise.
KERNEL = 0x10_0000

# RAM stops here and goes on at 4 GiB: PCI windows, IOAPIC, LAPIC and firmware ROM lie between (as in QEMU).
RAM_HOLE = 0xC000_0000
RAM_HIGH = 0x1_0000_0000

# Where PCI devices get their memory: from the end of RAM, where that is low enough, or from the hole on; SeaBIOS begins
# to give out BARs there.
PCI_MEMORY_LOW = 0x8000_0000

PCI_BARS = 0xFE00_0000

# virtio-mmio transports, one page-eighth each as QEMU's microvm has them: in the hole, below the IOAPIC.
VIRTIO_MMIO = 0xFEB0_0000
VIRTIO_MMIO_BYTES = 0x200
VIRTIO_MMIO_END = 0xFEC0_0000

IOAPIC = 0xFEC0_0000  # the PC's fixed place (82093AA); KVM's in-kernel one has no other
IOAPIC_BYTES = 0x1000
LAPIC = 0xFEE0_0000  # IA32_APIC_BASE after reset (SDM vol. 3, 11.4.1)
LAPIC_BYTES = 0x1000
APIC_BASE_ENABLE = 1 << 11  # of IA32_APIC_BASE: the processor has its local APIC on

# On Intel processors without unrestricted guest KVM runs real mode with three pages of TSS and one of page
# table. No memory slot may overlap them (Linux virt/kvm/api.rst, KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR): so not
# below the end of 4 GiB, where firmware of up to 8 MiB lies. QEMU's place, above the local APIC.
KVM_IDENTITY_MAP = 0xFEFF_C000
KVM_TSS = 0xFEFF_D000
KVM_PAGES = KVM_IDENTITY_MAP
KVM_PAGES_BYTES = 4 * PAGE_BYTES

# The number of this life of the machine (devices/vmgenid.py): registers, in no memory map.
VM_GENERATION_ID = 0xFEFF_B000

# pc-testdev's memory (QEMU hw/misc/pc-testdev.c): kvm-unit-tests read and write code there.
TESTDEV_MEMORY = 0xFF00_0000
TESTDEV_MEMORY_BYTES = 0x1_0000

# Firmware's ROM ends at 4 GiB; above the APICs there is room for the flash of a large OVMF. The last 128 KiB of it show
# below 1 MiB as well.
FIRMWARE_END = 0x1_0000_0000
FIRMWARE_MAX_BYTES = 8 * MIB
ISA_BIOS_BYTES = 0x2_0000

# After reset the first instruction is fetched 16 bytes below 4 GiB (SDM vol. 3, 10.1.4).
RESET_VECTOR = 0xFFFF_FFF0

# I/O ports: the PC/AT's unless a reason is given.
PORT_PIC_MASTER = 0x20
PORT_PIT = 0x40
PORT_I8042_DATA = 0x60
PORT_SPEAKER = 0x61  # PIT channel 2 gate and output
PORT_I8042_COMMAND = 0x64
PORT_RTC = 0x70
PORT_POST = 0x80
PORT_FAST_A20 = 0x92
PORT_PIC_SLAVE = 0xA0
PORT_APM = 0xB2  # the PIIX's advanced power management control and status
PORT_TESTDEV = 0xE0  # pc-testdev: latch 0xe0, page flush 0xe4, byte latch 0xe8
PORT_PVPANIC = 0x505  # where QEMU's is (hw/misc/pvpanic-isa.c)
PORT_DEBUG_EXIT = 0xF4  # isa-debug-exit, where kvm-unit-tests write their status
PORT_COM2 = 0x2F8
PORT_VGA_MONO = 0x3B0  # CRT controller and status of a VGA that is set to monochrome
PORT_VGA = 0x3C0
PORT_COM1 = 0x3F8
PORT_DEBUG_CONSOLE = 0x402  # SeaBIOS writes its log here, one byte a character
PORT_PIC_ELCR = 0x4D0  # edge/level control of both PICs
PORT_FW_CFG = 0x510  # QEMU's firmware configuration: selector, data
PORT_FW_CFG_DMA = 0x514
PORT_PM = 0x600  # ACPI PM block, clear of everything PCI firmware assigns
PORT_SMBUS = 0x700  # where a directly booted kernel finds the PIIX4's; SeaBIOS puts it there too
PORT_PCI = 0xCF8  # configuration mechanism 1: address, then data at 0xcfc
PORT_PCI_BYTES = 8
PORT_RESET = 0xCF9  # the FADT's reset register; chipsets have had it here since the PIIX3
PORT_TESTDEV_IRQ = 0x2000  # pc-testdev: 0x2000 + n drives interrupt line n

PORT_GPE0 = 0xAFE0  # general purpose events, where QEMU's PIIX4 has them
PORT_GPE0_BYTES = 4
GPE_VM_GENERATION = 5  # which of them tells of another generation; QEMU's number, too
PORT_BUS_MASTER = 0xC000  # IDE's, where a directly booted kernel finds it: SeaBIOS gives out I/O BARs from here on
PORT_PCI_BARS = 0xC100  # other functions' I/O BARs, and their memory, where a kernel is booted without firmware
LAST_PORT = 0xFFFF
# ATA's two channels: first port of the command block (8 of them), the control port, the ISA interrupt (ATA/ATAPI host
# adapters standard, "compatibility mode").
IDE_CHANNELS = ((0x1F0, 0x3F6, 14), (0x170, 0x376, 15))

# Offsets in the PM block and their sizes in bytes.
PM1A_EVT = 0
PM1A_EVT_BYTES = 4
PM1A_CNT = 4
PM1A_CNT_BYTES = 2
PM_TMR = 8
PM_TMR_BYTES = 4
PM_BYTES = 12
SLP_TYP_S5 = 0  # written with SLP_EN to PM1a control it powers off, so outw(0x604, 0x2000) does, as on QEMU
SLP_TYP_S3 = 1  # suspend to RAM, as on QEMU: kvm-unit-tests write 0x2400 without a look at the DSDT
RESET_VALUE = 6  # written to PORT_RESET: full reset of the processors

# Interrupt lines. GSI n is pin n of the IOAPIC, and ISA interrupt n, but for the timer: its wire goes to pin 2.
GSI_TIMER = 2
IRQ_TIMER = 0
IRQ_KEYBOARD = 1
IRQ_COM2 = 3
IRQ_COM1 = 4
IRQ_RTC = 8
PIRQ_IRQS = (10, 10, 11, 11)  # PIRQA to PIRQD of a PIIX, as SeaBIOS routes them
IRQ_SCI = 9  # ACPI events: level, active high, as on QEMU's pc
ISA_IRQS = 16
IOAPIC_PINS = 24

# PCI's slots on bus 0, as on QEMU's pc: the host bridge, and the PIIX with its functions.
PCI_SLOTS = 32
SLOT_HOST, SLOT_PIIX = 0, 1
FUNCTION_ISA, FUNCTION_IDE, FUNCTION_PM = 0, 1, 3
