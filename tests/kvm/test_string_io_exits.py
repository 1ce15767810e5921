"""String I/O: ins and outs, of each size, alone and with rep, up and down. The port stays, the data moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import PASSED, PORT, Guest, Recorder

SUFFIX = {1: "b", 2: "w", 4: "l"}
BYTES = bytes(range(1, 65))


def units(data: bytes, size: int) -> list[int]:
    return [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]


@pytest.mark.parametrize("mode", ["real16", "long64"])
@pytest.mark.parametrize("size", SUFFIX)
@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_rep_outs(boot: Callable[..., Guest], mode: str, size: int, down: bool) -> None:
    count = 64 // size
    guest = boot(
        f"""
        {"std" if down else "cld"}
        mov     $DEVICE_PORT, %dx
        mov     $data + {64 - size if down else 0}, %esi
        mov     ${count}, %ecx
        rep outs{SUFFIX[size]}
        cld
        finish
    data:
        .byte   {", ".join(map(str, BYTES))}
        """,
        mode,
    )
    device = Recorder()
    guest.machine.pio.map(PORT, 8, device)
    assert guest.run() == PASSED
    expected = units(BYTES, size)
    assert device.log == [("write", 0, size, value) for value in (reversed(expected) if down else expected)]
    regs = guest.regs()
    assert regs["rcx"] == 0
    assert regs["rsi"] == guest.program.symbols["data"] + (-size if down else 64)


@pytest.mark.parametrize("mode", ["real16", "long64"])
@pytest.mark.parametrize("size", SUFFIX)
@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_rep_ins(boot: Callable[..., Guest], mode: str, size: int, down: bool) -> None:
    count = 64 // size
    guest = boot(
        f"""
        {"std" if down else "cld"}
        mov     $DEVICE_PORT, %dx
        mov     $data + {64 - size if down else 0}, %edi
        mov     ${count}, %ecx
        rep ins{SUFFIX[size]}
        cld
        finish
        .byte   0xee                # nothing before or after may be written
    data:
        .fill   64, 1, 0
    end:
        .byte   0xee
        """,
        mode,
    )
    values = iter(units(BYTES, size))
    device = Recorder(lambda offset, size: next(values))
    guest.machine.pio.map(PORT, 8, device)
    assert guest.run() == PASSED
    assert device.log == [("read", 0, size)] * count
    pieces = [BYTES[at : at + size] for at in range(0, 64, size)]
    assert guest.bytes_at("data", 64) == b"".join(reversed(pieces) if down else pieces)
    assert guest.bytes_at("end", 1) == b"\xee"
    assert guest.machine.memory.read(guest.program.symbols["data"] - 1, 1) == b"\xee"
    assert guest.regs()["rdi"] == guest.program.symbols["data"] + (-size if down else 64)


def test_without_rep_and_with_none(boot: Callable[..., Guest]) -> None:
    """One outs is one unit; rep with a count of zero touches nothing."""
    guest = boot(
        """
        cld
        mov     $DEVICE_PORT, %edx
        mov     $data, %esi
        outsw
        xor     %ecx, %ecx
        rep outsw
        mov     $data + 4, %edi
        insl
        finish
    data:
        .quad   0x0807060504030201
        """
    )
    device = Recorder(lambda offset, size: 0xCAFEF00D)
    guest.machine.pio.map(PORT, 8, device)
    assert guest.run() == PASSED
    assert device.log == [("write", 0, 2, 0x0201), ("read", 0, 4)]
    assert guest.value("data", 8) == 0xCAFEF00D_04030201


def test_a_sector(boot: Callable[..., Guest]) -> None:
    """256 words through a FIFO window: two Python calls for the whole of it."""
    from pyvmm import FifoRegion

    guest = boot(
        """
        cld
        mov     $DEVICE_PORT, %edx
        mov     $buffer, %edi
        mov     $256, %ecx
        rep insw
        mov     $buffer, %esi
        mov     $256, %ecx
        rep outsw
        finish
    buffer:
        .fill   512
        """
    )
    sector = bytes(n * 7 & 0xFF for n in range(512))
    written = bytearray(512)
    ends: list[str] = []
    device = Recorder()

    def at_end() -> None:
        ends.append("end")
        if len(ends) == 1:
            fifo.open_write(written)

    fifo = FifoRegion(2, device, at_end)
    guest.machine.pio.add(PORT, fifo)
    fifo.open_read(sector)
    assert guest.run() == PASSED
    assert ends == ["end", "end"]
    assert written == sector
    assert guest.bytes_at("buffer", 512) == sector
    assert device.log == []
