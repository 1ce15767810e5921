# The guest of benchmarks/ide.py: a disk that boots under SeaBIOS, and then moves sectors as it is told over COM1.
#
# The first sector is the boot sector; the BIOS loads it at 0x7c00, and it loads the rest of itself behind. Then it says
# READY and waits for requests of four bytes: the number of a case (the table `cases` below), a count of commands (two bytes,
# little endian), and a digit that it gives back. It answers with one line,
#
#       T digit ticks polls        (hexadecimal: TSC ticks between the marks, reads of the two status registers)
#       E digit status             (hexadecimal: the ATA status register, or AH of int 13h, where a command failed)
#
# While it waits it halts, and looks at the serial port at each tick of the PIT (18.2 a second): a waiting guest leaves the
# processor to the one whose turn it is.
#
# PIO as SeaBIOS and Linux's libata do it: wait for BSY to go; load all seven registers; read the alternate status register
# once (that takes the 400 ns after which BSY is valid), then poll status until BSY is clear; look at DRQ, ERR and DF; move
# one block by REP INSW or REP OUTSW; again. After the last block the same once more, and DRQ must be clear. nIEN is set.

    .code16

    .set BUFFER_SEGMENT,    0x2000          # 64 KiB: the largest command here moves 128 sectors
    .set MORE_SECTORS,      3               # of this program, behind the boot sector
    .set AREA,              0x800           # first sector that is read and written: 1 MiB from the start
    .set AREA_MASK,         0x7fff          # commands go through 16 MiB, again and again

    .set DATA,              0x1f0
    .set FEATURES,          0x1f1
    .set COUNT,             0x1f2
    .set LBA_LOW,           0x1f3
    .set LBA_MID,           0x1f4
    .set LBA_HIGH,          0x1f5
    .set DEVICE,            0x1f6
    .set STATUS,            0x1f7
    .set COMMAND,           0x1f7
    .set CONTROL,           0x3f6           # write: device control; read: alternate status
    .set CONTROL_NIEN,      0x0a            # bit 3 was always set on old drives
    .set BSY,               0x80
    .set DF,                0x20
    .set DRQ,               0x08
    .set ERR,               0x01
    .set DEVICE_LBA,        0xe0

    .set READ_SECTORS,      0x20
    .set WRITE_SECTORS,     0x30
    .set READ_MULTIPLE,     0xc4
    .set WRITE_MULTIPLE,    0xc5
    .set SET_MULTIPLE,      0xc6
    .set BLOCK,             16              # sectors a block of READ and WRITE MULTIPLE

    .set TIMER_VECTOR,      8
    .set PIC1_COMMAND,      0x20
    .set PIC_EOI,           0x20

    .set COM1,              0x3f8
    .set COM1_LCR,          0x3fb
    .set COM1_LSR,          0x3fd
    .set LSR_DR,            0x01
    .set LSR_THRE,          0x20

    .globl _start
_start:
    ljmp    $0, $1f
1:  xor     %ax, %ax
    mov     %ax, %ds
    mov     %ax, %es
    mov     %ax, %ss
    mov     $0x7c00, %sp
    cld
    mov     %dl, drive
    mov     $0x0200 | MORE_SECTORS, %ax
    mov     $0x0002, %cx                    # cylinder 0, sector 2
    mov     $0, %dh
    mov     $0x7e00, %bx
    int     $0x13
    jc      2f
    jmp     main
2:  hlt                                     # the host sees no READY
    jmp     2b

drive:
    .byte   0                               # before the sectors that are loaded

    .org    510
    .word   0xaa55

# ---- behind the boot sector ----------------------------------------------------------------------------------------------

main:
    mov     $COM1_LCR, %dx
    mov     $0x03, %al                      # 8 bits, no parity
    out     %al, %dx
    # The timer only wakes: the BIOS's handler would take what comes over COM1 for a keyboard (etc/sercon-port).
    cli
    movw    $on_timer, TIMER_VECTOR * 4
    movw    $0, TIMER_VECTOR * 4 + 2
    mov     $BUFFER_SEGMENT, %ax
    mov     %ax, %es
    mov     $READY, %si
    call    print
    # READ and WRITE MULTIPLE want to know their block, once.
    mov     $CONTROL, %dx
    mov     $CONTROL_NIEN, %al
    out     %al, %dx
    call    not_busy
    mov     $DEVICE, %dx
    mov     $DEVICE_LBA, %al
    out     %al, %dx
    mov     $COUNT, %dx
    mov     $BLOCK, %al
    out     %al, %dx
    mov     $COMMAND, %dx
    mov     $SET_MULTIPLE, %al
    out     %al, %dx
    call    settled

    jmp     next_request

on_timer:
    push    %ax
    mov     $PIC_EOI, %al
    out     %al, $PIC1_COMMAND
    pop     %ax
    iret

next_request:
    sti
    hlt
    cli
    mov     $COM1_LSR, %dx
    in      %dx, %al
    test    $LSR_DR, %al
    jz      next_request
    call    receive
    mov     %al, %bl
    call    receive
    mov     %al, repeats
    call    receive
    mov     %al, repeats + 1
    call    receive
    mov     %al, tag
    # SI = its line of the table
    xor     %bh, %bh
    shl     $3, %bx
    lea     cases(%bx), %si
    movl    $AREA, lba
    movl    $0, polls
    mov     $CONTROL, %dx                   # the BIOS may have touched it
    mov     $CONTROL_NIEN, %al
    out     %al, %dx

    rdtsc
    mov     %eax, start
    mov     %edx, start + 4
1:  call    *(%si)
    jc      failed
    mov     4(%si), %ax                     # sectors a command
    movzwl  %ax, %eax
    mov     lba, %ecx
    sub     $AREA, %ecx
    add     %ecx, %eax
    and     $AREA_MASK, %eax
    add     $AREA, %eax
    mov     %eax, lba
    decw    repeats
    jnz     1b
    rdtsc
    sub     start, %eax
    sbb     start + 4, %edx
    mov     %eax, start
    mov     %edx, start + 4

    mov     $'T', %al
    call    print_mark
    mov     start + 4, %eax
    call    print_hex
    mov     start, %eax
    call    print_hex
    mov     $' ', %al
    call    send
    mov     polls, %eax
    call    print_hex
    jmp     2f
failed:
    push    %ax
    mov     $'E', %al
    call    print_mark
    pop     %ax
    movzbl  %al, %eax
    call    print_hex
2:  mov     $'\n', %al
    call    send
    jmp     next_request

# A line a case: what to call, the ATA command (or AH of int 13h), sectors a command, sectors a block.
cases:
    .macro  case routine, command, sectors, block
    .word   \routine, \command, \sectors, \block
    .endm
    case    pio_read, READ_SECTORS, 1, 1
    case    pio_read, READ_SECTORS, 128, 1
    case    pio_read, READ_MULTIPLE, 128, BLOCK
    case    pio_write, WRITE_SECTORS, 1, 1
    case    pio_write, WRITE_SECTORS, 128, 1
    case    pio_write, WRITE_MULTIPLE, 128, BLOCK
    case    bios, 0x42, 1, 0
    case    bios, 0x42, 64, 0
    case    bios, 0x43, 1, 0
    case    bios, 0x43, 64, 0
    case    nothing, 0, 0, 0

nothing:
    clc
    ret

# ---- PIO: SI = line of the table; carry and AL = status where it failed ----------------------------------------------------

pio_read:
    call    command
    mov     4(%si), %bp                     # sectors left
    xor     %di, %di
1:  call    settled
    mov     %al, %ah
    and     $DRQ | ERR | DF, %ah
    cmp     $DRQ, %ah
    jne     bad
    mov     6(%si), %cx                     # a block
    sub     %cx, %bp
    shl     $8, %cx                         # in words
    mov     $DATA, %dx
    rep insw
    test    %bp, %bp
    jnz     1b
    jmp     command_over

pio_write:
    call    command
    mov     4(%si), %bp
    xor     %di, %di
1:  call    settled
    mov     %al, %ah
    and     $DRQ | ERR | DF, %ah
    cmp     $DRQ, %ah
    jne     bad
    mov     6(%si), %cx
    sub     %cx, %bp
    shl     $8, %cx
    mov     $DATA, %dx
    push    %ds
    push    %si
    mov     %di, %si
    push    %es
    pop     %ds
    rep outsw
    mov     %si, %di
    pop     %si
    pop     %ds
    test    %bp, %bp
    jnz     1b

command_over:
    call    settled
    test    $DRQ | ERR | DF, %al
    jnz     bad
    clc
    ret
bad:
    stc
    ret

# All seven registers, then the drive has the command.
command:
    call    not_busy
    mov     $FEATURES, %dx
    xor     %al, %al
    out     %al, %dx
    inc     %dx
    mov     4(%si), %al
    out     %al, %dx
    inc     %dx
    mov     lba, %eax
    out     %al, %dx
    inc     %dx
    shr     $8, %eax
    out     %al, %dx
    inc     %dx
    shr     $8, %eax
    out     %al, %dx
    inc     %dx
    mov     %ah, %al
    or      $DEVICE_LBA, %al
    out     %al, %dx
    inc     %dx
    mov     2(%si), %al
    out     %al, %dx
    ret

# 400 ns, then until BSY is clear. AL = status.
settled:
    mov     $CONTROL, %dx
    in      %dx, %al
    incl    polls
not_busy:
    mov     $STATUS, %dx
1:  in      %dx, %al
    incl    polls
    test    $BSY, %al
    jnz     1b
    ret

# ---- the BIOS: int 13h extensions, a packet that says where to and where from ----------------------------------------------

bios:
    mov     4(%si), %ax
    mov     %ax, packet_count
    mov     lba, %eax
    mov     %eax, packet_lba
    push    %si
    mov     2(%si), %ah
    xor     %al, %al                        # write without verify
    mov     drive, %dl
    mov     $packet, %si
    int     $0x13
    cli
    pop     %si
    mov     %ah, %al
    ret

# ---- COM1 ----------------------------------------------------------------------------------------------------------------

receive:
    mov     $COM1_LSR, %dx
1:  in      %dx, %al
    test    $LSR_DR, %al
    jz      1b
    mov     $COM1, %dx
    in      %dx, %al
    ret

send:
    push    %dx
    push    %ax
    mov     $COM1_LSR, %dx
1:  in      %dx, %al
    test    $LSR_THRE, %al
    jz      1b
    pop     %ax
    mov     $COM1, %dx
    out     %al, %dx
    pop     %dx
    ret

print:
    lodsb
    test    %al, %al
    jz      1f
    call    send
    jmp     print
1:  ret

print_mark:                                 # AL, then the request's digit
    call    send
    mov     $' ', %al
    call    send
    mov     tag, %al
    call    send
    mov     $' ', %al
    jmp     send

print_hex:                                  # EAX
    mov     $8, %cx
1:  rol     $4, %eax
    push    %eax
    and     $0x0f, %al
    add     $'0', %al
    cmp     $'9', %al
    jbe     2f
    add     $'a' - '0' - 10, %al
2:  call    send
    pop     %eax
    loop    1b
    ret

# ---- data ----------------------------------------------------------------------------------------------------------------

READY:      .asciz "\nREADY\n"
tag:        .byte 0
repeats:    .word 0
    .balign 4
lba:        .long 0
polls:      .long 0
start:      .quad 0
packet:     .byte 16, 0
packet_count: .word 0
            .word 0, BUFFER_SEGMENT         # offset, segment
packet_lba: .quad 0

    .org    (MORE_SECTORS + 1) * 512
