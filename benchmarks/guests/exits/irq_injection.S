# irq_injection.S, linked at 0x100000. A device raises an interrupt at a write to its port; the guest takes it, ends it and
# lowers it again by another write. A single access is timed to the first instruction of the handler; a block has all.

        .set    PREPARES, 1
        .set    OWN_SINGLE, 1
        .set    IRQ,            5
        .set    VECTOR,         0x20            # of the first PIC's IRQ 0
        .set    PIC1,           0x20
        .set    PIC2,           0xa0
        .set    APIC,           0xfee00000
        .set    SPURIOUS,       0xf0
        .set    LVT_LINT0,      0x350

        .macro  out_byte port, value
        mov     $\value, %al
        outb    %al, $\port
        .endm

        .macro  prepare
        # The gate (SDM vol. 3, 6.14.1), in the code segment we were given.
        mov     $on_irq, %eax
        mov     $IDT + (VECTOR + IRQ) * 16, %edi
        mov     %ax, (%rdi)
        mov     %cs, 2(%rdi)
        movw    $0x8e00, 4(%rdi)
        shr     $16, %eax
        mov     %ax, 6(%rdi)
        movq    $0, 8(%rdi)
        movw    $0xfff, -16(%rsp)
        movq    $IDT, -14(%rsp)
        lidt    -16(%rsp)
        # The PIC pair, ICW1-ICW4, all but our line masked (8259A data sheet).
        out_byte PIC1, 0x11
        out_byte PIC2, 0x11
        out_byte PIC1 + 1, VECTOR
        out_byte PIC2 + 1, VECTOR + 8
        out_byte PIC1 + 1, 4
        out_byte PIC2 + 1, 2
        out_byte PIC1 + 1, 1
        out_byte PIC2 + 1, 1
        out_byte PIC1 + 1, ~(1 << IRQ) & 0xff
        out_byte PIC2 + 1, 0xff
        # The local APIC on, LINT0 = ExtINT: the PIC's output (SDM vol. 3, 11.5.1).
        mov     $APIC, %edi
        movl    $0x1ff, SPURIOUS(%rdi)
        movl    $0x700, LVT_LINT0(%rdi)
        sti
        .endm

        .macro  raise_and_wait
        movl    $0, irq_seen
        mov     $IRQ_PORT + IRQ, %edx
        mov     $1, %al
        outb    %al, %dx
101:    pause
        cmpl    $0, irq_seen
        je      101b
        .endm

        .macro  lower
        mov     $IRQ_PORT + IRQ, %edx
        xor     %eax, %eax
        outb    %al, %dx
        .endm

        .macro  access
        raise_and_wait
        lower
        .endm

        .macro  single
        rdtsc
        mov     %eax, %r8d
        raise_and_wait
        lower
        mov     irq_at, %eax
        .endm

        .include "exits.inc"

on_irq: push    %rax
        push    %rdx
        rdtsc
        mov     %eax, irq_at
        out_byte PIC1, 0x20                     # end of interrupt
        movl    $1, irq_seen
        pop     %rdx
        pop     %rax
        iretq
irq_seen:
        .long   0
irq_at: .long   0
