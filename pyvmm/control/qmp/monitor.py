"""human-monitor-command: the lines that people type at QEMU's monitor, as far as they look at a machine.

    info registers|mtree|irq|pic|lapic|exits|block|network|status
    x /4xw ADDRESS     xp /4xw ADDRESS     p EXPRESSION     i /b PORT     o /b PORT VALUE
"""

from __future__ import annotations

import ast

from pyvmm.control.qmp.block import drives_of
from pyvmm.control.qmp.kinds import SIZE, STR, Optional, QmpError, shown
from pyvmm.control.qmp.memory import pieces, virtual
from pyvmm.control.qmp.parked import while_parked
from pyvmm.control.qmp.table import command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.control.qmp.subject import Machine, Served

    Info = Callable[[Machine, int], str]

MOST_UNITS = 1 << 14  # of one x
UNITS = {"b": 1, "h": 2, "w": 4, "g": 8}
PORT_UNITS = {"b": 1, "h": 2, "w": 4}
FORMATS = "xduoc"
MASK = (1 << 64) - 1
PORTS = 1 << 16
PIC_MASTER, PIC_SLAVE, IOAPIC = 0, 1, 2


@command("human-monitor-command", {"command-line": STR, "cpu-index": Optional(SIZE)}, STR, waits=True)
def human_monitor_command(served: Served, command_line: str, cpu_index: int = 0) -> str:
    """What is wrong with a line is told as the answer, as QEMU does."""
    machine = served.machine
    if cpu_index and cpu_index >= len(machine.cpus):
        raise QmpError("Parameter 'cpu-index' expects a CPU number")
    words = command_line.split(None, 1)
    if not words:
        return ""
    name, slash, form = words[0].partition("/")  # x/4xw as well as x /4xw
    rest = (f"/{form} " if slash else "") + (words[1] if len(words) > 1 else "")
    work = LINES.get(name)
    if work is None:
        return f"unknown command: '{shown(name)}'\r\n"
    try:
        return work(machine, cpu_index, rest.strip())
    except Wrong as wrong:
        return f"{wrong}\r\n"
    except QmpError as error:
        return f"{error.desc}\r\n"


class Wrong(Exception):
    """What the line asks for can't be; the text says why."""


# -- numbers ----------------------------------------------------------------------------------------------------------


def number(machine: Machine, cpu_index: int, text: str) -> int:
    """An expression of numbers and registers ($rip), 64 bits wide."""
    import re

    if len(text) > 200:
        raise Wrong("expression is too long")
    names = set(re.findall(r"\$(\w+)", text))
    values = registers(machine, cpu_index, names) if names else {}
    plain = re.sub(r"\$(\w+)", lambda found: str(values[found[1]]), text)
    plain = re.sub(r"\b0+(?=[1-7])", "0o", plain)  # as C has octal numbers
    try:
        return evaluated(ast.parse(plain.strip(), mode="eval").body) & MASK
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        raise Wrong(f"invalid expression: '{shown(text)}'") from None


def evaluated(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return UNARY[type(node.op)](evaluated(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        return BINARY[type(node.op)](evaluated(node.left) & MASK, evaluated(node.right) & MASK) & MASK
    raise ValueError


UNARY: dict[type, Callable[[int], int]] = {
    ast.USub: lambda a: -a, ast.UAdd: lambda a: a, ast.Invert: lambda a: ~a,
}  # fmt: skip
BINARY: dict[type, Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a // b, ast.FloorDiv: lambda a, b: a // b, ast.Mod: lambda a, b: a % b,
    ast.BitAnd: lambda a, b: a & b, ast.BitOr: lambda a, b: a | b, ast.BitXor: lambda a, b: a ^ b,
}  # fmt: skip


def registers(machine: Machine, cpu_index: int, names: set[str]) -> dict[str, int]:
    """General registers, segments' selectors and control registers."""
    if not machine.cpus:
        raise Wrong("No CPU available")
    vcpu = machine.cpus[cpu_index].vcpu

    def look() -> dict[str, int]:
        sregs = vcpu.sregs
        control = {name: value for name, value in sregs.items() if isinstance(value, int)}
        segments = {name: part["selector"] for name, part in sregs.items() if isinstance(part, dict) and "dpl" in part}
        return {**vcpu.regs, **control, **segments}

    known = while_parked(machine, "registers", look)
    known |= {"pc": known["rip"], "sp": known["rsp"], "fp": known["rbp"], "eflags": known["rflags"]}
    for name in names:
        if name not in known:
            raise Wrong(f"unknown register '{shown(name)}'")
    return known


def split_format(text: str, unit: str) -> tuple[int, str, str, str]:
    """'/4xw REST': how many, in which form, of which unit, and REST."""
    count, form = 1, "x"
    if text.startswith("/"):
        words = text[1:].split(None, 1)
        letters, text = (words[0] if words else ""), (words[1] if len(words) > 1 else "")
        digits = letters[: len(letters) - len(letters.lstrip("0123456789"))]
        count = int(digits[:6]) if digits else 1
        for letter in letters[len(digits) :]:
            if letter in UNITS:
                unit = letter
            elif letter in FORMATS:
                form = letter
                unit = "b" if letter == "c" else unit
            else:
                raise Wrong(f"invalid char in format: '{letter}'")
    return count, form, unit, text


def worded(value: int, form: str, size: int) -> str:
    if form == "x":
        return f"0x{value:0{2 * size}x}"
    if form == "d":
        return str(value - (1 << 8 * size) if value >> (8 * size - 1) else value)
    if form == "o":
        return f"0{value:o}"
    if form == "c":
        return repr(chr(value & 0xFF))
    return str(value)


# -- memory, ports ----------------------------------------------------------------------------------------------------


def examine(machine: Machine, cpu_index: int, text: str) -> str:
    if not machine.cpus:
        raise Wrong("No CPU available")
    return examined(text, machine, cpu_index, lambda at, size: virtual(machine, cpu_index, at, size))


def examine_physical(machine: Machine, cpu_index: int, text: str) -> str:
    return examined(text, machine, cpu_index, lambda at, size: b"".join(pieces(machine, at, size)))


def examined(text: str, machine: Machine, cpu_index: int, read: Callable[[int, int], bytes]) -> str:
    """16 bytes a line, or 8 where each is shown by itself, as QEMU has it."""
    count, form, unit, where = split_format(text, "w")
    if count > MOST_UNITS:
        raise Wrong(f"{count} units: at most {MOST_UNITS} at once")
    size, at = UNITS[unit], number(machine, cpu_index, where)
    lines = []
    per_line = 8 if size == 1 else 16 // size
    for first in range(0, count, per_line):
        units = min(per_line, count - first)
        address = at + first * size & MASK
        data = read(address, units * size)
        values = [int.from_bytes(data[n * size : (n + 1) * size], "little") for n in range(units)]
        lines.append(f"{address:016x}: {' '.join(worded(value, form, size) for value in values)}\r\n")
    return "".join(lines)


def print_expression(machine: Machine, cpu_index: int, text: str) -> str:
    _, form, _, expression = split_format(text, "g")
    value = number(machine, cpu_index, expression)
    return (f"{value:#x}" if form == "x" else worded(value, form, 8)) + "\r\n"


def port_and_size(machine: Machine, cpu_index: int, text: str, words: int) -> tuple[int, int, list[str]]:
    _, _, unit, rest = split_format(text, "b")
    parts = rest.split()
    if unit not in PORT_UNITS or len(parts) != words:
        raise Wrong("give [/b|h|w] PORT" + " VALUE" * (words - 1))
    size, port = PORT_UNITS[unit], number(machine, cpu_index, parts[0])
    if port + size > PORTS:
        raise Wrong(f"{port:#x} is no port")
    return port, size, parts[1:]


def port_in(machine: Machine, cpu_index: int, text: str) -> str:
    port, size, _ = port_and_size(machine, cpu_index, text, 1)
    letter = {1: "b", 2: "w", 4: "l"}[size]
    return f"port{letter}[{port:#06x}] = 0x{machine.pio.read(port, size):0{2 * size}x}\r\n"


def port_out(machine: Machine, cpu_index: int, text: str) -> str:
    port, size, rest = port_and_size(machine, cpu_index, text, 2)
    machine.pio.write(port, size, number(machine, cpu_index, rest[0]) & (1 << 8 * size) - 1)
    return ""


# -- info -------------------------------------------------------------------------------------------------------------


def info(machine: Machine, cpu_index: int, text: str) -> str:
    words = text.split()
    if not words:
        return "".join(f"info {name}\r\n" for name in INFOS)
    work = INFOS.get(words[0])
    if work is None:
        raise Wrong(f"unknown command: 'info {shown(words[0])}'")
    return work(machine, cpu_index).replace("\r\n", "\n").replace("\n", "\r\n")


def info_registers(machine: Machine, cpu_index: int) -> str:
    from pyvmm.dump import dump

    if not machine.cpus:
        raise Wrong("No CPU available")
    vcpu = machine.cpus[cpu_index].vcpu
    return while_parked(machine, "info", lambda: dump(vcpu, machine.memory, f"CPU#{cpu_index}")) + "\n"


def info_mtree(machine: Machine, cpu_index: int) -> str:
    lines = []
    for space, end in ((machine.mmio, 16), (machine.pio, 4)):
        lines.append(f"address-space: {space.name}\n")
        found = [(region.base, region.size, region.name) for region in space.regions if region.base is not None]
        if space is machine.mmio:
            shown_memory = machine.memory_map.sections
            found += [(s.gpa, s.size, f"{s.region.name}{' (read-only)' if s.readonly else ''}") for s in shown_memory]
        for base, size, name in sorted(found):
            lines.append(f"  {base:0{end}x}-{base + size - 1:0{end}x}: {name}\n")
    return "".join(lines)


def info_irq(machine: Machine, cpu_index: int) -> str:
    """The levels of the machine's wires, by GSI: only what somebody has a line to is there."""
    wires = machine.irqchip.wires
    return "".join(f"GSI {gsi:2}: {'high' if level else 'low '}  {', '.join(users)}\n" for gsi, level, users in wires)


def info_pic(machine: Machine, cpu_index: int) -> str:
    """Of KVM's, struct kvm_pic_state and kvm_ioapic_state (linux/kvm.h); of ours, their state."""
    if not machine.irqchip.in_kernel:
        return "".join(
            f"{name}: {machine.devices[name].save()}\n" for name in ("pic", "ioapic") if name in machine.devices
        )
    lines = []
    for n in (PIC_MASTER, PIC_SLAVE):
        state = machine.vm.get_irqchip(n)[8:]  # behind chip_id and padding
        last_irr, irr, imr, isr, _, irq_base = state[:6]
        masks = f"irr={irr:02x} imr={imr:02x} isr={isr:02x}"
        lines.append(f"pic{n}: {masks} last_irr={last_irr:02x} irq_base={irq_base:02x}\n")
    ioapic = machine.vm.get_irqchip(IOAPIC)[8:]
    irr = int.from_bytes(ioapic[16:20], "little")
    lines.append(f"ioapic0: id={int.from_bytes(ioapic[12:16], 'little'):x} irr={irr:06x}\n")
    for pin in range(24):
        entry = int.from_bytes(ioapic[24 + 8 * pin : 32 + 8 * pin], "little")
        flags = "masked" if entry >> 16 & 1 else "level" if entry >> 15 & 1 else "edge"
        lines.append(f"  pin {pin:2}: 0x{entry:016x} vector {entry & 0xFF:#04x} dest {entry >> 56:#04x} {flags}\n")
    return "".join(lines)


def info_lapic(machine: Machine, cpu_index: int) -> str:
    """The registers of a local APIC, SDM vol. 3, table 11-1."""
    if not machine.cpus:
        raise Wrong("No CPU available")
    if not machine.irqchip.in_kernel:
        return f"{machine.devices['lapic'].save()}\n"
    vcpu = machine.cpus[cpu_index].vcpu
    page = while_parked(machine, "info", lambda: vcpu.lapic)

    def at(offset: int) -> int:
        return int.from_bytes(page[offset : offset + 4], "little")

    def vectors(offset: int) -> str:
        found = [32 * n + bit for n in range(8) for bit in range(32) if at(offset + 16 * n) >> bit & 1]
        return " ".join(map(str, found)) or "(none)"

    lines = [f"dumping local APIC state for CPU {cpu_index}\n"]
    names = {"LVT0": 0x350, "LVT1": 0x360, "LVTPC": 0x340, "LVTERR": 0x370, "LVTTHMR": 0x330, "LVTT": 0x320}
    lines += [f"{name:8} 0x{at(offset):08x}\n" for name, offset in names.items()]
    others = {"ID": 0x20, "VERSION": 0x30, "TPR": 0x80, "PPR": 0xA0, "LDR": 0xD0, "DFR": 0xE0, "SPIV": 0xF0}
    others |= {"ESR": 0x280, "ICR": 0x300, "ICR2": 0x310, "TIMER ICR": 0x380, "TIMER CCR": 0x390, "DCR": 0x3E0}
    lines += [f"{name:9} 0x{at(offset):08x}\n" for name, offset in others.items()]
    return "".join([*lines, f"ISR       {vectors(0x100)}\n", f"IRR       {vectors(0x200)}\n"])


def info_exits(machine: Machine, cpu_index: int) -> str:
    return machine.exit_stats_table() + "\n"


def info_block(machine: Machine, cpu_index: int) -> str:
    lines = []
    for about in drives_of(machine):
        medium = about.get("inserted")
        kind = (medium["drv"] + (", read-only" if medium["ro"] else "")) if medium else ""
        what = f"{medium['image']['filename']} ({kind})" if medium else "[not inserted]"
        lines.append(f"{about['device']}: {what}\n")
        if about["removable"]:
            locked, tray = ("" if about["locked"] else "not "), ("open" if about["tray_open"] else "closed")
            lines.append(f"    Removable device: {locked}locked, tray {tray}\n")
        if medium:
            lines.append(f"    Cache mode: {'writeback' if medium['cache']['writeback'] else 'writethrough'}\n")
            if "backing_file" in medium:
                lines.append(
                    f"    Backing file: {medium['backing_file']} (chain depth: {medium['backing_file_depth']})\n"
                )
    return "".join(lines)


def info_network(machine: Machine, cpu_index: int) -> str:
    lines = []
    for net in machine.config.nets:
        card = machine.devices[str(net.id)]
        stats = " ".join(f"{name}={value}" for name, value in card.stats.items())  # type: ignore[attr-defined]
        link = "up" if card.link_up else "down"  # type: ignore[attr-defined]  # a VirtioNet
        lines.append(f"{net.id}: {net.kind}, macaddr={net.mac}, link {link}\n    {stats}\n")
    return "".join(lines)


def info_status(machine: Machine, cpu_index: int) -> str:
    state = machine.state
    if state.value == "running":
        return "VM status: running\n"
    return f"VM status: paused ({state.value})\n" if state.value != "paused" else "VM status: paused\n"


def told_help(machine: Machine, cpu_index: int, text: str) -> str:
    return "".join(f"{line}\r\n" for line in str(__doc__).splitlines()[2:])


INFOS: dict[str, Info] = {
    "status": info_status,
    "registers": info_registers,
    "mtree": info_mtree,
    "irq": info_irq,
    "pic": info_pic,
    "lapic": info_lapic,
    "exits": info_exits,
    "block": info_block,
    "network": info_network,
}
LINES: dict[str, Callable[[Machine, int, str], str]] = {
    "info": info,
    "x": examine,
    "xp": examine_physical,
    "p": print_expression,
    "print": print_expression,
    "i": port_in,
    "o": port_out,
    "help": told_help,
}
