"""Registers for gdb: the description, values of KVM's, and what is written back."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from pyvmm.control.gdb.registers import GENERAL, KERNEL_GS_BASE, Registers
from pyvmm.errors import ConfigError

LONG = {"efer": 0x500, "l": 1, "cr0": 0x8000_0011}


class FakeVcpu:
    """Registers as KVM gives and takes them."""

    def __init__(self, efer: int = 0x500, l: int = 1, cr0: int = 0x8000_0011) -> None:  # noqa: E741
        self.all_regs = {name: 0x1111_0000_0000 * (n + 1) + n for n, name in enumerate((*GENERAL, "rip"))}
        self.all_regs["rflags"] = 0x246
        segments = ("cs", "ss", "ds", "es", "fs", "gs")
        self.all_sregs: dict[str, Any] = {
            name: {"selector": 8 * n, "base": 0x1000 * n, "l": 0} for n, name in enumerate(segments)
        }
        self.all_sregs["cs"]["l"] = l
        self.all_sregs |= {"gdt": {"base": 0x70, "limit": 1}, "idt": {"base": 0x80, "limit": 1}}
        self.all_sregs |= {"cr0": cr0, "cr2": 2, "cr3": 0x3000, "cr4": 0x20, "cr8": 8, "efer": efer}
        self.msrs = {KERNEL_GS_BASE: 0xFFFF_8880_0000_0000}
        area = bytearray(4096)
        struct.pack_into("<HHBBHQQI", area, 0, 0x37F, 0x3800, 0x80, 0, 0x7FF, 0x5_0000_1234, 0x6_0000_5678, 0x1F80)
        area[32:42] = (0x3FFF << 64 | 1 << 63).to_bytes(10, "little")
        for n in range(16):
            area[160 + 16 * n] = n + 1
        struct.pack_into("<Q", area, 512, 3)
        self.xsave = bytes(area)

    @property
    def regs(self) -> dict[str, int]:
        return dict(self.all_regs)

    @regs.setter
    def regs(self, new: dict[str, int]) -> None:
        self.all_regs |= new

    @property
    def sregs(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, dict) else value for name, value in self.all_sregs.items()}

    @sregs.setter
    def sregs(self, new: dict[str, Any]) -> None:
        for name, value in new.items():
            if isinstance(value, dict):
                self.all_sregs[name] |= value
            else:
                self.all_sregs[name] = value

    def get_msrs(self, indices: list[int]) -> dict[int, int]:
        return {index: self.msrs[index] for index in indices}

    def set_msrs(self, values: dict[int, int]) -> None:
        self.msrs |= values


def by_name(registers: Registers, vcpu: Any) -> dict[str, int]:
    return dict(zip((r.name for r in registers.table), registers.read(vcpu), strict=True))


def write(registers: Registers, vcpu: Any, **values: int) -> None:
    names = [r.name for r in registers.table]
    registers.write(vcpu, {names.index(name): value for name, value in values.items()})


@pytest.mark.parametrize("avx", [True, False])
def test_the_description(avx: bool) -> None:
    registers = Registers(avx)
    root = ElementTree.fromstring(registers.xml().replace('<!DOCTYPE target SYSTEM "gdb-target.dtd">', ""))
    assert root.findtext("architecture") == "i386:x86-64"
    features = {feature.get("name"): feature for feature in root.findall("feature")}
    assert ("org.gnu.gdb.i386.avx" in features) is avx
    assert {"org.gnu.gdb.i386.core", "org.gnu.gdb.i386.sse", "org.gnu.gdb.i386.segments"} <= set(features)
    described = [reg for feature in root.findall("feature") for reg in feature.findall("reg")]
    assert [reg.get("name") for reg in described] == [register.name for register in registers.table]
    assert sum(int(str(reg.get("bitsize"))) for reg in described) == 8 * registers.size_bytes
    # gdb wants these numbers of its core registers (gdb/features/i386/64bit-core.xml).
    names = [register.name for register in registers.table]
    assert (names.index("rip"), names.index("cs"), names.index("st0"), names.index("fop")) == (16, 18, 24, 39)
    assert (names.index("xmm0"), names.index("mxcsr")) == (40, 56)
    types = {t.get("id") for f in features.values() for kind in ("flags", "vector", "union") for t in f.findall(kind)}
    known = types | {"int", "int32", "int64", "uint128", "i387_ext", "data_ptr", "code_ptr"}
    assert {reg.get("type") for reg in described} <= known


def test_values() -> None:
    values = by_name(Registers(True), FakeVcpu())
    assert values["rbx"] == 0x2222_0000_0001
    assert values["r15"] == 0x1111_0000_0000 * 16 + 15
    assert (values["eflags"], values["gs"], values["gs_base"], values["fs_base"]) == (0x246, 40, 0x5000, 0x4000)
    assert (values["k_gs_base"], values["cr3"], values["gdt_base"]) == (0xFFFF_8880_0000_0000, 0x3000, 0x70)
    assert values["st0"] == 0x3FFF << 64 | 1 << 63
    # FXSAVE's tag of physical register 7, which is ST(0) at TOP 7: in use and valid; the others are empty.
    assert values["ftag"] == 0x3FFF
    assert (values["fctrl"], values["fop"], values["fiseg"], values["fioff"]) == (0x37F, 0x7FF, 5, 0x1234)
    assert (values["foseg"], values["fooff"], values["mxcsr"]) == (6, 0x5678, 0x1F80)
    assert (values["xmm15"], values["ymm15h"]) == (16, 0)


@pytest.mark.parametrize(("efer", "l"), [(0, 0), (0x500, 0)])
def test_outside_of_64_bit_code_registers_are_narrow(efer: int, l: int) -> None:  # noqa: E741
    vcpu, registers = FakeVcpu(efer, l), Registers(False)
    values = by_name(registers, vcpu)
    assert (values["rbx"], values["rip"], values["r8"], values["r15"]) == (1, 16, 0, 0)
    write(registers, vcpu, rbx=0x5_0000_0005, r9=9, rip=0x7C00)
    assert vcpu.all_regs["rbx"] == 0x2222_0000_0005
    assert vcpu.all_regs["r9"] == 0x1111_0000_0000 * 10 + 9
    assert vcpu.all_regs["rip"] == 0x1111_0000_0000 * 17 & ~0xFFFF_FFFF | 0x7C00


def test_writes_go_where_they_belong() -> None:
    vcpu, registers = FakeVcpu(), Registers(True)
    write(
        registers, vcpu, rax=1 << 63, eflags=2, fs_base=0xF5, cr3=0x4000, efer=0xD01, k_gs_base=7, gdt_base=0x99,
        xmm3=1 << 127, ymm3h=0x33, mxcsr=0x1FA0, st7=5, fctrl=0x27F, fstat=0x41, ftag=0xFFFC, fop=1, fioff=2, fooff=3,
        fiseg=4, foseg=5, cs=0,
    )  # fmt: skip
    values = by_name(registers, vcpu)
    assert (values["rax"], values["eflags"], values["fs_base"], values["cr3"]) == (1 << 63, 2, 0xF5, 0x4000)
    assert (values["efer"], values["k_gs_base"], values["gdt_base"]) == (0xD01, 7, 0x99)
    assert (values["xmm3"], values["ymm3h"], values["ymm4h"], values["mxcsr"]) == (1 << 127, 0x33, 0, 0x1FA0)
    assert (values["st7"], values["fctrl"], values["fstat"], values["fop"]) == (5, 0x27F, 0x41, 1)
    assert values["ftag"] & 3 != 3
    assert values["ftag"] >> 2 == 0x3FFF
    assert (values["fioff"], values["fooff"], values["fiseg"], values["foseg"]) == (2, 3, 4, 5)
    assert struct.unpack_from("<Q", vcpu.xsave, 512) == (7,)


def test_what_was_not_written_stays() -> None:
    vcpu, registers = FakeVcpu(), Registers(True)
    before = by_name(registers, vcpu)
    for name in ("fs", "fs_base", "fstat", "es", "es_base", "xmm0", "st0"):
        write(registers, vcpu, **{name: before[name]})
    assert by_name(registers, vcpu) == before


def test_selectors() -> None:
    real, registers = FakeVcpu(0, 0, cr0=0x10), Registers(False)
    write(registers, real, ds=0x1234)
    assert (real.all_sregs["ds"]["selector"], real.all_sregs["ds"]["base"]) == (0x1234, 0x12340)
    with pytest.raises(ConfigError, match="protected mode"):
        write(registers, FakeVcpu(), ds=0x1234)
