"""A guest sends back what clients of the host's say to it over vsock: natively, its device on its own thread."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from guests import PASSED, TIMEOUT_S, Guest

from pyvmm.devices.virtio.vsock_connection import BUFFER_BYTES

CLIENTS = 3
MOVES = 6
PAUSED = 12
SENT_BYTES = int(os.environ.get("PYVMM_VSOCK_BYTES", "150000"))  # more where that is what is to be shown
PIECE_BYTES, AHEAD_BYTES = 32 << 10, BUFFER_BYTES

# Polls. A packet is answered in its own buffer: addresses change places, and REQUEST becomes RESPONSE, SHUTDOWN a RST,
# a question for credit its answer; data goes back as it is. It ends with the last client.
ECHO = """
    .set VIRTIO, 0xfeb00000
    .set RX, 0x20000                    # descriptors; the available ring at +0x80, the used ring at +0x100
    .set TX, 0x21000
    .set EVENTS, 0x22000
    .set BUFFERS, 0x40000               # eight of a page
    .macro register offset, value
    movl    $\\value, \\offset(%rbp)
    .endm
    .macro queue number, base
    register 0x30, \\number
    register 0x38, 8
    register 0x80, \\base
    register 0x90, \\base + 0x80
    register 0xa0, \\base + 0x100
    register 0x44, 1
    .endm
    mov     $VIRTIO, %ebp
    register 0x70, 3
    register 0x24, 1                    # VERSION_1 and nothing else
    register 0x20, 1
    register 0x70, 11
    queue   0, RX
    queue   1, TX
    queue   2, EVENTS
    xor     %ecx, %ecx                  # a buffer a descriptor, all of them available
1:  mov     %ecx, %eax
    shl     $12, %eax
    add     $BUFFERS, %eax
    mov     %ecx, %edx
    shl     $4, %edx
    mov     %rax, RX(%rdx)
    movl    $0x1000, RX + 8(%rdx)
    movl    $2, RX + 12(%rdx)
    mov     %cx, RX + 0x84(, %rcx, 2)
    inc     %ecx
    cmp     $8, %ecx
    jne     1b
    movw    $8, RX + 0x82
    register 0x70, 15
    xor     %r12d, %r12d                # packets that were seen,
    xor     %r13d, %r13d                # sent,
    xor     %r14d, %r14d                # bytes of this client,
    xor     %r15d, %r15d                # clients
next:
    pause
    cmp     %r12w, RX + 0x102
    je      next
    mov     %r12d, %eax
    inc     %r12d
    and     $7, %eax
    mov     RX + 0x104(, %rax, 8), %ebx
    mov     %ebx, %esi
    shl     $12, %esi
    add     $BUFFERS, %esi
    mov     (%rsi), %rax                # CIDs
    mov     8(%rsi), %rdx
    mov     %rdx, (%rsi)
    mov     %rax, 8(%rsi)
    mov     16(%rsi), %eax              # ports
    mov     20(%rsi), %edx
    mov     %edx, 16(%rsi)
    mov     %eax, 20(%rsi)
    movzwl  30(%rsi), %eax              # op
    mov     $2, %edx
    cmp     $1, %eax
    cmove   %edx, %eax
    jne     1f
    xor     %r14d, %r14d
1:  mov     $3, %edx
    cmp     $4, %eax
    cmove   %edx, %eax
    jne     1f
    inc     %r15d
1:  mov     $6, %edx
    cmp     $6, %eax                    # credit: nothing to say
    je      give
    cmp     $7, %eax
    cmove   %edx, %eax
    mov     %ax, 30(%rsi)
    add     24(%rsi), %r14d             # len
    movl    $0x40000, 36(%rsi)          # buf_alloc
    mov     %r14d, 40(%rsi)             # fwd_cnt
    mov     24(%rsi), %ecx
    add     $44, %ecx
    mov     %ebx, %edx
    shl     $4, %edx
    mov     %rsi, TX(%rdx)
    mov     %ecx, TX + 8(%rdx)
    movl    $0, TX + 12(%rdx)
    mov     %r13d, %eax
    and     $7, %eax
    mov     %bx, TX + 0x84(, %rax, 2)
    inc     %r13d
    mov     %r13w, TX + 0x82
    register 0x50, 1
1:  pause
    cmp     %r13w, TX + 0x102
    jne     1b
give:
    movzwl  RX + 0x82, %eax
    mov     %eax, %edx
    and     $7, %edx
    mov     %bx, RX + 0x84(, %rdx, 2)
    inc     %eax
    mov     %ax, RX + 0x82
    register 0x50, 0
    cmp     $CLIENTS, %r15d
    jb      next
    finish
"""


class Client:
    """Says its data from one thread and hears it from another, AHEAD_BYTES behind at most: the guest answers whether or
    not it has credit for that, which is no more than BUFFER_BYTES of the device's (5.10.6.3).
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.data = Random(seed).randbytes(SENT_BYTES)
        self.heard = bytearray()
        self.changed = threading.Condition()
        self.over = False
        self.end = socket.socket(socket.AF_UNIX)
        self.end.settimeout(TIMEOUT_S)
        self.end.connect(str(path))
        self.end.sendall(b"CONNECT 22\n")

    def talk(self) -> bool:
        """Whether all of it was answered, rightly; False where the connection was lost."""
        with self.end:
            line = b""
            while not line.endswith(b"\n"):
                byte = self.end.recv(1)
                if not byte:
                    return False
                line += byte
            assert line.startswith(b"OK ")
            sender = threading.Thread(target=self.say)
            sender.start()
            while len(self.heard) < SENT_BYTES and (data := self.end.recv(1 << 16)):
                with self.changed:
                    self.heard += data
                    self.changed.notify_all()
            with self.changed:
                self.over = True
                self.changed.notify_all()
            sender.join()
        assert self.heard == self.data[: len(self.heard)]
        return len(self.heard) == SENT_BYTES

    def say(self) -> None:
        data = memoryview(self.data)
        try:
            for at in range(0, SENT_BYTES, PIECE_BYTES):
                with self.changed:
                    self.changed.wait_for(lambda at=at: self.over or at + PIECE_BYTES <= len(self.heard) + AHEAD_BYTES)
                if self.over:
                    break
                self.end.sendall(data[at : at + PIECE_BYTES])
        except OSError:  # the connection is lost
            pass


@pytest.mark.parametrize("ioeventfd", ["on", "off"])
def test_clients_are_answered(boot: Callable[..., Guest], tmp_path: Path, ioeventfd: str) -> None:
    path = tmp_path / "vm.sock"
    source = ECHO.replace("$CLIENTS", f"${CLIENTS}")
    guest = boot(source, machine="microvm", vsock=f"cid=3,path={path}", virtio_ioeventfd=ioeventfd)
    guest.start()
    for n in range(CLIENTS):
        assert Client(path, n).talk()
    guest.wait()
    assert guest.machine.status == PASSED
    device = guest.machine.devices["vsock"]
    assert device.faults == 0  # type: ignore[attr-defined]
    assert device.stats["opened"] == CLIENTS  # type: ignore[attr-defined]
    assert device.stats["received_bytes"] == CLIENTS * SENT_BYTES  # type: ignore[attr-defined]


def test_it_goes_on_elsewhere(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """Streams end with their machine, and the next one's client is answered by the guest that has moved."""
    source = ECHO.replace("$CLIENTS", f"${CLIENTS}")
    path = tmp_path / "vm.sock"
    made = [boot(source, machine="microvm", vsock=f"cid=3,path={path}")]
    answered: list[bool] = []
    over = threading.Event()

    def clients() -> None:
        while not over.is_set():
            try:
                answered.append(Client(path, len(answered)).talk())
            except OSError:  # between two machines
                over.wait(0.001)

    thread = threading.Thread(target=clients)
    thread.start()
    try:
        for n in range(MOVES):
            made[-1].start()
            if made[-1].machine.wait(0.02 + 0.007 * n):
                break
            made[-1].machine.pause()
            if made[-1].machine.status != PAUSED:  # it has ended meanwhile
                break
            state = made[-1].machine.save_state()
            made[-1].close()
            made.append(boot(source, machine="microvm", vsock=f"cid={4 + n},path={path}"))
            made[-1].machine.load_state(state)
        else:
            made[-1].start()
            made[-1].wait()
        assert made[-1].machine.status == PASSED
    finally:
        over.set()
        made[-1].close()
        thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    assert answered.count(True) >= CLIENTS - 1  # the last one may have heard all but its end
    assert len(made) > 1
