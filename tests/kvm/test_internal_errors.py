"""KVM can't go on: GuestError with a dump that names the suberror and the instruction, all vCPUs stopped, status 4."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import PASSED, PORT, Guest, Recorder

import pyvmm
from pyvmm import RunState
from pyvmm.errors import GuestError, StateError

# An MMIO operand makes any KVM emulate the instruction, and its emulator has no packed square root.
UNEMULATED = "sqrtps (%rdi), %xmm0"
UNEMULATED_BYTES = "0f 51 07"


def expect_internal_error(guest: Guest) -> GuestError:
    with pytest.raises(GuestError) as caught:
        guest.run()
    error = caught.value
    assert error.status == 4
    assert "KVM_EXIT_INTERNAL_ERROR" in str(error)
    assert "EMULATION" in str(error)
    assert guest.machine.state is RunState.INTERNAL_ERROR
    return error


def test_the_dump(boot: Callable[..., Guest]) -> None:
    guest = boot(
        f"""
        mov     %cr4, %rax
        or      $0x600, %eax            # OSFXSR, OSXMMEXCPT: SSE on
        mov     %rax, %cr4
        mov     $0x1234567890abcdef, %rbx
        mov     $DEVICE_MMIO, %edi
    here:
        {UNEMULATED}
        finish
        """
    )
    guest.machine.mmio.map(0xD000_0000, 16, Recorder())
    error = expect_internal_error(guest)
    assert guest.regs()["rip"] == guest.program.symbols["here"]
    assert "vCPU 0" in error.dump
    assert f"rip {guest.program.symbols['here']:016x}" in error.dump
    assert "rbx 1234567890abcdef" in error.dump
    assert "long mode" in error.dump
    marked = UNEMULATED_BYTES.split()
    assert f"<{marked[0]}> {' '.join(marked[1:])}" in error.dump
    assert UNEMULATED_BYTES in str(error)


def test_disassembly(boot: Callable[..., Guest]) -> None:
    guest = boot(f"mov %cr4, %rax\n or $0x600, %eax\n mov %rax, %cr4\n mov $DEVICE_MMIO, %edi\n {UNEMULATED}")
    assert "sqrtps xmm0,[rdi]" in expect_internal_error(guest).dump


def test_the_other_vcpu_is_stopped(boot: Callable[..., Guest]) -> None:
    guest = boot(
        f"""
        .include "interrupts64.inc"
        .include "smp64.inc"
        start_others
    1:  cmpl    $1, running
        jne     1b
        mov     %cr4, %rax
        or      $0x600, %eax
        mov     %rax, %cr4
        mov     $DEVICE_MMIO, %edi
        {UNEMULATED}
        finish
    other_main:
        mov     $DEVICE_PORT, %edx
    2:  movl    $1, running
        outb    %al, %dx                # hammers a device till the end
        jmp     2b
    running: .long 0
        """,
        cpus=2,
    )
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)
    error = expect_internal_error(guest)
    assert error.dump.startswith("vCPU 0")
    assert all(cpu.parked for cpu in guest.machine.cpus)
    calls = len(device.log)
    assert guest.regs(1)["rip"] >= guest.program.symbols["other_main"]
    with pytest.raises(StateError, match="internal-error"):
        guest.machine.resume()
    assert len(device.log) == calls


def test_reset_makes_it_runnable_again(boot: Callable[..., Guest]) -> None:
    guest = boot(
        f"""
        mov     $DEVICE_PORT, %edx
        inb     %dx, %al
        cmp     $1, %al
        je      1f
        mov     %cr4, %rax
        or      $0x600, %eax
        mov     %rax, %cr4
        mov     $DEVICE_MMIO, %edi
        {UNEMULATED}
    1:  finish
        """
    )
    device = Recorder()
    device.answer = lambda offset, size: device.resets
    guest.machine.pio.map(PORT, 1, device)
    expect_internal_error(guest)
    guest.machine.reset()
    assert guest.run() == PASSED


@pytest.mark.native
@pytest.mark.parametrize(
    ("mode", "instruction", "code"),
    [("long64", "int $0x40", "cd 40"), ("protected32", "iret", "cf"), ("long64", "fwait", "9b")],
)
def test_what_software_kvm_does_not_emulate(boot: Callable[..., Guest], mode: str, instruction: str, code: str) -> None:
    """Where KVM runs guests by software (PVM), plain instructions end the same way."""
    from pyvmm.kvm.kind import kvm_kind

    if "software" not in kvm_kind():
        # On hardware they run: the guest then dies of having no interrupt table, or comes to its end.
        guest = boot(f"{instruction}\n finish", mode, no_reboot=True)
        assert guest.run() in (6, PASSED)
        return
    guest = boot(f"{instruction}\n finish", mode)
    error = expect_internal_error(guest)
    assert f"<{code[:2]}>" in error.dump


def test_the_command_s_exit_status(tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]) -> None:
    import asm
    from guests import TIMEOUT_S

    from pyvmm.cli import main

    program = asm.assemble(
        f"mov %cr4, %rax\n or $0x600, %eax\n mov %rax, %cr4\n mov $DEVICE_MMIO, %edi\n {UNEMULATED}\n finish"
    )
    image = tmp_path_factory.mktemp("guest") / "guest.bin"
    image.write_bytes(program.image)
    words = ["run", "--flat", str(image), "--flat-mode", "long64", "--memory", "4", "--serial", "none"]
    assert main([*words, "--timeout", str(TIMEOUT_S)]) == 4
    error = capfd.readouterr().err
    assert "EMULATION" in error
    assert "Traceback" not in error


@pytest.mark.lab
def test_memory_that_the_host_took_away(boot: Callable[..., Guest]) -> None:
    """No rights to the memory behind guest RAM: KVM_RUN fails with EFAULT, and the machine stops with a dump.

    Software KVM takes the page for MMIO instead.
    """
    import ctypes
    import mmap

    guest = boot("mov $0x200000, %edi\n mov (%rdi), %eax\n finish")
    region = guest.machine.memory.ram[0]
    libc = ctypes.CDLL(None, use_errno=True)
    # Rights of one page are taken, and given back before the mapping is used again.
    page = ctypes.c_void_p(region.host_address + 0x20_0000)
    assert libc.mprotect(page, 4096, 0) == 0
    try:
        with pytest.raises(GuestError) as caught:
            guest.run()
    finally:
        libc.mprotect(page, 4096, mmap.PROT_READ | mmap.PROT_WRITE)
    assert "MEMORY_FAULT" in str(caught.value) or "errno 14" in str(caught.value)
    assert guest.machine.state is RunState.INTERNAL_ERROR
    assert isinstance(caught.value, pyvmm.VmmError)
