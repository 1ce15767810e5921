"""What a VM offers beside memory and eventfds: its clock, statistics, MSIs, interrupt controllers' state."""

from __future__ import annotations

import os
from collections.abc import Callable

from guests import MSI_ADDRESS, MSI_DATA, PASSED, PORT, RING_FOR_MSIS, Guest, Recorder

from pyvmm.kvm.system import CAPABILITIES
from pyvmm.kvm.vm import IOAPIC, PIC_MASTER, PIC_SLAVE


def test_clock(boot: Callable[..., Guest]) -> None:
    vm = boot("finish").machine.vm
    first = vm.get_clock()["clock"]
    assert vm.get_clock()["clock"] > first
    hour_ns = 3600 * 10**9
    vm.set_clock(hour_ns)
    assert hour_ns <= vm.get_clock()["clock"] < 2 * hour_ns


def test_binary_statistics(boot: Callable[..., Guest]) -> None:
    guest = boot("inb $0x80, %al\n finish")
    with guest.machine.vm.stats() as vm_stats, guest.machine.cpus[0].vcpu.stats() as vcpu_stats:
        assert vm_stats.id.startswith("kvm-")
        assert vcpu_stats.id.startswith(vm_stats.id)
        before = vcpu_stats.read()
        assert guest.run() == PASSED
        after = vcpu_stats.read()
        assert before["exits"] == 0
        assert isinstance(after["exits"], int)
        assert after["exits"] > 0
        assert any(isinstance(value, list) for value in after.values())  # the histograms
        assert "remote_tlb_flush" in vm_stats.read()


def test_signal_msi(boot: Callable[..., Guest]) -> None:
    guest = boot(RING_FOR_MSIS)
    taken = []

    class Signaller(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            taken.append(guest.machine.vm.signal_msi(MSI_ADDRESS, MSI_DATA))

    guest.machine.pio.map(PORT, 1, Signaller())
    assert guest.run() == PASSED
    assert guest.value("msis") == 20
    assert taken == [True] * 20


def test_an_msi_route_behind_an_irqfd(boot: Callable[..., Guest]) -> None:
    from pyvmm.irqchip import pc_routes

    guest = boot(RING_FOR_MSIS)
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        gsi = 30
        guest.machine.vm.set_gsi_routing([*pc_routes(), (gsi, "msi", MSI_ADDRESS, MSI_DATA)])
        guest.machine.vm.irqfd(event, gsi)
        guest.machine.vm.ioeventfd(event, PORT, 1, pio=True)
        assert guest.run() == PASSED
        assert guest.value("msis") == 20
    finally:
        os.close(event)


def test_interrupt_controllers_state(boot: Callable[..., Guest]) -> None:
    """What the guest programmed is in the state, and comes back when it is set again."""
    guest = boot(
        """
        .include "interrupts64.inc"
        program_pic 0xab, 0xcd
        start_timer 100
        finish
        """
    )
    vm = guest.machine.vm
    before = {chip: vm.get_irqchip(chip) for chip in (PIC_MASTER, PIC_SLAVE, IOAPIC)}
    guest.machine.pio.read(0x61, 1)  # KVM's PIT is made when somebody looks at it
    pit = vm.get_pit()
    assert guest.run() == PASSED
    after = vm.get_irqchip(PIC_MASTER)
    # struct kvm_pic_state behind 8 bytes of header: last_irr, irr, imr, isr, priority_add, irq_base, ...
    assert (after[8 + 2], after[8 + 5]) == (0xAB, 0x20)
    assert vm.get_irqchip(PIC_SLAVE)[8 + 2] == 0xCD
    assert int.from_bytes(vm.get_pit()[:4], "little") == 1193182 // 100
    for state in before.values():
        vm.set_irqchip(state)
    vm.set_pit(pit)
    assert vm.get_irqchip(PIC_MASTER)[8 + 2] == before[PIC_MASTER][8 + 2]
    assert vm.get_pit()[:4] == pit[:4]


def test_tpr_access_reporting(boot: Callable[..., Guest]) -> None:
    """KVM_EXIT_TPR_ACCESS: told of, and the guest goes on."""
    # KVM tells at its next entry of the guest: each access is followed by an exit that makes one.
    guest = boot(
        """
        mov     $0xfee00080, %edi
        movl    $0x20, (%rdi)
        inb     $0x80, %al
        mov     (%rdi), %ebx
        inb     $0x80, %al
        inb     $0x80, %al
        finish
        """
    )
    guest.machine.cpus[0].vcpu.tpr_access_reporting(True)
    assert guest.run() == PASSED
    assert guest.regs()["rbx"] == 0x20
    assert guest.exits("TPR_ACCESS") == 2


def test_capabilities(boot: Callable[..., Guest]) -> None:
    machine = boot("finish").machine
    named = machine.kvm.capabilities()
    assert named["KVM_CAP_IRQCHIP"] == 1
    assert named["KVM_CAP_IMMEDIATE_EXIT"] == 1
    assert named["KVM_CAP_NR_MEMSLOTS"] >= 32
    assert machine.vm.check_extension(CAPABILITIES["KVM_CAP_IRQCHIP"]) == 1
