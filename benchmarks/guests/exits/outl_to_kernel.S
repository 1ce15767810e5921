# outl_to_kernel.S, linked at 0x100000. vmexit's: a byte to the PIC's edge/level register; the PIC is in KVM.

        .set    ARMS, 1
        .macro  arm
        mov     $ELCR_PORT, %edx
        xor     %eax, %eax
        .endm
        .macro  access
        outb    %al, %dx
        .endm
        .include "exits.inc"
