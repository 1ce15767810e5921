"""What CPUID tells each virtual processor: KVM's set less what the user hides, and the machine's topology.

Entries are tuples (function, index, flags, eax, ebx, ecx, edx) as KVM_GET_SUPPORTED_CPUID gives and KVM_SET_CPUID2
takes. Intel SDM vol. 2A, CPUID and vol. 3, 9.9 (topology); AMD APM vol. 3, appendix E; Linux virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.x86 import cpu_features
from pyvmm.x86.cpu_features import EAX, EBX, ECX, EDX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Entry = tuple[int, int, int, int, int, int, int]
    Leaves = dict[tuple[int, int], list[int]]  # (function, index): [eax, ebx, ecx, edx]

SIGNIFICANT_INDEX = 1 << 0  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the entry is for one value of ECX

KVM_SIGNATURE = 0x4000_0000
KVM_FEATURES = 0x4000_0001
KVM_TIMING = 0x4000_0010  # TSC and APIC timer frequency in kHz, a convention begun by VMware
KVM_SIGNATURE_WORDS = tuple(int.from_bytes(b"KVMKVMKVM\0\0\0"[n : n + 4], "little") for n in (0, 4, 8))
APIC_TIMER_KHZ = 1_000_000  # KVM's and ours count nanoseconds

MAX_BASIC = 0x0
FEATURES = 0x1
CACHES = 0x4
TOPOLOGY = (0xB, 0x1F)
XSAVE = 0xD
MAX_EXTENDED = 0x8000_0000
EXTENDED_FEATURES = 0x8000_0001
BRAND_STRING = (0x8000_0002, 0x8000_0003, 0x8000_0004)  # 48 characters, 16 a leaf
ADDRESS_SIZES = 0x8000_0008
SVM = 0x8000_000A
AMD_CACHES = 0x8000_001D
AMD_TOPOLOGY = 0x8000_001E
AMD_EXTENDED_TOPOLOGY = 0x8000_0026

# What a local APIC in user space offers; everything else about APICs is KVM's own.
PLAIN_APIC = {"apic", "arat"}

HTT = 1 << 28  # leaf 1 EDX: the count of logical processors in EBX is valid
CMP_LEGACY = 1 << 1  # leaf 0x80000001 ECX: those are cores, not threads
TOPOEXT = 1 << 22
LEVEL_SMT = 1
LEVEL_CORE = 2
XSAVE_LEGACY_BYTES = 576  # the legacy region and the header
XCR0_X87_SSE = 0b11
IN_XSS = 1 << 0  # leaf 0xd, sub-leaf n, ECX: the component is enabled in IA32_XSS, not in XCR0


def identity(entries: Iterable[Entry]) -> tuple[int, int, str]:
    """(signature, features, vendor): leaf 1's EAX and EDX, and leaf 0's string; zeros and nothing where they miss."""
    signature, features, vendor = 0, 0, ""
    for function, _index, _flags, eax, ebx, ecx, edx in entries:
        if function == MAX_BASIC:
            vendor = b"".join(r.to_bytes(4, "little") for r in (ebx, edx, ecx)).decode("ascii", "replace")
        elif function == FEATURES:
            signature, features = eax, edx
    return signature, features, vendor


def build(
    supported: Iterable[Entry],
    *,
    spec: str = "host",
    apic_id: int,
    cpus: int,
    irqchip: bool = True,
    tsc_deadline: bool = False,
    tsc_khz: int | None = None,
    brand: Sequence[tuple[int, int, int, int]] = (),
) -> list[Entry]:
    """The entries for the processor with that APIC id of ``cpus``, all cores of one package.

    ``spec`` is ``host`` and features to hide or to insist on: ``host,-xsave,-cx16,+x2apic``; ``kvm=off`` hides KVM's
    own leaves. Hiding a feature hides what can't be without it. ``irqchip`` False: the local APIC is in user space, and
    what only KVM's has is hidden. ``tsc_deadline`` says that KVM_CAP_TSC_DEADLINE_TIMER is there: KVM leaves that bit
    to us. ``tsc_khz`` is told in leaf 0x40000010. ``brand`` is the registers of the host's own BRAND_STRING leaves, for
    a KVM whose set has none. ConfigError for a feature nobody knows, or one insisted on that this KVM has not.
    """
    leaves: Leaves = {}
    flags: dict[tuple[int, int], int] = {}
    for function, index, flag, *registers in supported:
        leaves[function, index] = registers
        flags[function, index] = flag
    hidden, wanted, kvm = parse(spec)

    _brand_string(leaves, brand)
    _topology(leaves, flags, apic_id, cpus)
    _hypervisor(leaves, kvm, tsc_khz)
    _set(leaves, "hypervisor")
    if tsc_deadline:
        _set(leaves, "tsc-deadline")
    if not irqchip:
        hidden |= cpu_features.with_dependents("apic") - PLAIN_APIC
    # KVM sets these as the guest sets CR4.
    hidden |= {"osxsave", "ospke"}
    for name in hidden:
        for function, index, register, bit in cpu_features.bits(name):
            if (function, index) in leaves:
                leaves[function, index][register] &= ~(1 << bit)
    _insist(leaves, wanted)
    _xsave(leaves)
    if not _has(leaves, "svm") and (SVM, 0) in leaves:
        leaves[SVM, 0] = [0, 0, 0, 0]
    return [
        (function, index, flags.get((function, index), 0), *registers)  # type: ignore[misc]  # four of them
        for (function, index), registers in leaves.items()
    ]


def parse(spec: str) -> tuple[set[str], list[str], bool]:
    """``host,-a,+b,c=off,d`` -> (what to hide with its dependents, what must be there, whether KVM shows itself).
    """
    model, *words = [word.strip() for word in spec.split(",")]
    if model not in ("host", "max"):
        raise ConfigError(
            f"there is no CPU model {model!r}: start with host and hide features, like host,-xsave"
        )
    hidden: set[str] = set()
    wanted = []
    kvm = True
    for word in words:
        name, on = _switch(word)
        if name == "kvm":
            kvm = on
        elif not cpu_features.bits(name):
            near = cpu_features.near_match(name)
            raise ConfigError(
                f"there is no CPU feature {name!r}: "
                + (f"did you mean {near}?" if near else "leave it out; `pyvmm run --cpu help` lists those there are")
            )
        elif on:
            wanted.append(name)
        else:
            hidden |= cpu_features.with_dependents(name)
    return hidden, wanted, kvm


def _switch(word: str) -> tuple[str, bool]:
    if word[:1] in ("+", "-"):
        return word[1:], word[0] == "+"
    name, _, value = word.partition("=")
    if value not in ("", "on", "off"):
        raise ConfigError(f"CPU feature {word!r}: a feature is on or off, like {name}=off or -{name}")
    return name, value != "off"


def registers(entries: Sequence[Entry], function: int, index: int = 0) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX of a leaf; zeros where it is not there."""
    for entry in entries:
        if entry[:2] == (function, index):
            return entry[3:]
    return 0, 0, 0, 0


def id_bits(cpus: int) -> int:
    """How many bits of an APIC id tell that many processors apart."""
    return (cpus - 1).bit_length()


def _brand_string(leaves: Leaves, brand: Sequence[tuple[int, int, int, int]]) -> None:
    """A processor has a name: where KVM's set gives none, the host's (SDM vol. 2A, CPUID, "Processor Brand String")."""
    if any(any(leaves.get((function, 0), ())) for function in BRAND_STRING) or not any(map(any, brand)):
        return
    for function, words in zip(BRAND_STRING, brand, strict=True):
        leaves[function, 0] = list(words)
    most = leaves.setdefault((MAX_EXTENDED, 0), [0, 0, 0, 0])
    most[EAX] = max(most[EAX], BRAND_STRING[-1])


def _topology(leaves: Leaves, flags: dict[tuple[int, int], int], apic_id: int, cpus: int) -> None:
    """One package of ``cpus`` cores of one thread each, core n with APIC id n."""
    amd = leaves.get((MAX_BASIC, 0), [0] * 4)[EBX] in _AMD_VENDORS
    features = leaves.get((FEATURES, 0))
    if features:
        features[EBX] = features[EBX] & 0xFFFF | min(cpus, 0xFF) << 16 | (apic_id & 0xFF) << 24
        features[EDX] = features[EDX] & ~HTT | (HTT if cpus > 1 else 0)
    max_basic = leaves.get((MAX_BASIC, 0), [0] * 4)[EAX]
    for function in TOPOLOGY:
        if function <= max_basic:
            _extended_topology(leaves, flags, function, apic_id, cpus)
    for (function, _), leaf in leaves.items():
        if function == CACHES and leaf[EAX] & 0x1F:
            cores = (1 << id_bits(cpus)) - 1
            sharing = cores if _cache_level(leaf) > 2 else 0
            leaf[EAX] = leaf[EAX] & 0x3FFF | min(sharing, 0xFFF) << 14 | min(cores, 0x3F) << 26
        elif function == AMD_CACHES and leaf[EAX] & 0x1F:
            sharing = cpus - 1 if _cache_level(leaf) > 2 else 0
            leaf[EAX] = leaf[EAX] & ~(0xFFF << 14) | min(sharing, 0xFFF) << 14
        elif function == AMD_EXTENDED_TOPOLOGY:
            leaf[:] = [0, 0, 0, 0]  # the host's: without it guests read 0x8000001e
    if amd:
        _amd_topology(leaves, apic_id, cpus)


_AMD_VENDORS = (int.from_bytes(b"Auth", "little"), int.from_bytes(b"Hygo", "little"))


def _cache_level(leaf: list[int]) -> int:
    return leaf[EAX] >> 5 & 7


def _extended_topology(
    leaves: Leaves, flags: dict[tuple[int, int], int], function: int, apic_id: int, cpus: int
) -> None:
    """Leaves 0xb and 0x1f: a level of one thread a core, a level of ``cpus`` in the package, and the end."""
    for key in [key for key in leaves if key[0] == function]:
        del leaves[key]
    levels = ((0, 1, LEVEL_SMT), (id_bits(cpus), cpus, LEVEL_CORE), (0, 0, 0))
    for index, (shift, count, kind) in enumerate(levels):
        leaves[function, index] = [shift, count, kind << 8 | index, apic_id]
        flags[function, index] = SIGNIFICANT_INDEX


def _amd_topology(leaves: Leaves, apic_id: int, cpus: int) -> None:
    features = leaves.get((EXTENDED_FEATURES, 0))
    if features:
        features[ECX] = features[ECX] & ~CMP_LEGACY | (CMP_LEGACY if cpus > 1 else 0)
    sizes = leaves.get((ADDRESS_SIZES, 0))
    if sizes:
        sizes[ECX] = id_bits(cpus) << 12 | min(cpus - 1, 0xFF)
    topology = leaves.get((AMD_TOPOLOGY, 0))
    if topology and features and features[ECX] & TOPOEXT:
        topology[:] = [apic_id, apic_id & 0xFF, 0, 0]  # core id, one thread a core, node 0 of one


def _hypervisor(leaves: Leaves, kvm: bool, tsc_khz: int | None) -> None:
    """KVM's leaves: the signature, its paravirtual features, and the clock rates where they are known."""
    if not kvm:
        for key in [key for key in leaves if key[0] >> 8 == KVM_SIGNATURE >> 8]:
            del leaves[key]
        return
    leaves.setdefault((KVM_FEATURES, 0), [0, 0, 0, 0])
    leaves[KVM_SIGNATURE, 0] = [KVM_FEATURES, *KVM_SIGNATURE_WORDS]
    if tsc_khz:
        leaves[KVM_SIGNATURE, 0][EAX] = KVM_TIMING
        leaves[KVM_TIMING, 0] = [tsc_khz, APIC_TIMER_KHZ, 0, 0]


def _xsave(leaves: Leaves) -> None:
    """Leaf 0xd after masking: no component without its feature, nothing without XSAVE."""
    main = leaves.get((XSAVE, 0))
    if not main:
        return
    if not _has(leaves, "xsave"):
        for key in [key for key in leaves if key[0] == XSAVE]:
            del leaves[key]
        leaves[XSAVE, 0] = [0, 0, 0, 0]
        return
    absent = {n for n, name in cpu_features.XSAVE_COMPONENTS.items() if not _has(leaves, name)}
    if _has(leaves, "cet-ibt"):
        absent -= {11, 12}  # either half of CET uses them
    mask = ~sum(1 << n for n in absent)
    main[EAX] &= mask
    extended = leaves.get((XSAVE, 1))
    if extended:
        extended[ECX] &= mask if _has(leaves, "xsaves") else 0
    size = XSAVE_LEGACY_BYTES
    for n in [index for function, index in leaves if function == XSAVE and index > 1]:
        component = leaves[XSAVE, n]
        if n in absent or (component[ECX] & IN_XSS and not _has(leaves, "xsaves")):
            del leaves[XSAVE, n]
        elif not component[ECX] & IN_XSS:
            size = max(size, component[EAX] + component[EBX])
    main[ECX] = size
    main[EBX] = XSAVE_LEGACY_BYTES  # XCR0 is x87 alone after reset; KVM keeps this in step with it


def _has(leaves: Leaves, name: str) -> bool:
    """Whether every first-hand bit of a feature is set (AMD's repetition of leaf 1 is not asked)."""
    function, index, register, bit = cpu_features.bits(name)[0]
    return bool(leaves.get((function, index), [0] * 4)[register] >> bit & 1)


def _set(leaves: Leaves, name: str) -> None:
    function, index, register, bit = cpu_features.bits(name)[0]
    if (function, index) in leaves:
        leaves[function, index][register] |= 1 << bit


def _insist(leaves: Leaves, names: Sequence[str]) -> None:
    for name in names:
        if not _has(leaves, name):
            raise ConfigError(
                f"CPU feature {name} can't be had here (not in KVM's set, or hidden): leave +{name} out"
            )
