"""Regions come and go while vCPUs run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import MMIO, PASSED, PORT, Guest, Recorder

# Reads the device's port (or address) until the word at `stop` is set; the last three answers end in EBX, ECX, ESI.
READ_PORT = """
    mov     $DEVICE_PORT, %edx
1:  inb     %dx, %al
    mov     %al, last
    cmpb    $0, stop
    je      1b
    finish
last: .byte 0
stop: .byte 0
"""
READ_MMIO = READ_PORT.replace("inb     %dx, %al", "mov DEVICE_MMIO, %al")


@pytest.mark.parametrize("kind", ["pio", "mmio"])
def test_map_and_unmap_under_a_running_guest(boot: Callable[..., Guest], kind: str) -> None:
    guest = boot(READ_PORT if kind == "pio" else READ_MMIO)
    space, base = (guest.machine.pio, PORT) if kind == "pio" else (guest.machine.mmio, MMIO)
    guest.start()
    for n in range(20):
        device = Recorder(lambda offset, size, n=n: n)  # type: ignore[misc]
        region = space.map(base, 1, device)
        device.wait_for(3)
        space.unmap(region)
        calls = len(device.log)
        # Whatever the guest reads from now on, the device does not hear of it.
        later = Recorder()
        other = space.map(base, 1, later)
        later.wait_for(3)
        space.unmap(other)
        assert len(device.log) == calls
    guest.machine.memory.write(guest.program.symbols["stop"], b"\1")
    guest.wait()
    assert guest.machine.control.status == PASSED


def test_two_regions_take_turns_under_two_vcpus(boot: Callable[..., Guest]) -> None:
    """Each device sees its own offsets only, whichever vCPU reads."""
    guest = boot(
        """
        .include "interrupts64.inc"
        .include "smp64.inc"
        start_others
    other_main:
        mov     $DEVICE_PORT, %edx
    1:  inl     %dx, %eax
        cmp     $0xffffffff, %eax       # nobody's, between two
        je      2f
        cmp     $2, %eax
        ja      bad
    2:  cmpb    $0, stop
        je      1b
        lock incl done
    3:  cmpl    $2, done
        jne     3b
        finish
    bad:
        finish  7
    done: .long 0
    stop: .byte 0
        """,
        cpus=2,
    )
    devices = [Recorder(lambda offset, size: 1), Recorder(lambda offset, size: 2)]
    guest.start()
    for n in range(60):
        device = devices[n % 2]
        calls = len(device.log)
        region = guest.machine.pio.map(PORT, 4, device)
        device.wait_for(calls + 1)
        guest.machine.pio.unmap(region)
    guest.machine.memory.write(guest.program.symbols["stop"], b"\1")
    guest.wait()
    assert guest.machine.control.status == PASSED
    assert all(call == ("read", 0, 4) for device in devices for call in device.log)


def test_a_device_maps_another_from_its_handler(boot: Callable[..., Guest]) -> None:
    """As a PCI function does when its BAR is written: the very next access finds the new region."""
    guest = boot(
        """
        mov     $DEVICE_PORT, %edx
        outb    %al, %dx                # maps a device at DEVICE_PORT + 1
        inc     %edx
        inb     %dx, %al
        movzbl  %al, %ebx
        dec     %edx
        inb     %dx, %al                # unmaps it, and itself
        inc     %edx
        inb     %dx, %al
        movzbl  %al, %ecx
        finish
        """
    )
    pio = guest.machine.pio
    regions = {}
    behind = Recorder(lambda offset, size: 0x42)

    class Bridge(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            regions["behind"] = pio.map(PORT + 1, 1, behind)

        def read(self, offset: int, size: int) -> int:
            pio.unmap(regions["behind"])
            pio.unmap(regions["own"])
            return 0

    regions["own"] = pio.map(PORT, 1, Bridge())
    assert guest.run() == PASSED
    regs = guest.regs()
    assert (regs["rbx"], regs["rcx"]) == (0x42, 0xFF)
