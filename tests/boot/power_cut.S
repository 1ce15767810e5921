# Writes numbered batches of sectors to the first disk until somebody cuts the power, with no BIOS. After each batch comes
# FLUSH CACHE, and when that is complete the batch's number on COM1, eight hexadecimal digits and a line feed.
#
# Batch n takes a turn of three ways to write: one command a sector (the four sectors each on their own), WRITE
# MULTIPLE (16 sectors), bus-master DMA (128 sectors out of two regions of memory). It goes to slot n % SLOTS of 128 sectors
# from sector FIRST_SECTOR on. Dword i of sector s in batch n is n, s, and then n * 0x9e3779b9 + s all through.
# Errors: "error", AX, and no more batches. The host sets `batch`, the number of the first one.

    .set FIRST_SECTOR, 64
    .set SLOTS, 16
    .set SLOT_SECTORS, 128
    .set BUFFER, 0x10000                # 64 KiB
    .set MULTIPLE, 16

    .set PCI_ADDRESS, 0xcf8
    .set PCI_DATA, 0xcfc
    .set PCI_IDE, 0x80000900            # bus 0, device 1, function 1
    .set BUS_MASTER, 0xc000             # where this puts the primary channel's registers
    .set BM_COMMAND, BUS_MASTER
    .set BM_STATUS, BUS_MASTER + 2
    .set BM_TABLE, BUS_MASTER + 4
    .set ATA_WRITE_DMA, 0xca

    ljmp    $0, $start

    .include "ide16.inc"
    .include "com16.inc"

start:
    xor     %ax, %ax
    mov     %ax, %ds
    mov     %ax, %ss
    mov     $0x7c00, %sp
    mov     $(BUFFER >> 4), %ax
    mov     %ax, %es
    cld
    mov     $(PCI_IDE + 0x20), %eax     # BAR 4
    mov     $BUS_MASTER, %ecx
    call    pci_write
    mov     $(PCI_IDE + 0x04), %eax     # command: I/O, bus master
    mov     $0x05, %ecx
    call    pci_write
    call    ata_open
    mov     $((MULTIPLE << 8) | ATA_SET_MULTIPLE), %ax
    call    ata_command
    jc      failed

next:
    mov     batch, %eax                 # slot: EBX = its first sector
    mov     %eax, %ebx
    and     $(SLOTS - 1), %ebx
    imul    $SLOT_SECTORS, %ebx, %ebx
    add     $FIRST_SECTOR, %ebx
    xor     %edx, %edx
    mov     $3, %ecx
    div     %ecx
    cmp     $1, %dx
    jb      singly
    je      multiple

dma:
    mov     $128, %cx
    call    fill
    call    write_dma
    jc      failed
    jmp     flush

multiple:
    mov     $16, %cx
    call    fill
    mov     $ATA_WRITE_MULTIPLE, %ax
    mov     $MULTIPLE, %si
    mov     $16, %cx
    xor     %di, %di
    call    ata_write
    jc      failed
    jmp     flush

singly:
    mov     $4, %cx
    call    fill
    xor     %di, %di
    mov     $4, %cx
1:  push    %cx
    mov     $ATA_WRITE, %ax
    mov     $1, %cx
    mov     $1, %si
    call    ata_write
    pop     %cx
    jc      failed
    inc     %ebx
    loop    1b

flush:
    mov     $ATA_FLUSH, %ax
    call    ata_command
    jc      failed
    mov     batch, %eax
    call    com_hex
    mov     $'\n', %al
    call    com_put
    incl    batch
    jmp     next

failed:
    push    %ax
    mov     $failure, %si
    call    com_print
    pop     %ax
    movzwl  %ax, %eax
    call    com_hex
    mov     $'\n', %al
    call    com_put
1:  cli
    hlt
    jmp     1b

# EAX = address, ECX = value
pci_write:
    mov     $PCI_ADDRESS, %dx
    outl    %eax, %dx
    mov     $PCI_DATA, %dx
    mov     %ecx, %eax
    outl    %eax, %dx
    ret

# CX sectors of this batch, from BUFFER on. EBX stays.
fill:
    xor     %di, %di
    xor     %esi, %esi                  # sector in the batch
1:  push    %cx
    mov     batch, %eax
    mov     %eax, %es:(%di)
    mov     %esi, %es:4(%di)
    imul    $0x9e3779b9, %eax, %eax
    add     %esi, %eax
    add     $8, %di
    mov     $126, %cx
    rep stosl
    inc     %esi
    pop     %cx
    loop    1b
    ret

# 128 sectors from BUFFER to EBX by bus-master DMA. Carry: AX says why.
write_dma:
    mov     $BM_COMMAND, %dx
    xor     %al, %al
    outb    %al, %dx
    mov     $BM_STATUS, %dx
    mov     $0x06, %al                  # error and interrupt: written ones clear them
    outb    %al, %dx
    mov     $BM_TABLE, %dx
    mov     $table, %eax
    outl    %eax, %dx
    call    ata_wait
    mov     $ATA_DEVICE, %dx
    mov     %ebx, %eax
    shr     $24, %eax
    or      $0xe0, %al
    outb    %al, %dx
    mov     $ATA_COUNT, %dx
    mov     $128, %al
    outb    %al, %dx
    mov     %ebx, %eax
    inc     %dx
    outb    %al, %dx
    shr     $8, %eax
    inc     %dx
    outb    %al, %dx
    shr     $8, %eax
    inc     %dx
    outb    %al, %dx
    mov     $ATA_COMMAND, %dx
    mov     $ATA_WRITE_DMA, %al
    outb    %al, %dx
    mov     $BM_COMMAND, %dx
    mov     $0x01, %al                  # start, from memory
    outb    %al, %dx
    mov     $BM_STATUS, %dx
1:  inb     %dx, %al
    test    $0x02, %al                  # error
    jnz     2f
    test    $0x01, %al                  # active
    jnz     1b
2:  push    %ax
    mov     $BM_COMMAND, %dx
    xor     %al, %al
    outb    %al, %dx
    call    ata_wait
    pop     %cx
    jc      3f
    test    $0x02, %cl
    jz      3f
    mov     %cx, %ax
    mov     $0xbb, %ah
    stc
3:  ret

    .balign 8
table:                                  # physical region descriptors: neither may cross 64 KiB
    .long   BUFFER
    .word   0x4000, 0
    .long   BUFFER + 0x4000
    .word   0xc000, 0x8000              # the last

batch:   .long 0
failure: .asciz "error "
