"""The same commands to QEMU and to the board here: the same answers, to the letter, and the same interrupts.

QEMU's binary of Debian has no qtest accelerator; with its processors held (-S) all of the protocol is there but for
the clock.
"""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm import Machine
from pyvmm.control.qtest import QtestServer
from pyvmm.control.qtest_client import TIMEOUT_S, QtestClient

MEMORY = """
readq 0x1000
writeb 0x1000 0x1ab
writew 0x1002 0xffabcd
writel 0x1004 0xffffffff12345678
writeq 0x1008 -2
readb 0x1000
readw 010002
readl 4100
readq 0X1008
read 0x1000 16
read 0x1000 1
write 0x1000 4 0x01020304
write 0x1001 2 0xaabbccdd
write 0x1004 4 0xee
write 0x1008 4 0X123
write 0x100c 1 0x
write 0x100c 1 12
write 0x100c 0 0x12
b64read 0x1000 12
b64read 0x1000 0
b64write 0x1000 6 AQIDBAUG
b64write 0x1001 2 /v38+w==
b64write 0x1000 4 A
read 0x1000 16
memset 0x1000 5 0x155
memset 0x1000 0 1
memset 0x1001 1 -1
read 0x1000 8
"""

PORTS = """
inb 0x3ff
outb 0x3ff 0x1a5
inb 0x3ff 9 9
outb 1023 017
inb 01777
inw 0x1f2
inl 0x402
outl 0xcf8 0x80000000
inl 0xcfc
inw 0xcfe
inb 0xcff
"""

MISTAKES = """
foo
inb\t0x70
INB 0x70
 inb 0x70
rtas a 1 2 3 4
module_load hw- nothing
endianness
endianness x
irq_intercept_in /machine/nothing
irq_intercept_out nothing
set_irq_in nothing unnamed-gpio-in 1 1
"""

PINS = """
irq_intercept_in ioapic
irq_intercept_in ioapic
irq_intercept_out ioapic
set_irq_in ioapic unnamed-gpio-in 3 1
set_irq_in ioapic unnamed-gpio-in 3 1
set_irq_in ioapic unnamed-gpio-in 3 0
set_irq_in ioapic unnamed-gpio-in 0 -5
set_irq_in ioapic unnamed-gpio-in 0 0
set_irq_in ioapic unnamed-gpio-in 23 1
outb 0x3fc 0x08
outb 0x3f9 0x02
inb 0x3fa
inb 0x3fa
outb 0x3f9 0x00
"""

IOAPIC = """
readl 0xfec00000
writel 0xfec00000 0x1ff
readl 0xfec00000
readb 0xfec00000
readw 0xfec00000
readq 0xfec00000
readb 0xfec00001
readl 0xfec00004
readl 0xfec00020
readl 0xfec00010
writew 0xfec00000 0x0110
readl 0xfec00000
readl 0xfec00010
writel 0xfec00010 0x00010041
readl 0xfec00010
writel 0xfec00010 0x0001f041
readl 0xfec00010
writel 0xfec00000 0x11
writel 0xfec00010 0x03000000
readl 0xfec00010
writel 0xfec00000 0x3f
readl 0xfec00010
writel 0xfec00000 0x40
readl 0xfec00010
writel 0xfec00000 0
writel 0xfec00010 0xffffffff
readl 0xfec00010
writel 0xfec00000 2
readl 0xfec00010
"""

PIC = """
irq_intercept_in ioapic
outb 0x20 0x11
outb 0x21 0x08
outb 0x21 0x04
outb 0x21 0x01
outb 0xa0 0x11
outb 0xa1 0x70
outb 0xa1 0x02
outb 0xa1 0x01
outb 0x21 0xfe
inb 0x21
outb 0xa1 0x5a
inb 0xa1
outb 0x4d0 0xff
outb 0x4d1 0xff
inb 0x4d0
inb 0x4d1
outb 0x4d0 0
outb 0x4d1 0
outb 0x3fc 0x08
outb 0x3f9 0x02
outb 0x20 0x0a
inb 0x20
outb 0x20 0x0b
inb 0x20
outb 0x20 0x0c
inb 0x20
inb 0x3fa
outb 0x20 0x0a
inb 0x20
outb 0x20 0xc5
outb 0x20 0x20
"""

SERIAL = """
outb 0x3fb 0x83
outb 0x3f8 0x0c
outb 0x3f9 0x00
inb 0x3f8
inb 0x3f9
outb 0x3fb 0x03
inb 0x3fb
inb 0x3fd
inb 0x3fe
outb 0x3fc 0x1f
inb 0x3fc
inb 0x3fe
"""

PCI = """
outl 0xcf8 0x80000008
inl 0xcfc
outl 0xcf8 0x80000800
inl 0xcfc
outl 0xcf8 0x8000080c
inl 0xcfc
outl 0xcf8 0x80000908
inl 0xcfc
outl 0xcf8 0x80000920
outl 0xcfc 0xffffffff
inl 0xcfc
outl 0xcfc 0xc001
inl 0xcfc
outl 0xcf8 0x80000904
inl 0xcfc
outw 0xcfc 5
inl 0xcfc
inb 0xc002
outl 0xc004 0x12345677
inl 0xc004
outl 0xcf8 0x80000b00
inl 0xcfc
outl 0xcf8 0x80000b3c
inl 0xcfc
outl 0xcf8 0x80001800
inl 0xcfc
outl 0xcf8 0x80000860
inl 0xcfc
inl 0xcf8
"""

IDE = """
irq_intercept_in ioapic
outb 0x1f6 0xa0
inb 0x1f7
outb 0x1f7 0xec
inb 0x3f6
inw 0x1f0
inl 0x1f0
inb 0x1f7
outb 0x1f2 0x55
outb 0x1f3 0xaa
inb 0x1f2
inb 0x1f3
outb 0x3f6 0x0a
outb 0x1f7 0xec
inb 0x3f6
outb 0x1f6 0xb0
inb 0x1f7
outb 0x176 0xa0
inb 0x177
"""

FIRMWARE_CONFIGURATION = """
outw 0x510 0
inb 0x511
inb 0x511
inb 0x511
inb 0x511
inb 0x511
inl 0x514
inl 0x518
outw 0x510 5
inb 0x511
"""

SCRIPTS = {
    "memory": MEMORY, "ports": PORTS, "mistakes": MISTAKES, "pins": PINS, "ioapic": IOAPIC, "pic": PIC,
    "serial": SERIAL, "pci": PCI, "ide": IDE, "fw_cfg": FIRMWARE_CONFIGURATION,
}  # fmt: skip


def disk(path: Path) -> Path:
    """An image; each of the two has its own, as an image has one writer."""
    path.write_bytes(b"".join(bytes([n % 251]) * 512 for n in range(2048)))
    return path


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "test.sock"))
        made.listen(1)
        made.settimeout(TIMEOUT_S)
        yield made


@pytest.fixture
def theirs(tmp_path: Path, listener: socket.socket) -> Iterator[QtestClient]:
    """QEMU connects to the test, as libqtest has it."""
    image = disk(tmp_path / "theirs.img")
    command = [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc", "-m", "16",
        "-serial", "null", "-drive", f"file={image},if=ide,format=raw",
        "-accel", "tcg", "-S", "-qtest", f"unix:{listener.getsockname()}", "-qtest-log", "none",
    ]  # fmt: skip
    with subprocess.Popen(command) as process:
        try:
            yield QtestClient(listener.accept()[0])
        finally:
            process.kill()


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[QtestClient]:
    end, other_end = socket.socketpair()
    with Machine(accel="qtest", memory_mib=16, drives=[disk(tmp_path / "ours.img")]) as machine:
        server = QtestServer(machine)
        thread = threading.Thread(target=server.talk, args=(other_end,))
        thread.start()
        client = QtestClient(end)
        yield client
        client.hang_up()
        thread.join(TIMEOUT_S)


def transcript(client: QtestClient, script: str) -> list[str]:
    """Each command, and everything that came up to its reply."""
    told = []
    for line in script.strip("\n").split("\n"):
        client.irqs.clear()
        reply = client.ask(line)
        told.append(" | ".join([line, *client.irqs, reply]))
    return told


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_answers(theirs: QtestClient, ours: QtestClient, name: str) -> None:
    assert transcript(ours, SCRIPTS[name]) == transcript(theirs, SCRIPTS[name])
