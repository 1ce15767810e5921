# outs_512.S, linked at 0x100000. 512 bytes to a device's port by REP OUTSW, as a driver writes an IDE sector.
# KVM makes an exit of each word.

        .set    USES_RCX, 1
        .macro  access
        mov     $MAILBOX + 0x200, %esi
        mov     $DEVICE_PORT, %edx
        mov     $256, %ecx
        rep outsw
        .endm
        .include "exits.inc"
