# linuxboot.S, linked at 0: an option ROM that boots the Linux kernel in fw_cfg, under whatever BIOS runs it.
#
# The BIOS calls it twice: at 3 when it finds the ROM, and at its boot entry vector, in the order of boot devices. Then
# the kernel's parts are fetched by fw_cfg's DMA, which writes anywhere below 4 GiB while the processor stays in real
# mode, and the kernel's own real-mode code is entered, as Linux's Documentation/arch/x86/boot.rst has it.
#
# Where the parts go is said by fw_cfg (QEMU docs/specs/fw_cfg.rst), but for the initrd: that goes to the top of the RAM
# that the BIOS's own memory map leaves.
#
# The ROM's size, and the checksums of ROM and PnP header, are filled in when the image is handed out.

    .set FW_CFG_DMA,        0x514           # 8 bytes, big endian: writing the second half starts a transfer
    .set DMA_SIGNATURE,     0x554d4551      # what the first half reads: "QEMU"
    .set DMA_ERROR,         0x01            # of the control word
    .set DMA_SELECT_READ,   0x0a            # with the item's key in the upper half

    .set KERNEL_ADDR,       0x07
    .set KERNEL_SIZE,       0x08
    .set INITRD_SIZE,       0x0b
    .set KERNEL_DATA,       0x11
    .set INITRD_DATA,       0x12
    .set CMDLINE_ADDR,      0x13
    .set CMDLINE_SIZE,      0x14
    .set CMDLINE_DATA,      0x15
    .set SETUP_ADDR,        0x16
    .set SETUP_SIZE,        0x17
    .set SETUP_DATA,        0x18

    .set E820,              0xe820
    .set SMAP,              0x534d4150
    .set E820_BYTES,        20
    .set E820_RAM,          1

    # The kernel's setup header, offsets from the start of its real-mode part.
    .set RAMDISK_IMAGE,     0x218
    .set RAMDISK_SIZE,      0x21c
    .set VERSION,           0x206
    .set INITRD_ADDR_MAX,   0x22c           # from version 2.03 on
    .set OLD_ADDR_MAX,      0x37ffffff      # of kernels before that
    .set ENTRY_PARAGRAPHS,  0x20

    # Conventional memory above the boot sector's place: a stack, and behind it these.
    .set STACK,             0x9000
    .set ACCESS,            0x9000          # FWCfgDmaAccess: control, length, address, all big endian
    .set ACCESS_LENGTH,     0x9004
    .set ACCESS_ADDRESS,    0x9008
    .set NUMBER,            0x9010          # an item of four bytes
    .set RANGE,             0x9020          # of the memory map: base and length of 8 bytes, type of 4
    .set RANGE_LENGTH,      0x9028
    .set RANGE_TYPE,        0x9030
    .set CALLER_STACK,      0x9040          # SP, SS
    .set SETUP,             0x9048          # where the real-mode part was put
    .set CMDLINE,           0x904c
    .set FLOOR,             0x9050          # the end of the kernel in memory
    .set LIMIT,             0x9054          # where the initrd must end
    .set INITRD_LENGTH,     0x9058
    .set INITRD,            0x905c          # the best place for it so far; 0: none

    .code16
    .globl  start
start:
    .byte   0x55, 0xaa
    .byte   0                               # size in units of 512 bytes
    jmp     found
    .org    0x1a
    .word   pnp

    .org    0x20
pnp:
    .ascii  "$PnP"
    .byte   1                               # revision
    .byte   2                               # length in units of 16 bytes
    .word   0                               # no further header
    .byte   0
    .byte   0                               # checksum
    .long   0
    .word   maker
    .word   product
    .byte   0, 0, 0                         # kind of device: none
    .byte   0x04                            # an IPL device
    .word   0, 0                            # no connection vector, no disconnect vector
    .word   boot                            # boot entry vector
    .word   0, 0

maker:
    .asciz  "pyvmm"
product:
    .asciz  "Linux kernel from fw_cfg"

# The BIOS has found the ROM. AX: what this is, here an IPL device that is there.
found:
    mov     $0x20, %ax
    lret

# The BIOS boots from this device. A return means that it could not: the BIOS goes on with the next one.
boot:
    cli
    cld
    xor     %ax, %ax
    mov     %ax, %ds
    mov     %ax, %es
    mov     %sp, CALLER_STACK
    mov     %ss, CALLER_STACK + 2
    mov     %ax, %ss
    mov     $STACK, %sp
    sti

    mov     $no_dma, %si
    mov     $FW_CFG_DMA, %dx
    inl     %dx, %eax
    cmp     $DMA_SIGNATURE, %eax
    jne     give_up

    # Real-mode part, command line, kernel.
    mov     $no_kernel, %si
    mov     $SETUP_SIZE, %ax
    call    read_number
    test    %eax, %eax
    jz      give_up
    mov     %eax, %ecx
    mov     $SETUP_ADDR, %ax
    call    read_number
    mov     %eax, SETUP
    mov     %eax, %edi
    mov     $SETUP_DATA, %ax
    call    read_item

    mov     $CMDLINE_SIZE, %ax
    call    read_number
    mov     %eax, %ecx
    mov     $CMDLINE_ADDR, %ax
    call    read_number
    mov     %eax, CMDLINE
    mov     %eax, %edi
    mov     $CMDLINE_DATA, %ax
    call    read_item

    mov     $KERNEL_SIZE, %ax
    call    read_number
    mov     %eax, %ecx
    mov     $KERNEL_ADDR, %ax
    call    read_number
    mov     %eax, %edi
    add     %ecx, %eax
    mov     %eax, FLOOR
    mov     $KERNEL_DATA, %ax
    call    read_item

    # initrd, where there is one. GS: the segment of the real-mode part.
    mov     SETUP, %eax
    shr     $4, %eax
    mov     %ax, %gs
    mov     $INITRD_SIZE, %ax
    call    read_number
    mov     %eax, INITRD_LENGTH
    movl    $0, INITRD
    test    %eax, %eax
    jz      1f
    call    find_place
    mov     $no_place, %si
    mov     INITRD, %edi
    test    %edi, %edi
    jz      give_up
    mov     INITRD_LENGTH, %ecx
    mov     $INITRD_DATA, %ax
    call    read_item
1:  mov     INITRD, %eax
    mov     %eax, %gs:RAMDISK_IMAGE
    mov     INITRD_LENGTH, %eax
    mov     %eax, %gs:RAMDISK_SIZE

    # Into the kernel: all segments at the real-mode part, the stack below the command line, interrupts off.
    cli
    mov     CMDLINE, %ebx
    sub     SETUP, %ebx
    sub     $16, %ebx
    mov     %gs, %ax
    mov     %ax, %ds
    mov     %ax, %es
    mov     %ax, %fs
    mov     %ax, %ss
    movzwl  %bx, %esp
    add     $ENTRY_PARAGRAPHS, %ax
    push    %ax
    push    $0
    lret

# SI: why there is nothing to boot. Say so and go back to the BIOS.
give_up:
    mov     %cs:(%si), %al
    inc     %si
    test    %al, %al
    jz      1f
    mov     $0x0e, %ah                      # teletype
    mov     $0x0007, %bx
    push    %si
    int     $0x10
    pop     %si
    jmp     give_up
1:  cli
    mov     CALLER_STACK, %ax
    mov     CALLER_STACK + 2, %ss
    mov     %ax, %sp
    sti
    lret

# AX: key of an item of four bytes, little endian. Returns it in EAX, keeps all else.
read_number:
    push    %ecx
    push    %edi
    mov     $4, %ecx
    mov     $NUMBER, %edi
    call    read_item
    pop     %edi
    pop     %ecx
    mov     NUMBER, %eax
    ret

# AX: key; EDI: physical address; ECX: bytes. Keeps all but EAX. What goes wrong ends the boot.
read_item:
    push    %ecx
    push    %edx
    push    %edi
    shl     $16, %eax
    mov     $DMA_SELECT_READ, %ax
    bswap   %eax
    bswap   %ecx
    bswap   %edi
    mov     %eax, ACCESS
    mov     %ecx, ACCESS_LENGTH
    movl    $0, ACCESS_ADDRESS
    mov     %edi, ACCESS_ADDRESS + 4
    mov     $FW_CFG_DMA, %dx
    xor     %eax, %eax
    outl    %eax, %dx
    add     $4, %dx
    mov     $ACCESS, %eax
    bswap   %eax
    outl    %eax, %dx
1:  mov     ACCESS, %eax                    # zero when done; the error bit when it can't be
    bswap   %eax
    test    $DMA_ERROR, %al
    jnz     2f
    test    %eax, %eax
    jnz     1b
    pop     %edi
    pop     %edx
    pop     %ecx
    ret
2:  mov     $STACK, %sp
    mov     $no_transfer, %si
    jmp     give_up

# INITRD: the highest page in RAM from which INITRD_LENGTH bytes end below what the kernel allows, and that lies above
# the kernel. The memory map is asked range by range.
find_place:
    cmpl    $0x100000, FLOOR                # a zImage lies in conventional memory, and keeps all of that
    jae     1f
    movl    $0x100000, FLOOR
1:  mov     $OLD_ADDR_MAX, %eax
    cmpw    $0x203, %gs:VERSION
    jb      1f
    mov     %gs:INITRD_ADDR_MAX, %eax
1:  inc     %eax
    jnz     1f
    dec     %eax                            # all of 4 GiB but its last byte
1:  mov     %eax, LIMIT
    xor     %ebx, %ebx
next_range:
    mov     $E820, %eax
    mov     $SMAP, %edx
    mov     $E820_BYTES, %ecx
    mov     $RANGE, %di
    int     $0x15
    jc      2f
    cmp     $SMAP, %eax
    jne     2f
    cmpl    $E820_RAM, RANGE_TYPE
    jne     1f
    cmpl    $0, RANGE + 4                   # above 4 GiB
    jne     1f

    mov     RANGE, %eax                     # EDX: its end, at most the limit
    mov     %eax, %edx
    add     RANGE_LENGTH, %edx
    jc      3f
    cmpl    $0, RANGE_LENGTH + 4
    jne     3f
    cmp     LIMIT, %edx
    jbe     4f
3:  mov     LIMIT, %edx
4:  cmp     FLOOR, %eax                     # EAX: its start, at least the end of the kernel
    jae     5f
    mov     FLOOR, %eax
5:  sub     INITRD_LENGTH, %edx
    jb      1f
    and     $0xfffff000, %edx
    cmp     %eax, %edx
    jb      1f
    cmp     INITRD, %edx
    jbe     1f
    mov     %edx, INITRD
1:  test    %ebx, %ebx
    jnz     next_range
2:  ret

no_dma:
    .asciz  "linuxboot: fw_cfg has no DMA\r\n"
no_kernel:
    .asciz  "linuxboot: no kernel in fw_cfg\r\n"
no_place:
    .asciz  "linuxboot: not enough memory for the initrd\r\n"
no_transfer:
    .asciz  "linuxboot: fw_cfg refused a transfer\r\n"
