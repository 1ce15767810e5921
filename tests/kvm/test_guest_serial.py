"""COM1 with a guest at the one end and a Python callable at the other."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from guests import PASSED, PORT, Guest, Recorder

from pyvmm.chardev import CallableChardev
from pyvmm.errors import DeviceError


@pytest.mark.parametrize("mode", ["real16", "protected32", "long64"])
def test_output(boot: Callable[..., Guest], mode: str) -> None:
    heard = bytearray()
    guest = boot(
        """
        mov     $text, %esi
        mov     $0x3f8, %dx
        mov     $text_end - text, %cx
        movzx   %cx, %ecx
        cld
        rep outsb
        finish
    text: .ascii "serial output, polled by nobody\\r\\n"
    text_end:
        """,
        mode,
        serial=heard.extend,
    )
    assert guest.run() == PASSED
    assert heard == b"serial output, polled by nobody\r\n"


ECHO = """
1:  mov     $0x3fd, %edx
2:  inb     %dx, %al
    test    $1, %al                     # data ready
    jz      2b
    mov     $0x3f8, %edx
    inb     %dx, %al
    outb    %al, %dx
    cmp     $'\\n', %al
    jne     1b
    finish
"""


def test_echo_by_polling(boot: Callable[..., Guest]) -> None:
    """More than the FIFO holds: the rest waits at the host's side."""
    heard = bytearray()
    line = CallableChardev(heard.extend)
    guest = boot(ECHO, serial=line)
    text = bytes(range(0x20, 0x7F)) * 3 + b"\n"
    guest.start()
    line.feed(text)
    guest.wait()
    assert guest.machine.control.status == PASSED
    assert heard == text


def test_echo_by_interrupt(boot: Callable[..., Guest]) -> None:
    heard = bytearray()
    line = CallableChardev(heard.extend)
    guest = boot(
        """
        .include "interrupts64.inc"
        set_gate 0x24, on_serial
        load_idt
        program_pic 0xef
        mov     $0x3fa, %edx            # FCR: FIFOs on, trigger at 8 bytes; fewer come by the timeout
        mov     $0x81, %al
        outb    %al, %dx
        mov     $0x3fc, %edx            # MCR: OUT2
        mov     $0x08, %al
        outb    %al, %dx
        mov     $0x3f9, %edx            # IER: received data
        mov     $0x01, %al
        outb    %al, %dx
        mov     $DEVICE_PORT, %edx      # ready: turning the FIFOs on has emptied them
        outb    %al, %dx
    1:  sti
        hlt
        cli
        cmpb    $'\\n', last
        jne     1b
        finish
    on_serial:
        push    %rax
        push    %rdx
        incl    irqs
    2:  mov     $0x3fd, %edx
        inb     %dx, %al
        test    $1, %al
        jz      3f
        mov     $0x3f8, %edx
        inb     %dx, %al
        mov     %al, last
        outb    %al, %dx
        jmp     2b
    3:  end_of_interrupt
        pop     %rdx
        pop     %rax
        iretq
    last: .byte 0
    irqs: .long 0
        """,
        serial=line,
    )
    ready = Recorder()
    guest.machine.pio.map(PORT, 1, ready)
    guest.start()
    ready.wait_for(1)
    text = b"a line that is longer than the sixteen bytes of the FIFO\n"
    line.feed(text)
    guest.wait()
    assert guest.machine.control.status == PASSED
    assert heard == text
    assert guest.value("irqs") >= 1


def test_to_a_file(boot: Callable[..., Guest], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("serial") / "log"
    guest = boot(
        "mov $0x3f8, %edx\n mov $'x', %al\n mov $100, %ecx\n 1: outb %al, %dx\n loop 1b\n finish", serial=f"file:{path}"
    )
    assert guest.run() == PASSED
    guest.close()
    assert path.read_bytes() == b"x" * 100


POLLED_OUTPUT = """
    mov     $text, %esi
    mov     $lines, %ebx
next_line:
    mov     $text, %esi
    mov     $text_end - text, %ecx
1:  mov     $0x3fd, %edx
2:  inb     %dx, %al
    test    $0x20, %al                  # transmitter empty
    jz      2b
    mov     $0x3f8, %edx
    lodsb
    outb    %al, %dx
    loop    1b
    dec     %ebx
    jnz     next_line
    mov     $0x3f8, %edx
    mov     $'.', %al
    outb    %al, %dx
    ending
text: .ascii "a line of a console's output\\n"
text_end:
"""


@pytest.mark.parametrize("ending", ["finish", "hlt"])
def test_polled_output_comes_in_lines_whole_and_in_time(boot: Callable[..., Guest], ending: str) -> None:
    """A byte at a time, heard by lines; what has no newline is not kept for long, also when the guest only waits."""
    heard: list[bytes] = []
    all_heard = threading.Event()

    def hear(data: bytes) -> None:
        heard.append(data)
        if data.endswith(b"."):
            all_heard.set()

    guest = boot(POLLED_OUTPUT.replace("$lines", "$200").replace("ending", ending), serial=hear)
    if ending == "finish":
        assert guest.run() == PASSED
    else:
        guest.start()
        assert all_heard.wait(60)
        guest.machine.pause()
    assert b"".join(heard) == b"a line of a console's output\n" * 200 + b"."
    assert len(heard) < 2000  # of 5801 bytes
    rows = {(row.address, row.direction): row for row in guest.machine.exit_stats()}
    assert rows[0x3F8, "out"].count == 5801


def test_what_the_callable_raises_for_the_last_bytes_ends_the_run(boot: Callable[..., Guest]) -> None:
    def hear(data: bytes) -> None:
        if b"z" in data:
            raise KeyError("told to")

    text = "mov $0x3f8, %edx\n" + "".join(f"mov $'{c}', %al\n outb %al, %dx\n" for c in "abcdefz")
    guest = boot(text + "finish", serial=hear)
    with pytest.raises(DeviceError, match="told to"):
        guest.run()


def test_debug_console(boot: Callable[..., Guest]) -> None:
    heard = bytearray()
    guest = boot(
        "mov $0x402, %edx\n inb %dx, %al\n movzbl %al, %ebx\n mov $'S', %al\n outb %al, %dx\n finish",
        debugcon=heard.extend,
    )
    assert guest.run() == PASSED
    assert guest.regs()["rbx"] == 0xE9  # how firmware finds it
    guest.close()
    assert heard == b"S"
