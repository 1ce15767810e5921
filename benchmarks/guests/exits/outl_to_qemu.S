# outl_to_qemu.S, linked at 0x100000. Four bytes to a port that nobody has.

        .set    ARMS, 1
        .macro  arm
        mov     $NOBODY_PORT, %edx
        .endm
        .macro  access
        outl    %eax, %dx
        .endm
        .include "exits.inc"
