# interrupt.S, linked at 0x100000: what `pyvmm doctor` runs. Entered in long mode with 4 GiB mapped one-to-one.
# Takes three ticks of the PIT through the PIC and the local APIC's LINT0, then writes 0x2a to isa-debug-exit;
# 0x11 when no tick comes within about a billion turns, so that the host's time limit is the last resort only.

        .intel_syntax noprefix
        .code64
        .set    TICKS, 3
        .set    VECTOR, 0x20            # where IRQ 0 goes
        .set    IDT, 0x200000           # 256 gates of 16 bytes
        .set    STACK, 0x300000

start:  mov     esp, STACK
        # One interrupt gate: offset in three pieces, selector 0x10, type 0xe, present (SDM vol. 3, 6.14.1).
        lea     rax, [rip + tick]
        mov     edi, IDT + VECTOR * 16
        mov     [rdi], ax
        mov     word ptr [rdi + 2], 0x10
        mov     word ptr [rdi + 4], 0x8e00
        shr     rax, 16
        mov     [rdi + 6], ax
        shr     rax, 16
        mov     [rdi + 8], eax
        mov     dword ptr [rdi + 12], 0
        lidt    [rip + idtr]

        # The PIC pair: ICW1-ICW4, then only IRQ 0 open (8259A data sheet).
        mov     al, 0x11
        out     0x20, al
        out     0xa0, al
        mov     al, VECTOR
        out     0x21, al
        mov     al, VECTOR + 8
        out     0xa1, al
        mov     al, 4
        out     0x21, al
        mov     al, 2
        out     0xa1, al
        mov     al, 1
        out     0x21, al
        out     0xa1, al
        mov     al, 0xfe
        out     0x21, al
        mov     al, 0xff
        out     0xa1, al

        # Local APIC on, LINT0 = ExtINT: the PIC's output reaches the processor (SDM vol. 3, 11.5.1).
        mov     edi, 0xfee00000
        mov     dword ptr [rdi + 0xf0], 0x1ff
        mov     dword ptr [rdi + 0x350], 0x700

        # PIT counter 0, mode 2, every 11932 pulses: 100 a second.
        mov     al, 0x34
        out     0x43, al
        mov     al, 0x9c
        out     0x40, al
        mov     al, 0x2e
        out     0x40, al

        xor     ebx, ebx                # ticks so far
        mov     ecx, 1000000000
        sti
wait:   cmp     ebx, TICKS
        jae     good
        pause
        dec     ecx
        jnz     wait
        mov     eax, 0x11
        jmp     end
good:   mov     eax, 0x2a
end:    cli
        out     0xf4, eax
stop:   hlt
        jmp     stop

tick:   inc     ebx
        push    rax
        mov     al, 0x20                # end of interrupt
        out     0x20, al
        pop     rax
        iretq

        .balign 8
idtr:   .word   256 * 16 - 1
        .quad   IDT
