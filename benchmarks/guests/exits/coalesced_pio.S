# coalesced_pio.S, linked at 0x100000. A byte to a port whose writes KVM gathers: the RTC's index, as QEMU has it.

        .set    FINISHES, 1
        .macro  access
        mov     $0x0d, %al
        outb    %al, $RTC_INDEX
        .endm
        .macro  finish
        inb     $0xed, %al                      # an exit of its own: what was gathered arrives before it
        .endm
        .include "exits.inc"
