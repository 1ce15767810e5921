# The guest of `pyvmm demo`: a flat binary, linked at 0x7c00 and entered there in real mode, as a boot sector is.
#
# It walks through the three modes of an x86-64 processor, makes the VM exits that each can make, checks what comes
# back, and says so on the serial port. Then it crashes on purpose, finds itself reset, and powers the machine off.
#
# Most instructions of a guest run on the bare processor. A VM exit happens at those that touch what is not there: a
# port, or a guest-physical address with no RAM behind it. KVM first offers it to the chips that it emulates itself (the
# interrupt controllers, the timer); what none of them wants leaves KVM_RUN and is answered by pyvmm.
#
# Syntax: AT&T, `operation source, destination`. What is built by whom:
#
#   0x07c00  this image; the stack grows down from its start
#   0x10000  page tables, written below in protected mode
#   0x16000  interrupt descriptor table of long mode

# ---- ports and addresses -----------------------------------------------------------------------------------------------

    .set COM1,              0x3f8           # 16550 serial port: data register,
    .set COM1_LSR,          0x3fd           # line status register,
    .set LSR_THRE,          0x20            # whose bit 5 says: ready for the next byte
    .set PIC1_COMMAND,      0x20            # the two 8259 interrupt controllers
    .set PIC1_DATA,         0x21
    .set PIC2_COMMAND,      0xa0
    .set PIC2_DATA,         0xa1
    .set PIC_EOI,           0x20            # command: end of interrupt
    .set PIT_CHANNEL0,      0x40            # 8254 timer
    .set PIT_MODE,          0x43
    .set PIT_HZ,            1193182
    .set DEBUG_EXIT,        0xf4            # a byte written here ends the machine with status (byte << 1) | 1
    .set PM1_CONTROL,       0x604           # ACPI: sleep control
    .set PM1_POWER_OFF,     0x2000          # SLP_EN, with SLP_TYP 0, which means S5 here
    .set NOBODY_PORT,       0x7f0           # no device has this port,
    .set NOBODY_ADDRESS,    0xd0001000      # nor this address

# The device in Python (pyvmm/cli/demo.py), once in the port space and once in memory. Same registers in both:
    .set NOTEBOOK_PORT,     0x700
    .set NOTEBOOK_MMIO,     0xd0000000
    .set QUEUE,             0               # a write puts a value in, a read takes the oldest one out
    .set COUNT,             8               # how often the guest called the device; a write raises IRQ 5
    .set RESETS,            16              # how often the machine was reset
    .set TSC_KHZ,           20              # the frequency of the time stamp counter

    .set APIC,              0xfee00000      # the local interrupt controller of this processor:
    .set APIC_EOI,          0xb0            # end of interrupt,
    .set APIC_SPURIOUS,     0xf0            # bit 8 switches it on,
    .set APIC_ICR,          0x300           # writing here sends an interrupt to a processor
    .set ICR_SELF,          0x44000         # itself, edge, assert

    .set VECTOR_TIMER,      0x20            # IRQ 0, as programmed into the 8259 below
    .set VECTOR_NOTEBOOK,   0x25            # IRQ 5
    .set VECTOR_SELF,       0x30

    .set PAGE_TABLES,       0x10000
    .set IDT,               0x16000
    .set IDT_ENTRIES,       0x31

    .set TICKS_HZ,          100
    .set TICKS_WANTED,      10
    .set PATIENCE_TICKS,    200             # how long an interrupt may take before it counts as lost
    .set ROUNDS,            1000            # exits that are timed

# ---- what all modes share ----------------------------------------------------------------------------------------------
# The same source gives the right code three times: the assembler picks the encodings of the mode in force.

# print_SI: the string at SI (ESI, RSI) to the serial port. Two exits a character: ask, then send. Clobbers EAX, EDX.
.macro define_print si
print_\si:
    lodsb                                   # AL = next character
    test    %al, %al
    jz      3f
    mov     %al, %ah
    mov     $COM1_LSR, %dx
2:  inb     %dx, %al
    test    $LSR_THRE, %al
    jz      2b
    mov     $COM1, %dx
    mov     %ah, %al
    outb    %al, %dx
    jmp     print_\si
3:  ret

# verdict_SI: " ok" where EBX, in which the checks gather differences, is zero.
verdict_\si:
    mov     $text_ok, %\si
    test    %ebx, %ebx
    jz      print_\si
    incb    failures
    mov     $text_failed, %\si
    jmp     print_\si
.endm

# say SI, "text": print it.
.macro say si, text
    mov     $text_\@, %\si
    call    print_\si
    .pushsection .rodata
text_\@:
    .asciz  "\text"
    .popsection
.endm

# expect VALUE, REGISTER: gather in EBX the bits that differ. Register: EAX, of which the rest is zero.
.macro expect value
    xor     $\value, %eax
    or      %eax, %ebx
.endm

# ---- real mode: 16-bit, segment:offset addresses below 1 MiB -----------------------------------------------------------

    .code16
    .globl  start
start:
    # Where the machine was reset before, this is the second boot. The notebook knows: it outlives a reset.
    mov     $NOTEBOOK_PORT + RESETS, %dx
    inl     %dx, %eax
    test    %eax, %eax
    jnz     second_boot

    say     si, "The guest of pyvmm demo.\r\n\r\nReal mode, 16 bits, as the processor wakes up\r\n"

    # Port I/O comes in three widths. Each `out` is an exit that ends in the write() of a Python class.
    say     si, "  out and in, 1, 2 and 4 bytes, to a device written in Python   "
    xor     %ebx, %ebx
    mov     $NOTEBOOK_PORT + QUEUE, %dx
    mov     $0x11, %al
    outb    %al, %dx
    mov     $0x2222, %ax
    outw    %ax, %dx
    mov     $0x33333333, %eax
    outl    %eax, %dx
    xor     %eax, %eax
    inb     %dx, %al                        # the oldest comes back first
    expect  0x11
    xor     %eax, %eax
    inw     %dx, %ax
    expect  0x2222
    inl     %dx, %eax
    expect  0x33333333
    call    verdict_si

    # String I/O: one instruction, many units. The port stays the same, the address in memory moves on; with the
    # direction flag set it moves down.
    say     si, "  rep outsw and rep insw, 8 words each, upwards and downwards   "
    xor     %ebx, %ebx
    mov     $NOTEBOOK_PORT + QUEUE, %dx
    cld
    mov     $words, %si
    mov     $8, %cx
    rep     outsw                           # (SI) -> port
    mov     $buffer, %di
    mov     $8, %cx
    rep     insw                            # port -> (DI)
    call    compare_words
    std
    mov     $words + 14, %si                # from the last word
    mov     $8, %cx
    rep     outsw
    mov     $buffer + 14, %di
    mov     $8, %cx
    rep     insw
    cld
    call    compare_words
    call    verdict_si

    say     si, "  a port that nobody has: reads give ones, writes are lost      "
    xor     %ebx, %ebx
    mov     $NOBODY_PORT, %dx
    mov     $0x1234, %ax
    outw    %ax, %dx
    xor     %eax, %eax
    inb     %dx, %al
    expect  0xff
    inl     %dx, %eax
    expect  0xffffffff
    call    verdict_si

    # To protected mode: a table of flat segments, bit 0 of CR0, and a far jump that loads CS.
    cli
    lgdtl   gdt_pointer
    mov     %cr0, %eax
    or      $1, %eax                        # PE
    mov     %eax, %cr0
    ljmpl   $CODE32, $protected

# Compare buffer with words, 8 of them, and clear it for the next time.
compare_words:
    mov     $words, %si
    mov     $buffer, %di
    mov     $8, %cx
1:  lodsw                                   # AX = (SI), SI += 2
    xor     (%di), %ax
    movzwl  %ax, %eax
    or      %eax, %ebx
    movw    $0, (%di)
    add     $2, %di
    loop    1b
    ret

second_boot:
    say     si, "\r\nBack in real mode after the reset. Power off through ACPI.\r\n"
    mov     $PM1_CONTROL, %dx
    mov     $PM1_POWER_OFF, %ax
    outw    %ax, %dx
stop16:
    cli
    hlt
    jmp     stop16

    define_print si

# ---- protected mode: 32-bit, flat, no paging ---------------------------------------------------------------------------

    .code32
protected:
    mov     $DATA, %ax
    mov     %ax, %ds
    mov     %ax, %es
    mov     %ax, %ss
    mov     $start, %esp

    say     esi, "\r\nProtected mode, 32 bits: all of the address space below 4 GiB\r\n"

    # Memory-mapped I/O: an ordinary mov, to an address with no RAM behind it. KVM decodes the instruction for us.
    say     esi, "  MMIO of 1, 2 and 4 bytes, to the same device                  "
    xor     %ebx, %ebx
    mov     $NOTEBOOK_MMIO + QUEUE, %edi
    movb    $0x44, (%edi)
    movw    $0x5555, (%edi)
    movl    $0x66666666, (%edi)
    movzbl  (%edi), %eax
    expect  0x44
    movzwl  (%edi), %eax
    expect  0x5555
    mov     (%edi), %eax
    expect  0x66666666
    call    verdict_esi

    say     esi, "  an address that nobody has: reads give ones                   "
    xor     %ebx, %ebx
    movl    $0x1234, NOBODY_ADDRESS
    mov     NOBODY_ADDRESS, %eax
    expect  0xffffffff
    call    verdict_esi

    # Page tables for long mode: the first 4 GiB, each virtual address at the physical one of the same number. One table
    # of level 4, one of level 3 with four entries, four of level 2 with 512 pages of 2 MiB each.
    mov     $PAGE_TABLES, %edi
    xor     %eax, %eax
    mov     $6 * 4096 / 4, %ecx
    rep     stosl
    movl    $PAGE_TABLES + 0x1003, PAGE_TABLES      # 3: present, writable
    mov     $PAGE_TABLES + 0x1000, %edi
    mov     $PAGE_TABLES + 0x2003, %eax
1:  mov     %eax, (%edi)
    add     $8, %edi
    add     $0x1000, %eax
    cmp     $PAGE_TABLES + 0x6003, %eax
    jne     1b
    mov     $PAGE_TABLES + 0x2000, %edi
    mov     $0x83, %eax                             # 0x80: a page of 2 MiB
2:  mov     %eax, (%edi)
    add     $8, %edi
    add     $0x200000, %eax
    jnc     2b                                      # until it wraps at 4 GiB

    # Long mode is paging with EFER.LME set: wide table entries on, the tables' address, LME, paging on, and a far jump
    # into a 64-bit code segment.
    mov     %cr4, %eax
    or      $0x20, %eax                             # PAE
    mov     %eax, %cr4
    mov     $PAGE_TABLES, %eax
    mov     %eax, %cr3
    mov     $0xc0000080, %ecx                       # EFER
    rdmsr
    or      $0x100, %eax                            # LME
    wrmsr
    mov     %cr0, %eax
    or      $0x80000000, %eax                       # PG
    mov     %eax, %cr0
    ljmpl   $CODE64, $long

    define_print esi

# ---- long mode: 64-bit -------------------------------------------------------------------------------------------------

    .code64
long:
    mov     $DATA, %eax
    mov     %eax, %ds
    mov     %eax, %es
    mov     %eax, %ss
    mov     $start, %rsp

    say     rsi, "\r\nLong mode, 64 bits, paging\r\n"

    say     rsi, "  MMIO of 8 bytes                                               "
    mov     $NOTEBOOK_MMIO + QUEUE, %edi
    mov     $0x7777777788888888, %rax
    mov     %rax, (%rdi)
    mov     (%rdi), %rcx
    xor     %rcx, %rax
    setnz   %bl                                     # differences in 64 bits, told in EBX
    movzbl  %bl, %ebx
    call    verdict_rsi

    # CPUID leaves the guest too, but KVM answers it from the table that pyvmm gave it before the start.
    say     rsi, "  CPUID: the processor says "
    xor     %eax, %eax
    cpuid
    mov     %ebx, vendor
    mov     %edx, vendor + 4
    mov     %ecx, vendor + 8
    mov     $vendor, %rsi
    call    print_rsi
    say     rsi, ", the hypervisor "
    mov     $0x40000000, %eax
    cpuid
    mov     %ebx, vendor
    mov     %ecx, vendor + 4
    mov     %edx, vendor + 8
    mov     $vendor, %rsi
    call    print_rsi
    say     rsi, "\r\n"

    # ---- interrupts
    mov     $VECTOR_TIMER, %ecx
    mov     $on_timer, %eax
    call    set_gate
    mov     $VECTOR_NOTEBOOK, %ecx
    mov     $on_notebook, %eax
    call    set_gate
    mov     $VECTOR_SELF, %ecx
    mov     $on_self, %eax
    call    set_gate
    lidt    idt_pointer
    call    program_pic
    call    program_pit

    # HLT: the processor sleeps until an interrupt. With the interrupt controllers in KVM it sleeps there; with those in
    # Python (--irqchip off) HLT is an exit, and pyvmm's thread sleeps.
    say     rsi, "  HLT, woken by the timer, ten times                            "
    sti
1:  hlt
    cmpl    $TICKS_WANTED, ticks
    jb      1b
    cli
    xor     %ebx, %ebx                              # otherwise we would not be here
    call    verdict_rsi

    say     rsi, "  an interrupt that the Python device raises                    "
    mov     $NOTEBOOK_PORT + COUNT, %dx
    outl    %eax, %dx
    mov     $seen_notebook, %rdi
    call    wait_seen
    call    verdict_rsi

    # CPUID leaf 1, EDX bit 9: is there a local APIC?
    mov     $1, %eax
    cpuid
    shr     $9, %edx
    and     $1, %edx
    jz      2f
    say     rsi, "  an interrupt to itself, through the local APIC                "
    mov     $APIC, %edi
    movl    $0x1ff, APIC_SPURIOUS(%rdi)
    movl    $ICR_SELF | VECTOR_SELF, APIC_ICR(%rdi)
    mov     $seen_self, %rdi
    call    wait_seen
    call    verdict_rsi
2:
    # ---- time: the whole way there and back, as the guest feels it
    mov     $PIC1_DATA, %dx
    mov     $0xff, %al
    outb    %al, %dx                                # no more ticks
    say     rsi, "\r\nAn exit and back, mean of 1000:\r\n"
    say     rsi, "  a register of the interrupt controller, in KVM (--irqchip off: Python) "
    mov     $PIC1_DATA, %edx
    call    time_port
    say     rsi, "  nobody's port, answered in pyvmm's compiled loop                       "
    mov     $NOBODY_PORT, %edx
    call    time_port
    say     rsi, "  a register of the device written in Python                             "
    mov     $NOTEBOOK_PORT + COUNT, %edx
    call    time_port

    cmpb    $0, failures
    jz      triple_fault
    say     rsi, "\r\nSome of this went wrong.\r\n"
    mov     $1, %al
    outb    %al, $DEBUG_EXIT

    # An exception with no table of handlers, while handling its exception, while handling that one: the processor gives
    # up. A PC resets then, and so does pyvmm.
triple_fault:
    say     rsi, "\r\nNow a triple fault, which resets the machine.\r\n"
    lidt    no_idt
    ud2

# ECX: vector; EAX: handler. Writes a gate descriptor: present, interrupt gate, code segment CODE64.
set_gate:
    shl     $4, %ecx
    mov     %ax, IDT(%rcx)
    movw    $CODE64, IDT + 2(%rcx)
    movw    $0x8e00, IDT + 4(%rcx)
    shr     $16, %eax
    mov     %ax, IDT + 6(%rcx)
    movq    $0, IDT + 8(%rcx)
    ret

# The 8259 pair: IRQ 0-15 at vectors 0x20-0x2f, all masked but the timer (0) and the notebook (5).
program_pic:
    mov     $0x11, %al                              # ICW1: begin, ICW4 follows
    outb    %al, $PIC1_COMMAND
    outb    %al, $PIC2_COMMAND
    mov     $VECTOR_TIMER, %al                      # ICW2: the first vector
    outb    %al, $PIC1_DATA
    mov     $VECTOR_TIMER + 8, %al
    outb    %al, $PIC2_DATA
    mov     $0x04, %al                              # ICW3: the second one hangs on line 2
    outb    %al, $PIC1_DATA
    mov     $0x02, %al
    outb    %al, $PIC2_DATA
    mov     $0x01, %al                              # ICW4: 8086 mode
    outb    %al, $PIC1_DATA
    outb    %al, $PIC2_DATA
    mov     $~0x21 & 0xff, %al
    outb    %al, $PIC1_DATA
    mov     $0xff, %al
    outb    %al, $PIC2_DATA
    ret

program_pit:
    mov     $0x34, %al                              # channel 0, low then high byte, mode 2: a pulse a period
    outb    %al, $PIT_MODE
    mov     $PIT_HZ / TICKS_HZ, %eax
    outb    %al, $PIT_CHANNEL0
    mov     %ah, %al
    outb    %al, $PIT_CHANNEL0
    ret

on_timer:
    push    %rax
    incl    ticks
    mov     $PIC_EOI, %al
    outb    %al, $PIC1_COMMAND
    pop     %rax
    iretq

on_notebook:
    push    %rax
    incl    seen_notebook
    mov     $PIC_EOI, %al
    outb    %al, $PIC1_COMMAND
    pop     %rax
    iretq

on_self:
    push    %rax
    incl    seen_self
    mov     $APIC, %eax
    movl    $0, APIC_EOI(%rax)
    pop     %rax
    iretq

# Wait until the counter at RDI is not zero: EBX = 0; or until patience ends: EBX = 1. The timer ticks on, so HLT always
# wakes up again, whichever comes first.
wait_seen:
    mov     ticks, %ecx
    add     $PATIENCE_TICKS, %ecx
    xor     %ebx, %ebx
1:  sti
    hlt
    cli
    cmpl    $0, (%rdi)
    jne     2f
    cmp     %ecx, ticks
    jb      1b
    mov     $1, %ebx
2:  ret

# EDX: port. Reads it ROUNDS times and prints the nanoseconds one read takes.
time_port:
    mov     %edx, %edi
    rdtsc                                           # EDX:EAX
    shl     $32, %rdx
    lea     (%rax, %rdx), %r8
    mov     %edi, %edx
    mov     $ROUNDS, %ecx
1:  inb     %dx, %al
    dec     %ecx
    jnz     1b
    rdtsc
    shl     $32, %rdx
    add     %rdx, %rax
    sub     %r8, %rax                               # ticks for ROUNDS reads
    imul    $1000000 / ROUNDS, %rax, %r8            # a tick is 1,000,000 / kHz nanoseconds
    mov     $NOTEBOOK_PORT + TSC_KHZ, %dx
    inl     %dx, %eax
    mov     %eax, %ecx
    mov     %r8, %rax
    xor     %edx, %edx
    div     %rcx
    call    print_number
    say     rsi, " ns\r\n"
    ret

# RAX in decimal, right-aligned in 7 columns.
print_number:
    mov     $digits_end, %rsi
    mov     $10, %ecx
1:  xor     %edx, %edx
    div     %rcx
    add     $'0', %dl
    dec     %rsi
    mov     %dl, (%rsi)
    test    %rax, %rax
    jnz     1b
2:  cmp     $digits_end - 7, %rsi
    jbe     3f
    dec     %rsi
    movb    $' ', (%rsi)
    jmp     2b
3:  jmp     print_rsi

    define_print rsi

# ---- data --------------------------------------------------------------------------------------------------------------

    .section .rodata
text_ok:
    .asciz  "ok\r\n"
text_failed:
    .asciz  "FAILED\r\n"

    .data
    .balign 8
# Segment descriptors: base 0, limit 4 GiB. The byte of flags: 9a code, 92 data; the nibble: c 32-bit, a 64-bit.
gdt:
    .quad   0
gdt_code32:
    .quad   0x00cf9a000000ffff
gdt_code64:
    .quad   0x00af9a000000ffff
gdt_data:
    .quad   0x00cf92000000ffff
gdt_end:
    .set CODE32, gdt_code32 - gdt
    .set CODE64, gdt_code64 - gdt
    .set DATA, gdt_data - gdt

gdt_pointer:
    .word   gdt_end - gdt - 1
    .long   gdt
idt_pointer:
    .word   IDT_ENTRIES * 16 - 1
    .quad   IDT
no_idt:
    .word   0
    .quad   0

    .balign 4
words:
    .word   0x0123, 0x4567, 0x89ab, 0xcdef, 0xfedc, 0xba98, 0x7654, 0x3210
buffer:
    .fill   8, 2, 0
ticks:
    .long   0
seen_notebook:
    .long   0
seen_self:
    .long   0
vendor:
    .fill   16
digits:
    .fill   24
digits_end:
failures:
    .byte   0
