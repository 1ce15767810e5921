"""KVM's PIT is made when a guest first needs it, and is then what one made with the machine would have been."""

from __future__ import annotations

import random
from collections.abc import Callable
from errno import ENXIO

import pytest
from guests import PASSED, Guest, Recorder

from pyvmm import KvmError
from pyvmm.irqchip import LOSE_TICKS_AFTER_S, KvmPit
from pyvmm.kvm.system import Kvm
from pyvmm.x86 import irqchip_state

OUT, IN = 1, 2
# A table of accesses (what, port, value), ended by 0; what is read goes to ``found``.
PLAYER = """
    mov     $table, %esi
    mov     $found, %edi
1:  movzbl  1(%rsi), %edx
    mov     2(%rsi), %al
    cmpb    $1, (%rsi)
    jb      3f
    ja      2f
    outb    %al, %dx
    add     $3, %esi
    jmp     1b
2:  inb     %dx, %al
    mov     %al, (%rdi)
    inc     %edi
    add     $3, %esi
    jmp     1b
3:  finish
table:
    .skip 256
found: .skip 256
"""
# (what, port, value written, bits read that time does not move)
Access = tuple[int, int, int, int]
STATUS = [(OUT, 0x43, 0xE2, 0), (IN, 0x40, 0, 0x7F), (OUT, 0x43, 0xE8, 0), (IN, 0x42, 0, 0x7F)]
PORT_B = (IN, 0x61, 0, 0xCF)


def has_pit(guest: Guest) -> bool:
    try:
        guest.machine.vm.get_pit()
    except KvmError as error:
        assert error.errno == ENXIO
        return False
    return True


def play(guest: Guest, accesses: list[Access]) -> None:
    table = b"".join(bytes(access[:3]) for access in accesses)
    guest.machine.memory.write(guest.program.symbols["table"], table + bytes(1))
    assert guest.run() == PASSED


def played(accesses: list[Access], *, early: bool) -> tuple[bytes, bytes]:
    """What the guest has read, and the PIT's state at the end; ``early``: KVM has it from the start."""
    with Guest(PLAYER) as guest:
        if early:
            guest.machine.vm.create_pit()
        play(guest, accesses)
        return outcome(guest, accesses, early)


def outcome(guest: Guest, accesses: list[Access], early: bool) -> tuple[bytes, bytes]:
    masks = [mask for what, _, _, mask in accesses if what == IN]
    found = bytes(byte & mask for byte, mask in zip(guest.bytes_at("found", len(masks)), masks, strict=True))
    state = bytearray(guest.machine.vm.get_pit() if early else guest.machine.irqchip.save()["pit"])
    for counter in (0, 24, 48):
        state[counter + 4 : counter + 6] = bytes(2)  # what was latched of the count
        state[counter + 8] &= 0x7F  # of the status
        state[counter + 16 : counter + 24] = bytes(8)  # when it was loaded
    return found, bytes(state)


def some_accesses(seed: int) -> list[Access]:
    """At random; counts are so long that none runs out."""
    rng = random.Random(seed)
    accesses: list[Access] = []
    for _ in range(rng.choice((1, 2, 3, 12))):
        port = rng.choice((0x40, 0x41, 0x42, 0x43, 0x43, 0x61))
        if port == 0x61:
            accesses.append(rng.choice((PORT_B, (OUT, port, rng.randrange(16), 0))))
        elif port == 0x43:
            accesses.append((OUT, port, rng.randrange(256), 0))
        else:
            accesses.append(rng.choice(((IN, port, 0, 0), (OUT, port, 0xFF, 0))))
    return accesses


@pytest.mark.parametrize("seed", range(24))
def test_it_is_what_one_made_early_is(seed: int) -> None:
    # With and without reads at the end, which make it.
    for accesses in (some_accesses(seed), [*some_accesses(seed), PORT_B, *STATUS]):
        assert played(accesses, early=False) == played(accesses, early=True)


def test_at_power_on_it_is_as_kvm_makes_it() -> None:
    kvm = Kvm()
    vm = kvm.create_vm()
    vm.create_irqchip()
    vm.create_pit()
    assert irqchip_state.save(vm, vm.get_pit())["pit"] == irqchip_state.PIT_AT_POWER_ON
    vm.close()
    kvm.close()


@pytest.mark.parametrize(
    ("accesses", "made"),
    [
        ([], False),
        ([(OUT, 0x43, 0x34, 0)], False),
        ([(OUT, 0x43, 0x34, 0), (OUT, 0x40, 0xFF, 0)], False),
        ([(OUT, 0x43, 0x34, 0), (OUT, 0x40, 0xFF, 0), (OUT, 0x40, 0xFF, 0)], True),
        ([(OUT, 0x61, 1, 0)], False),
        ([PORT_B], True),
    ],
)
def test_when_it_is_made(boot: Callable[..., Guest], accesses: list[Access], made: bool) -> None:
    guest = boot(PLAYER)
    play(guest, accesses)
    assert has_pit(guest) == made


def test_a_reset_and_a_saved_state(boot: Callable[..., Guest]) -> None:
    guest = boot("mov $0x34, %al\n outb %al, $0x43\n outb %al, $0x40\n outb %al, $0xf2\n 1: jmp 1b")
    written = Recorder()
    guest.machine.pio.map(0xF2, 1, written)
    guest.start()
    written.wait_for(1)
    guest.machine.pause()
    state = guest.machine.save_state()
    assert not has_pit(guest)
    half = guest.machine.irqchip.save()["pit"]
    assert half != irqchip_state.PIT_AT_POWER_ON
    with boot("1: jmp 1b").machine as other:
        other.load_state(state)
        assert other.irqchip.save()["pit"] == half
    guest.machine.reset()
    assert guest.machine.irqchip.save()["pit"] == irqchip_state.PIT_AT_POWER_ON


class RecordedVm:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def create_pit(self) -> None:
        self.calls.append("KVM_CREATE_PIT2")

    def set_pit(self, state: bytes) -> None:
        self.calls.append("KVM_SET_PIT2")

    def set_pit_reinject(self, reinject: bool) -> None:
        assert not reinject
        self.calls.append("KVM_REINJECT_CONTROL")


def test_missed_ticks_are_lost_a_little_later() -> None:
    """KVM_REINJECT_CONTROL waits for a grace period, and a vCPU with it."""
    vm = RecordedVm()
    later: list[tuple[Callable[[], None], float]] = []
    pit = KvmPit(vm, lambda work, after_s: later.append((work, after_s)))  # type: ignore[arg-type]
    for offset, value in ((3, 0x34), (0, 0xFF)):
        pit.write(offset, 1, value)
    assert vm.calls == []
    pit.write(0, 1, 0xFF)
    assert vm.calls == ["KVM_CREATE_PIT2", "KVM_SET_PIT2"]
    [(work, after_s)] = later
    assert after_s == LOSE_TICKS_AFTER_S
    work()
    assert vm.calls[2:] == ["KVM_REINJECT_CONTROL"]
