"""Every road to a reset, and what it does: image loaded anew, devices and vCPUs at power-on, the guest runs again."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import asm
import pytest
from guests import PASSED, PORT, TIMEOUT_S, Guest, Recorder

from pyvmm import RunState

ROADS = {
    "triple fault": "lidt no_idt \n ud2",
    "port 0xcf9": "mov $0xcf9, %dx \n mov $0x02, %al \n outb %al, %dx \n mov $0x06, %al \n outb %al, %dx",
    "keyboard controller": "mov $0xfe, %al \n outb %al, $0x64",
    "port 0x92": "inb $0x92, %al \n or $1, %al \n outb %al, $0x92",
}

# Asks the device which boot this is. At the first it spoils itself and resets; at the second it looks around.
SOURCE = """
    mov     $DEVICE_PORT, %dx
    inb     %dx, %al
    cmp     $0, %al
    jne     second
    movl    $0xdeadbeef, mark           # part of the image: must come back as it was
    movl    $0xdeadbeef, 0x30000        # RAM: a PC's memory controller forgets nothing by a reset
    mov     $0x3fb, %dx                 # COM1's line control register: must be zero again
    mov     $0x03, %al
    outb    %al, %dx
    mov     $0xdeadbeef, %ebp
    {road}
1:  jmp     1b                          # the reset comes when the access is done
second:
    mov     $0x3fb, %dx
    inb     %dx, %al
    movzx   %al, %edi
    mov     mark, %ecx
    finish
no_idt: .word 0, 0, 0, 0, 0
mark: .long 0x600d600d
"""


# In real mode KVM's instruction emulator, which software KVM runs it by, reads vectors past the limit of their table.
REAL_MODE_SHUTDOWN = pytest.param("triple fault", "real16", marks=pytest.mark.lab)
WAYS = [(road, mode) for road in ROADS for mode in ("real16", "long64") if (road, mode) != ("triple fault", "real16")]


@pytest.mark.parametrize(("road", "mode"), [*WAYS, REAL_MODE_SHUTDOWN, ("triple fault", "protected32")])
def test_the_guest_starts_again(boot: Callable[..., Guest], road: str, mode: str) -> None:
    guest = boot(SOURCE.format(road=ROADS[road]), mode)
    device = Recorder()
    device.answer = lambda offset, size: device.resets
    guest.machine.pio.map(PORT, 1, device)
    assert guest.run() == PASSED
    assert device.resets == 1
    regs = guest.regs()
    assert regs["rcx"] == 0x600D600D
    assert regs["rdi"] == 0
    assert regs["rbp"] == 0
    assert guest.exits("SHUTDOWN") == (1 if road == "triple fault" else 0)


@pytest.mark.parametrize("road", ROADS)
def test_no_reboot(boot: Callable[..., Guest], road: str) -> None:
    guest = boot(SOURCE.format(road=ROADS[road]), no_reboot=True)
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)
    status = guest.run()
    assert status == 6
    assert status.reason == ("triple fault" if road == "triple fault" else "reset")
    assert guest.machine.state is RunState.SHUTDOWN
    assert device.resets == 0
    if road != "triple fault":  # after which AMD's processors have no state left to be read
        assert guest.regs()["rbp"] == 0xDEADBEEF


def test_reset_from_the_embedder(boot: Callable[..., Guest]) -> None:
    """reset() of a machine that ended makes it runnable; of one that runs, it goes on running from the start."""
    guest = boot("mov $DEVICE_PORT, %edx\n 1: inb %dx, %al\n cmp $0, %al\n je 1b\n finish 3")
    answer = 1
    device = Recorder(lambda offset, size: answer)
    guest.machine.pio.map(PORT, 1, device)
    assert guest.run() == 7
    guest.machine.reset()
    assert guest.machine.state is RunState.PAUSED
    assert guest.regs()["rip"] == guest.program.address
    assert guest.run() == 7
    guest.machine.reset()
    answer = 0
    guest.start()
    device.wait_for(len(device.log) + 10)
    resets = device.resets
    guest.machine.reset()
    assert device.resets == resets + 1
    assert guest.machine.state.value == "running"
    device.wait_for(len(device.log) + 10)
    answer = 1
    guest.wait()
    assert guest.machine.control.status == 7


def test_a_guest_that_resets_itself_a_hundred_times(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
        mov     $DEVICE_PORT, %edx
        inb     %dx, %al
        cmp     $100, %al
        je      1f
        lidt    no_idt
        ud2
    1:  finish
    no_idt: .word 0, 0, 0, 0, 0
        """
    )
    device = Recorder()
    device.answer = lambda offset, size: device.resets
    guest.machine.pio.map(PORT, 1, device)
    assert guest.run() == PASSED
    assert device.resets == 100


def test_other_vcpus_wait_for_sipi_again(boot: Callable[..., Guest]) -> None:
    """Two vCPUs in the guest, one resets: both are back at power-on, and bring-up works a second time."""
    guest = boot(
        """
        .include "interrupts64.inc"
        .include "smp64.inc"
        start_others
    1:  cmpl    $1, running             # the image is new after a reset, so this starts from zero
        jne     1b
        mov     $DEVICE_PORT, %edx
        inb     %dx, %al
        cmp     $3, %al
        je      2f
        lidt    no_idt
        ud2
    2:  finish
    other_main:
        lock incl running
    3:  pause
        jmp     3b
    no_idt: .word 0, 0, 0, 0, 0
    running: .long 0
        """,
        cpus=2,
    )
    device = Recorder()
    device.answer = lambda offset, size: device.resets
    guest.machine.pio.map(PORT, 1, device)
    assert guest.run() == PASSED
    assert device.resets == 3


WHY = {
    "triple fault": "a triple fault",
    "port 0xcf9": "port 0xcf9, the reset register of ACPI and PCI",
    "keyboard controller": "port 0x64, the keyboard controller",
    "port 0x92": "port 0x92",
}


@pytest.mark.parametrize("road", ROADS)
def test_how_often_and_why_last(boot: Callable[..., Guest], road: str) -> None:
    guest = boot(SOURCE.format(road=ROADS[road]))
    device = Recorder()
    device.answer = lambda offset, size: 0 if device.resets < 2 else 1
    guest.machine.pio.map(PORT, 1, device)
    assert guest.run() == PASSED
    assert (guest.machine.resets.count, guest.machine.resets.why) == (2, WHY[road])
    assert guest.machine.exit_stats_table().endswith(f"\n2 resets, the last by {WHY[road]}")
    guest.machine.reset()
    assert guest.machine.resets.count == 2, "the embedder's are not the guest's"


def test_an_endless_loop_of_resets_is_told(boot: Callable[..., Guest]) -> None:
    """It looks alive, and the time limit is all that ends it."""
    guest = boot(ROADS["triple fault"] + "\n no_idt: .word 0, 0, 0, 0, 0")
    often = threading.Event()
    said: list[str] = []

    def tell(sentence: str) -> None:
        said.append(sentence)
        often.set()

    guest.machine.resets.on_often = tell
    guest.start()
    assert often.wait(TIMEOUT_S)
    assert said[0].startswith("the guest resets itself again and again: ")
    guest.machine.pause()
    with pytest.raises(TimeoutError, match=r"still running after 0.2 s: \d+ resets?, the last by a triple fault"):
        # The machine takes no more than some milliseconds for one.
        while True:
            try:
                guest.machine.run(0.2)
            except TimeoutError as error:
                if "reset" in str(error):
                    raise


def test_the_command_tells_of_them(tmp_path: Path) -> None:
    program = asm.assemble(ROADS["triple fault"] + "\n no_idt: .word 0, 0, 0, 0, 0", "long64")
    flat = tmp_path / "flat"
    flat.write_bytes(program.image)
    command = [sys.executable, "-m", "pyvmm", "run", "--flat", str(flat), "--flat-mode", "long64"]
    command += ["--flat-address", str(program.address), "--memory", "16", "--serial", "none", "--exit-stats"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        line = run.stderr.readline()
        run.send_signal(signal.SIGTERM)
        rest = run.stderr.read()
        assert run.wait(TIMEOUT_S) == 128 + signal.SIGTERM
    assert re.match(r"pyvmm: the guest resets itself again and again: \d+ resets, the last by a triple fault; ", line)
    assert "--no-reboot ends it at the first" in line
    assert rest.count("again and again") == 0
    assert re.search(r"\n\d+ resets, the last by a triple fault\n$", rest)
