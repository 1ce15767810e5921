"""fw_cfg from inside a guest: by its data port, and by DMA."""

from __future__ import annotations

from collections.abc import Callable

from guests import PASSED, Guest

SELECT = "mov $0x510, %edx\n mov ${key}, %eax\n outw %ax, %dx\n mov $0x511, %edx\n"


def test_signature_and_numbers_by_port(boot: Callable[..., Guest]) -> None:
    guest = boot(
        "cld\n"
        + SELECT.format(key=0)
        + "mov $signature, %edi\n mov $4, %ecx\n rep insb\n"
        + SELECT.format(key=5)
        + "mov $cpus, %edi\n mov $2, %ecx\n rep insb\n"
        + SELECT.format(key=3)
        + "mov $ram, %edi\n mov $8, %ecx\n rep insb\n finish\n signature: .long 0\n cpus: .long 0\n ram: .quad 0",
        cpus=2,
        memory_mib=6,
    )
    assert guest.run() == PASSED
    assert guest.bytes_at("signature", 4) == b"QEMU"
    assert guest.value("cpus") == 2
    assert guest.value("ram", 8) == 6 << 20


def test_a_named_file_found_and_read_by_dma(boot: Callable[..., Guest]) -> None:
    """Through the directory, as firmware does it. All of the DMA structure is big endian."""
    content = bytes(n * 31 & 0xFF for n in range(5000))
    guest = boot(
        """
        .set    DIRECTORY, 0x19
        .set    ENTRY, 64                   # size, select, reserved, name of 56 bytes
        cld
        movl    $DIRECTORY << 16 | 0x0a, control        # select, read
        movl    $4 + 64 * ENTRY, length
        movl    $directory, address
        call    dma
        mov     directory, %ecx
        bswap   %ecx
        mov     $directory + 4, %ebx
    1:  lea     8(%rbx), %rsi
        mov     $name, %edi
        mov     %ecx, %eax
        mov     $name_end - name, %ecx
        repe cmpsb
        mov     %eax, %ecx
        je      2f
        add     $ENTRY, %ebx
        loop    1b
        finish  9
    2:  mov     (%rbx), %eax
        bswap   %eax
        mov     %eax, size
        movzwl  4(%rbx), %eax
        xchg    %al, %ah
        shl     $16, %eax
        or      $0x0a, %eax
        mov     %eax, control
        mov     size, %eax
        mov     %eax, length
        movl    $data, address
        call    dma
        finish
    dma:                                    # turn the structure into big endian, start, wait
        mov     control, %eax
        bswap   %eax
        mov     %eax, block
        mov     length, %eax
        bswap   %eax
        mov     %eax, block + 4
        movl    $0, block + 8
        mov     address, %eax
        bswap   %eax
        mov     %eax, block + 12
        mov     $0x514, %edx                # upper half of the structure's address, then the lower one, which starts it
        xor     %eax, %eax
        outl    %eax, %dx
        add     $4, %edx
        mov     $block, %eax
        bswap   %eax
        outl    %eax, %dx
    3:  mov     block, %eax
        test    %eax, %eax
        jz      4f
        test    $0x01000000, %eax           # the error bit
        jz      3b
        finish  8
    4:  ret
        .balign 8
    block: .quad 0, 0
    control: .long 0
    length: .long 0
    address: .long 0
    size: .long 0
    name: .asciz "opt/tests/content"
    name_end:
        .set directory, 0x200000
        .set data, 0x210000
        """,
        fw_cfg={"opt/tests/content": content, "opt/tests/another": b"x"},
    )
    assert guest.run() == PASSED
    assert guest.value("size") == len(content)
    assert guest.machine.memory.read(0x21_0000, len(content)) == content
