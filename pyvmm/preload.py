"""What is imported late, in one place: a start is not to pay for what it may never need, so these imports stand in
functions.

``load()`` imports everything that a running machine may still want. Whoever shuts the process into a jail, where it
finds no files any more, calls it before that, when the machine has been made.
"""

from __future__ import annotations

# While a machine is made: what its options ask for. Nothing of it is new once Machine() has returned.
BUILDING = (
    "array",
    "fcntl",  # a tap; and snapshots, while it runs
    "grp",
    "ipaddress",
    "pwd",
    "pyroute2",
    "pyroute2.netlink.exceptions",
    "pyvmm.address_space",
    "pyvmm.announcer",
    "pyvmm.balloon",
    "pyvmm.balloon_options",
    "pyvmm.block",
    "pyvmm.block.backend",
    "pyvmm.block.formats.qcow2.cluster_lane",
    "pyvmm.block.formats.qcow2.driver",
    "pyvmm.block.formats.qcow2.image",
    "pyvmm.block.formats.raw",
    "pyvmm.block.formats.snapshot",
    "pyvmm.block.lane",
    "pyvmm.block.open",
    "pyvmm.block.options",
    "pyvmm.block.probe",
    "pyvmm.block.protocols.blkdebug",
    "pyvmm.block.protocols.file_posix",
    "pyvmm.block.protocols.image",
    "pyvmm.block.protocols.io_uring",
    "pyvmm.block.protocols.nbd",
    "pyvmm.block.protocols.nbd_address",
    "pyvmm.block.throttle",
    "pyvmm.boards.drive_places",
    "pyvmm.boards.gathered_writes",
    "pyvmm.boards.geometry",
    "pyvmm.boards.isa_checks",
    "pyvmm.boards.microvm",
    "pyvmm.boards.pc",
    "pyvmm.boards.pc_firmware",
    "pyvmm.boards.virtio",
    "pyvmm.boards.virtio_interfaces",
    "pyvmm.clock",
    "pyvmm.console_options",
    "pyvmm.devices.debug_exit",
    "pyvmm.devices.ide.atapi",
    "pyvmm.devices.ide.channel",
    "pyvmm.devices.ide.disk",
    "pyvmm.devices.ide.packet_drive",
    "pyvmm.devices.pci.host",
    "pyvmm.devices.pci.i440fx",
    "pyvmm.devices.pci.piix3",
    "pyvmm.devices.pci.piix4_pm",
    "pyvmm.devices.pvpanic",
    "pyvmm.devices.testdev",
    "pyvmm.devices.vga_text",
    "pyvmm.devices.virtio.balloon",
    "pyvmm.devices.virtio.blk",
    "pyvmm.devices.virtio.blk_fast",
    "pyvmm.devices.virtio.blk_waiting",
    "pyvmm.devices.virtio.console",
    "pyvmm.devices.virtio.fs",
    "pyvmm.devices.virtio.mmio",
    "pyvmm.devices.virtio.net",
    "pyvmm.devices.virtio.pci",
    "pyvmm.devices.virtio.ring",
    "pyvmm.devices.virtio.rng",
    "pyvmm.devices.virtio.vsock",
    "pyvmm.devices.virtio.vsock_callers",
    "pyvmm.devices.virtio.vsock_messages",
    "pyvmm.guests",
    "pyvmm.kvm.access",
    "pyvmm.kvm.exits",
    "pyvmm.net.open",
    "pyvmm.net.options",
    "pyvmm.net.passt",
    "pyvmm.net.tap",
    "pyvmm.net.unix",
    "pyvmm.page_server",  # served_memory's
    "pyvmm.python_irqchip",
    "pyvmm.served_memory",
    "pyvmm.terminal",
    "pyvmm.terminal_screen",
    "pyvmm.vhost_user.options",
    "pyvmm.vhost_user.server",
    "pyvmm.vhost_user.virtiofsd",
    "pyvmm.vsock.host",
    "pyvmm.vsock.options",
    "pyvmm.x86.acpi",
    "pyvmm.x86.acpi_pc",
    "pyvmm.x86.boot_options",
    "pyvmm.x86.cpu_features",
    "pyvmm.x86.cpuid",
    "pyvmm.x86.linuxboot",
    "pyvmm.x86.mptable",
    "shutil",
    "socket",
    "subprocess",
    "tempfile",
    "time",
    "tty",
    "typing",
)
# While it runs.
RUNNING = (
    "_struct",
    "ast",  # tracebacks, as tokenize and linecache
    "atexit",  # a terminal that is made raw
    "ctypes",  # discards, and writes of zeros
    "difflib",  # the embedder's mistakes
    "encodings.ascii",  # what devices and dumps say
    "encodings.cp437",  # text screens
    "errno",
    "json",  # the names in a trace
    "linecache",
    "pyvmm.log",  # where somebody logs
    "mmap",
    "pyvmm.boards.pc_drives",  # another medium
    "pyvmm.chardev",  # a board that comes late opens its consoles then
    "pyvmm.control.console",  # who asks for a machine by its name, as registry
    "pyvmm.control.metrics",
    "pyvmm.control.qmp.server",
    "pyvmm.control.registry",
    "pyvmm.control.gdb.server",  # clients of gdb's, with all that they need
    "pyvmm.debug_probe",  # Cpu.step
    "pyvmm.devices.acpi_gpe",  # devices that are made when a guest touches them
    "pyvmm.devices.acpi_pm",
    "pyvmm.devices.debugcon",
    "pyvmm.devices.fw_cfg",
    "pyvmm.devices.i8042",
    "pyvmm.devices.i8254",
    "pyvmm.devices.port80",
    "pyvmm.devices.port92",
    "pyvmm.devices.reset_control",
    "pyvmm.devices.rtc",
    "pyvmm.devices.serial",
    "pyvmm.devices.user_irqchip",
    "pyvmm.devices.vmgenid",
    "pyvmm.dump",
    "pyvmm.exit_stats",
    "pyvmm.gsi_routes",  # MSIs and irqfds, as irqfd
    "pyvmm.irqfd",
    "pyvmm.kvm.stats",
    "pyvmm.origin",  # forks, as snapshot, machine_snapshot
    "pyvmm.machine_snapshot",
    "pyvmm.machine_state",
    "pyvmm.memory_rounds",
    "pyvmm.migration",
    "pyvmm.migration_stream",
    "pyvmm.restart",
    "pyvmm.run_state",
    "pyvmm.snapshot",
    "pyvmm.snapshot_piece",
    "pyvmm.unix_socket",
    "pyvmm.tracing",  # traces, as trace.recorder, trace.format
    "pyvmm.trace.recorder",
    "pyvmm.trace.format",
    "pyvmm.state",  # saving and loading, as machine_state
    "pyvmm.write_log",
    "pyvmm.discard_log",
    "pyvmm.x86.boot",  # the guest is loaded again at a reset
    "pyvmm.x86.e820",  # for fw_cfg
    "pyvmm.x86.elf_core",  # what clients ask for, as page_tables
    "pyvmm.x86.page_tables",
    "pyvmm.x86.irqchip_state",  # resets, as pit_state
    "pyvmm.x86.pit_state",
    "pyvmm.x86.smbios",  # files that firmware asks for, made at the first look
    "pyvmm.x86.table_loader",
    "pyvmm.x86.vcpu_state",  # resets
    "pyvmm.x86.wake",
    "resource",  # why a thread can't be had
    "shlex",  # remedies that can be pasted
    "stat",
    "termios",
    "threading",  # what an error handler itself raises
    "tokenize",
    "traceback",
    "warnings",
)
# While it runs, for guests of their kind: those that came with the first load are there already.
GUESTS = (
    "bz2",
    "lz4.block",
    "lzma",
    "pyvmm.x86.bzimage",
    "pyvmm.x86.elf",
    "pyvmm.x86.flat",
    "pyvmm.x86.multiboot",
    "pyvmm.x86.pvh",
    "zlib",
    "zstandard",
)
# While it runs, where they are installed.
EXTRAS = ("iced_x86", "pyvmm.control.metrics_text")


def load() -> None:
    """Import all that a running machine may import later."""
    for name in RUNNING:
        __import__(name)
    for name in EXTRAS:
        try:
            __import__(name)
        except ImportError:
            pass
