"""A PCI device with DMA and a message-signalled interrupt, and a guest in long mode that finds and drives it.

The device puts text in guest memory into capitals. Needs GNU binutils, for the guest.
"""

import struct
import subprocess
import tempfile

import pyvmm
from pyvmm.boards.pc import Pc
from pyvmm.devices.pci.capability import Capabilities
from pyvmm.devices.pci.device import PciDevice

MSI = 0x05  # the capability's number: PCI Local Bus 3.0, 6.8.1
ADDRESS, LENGTH, START = 0, 4, 8


class Shouter(PciDevice):
    valid_sizes = impl_sizes = (4, 4)
    STATE = {**PciDevice.STATE, "address": 32, "length": 32}

    def __init__(self, memory, mmio, irqchip):
        super().__init__(vendor_id=0x1234, device_id=0xCAFE, class_code=0xFF0000)
        self.memory, self.irqchip, self.address, self.length = memory, irqchip, 0, 0
        self.add_memory_bar(0, 16, mmio, [(0, lambda: pyvmm.MemoryRegion(16, self, name="shouter"))])
        writable = struct.pack("<HQH", 1, ~3 % 2**64, 0xFFFF)  # control: on; address; data
        self.msi = Capabilities(self).add(MSI, struct.pack("<HQH", 0x80, 0, 0), writable)

    def write(self, offset, size, value):
        if offset == ADDRESS:
            self.address = value
        elif offset == LENGTH:
            self.length = min(value, 4096)
        elif offset == START and self.bus_master:  # without that bit a function may not reach memory
            try:
                text = self.memory.view(self.address, self.length)
            except pyvmm.BusError:
                return
            text[:] = bytes(text).upper()
            if self.get(self.msi + 2, 2) & 1:
                self.irqchip.msi(self.get(self.msi + 4, 8), self.get(self.msi + 12, 2)).fire()


class WithShouter(Pc):
    def make_devices(self):
        super().make_devices()
        shouter = self.add("shouter", Shouter(self.memory, self.mmio, self.irqchip))
        self.pci.add(shouter, self.pci_slots.take(5, 1, "shouter"))
        self.leave_as_firmware_would()  # the BAR gets its address


GUEST = """
        .macro  config register         # DX: the data port, for a register of slot 5
        mov     $0x80002800 + \\register, %eax
        mov     $0xcf8, %edx
        outl    %eax, %dx
        mov     $0xcfc, %edx
        .endm
        .macro  write register, value
        config  \\register
        mov     $\\value, %eax
        outl    %eax, %dx
        .endm
        config  0x10                    # BAR 0
        inl     %dx, %eax
        mov     %eax, %ebx
        write   0x44, 0xfee00000        # MSI: to the local APIC,
        write   0x4c, 0x51              # vector 0x51,
        write   0x40, 0x00810005        # on
        mov     $done, %eax             # its gate; pyvmm's code segment in long mode is 0x10
        mov     %ax, 0x8510
        movl    $0x8e000010, 0x8512
        shr     $16, %eax
        mov     %eax, 0x8516
        lidt    idt
        mov     $0xfee00000, %edi
        movl    $0x1ff, 0xf0(%rdi)      # the local APIC on
        movl    $text, (%rbx)
        movl    $5, 4(%rbx)
        movl    $1, 8(%rbx)
        sti
1:      hlt
        jmp     1b
done:   mov     text, %al
        outb    %al, $0xf4              # the end
text:   .ascii  "hello"
idt:    .word   0x52 * 16 - 1
        .quad   0x8000
"""

if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as obj, tempfile.NamedTemporaryFile() as flat:
        subprocess.run(["as", "--64", "-o", obj.name], input=GUEST, text=True, check=True)
        link = ["ld", "-N", "-e", "0", "-Ttext=0x100000", "--oformat", "binary", "-o", flat.name, obj.name]
        subprocess.run(link, check=True)
        with pyvmm.Machine(board=WithShouter, machine="pc", flat=flat.name, flat_mode="long64", memory_mib=16) as m:
            assert m.run(timeout_s=20) == (ord("H") << 1) | 1
    print("the guest was interrupted, and found an H")
