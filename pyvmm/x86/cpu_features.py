"""The names of CPUID feature bits, as QEMU and /proc/cpuinfo spell them, and which features stand on which.

Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst for KVM's own
leaf. Case, '-', '_' and '.' do not count: sse4.1, sse4_1 and SSE4-1 are one feature.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    # (function, index, register, bit); registers count eax, ebx, ecx, edx from 0.
    Bit = tuple[int, int, int, int]

EAX, EBX, ECX, EDX = range(4)

# For each register the names of its bits from 0 up, eight a line; a dot where a bit has no name or is no feature.
WORDS = (
    (
        (0x1, 0, EDX),
        """fpu vme de pse tsc msr pae mce
           cx8 apic . sep mtrr pge mca cmov
           pat pse36 pn clflush . ds acpi mmx
           fxsr sse sse2 ss ht tm ia64 pbe""",
    ),
    (
        (0x1, 0, ECX),
        """pni pclmulqdq dtes64 monitor ds-cpl vmx smx est
           tm2 ssse3 cid . fma cx16 xtpr pdcm
           . pcid dca sse4.1 sse4.2 x2apic movbe popcnt
           tsc-deadline aes xsave osxsave avx f16c rdrand hypervisor""",
    ),
    ((0x6, 0, EAX), ". . arat"),
    (
        (0x7, 0, EBX),
        """fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep
           bmi2 erms invpcid rtm . zero-fcs-fds mpx .
           avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt
           clwb intel-pt avx512pf avx512er avx512cd sha-ni avx512bw avx512vl""",
    ),
    (
        (0x7, 0, ECX),
        """. avx512vbmi umip pku ospke waitpkg avx512vbmi2 cet-ss
           gfni vaes vpclmulqdq avx512vnni avx512bitalg . avx512-vpopcntdq .
           la57 . . . . . rdpid .
           bus-lock-detect cldemote . movdiri movdir64b . sgxlc pks""",
    ),
    (
        (0x7, 0, EDX),
        """. . avx512-4vnniw avx512-4fmaps fsrm . . .
           avx512-vp2intersect . md-clear . . . serialize .
           tsx-ldtrk . . arch-lbr cet-ibt . amx-bf16 avx512-fp16
           amx-tile amx-int8 spec-ctrl stibp flush-l1d arch-capabilities core-capability ssbd""",
    ),
    (
        (0x7, 1, EAX),
        """sha512 sm3 sm4 . avx-vnni avx512-bf16 . cmpccxadd
           . . fzrm fsrs fsrc . . .
           . fred lkgs wrmsrns . amx-fp16 . avx-ifma
           . . lam""",
    ),
    (
        (0x7, 1, EDX),
        """. . . . avx-vnni-int8 avx-ne-convert . .
           amx-complex . avx-vnni-int16 . . . prefetchiti .
           . . . avx10 . apxf""",
    ),
    ((0x7, 2, EDX), "intel-psfd ipred-ctrl rrsba-ctrl ddpd-u bhi-ctrl mcdt-no"),
    ((0xD, 1, EAX), "xsaveopt xsavec xgetbv1 xsaves xfd"),
    ((0x14, 0, ECX), "topa"),
    (
        (0x4000_0001, 0, EAX),
        """kvmclock kvm-nopiodelay kvm-mmu kvmclock kvm-asyncpf kvm-steal-time kvm-pv-eoi kvm-pv-unhalt
           . kvm-pv-tlb-flush kvm-asyncpf-vmexit kvm-pv-ipi
           kvm-poll-control kvm-pv-sched-yield kvm-asyncpf-int kvm-msi-ext-dest-id
           . . . . . . . .
           kvmclock-stable-bit""",
    ),
    (
        (0x8000_0001, 0, EDX),
        """. . . . . . . . . . . syscall . . . . . . . . nx . mmxext .
           . fxsr-opt pdpe1gb rdtscp . lm 3dnowext 3dnow""",
    ),
    (
        (0x8000_0001, 0, ECX),
        """lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse
           3dnowprefetch osvw ibs xop skinit wdt . lwp
           fma4 tce . nodeid-msr . tbm topoext perfctr-core
           perfctr-nb . . . . mwaitx""",
    ),
    ((0x8000_0007, 0, EDX), ". . . . . . . . invtsc"),
    (
        (0x8000_0008, 0, EBX),
        """clzero . xsaveerptr . rdpru . . .
           . wbnoinvd . . ibpb . ibrs amd-stibp
           . stibp-always-on . . . . . .
           amd-ssbd virt-ssbd amd-no-ssb . amd-psfd btc-no ibpb-ret""",
    ),
    (
        (0x8000_000A, 0, EDX),
        """npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists
           . . pause-filter . pfthreshold avic . v-vmsave-vmload
           vgif . . . . . . .
           . vnmi . . svme-addr-chk""",
    ),
    (
        (0x8000_0021, 0, EAX),
        """no-nested-data-bp fs-gs-base-ns lfence-always-serializing . . . null-sel-clr-base .
           auto-ibrs . . . . . . .
           . . . . . . . .
           . . . sbpb ibpb-brtype srso-no srso-user-kernel-no""",
    ),
)

# AMD repeats these bits of leaf 1's EDX in leaf 0x80000001's.
AMD_ALIASES = 0x0183_F3FF

# Other spellings in use, Linux's and the manuals', in canonical form.
SYNONYMS = {
    "amdibpb": "ibpb",
    "clfsh": "clflush",
    "cmpxchg16b": "cx16",
    "constanttsc": "invtsc",
    "ffxsr": "fxsropt",
    "ibt": "cetibt",
    "invarianttsc": "invtsc",
    "kvmclock2": "kvmclock",
    "lzcnt": "abm",
    "nonstoptsc": "invtsc",
    "pclmul": "pclmulqdq",
    "sha": "shani",
    "shstk": "cetss",
    "sse3": "pni",
    "tscdeadlinetimer": "tscdeadline",
    "usershstk": "cetss",
    "xd": "nx",
}

# What can't be without the feature before the colon; hiding one hides these, and theirs in turn.
DEPENDENTS = {
    "apic": (
        "x2apic tsc-deadline extapic arat kvm-pv-eoi kvm-pv-ipi kvm-pv-unhalt kvm-asyncpf-int "
        "kvm-msi-ext-dest-id"
    ),
    "amx-tile": "amx-bf16 amx-int8 amx-fp16 amx-complex",
    "avx": "avx2 fma f16c xop fma4 vaes vpclmulqdq avx-ne-convert avx-vnni-int8 avx-vnni-int16",
    "avx2": "avx512f avx-vnni avx-ifma sha512 sm3 sm4",
    "avx512f": (
        "avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi avx512vbmi2 "
        "avx512vnni avx512bitalg avx512-vpopcntdq avx512-4vnniw avx512-4fmaps avx512-vp2intersect "
        "avx512-bf16 avx512-fp16 avx10"
    ),
    "ds": "ds-cpl dtes64",
    "fpu": "mmx fxsr",
    "fxsr": "sse fxsr-opt",
    "kvm-asyncpf": "kvm-asyncpf-vmexit kvm-asyncpf-int",
    "kvmclock": "kvmclock-stable-bit",
    "lm": "lahf-lm cx16 pcid la57 lam lkgs",
    "mmx": "3dnow 3dnowext mmxext",
    "pku": "ospke",
    "sse": "sse2 misalignsse",
    "sse2": "pni pclmulqdq aes sha-ni gfni",
    "pni": "ssse3 sse4a",
    "ssse3": "sse4.1",
    "sse4.1": "sse4.2",
    "svm": (
        "npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists pause-filter "
        "pfthreshold avic v-vmsave-vmload vgif vnmi svme-addr-chk"
    ),
    "lkgs": "fred",
    "tsc": "tsc-adjust tsc-deadline rdtscp invtsc",
    "xsave": "osxsave xsaveopt xsavec xgetbv1 xsaves xfd avx mpx pku amx-tile apxf xsaveerptr",
    "xsavec": "xsaves",
    "xsaves": "cet-ss cet-ibt arch-lbr",
}

# What the XSAVE state components 2, 3, ... are for (SDM vol. 1, 13.1): a component is there with its feature.
# Those of IA32_XSS are among them.
XSAVE_COMPONENTS = {
    2: "avx",
    3: "mpx",
    4: "mpx",
    5: "avx512f",
    6: "avx512f",
    7: "avx512f",
    8: "intel-pt",
    9: "pku",
    11: "cet-ss",
    12: "cet-ss",
    15: "arch-lbr",
    17: "amx-tile",
    18: "amx-tile",
    19: "apxf",
}

_DASHES = dict.fromkeys(map(ord, "-_"))
_SEPARATORS = dict.fromkeys(map(ord, "-_."))
_bits: dict[str, list[Bit]] = {}


def canonical(name: str) -> str:
    """The form in which names are compared."""
    bare = name.lower().translate(_SEPARATORS)
    return SYNONYMS.get(bare, bare)


def table() -> dict[str, list[Bit]]:
    """Every feature by its canonical name, with all the bits that say it. Made at the first call."""
    if not _bits:
        for (function, index, register), names in WORDS:
            # ``canonical`` of all of a register's at once: every start makes this table.
            for bit, name in enumerate(names.lower().translate(_DASHES).split()):
                if name != ".":
                    bare = name.replace(".", "")
                    _bits.setdefault(SYNONYMS.get(bare, bare), []).append((function, index, register, bit))
        for bits in _bits.values():
            function, index, register, bit = bits[0]
            if (function, register) == (1, EDX) and AMD_ALIASES >> bit & 1:
                bits.append((0x8000_0001, 0, EDX, bit))
    return _bits


def bits(name: str) -> list[Bit]:
    """Where a feature is; empty where there is none of that name."""
    return table().get(canonical(name), [])


def present(entries: Iterable[tuple[int, ...]]) -> list[str]:
    """The canonical names of the features that a CPUID table, of (function, index, flags, eax, ebx, ecx, edx), shows.
    """
    leaves = {(function, index): registers for function, index, _flags, *registers in entries}
    none = [0, 0, 0, 0]
    return sorted(
        name
        for name, places in table().items()
        if any(leaves.get((function, index), none)[register] >> bit & 1 for function, index, register, bit in places)
    )


def with_dependents(name: str) -> set[str]:
    """A feature's canonical name and those of all that can't be without it."""
    found: set[str] = set()
    waiting = [canonical(name)]
    dependents = {canonical(key): value for key, value in DEPENDENTS.items()}
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += [canonical(other) for other in dependents.get(one, "").split()]
    return found


def near_match(name: str) -> str:
    """The spelling of the feature most like ``name``, or an empty string."""
    from difflib import get_close_matches

    names = {canonical(word): word for _, words in WORDS for word in words.split() if word != "."}
    close = get_close_matches(canonical(name), names, 1, 0.5)
    return names[close[0]] if close else ""
