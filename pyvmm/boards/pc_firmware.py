"""What a pc tells its firmware, by fw_cfg and by CMOS, and the tables for a kernel that is booted without."""

from __future__ import annotations

from pyvmm.devices.ide.disk import IdeDisk
from pyvmm.images import image_name
from pyvmm.x86 import firmware_files, layout
from pyvmm.x86.boot_options import BootOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.boards.isa import IsaBoard


def describe_to_firmware(pc: IsaBoard, units: Sequence[object]) -> None:
    """fw_cfg's files and items for firmware, and the CMOS bytes that it looks at. ``units``: what is at the places of
    IDE.
    """
    config, fw_cfg = pc.config, pc.fw_cfg
    boot = BootOptions(config.boot)
    roms = {}
    if config.kernel is not None and pc.starts_in_firmware:
        roms = hand_over_kernel(pc)
    files = firmware_files.pc_firmware_files(
        config.cpus,
        pc.memory.regions,
        option_roms=roms,
        uuid=system_uuid(pc),
        cpu_id=pc.platform.cpu_identity(),
        boot_menu_wait_ms=boot.splash_time_ms,
        boot_fail_wait_ms=boot.reboot_timeout_ms,
        acpi_devices=pc.acpi_devices,
        s3=not config.no_s3,
    )
    kernel = next(iter(roms), None)
    if any(boot_paths(pc, order, kernel) for order in (boot.order, boot.once or "")):
        files[firmware_files.BOOT_ORDER_FILE] = lambda: firmware_files.boot_order(
            boot_paths(pc, boot_order(pc), kernel), boot.strict
        )
    for name, data in files.items():
        fw_cfg.add_file(name, data)
    for key, item in firmware_files.pc_firmware_items(uuid=system_uuid(pc), boot_menu=boot.menu).items():
        fw_cfg.add(key, item)
    disks = [unit if isinstance(unit, IdeDisk) else None for unit in units]
    set_cmos(
        pc,
        firmware_files.pc_cmos(
            boot_order(pc),
            [firmware_files.TRANSLATION_NONE if disk is None else disk.bios_translation for disk in disks],
            [None if disk is None else disk.geometry for disk in disks],
        ),
    )


def set_cmos(pc: IsaBoard, values: list[tuple[int, int]]) -> None:
    for index, value in values:
        pc.rtc.cmos[index] = value


def boot_order(pc: IsaBoard) -> str:
    """The letters that hold for this boot: ``once`` until the first reset."""
    boot = BootOptions(pc.config.boot)
    return boot.order if boot.once is None or not pc.first_boot else boot.once


def boot_paths(pc: IsaBoard, order: str, kernel: str | None) -> list[str]:
    """Device paths of the drives, and of the kernel's option ROM, in ``order``."""
    drives = [(drive.index, drive.media) for drive in pc.config.drives if drive.interface == "ide"]
    names = [f"blk{drive.index}.pci" for drive in pc.config.drives if drive.interface == "virtio"]
    parts: dict[str, Any] = dict(pc.parts)
    slots = {id(function): slot for slot, _, function in parts["pci"].devices}
    virtio_slots = [slots[id(parts[name])] for name in names]
    return firmware_files.boot_paths(drives, order, kernel=kernel, virtio_slots=virtio_slots)


def after_first_boot(pc: IsaBoard) -> None:
    """Back to the usual order in CMOS, which is the guest's from then on. The file is made anew after every reset."""
    boot = BootOptions(pc.config.boot)
    if boot.once is not None:
        set_cmos(pc, firmware_files.cmos_boot_order(boot.order))


def system_uuid(pc: IsaBoard) -> bytes:
    from pyvmm.x86 import smbios

    return bytes(16) if pc.config.uuid is None else smbios.parse_uuid(pc.config.uuid)


def hand_over_kernel(pc: IsaBoard) -> dict[str, bytes]:
    """The kernel and its initrd into fw_cfg; the option ROM that fetches and starts them, by its name."""
    from pyvmm import guests
    from pyvmm.x86 import linuxboot

    config, images = pc.config, pc.images
    assert config.kernel is not None
    items = linuxboot.kernel_items(
        pc.memory,
        images.get(config.kernel, "kernel"),
        name=image_name(config.kernel, "kernel"),
        initrd=None if config.initrd is None else images.get(config.initrd, "initrd"),
        append=pc.command_line,
    )
    for key, data in items.items():
        pc.fw_cfg.add(key, data)
    return {linuxboot.ROM_NAME: linuxboot.option_rom(guests.image("linuxboot"))}


def write_tables(pc: IsaBoard) -> int:
    """ACPI, MP and SMBIOS tables for a kernel booted directly; the ACPI root pointer's address."""
    from pyvmm.x86 import acpi_pc, mptable, smbios

    config, memory = pc.config, pc.memory
    low = min(memory.size_bytes, layout.RAM_HOLE)
    tables = acpi_pc.build(
        config.cpus,
        ram_below_4g_bytes=low,
        devices=pc.acpi_devices(),
        s3=not config.no_s3,
        vga=pc.vga is not None,
    )
    tables.write(memory)
    mptable.write(memory, config.cpus)
    ranges = [(gpa, size) for gpa, size in memory.regions if not layout.RAM_HOLE <= gpa < layout.RAM_HIGH]
    smbios.build(config.cpus, ranges, uuid=system_uuid(pc), cpu_id=pc.platform.cpu_identity()).write(memory)
    return tables.rsdp
