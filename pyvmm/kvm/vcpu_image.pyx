"""VcpuImage: all of a vCPU's state in the kernel's own structures, made once, put into any number of vCPUs.

Each ioctl on a vCPU loads it onto the processor and takes it off again, some microseconds; dicts of registers take as
long again. A machine that goes on from a state has a dozen of these before its guest's first instruction.
Linux Documentation/virt/kvm/api.rst.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memset

from pyvmm.kvm cimport uapi
from pyvmm.kvm.ioctl cimport checked, ioctl
from pyvmm.kvm.vcpu cimport Vcpu

import _struct

from pyvmm.errors import ConfigError, KvmError
from pyvmm.kvm.vcpu import pack_events

cdef size_t MSR_BYTES = sizeof(uapi.kvm_msr_entry)


cdef class VcpuImage:
    """VcpuImage(state, lapic, sregs2, xsave_bytes) of what ``vcpu_state.save`` gives; the MSRs in the order of their
    dict.

    ``lapic``: with the local APIC and the MP state of KVM's irqchip. ``sregs2``: ``state["sregs"]`` is struct
    kvm_sregs2. KVM reads ``xsave_bytes`` of the XSAVE area, the size that KVM_CAP_XSAVE2 states. ``general`` are regs,
    ``system`` are sregs, as Vcpu has them. ConfigError for a value that has more bits than its register.
    """

    cdef uapi.kvm_regs _regs
    cdef uapi.kvm_sregs _sregs
    cdef uapi.kvm_sregs2 _sregs2
    cdef uapi.kvm_debugregs _debugregs
    cdef uapi.kvm_xcrs _xcrs
    cdef uapi.kvm_mp_state _mp_state
    cdef bint _has_lapic, _has_sregs2
    cdef bytes _events, _lapic, _xsave, _msrs
    cdef readonly dict general, system, msrs

    def __init__(self, dict state not None, *, bint lapic, bint sregs2, size_t xsave_bytes):
        self._has_lapic, self._has_sregs2 = lapic, sregs2
        self.general, self.system, self.msrs = state["regs"], state["sregs"], state["msrs"]
        try:
            self._regs = state["regs"]
            if sregs2:
                self._sregs2 = state["sregs"]
            else:
                self._sregs = state["sregs"]
            self._debugregs = state["debugregs"]
            self._events = pack_events(state["events"])
            self._msrs = b"".join([_struct.pack("=IIQ", index, 0, value) for index, value in self.msrs.items()])
            if lapic:
                self._mp_state.mp_state = state["mp_state"]
                self._lapic = state["lapic"]
        except (OverflowError, _struct.error) as error:
            raise ConfigError(f"a register of a vCPU: a value has more bits than it: {error}") from None
        self._pack_xcrs(state["xcrs"])
        self._xsave = state["xsave"]
        if <size_t>len(self._xsave) < xsave_bytes or lapic and <size_t>len(self._lapic) < sizeof(uapi.kvm_lapic_state):
            raise ValueError("the XSAVE area or the local APIC's page is cut off")

    cdef int _pack_xcrs(self, dict xcrs) except -1:
        memset(&self._xcrs, 0, sizeof(self._xcrs))
        if len(xcrs) > uapi.KVM_MAX_XCRS:
            raise ConfigError(f"{len(xcrs)} extended control registers: there are {uapi.KVM_MAX_XCRS} at most")
        for register, value in xcrs.items():
            self._xcrs.xcrs[self._xcrs.nr_xcrs].xcr = register
            self._xcrs.xcrs[self._xcrs.nr_xcrs].value = value
            self._xcrs.nr_xcrs += 1
        return 0

    def put(self, Vcpu vcpu not None):
        """Into a vCPU that has its CPUID table: all but ``put_last``. The MSRs that KVM refuses."""
        cdef int fd = vcpu._open()
        if self._has_sregs2:
            checked(ioctl(fd, uapi.KVM_SET_SREGS2, &self._sregs2), "KVM_SET_SREGS2")
        else:
            checked(ioctl(fd, uapi.KVM_SET_SREGS, &self._sregs), "KVM_SET_SREGS")
        checked(ioctl(fd, uapi.KVM_SET_REGS, &self._regs), "KVM_SET_REGS")
        if self._xcrs.nr_xcrs:
            checked(ioctl(fd, uapi.KVM_SET_XCRS, &self._xcrs), "KVM_SET_XCRS")
        checked(ioctl(fd, uapi.KVM_SET_XSAVE, <const uint8_t *>self._xsave), "KVM_SET_XSAVE")
        checked(ioctl(fd, uapi.KVM_SET_DEBUGREGS, &self._debugregs), "KVM_SET_DEBUGREGS")
        if self._has_lapic:
            checked(ioctl(fd, uapi.KVM_SET_LAPIC, <const uint8_t *>self._lapic), "KVM_SET_LAPIC")
        return self._put_msrs(fd)

    cdef list _put_msrs(self, int fd):
        """KVM sets them in their order, and says how many it has set: behind the one that it refuses it goes on."""
        cdef list refused = []
        cdef bytes left = self._msrs
        cdef Py_ssize_t done
        while left:
            # struct kvm_msrs: nmsrs, pad, entries. KVM writes nothing back.
            table = _struct.pack("=II", len(left) // MSR_BYTES, 0) + left
            try:
                done = checked(ioctl(fd, uapi.KVM_SET_MSRS, <const uint8_t *>(<bytes>table)), "KVM_SET_MSRS")
            except KvmError:
                done = 0
            if done * MSR_BYTES >= len(left):
                break
            refused.append(_struct.unpack_from("=I", left, done * MSR_BYTES)[0])
            left = left[(done + 1) * MSR_BYTES:]
        return refused

    def put_last(self, Vcpu vcpu not None):
        """What comes after the MSRs: the MP state and the events."""
        cdef int fd = vcpu._open()
        if self._has_lapic:
            checked(ioctl(fd, uapi.KVM_SET_MP_STATE, &self._mp_state), "KVM_SET_MP_STATE")
        checked(ioctl(fd, uapi.KVM_SET_VCPU_EVENTS, <const uint8_t *>self._events), "KVM_SET_VCPU_EVENTS")
