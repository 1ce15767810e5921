"""A vCPU descriptor: the owner of its kvm_run mapping, and all of the processor's state, get and set.

Linux Documentation/virt/kvm/api.rst; each method names its ioctl. State is plain data in the kernel's field names.
Only cpu_exec reads the union inside kvm_run. State of a vCPU that is inside KVM_RUN can't be had: the kernel would
make the caller wait for the exit; Cpu guards against it.
"""

from libc.errno cimport EINVAL, errno
from libc.stdint cimport int8_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close

from pyvmm.kvm cimport uapi
from pyvmm.kvm.ioctl cimport checked, ioctl

from pyvmm.errors import ConfigError, KindError, KvmError, StateError

GUESTDBG_ENABLE = uapi.KVM_GUESTDBG_ENABLE
GUESTDBG_SINGLESTEP = uapi.KVM_GUESTDBG_SINGLESTEP
GUESTDBG_USE_SW_BP = uapi.KVM_GUESTDBG_USE_SW_BP
GUESTDBG_USE_HW_BP = uapi.KVM_GUESTDBG_USE_HW_BP
GUESTDBG_BLOCKIRQ = uapi.KVM_GUESTDBG_BLOCKIRQ

# struct kvm_vcpu_events, in the kernel's order; the pad bytes between are reserved fields.
_EVENTS = "=4BI 4B 3Bx I I 4B B 26x B Q"
_EVENT_FIELDS = (
    "exception_injected", "exception_nr", "exception_has_error_code", "exception_pending", "exception_error_code",
    "interrupt_injected", "interrupt_nr", "interrupt_soft", "interrupt_shadow",
    "nmi_injected", "nmi_pending", "nmi_masked", "sipi_vector", "flags",
    "smi_smm", "smi_pending", "smi_smm_inside_nmi", "smi_latched_init", "triple_fault_pending",
    "exception_has_payload", "exception_payload",
)


def pack_events(events):
    """struct kvm_vcpu_events of all that ``Vcpu.events`` has. struct.error for a number that is too large."""
    import _struct

    return _struct.pack(_EVENTS, *(events[name] for name in _EVENT_FIELDS))


def pack_cpuid(entries):
    """What ``Vcpu.put_cpuid`` takes, of such a list as ``Vcpu.cpuid`` has: struct kvm_cpuid2."""
    cdef bytes packed = bytes(2 * sizeof(uint32_t) + len(entries) * sizeof(uapi.kvm_cpuid_entry2))
    cdef uapi.kvm_cpuid2 *table = <uapi.kvm_cpuid2 *><char *>packed
    cdef uapi.kvm_cpuid_entry2 *e = <uapi.kvm_cpuid_entry2 *>(<char *>packed + 2 * sizeof(uint32_t))
    table.nent = len(entries)
    for function, index, flags, eax, ebx, ecx, edx in entries:
        e.function, e.index, e.flags = function, index, flags
        e.eax, e.ebx, e.ecx, e.edx = eax, ebx, ecx, edx
        e += 1
    return packed


cdef dict changed(str what, dict now, value):
    """``now`` with what ``value`` has otherwise. ConfigError for names that do not exist and numbers that are none."""
    if not hasattr(value, "items"):
        raise KindError(f"{what} = {value!r}: give a dict of them, whole or in part")
    result = dict(now)
    for name, new in value.items():
        old = now.get(name)
        if old is None:
            raise ConfigError(f"{what}: there is no {name!r}" + near(name, now))
        if isinstance(old, dict):
            new = changed(f"{what}, {name}", old, new)
        elif isinstance(old, list):
            if not isinstance(new, (list, tuple)) or len(new) != len(old):
                raise KindError(f"{what}: {name} = {new!r}: give a list of {len(old)}")
            for part in new:
                check_number(what, name, part)
        else:
            check_number(what, name, new)
        result[name] = new
    return result


cdef str near(name, known):
    import difflib

    found = difflib.get_close_matches(name, known, 1) if isinstance(name, str) else []
    return f": did you mean {found[0]}?" if found else f": they are {', '.join(known)}"


cdef int check_number(what, name, value) except -1:
    if not isinstance(value, int):
        raise KindError(f"{what}: {name} = {value!r}: give a whole number")
    if not 0 <= value < 1 << 64:
        raise ConfigError(f"{what}: {name} = {value:#x}: give 0 to 2**64 - 1")
    return 0


cdef int too_wide(what, error) except -1:
    raise ConfigError(f"{what}: a value has more bits than its register: {error}") from None


cdef enum:
    # Of KVM_SET_DEVICE_ATTR on a vCPU; headers older than Linux 5.16 have no names for them.
    TSC_CTRL = 0        # KVM_VCPU_TSC_CTRL
    TSC_OFFSET = 0      # KVM_VCPU_TSC_OFFSET


cdef class Vcpu:
    """One vCPU. Made by Vm.create_vcpu().

    ``regs``, ``sregs``, ``debugregs`` and ``events`` give copies: a change in one is no write. Assign what is to
    change, ``vcpu.regs = {"rip": 0x1000}``; what is left out stays. ConfigError for a name that does not exist.
    """

    def __cinit__(self, int fd, int vcpu_id, size_t run_size):
        self.fd = fd
        self.id = vcpu_id
        self.run_size = run_size
        cdef void *p = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if p == MAP_FAILED:
            checked(-1, "mmap kvm_run")
        self.run = <uapi.kvm_run *>p

    def __dealloc__(self):
        if self.run != NULL:
            munmap(self.run, self.run_size)
        # Refused arguments end here too, with a descriptor number that nobody has set.
        if self.run_size and self.fd >= 0:
            close(self.fd)

    def close(self):
        """Close descriptor and mapping. No thread may be inside KVM_RUN."""
        if self.run != NULL:
            munmap(self.run, self.run_size)
            self.run = NULL
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    cdef int _open(self) except -1:
        if self.fd < 0:
            raise StateError("this vCPU is closed")
        return self.fd

    # -- registers -----------------------------------------------------------------------------------------------------

    @property
    def regs(self):
        """KVM_GET_REGS: {"rax": ..., "rip": ..., "rflags": ...}. Assign a dict to set them, whole or in part."""
        cdef uapi.kvm_regs regs
        checked(ioctl(self._open(), uapi.KVM_GET_REGS, &regs), "KVM_GET_REGS")
        return regs

    @regs.setter
    def regs(self, value):
        cdef uapi.kvm_regs regs = changed("regs", self.regs, value)
        checked(ioctl(self._open(), uapi.KVM_SET_REGS, &regs), "KVM_SET_REGS")

    @property
    def sregs(self):
        """KVM_GET_SREGS: segments (dicts of base, limit, selector, ...), descriptor tables, control registers."""
        cdef uapi.kvm_sregs sregs
        checked(ioctl(self._open(), uapi.KVM_GET_SREGS, &sregs), "KVM_GET_SREGS")
        return sregs

    @sregs.setter
    def sregs(self, value):
        cdef uapi.kvm_sregs sregs
        merged = changed("sregs", self.sregs, value)
        try:
            sregs = merged
        except OverflowError as error:
            too_wide("sregs", error)
        checked(ioctl(self._open(), uapi.KVM_SET_SREGS, &sregs), "KVM_SET_SREGS")

    def enter(self, dict regs not None, dict sregs not None):
        """KVM_SET_SREGS and KVM_SET_REGS of all of them, as the two properties have them; but the APIC base and the
        interrupt bitmap are KVM's own, and stay.
        """
        cdef uapi.kvm_regs general
        cdef uapi.kvm_sregs before, system
        checked(ioctl(self._open(), uapi.KVM_GET_SREGS, &before), "KVM_GET_SREGS")
        try:
            general = regs
            system = {**sregs, "apic_base": 0, "interrupt_bitmap": [0, 0, 0, 0]}
        except OverflowError as error:
            too_wide("the registers at the entry", error)
        system.apic_base = before.apic_base
        memcpy(&system.interrupt_bitmap, &before.interrupt_bitmap, sizeof(before.interrupt_bitmap))
        checked(ioctl(self._open(), uapi.KVM_SET_SREGS, &system), "KVM_SET_SREGS")
        checked(ioctl(self._open(), uapi.KVM_SET_REGS, &general), "KVM_SET_REGS")

    @property
    def sregs2(self):
        """KVM_GET_SREGS2: as sregs, with the PAE page-directory pointers and without the interrupt bitmap."""
        cdef uapi.kvm_sregs2 sregs
        checked(ioctl(self._open(), uapi.KVM_GET_SREGS2, &sregs), "KVM_GET_SREGS2")
        return sregs

    @sregs2.setter
    def sregs2(self, value):
        cdef uapi.kvm_sregs2 sregs
        merged = changed("sregs2", self.sregs2, value)
        try:
            sregs = merged
        except OverflowError as error:
            too_wide("sregs2", error)
        checked(ioctl(self._open(), uapi.KVM_SET_SREGS2, &sregs), "KVM_SET_SREGS2")

    @property
    def debugregs(self):
        """KVM_GET_DEBUGREGS: db (four addresses), dr6, dr7, flags."""
        cdef uapi.kvm_debugregs regs
        checked(ioctl(self._open(), uapi.KVM_GET_DEBUGREGS, &regs), "KVM_GET_DEBUGREGS")
        return regs

    @debugregs.setter
    def debugregs(self, value):
        cdef uapi.kvm_debugregs regs
        merged = changed("debugregs", self.debugregs, value)
        try:
            regs = merged
        except OverflowError as error:
            too_wide("debugregs", error)
        checked(ioctl(self._open(), uapi.KVM_SET_DEBUGREGS, &regs), "KVM_SET_DEBUGREGS")

    cdef bytes _get(self, unsigned long request, size_t size, str name):
        state = bytearray(size)
        checked(ioctl(self._open(), request, <uint8_t *>state), name)
        return bytes(state)

    cdef int _set(self, unsigned long request, size_t size, bytes state, str name) except -1:
        if <size_t>len(state) < size:
            raise ValueError(f"{name}: {len(state)} bytes of state, at least {size} are needed")
        return checked(ioctl(self._open(), request, <const uint8_t *>state), name)

    @property
    def fpu(self):
        """KVM_GET_FPU: struct kvm_fpu as bytes."""
        return self._get(uapi.KVM_GET_FPU, sizeof(uapi.kvm_fpu), "KVM_GET_FPU")

    @fpu.setter
    def fpu(self, bytes value):
        self._set(uapi.KVM_SET_FPU, sizeof(uapi.kvm_fpu), value, "KVM_SET_FPU")

    @property
    def xsave(self):
        """KVM_GET_XSAVE: the XSAVE area (4 KiB) as bytes."""
        return self._get(uapi.KVM_GET_XSAVE, 4096, "KVM_GET_XSAVE")

    @xsave.setter
    def xsave(self, bytes value):
        self._set(uapi.KVM_SET_XSAVE, 4096, value, "KVM_SET_XSAVE")

    def get_xsave2(self, size_t size_bytes):
        """KVM_GET_XSAVE2: as xsave, of the size KVM_CAP_XSAVE2 states for the VM (AMX needs more than 4 KiB)."""
        return self._get(uapi.KVM_GET_XSAVE2, size_bytes, "KVM_GET_XSAVE2")

    def set_xsave2(self, bytes state, size_t size_bytes):
        """KVM_SET_XSAVE with what get_xsave2 gave: KVM reads ``size_bytes``, the size KVM_CAP_XSAVE2 states."""
        self._set(uapi.KVM_SET_XSAVE, size_bytes, state, "KVM_SET_XSAVE")

    @property
    def lapic(self):
        """KVM_GET_LAPIC: the local APIC's register page, its first 1 KiB, as bytes. Needs the in-kernel irqchip."""
        return self._get(uapi.KVM_GET_LAPIC, sizeof(uapi.kvm_lapic_state), "KVM_GET_LAPIC")

    @lapic.setter
    def lapic(self, bytes value):
        self._set(uapi.KVM_SET_LAPIC, sizeof(uapi.kvm_lapic_state), value, "KVM_SET_LAPIC")

    @property
    def xcrs(self):
        """KVM_GET_XCRS: {register: value}."""
        cdef uapi.kvm_xcrs xcrs
        memset(&xcrs, 0, sizeof(xcrs))
        checked(ioctl(self._open(), uapi.KVM_GET_XCRS, &xcrs), "KVM_GET_XCRS")
        return {xcrs.xcrs[i].xcr: xcrs.xcrs[i].value for i in range(xcrs.nr_xcrs)}

    @xcrs.setter
    def xcrs(self, value):
        cdef uapi.kvm_xcrs xcrs
        memset(&xcrs, 0, sizeof(xcrs))
        if not hasattr(value, "items") or len(value) > uapi.KVM_MAX_XCRS:
            raise KindError(f"xcrs = {value!r}: give {{register: value}}, at most {uapi.KVM_MAX_XCRS}")
        for register, number in value.items():
            xcrs.xcrs[xcrs.nr_xcrs].xcr = register
            xcrs.xcrs[xcrs.nr_xcrs].value = number
            xcrs.nr_xcrs += 1
        checked(ioctl(self._open(), uapi.KVM_SET_XCRS, &xcrs), "KVM_SET_XCRS")

    @property
    def events(self):
        """KVM_GET_VCPU_EVENTS: pending and injected exceptions, interrupts, NMIs, SMIs, flat by name."""
        import _struct

        raw = self._get(uapi.KVM_GET_VCPU_EVENTS, sizeof(uapi.kvm_vcpu_events), "KVM_GET_VCPU_EVENTS")
        return dict(zip(_EVENT_FIELDS, _struct.unpack(_EVENTS, raw)))

    @events.setter
    def events(self, value):
        import _struct

        merged = changed("events", self.events, value)
        try:
            raw = pack_events(merged)
        except _struct.error as error:
            too_wide("events", error)
        self._set(uapi.KVM_SET_VCPU_EVENTS, sizeof(uapi.kvm_vcpu_events), raw, "KVM_SET_VCPU_EVENTS")

    def get_nested_state(self, uint32_t size_bytes):
        """KVM_GET_NESTED_STATE: struct kvm_nested_state as bytes, at most the size that KVM_CAP_NESTED_STATE states."""
        import _struct

        state = bytearray(max(size_bytes, 8))
        _struct.pack_into("=HHI", state, 0, 0, 0, size_bytes)
        checked(ioctl(self._open(), uapi.KVM_GET_NESTED_STATE, <uint8_t *>state), "KVM_GET_NESTED_STATE")
        return bytes(state[:_struct.unpack_from("=HHI", state)[2]])

    def set_nested_state(self, bytes state):
        """KVM_SET_NESTED_STATE with what get_nested_state gave."""
        import _struct

        if len(state) < 8 or len(state) < _struct.unpack_from("=HHI", state)[2]:
            raise ValueError(f"nested state of {len(state)} bytes: it is cut off")
        checked(ioctl(self._open(), uapi.KVM_SET_NESTED_STATE, <const uint8_t *>state), "KVM_SET_NESTED_STATE")

    @property
    def mp_state(self):
        """KVM_GET_MP_STATE: 0 runnable, 1 uninitialized (waits for INIT/SIPI), 2 init received, 3 halted, 4 SIPI.

        Reading it can carry out an INIT or SIPI that is pending, and so change every other register: read it first.
        """
        cdef uapi.kvm_mp_state state
        checked(ioctl(self._open(), uapi.KVM_GET_MP_STATE, &state), "KVM_GET_MP_STATE")
        return state.mp_state

    @mp_state.setter
    def mp_state(self, uint32_t value):
        cdef uapi.kvm_mp_state state
        state.mp_state = value
        checked(ioctl(self._open(), uapi.KVM_SET_MP_STATE, &state), "KVM_SET_MP_STATE")

    def get_msrs(self, indices):
        """KVM_GET_MSRS: {index: value} of those KVM knows; it stops at the first it does not, which is left out."""
        cdef uapi.kvm_msrs *table
        cdef uapi.kvm_msr_entry *entries
        cdef int got, i
        result = {}
        wanted = list(indices)
        while wanted:
            table = <uapi.kvm_msrs *>calloc(1, sizeof(uapi.kvm_msrs) + len(wanted) * sizeof(uapi.kvm_msr_entry))
            if table == NULL:
                raise MemoryError
            try:
                table.nmsrs = len(wanted)
                entries = <uapi.kvm_msr_entry *>(<char *>table + sizeof(uapi.kvm_msrs))
                for i in range(len(wanted)):
                    entries[i].index = wanted[i]
                got = checked(ioctl(self._open(), uapi.KVM_GET_MSRS, table), "KVM_GET_MSRS")
                for i in range(got):
                    result[entries[i].index] = entries[i].data
            finally:
                free(table)
            wanted = wanted[got + 1:]
        return result

    def set_msrs(self, values):
        """KVM_SET_MSRS from {index: value}. KvmError names the first MSR that KVM refuses."""
        cdef uapi.kvm_msrs *table
        cdef uapi.kvm_msr_entry *entries
        cdef int done, i = 0
        table = <uapi.kvm_msrs *>calloc(1, sizeof(uapi.kvm_msrs) + len(values) * sizeof(uapi.kvm_msr_entry))
        if table == NULL:
            raise MemoryError
        try:
            table.nmsrs = len(values)
            entries = <uapi.kvm_msr_entry *>(<char *>table + sizeof(uapi.kvm_msrs))
            for index, value in values.items():
                entries[i].index = index
                entries[i].data = value
                i += 1
            done = checked(ioctl(self._open(), uapi.KVM_SET_MSRS, table), "KVM_SET_MSRS")
            if done < i:
                raise KvmError("KVM_SET_MSRS", 22, f"MSR {entries[done].index:#x} does not take {entries[done].data:#x}")
        finally:
            free(table)

    # -- identity and time ---------------------------------------------------------------------------------------------

    @property
    def cpuid(self):
        """KVM_GET_CPUID2: [(function, index, flags, eax, ebx, ecx, edx)]. Assign such a list before the first run."""
        cdef uint32_t i
        cdef uapi.kvm_cpuid2 *table = <uapi.kvm_cpuid2 *>calloc(
            1, 2 * sizeof(uint32_t) + 256 * sizeof(uapi.kvm_cpuid_entry2))
        cdef uapi.kvm_cpuid_entry2 *e
        if table == NULL:
            raise MemoryError
        try:
            table.nent = 256
            checked(ioctl(self._open(), uapi.KVM_GET_CPUID2, table), "KVM_GET_CPUID2")
            e = <uapi.kvm_cpuid_entry2 *>(<char *>table + 2 * sizeof(uint32_t))
            return [(e[i].function, e[i].index, e[i].flags, e[i].eax, e[i].ebx, e[i].ecx, e[i].edx)
                    for i in range(table.nent)]
        finally:
            free(table)

    @cpuid.setter
    def cpuid(self, entries):
        self.put_cpuid(pack_cpuid(entries))

    def put_cpuid(self, bytes packed not None):
        """KVM_SET_CPUID2 of what pack_cpuid gave, before the first run: for many vCPUs that have the same."""
        checked(ioctl(self._open(), uapi.KVM_SET_CPUID2, <const char *>packed), "KVM_SET_CPUID2")

    @property
    def tsc_khz(self):
        """KVM_GET_TSC_KHZ: the guest's TSC frequency. Assign to scale it, where KVM can."""
        return checked(ioctl(self._open(), uapi.KVM_GET_TSC_KHZ, 0), "KVM_GET_TSC_KHZ")

    @tsc_khz.setter
    def tsc_khz(self, long value):
        checked(ioctl(self._open(), uapi.KVM_SET_TSC_KHZ, value), "KVM_SET_TSC_KHZ")

    @property
    def tsc_offset(self):
        """KVM_VCPU_TSC_OFFSET: the guest's TSC less the host's (scaled), as 64 unsigned bits. Assign to move it.

        KvmError before Linux 5.16.
        """
        cdef uint64_t value = 0
        self._tsc_offset(uapi.KVM_GET_DEVICE_ATTR, &value, "KVM_GET_DEVICE_ATTR")
        return value

    @tsc_offset.setter
    def tsc_offset(self, uint64_t value):
        self._tsc_offset(uapi.KVM_SET_DEVICE_ATTR, &value, "KVM_SET_DEVICE_ATTR")

    cdef int _tsc_offset(self, unsigned long request, void *value, str name) except -1:
        cdef uapi.kvm_device_attr attribute
        memset(&attribute, 0, sizeof(attribute))
        attribute.group = TSC_CTRL
        attribute.attr = TSC_OFFSET
        attribute.addr = <uint64_t><size_t>value
        checked(ioctl(self._open(), request, &attribute), name)
        return 0

    # -- injection, debugging, statistics ------------------------------------------------------------------------------

    def interrupt(self, uint32_t vector):
        """KVM_INTERRUPT: queue an external interrupt. Only without the in-kernel irqchip."""
        cdef uapi.kvm_interrupt irq
        irq.irq = vector
        checked(ioctl(self._open(), uapi.KVM_INTERRUPT, &irq), "KVM_INTERRUPT")

    def nmi(self):
        """KVM_NMI: queue a non-maskable interrupt."""
        checked(ioctl(self._open(), uapi.KVM_NMI, 0), "KVM_NMI")

    def smi(self):
        """KVM_SMI: queue a system-management interrupt."""
        checked(ioctl(self._open(), uapi.KVM_SMI, 0), "KVM_SMI")

    def set_guest_debug(self, uint32_t control, debugreg=()):
        """KVM_SET_GUEST_DEBUG: GUESTDBG_ flags, and DR0-DR7 for hardware breakpoints."""
        cdef uapi.kvm_guest_debug debug
        memset(&debug, 0, sizeof(debug))
        debug.control = control
        if len(debugreg) > 8:
            raise ConfigError(f"{len(debugreg)} debug registers: give at most 8, DR0 to DR7")
        for i, value in enumerate(debugreg):
            debug.arch.debugreg[i] = value
        checked(ioctl(self._open(), uapi.KVM_SET_GUEST_DEBUG, &debug), "KVM_SET_GUEST_DEBUG")

    def tpr_access_reporting(self, bint enabled):
        """KVM_TPR_ACCESS_REPORTING: exits at the guest's TPR accesses. Needs the in-kernel irqchip."""
        cdef uapi.kvm_tpr_access_ctl ctl
        memset(&ctl, 0, sizeof(ctl))
        ctl.enabled = enabled
        checked(ioctl(self._open(), uapi.KVM_TPR_ACCESS_REPORTING, &ctl), "KVM_TPR_ACCESS_REPORTING")

    def translate(self, uint64_t linear_address):
        """KVM_TRANSLATE: the guest-physical address behind a linear one, or None where it is not mapped."""
        cdef uapi.kvm_translation tr
        memset(&tr, 0, sizeof(tr))
        tr.linear_address = linear_address
        checked(ioctl(self._open(), uapi.KVM_TRANSLATE, &tr), "KVM_TRANSLATE")
        return tr.physical_address if tr.valid else None

    def kvmclock_ctrl(self):
        """KVM_KVMCLOCK_CTRL: tell the guest it was paused, so that its soft-lockup watchdog keeps quiet. False where it
        has no kvmclock: there is nobody to tell.
        """
        cdef int rc = ioctl(self._open(), uapi.KVM_KVMCLOCK_CTRL, 0)
        if rc < 0 and errno == EINVAL:
            return False
        checked(rc, "KVM_KVMCLOCK_CTRL")
        return True

    def stats(self):
        """KVM_GET_STATS_FD: the kernel's own counters of this vCPU."""
        from pyvmm.kvm.stats import KvmStats

        return KvmStats(checked(ioctl(self._open(), uapi.KVM_GET_STATS_FD, 0), "KVM_GET_STATS_FD"))
