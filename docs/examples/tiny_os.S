# tiny_os.S: two tasks and a clock that switches between them, in long mode. tiny_os.py assembles and runs it.
#
# pyvmm enters it with the first 4 GiB mapped one to one, in the code segment 0x10, interrupts off. What a task is
# between two turns lies on its stack: the registers, and below them what the interrupt itself has pushed.

        .set    COM1, 0x3f8
        .set    IDT, 0x8000             # interrupt descriptor table
        .set    TIMER, 0x20             # the vector of IRQ 0
        .set    PIC, 0x20
        .set    PIT, 0x40               # 1,193,182 Hz
        .set    TICKS, 20               # so long it lives
        .set    PM1_CONTROL, 0x604      # ACPI: a write of SLP_EN with type S5 powers off
        .code64
start:  mov     $on_tick, %eax          # the gate of the timer's interrupt (SDM vol. 3, 6.14.1)
        mov     %ax, IDT + TIMER * 16
        movl    $0x8e000010, IDT + TIMER * 16 + 2
        shr     $16, %eax
        mov     %eax, IDT + TIMER * 16 + 6
        movl    $0, IDT + TIMER * 16 + 10
        lidt    idt_pointer
        mov     $0x11, %al              # the interrupt controller: IRQ 0 to 7 at vectors 0x20 to 0x27,
        outb    %al, $PIC
        mov     $TIMER, %al
        outb    %al, $PIC + 1
        mov     $0x04, %al
        outb    %al, $PIC + 1
        mov     $0x01, %al
        outb    %al, $PIC + 1
        mov     $0xfe, %al              # only IRQ 0 open
        outb    %al, $PIC + 1

        mov     $0x34, %al              # the timer: 100 ticks a second
        outb    %al, $PIT + 3
        mov     $11932, %eax
        outb    %al, $PIT
        mov     %ah, %al
        outb    %al, $PIT

        # Task B has not run yet: its stack gets what the interrupt of a running one would have left there.
        mov     $stack_b, %rsp
        mov     %ss, %ecx
        push    %rcx                    # SS,
        pushq   $stack_b                # RSP,
        pushq   $0x202                  # RFLAGS: interrupts on,
        pushq   $0x10                   # CS,
        pushq   $task_b                 # RIP; and RAX, RCX, RDX, RBX
        sub     $4 * 8, %rsp
        mov     %rsp, stacks + 8
        mov     $stack_a, %rsp          # we are task A
        sti
task_a: mov     $'a', %bl
        jmp     work
task_b: mov     $'b', %bl

work:   mov     $COM1, %edx             # an exit: pyvmm has the serial port
        mov     %bl, %al
        outb    %al, %dx
        rdtsc                           # a pause of a millisecond or two, without an exit
        mov     %eax, %ecx
1:      rdtsc
        sub     %ecx, %eax
        cmp     $4000000, %eax
        jb      1b
        jmp     work

on_tick:
        push    %rax
        push    %rcx
        push    %rdx
        push    %rbx
        mov     $0x20, %al              # end of interrupt
        outb    %al, $PIC
        decl    ticks_left
        jz      off
        mov     current, %eax           # the other one's turn
        mov     %rsp, stacks(, %rax, 8)
        xor     $1, %eax
        mov     %eax, current
        mov     stacks(, %rax, 8), %rsp
        pop     %rbx
        pop     %rdx
        pop     %rcx
        pop     %rax
        iretq
off:    mov     $PM1_CONTROL, %edx
        mov     $0x2000, %eax
        outw    %ax, %dx
        hlt
current:    .long 0
ticks_left: .long TICKS
stacks:     .quad 0, 0
idt_pointer:
        .word   (TIMER + 1) * 16 - 1
        .quad   IDT
        .fill   512
stack_a:
        .fill   512
stack_b:
