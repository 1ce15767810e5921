# inl_from_device.S, linked at 0x100000. Four bytes from a device's port.

        .macro  access
        inl     $DEVICE_PORT, %eax
        .endm
        .include "exits.inc"
