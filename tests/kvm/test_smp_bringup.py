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
