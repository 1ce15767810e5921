# virtio_net.S, linked at 0x100000. The guest of `pyvmm bench net`: a driver for virtio-net-pci (OASIS virtio 1.2, 2.7, 4.1,
# 5.1) of its own, with split queues, which sends or receives frames as the mailbox says and times it by RDTSC.
#
# It is a ROM (reset.S), so there is no firmware. Of features it takes VERSION_1, EVENT_IDX, MRG_RXBUF, and what lets frames
# be longer than the MTU, as Linux does. All that it sends is one frame, with virtio's header in front, which the host
# has put at FRAME; what it receives it does not look at, but for the lengths.
#
# A turn is one of three kinds: it sends `count` frames, of which up to `depth` are in flight; or it receives until so
# many bytes have come; or it sends a frame, waits until one comes, and again, `count` times.
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
        .set    BOX_COUNT,      MAILBOX + 0x10  # frames,
        .set    BOX_DEPTH,      MAILBOX + 0x14  # so many at a time, less than QUEUE_SIZE,
        .set    BOX_SIZE,       MAILBOX + 0x18  # of so many bytes with their header
        .set    BOX_TOTAL,      MAILBOX + 0x1c  # bytes that are to come, with headers
        .set    BOX_FLAGS,      MAILBOX + 0x20
        .set    BOX_TICKS,      MAILBOX + 0x40  # 8 bytes: the turn, in TSC ticks
        .set    BOX_BYTES,      MAILBOX + 0x48  # 8 bytes: how many have come, with headers
        .set    BOX_BUFFERS,    MAILBOX + 0x50  # in how many buffers
        .set    BOX_KICKS,      MAILBOX + 0x54  # writes to doorbells
        .set    BOX_IRQS,       MAILBOX + 0x58  # interrupts taken

        .set    RECEIVE,        1               # flags: kinds of turns; none of them: send
        .set    BY_INTERRUPT,   2
        .set    THERE_AND_BACK, 4

        .set    MAGIC,          0x316d6d7679702121
        .set    FAILED,         0x6c69616621212121

        .set    CODE32,         0x08
        .set    CODE64,         0x10
        .set    DATA,           0x18

        # Queues 0 and 1, alike: the second one's rings lie TX behind those of the first.
        .set    QUEUE_SIZE,     256
        .set    DESC,           0x190000
        .set    AVAIL,          0x192000
        .set    USED,           0x194000
        .set    TX,             0x8000
        .set    AVAIL_IDX,      AVAIL + 2
        .set    AVAIL_RING,     AVAIL + 4
        .set    USED_EVENT,     AVAIL + 4 + 2 * QUEUE_SIZE
        .set    USED_IDX,       USED + 2
        .set    USED_RING,      USED + 4
        .set    AVAIL_EVENT,    USED + 4 + 8 * QUEUE_SIZE
        .set    FRAME,          0x1000000       # what is sent
        .set    BUFFER_SHIFT,   12
        .set    BUFFERS,        0x1100000       # where frames are received, a page each
        .set    WRITABLE,       2               # of a descriptor's flags (2.7.5)

        .include "virtio_pci.inc"
        .set    TRANSITIONAL,   0x10001af4      # 4.1.2
        .set    MODERN,         0x10411af4
        # CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6, MRG_RXBUF (5.1.3)
        .set    FEATURES,       1 << 0 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12 | 1 << 15

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
        call    frames
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
# Few instructions a frame: in a KVM that emulates them, each is a third of a microsecond that is nobody's but ours.
#
# R8D   frames still to be made available R9D   frames, or bytes, still to come back
# R10D  index in TX's available ring      R11D  in its used ring
# R12D  index in RX's available ring      R13D  in its used ring
# RBP   bytes that have come              EDI   buffers that have come

# Make what is available up to index \now visible, and ring the doorbell where the device has asked for one of them
# (2.7.10.1). Clobbers RAX, EDX.
        .macro  publish queue, now, door
        movzwl  AVAIL_IDX + \queue, %edx
        cmp     %dx, \now\()w
        je      9f
        mov     \now\()w, AVAIL_IDX + \queue
        mfence
        mov     \now\()d, %eax                     # vring_need_event: new - event - 1 < new - old, in 16 bits
        sub     AVAIL_EVENT + \queue, %ax
        dec     %eax
        neg     %edx
        add     \now\()d, %edx
        cmp     %dx, %ax
        jae     9f
        incl    BOX_KICKS
        mov     \door, %rax
        movw    $(\queue / TX), (%rax)
9:
        .endm

# ECX = the used ring's index, when it is another one than \seen. Clobbers EAX.
        .macro  await queue, seen
1:      movzwl  USED_IDX + \queue, %ecx
        cmp     %cx, \seen\()w
        jne     3f
        testl   $BY_INTERRUPT, BOX_FLAGS
        jnz     2f
        pause
        jmp     1b
2:      mov     \seen\()w, USED_EVENT + \queue  # at the next one
        mfence                                  # before the index is looked at once more (2.7.7.2)
        cmp     \seen\()w, USED_IDX + \queue
        jne     1b
        sti
        hlt
        cli
        jmp     1b
3:
        .endm

frames: movzwl  AVAIL_IDX + TX, %r10d
        movzwl  USED_IDX + TX, %r11d
        movzwl  AVAIL_IDX, %r12d
        movzwl  seen, %r13d
        mov     BOX_COUNT, %r8d
        mov     %r8d, %r9d
        xor     %eax, %eax
        mov     %eax, BOX_KICKS
        mov     %eax, BOX_IRQS
        xor     %ebp, %ebp
        xor     %edi, %edi
        lea     0x8000(%r11), %eax              # no interrupt that nobody waits for
        mov     %ax, USED_EVENT + TX
        lea     0x8000(%r13), %eax
        mov     %ax, USED_EVENT
        mov     BOX_SIZE, %eax                  # of all that is sent
        mov     $DESC + TX, %edx
1:      mov     %eax, 8(%rdx)
        add     $16, %edx
        cmp     $DESC + TX + 16 * QUEUE_SIZE, %edx
        jb      1b
        rdtsc
        shl     $32, %rdx
        or      %rdx, %rax
        mov     %rax, started
        testl   $RECEIVE, BOX_FLAGS
        jnz     receive
        testl   $THERE_AND_BACK, BOX_FLAGS
        jnz     there_and_back

send:   mov     BOX_DEPTH, %ecx                 # so many more
4:      cmp     %ecx, %r8d
        cmovb   %r8d, %ecx
        add     %ecx, %r10d
        sub     %ecx, %r8d
        publish TX, %r10, tx_door
        await   TX, %r11
        mov     %ecx, %eax
        sub     %r11d, %eax
        movzwl  %ax, %ecx                       # so many have come back
        add     %ecx, %r11d
        sub     %ecx, %r9d
        jnz     4b
        jmp     over

receive:
        mov     BOX_TOTAL, %r9d
5:      await   0, %r13
        call    take
        publish 0, %r12, rx_door
        cmp     %r9d, %ebp
        jb      5b
        jmp     over

there_and_back:
        inc     %r10d
        publish TX, %r10, tx_door
        await   0, %r13
        call    take
        publish 0, %r12, rx_door
        dec     %r8d
        jnz     there_and_back

over:   rdtsc
        shl     $32, %rdx
        or      %rdx, %rax
        sub     started, %rax
        mov     %rax, BOX_TICKS
        mov     %rbp, BOX_BYTES
        mov     %edi, BOX_BUFFERS
        mov     %r13w, seen
        ret

# What has been received up to index ECX: its buffers may be filled again.
        .balign 64
take:   mov     %r13d, %eax
        and     $QUEUE_SIZE - 1, %eax
        mov     USED_RING(, %rax, 8), %ebx
        mov     USED_RING + 4(, %rax, 8), %eax
        add     %rax, %rbp
        inc     %edi
        mov     %r12d, %eax
        and     $QUEUE_SIZE - 1, %eax
        mov     %bx, AVAIL_RING(, %rax, 2)
        inc     %r12d
        inc     %r13d
        cmp     %cx, %r13w
        jne     take
        ret

# -- set-up ----------------------------------------------------------------------------------------------------------

        .include "virtio_pci_code.inc"

# Queue \number, whose rings lie \queue behind the first one's; \door: the variable with its doorbell. RDI: common.
        .macro  set_up  number, queue, door
        movw    $\number, QUEUE_SELECT(%rdi)
        cmpw    $QUEUE_SIZE, SIZE(%rdi)
        jb      failed
        movw    $QUEUE_SIZE, SIZE(%rdi)
        movw    $0, QUEUE_VECTOR(%rdi)
        movl    $DESC + \queue, QUEUE_DESC(%rdi)
        movl    $0, QUEUE_DESC + 4(%rdi)
        movl    $AVAIL + \queue, QUEUE_DRIVER(%rdi)
        movl    $0, QUEUE_DRIVER + 4(%rdi)
        movl    $USED + \queue, QUEUE_DEVICE(%rdi)
        movl    $0, QUEUE_DEVICE + 4(%rdi)
        movw    $1, QUEUE_ENABLE(%rdi)
        movzwl  NOTIFY_OFF(%rdi), %eax
        imul    multiplier, %eax
        add     doorbell, %rax
        mov     %rax, \door
        .endm

# 3.1.1, with the first pair of queues.
start_device:
        xor     %ebx, %ebx
1:      mov     %ebx, %eax
        shl     $4, %eax
        mov     %ebx, %edx
        shl     $BUFFER_SHIFT, %edx
        add     $BUFFERS, %edx
        mov     %rdx, DESC(%rax)
        movl    $1 << BUFFER_SHIFT, DESC + 8(%rax)
        movl    $WRITABLE, DESC + 12(%rax)
        movq    $FRAME, DESC + TX(%rax)
        movl    $0, DESC + TX + 12(%rax)
        mov     %bx, AVAIL_RING(, %rbx, 2)
        mov     %bx, AVAIL_RING + TX(, %rbx, 2)
        inc     %ebx
        cmp     $QUEUE_SIZE, %ebx
        jb      1b
        mov     common, %rdi
        movb    $0, DEVICE_STATUS(%rdi)
1:      cmpb    $0, DEVICE_STATUS(%rdi)
        jne     1b
        movb    $1, DEVICE_STATUS(%rdi)         # ACKNOWLEDGE
        movb    $3, DEVICE_STATUS(%rdi)         # DRIVER
        movl    $0, DEVICE_SELECT(%rdi)
        mov     DEVICE_FEATURE(%rdi), %eax
        and     $F_EVENT_IDX | FEATURES, %eax
        cmp     $F_EVENT_IDX | FEATURES, %eax
        jne     failed
        movl    $0, DRIVER_SELECT(%rdi)
        mov     %eax, DRIVER_FEATURE(%rdi)
        movl    $1, DRIVER_SELECT(%rdi)
        movl    $F_VERSION_1, DRIVER_FEATURE(%rdi)
        movb    $0xb, DEVICE_STATUS(%rdi)       # FEATURES_OK
        testb   $8, DEVICE_STATUS(%rdi)
        jz      failed
        movw    $0xffff, CONFIG_VECTOR(%rdi)
        set_up  0, 0, rx_door
        set_up  1, TX, tx_door
        movb    $0xf, DEVICE_STATUS(%rdi)       # DRIVER_OK
        mov     $QUEUE_SIZE, %r12d
        publish 0, %r12, rx_door
        ret

        .balign 8
started:        .quad 0
rx_door:        .quad 0
tx_door:        .quad 0
seen:           .word 0

        .include "tables.inc"
