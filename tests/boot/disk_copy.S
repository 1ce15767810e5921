# A boot sector, and what it loads behind itself: copies ranges of sectors on the first disk, each read in one way and
# written in another. The host appends the table at `jobs`: a read method, a write method, a count in a word, first
# source and first destination sector in 32 bits; the last has count 0. Says "copied" or "failed" on COM1, and powers off.

    .set METHOD_CHS, 0                  # BIOS int 13h, AH = 02 and 03
    .set METHOD_EDD, 1                  # BIOS int 13h, AH = 42 and 43
    .set FIRST_PIO, 2                   # the rows of pio_methods
    .set MULTIPLE, 16
    .set BUFFER_SEGMENT, 0x1000
    .set MORE_SECTORS, 3                # of this program, behind the boot sector

    ljmp    $0, $start
start:
    xor     %ax, %ax
    mov     %ax, %ds
    mov     %ax, %es
    mov     %ax, %ss
    mov     $0x7c00, %sp
    cld
    mov     %dl, drive
    mov     $0x0200 | MORE_SECTORS, %ax
    mov     $0x0002, %cx                # cylinder 0, sector 2
    xor     %dh, %dh
    mov     $more, %bx
    int     $0x13
    jnc     main
1:  hlt
    jmp     1b

drive:
    .byte   0

    .org    510
    .word   0xaa55
more:

    .include "ide16.inc"
    .include "com16.inc"

main:
    mov     $0x08, %ah                  # geometry
    mov     drive, %dl
    int     $0x13
    jc      failed
    and     $0x3f, %cx
    mov     %cx, sectors_a_track
    movzx   %dh, %ax
    inc     %ax
    mov     %ax, heads
    call    ata_open
    mov     $((MULTIPLE << 8) | ATA_SET_MULTIPLE), %ax
    call    ata_command
    jc      failed

    mov     $jobs, %bp
next:
    mov     2(%bp), %cx
    test    %cx, %cx
    jz      done
    mov     (%bp), %al                  # by this
    mov     4(%bp), %ebx                # from here
    xor     %ah, %ah                    # read
    call    transfer
    jc      failed
    mov     2(%bp), %cx
    mov     1(%bp), %al
    mov     8(%bp), %ebx
    mov     $1, %ah
    call    transfer
    jc      failed
    add     $12, %bp
    jmp     next

done:
    mov     $ATA_FLUSH, %ax
    call    ata_command
    jc      failed
    mov     $copied, %si
    call    com_print
    power_off

failed:
    push    %ax
    mov     $failure, %si
    call    com_print
    movzx   %bp, %eax
    sub     $jobs, %ax
    call    com_hex
    mov     $' ', %al
    call    com_put
    pop     %ax
    movzx   %ax, %eax
    call    com_hex
    mov     $newline, %si
    call    com_print
    power_off

# AL = method, AH = 1 to write, EBX = first sector, CX = count, from or to BUFFER_SEGMENT. Carry: AX says why.
transfer:
    push    %bp
    push    %es
    push    $BUFFER_SEGMENT
    pop     %es
    cmp     $METHOD_CHS, %al
    je      by_chs
    cmp     $METHOD_EDD, %al
    je      by_edd
    push    %ax
    push    %cx
    call    ata_open
    pop     %cx
    pop     %ax
    xor     %di, %di
    movzx   %al, %bp
    shl     $2, %bp
    add     $(pio_methods - FIRST_PIO * 4), %bp
    movzxb  3(%bp), %si
    test    %ah, %ah
    jnz     1f
    mov     (%bp), %al
    mov     2(%bp), %ah
    call    ata_read
    jmp     2f
1:  mov     1(%bp), %al
    mov     2(%bp), %ah
    call    ata_write
2:  pop     %es
    pop     %bp
    ret

by_chs:
    mov     %cl, %al
    add     $2, %ah
    push    %ax
    call    ata_close
    mov     %ebx, %eax
    xor     %edx, %edx
    movzxw  sectors_a_track, %ecx
    div     %ecx
    inc     %dl
    mov     %dl, %cl                    # sector, from 1
    movzxw  heads, %esi
    xor     %edx, %edx
    div     %esi
    mov     %dl, %dh                    # head
    mov     %al, %ch                    # cylinder, bits 0 to 7
    shl     $6, %ah
    or      %ah, %cl                    # bits 8 and 9
    pop     %ax
    xor     %bx, %bx
    mov     drive, %dl
    int     $0x13
    jmp     2b

by_edd:
    mov     %cx, packet_count
    mov     %ebx, packet_sector
    mov     %ah, %bl
    call    ata_close
    mov     %bl, %ah
    add     $0x42, %ah
    xor     %al, %al
    mov     $packet, %si
    mov     drive, %dl
    int     $0x13
    jmp     2b

# read command, write command, 1 for 48 bits, sectors a block
pio_methods:
    .byte   ATA_READ, ATA_WRITE, 0, 1
    .byte   ATA_READ_MULTIPLE, ATA_WRITE_MULTIPLE, 0, MULTIPLE
    .byte   ATA_READ_EXT, ATA_WRITE_EXT, 1, 1
    .byte   ATA_READ_MULTIPLE_EXT, ATA_WRITE_MULTIPLE_EXT, 1, MULTIPLE

sectors_a_track: .word 0
heads:           .word 0

packet:
    .byte   16, 0
packet_count:
    .word   0
    .word   0, BUFFER_SEGMENT
packet_sector:
    .quad   0

copied:  .asciz "copied\r\n"
failure: .asciz "failed at job offset and AX "
newline: .asciz "\r\n"

# `jobs` comes from the host, and the end: .org 512 * (1 + MORE_SECTORS).
