# coalesced_mmio.S, linked at 0x100000. Four bytes to device memory whose writes KVM gathers.

        .set    ARMS, 1
        .set    FINISHES, 1
        .macro  arm
        mov     $DEVICE_MMIO, %edi
        .endm
        .macro  access
        mov     %eax, (%rdi)
        .endm
        .macro  finish
        inb     $0xed, %al                      # an exit of its own: what was gathered arrives before it
        .endm
        .include "exits.inc"
