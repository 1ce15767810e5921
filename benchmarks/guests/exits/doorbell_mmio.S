# doorbell_mmio.S, linked at 0x100000. vmexit's mmio-wildcard-eventfd: a byte to device memory that is an eventfd in KVM.
# Nobody waits for it.

        .set    PREPARES, 1
        .set    ARMS, 1
        .include "doorbell.inc"
        .macro  prepare
        select_doorbell 0
        .endm
        .macro  arm
        mov     $DOORBELL_MMIO, %edi
        .endm
        .macro  access
        movb    %al, (%rdi)
        .endm
        .include "exits.inc"
