"""Machine.save_state and load_state: a guest goes on in another machine as if nothing had been."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asm
import disk_images
import pytest
from guests import PASSED, PORT, TIMEOUT_S, Guest, Recorder
from lives import MOMENTS, Lives
from test_disk_faults import FLUSH, READ, SECTOR, SOURCE, TARGET, WRITE, WRITE_MULTIPLE, Step, steps_source

import pyvmm
from pyvmm.cli.demo import GUEST_ADDRESS, NOTEBOOK_IRQ, NOTEBOOK_MMIO, NOTEBOOK_PORT, Notebook
from pyvmm.errors import StateError
from pyvmm.guests import image

NOTEBOOK_BYTES = 24


def demo_machine(said: bytearray, irqchip: str) -> pyvmm.Machine:
    m = pyvmm.Machine(
        memory_mib=4, flat=image("demo"), flat_address=GUEST_ADDRESS, irqchip=irqchip, serial=said.extend
    )
    notebook = m.board.add("notebook", Notebook(m.irq_line(NOTEBOOK_IRQ), m.cpus[0].vcpu.tsc_khz))
    m.pio.map(NOTEBOOK_PORT, NOTEBOOK_BYTES, notebook)
    m.mmio.map(NOTEBOOK_MMIO, NOTEBOOK_BYTES, notebook)
    return m


@pytest.mark.parametrize("irqchip", ["kernel", "off"])
def test_the_demo_guest_at_random_moments(irqchip: str) -> None:
    lives = 0
    for seed in range(MOMENTS):
        said = bytearray()
        with Lives(lambda said=said: demo_machine(said, irqchip), seed) as guest:  # type: ignore[misc]
            assert guest.to_the_end(TIMEOUT_S) == 0
            lives += guest.count
        text = said.decode()
        assert "FAILED" not in text
        assert [line.endswith("  ok") for line in text.splitlines()].count(True) == 9, text
        assert "Power off through ACPI." in text
        if lives >= MOMENTS:
            return
    pytest.fail(f"{lives} lives only")


COUNTER = """
    .set    COUNTS, 200000
        mov     $COUNTS, %ecx
        xor     %ebx, %ebx
    1:  add     %rcx, %rbx
        mov     %rbx, sum
        loop    1b
        finish
    sum: .quad 0
"""


def test_registers_and_memory(boot: Callable[..., Guest]) -> None:
    whole, first, second = boot(COUNTER), boot(COUNTER), boot(COUNTER)
    assert whole.run() == PASSED
    first.start()
    while not first.value("sum", 8):
        pass
    first.machine.pause()
    assert first.machine.state is pyvmm.RunState.PAUSED
    state = first.machine.save_state()
    second.machine.load_state(state)
    assert second.machine.state is pyvmm.RunState.PAUSED
    assert second.regs() == first.regs()
    for guest in (second, first):
        assert guest.run() == PASSED
        assert guest.value("sum", 8) == whole.value("sum", 8)
        assert guest.regs() == whole.regs()


def test_without_memory_the_caller_brings_it(boot: Callable[..., Guest]) -> None:
    first, second = boot(COUNTER), boot(COUNTER)
    state = first.machine.save_state(memory=False)
    assert state["memory"] is None
    second.machine.memory.write(0, first.machine.memory.view(0, 4 << 20))
    second.machine.load_state(state)
    assert second.run() == PASSED


def test_what_is_in_no_state_to_be_saved(boot: Callable[..., Guest]) -> None:
    guest = boot("1: jmp 1b")
    state = guest.machine.save_state()
    guest.start()
    with pytest.raises(StateError, match=r"save_state\(\) of a machine in state running: pause\(\) it first"):
        guest.machine.save_state()
    assert guest.machine.state is pyvmm.RunState.RUNNING
    guest.machine.pause()
    with pytest.raises(StateError, match=r"load_state\(\) of a machine in state paused: make another one"):
        guest.machine.load_state(state)
    guest.machine.stop()
    with pytest.raises(StateError, match="in state shutdown"):
        guest.machine.save_state()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda state: state.pop("parts"), "parts is missing"),
        (lambda state: state.update(format=7), "the state has format 7, this pyvmm reads 1"),
        (lambda state: state["machine"].update(cpus=3), "a machine with cpus 3, this one has 1"),
        (lambda state: state["parts"].pop("serial"), "the state has no serial"),
        (lambda state: state["parts"].update(gpu={}), "the state has a 'gpu', this machine has none"),
        (lambda state: state["memory"].update({"0x0": b"short"}), "memory at 0x0 is b'short'"),
        (lambda state: state["memory"].update({"0x0": 5}), "memory at 0x0 is 5"),
    ],
)
def test_a_state_of_something_else(boot: Callable[..., Guest], spoil: Callable[[Any], object], sentence: str) -> None:
    """Found before anything is touched: the machine is as good as new."""
    guest = boot(COUNTER)
    state = guest.machine.save_state()
    wrong = copy.deepcopy(state)
    spoil(wrong)
    with pytest.raises(StateError, match=sentence) as caught:
        guest.machine.load_state(wrong)
    assert "\n" not in str(caught.value)
    assert guest.run() == PASSED


@pytest.mark.parametrize(
    ("part", "field", "value", "sentence"),
    [
        ("serial", "lcr", 256, "the state of serial: lcr is 256"),
        ("vCPU 0", "xsave", b"", "the state of vCPU 0: xsave has 0 bytes, not "),
        ("vCPU 0", "regs", {}, "the state of vCPU 0: rax is missing"),
        ("vCPU 0", "msrs", {"what": 1}, "the state of vCPU 0: msrs has a 'what', which is no register"),
        ("vCPU 0", "msrs", {"0x12345": 1}, "the state of vCPU 0: MSR 0x12345 does not take 0x1"),
        ("vCPU 0", "debugregs", {"db": [1]}, "the state of vCPU 0: dr6 is missing"),
        ("irqchip", "ioapic", bytes(520), "the state of irqchip: ioapic is the state of another chip"),
        ("KVM's clock", "deadlines", [], "the state of KVM's clock: deadlines has 0 entries, not 1"),
    ],
)
def test_a_hostile_part(boot: Callable[..., Guest], part: str, field: str, value: object, sentence: str) -> None:
    """Some of it may have been loaded: the machine has ended, and a reset brings it back."""
    guest = boot(COUNTER)
    state = guest.machine.save_state()
    state["parts"][part]["state"][field] = value
    with pytest.raises(StateError, match=sentence):
        guest.machine.load_state(state)
    assert guest.machine.state is pyvmm.RunState.INTERNAL_ERROR
    guest.machine.reset()
    assert guest.run() == PASSED


WAITING_AP = """
        lea     1f(%rip), %rax
    1:  jmp     1b
"""


def test_processors_that_wait_for_their_init(boot: Callable[..., Guest]) -> None:
    first, second = boot(WAITING_AP, cpus=2), boot(WAITING_AP, cpus=2)
    first.start()
    first.machine.pause()
    state = first.machine.save_state()
    assert [state["parts"][f"vCPU {n}"]["state"]["mp_state"] for n in (0, 1)] == [0, 1]
    second.machine.load_state(state)
    assert second.machine.cpus[1].vcpu.mp_state == 1


WAKES_ANOTHER = """
        .include "interrupts64.inc"
        .include "smp64.inc"
        cld
        mov     $trampoline, %esi
        mov     $TRAMPOLINE, %edi
        mov     $trampoline_end - trampoline, %ecx
        rep movsb
        mov     $APIC, %edi
        movl    $0x1ff, APIC_SPURIOUS(%rdi)
        mov     $DEVICE_PORT, %edx
        outb    %al, %dx
    init:
        movl    $ICR_INIT, APIC_ICR_LOW(%rdi)
    sipi:
        movl    $ICR_SIPI | TRAMPOLINE >> 12, APIC_ICR_LOW(%rdi)
    sent:
    1:  pause
        cmpl    $1, done
        jne     1b
        finish
    other_main:
        movl    $1, done
    2:  cli
        hlt
        jmp     2b
        .balign 4
    done: .long 0
"""


@pytest.mark.parametrize(("until", "mp_state"), [("sipi", 2), ("sent", 0)])
def test_an_init_or_sipi_that_is_pending_is_not_lost(boot: Callable[..., Guest], until: str, mp_state: int) -> None:
    """vCPU 0 sends it while the other one stands; KVM carries it out when its MP state is read: so that comes first."""

    class Pauser(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            first.machine.pause()

    first, second = boot(WAKES_ANOTHER, cpus=2), boot(WAKES_ANOTHER, cpus=2)
    first.machine.pio.map(PORT, 1, Pauser())
    first.run()
    while first.regs()["rip"] != first.program.symbols[until]:
        first.machine.cpus[0].step(TIMEOUT_S)
    state = first.machine.save_state()
    other = state["parts"]["vCPU 1"]["state"]
    assert other["mp_state"] == mp_state
    assert other["sregs"]["cs"]["base"] == (0xFFFF0000 if until == "sipi" else 0x9000)
    second.machine.load_state(state)
    assert second.run() == PASSED


def test_time_stands_while_a_guest_is_nowhere(boot: Callable[..., Guest]) -> None:
    first, second = boot("1: jmp 1b"), boot("1: jmp 1b")
    first.start()
    while first.machine.clock.now_ns() < 20_000_000:
        pass
    first.machine.pause()
    state = first.machine.save_state()
    now_ns = first.machine.clock.now_ns()
    kvm_clock = state["parts"]["KVM's clock"]["state"]
    second.machine.load_state(state)
    assert second.machine.clock.now_ns() == now_ns
    second.start()
    second.machine.pause()
    later = second.machine.save_state()["parts"]["KVM's clock"]["state"]
    ran_ns = second.machine.clock.now_ns() - now_ns
    # It was stopped a moment before the clock of the devices, and started a moment before it.
    assert 0 <= later["clock_ns"] - kvm_clock["clock_ns"] < ran_ns + 1_000_000_000
    assert later["tsc_khz"] == kvm_clock["tsc_khz"]


def test_a_guest_that_moves_sectors_at_random_moments(tmp_path: Path) -> None:
    """PIO both ways, single and multiple, with words that KVM gathers: no sector is lost, doubled or torn."""
    sectors = 128
    steps: list[Step] = []
    for n in range(12):
        steps += [(WRITE, 7 * n, 3), (WRITE_MULTIPLE, 7 * n + 3, 36), (READ, 7 * n, 30), (FLUSH, 0, 0)]
    image = tmp_path / "disk.img"
    content, data = disk_images.seeded("before", sectors * SECTOR), disk_images.seeded("written", TARGET - SOURCE)
    program = asm.assemble(steps_source(steps), "real16")
    expected = bytearray(content)
    for what, lba, count in steps:
        if what in (WRITE, WRITE_MULTIPLE):
            expected[lba * SECTOR : (lba + count) * SECTOR] = data[lba * SECTOR : (lba + count) * SECTOR]

    def make() -> pyvmm.Machine:
        return pyvmm.Machine(
            flat=program.image, flat_address=program.address, machine="pc", memory_mib=4, drives=[str(image)]
        )

    lives = 0
    for seed in range(MOMENTS):
        image.write_bytes(content)
        with Lives(make, seed, longest_s=0.05) as guest:
            guest.machine.memory.write(SOURCE, data)
            assert guest.to_the_end(TIMEOUT_S) == PASSED
            outcomes = guest.machine.memory.read(program.symbols["outcomes"], 2 * len(steps))
            lives += guest.count
        assert outcomes == bytes(len(outcomes))
        assert image.read_bytes() == expected
        if lives >= MOMENTS:
            return
    pytest.fail(f"{lives} lives only")


SAYS_A_LINE = """
        mov     $0x402, %edx
        mov     $'a', %al
        outb    %al, %dx
    1:  cmpb    $0, go
        je      1b
        mov     $'b', %al
        outb    %al, %dx
        mov     $'\\n', %al
        outb    %al, %dx
        finish
    go: .byte   0
"""


def test_a_line_of_the_debug_console_is_said_once() -> None:
    said: list[bytes] = []
    with Guest(SAYS_A_LINE, debugcon=said.append) as one:
        debugcon = one.machine.devices["debugcon"]
        one.start()
        while not debugcon.save()["line"]:
            pass
        one.machine.pause()
        state = one.machine.save_state()
    with Guest(SAYS_A_LINE, debugcon=said.append) as other:
        other.machine.load_state(state)
        other.machine.memory.write(other.program.symbols["go"], b"\1")
        assert other.run() == PASSED
    assert said == [b"a", b"b\n"]
