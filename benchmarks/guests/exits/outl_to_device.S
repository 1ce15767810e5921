# outl_to_device.S, linked at 0x100000. Four bytes to a device's port.

        .macro  access
        outl    %eax, $DEVICE_PORT
        .endm
        .include "exits.inc"
