# virtio_blk.S, linked at 0x100000. The guest of `pyvmm bench disk`: a driver for virtio-blk-pci (OASIS virtio 1.2, 2.7, 4.1,
# 5.2) of its own, with one split queue, which reads or writes as the mailbox says and times it by RDTSC.
#
# It is a ROM (reset.S), so there is no firmware: it gives the function its addresses, and finds the rest by the function's
# capabilities. Of features it takes VERSION_1, EVENT_IDX and FLUSH. It keeps `depth` requests in flight: whatever has come
# back is looked at, then as many new ones are made available, then the device is told, where it wants that.
#
# It waits in one of two ways. Polling, it looks at the used ring's index, and tells the device to interrupt at an index that
# does not come. By interrupt, it asks for one at the next used element, and halts.

        .set    LOAD,           0x100000
        .set    IDT,            0x160000
        .set    STACK,          0x170000        # grows down
        .set    MAILBOX,        0x180000

        .set    BOX_MAGIC,      MAILBOX + 0x00  # 8 bytes, the guest's: ready, or FAILED
        .set    BOX_TURN,       MAILBOX + 0x08  # the host's: another number starts a turn
        .set    BOX_DONE,       MAILBOX + 0x0c  # the guest's: that turn is over
        .set    BOX_COUNT,      MAILBOX + 0x10  # requests in all,
        .set    BOX_DEPTH,      MAILBOX + 0x14  # so many at a time, up to SLOTS,
        .set    BOX_SECTORS,    MAILBOX + 0x18  # of so many sectors, up to SLOT_BYTES,
        .set    BOX_MASK,       MAILBOX + 0x1c  # among so many places less one: a power of two less one
        .set    BOX_FLAGS,      MAILBOX + 0x20
        .set    BOX_TICKS,      MAILBOX + 0x40  # 8 bytes: the turn, in TSC ticks
        .set    BOX_SUM,        MAILBOX + 0x48  # 8 bytes: of the first 8 bytes of all that was read
        .set    BOX_ERRORS,     MAILBOX + 0x50  # requests whose status was not 0
        .set    BOX_KICKS,      MAILBOX + 0x54  # writes to the doorbell
        .set    BOX_IRQS,       MAILBOX + 0x58  # interrupts taken

        .set    RANDOM,         1               # flags: places at random, as it were, else in order
        .set    BY_INTERRUPT,   2
        .set    WRITE,          4

        .set    MAGIC,          0x316d6d7679702121
        .set    FAILED,         0x6c69616621212121

        .set    CODE32,         0x08
        .set    CODE64,         0x10
        .set    DATA,           0x18

        .set    STRIDE,         0x9e3779b1      # odd: from place to place all over the disk, and to each of them once

        # The queue, and what its descriptors point to. Each slot has four of them, and uses three.
        .set    QUEUE_SIZE,     256
        .set    SLOTS,          64
        .set    DESC,           0x190000
        .set    AVAIL,          0x192000
        .set    USED,           0x194000
        .set    AVAIL_IDX,      AVAIL + 2
        .set    AVAIL_RING,     AVAIL + 4
        .set    USED_EVENT,     AVAIL + 4 + 2 * QUEUE_SIZE
        .set    USED_IDX,       USED + 2
        .set    USED_RING,      USED + 4
        .set    AVAIL_EVENT,    USED + 4 + 8 * QUEUE_SIZE
        .set    HEADERS,        0x198000        # 16 bytes a slot: type, 0, sector
        .set    STATUS,         0x199000        # 1 byte a slot
        .set    SLOT_SHIFT,     20
        .set    SLOT_BYTES,     1 << SLOT_SHIFT
        .set    BUFFERS,        0x1000000       # SLOT_BYTES a slot
        .set    NEXT,           1               # flags of a descriptor (2.7.5)
        .set    WRITABLE,       2

        .include "virtio_pci.inc"
        .set    TRANSITIONAL,   0x10011af4      # 4.1.2
        .set    MODERN,         0x10421af4
        .set    F_FLUSH,        1 << 9

        # The request of slot EBX into the available ring. Clobbers EAX, EDX.
        .macro  make_available
        mov     %r12, %rax
        imul    %rdi, %rax
        mov     %ebx, %edx
        shl     $4, %edx
        mov     %rax, HEADERS + 8(%rdx)
        movb    $0xff, STATUS(%rbx)
        add     %r14, %r12
        and     %rbp, %r12
        mov     %r10d, %edx
        and     $QUEUE_SIZE - 1, %edx
        lea     (, %rbx, 4), %eax
        mov     %ax, AVAIL_RING(, %rdx, 2)
        inc     %r10d
        dec     %r8d
        .endm

        .include "entry.inc"
        call    find_function
        call    give_addresses
        call    read_capabilities
        call    take_interrupts
        call    start_device
        mov     BOX_TURN, %eax
        mov     %eax, BOX_DONE
        mov     $MAGIC, %rax
        mov     %rax, BOX_MAGIC

turn:   pause
        mov     BOX_TURN, %eax
        cmp     %eax, BOX_DONE
        je      turn
        call    requests
        mov     BOX_TURN, %eax
        mov     %eax, BOX_DONE
        jmp     turn

failed: mov     $FAILED, %rax
        mov     %rax, BOX_MAGIC
1:      cli
        hlt
        jmp     1b

# -- a turn ----------------------------------------------------------------------------------------------------------
#
# Few instructions a request: in a KVM that emulates them, each is a third of a microsecond that is nobody's but ours.
#
# R8D   still to be made available        R9D   still to come back          R10D  index in the available ring
# R11D  index in the used ring            R12   place                       R13   the doorbell
# R14   from a place to the next          R15D  index that the device knows of
# RBP   mask of places                    RDI   sectors a request           RSI   the sum

requests:
        mov     BOX_COUNT, %r8d
        mov     %r8d, %r9d
        movzwl  AVAIL_IDX, %r10d
        mov     %r10d, %r15d
        movzwl  USED_IDX, %r11d
        mov     doorbell, %r13
        xor     %eax, %eax
        mov     %eax, BOX_ERRORS
        mov     %eax, BOX_KICKS
        mov     %eax, BOX_IRQS
        lea     0x8000(%r11), %eax              # polling: no interrupt
        mov     %ax, USED_EVENT
        call    lay_out
        mov     BOX_MASK, %ebp
        mov     BOX_SECTORS, %edi
        xor     %esi, %esi
        xor     %r12d, %r12d
        mov     $1, %r14d
        testl   $RANDOM, BOX_FLAGS
        jz      1f
        mov     $STRIDE, %r14d
1:
        rdtsc
        shl     $32, %rdx
        or      %rdx, %rax
        mov     %rax, started
        xor     %ebx, %ebx                      # slot
1:      test    %r8d, %r8d
        jz      2f
        make_available
        inc     %ebx
        cmp     BOX_DEPTH, %ebx
        jb      1b
2:      call    publish

again:  movzwl  USED_IDX, %ecx
        cmp     %cx, %r11w
        jne     came
        testl   $BY_INTERRUPT, BOX_FLAGS
        jnz     sleep
        pause
        jmp     again
sleep:  mov     %r11w, USED_EVENT               # at the next one
        mfence                                  # before the index is looked at once more (2.7.7.2)
        cmp     %r11w, USED_IDX
        jne     again
        sti
        hlt
        cli
        jmp     again

        .balign 64
came:   mov     %r11d, %eax                     # each element that is there
        and     $QUEUE_SIZE - 1, %eax
        mov     USED_RING(, %rax, 8), %ebx      # its first descriptor: four times the slot
        shr     $2, %ebx
        cmpb    $0, STATUS(%rbx)
        jne     3f
1:      mov     %ebx, %eax
        shl     $SLOT_SHIFT, %eax
        add     BUFFERS(%rax), %rsi
        inc     %r11d
        dec     %r9d
        test    %r8d, %r8d
        jz      2f
        make_available
2:      cmp     %cx, %r11w
        jne     came
        call    publish
        test    %r9d, %r9d
        jnz     again

        rdtsc
        shl     $32, %rdx
        or      %rdx, %rax
        sub     started, %rax
        mov     %rax, BOX_TICKS
        mov     %rsi, BOX_SUM
        ret
3:      incl    BOX_ERRORS
        jmp     1b

# Make them visible, and ring the doorbell where the device has asked for one of them (2.7.10.1). Clobbers EAX, EDX.
publish:
        cmp     %r10w, %r15w
        je      1f
        mov     %r10w, AVAIL_IDX
        mfence
        mov     %r10d, %eax                     # vring_need_event: new - event - 1 < new - old, in 16 bits
        sub     AVAIL_EVENT, %ax
        dec     %eax
        mov     %r10d, %edx
        sub     %r15d, %edx
        mov     %r10d, %r15d
        cmp     %dx, %ax
        jae     1f
        incl    BOX_KICKS
        movw    $0, (%r13)
1:      ret

# Descriptors of all slots: header, data, status. Clobbers RAX, RBX, RCX, RDX, RDI.
lay_out:
        xor     %ebx, %ebx
        mov     $DESC, %edi
1:      mov     %ebx, %eax
        shl     $4, %eax
        testl   $WRITE, BOX_FLAGS
        setnz   %cl
        movzbl  %cl, %ecx
        mov     %ecx, HEADERS(%rax)             # VIRTIO_BLK_T_IN 0, VIRTIO_BLK_T_OUT 1
        movl    $0, HEADERS + 4(%rax)
        lea     HEADERS(%rax), %eax
        mov     %rax, (%rdi)
        movl    $16, 8(%rdi)
        movw    $NEXT, 12(%rdi)
        lea     1(, %rbx, 4), %edx
        mov     %dx, 14(%rdi)
        mov     %ebx, %eax
        imul    $SLOT_BYTES, %eax, %eax
        add     $BUFFERS, %eax
        mov     %rax, 16(%rdi)
        mov     BOX_SECTORS, %eax
        shl     $9, %eax
        mov     %eax, 24(%rdi)
        mov     $NEXT | WRITABLE, %eax
        test    %ecx, %ecx
        jz      2f
        mov     $NEXT, %eax
2:      mov     %ax, 28(%rdi)
        inc     %edx
        mov     %dx, 30(%rdi)
        lea     STATUS(%rbx), %eax
        mov     %rax, 32(%rdi)
        movl    $1, 40(%rdi)
        movw    $WRITABLE, 44(%rdi)
        movw    $0, 46(%rdi)
        add     $64, %edi
        inc     %ebx
        cmp     $SLOTS, %ebx
        jb      1b
        ret

# -- set-up ----------------------------------------------------------------------------------------------------------

        .include "virtio_pci_code.inc"

# 3.1.1, with one queue.
start_device:
        mov     common, %rdi
        movb    $0, DEVICE_STATUS(%rdi)
1:      cmpb    $0, DEVICE_STATUS(%rdi)
        jne     1b
        movb    $1, DEVICE_STATUS(%rdi)         # ACKNOWLEDGE
        movb    $3, DEVICE_STATUS(%rdi)         # DRIVER
        movl    $0, DEVICE_SELECT(%rdi)
        mov     DEVICE_FEATURE(%rdi), %eax
        and     $F_EVENT_IDX | F_FLUSH, %eax
        test    $F_EVENT_IDX, %eax
        jz      failed
        movl    $0, DRIVER_SELECT(%rdi)
        mov     %eax, DRIVER_FEATURE(%rdi)
        movl    $1, DRIVER_SELECT(%rdi)
        movl    $F_VERSION_1, DRIVER_FEATURE(%rdi)
        movb    $0xb, DEVICE_STATUS(%rdi)       # FEATURES_OK
        testb   $8, DEVICE_STATUS(%rdi)
        jz      failed
        movw    $0xffff, CONFIG_VECTOR(%rdi)
        movw    $0, QUEUE_SELECT(%rdi)
        cmpw    $QUEUE_SIZE, SIZE(%rdi)
        jb      failed
        movw    $QUEUE_SIZE, SIZE(%rdi)
        movw    $0, QUEUE_VECTOR(%rdi)
        movl    $DESC, QUEUE_DESC(%rdi)
        movl    $0, QUEUE_DESC + 4(%rdi)
        movl    $AVAIL, QUEUE_DRIVER(%rdi)
        movl    $0, QUEUE_DRIVER + 4(%rdi)
        movl    $USED, QUEUE_DEVICE(%rdi)
        movl    $0, QUEUE_DEVICE + 4(%rdi)
        movw    $1, QUEUE_ENABLE(%rdi)
        movzwl  NOTIFY_OFF(%rdi), %eax
        imul    multiplier, %eax
        add     %rax, doorbell
        movb    $0xf, DEVICE_STATUS(%rdi)       # DRIVER_OK
        ret

        .balign 8
started:        .quad 0
        .include "tables.inc"
