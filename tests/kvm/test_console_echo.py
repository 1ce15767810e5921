"""A guest on a virtio console, natively: it sends back what it hears, on virtio-mmio and on virtio-pci; and the size of
the terminal that `pyvmm run` has.
"""

from __future__ import annotations

import signal
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import asm
import pytest
from console import Console
from guests import PASSED, TIMEOUT_S, Guest

# Queue 0 receives and queue 1 sends; each has one buffer, which is offered again and again. No interrupts.
QUEUES = """
    .set QUEUE_SIZE, 8
    .set RX, 0x20000
    .set TX, 0x21000
    .set AVAIL, 0x80
    .set USED, 0x100
    .set BUFFER, 0x30000
    .set BUFFER_BYTES, 64
    .macro clear queue
    movl    $0, \\queue + AVAIL
    movl    $0, \\queue + USED
    .endm
    .macro offer queue, flags           # descriptor 0, once more
    movl    $\\flags, \\queue + 12
    movzwl  \\queue + AVAIL + 2, %eax
    and     $QUEUE_SIZE - 1, %eax
    movw    $0, \\queue + AVAIL + 4(, %rax, 2)
    incw    \\queue + AVAIL + 2
    .endm
    .macro await queue                  # EAX: how many were used
8:  pause
    movzwl  \\queue + USED + 2, %eax
    cmp     %ax, \\queue + AVAIL + 2
    jne     8b
    .endm
    clear   RX
    clear   TX
"""
ECHO = """
again:
    movq    $BUFFER, RX
    movl    $BUFFER_BYTES, RX + 8
    offer   RX, 2
    ring    0
    await   RX
    dec     %eax
    and     $QUEUE_SIZE - 1, %eax
    mov     RX + USED + 8(, %rax, 8), %ecx
    movq    $BUFFER, TX
    mov     %ecx, TX + 8
    offer   TX, 0
    ring    1
    cmpb    $'.', BUFFER - 1(%rcx)      # the last one: it does not wait until that has gone out
    je      end
    await   TX
    jmp     again
end:
    finish
failed:
    finish  9
"""
MMIO = QUEUES + """
    .set VIRTIO, 0xfeb00000
    .include "virtio_mmio64.inc"
    mov     $VIRTIO, %ebp
    cmpl    $3, 8(%rbp)                 # a console
    jne     failed
    register 0x70, 1
    register 0x70, 3
    register 0x24, 1
    register 0x20, 1                    # VERSION_1 and nothing else
    register 0x70, 11
    set_up  0, RX
    set_up  1, TX
    register 0x70, 15
"""
PCI = QUEUES + """
    .include "virtio_pci64.inc"
    pci_config 0
    inl     %dx, %eax
    cmp     $0x10031af4, %eax           # the transitional console
    jne     failed
    pci_config 0x20                     # BAR 4
    inl     %dx, %eax
    and     $~15, %eax
    mov     %eax, %ebp
    movb    $1, 20(%rbp)
    movb    $3, 20(%rbp)
    movl    $1, 8(%rbp)
    movl    $1, 12(%rbp)
    movb    $11, 20(%rbp)
    set_up  0, RX
    set_up  1, TX
    movb    $15, 20(%rbp)
"""
BOTH = pytest.mark.parametrize(("machine", "source"), [("microvm", MMIO), ("pc", PCI)], ids=["mmio", "pci"])
TEXT = b"".join(b"line %d of what is typed\n" % n for n in range(500)) + b"."
MOVES = 12


class Listener:
    """``said`` is what the guest has sent, over all machines it was on."""

    def __init__(self) -> None:
        self.said = bytearray()
        self._changed = threading.Condition()

    def hear(self, data: bytes) -> None:
        with self._changed:
            self.said += data
            self._changed.notify_all()

    def wait_for(self, text: bytes) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.said, TIMEOUT_S), self.said

    def wait_for_bytes(self, size: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.said) >= size, TIMEOUT_S), self.said


@BOTH
def test_what_is_typed_comes_back(boot: Callable[..., Guest], machine: str, source: str) -> None:
    listener = Listener()
    guest = boot(source + ECHO, machine=machine, consoles=[listener.hear])
    guest.start()
    console = guest.machine.consoles["hvc0"]
    console.feed(b"hello\n")
    listener.wait_for(b"hello\n")
    console.feed(TEXT)
    guest.wait()
    assert guest.machine.status == PASSED
    assert listener.said == b"hello\n" + TEXT  # all of it: also what the guest did not wait for


@BOTH
def test_it_goes_on_elsewhere_from_any_moment(boot: Callable[..., Guest], machine: str, source: str) -> None:
    """What it has not heard yet goes with it; the end of the text comes only after the last move."""
    listener = Listener()
    guest = boot(source + ECHO, machine=machine, consoles=[listener.hear])
    guest.machine.consoles["hvc0"].feed(TEXT[:-1])
    for n in range(MOVES):
        guest.start()
        listener.wait_for_bytes(len(TEXT) * (n + 1) // (MOVES + 1))
        guest.machine.pause()
        state = guest.machine.save_state()
        guest.close()
        guest = boot(source + ECHO, machine=machine, consoles=[listener.hear])
        guest.machine.load_state(state)
    guest.machine.consoles["hvc0"].feed(TEXT[-1:])
    assert guest.run() == PASSED
    assert listener.said == TEXT


@BOTH
def test_a_fork_has_a_console_of_its_own_or_none(boot: Callable[..., Guest], machine: str, source: str) -> None:
    listener, other = Listener(), Listener()
    guest = boot(source + ECHO, machine=machine, consoles=[listener.hear])
    guest.start()
    guest.machine.consoles["hvc0"].feed(b"before\n")
    listener.wait_for(b"before\n")
    quiet, heard = guest.machine.fork(2, each=lambda n: {"consoles": [other.hear]} if n else {})
    try:
        for made, text in ((quiet, b"nobody hears it."), (heard, b"to another one.")):
            made.consoles["hvc0"].feed(text)
            assert made.run(TIMEOUT_S) == PASSED
    finally:
        quiet.close()
        heard.close()
    guest.machine.consoles["hvc0"].feed(b"after.")
    guest.wait()
    assert listener.said == b"before\nafter."
    assert other.said == b"to another one."


# Says on the serial port that it is there, and waits until the screen has 100 columns.
WAIT_FOR_SIZE = """
    mov     $0xfeb00000, %ebp
    mov     0x100(%rbp), %eax           # columns and lines
    cmp     $80 | 25 << 16, %eax
    jne     1f
    mov     $0x3f8, %dx
    mov     $'!', %al
    outb    %al, %dx
2:  mov     0x100(%rbp), %eax
    cmp     $100 | 50 << 16, %eax
    jne     2b
    finish
1:  finish  9
"""


def test_the_size_of_the_commands_terminal(tmp_path: Path) -> None:
    program = asm.assemble(WAIT_FOR_SIZE, "long64", None)
    image = tmp_path / "guest.bin"
    image.write_bytes(program.image)
    # The size is there before the command is: stty sets it.
    command = " ".join(
        (
            f"stty cols 80 rows 25; exec {sys.executable} -m pyvmm run --flat {image} --flat-mode long64",
            f"--flat-address {program.address:#x} --memory 4 --machine microvm --serial stdio --console stdio",
        )
    )
    with Console("/bin/sh", "-c", command) as console:
        console.expect("!", TIMEOUT_S)
        termios.tcsetwinsize(console.master, (50, 100))
        console.process.send_signal(signal.SIGWINCH)
        assert console.wait(TIMEOUT_S) == PASSED
