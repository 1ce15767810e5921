cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pyvmm.address_space cimport AddressSpace, FlatView, ViewUser
from pyvmm.bus cimport PyThreadState, access_t, flat_view_t, region_t
from pyvmm.device cimport DeviceLock
from pyvmm.exit_stats cimport ExitStats, exit_stat_t
from pyvmm.kvm cimport uapi
from pyvmm.kvm.vcpu cimport Vcpu
from pyvmm.trace.tap cimport trace_tap_t


# Why the loop came back to Python. Three things, three names: KVM's exit reason stands in kvm_run.exit_reason and is
# looked at there; how a run ended is a StopReason.
cdef enum loop_code:
    LOOP_GO_ON          # nothing to do: back into the guest
    LOOP_EXIT           # an exit that is answered with the GIL, or ends the run
    LOOP_INJECT         # the guest can take the interrupt that waits (irqchip off)
    LOOP_KICKED
    LOOP_DEVICE_RAISED  # the error indicator is set
    LOOP_RUN_FAILED     # KVM_RUN's errno is in error_number


@cython.final
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
    cdef trace_tap_t *tap           # where exits are recorded; NULL: nobody traces
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
    cdef object _tap                # what ``tap`` points into, or did last: a thread may be on its way there
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
    cdef loop_code _loop(self) noexcept nogil
    cdef loop_code _dispatch(self) noexcept nogil
    cdef loop_code _exit_io(self) noexcept nogil
    cdef loop_code _exit_mmio(self) noexcept nogil
    cdef loop_code _drain_ring(self) noexcept nogil
    cdef int _port_access(self, uint32_t port, access_t *access) noexcept nogil
    cdef int _memory_access(self, uint64_t addr, access_t *access) noexcept nogil
    cdef loop_code _run_error(self, int number) noexcept nogil
    cdef int _take_views(self) except -1
    cdef void _account(self) noexcept nogil
    cdef void _trace_exit(self, uint64_t ticks) noexcept nogil
    cdef object _handle(self, loop_code code)
    cdef object _exit(self, uint32_t reason)
    cdef object _inject(self)
    cdef object _sleep(self)
    cdef object _exit_hlt(self)
    cdef object _exit_hypercall(self)
    cdef object _exit_rdmsr(self)
    cdef object _exit_wrmsr(self)
    cdef object _exit_ioapic_eoi(self)
    cdef dict _detail(self, uint32_t reason)
