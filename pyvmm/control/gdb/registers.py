"""A vCPU's registers as gdb numbers and shows them: the target description, and values from KVM and to it.

The features are gdb's own (gdb/features/i386 and its documentation, "i386 Features"), with one of ours for the system
registers, which have QEMU's names. The architecture is always i386:x86-64, as from QEMU's qemu-system-x86_64: gdb takes
one description for a connection, and a guest goes through three modes in the meantime. Outside of 64-bit code the
general registers show their low 32 bits, and only those can be changed.
"""

from __future__ import annotations

import struct

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.kvm.vcpu import Vcpu

EFER_LMA = 1 << 10
CR0_PE = 1
KERNEL_GS_BASE = 0xC000_0102
LOW = 0xFFFF_FFFF

GENERAL = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
SELECTORS = ("cs", "ss", "ds", "es", "fs", "gs")
X87 = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
BASES = ("cs", "ss", "ds", "es")
TABLES = ("gdt", "idt")

# The XSAVE area in its standard form (Intel SDM vol. 1, 13.4).
FCW, FSW, FTW, FOP, FIP, FDP, MXCSR, ST, XMM, XSTATE_BV = 0, 2, 4, 6, 8, 16, 24, 32, 160, 512
YMM_HIGH = 576  # CPUID leaf 0xD, subleaf 2, EBX: the same on every processor
X87_STATE, SSE_STATE, AVX_STATE = 1, 2, 4

TYPES = """\
<vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/>
<vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/>
<vector id="v4i32" type="int32" count="4"/><vector id="v2i64" type="int64" count="2"/>
<union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/>
<field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/><field name="v4_int32" type="v4i32"/>
<field name="v2_int64" type="v2i64"/><field name="uint128" type="uint128"/></union>
"""


def flags_type(name: str, size: int, bits: dict[str, int]) -> str:
    fields = "".join(f'<field name="{bit}" start="{at}" end="{at}"/>' for bit, at in bits.items())
    return f'<flags id="{name}" size="{size}">{fields}</flags>\n'


EFLAGS = {"CF": 0, "PF": 2, "AF": 4, "ZF": 6, "SF": 7, "TF": 8, "IF": 9, "DF": 10, "OF": 11, "NT": 14, "RF": 16,
          "VM": 17, "AC": 18, "VIF": 19, "VIP": 20, "ID": 21}  # fmt: skip
MXCSR_BITS = {"IE": 0, "DE": 1, "ZE": 2, "OE": 3, "UE": 4, "PE": 5, "DAZ": 6, "IM": 7, "DM": 8, "ZM": 9, "OM": 10,
              "UM": 11, "PM": 12, "FZ": 15}  # fmt: skip
CR0_BITS = {"PE": 0, "MP": 1, "EM": 2, "TS": 3, "ET": 4, "NE": 5, "WP": 16, "AM": 18, "NW": 29, "CD": 30, "PG": 31}
CR4_BITS = {"VME": 0, "PVI": 1, "TSD": 2, "DE": 3, "PSE": 4, "PAE": 5, "MCE": 6, "PGE": 7, "PCE": 8, "OSFXSR": 9,
            "OSXMMEXCPT": 10, "UMIP": 11, "LA57": 12, "VMXE": 13, "SMXE": 14, "FSGSBASE": 16, "PCIDE": 17,
            "OSXSAVE": 18, "SMEP": 20, "SMAP": 21, "PKE": 22}  # fmt: skip
EFER_BITS = {"SCE": 0, "LME": 8, "LMA": 10, "NXE": 11, "SVME": 12, "FFXSR": 14}


class Register:
    """``size_bytes`` of it are in a packet, little-endian."""

    __slots__ = ("feature", "group", "kind", "name", "size_bytes")

    def __init__(self, name: str, size_bytes: int, kind: str, feature: str, group: str = "") -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.kind = kind
        self.feature = feature
        self.group = group

    def xml(self) -> str:
        group = f' group="{self.group}"' if self.group else ""
        return f'<reg name="{self.name}" bitsize="{self.size_bytes * 8}" type="{self.kind}"{group}/>\n'


CORE, SSE, AVX, SEGMENTS = (f"org.gnu.gdb.i386.{name}" for name in ("core", "sse", "avx", "segments"))
SYSTEM = "pyvmm.x86.system"


def all_registers(avx: bool) -> list[Register]:
    """In gdb's order, which is their numbers'."""
    pointers = {"rbp": "data_ptr", "rsp": "data_ptr"}
    table = [Register(name, 8, pointers.get(name, "int64"), CORE) for name in GENERAL]
    table.append(Register("rip", 8, "code_ptr", CORE))
    table.append(Register("eflags", 4, "i386_eflags", CORE))
    table += [Register(name, 4, "int32", CORE) for name in SELECTORS]
    table += [Register(f"st{n}", 10, "i387_ext", CORE) for n in range(8)]
    table += [Register(name, 4, "int", CORE, "float") for name in X87]
    table += [Register(f"xmm{n}", 16, "vec128", SSE) for n in range(16)]
    table.append(Register("mxcsr", 4, "i386_mxcsr", SSE, "vector"))
    table += [Register(name, 8, "int", SEGMENTS) for name in ("fs_base", "gs_base")]
    if avx:
        table += [Register(f"ymm{n}h", 16, "uint128", AVX) for n in range(16)]
    kinds = {"cr0": "x64_cr0", "cr4": "x64_cr4", "efer": "x64_efer"}
    table.append(Register("k_gs_base", 8, "int64", SYSTEM, "system"))
    table += [Register(name, 8, kinds.get(name, "int64"), SYSTEM, "system") for name in CONTROL]
    table += [Register(f"{name}_base", 8, "int64", SYSTEM, "system") for name in (*BASES, *TABLES)]
    return table


class Registers:
    """Of vCPUs whose XSAVE area has AVX, or not."""

    def __init__(self, avx: bool) -> None:
        self.table = all_registers(avx)
        self.size_bytes = sum(register.size_bytes for register in self.table)
        self._avx = avx

    def xml(self) -> str:
        """target.xml."""
        text = '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd">\n<target version="1.0">\n'
        text += "<architecture>i386:x86-64</architecture>\n"
        types = {
            CORE: flags_type("i386_eflags", 4, EFLAGS),
            SSE: TYPES + flags_type("i386_mxcsr", 4, MXCSR_BITS),
            SYSTEM: flags_type("x64_cr0", 8, CR0_BITS)
            + flags_type("x64_cr4", 8, CR4_BITS)
            + flags_type("x64_efer", 8, EFER_BITS),
        }
        for feature in dict.fromkeys(register.feature for register in self.table):
            text += f'<feature name="{feature}">\n' + types.get(feature, "")
            text += "".join(register.xml() for register in self.table if register.feature == feature)
            text += "</feature>\n"
        return text + "</target>\n"

    def read(self, vcpu: Vcpu) -> list[int]:
        """All of them, by number. The vCPU is parked."""
        values = self._values(vcpu)
        return [values[register.name] for register in self.table]

    def _values(self, vcpu: Vcpu) -> dict[str, int]:
        regs, sregs = vcpu.regs, vcpu.sregs
        mask = -1 if in_64_bit_code(sregs) else LOW
        values = {name: regs[name] & mask for name in GENERAL}
        if mask == LOW:
            values |= {f"r{n}": 0 for n in range(8, 16)}
        values["rip"] = regs["rip"] & mask
        values["eflags"] = regs["rflags"] & LOW
        values |= {name: sregs[name]["selector"] for name in SELECTORS}
        values |= {f"{name}_base": sregs[name]["base"] for name in (*BASES, "fs", "gs", *TABLES)}
        values |= {name: sregs[name] for name in CONTROL}
        values["k_gs_base"] = vcpu.get_msrs([KERNEL_GS_BASE]).get(KERNEL_GS_BASE, 0)
        return values | x87_and_vectors(vcpu.xsave)

    def write(self, vcpu: Vcpu, changed: dict[int, int]) -> None:
        """Give registers, by number, other values. ConfigError for what can't be, KvmError where KVM refuses it; those
        before that one in the order of KVM's ioctls have changed then.
        """
        names = {self.table[number].name: value for number, value in changed.items()}
        regs, sregs = vcpu.regs, vcpu.sregs
        wide = in_64_bit_code(sregs)
        new_sregs = changed_sregs(names, sregs)
        if new_sregs:
            vcpu.sregs = new_sregs
        new_regs: dict[str, int] = {}
        for name, value in names.items():
            if name in GENERAL or name == "rip":
                if wide:
                    new_regs[name] = value
                elif name not in GENERAL[8:]:
                    new_regs[name] = regs[name] & ~LOW | value & LOW
            elif name == "eflags":
                new_regs["rflags"] = value
        if new_regs:
            vcpu.regs = new_regs
        if "k_gs_base" in names:
            vcpu.set_msrs({KERNEL_GS_BASE: names["k_gs_base"]})
        rest = {name: value for name, value in names.items() if name.startswith(("st", "xmm", "ymm", "f", "mxcsr"))}
        rest = {name: value for name, value in rest.items() if name not in ("fs", "fs_base")}
        if rest:
            vcpu.xsave = changed_xsave(vcpu.xsave, rest)


def in_64_bit_code(sregs: dict[str, Any]) -> bool:
    return bool(sregs["efer"] & EFER_LMA and sregs["cs"]["l"])


def changed_sregs(names: dict[str, int], sregs: dict[str, Any]) -> dict[str, Any]:
    """Control registers, bases, and selectors in real mode. In protected mode a selector stands for a descriptor that
    is not looked up here.
    """
    new: dict[str, Any] = {name: names[name] for name in CONTROL if name in names}
    for name in (*BASES, "fs", "gs", *TABLES):
        if f"{name}_base" in names:
            new[name] = {"base": names[f"{name}_base"]}
    for name in SELECTORS:
        if names.get(name, sregs[name]["selector"]) == sregs[name]["selector"]:
            continue
        if sregs["cr0"] & CR0_PE:
            raise ConfigError(f"{name} in protected mode: a selector is loaded by the guest's own instructions only")
        # Real mode: the base is 16 times the selector (SDM vol. 3, 20.1.1).
        selector = names[name] & 0xFFFF
        new[name] = {"selector": selector, "base": selector << 4}
    return new


# -- x87, SSE and AVX: the XSAVE area ----------------------------------------------------------------------------------


def x87_and_vectors(area: bytes) -> dict[str, int]:
    (there,) = struct.unpack_from("<Q", area, XSTATE_BV)
    fcw, fsw, tags, _, fop, fip, fdp, mxcsr = struct.unpack_from("<HHBBHQQI", area, FCW)
    st = [number(area, ST + 16 * n, 10) for n in range(8)]
    values = {f"st{n}": value for n, value in enumerate(st)}
    values |= {"fctrl": fcw, "fstat": fsw, "ftag": full_tags(tags, fsw, st), "fop": fop & 0x7FF}
    values |= {"fiseg": fip >> 32 & 0xFFFF, "fioff": fip & LOW, "foseg": fdp >> 32 & 0xFFFF, "fooff": fdp & LOW}
    values |= {f"xmm{n}": number(area, XMM + 16 * n, 16) for n in range(16)}
    values["mxcsr"] = mxcsr
    high = there & AVX_STATE
    values |= {f"ymm{n}h": number(area, YMM_HIGH + 16 * n, 16) if high else 0 for n in range(16)}
    return values


def number(area: bytes, at: int, size: int) -> int:
    return int.from_bytes(area[at : at + size], "little")


def full_tags(tags: int, fsw: int, st: list[int]) -> int:
    """FXSAVE keeps one bit a register, in use or empty; the tag word says what of it is zero (1) or special (2) too
    (SDM vol. 1, 8.1.7 and 10.5.1.1). Tags are by physical register, ST(n) counts from the top of the stack.
    """
    top = fsw >> 11 & 7
    word = 0
    for physical in range(8):
        value = st[(physical - top) & 7]
        exponent, mantissa = value >> 64 & 0x7FFF, value & (1 << 64) - 1
        if not tags >> physical & 1:
            tag = 3
        elif not exponent and not mantissa:
            tag = 1
        else:
            tag = 2 if exponent in (0, 0x7FFF) or not mantissa >> 63 else 0
        word |= tag << 2 * physical
    return word


def changed_xsave(area: bytes, names: dict[str, int]) -> bytes:
    new = bytearray(area)
    (there,) = struct.unpack_from("<Q", new, XSTATE_BV)
    if not there & AVX_STATE and any(name.startswith("ymm") for name in names):
        new[YMM_HIGH : YMM_HIGH + 256] = bytes(256)
    for name, value in names.items():
        if name.startswith("st"):
            put(new, ST + 16 * int(name[2:]), 10, value)
        elif name.startswith("xmm"):
            put(new, XMM + 16 * int(name[3:]), 16, value)
        elif name.startswith("ymm"):
            put(new, YMM_HIGH + 16 * int(name[3:-1]), 16, value)
        elif name == "ftag":
            new[FTW] = sum((value >> 2 * n & 3 != 3) << n for n in range(8))
        else:
            at, size = PARTS[name]
            put(new, at, size, value & (1 << 8 * size) - 1)
        there |= state_of(name)
    struct.pack_into("<Q", new, XSTATE_BV, there)
    return bytes(new)


# Offset and size of what is a number there.
PARTS = {
    "fctrl": (FCW, 2), "fstat": (FSW, 2), "fop": (FOP, 2), "fioff": (FIP, 4), "fiseg": (FIP + 4, 2),
    "fooff": (FDP, 4), "foseg": (FDP + 4, 2), "mxcsr": (MXCSR, 4),
}


def put(area: bytearray, at: int, size: int, value: int) -> None:
    area[at : at + size] = value.to_bytes(size, "little")


def state_of(name: str) -> int:
    """Which part of the state says whether it is there."""
    if name.startswith("ymm"):
        return AVX_STATE
    return SSE_STATE if name.startswith(("xmm", "mxcsr")) else X87_STATE
