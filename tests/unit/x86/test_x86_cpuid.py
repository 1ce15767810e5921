"""What each processor is told: topology, masked features and all that hangs on them."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.x86 import cpu_features, cpuid

Entry = tuple[int, int, int, int, int, int, int]

ALL = 0xFFFF_FFFF
INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)  # EBX, ECX, EDX
AMD = (0x68747541, 0x444D4163, 0x69746E65)


def supported(vendor: tuple[int, int, int]) -> list[Entry]:
    """A processor with every feature bit set, as KVM_GET_SUPPORTED_CPUID would list it."""
    return [
        (0x0, 0, 0, 0x1F, *vendor),
        (0x1, 0, 0, 0x000A_0F11, 0x7F10_0800, ALL & ~(1 << 31 | 1 << 24), ALL),
        (0x4, 0, 1, 0x7C00_C121, 0x01C0_003F, 63, 0),
        (0x4, 2, 1, 0x7C00_C143, 0x03C0_003F, 1023, 0),
        (0x4, 3, 1, 0x7C0F_C163, 0x03C0_003F, 32767, 4),
        (0x4, 4, 1, 0, 0, 0, 0),
        (0x6, 0, 0, 4, 0, 0, 0),
        (0x7, 0, 1, 1, ALL, ALL, ALL),
        (0x7, 1, 1, ALL, 0, 0, ALL),
        (0xB, 0, 1, 1, 2, 0x100, 0x55),
        (0xB, 1, 1, 7, 64, 0x201, 0x55),
        (0xD, 0, 1, 0x602E7, 11008, 11008, 0),
        (0xD, 1, 1, 0x1F, 2440, 0x1800, 0),
        (0xD, 2, 1, 256, 576, 0, 0),
        (0xD, 5, 1, 64, 832, 0, 0),
        (0xD, 6, 1, 512, 896, 0, 0),
        (0xD, 7, 1, 1024, 1408, 0, 0),
        (0xD, 9, 1, 8, 2432, 0, 0),
        (0xD, 11, 1, 16, 0, 1, 0),
        (0xD, 12, 1, 24, 0, 1, 0),
        (0xD, 17, 1, 64, 2752, 2, 0),
        (0xD, 18, 1, 8192, 2816, 6, 0),
        (0x1F, 0, 1, 1, 2, 0x100, 0x55),
        (0x4000_0000, 0, 0, 0x4000_0001, 0x4B4D564B, 0x564B4D56, 0x4D),
        (0x4000_0001, 0, 0, 0x0100_FEFF, 0, 0, 0),
        (0x8000_0000, 0, 0, 0x8000_0021, *vendor),
        (0x8000_0001, 0, 0, 0x000A_0F11, 0, ALL, ALL),
        (0x8000_0008, 0, 0, 0x3030, ALL, 0x703F, 0),
        (0x8000_000A, 0, 0, 1, 8, 0, ALL),
        (0x8000_001D, 0, 1, 0x4121, 0x01C0_003F, 63, 0),
        (0x8000_001D, 3, 1, 0x3C163, 0x03C0_003F, 32767, 1),
        (0x8000_001E, 0, 0, 0, 0, 0, 0),
        (0x8000_0026, 0, 1, 1, 2, 0x100, 0x55),
    ]


def build(vendor: tuple[int, int, int] = INTEL, **how: object) -> dict[tuple[int, int], tuple[int, ...]]:
    options = {"apic_id": 0, "cpus": 1, **how}
    entries = cpuid.build(supported(vendor), **options)  # type: ignore[arg-type]
    assert all(len(entry) == 7 and all(0 <= word <= ALL for word in entry) for entry in entries)
    leaves = {entry[:2]: entry[3:] for entry in entries}
    assert len(leaves) == len(entries)
    return leaves


def has(leaves: dict[tuple[int, int], tuple[int, ...]], name: str) -> bool:
    bits = cpu_features.bits(name)
    assert bits
    states = {leaves.get(bit[:2], (0,) * 4)[bit[2]] >> bit[3] & 1 for bit in bits}
    assert len(states) == 1, f"{name} is said twice, differently"
    return states == {1}


def test_names_and_their_bits() -> None:
    assert cpu_features.bits("avx2") == [(7, 0, cpu_features.EBX, 5)]
    assert cpu_features.bits("cx16") == [(1, 0, cpu_features.ECX, 13)]
    assert cpu_features.bits("xsave") == [(1, 0, cpu_features.ECX, 26)]
    assert cpu_features.bits("hypervisor") == [(1, 0, cpu_features.ECX, 31)]
    assert cpu_features.bits("apic") == [(1, 0, 3, 9), (0x8000_0001, 0, 3, 9)]
    assert cpu_features.bits("pbe") == [(1, 0, 3, 31)]
    assert cpu_features.bits("ssbd") == [(7, 0, 3, 31)]
    assert cpu_features.bits("avx512vl") == [(7, 0, 1, 31)]
    assert cpu_features.bits("pks") == [(7, 0, 2, 31)]
    assert cpu_features.bits("lam") == [(7, 1, 0, 26)]
    assert cpu_features.bits("3dnow") == [(0x8000_0001, 0, 3, 31)]
    assert cpu_features.bits("invtsc") == [(0x8000_0007, 0, 3, 8)]
    assert cpu_features.bits("kvmclock-stable-bit") == [(0x4000_0001, 0, 0, 24)]
    assert cpu_features.bits("mwaitx") == [(0x8000_0001, 0, 2, 29)]
    assert cpu_features.bits("amd-psfd") == [(0x8000_0008, 0, 1, 28)]
    assert cpu_features.bits("svme-addr-chk") == [(0x8000_000A, 0, 3, 28)]
    assert cpu_features.bits("none-such") == []


@pytest.mark.parametrize(
    ("ours", "others"),
    [
        ("sse4.1", ["sse4_1", "SSE4-1", "sse41"]),
        ("pni", ["sse3"]),
        ("tsc-deadline", ["tsc_deadline_timer"]),
        ("sha-ni", ["sha_ni"]),
        ("avx512vnni", ["avx512_vnni"]),
        ("nx", ["xd"]),
        ("abm", ["lzcnt"]),
        ("invtsc", ["nonstop_tsc", "constant_tsc"]),
    ],
)
def test_other_spellings(ours: str, others: list[str]) -> None:
    assert all(cpu_features.bits(other) == cpu_features.bits(ours) != [] for other in others)


def test_the_tables_speak_of_features_that_are() -> None:
    for feature, dependents in cpu_features.DEPENDENTS.items():
        for name in (feature, *dependents.split()):
            assert cpu_features.bits(name), name
    assert all(cpu_features.bits(name) for name in cpu_features.XSAVE_COMPONENTS.values())
    assert all(cpu_features.bits(name) for name in cpu_features.SYNONYMS.values())
    for (_, _, register), names in cpu_features.WORDS:
        assert len(names.split()) <= 32
        assert register in range(4)


def test_host_is_all_there_is() -> None:
    leaves = build()
    for name in ("avx512f", "x2apic", "apic", "svm", "hypervisor", "sse4.1", "amx-tile"):
        assert has(leaves, name), name
    assert not has(leaves, "osxsave")
    assert not has(leaves, "ospke")


def test_tsc_deadline_is_the_callers_to_say() -> None:
    assert not has(build(), "tsc-deadline")
    assert has(build(tsc_deadline=True), "tsc-deadline")
    assert not has(build(tsc_deadline=True, irqchip=False), "tsc-deadline")
    assert not has(build(tsc_deadline=True, spec="host,-tsc-deadline"), "tsc-deadline")


def test_hiding_by_name() -> None:
    leaves = build(spec="host,-cx16, -sse4_1 ,movbe=off")
    assert not any(has(leaves, name) for name in ("cx16", "sse4.1", "movbe"))
    assert has(leaves, "ssse3")
    assert has(leaves, "popcnt")


def test_hiding_xsave_hides_what_is_saved_by_it() -> None:
    leaves = build(spec="host,-xsave,-cx16")
    for name in [
        "xsave",
        "avx",
        "avx2",
        "avx512f",
        "avx512vnni",
        "fma",
        "f16c",
        "pku",
        "xsaves",
        "amx-tile",
        "vaes",
    ]:
        assert not has(leaves, name), name
    assert leaves[0xD, 0] == (0, 0, 0, 0)
    assert [key for key in leaves if key[0] == 0xD] == [(0xD, 0)]
    assert has(leaves, "aes")


def test_state_components_go_with_their_features() -> None:
    leaves = build()
    assert leaves[0xD, 0][0] == 0x602E7
    assert leaves[0xD, 0][2] == 2816 + 8192
    leaves = build(spec="host,-amx-tile")
    assert leaves[0xD, 0][0] == 0x2E7
    assert leaves[0xD, 0][2] == 2432 + 8
    assert (0xD, 17) not in leaves
    leaves = build(spec="host,-avx512f,-pku,-amx-tile")
    assert leaves[0xD, 0][0] == 0x7
    assert leaves[0xD, 0][2] == 576 + 256
    assert [key[1] for key in leaves if key[0] == 0xD] == [0, 1, 2, 11, 12]
    leaves = build(spec="host,-avx,-pku,-amx-tile")
    assert leaves[0xD, 0][::2] == (0x3, 576)
    leaves = build(spec="host,-xsaves")
    assert leaves[0xD, 1][2] == 0
    assert (0xD, 11) not in leaves
    leaves = build(spec="host,-cet-ss")
    assert leaves[0xD, 1][2] == 0x1800
    leaves = build(spec="host,-cet-ss,-cet-ibt")
    assert leaves[0xD, 1][2] == 0


def test_hiding_svm_empties_its_leaf() -> None:
    leaves = build(AMD, spec="host,-svm")
    assert not has(leaves, "npt")
    assert leaves[0x8000_000A, 0] == (0, 0, 0, 0)


def test_amds_copies_of_leaf_1_go_too() -> None:
    leaves = build(AMD, spec="host,-mmx")
    assert not has(leaves, "mmx")
    assert not has(leaves, "3dnow")


def test_without_irqchip_there_is_a_plain_apic() -> None:
    leaves = build(irqchip=False)
    assert has(leaves, "apic")
    for name in [
        "x2apic",
        "extapic",
        "kvm-pv-eoi",
        "kvm-pv-ipi",
        "kvm-pv-unhalt",
        "kvm-asyncpf-int",
    ]:
        assert not has(leaves, name), name
    assert has(leaves, "kvmclock")


def test_insisting() -> None:
    assert has(build(spec="host,+avx2,aes,xsave=on"), "avx2")
    with pytest.raises(ConfigError, match=r"tsc-deadline can't be had here .* leave \+tsc-deadline out"):
        build(spec="host,+tsc-deadline")
    with pytest.raises(ConfigError, match="avx2 can't be had"):
        build(spec="host,-xsave,+avx2")


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("host,-avx512vnn", "no CPU feature 'avx512vnn': did you mean avx512vnni?"),
        ("host,+xsve", "no CPU feature 'xsve': did you mean xsave?"),
        ("host,-qqqqqqqq", "no CPU feature 'qqqqqqqq': leave it out; `pyvmm run --cpu help` lists"),
        ("host,", "no CPU feature ''"),
        ("qemu64,-avx", "no CPU model 'qemu64': start with host"),
        ("-avx", "no CPU model '-avx'"),
        ("host,avx=maybe", "on or off, like avx=off or -avx"),
    ],
)
def test_wrong_specs(spec: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint.replace("?", "[?]")):
        build(spec=spec)


@given(st.text("host,+-=avx2of ", max_size=20))
def test_no_spec_raises_anything_else(spec: str) -> None:
    try:
        build(spec=spec)
    except ConfigError:
        pass


@pytest.mark.parametrize(("cpus", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (255, 8), (300, 9)])
def test_extended_topology(cpus: int, bits: int) -> None:
    last = cpus - 1
    leaves = build(cpus=cpus, apic_id=last)
    for function in (0xB, 0x1F):
        assert leaves[function, 0] == (0, 1, 0x100, last)
        assert leaves[function, 1] == (bits, cpus, 0x201, last)
        assert leaves[function, 2] == (0, 0, 2, last)
        # As an operating system reads it: the package number is what is left of the id.
        assert last >> leaves[function, 1][0] == 0
    flags = {entry[:2]: entry[2] for entry in cpuid.build(supported(INTEL), apic_id=0, cpus=cpus)}
    assert flags[0xB, 2] == 1


def test_a_processor_without_topology_leaves_gets_none() -> None:
    old = [(0, 0, 0, 0xA, *INTEL), *(entry for entry in supported(INTEL) if entry[0] not in (0, 0xB, 0x1F))]
    entries = cpuid.build(old, apic_id=0, cpus=2)
    assert not {entry[0] for entry in entries} & {0xB, 0x1F}


def test_leaf_1_names_the_processor() -> None:
    leaves = build(cpus=4, apic_id=3)
    assert leaves[1, 0][1] == 0x0304_0800
    assert has(leaves, "ht")
    assert not has(build(), "ht")
    assert build(cpus=300, apic_id=299)[1, 0][1] == (299 & 0xFF) << 24 | 255 << 16 | 0x800


def test_intels_cache_leaves() -> None:
    leaves = build(cpus=6)
    sharing = {index: leaves[4, index][0] >> 14 & 0xFFF for index in (0, 2, 3)}
    assert sharing == {0: 0, 2: 0, 3: 7}
    assert {leaves[4, index][0] >> 26 for index in (0, 2, 3)} == {7}
    assert leaves[4, 4] == (0, 0, 0, 0)
    assert leaves[4, 3][0] & 0x3FFF == 0x0163


def test_amds_topology() -> None:
    leaves = build(AMD, cpus=6, apic_id=5)
    assert leaves[0x8000_0008, 0][2] == 3 << 12 | 5
    assert leaves[0x8000_001E, 0] == (5, 5, 0, 0)
    assert has(leaves, "cmp-legacy")
    assert leaves[0x8000_001D, 0][0] == 0x121
    assert leaves[0x8000_001D, 3][0] == 5 << 14 | 0x163
    assert leaves[0x8000_0026, 0] == (0, 0, 0, 0)
    assert not has(build(AMD), "cmp-legacy")


def test_kvms_leaves() -> None:
    leaves = build()
    assert leaves[0x4000_0000, 0] == (0x4000_0001, 0x4B4D564B, 0x564B4D56, 0x4D)
    assert (0x4000_0010, 0) not in leaves
    leaves = build(tsc_khz=2_995_200)
    assert leaves[0x4000_0000, 0][0] == 0x4000_0010
    assert leaves[0x4000_0010, 0] == (2_995_200, 1_000_000, 0, 0)
    assert not [key for key in build(spec="host,kvm=off") if key[0] >> 8 == 0x40_0000]
    assert not has(build(spec="host,-kvm-steal-time"), "kvm-steal-time")


def test_kvms_leaves_are_made_where_kvm_does_not_list_them() -> None:
    bare = [entry for entry in supported(INTEL) if entry[0] >> 8 != 0x40_0000]
    entries = cpuid.build(bare, apic_id=0, cpus=1)
    assert cpuid.registers(entries, 0x4000_0000)[1] == 0x4B4D564B
    assert cpuid.registers(entries, 0x4000_0001) == (0, 0, 0, 0)


def test_what_was_given_is_not_changed() -> None:
    entries = supported(INTEL)
    cpuid.build(entries, apic_id=1, cpus=2, spec="host,-xsave")
    assert entries == supported(INTEL)


def test_registers_of_a_leaf() -> None:
    entries = cpuid.build(supported(INTEL), apic_id=0, cpus=1)
    assert cpuid.registers(entries, 1)[0] == 0x000A_0F11
    assert cpuid.registers(entries, 0xD, 2) == (256, 576, 0, 0)
    assert cpuid.registers(entries, 0x1234) == (0, 0, 0, 0)


NAME = b"A Processor of This Host, 3.00 GHz".ljust(48, b"\0")
BRAND: list[Any] = list(struct.iter_unpack("<4I", NAME))


@pytest.mark.parametrize("leaves", [[], [(0x8000_0002 + n, 0, 0, 0, 0, 0, 0) for n in range(3)]])
@pytest.mark.parametrize("most", [None, 0x8000_0001, 0x8000_0021])
def test_a_processor_without_a_name_gets_the_host_s(leaves: list[Entry], most: int | None) -> None:
    """SDM vol. 2A, CPUID, leaves 0x80000002 to 4: KVM_GET_SUPPORTED_CPUID may leave them zero, or out."""
    base = [entry for entry in supported(INTEL) if entry[0] >> 16 != 0x8000]
    if most is not None:
        base.append((0x8000_0000, 0, 0, most, 0, 0, 0))
    table = cpuid.build([*base, *leaves], apic_id=0, cpus=1, brand=BRAND)
    assert [cpuid.registers(table, 0x8000_0002 + n) for n in range(3)] == BRAND
    assert cpuid.registers(table, 0x8000_0000)[0] == max(0x8000_0004, most or 0)
    assert len({entry[:2] for entry in table}) == len(table)


def test_a_name_that_kvm_gives_stays() -> None:
    named = [(0x8000_0002, 0, 0, 0x6E6D_6576, 0, 0, 0)]
    table = cpuid.build([*supported(AMD), *named], apic_id=0, cpus=1, brand=BRAND)
    assert cpuid.registers(table, 0x8000_0002) == (0x6E6D_6576, 0, 0, 0)
    assert cpuid.registers(table, 0x8000_0003) == (0, 0, 0, 0)


def test_where_the_host_has_no_name_nothing_is_added() -> None:
    table = cpuid.build(supported(AMD), apic_id=0, cpus=1, brand=[(0, 0, 0, 0)] * 3)
    assert table == cpuid.build(supported(AMD), apic_id=0, cpus=1)


@pytest.mark.parametrize("vendor", [INTEL, AMD])
def test_the_names_of_what_a_table_shows(vendor: tuple[int, int, int]) -> None:
    """What is hidden by its name is missing there by its name, with what can't be without it."""
    table = cpuid.build(supported(vendor), apic_id=0, cpus=1)
    shown = cpu_features.present(table)
    assert shown == sorted(set(shown))
    assert {"sse2", "cx16", "hypervisor", "xsave", "avx"} <= set(shown)
    less = cpu_features.present(cpuid.build(supported(vendor), spec="host,-xsave,-cx16", apic_id=0, cpus=1))
    assert set(shown) - set(less) >= {"xsave", "avx", "cx16"}
    assert set(less) < set(shown)
    assert cpu_features.present([]) == []
