# mmio_read.S, linked at 0x100000. Four bytes from a device's memory.

        .set    ARMS, 1
        .macro  arm
        mov     $DEVICE_MMIO, %edi
        .endm
        .macro  access
        mov     (%rdi), %eax
        .endm
        .include "exits.inc"
