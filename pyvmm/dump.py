"""The post-mortem dump of a vCPU: why it stopped, its registers, and the code it was at."""

from __future__ import annotations

from pyvmm.errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from pyvmm.kvm.vcpu import Vcpu

    class Readable(Protocol):
        """GuestMemory, or what leaves a debugger's breakpoints out of it."""

        def read(self, gpa: int, size: int, /) -> bytes: ...

CODE_BEFORE_BYTES = 16
CODE_AFTER_BYTES = 32

_GENERAL = (
    ("rax", "rbx", "rcx", "rdx"),
    ("rsi", "rdi", "rsp", "rbp"),
    ("r8", "r9", "r10", "r11"),
    ("r12", "r13", "r14", "r15"),
)
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")


def reason_text(detail: dict[str, Any], vendor: str) -> str:
    """What ``CpuExec.detail`` says, in one line, with every number by its name."""
    from pyvmm.kvm import exits

    name = detail.get("exit", "no exit")
    text = f"KVM_EXIT_{name}" if name in exits.EXIT_REASONS.values() else str(name)
    if "suberror_name" in detail:
        text += f", suberror {detail['suberror']} ({detail['suberror_name']})"
        data = detail["data"]
        # For EMULATION the data is struct emulation_failure: flags, then size and bytes of the instruction.
        if detail["suberror_name"] == "EMULATION" and len(data) >= 3 and data[0] & 1:
            raw = data[1].to_bytes(8, "little") + data[2].to_bytes(8, "little")
            text += f", instruction {raw[1 : 1 + min(raw[0], 15)].hex(' ')}"
        elif data:
            text += ", data " + " ".join(f"{value:#x}" for value in data)
    for key in ("hardware_exit_reason", "hardware_entry_failure_reason"):
        if key in detail:
            text += f", {key} {detail[key]:#x} ({exits.hardware_exit_name(detail[key], vendor)})"
    for key in ("event", "exception", "error_code", "flags", "gpa", "size", "errno"):
        if key in detail:
            value = detail[key]
            text += f", {key} {value:#x}" if isinstance(value, int) and key != "errno" else f", {key} {value}"
    return text


def dump(vcpu: Vcpu, memory: Readable, title: str) -> str:
    """The whole dump, ``title`` first. What can't be read any more is said to be so; nothing raises."""
    lines = [title]
    try:
        regs, sregs = vcpu.regs, vcpu.sregs
    except (VmmError, OSError) as error:
        return f"{title}\n  registers can't be read: {error}"
    lines.append(f"  rip {regs['rip']:016x}  rflags {regs['rflags']:08x}  {_mode(sregs)}")
    for row in _GENERAL:
        lines.append("  " + "  ".join(f"{name:>3} {regs[name]:016x}" for name in row))
    for name in _SEGMENTS:
        s = sregs[name]
        lines.append(
            f"  {name:>3} {s['selector']:04x} base {s['base']:016x} limit {s['limit']:08x} type {s['type']:x} "
            f"s {s['s']} dpl {s['dpl']} p {s['present']} db {s['db']} l {s['l']} g {s['g']}"
        )
    for name in ("gdt", "idt"):
        lines.append(f"  {name} base {sregs[name]['base']:016x} limit {sregs[name]['limit']:04x}")
    lines.append("  " + "  ".join(f"{name} {sregs[name]:x}" for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")))
    lines += _code(vcpu, memory, sregs["cs"]["base"] if not sregs["cs"]["l"] else 0, regs["rip"], _bits(sregs))
    return "\n".join(lines)


def _bits(sregs: dict[str, Any]) -> int:
    if sregs["cs"]["l"] and sregs["efer"] & 0x400:
        return 64
    return 32 if sregs["cs"]["db"] else 16


def _mode(sregs: dict[str, Any]) -> str:
    if sregs["efer"] & 0x400:
        return "long mode" if sregs["cs"]["l"] else "compatibility mode"
    if not sregs["cr0"] & 1:
        return "real mode"
    return "protected mode" + (", paging" if sregs["cr0"] >> 31 else "")


def _code(vcpu: Vcpu, memory: Readable, cs_base: int, rip: int, bits: int) -> list[str]:
    """The bytes around RIP, and what they say where iced-x86 is installed."""
    linear = cs_base + rip
    before = _fetch(vcpu, memory, linear - CODE_BEFORE_BYTES, CODE_BEFORE_BYTES)
    after = _fetch(vcpu, memory, linear, CODE_AFTER_BYTES)
    if not after:
        return [f"  code at {linear:x}: not mapped, or no RAM"]
    lines = [f"  code at {linear:x}: {before.hex(' ')} <{after[:1].hex()}> {after[1:].hex(' ')}".replace(":  <", ": <")]
    try:
        from iced_x86 import Decoder, Formatter, FormatterSyntax
    except ImportError:
        return lines
    formatter = Formatter(FormatterSyntax.INTEL)
    for n, instruction in enumerate(Decoder(bits, after, ip=rip)):
        if n == 6 or instruction.is_invalid:
            break
        lines.append(f"    {instruction.ip:x}: {formatter.format(instruction)}")
    return lines


def _fetch(vcpu: Vcpu, memory: Readable, linear: int, size: int) -> bytes:
    """Bytes at a linear address, through the guest's page tables; short where they end."""
    data = b""
    while size:
        linear &= 0xFFFF_FFFF_FFFF_FFFF
        piece = min(size, 4096 - linear % 4096)
        try:
            gpa = vcpu.translate(linear)
            if gpa is None:
                break
            data += memory.read(gpa, piece)
        except (VmmError, OSError):
            break
        linear += piece
        size -= piece
    return data
