"""``pyvmm doctor``: can this host run guests, how well, and what to do about what is missing.

The last word is a real guest: one that takes a timer interrupt in long mode, which is what a modern kernel needs first.
"""

from __future__ import annotations

import platform
import sys

from pyvmm.bundle import installed
from pyvmm.cli.options import Option, parse, usage
from pyvmm.errors import GuestError, KvmError, VmmError
from pyvmm.kvm.kind import kvm_kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.kvm.system import Kvm

OPTIONS = (
    Option("--all -a", "", "list every capability, not only what is missing", key="all"),
    Option("--help -h", "", "this"),
)
GUEST_LIMIT_S = 30.0
GOOD_STATUS = (0x2A << 1) | 1
TITLE = "usage: pyvmm doctor [OPTIONS]\n\nExit status: 0 guests can run here, 2 they can't."

# Without these pyvmm can't work; without those a part of it can't, and the text says which.
NEEDED = (
    "IRQCHIP",
    "USER_MEMORY",
    "SET_TSS_ADDR",
    "EXT_CPUID",
    "PIT2",
    "MP_STATE",
    "IRQ_ROUTING",
    "IMMEDIATE_EXIT",
)
WISHED = {
    "IRQFD": "devices can't raise interrupts without a call into KVM",
    "IOEVENTFD": "a doorbell costs an exit to user space",
    "COALESCED_PIO": "port writes can't be gathered in the kernel",
    "READONLY_MEM": "firmware ROMs are writable by the guest",
    "X86_USER_SPACE_MSR": "MSRs can't be handled by Python",
    "BINARY_STATS_FD": "the kernel's own statistics can't be read",
    "SREGS2": "PAE page-directory pointers can't be saved",
    "XSAVE2": "AMX state can't be saved",
    "TSC_DEADLINE_TIMER": "guests use a slower timer",
}


def doctor(args: list[str]) -> int:
    given = parse(OPTIONS, args, verb="doctor")
    if given.get("help"):
        print(usage(TITLE, OPTIONS), end="")
        return 0
    print(f"host       Linux {platform.release()}, {cpu_model()}")
    print(f"start      {way_in()}")
    print(f"modules    {bundled()}")
    block_engines()
    shares()
    try:
        from pyvmm.kvm.system import Kvm

        kvm = Kvm()
    except KvmError as error:
        print(f"/dev/kvm   NO: {error}")
        return 2
    with kvm:
        print("/dev/kvm   yes, and this user may open it")
        print(f"kind       {kvm_kind()}")
        if "software" in kvm_kind():
            print("           ordinary kernels need VMX or SVM: use another host, or turn on nested virtualization")
        enough = capabilities(kvm, bool(given.get("all")))
        limits(kvm)
        debugging(kvm)
        huge_pages()
    runs = try_guest()
    return 0 if enough and runs else 2


def way_in() -> str:
    """How this interpreter was started (pyvmm/launcher/pyvmm)."""
    if sys.flags.isolated and sys.flags.no_site:
        return f"by the command pyvmm: {sys.executable}, isolated and without site"
    return f"by {sys.executable} with site and environment: the command pyvmm saves some milliseconds of every start"


def bundled() -> str:
    """Where the package's modules come from (pyvmm/bundle.py)."""
    bundle = installed()
    if bundle is None or bundle.problem:
        return f"each from its own file: {'' if bundle is None else bundle.problem}"
    names = [name for name in bundle.entries if not bundle.fresh(name)]
    others = f", but {len(names)} that changed since from their files" if names else ""
    return f"from {bundle.path}{others}"


def cpu_model() -> str:
    return cpuinfo().get("model name", "unknown CPU")


def cpuinfo() -> dict[str, str]:
    with open("/proc/cpuinfo") as file:
        first = file.read().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def block_engines() -> None:
    """Whether drives can have aio=io_uring here. Asked in a child: a filter of system calls may kill whoever asks."""
    import signal
    import subprocess
    import sys

    ask = "from pyvmm.block.protocols.io_uring import refusal; print(refusal() or '')"
    child = subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True)
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        print(
            f"io_uring   no: whoever asks for it dies of {name}: the sandbox around this process kills for it: allow"
            " io_uring_setup, io_uring_enter and io_uring_register there, or use aio=threads"
        )
    elif child.returncode or child.stdout.strip():
        print(f"io_uring   no: {child.stdout.strip() or 'it could not be asked for, see above'}")
    else:
        print("io_uring   yes")


def shares() -> None:
    """Whether folders can be shared here (--share)."""
    from pyvmm.vhost_user.virtiofsd import WHAT_TO_INSTALL, find_program

    program = find_program()
    found = f"yes, by {program}" if program else f"no: there is no virtiofsd here: {WHAT_TO_INSTALL}"
    print(f"share      {found}")


def capabilities(kvm: Kvm, show_all: bool) -> bool:
    have = kvm.capabilities()
    missing = [name for name in NEEDED if not have[f"KVM_CAP_{name}"]]
    for name in missing:
        print(f"capability NO: KVM_CAP_{name}, and pyvmm needs it: use a newer kernel")
    for name, loss in WISHED.items():
        if not have[f"KVM_CAP_{name}"]:
            print(f"capability no KVM_CAP_{name}: {loss}; a newer kernel may have it")
    if show_all:
        for name, value in sorted(have.items()):
            print(f"           {name} {value}")
    if not missing:
        known = f"{sum(map(bool, have.values()))} of {len(have)} known"
        print(f"capability all {len(NEEDED)} that pyvmm needs are there ({known})")
    return not missing


def limits(kvm: Kvm) -> None:
    recommended, most = kvm.check_extension("KVM_CAP_NR_VCPUS"), kvm.check_extension("KVM_CAP_MAX_VCPUS")
    slots = kvm.check_extension("KVM_CAP_NR_MEMSLOTS")
    print(f"limits     {most} vCPUs a machine ({recommended} without sharing CPUs), {slots} memory slots")
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A machine holds /dev/kvm, the VM, its vCPUs, and the event loop's two once it is needed.
    print(f"           {files} open files: about {files // 6} machines in one process; `ulimit -n` raises it")


def debugging(kvm: Kvm) -> None:
    """What a debugger can do with guests here (--gdb, Cpu.breakpoints)."""
    from pyvmm.debug_probe import probe

    try:
        print(f"gdb        {probe(kvm).describe()}")
    except VmmError as error:
        print(f"gdb        no machine to ask: {error}")


def huge_pages() -> None:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            mode = file.read().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        mode = "not there"
    with open("/proc/meminfo") as file:
        reserved = next((line.split()[1] for line in file if line.startswith("HugePages_Free")), "0")
    advice = "" if mode in ("madvise", "always") else "; echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    print(f"huge pages transparent: {mode}{advice}; reserved: {reserved} free (/proc/sys/vm/nr_hugepages reserves)")


def try_guest() -> bool:
    """A machine that takes interrupts in long mode, for real (guests/interrupt.S)."""
    import time

    from pyvmm import Machine
    from pyvmm.guests import image
    from pyvmm.x86 import layout

    start = time.monotonic()
    try:
        with Machine(
            memory_mib=16, flat=image("interrupt"), flat_address=layout.KERNEL, flat_mode="long64"
        ) as machine:
            status = machine.run(timeout_s=GUEST_LIMIT_S)
    except (VmmError, TimeoutError) as error:
        print(f"guest      NO: a long-mode guest did not get its timer interrupts: {str(error).splitlines()[0]}")
        if isinstance(error, GuestError):
            print("           this KVM can't run it: use another host, or the nested lab (ci/lab)")
        return False
    if status != GOOD_STATUS:
        print(f"guest      NO: a long-mode guest waited for its timer interrupts in vain (status {status})")
        return False
    took_ms = (time.monotonic() - start) * 1e3
    print(f"guest      yes: one took timer interrupts in long mode and ended, {took_ms:.0f} ms in all")
    return True
