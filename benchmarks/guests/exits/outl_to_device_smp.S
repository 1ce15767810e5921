# outl_to_device_smp.S, linked at 0x100000. Four bytes to a device's port, while every other processor writes bytes to
# another device as fast as it can. Timed on the first processor.

        .set    PREPARES, 1
        .set    SMP, 1
        .macro  prepare
        call    start_others
        .endm
        .macro  access
        outl    %eax, $DEVICE_PORT
        .endm
        .macro  other_access
        mov     %ebx, %edx                      # EBX: the processor's number, from 1
        dec     %edx
        and     $3, %edx
        add     $OTHERS_PORT, %edx
        outb    %al, %dx
        .endm
        .include "exits.inc"
