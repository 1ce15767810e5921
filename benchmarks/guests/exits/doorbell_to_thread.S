# doorbell_to_thread.S, linked at 0x100000. The doorbell, and back: a thread of the VMM waits for the eventfd and writes
# how often it rang to the mailbox, where the guest sees it.

        .set    PREPARES, 1
        .set    ARMS, 1
        .macro  prepare
        mov     BOX_ANSWER, %r15d
        .endm
        .macro  arm
        mov     $DOORBELL_PORT, %edx
        .endm
        .macro  access
        outb    %al, %dx
        inc     %r15d
101:    pause
        cmp     %r15d, BOX_ANSWER
        jne     101b
        .endm
        .include "exits.inc"
