"""Flat binaries in each mode, with the state they are entered in, and multiboot kernels with modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import asm
import pytest
from guests import PASSED, TIMEOUT_S, Guest

import pyvmm


def test_real_mode_entry(boot: Callable[..., Guest]) -> None:
    guest = boot("mov %cs, %ax\n mov %ax, %bx\n call 1f\n 1: pop %cx\n finish", "real16")
    assert guest.run() == PASSED
    regs = guest.regs()
    assert regs["rbx"] & 0xFFFF == 0
    assert 0x7C00 < regs["rcx"] & 0xFFFF < 0x7C20
    assert not guest.machine.cpus[0].sregs["cr0"] & 1


def test_real_mode_above_64_kib(boot: Callable[..., Guest]) -> None:
    """CS is the image's paragraph there; code that does not care where it stands runs."""
    guest = boot("mov %cs, %ax\n mov %ax, %bx\n mov %ds, %ax\n mov %ax, %cx\n finish", "real16", flat_address=0x2_0000)
    assert guest.run() == PASSED
    assert (guest.regs()["rbx"], guest.regs()["rcx"]) == (0x2000, 0x2000)


def test_protected_mode_entry(boot: Callable[..., Guest]) -> None:
    """Flat segments that can be loaded again from the GDT that stands there, a stack, paging off."""
    guest = boot(
        """
        mov     %cr0, %ebx
        mov     %ds, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %cs, %ecx
        push    $0x1234
        pop     %esi
        ljmp    $0x10, $1f
    1:  finish
        """,
        "protected32",
    )
    assert guest.run() == PASSED
    regs = guest.regs()
    assert (regs["rbx"] & 1, regs["rbx"] >> 31) == (1, 0)
    assert (regs["rcx"], regs["rsi"]) == (0x10, 0x1234)


def test_long_mode_entry(boot: Callable[..., Guest]) -> None:
    """The first 4 GiB one-to-one; the GDT can be loaded from again."""
    guest = boot(
        """
        movl    $0x77, 0x2ffffc
        mov     $0xfffffff0, %eax       # the last bytes below 4 GiB: nobody's, but mapped
        mov     (%rax), %ebx
        mov     %ds, %eax
        mov     %eax, %ds
        mov     %eax, %ss
        push    $0x10
        push    $1f
        lretq
    1:  finish
        """
    )
    assert guest.run() == PASSED
    assert guest.regs()["rbx"] == 0xFFFF_FFFF
    sregs = guest.machine.cpus[0].sregs
    assert sregs["efer"] & 0x500 == 0x500


MULTIBOOT = """
    .set    MAGIC, 0x1badb002
    .set    FLAGS, 0x00010003           # page-aligned modules, memory map, addresses in the header
    .balign 4
header:
    .long   MAGIC, FLAGS, -(MAGIC + FLAGS)
    .long   header, 0x100000, 0, 0, entry
entry:
    mov     %eax, %ecx
    mov     %ebx, %ebp
    mov     (%ebx), %edx                # flags
    mov     16(%ebx), %esi              # command line
    mov     $line, %edi
1:  lodsb
    stosb
    test    %al, %al
    jnz     1b
    mov     20(%ebp), %eax              # number of modules
    mov     %eax, modules
    mov     24(%ebp), %esi              # their list
    mov     (%esi), %eax
    mov     %eax, module_start
    mov     4(%esi), %eax
    mov     %eax, module_end
    mov     8(%esi), %esi
    mov     $module_line, %edi
2:  lodsb
    stosb
    test    %al, %al
    jnz     2b
    finish
    .balign 4
modules: .long 0
module_start: .long 0
module_end: .long 0
line: .fill 128
module_line: .fill 128
"""


def test_multiboot(tmp_path_factory: pytest.TempPathFactory) -> None:
    program = asm.assemble(MULTIBOOT, "protected32")
    directory = tmp_path_factory.mktemp("multiboot")
    kernel, module = directory / "kernel", directory / "module"
    kernel.write_bytes(program.image)
    module.write_bytes(b"what a module holds")
    with pyvmm.Machine(kernel=kernel, modules=[(module, "of this name")], append="two words", memory_mib=8) as m:
        assert m.run(TIMEOUT_S) == PASSED
        at = program.symbols
        assert m.cpus[0].regs["rcx"] == 0x2BADB002

        def number(symbol: str) -> int:
            return int.from_bytes(m.memory.read(at[symbol], 4), "little")

        def string(symbol: str) -> bytes:
            return m.memory.read(at[symbol], 128).split(b"\0")[0]

        assert number("modules") == 1
        start, end = number("module_start"), number("module_end")
        assert start % 4096 == 0
        assert m.memory.read(start, end - start) == b"what a module holds"
        assert string("line") == f"{kernel} two words".encode()
        assert string("module_line") == f"{module} of this name".encode()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"modules": [("{path}", "a b")]}, "{path} a b"),
        ({"modules": [("{path}", "")]}, "{path}"),
        ({"modules": [(b"bytes", "a b")]}, "module a b"),
        ({"initrd": "{path}"}, "{path}"),
        ({"initrd": b"bytes"}, "module"),
    ],
)
def test_the_first_word_of_a_module_s_command_line_is_its_name(
    tmp_path: Path, options: dict[str, Any], line: str
) -> None:
    """QEMU hw/i386/multiboot.c, load_multiboot: a module's string is what -initrd was given, file name first."""
    program = asm.assemble(MULTIBOOT, "protected32")
    path = tmp_path / "file"
    path.write_bytes(b"x")
    if "modules" in options:
        ((image, text),) = options["modules"]
        options = {"modules": [(path if image == "{path}" else image, text)]}
    elif options["initrd"] == "{path}":
        options = {"initrd": path}
    with pyvmm.Machine(kernel=program.image, memory_mib=8, **options) as m:
        assert m.run(TIMEOUT_S) == PASSED
        at = program.symbols["module_line"]
        assert m.memory.read(at, 128).split(b"\0")[0] == line.format(path=path).encode()


def test_debian_s_example_kernel(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The example of Debian's package multiboot: it prints on the VGA screen, and stops in a loop of its own."""
    import boot_assets

    example: Path = boot_assets.multiboot_kernel()
    with pyvmm.Machine(kernel=example, append="said by the test", memory_mib=16) as m:
        m.resume()
        text = b""
        while b"said by the test" not in text or b"length" not in text:
            assert not m.wait(0.05), "the kernel stopped by itself"
            # 80 by 25 characters, each with its colours.
            text = m.memory.read(0xB_8000, 80 * 25 * 2)[::2]
        m.pause()
        assert b"flags" in text
