# mmio_write.S, linked at 0x100000. Four bytes to a device's memory.

        .set    ARMS, 1
        .macro  arm
        mov     $DEVICE_MMIO, %edi
        .endm
        .macro  access
        mov     %eax, (%rdi)
        .endm
        .include "exits.inc"
