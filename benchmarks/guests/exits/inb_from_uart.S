# inb_from_uart.S, linked at 0x100000. A byte from COM1's scratch register: a device that every VMM has.

        .set    ARMS, 1
        .macro  arm
        mov     $UART_SCRATCH, %edx
        .endm
        .macro  access
        inb     %dx, %al
        .endm
        .include "exits.inc"
