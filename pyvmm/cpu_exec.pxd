from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pyvmm.address_space cimport AddressSpace, FlatView, ViewUser
from pyvmm.bus cimport PyThreadState, flat_view_t, region_t
from pyvmm.device cimport DeviceLock
from pyvmm.exit_stats cimport ExitStats, exit_stat_t
from pyvmm.kvm cimport uapi
from pyvmm.kvm.vcpu cimport Vcpu


cdef class CpuExec(ViewUser):
    # What every exit touches comes first and together.
    cdef uapi.kvm_run *kvm_run
    cdef int fd
    cdef int exit_request           # set by kick(): leave the loop at the next EINTR
    cdef int intr                   # level of the user-space PIC's output
    cdef bint user_irqchip
    cdef PyThreadState *ts          # of the thread in run(), while it is outside the GIL
    cdef region_t *recent_port      # the region that answered last: guests poll
    cdef exit_stat_t *stat          # where the exit under way is accounted
    cdef uint64_t left_kvm          # TSC when KVM_RUN returned
    cdef uapi.kvm_coalesced_mmio_ring *ring
    cdef flat_view_t *pio_regions
    cdef flat_view_t *mmio_regions

    cdef readonly ExitStats stats
    cdef readonly AddressSpace pio
    cdef readonly AddressSpace mmio
    cdef readonly Vcpu vcpu
    cdef FlatView _pio_view
    cdef FlatView _mmio_view
    cdef DeviceLock _ring_lock
    cdef object _page
    cdef public object acknowledge
    cdef public object msr_handler
    cdef public object on_hypercall
    cdef public object on_eoi
    cdef public object on_tpr
    cdef public bint halted
    cdef readonly dict detail
    cdef readonly int error_number
    cdef readonly int wake_fd
    cdef int tid

    cpdef _poke(self)
    cdef int _loop(self) noexcept nogil
    cdef int _dispatch(self) noexcept nogil
    cdef int _exit_io(self) noexcept nogil
    cdef int _exit_mmio(self) noexcept nogil
    cdef int _drain_ring(self) noexcept nogil
    cdef int _port_access(self, uint32_t port, int size, uint64_t *value, bint is_write) noexcept nogil
    cdef int _run_error(self, int number) noexcept nogil
    cdef int _take_views(self) except -1
    cdef void _account(self) noexcept nogil
    cdef int _handle(self, int code) except -2
    cdef int _exit_hlt(self) except -2
    cdef int _exit_inject(self) except -2
    cdef int _exit_hypercall(self) except -2
    cdef int _exit_rdmsr(self) except -2
    cdef int _exit_wrmsr(self) except -2
    cdef int _exit_ioapic_eoi(self) except -2
    cdef int _stopped(self, int code) except -2
