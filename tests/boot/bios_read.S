# A boot sector that reads one sector of the disk it came from by the BIOS, twice: by cylinder, head and sector (int 13h,
# AH = 02), and by block address (AH = 42). On COM1, a line each: the disk's last cylinder, head and sector as AH = 08
# gives them (CX and DX), what AH = 02 left in AX and the sector's text, the same of AH = 42. Then it ends with 7.
#
# The host puts the sector's CHS at `chs` (CX, then DX) and its block address at `block`.

    ljmp    $0, $start
start:
    xor     %ax, %ax
    mov     %ax, %ds
    mov     %ax, %es
    mov     %ax, %ss
    mov     $0x7c00, %sp
    cld
    mov     %dl, drive

    mov     $0x08, %ah
    int     $0x13
    mov     %cx, value
    mov     %dx, value + 2
    push    %ds
    pop     %es                         # ES:DI was the BIOS's table
    call    line

    mov     $0x0201, %ax
    mov     chs, %cx
    mov     chs + 2, %dx
    mov     drive, %dl
    mov     $BUFFER, %bx
    int     $0x13
    call    answer

    movl    $0, BUFFER
    mov     $0x42, %ah
    mov     drive, %dl
    mov     $packet, %si
    int     $0x13
    call    answer
    finish  7

answer:
    mov     %ax, value
    sbb     %ax, %ax                    # the carry flag: it failed
    mov     %ax, value + 2
    mov     value, %eax
    call    com_hex
    mov     $' ', %al
    call    com_put
    mov     $BUFFER, %si
    jmp     text

line:
    mov     value, %eax
    call    com_hex
    mov     $end, %si
text:
    call    com_print
    mov     $'\n', %al
    jmp     com_put

    .set BUFFER, 0x8000

end:
    .byte   0
drive:
    .byte   0
value:
    .long   0
chs:
    .word   0, 0
packet:                                 # of the extensions: its size, sectors, where to, from which
    .byte   16, 0
    .word   1, BUFFER, 0
block:
    .quad   0

    .include "com16.inc"

    .org    510
    .word   0xaa55
