# reset.S, linked at 0xff00. The end of a 64 KiB ROM: from the reset vector to the guest that stands at the ROM's start.
# The guest is copied to 0x100000 and entered at +16 in flat 32-bit protected mode. A ROM's last 64 KiB are seen at
# 0xf0000 (QEMU's pc and microvm, kvmtool); a loop of our own puts them there as plain RAM.

        .set    ROM,            0xf0000
        .set    LOAD,           0x100000
        .set    GUEST_BYTES,    0xff00

        .code16
reset:  cli
        cld
        lgdtl   %cs:gdt_pointer
        mov     %cr0, %eax
        or      $1, %eax                        # PE
        mov     %eax, %cr0
        ljmpl   $0x08, $ROM + protected

        .code32
protected:
        mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $ROM, %esi
        mov     $LOAD, %edi
        mov     $GUEST_BYTES / 4, %ecx
        rep movsl
        mov     $LOAD + 16, %eax
        jmp     *%eax

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff              # 08: code
        .quad   0x00cf93000000ffff              # 10: data
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   ROM + gdt

        .org    0xf0
        .code16
        ljmp    $0xf000, $reset
        .org    0x100
