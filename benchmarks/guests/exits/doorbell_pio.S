# doorbell_pio.S, linked at 0x100000. vmexit's portio-wildcard-eventfd: a byte to a port that is an eventfd in KVM.
# Nobody waits for it.

        .set    PREPARES, 1
        .set    ARMS, 1
        .include "doorbell.inc"
        .macro  prepare
        select_doorbell 1
        .endm
        .macro  arm
        mov     $DOORBELL_PORT, %edx
        .endm
        .macro  access
        outb    %al, %dx
        .endm
        .include "exits.inc"
