# inl_from_kernel.S, linked at 0x100000. vmexit's: a byte from the PIC's edge/level register; the PIC is in KVM.

        .set    ARMS, 1
        .macro  arm
        mov     $ELCR_PORT, %edx
        .endm
        .macro  access
        inb     %dx, %al
        .endm
        .include "exits.inc"
