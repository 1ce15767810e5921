"""The system descriptor, /dev/kvm: what this host's KVM can do, and the maker of machines.

Linux Documentation/virt/kvm/api.rst, "4.1 KVM_GET_API_VERSION" and on.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport E2BIG, EACCES, EINTR, errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from posix.fcntl cimport O_CLOEXEC, O_RDWR, open
from posix.unistd cimport close

from pyvmm.kvm cimport uapi
from pyvmm.kvm.ioctl cimport checked, ioctl

import posix

from pyvmm.errors import KvmError, StateError
from pyvmm.kvm.access import how_to_be_let_in
from pyvmm.kvm.vm import Vm

cdef extern from *:
    """
    #include <linux/kvm.h>
    typedef struct { const char *name; int number; } pyvmm_capability;
    #define CAP(n) { "KVM_CAP_" #n, KVM_CAP_##n }
    /* The capabilities pyvmm uses or reports, by their kernel names. */
    static const pyvmm_capability pyvmm_capabilities[] = {
        CAP(IRQCHIP), CAP(HLT), CAP(USER_MEMORY), CAP(SET_TSS_ADDR), CAP(EXT_CPUID), CAP(NR_VCPUS), CAP(MAX_VCPUS),
        CAP(MAX_VCPU_ID), CAP(NR_MEMSLOTS), CAP(PIT2), CAP(PIT_STATE2), CAP(REINJECT_CONTROL), CAP(MP_STATE),
        CAP(COALESCED_MMIO), CAP(COALESCED_PIO), CAP(DESTROY_MEMORY_REGION_WORKS), CAP(IRQ_ROUTING), CAP(IRQFD),
        CAP(IRQFD_RESAMPLE), CAP(SIGNAL_MSI), CAP(IOEVENTFD), CAP(IOEVENTFD_ANY_LENGTH), CAP(SET_IDENTITY_MAP_ADDR),
        CAP(ADJUST_CLOCK), CAP(INTERNAL_ERROR_DATA), CAP(VCPU_EVENTS), CAP(DEBUGREGS), CAP(X86_ROBUST_SINGLESTEP),
        CAP(XSAVE), CAP(XSAVE2), CAP(XCRS), CAP(SREGS2), CAP(TSC_CONTROL), CAP(GET_TSC_KHZ), CAP(TSC_DEADLINE_TIMER),
        CAP(KVMCLOCK_CTRL), CAP(READONLY_MEM), CAP(SET_GUEST_DEBUG), CAP(SPLIT_IRQCHIP), CAP(IMMEDIATE_EXIT),
        CAP(X2APIC_API), CAP(X86_SMM), CAP(X86_DISABLE_EXITS), CAP(X86_USER_SPACE_MSR), CAP(X86_MSR_FILTER),
        CAP(EXIT_HYPERCALL), CAP(EXIT_ON_EMULATION_FAILURE), CAP(BINARY_STATS_FD), CAP(DIRTY_LOG_RING),
        CAP(MANUAL_DIRTY_LOG_PROTECT2), CAP(VAPIC), CAP(SYNC_REGS), CAP(VM_TSC_CONTROL),
        CAP(NESTED_STATE),
    };
    #define PYVMM_CAPABILITIES ((int)(sizeof pyvmm_capabilities / sizeof *pyvmm_capabilities))

    #include <cpuid.h>
    /* __get_cpuid is a macro for some compilers; it leaves the registers alone where there is no such leaf. */
    static void pyvmm_cpuid(unsigned function, unsigned *eax, unsigned *ebx, unsigned *ecx, unsigned *edx)
    {
        (void)__get_cpuid(function, eax, ebx, ecx, edx);
    }
    """
    void pyvmm_cpuid(unsigned int, unsigned int *, unsigned int *, unsigned int *, unsigned int *)
    ctypedef struct pyvmm_capability:
        const char *name
        int number
    const pyvmm_capability pyvmm_capabilities[]
    int PYVMM_CAPABILITIES

# Capability names ("KVM_CAP_IRQCHIP") to their numbers.
CAPABILITIES = {pyvmm_capabilities[i].name.decode(): pyvmm_capabilities[i].number for i in range(PYVMM_CAPABILITIES)}

_supported_cpuid = {}   # by Kvm.device


cdef class Kvm:
    """An open /dev/kvm. KvmError with the remedy where it is missing, closed to this user, or no KVM."""

    def __cinit__(self, *args, **kwargs):
        self.fd = -1

    def __init__(self, path="/dev/kvm"):
        self.fd = open(path.encode(), O_RDWR | O_CLOEXEC)
        if self.fd < 0:
            if errno == EACCES:
                raise KvmError("open /dev/kvm", EACCES, how_to_be_let_in(path))
            checked(-1, "open /dev/kvm")
        cdef int version = ioctl(self.fd, uapi.KVM_GET_API_VERSION, 0)
        if version != uapi.KVM_API_VERSION:
            raise KvmError("KVM_GET_API_VERSION", errno if version < 0 else 0,
                           f"{path} speaks API version {version}, not {uapi.KVM_API_VERSION}: it is no usable KVM")
        self.vcpu_mmap_size = checked(ioctl(self.fd, uapi.KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE")

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    def close(self):
        """Close the descriptor; machines made from it live on."""
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def check_extension(self, capability):
        """KVM_CHECK_EXTENSION by name ("KVM_CAP_IRQCHIP") or number: 0 no, 1 yes, or the limit it states."""
        number = CAPABILITIES[capability] if isinstance(capability, str) else capability
        return checked(ioctl(self._open(), uapi.KVM_CHECK_EXTENSION, <long>number), "KVM_CHECK_EXTENSION")

    def capabilities(self):
        """{name: value} of every capability pyvmm knows."""
        return {name: self.check_extension(number) for name, number in CAPABILITIES.items()}

    def create_vm(self):
        """KVM_CREATE_VM: an empty machine. Where a signal has come the kernel takes it all back, and is asked again when
        Python's handlers have seen the signal (mm/mmap.c, mm_take_all_locks).
        """
        cdef int fd = ioctl(self._open(), uapi.KVM_CREATE_VM, 0)
        while fd < 0 and errno == EINTR:
            PyErr_CheckSignals()
            fd = ioctl(self._open(), uapi.KVM_CREATE_VM, 0)
        checked(fd, "KVM_CREATE_VM")
        return Vm(fd, self.vcpu_mmap_size)

    @property
    def device(self):
        """(st_dev, st_ino, st_rdev) of the descriptor: which KVM this is."""
        if self._device is None:
            status = posix.fstat(self._open())
            self._device = status.st_dev, status.st_ino, status.st_rdev
        return self._device

    def supported_cpuid(self):
        """KVM_GET_SUPPORTED_CPUID: [(function, index, flags, eax, ebx, ecx, edx)].

        Read once a process: it never changes while the module is loaded, and asking takes as long as making a VM.
        """
        device = self.device
        if device not in _supported_cpuid:
            _supported_cpuid[device] = self._cpuid_list(uapi.KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID")
        return list(_supported_cpuid[device])

    def _cpuid_list(self, unsigned long request, name):
        cdef uapi.kvm_cpuid2 *table
        cdef uapi.kvm_cpuid_entry2 *entries
        cdef uint32_t room = 128, i
        while True:
            table = <uapi.kvm_cpuid2 *>calloc(1, sizeof(uint32_t) * 2 + room * sizeof(uapi.kvm_cpuid_entry2))
            if table == NULL:
                raise MemoryError
            try:
                table.nent = room
                if ioctl(self._open(), request, table) < 0:
                    if errno != E2BIG or room > 4096:
                        checked(-1, name)
                    room *= 2
                    continue
                entries = <uapi.kvm_cpuid_entry2 *>(<char *>table + 2 * sizeof(uint32_t))
                return [(entries[i].function, entries[i].index, entries[i].flags, entries[i].eax, entries[i].ebx,
                         entries[i].ecx, entries[i].edx) for i in range(table.nent)]
            finally:
                free(table)

    @staticmethod
    def host_cpuid(uint32_t function):
        """The CPUID instruction on this very processor: (eax, ebx, ecx, edx); zeros where it has no such leaf."""
        cdef unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0
        pyvmm_cpuid(function, &eax, &ebx, &ecx, &edx)
        return eax, ebx, ecx, edx

    def msr_indices(self):
        """KVM_GET_MSR_INDEX_LIST: the MSRs that make up a vCPU's state."""
        cdef uint32_t room = 1024, i
        cdef uint32_t *table = <uint32_t *>calloc(1 + room, sizeof(uint32_t))
        if table == NULL:
            raise MemoryError
        try:
            table[0] = room
            checked(ioctl(self._open(), uapi.KVM_GET_MSR_INDEX_LIST, table), "KVM_GET_MSR_INDEX_LIST")
            return [table[1 + i] for i in range(table[0])]
        finally:
            free(table)

    cdef int _open(self) except -1:
        if self.fd < 0:
            raise StateError("this Kvm is closed")
        return self.fd
