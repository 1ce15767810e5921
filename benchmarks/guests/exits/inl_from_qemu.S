# inl_from_qemu.S, linked at 0x100000. vmexit's: four bytes from a port that nobody has.

        .set    ARMS, 1
        .macro  arm
        mov     $NOBODY_PORT, %edx
        .endm
        .macro  access
        inl     %dx, %eax
        .endm
        .include "exits.inc"
