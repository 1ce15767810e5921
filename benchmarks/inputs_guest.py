"""A guest for who tries inputs: it reads six bytes from a port, and says that it is done."""

from __future__ import annotations

PORT = 0x700
INPUT = b"\x05hello"
# mov dx, 0x700; mov cx, 6; again: in al, dx; loop again
READ = bytes.fromhex("ba0007 b90600 ec e2fd")
# xor al, al; out 0xf4, al
END = READ + bytes.fromhex("30c0 e6f4")
# mov al, 'D'; out 0xe9, al; cli; hlt; jmp to the hlt
SAY_SO = READ + bytes.fromhex(f"b0{ord('D'):02x} e6e9 fa f4 ebfd")
ROM_BYTES, RESET_BYTES, CODE_BYTES = 1 << 16, 16, 256


def rom() -> bytes:
    """64 KiB with SAY_SO near their end, and a jump to it at the reset vector."""
    back = -(CODE_BYTES - RESET_BYTES + 3) & 0xFFFF
    jump = b"\xe9" + back.to_bytes(2, "little")
    code = SAY_SO.ljust(CODE_BYTES - RESET_BYTES, b"\xf4")
    return bytes(ROM_BYTES - CODE_BYTES) + code + jump.ljust(RESET_BYTES, b"\xf4")
