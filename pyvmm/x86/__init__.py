"""What makes the machine an x86 PC: addresses, the state processors start in, how kernels are loaded, tables.

    layout      every guest-physical address, port and interrupt line, each with its why
    e820        the memory map, and its form in each boot protocol
    cpu_state   registers after reset, and in the three modes a loader can start a guest in: BootState
    vcpu_state  all of a processor's state, saved and brought back
    cpuid       what CPUID tells the guest; cpu_features: the names of its bits
    boot        load a kernel of any kind -> BootState; the kinds are bzimage, pvh, multiboot and flat; image and elf
                help them; linuxboot: by firmware; boot_options: what firmware is told
    wake        where a guest goes on that was suspended to RAM
    acpi        ACPI's tables; acpi_pc: the pc's; aml: the byte code in them; mptable: the older Intel MP tables
    smbios      the inventory
    firmware_files, table_loader  what firmware is given of all that
"""
