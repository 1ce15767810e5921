# ins_512.S, linked at 0x100000. 512 bytes from a device's port by REP INSW, as a driver reads an IDE sector.
# KVM fetches them ahead: one exit.

        .set    USES_RCX, 1
        .macro  access
        mov     $MAILBOX + 0x200, %edi
        mov     $DEVICE_PORT, %edx
        mov     $256, %ecx
        rep insw
        .endm
        .include "exits.inc"
