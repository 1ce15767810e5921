# kick.S, linked at 0x100000. Only spins: the signals that drive it out of the guest are timed by the VMM.

        .set    PREPARES, 1
        .macro  prepare
        mov     BOX_TURN, %eax
        mov     %eax, BOX_DONE
        mov     $MAGIC, %rax
        mov     %rax, BOX_MAGIC
101:    jmp     101b
        .endm
        .macro  access
        ud2                                     # never reached
        .endm
        .include "exits.inc"
