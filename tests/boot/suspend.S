# A boot sector, and what it loads behind itself: suspends the machine to RAM as an operating system does, and says on
# COM1 what it finds when the BIOS has brought it back. {wakes} arms what is to wake it.

    .set MORE_SECTORS, 3                # of this program, behind the boot sector
    .set RESUME, 0x2000                 # the waking vector
    .set MARK, 0x300000                 # must outlive the sleep

    ljmp    $0, $start
start:
    xor     %ax, %ax
    mov     %ax, %ds
    mov     %ax, %es
    mov     %ax, %ss
    mov     $0x7c00, %sp
    cld
    mov     $0x0200 | MORE_SECTORS, %ax
    mov     $0x0002, %cx                # cylinder 0, sector 2
    xor     %dh, %dh
    mov     $more, %bx
    int     $0x13
    jnc     main
1:  hlt
    jmp     1b

    .org    510
    .word   0xaa55
more:

    .include "com16.inc"

main:
    mov     $going, %si
    call    com_print
    mov     $resume, %si
    mov     $RESUME, %di
    mov     $resume_end - resume, %cx
    rep movsb
    cli
    lgdtl   gdt_pointer
    mov     %cr0, %eax
    or      $1, %al
    mov     %eax, %cr0
    ljmpl   $8, $flat

going: .asciz "going to sleep\n"

# Copied to RESUME.
resume:
    mov     %cs, %bp
    ljmp    $0, $resumed
resume_end:

resumed:
    mov     $awake, %si
    call    com_print
    movzx   %bp, %eax
    call    com_hex
    mov     $0x600, %dx                 # PM1 status: what has woken us
    xor     %eax, %eax
    inw     %dx, %ax
    call    com_hex
    mov     $0x0f, %al                  # CMOS: the BIOS has taken the word back
    outb    %al, $0x70
    xor     %eax, %eax
    inb     $0x71, %al
    call    com_hex
    cli
    lgdtl   gdt_pointer
    mov     %cr0, %eax
    or      $1, %al
    mov     %eax, %cr0
    ljmpl   $8, $look
awake: .asciz "awake "

    .code32
    .include "s3.inc"
flat:
    mov     $16, %ax
    mov     %ax, %ds
    mov     %ax, %es
    mov     %ax, %ss
    mov     $0x7c00, %esp
    movl    $0x600d600d, MARK
    mov     $RESUME, %eax
    mov     $FACS_VECTOR, %ecx
    call    s3_prepare
    {wakes}
    call    s3_sleep

look:
    mov     $16, %ax
    mov     %ax, %ds
    cmpl    $0x600d600d, MARK
    je      1f
    finish  2
1:  finish  1

    .balign 8
gdt:
    .quad   0
    .quad   0x00cf9a000000ffff
    .quad   0x00cf92000000ffff
gdt_pointer:
    .word   23
    .long   gdt
    .org    512 * (1 + MORE_SECTORS)
