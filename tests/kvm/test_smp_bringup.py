"""More vCPUs: INIT and SIPI wake them, each into long mode; they share memory and send each other interrupts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import PASSED, Guest


@pytest.mark.parametrize("cpus", [2, 3, 4])
def test_all_of_them_count(boot: Callable[..., Guest], cpus: int) -> None:
    guest = boot(
        f"""
        .include "interrupts64.inc"
        .include "smp64.inc"
        start_others
        xor     %edi, %edi
        call    work
    1:  pause
        cmpl    ${cpus}, done
        jne     1b
        finish
    other_main:
        call    work
    2:  cli
        hlt
        jmp     2b
    work:                               # EDI: APIC id
        mov     $1000, %ecx
    3:  lock incl sum
        loop    3b
        movl    $0x600d, seen(, %rdi, 4)
        lock incl done
        ret
        .balign 4
    done: .long 0
    sum: .long 0
    seen: .fill 8, 4, 0
        """,
        cpus=cpus,
    )
    assert guest.run() == PASSED
    assert guest.value("sum") == 1000 * cpus
    seen = guest.bytes_at("seen", 32)
    assert seen == (0x600D).to_bytes(4, "little") * cpus + bytes(32 - 4 * cpus)


@pytest.mark.parametrize("cpus", [2, 4])
def test_interrupts_to_each_other(boot: Callable[..., Guest], cpus: int) -> None:
    """A token goes round, 50 times, by an interrupt from each vCPU to the next."""
    guest = boot(
        f"""
        .include "interrupts64.inc"
        .include "smp64.inc"
        .set    CPUS, {cpus}
        .set    ROUNDS, 50 * CPUS
        set_gate 0x40, on_token
        load_idt
        start_others
    1:  pause
        cmpl    $CPUS - 1, ready
        jne     1b
        xor     %edi, %edi
        call    send_next
        jmp     idle
    other_main:
        lock incl ready
    idle:                               # with interrupts on: the token may come at any instruction
        sti
    2:  pause
        cmpl    $ROUNDS, passed
        jb      2b
        cli
        mov     $APIC, %edi
        mov     APIC_ID(%rdi), %eax
        test    %eax, %eax
        jz      4f
    3:  hlt
        jmp     3b
    4:  finish
    on_token:
        push    %rax
        push    %rdi
        push    %rsi
        mov     $APIC, %esi
        mov     APIC_ID(%rsi), %edi
        shr     $24, %edi
        incl    tokens(, %rdi, 4)
        movl    $0, APIC_EOI(%rsi)
        lock incl passed
        cmpl    $ROUNDS, passed
        jae     5f
        call    send_next
    5:  pop     %rsi
        pop     %rdi
        pop     %rax
        iretq
    send_next:                          # EDI: own APIC id. To the next one, of CPUS.
        inc     %edi
        cmp     $CPUS, %edi
        jb      6f
        xor     %edi, %edi
    6:  shl     $24, %edi
        mov     $APIC, %esi
        mov     %edi, APIC_ICR_HIGH(%rsi)
        movl    $0x4040, APIC_ICR_LOW(%rsi)
        ret
        .balign 4
    ready: .long 0
    passed: .long 0
    tokens: .fill 8, 4, 0
        """,
        cpus=cpus,
    )
    assert guest.run() == PASSED
    tokens = [int.from_bytes(guest.bytes_at("tokens", 32)[4 * n : 4 * n + 4], "little") for n in range(8)]
    assert tokens == [50] * cpus + [0] * (8 - cpus)


def test_apic_ids_and_topology(boot: Callable[..., Guest]) -> None:
    """CPUID tells each vCPU its own APIC id, the one its local APIC has."""
    guest = boot(
        """
        .include "interrupts64.inc"
        .include "smp64.inc"
        start_others
        xor     %edi, %edi
        call    note
    1:  pause
        cmpl    $3, done
        jne     1b
        finish
    other_main:
        call    note
    2:  cli
        hlt
        jmp     2b
    note:
        mov     $1, %eax
        cpuid
        shr     $24, %ebx               # initial APIC id
        mov     %ebx, ids(, %rdi, 4)
        lock incl done
        ret
        .balign 4
    done: .long 0
    ids: .fill 4, 4, 0xff
        """,
        cpus=3,
    )
    assert guest.run() == PASSED
    assert [guest.bytes_at("ids", 16)[4 * n] for n in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("after_reset", [False, True])
@pytest.mark.parametrize("cpus", [2, 3])
def test_a_guest_that_never_touched_its_own_apic_wakes_the_last(
    boot: Callable[..., Guest], cpus: int, after_reset: bool
) -> None:
    """A disabled local APIC still sends IPIs and takes INIT and SIPI (SDM vol. 3, 11.4.7.2), the last vCPU's too.

    memtest86+ does so: KVM looks up its map of APICs anew when one changes, and not when a vCPU is added.
    """
    guest = boot(
        f"""
        .set    APIC, 0xfee00000
        mov     $trampoline, %esi
        mov     $0x9000, %edi
        mov     $trampoline_end - trampoline, %ecx
        rep movsb
        mov     $APIC, %edi
        movl    ${cpus - 1} << 24, 0x310(%rdi)
        movl    $0xc500, 0x300(%rdi)        # INIT, level, assert; then the release of it
        movl    ${cpus - 1} << 24, 0x310(%rdi)
        movl    $0x8500, 0x300(%rdi)
        movl    ${cpus - 1} << 24, 0x310(%rdi)
        movl    $0x0609, 0x300(%rdi)        # SIPI, page 9
    1:  pause
        cmpw    $0x5a5a, 0x9800
        jne     1b
        movw    $0, 0x9800
        finish

        .code16
    trampoline:
        cli
        mov     $0x1234, %ebx
        movw    $0x5a5a, %cs:0x800
    1:  hlt
        jmp     1b
    trampoline_end:
        """,
        cpus=cpus,
    )
    if after_reset:
        guest.machine.reset()
    assert guest.run() == PASSED
    assert [guest.regs(n)["rbx"] for n in range(1, cpus)] == [0] * (cpus - 2) + [0x1234]
