"""What firmware finds in fw_cfg and CMOS: names, sizes and bytes as SeaBIOS reads them."""

from __future__ import annotations

import pytest

from pyvmm.devices import fw_cfg
from pyvmm.errors import ConfigError
from pyvmm.guest_memory import GuestMemory
from pyvmm.x86 import e820
from pyvmm.x86 import firmware_files as ff

MIB = 1 << 20
GIB = 1 << 30
RAM = [(0, 64 * MIB)]


def content(data: ff.Data) -> bytes:
    return data() if callable(data) else data


def test_the_keys_are_fw_cfgs() -> None:
    assert ff.UUID == fw_cfg.UUID
    assert ff.NOGRAPHIC == fw_cfg.NOGRAPHIC
    assert ff.BOOT_MENU == fw_cfg.BOOT_MENU
    assert ff.IRQ0_OVERRIDE == fw_cfg.IRQ0_OVERRIDE


def test_a_guest_reads_them_all(memory: GuestMemory) -> None:
    device = fw_cfg.FwCfg(memory)
    files = ff.pc_firmware_files(2, memory.regions, boot_paths=[ff.ide_path(0)], boot_menu_wait_ms=0)
    keys = {name: device.add_file(name, data) for name, data in files.items()}
    for key, data in ff.pc_firmware_items().items():
        device.add(key, data)
    device.describe_machine(2, 2, memory.size_bytes, e820.pack_fw_cfg(memory.regions))
    assert set(files) == {
        *("etc/acpi/rsdp", "etc/acpi/tables", "etc/table-loader", "etc/smbios/smbios-anchor"),
        *("etc/smbios/smbios-tables", "bootorder", "etc/sercon-port", "etc/boot-fail-wait", "etc/boot-menu-wait"),
        "etc/system-states",
    }
    for name, data in files.items():
        assert device.content(keys[name]) == content(data)
    assert device.content(fw_cfg.FILE_DIR)


def test_without_options_firmware_is_told_the_least() -> None:
    files = ff.pc_firmware_files(1, RAM, serial_console=None)
    assert [name for name, data in files.items() if not callable(data)] == ["etc/boot-fail-wait", "etc/system-states"]
    assert files["etc/boot-fail-wait"] == b"\xff\xff\xff\xff"  # never again


def test_numbers_have_the_sizes_that_qemu_gives_them() -> None:
    files = ff.pc_firmware_files(1, RAM, serial_console=0x2F8, boot_menu_wait_ms=2500, boot_fail_wait_ms=0)
    assert files["etc/sercon-port"] == b"\xf8\x02"
    assert files["etc/boot-menu-wait"] == b"\xc4\x09"
    assert files["etc/boot-fail-wait"] == bytes(4)


def test_sleep_states_as_qemu_words_them() -> None:
    """QEMU hw/acpi/piix4.c: a byte a state, bit 7 where it is there, the SLP_TYP below."""
    assert ff.pc_firmware_files(1, RAM)["etc/system-states"] == bytes((0x80, 0, 0, 0x81, 0, 0x80))
    assert ff.pc_firmware_files(1, RAM, s3=False)["etc/system-states"] == bytes((0x80, 0, 0, 0x01, 0, 0x80))


def test_items() -> None:
    items = ff.pc_firmware_items(uuid=bytes(range(16)), boot_menu=True, irqchip=False)
    assert items == {2: bytes(range(16)), 4: b"\0\0", 0xE: b"\1\0", 0x8002: bytes(4)}
    assert ff.pc_firmware_items()[0x8002] == b"\1\0\0\0"
    assert ff.pc_firmware_items()[0xE] == b"\0\0"


def test_tables_are_of_the_machine() -> None:
    files = ff.pc_firmware_files(
        3,
        [(0, 3 * GIB), (4 * GIB, GIB), (0xFFFC0000, 0x40000)],
        uuid=b"0123456789abcdef",
        cpu_id=(0x123, 0x456, "Vendor"),
    )
    tables = content(files["etc/acpi/tables"])
    assert [tables.count(name) for name in (b"C000", b"C002", b"C003", b"APIC")] == [1, 1, 0, 1]
    assert b"\x00\x00\x00\xc0\xff\xff\xbf\xfe" in tables  # PCI memory from above RAM
    described = content(files["etc/smbios/smbios-tables"])
    assert described.count(b"Vendor\0") == 1
    assert b"32107654" not in described
    assert b"3210" + b"54" + b"76" + b"89abcdef" in described
    assert described.count(b"\x13\x1f") == 2  # two ranges of RAM; the ROM is none
    assert b"APIC" not in content(ff.pc_firmware_files(1, RAM, irqchip=False)["etc/acpi/tables"])


def test_files_belong_together() -> None:
    files = ff.pc_firmware_files(1, RAM)
    assert content(files["etc/acpi/tables"]) is content(files["etc/acpi/tables"])
    anchor, tables = (content(files[f"etc/smbios/smbios-{name}"]) for name in ("anchor", "tables"))
    assert int.from_bytes(anchor[0x16:0x18], "little") == len(tables)


def test_option_roms_and_geometries() -> None:
    files = ff.pc_firmware_files(
        1, RAM, option_roms={"a.bin": b"rom"}, geometries={ff.ide_path(0): (100, 255, 63), ff.ide_path(2): (5, 4, 3)}
    )
    assert files["genroms/a.bin"] == b"rom"
    assert files["bios-geometry"] == (
        b"/pci@i0cf8/ide@1,1/drive@0/disk@0 100 255 63\n/pci@i0cf8/ide@1,1/drive@1/disk@0 5 4 3\0"
    )


def test_device_paths() -> None:
    assert [ff.ide_path(n) for n in range(4)] == [
        "/pci@i0cf8/ide@1,1/drive@0/disk@0",
        "/pci@i0cf8/ide@1,1/drive@0/disk@1",
        "/pci@i0cf8/ide@1,1/drive@1/disk@0",
        "/pci@i0cf8/ide@1,1/drive@1/disk@1",
    ]
    assert ff.rom_path("linuxboot.bin") == "/rom@genroms/linuxboot.bin"
    assert ff.boot_order(["/a", "/b"]) == b"/a\n/b\0"


@pytest.mark.parametrize(
    ("order", "indices"), [("cda", [0, 3, 1, 2]), ("d", [1, 2]), ("dc", [1, 2, 0, 3]), ("an", []), ("c", [0, 3])]
)
def test_drives_in_order(order: str, indices: list[int]) -> None:
    drives = [(3, "disk"), (1, "cdrom"), (0, "disk"), (2, "cdrom")]
    assert ff.boot_paths(drives, order) == [ff.ide_path(n) for n in indices]


def test_disks_on_virtio_come_after_those_on_ide() -> None:
    disk, cd = ff.ide_path(0), ff.ide_path(2)
    fourth, last = "/pci@i0cf8/scsi@4/disk@0,0", "/pci@i0cf8/scsi@1f/disk@0,0"
    assert (ff.virtio_path(4), ff.virtio_path(31)) == (fourth, last)
    drives = [(2, "cdrom"), (0, "disk")]
    assert ff.boot_paths(drives, "cd", virtio_slots=[31, 4]) == [disk, last, fourth, cd]
    assert ff.boot_paths(drives, "d", virtio_slots=[4]) == [cd]


def test_a_kernel_comes_first_or_where_the_order_says() -> None:
    drives = [(0, "disk"), (2, "cdrom")]
    disk, cd, kernel = ff.ide_path(0), ff.ide_path(2), "/rom@genroms/linuxboot.bin"
    assert ff.boot_paths(drives, "cd", kernel="linuxboot.bin") == [kernel, disk, cd]
    assert ff.boot_paths(drives, "dnc", kernel="linuxboot.bin") == [cd, kernel, disk]
    assert ff.boot_paths(drives, "dnc") == [cd, disk]
    assert ff.boot_paths([], "c", kernel="linuxboot.bin") == [kernel]


def test_cmos() -> None:
    assert dict(ff.pc_cmos("cda")) == {0x10: 0, 0x38: 0x10, 0x3D: 0x32, 0x39: 0}
    assert dict(ff.pc_cmos("d", [0, 1, 2, 1])) == {0x10: 0, 0x38: 0, 0x3D: 0x03, 0x39: 0b01_10_01_00}
    assert dict(ff.pc_cmos(""))[0x3D] == 0
    assert ff.pc_cmos() == ff.pc_cmos("cad")
    assert dict(ff.pc_cmos()) == {0x10: 0, 0x38: 0x30, 0x3D: 0x12, 0x39: 0}  # QEMU's boot-order-test: 0x1230


def test_disks_in_cmos() -> None:
    """The values of QEMU's hd-geo-test, and its rule for the control byte: more than eight heads set bit 3."""
    cmos = dict(ff.pc_cmos(disks=[(306, 4, 17), (16383, 16, 63), (1, 1, 1)]))
    assert (cmos[0x12], cmos[0x19], cmos[0x1A]) == (0xFF, 47, 47)
    assert [cmos[n] for n in range(0x1B, 0x24)] == [0x32, 0x01, 4, 0xFF, 0xFF, 0xC0, 0x32, 0x01, 17]
    assert [cmos[n] for n in range(0x24, 0x2D)] == [0xFF, 0x3F, 16, 0xFF, 0xFF, 0xC8, 0xFF, 0x3F, 63]
    slave = dict(ff.pc_cmos(disks=[None, (60, 8, 63)]))
    assert slave[0x12] == 0x0F
    assert slave[0x29] == 0xC0
    assert 0x19 not in slave
    assert 0x12 not in dict(ff.pc_cmos(disks=[None, None, (60, 16, 63)]))


def test_a_strict_order_ends_with_halt() -> None:
    assert ff.boot_order(["/a"], strict=True) == b"/a\nHALT\0"


@pytest.mark.parametrize("order", ["cdan", "cc", "x", "C"])
def test_an_order_that_is_none(order: str) -> None:
    with pytest.raises(ConfigError, match=r"boot order .* use up to three of"):
        ff.pc_cmos(order)
