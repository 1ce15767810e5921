"""The address map does not contradict itself."""

from __future__ import annotations

from itertools import pairwise

from pyvmm.x86 import cpu_state, layout, multiboot, pvh


def test_the_first_mib_has_one_tenant_a_place() -> None:
    spans = [
        (layout.IVT, layout.BDA),
        (layout.BDA, layout.BDA_END),
        (layout.MULTIBOOT_INFO, layout.MULTIBOOT_INFO + layout.PAGE_BYTES),
        layout.MULTIBOOT_KEEP_CLEAR,
        (layout.ZERO_PAGE, layout.ZERO_PAGE + layout.PAGE_BYTES),
        (layout.PAGE_TABLES, layout.PAGE_TABLES + len(cpu_state.identity_page_tables(0))),
        (layout.PVH_START_INFO, layout.PVH_START_INFO + layout.PAGE_BYTES),
        (layout.BOOT_GDT, layout.BOOT_GDT + len(cpu_state.gdt(True))),
        (layout.CMDLINE, layout.BOOT_AREA_END),
        (layout.EBDA, layout.ACPI_RSDP),
        (layout.ACPI_RSDP, layout.ACPI_RSDP + 36),
        (layout.ACPI_TABLES, layout.ACPI_TABLES_END),
        (layout.MP_TABLE, layout.MP_TABLE_END),
        (layout.SMBIOS, layout.SMBIOS_END),
        (layout.KERNEL, layout.RAM_HOLE),
    ]
    assert all(start < end for start, end in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_the_hole_has_one_tenant_a_place() -> None:
    spans = [
        (layout.RAM_HOLE, layout.VIRTIO_MMIO),
        (layout.IOAPIC, layout.IOAPIC + layout.IOAPIC_BYTES),
        (layout.LAPIC, layout.LAPIC + layout.LAPIC_BYTES),
        (layout.KVM_PAGES, layout.KVM_PAGES + layout.KVM_PAGES_BYTES),
        (layout.TESTDEV_MEMORY, layout.TESTDEV_MEMORY + layout.TESTDEV_MEMORY_BYTES),
        (layout.RAM_HIGH - layout.FIRMWARE_MAX_BYTES, layout.RAM_HIGH),
    ]
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert layout.KVM_TSS == layout.KVM_IDENTITY_MAP + layout.PAGE_BYTES


def test_tables_can_be_found_where_the_specifications_search() -> None:
    assert 0xE0000 <= layout.ACPI_RSDP <= 0xFFFF0
    assert layout.ACPI_RSDP % 16 == 0
    assert 0xF0000 <= layout.MP_TABLE <= 0xFFFF0
    assert layout.MP_TABLE % 16 == 0
    assert 0xF0000 <= layout.SMBIOS <= 0xFFFF0
    assert layout.SMBIOS % 16 == 0


def test_a_full_pvh_page_holds_its_lists() -> None:
    # A memory map has an entry for each region and reserved range; 64 are far more than GuestMemory makes.
    assert pvh.START_INFO_BYTES + pvh.MAX_MODULES * pvh.MODULE_BYTES + 64 * 24 <= layout.PAGE_BYTES
    assert multiboot.INFO_BYTES < layout.PAGE_BYTES
