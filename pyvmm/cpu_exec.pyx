"""The run loop: KVM_RUN, look at the exit, answer it, and back. The only reader of kvm_run's union.

The loop (``_loop``) runs without the GIL. PIO and MMIO exits are answered in it: by compiled regions outright, by a
Python device with the GIL taken around that one call (bus.pxd). Exits that need Python anyway, or that end the run,
leave the loop for ``_handle``. One ``_exit_<reason>`` each; Linux Documentation/virt/kvm/api.rst, "5. The kvm_run
structure", says what each means.

Leaving a vCPU from outside: ``kick`` sets exit_request, then immediate_exit, then sends a signal whose handler does
nothing. KVM completes a pending PIO or MMIO access at the start of the next KVM_RUN, before it looks at
immediate_exit; the loop leaves at EINTR only, so an access is always complete when it does.
"""

cimport cython
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, EFAULT, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.unistd cimport close, getpid, read

from pyvmm.address_space cimport AddressSpace, FlatView, ViewUser, space_access
from pyvmm.atomic cimport (ATOMIC_ACQUIRE, ATOMIC_RELEASE, ATOMIC_SEQ_CST, atomic_exchange, atomic_fence, atomic_load,
                           atomic_load_u32, atomic_store, atomic_store_u32, atomic_store_u8)
from pyvmm.bus cimport (BUS_OK, REGION_FIFO, PyEval_RestoreThread, PyEval_SaveThread, access_t, flat_view_find,
                        flat_view_t, goes_direct, load, ones, region_t, store, write)
from pyvmm.device cimport DeviceLock, pthread_mutex_lock, pthread_mutex_unlock
from pyvmm.exit_stats cimport (DIRECTION_IN, DIRECTION_NONE, DIRECTION_OUT, ExitStats, exit_key, exit_stat_add, rdtsc)
from pyvmm.kvm cimport uapi
from pyvmm.kvm.ioctl cimport ioctl
from pyvmm.kvm.vcpu cimport Vcpu
from pyvmm.region cimport fifo_string
from pyvmm.trace.tap cimport TAP_RELEASE, TRACE_EXIT, TRACE_VECTOR, tap_of, tap_store, trace, trace_tap_t, unlikely

from pyvmm.errors import ConfigError, StateError
from pyvmm.kvm.exits import SUBERRORS, SYSTEM_EVENTS, exit_name

cdef extern from *:
    """
    #include <pthread.h>
    #include <signal.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    static void pyvmm_kicked(int number) { (void)number; }

    /* The first real-time signal nobody handles yet becomes the kick: its handler does nothing, and without SA_RESTART
       KVM_RUN returns EINTR. Installed once a process, on the first run; 0 where none is free. */
    static int pyvmm_install_kick(void)
    {
        struct sigaction old, mine;
        for (int number = SIGRTMIN + 5; number <= SIGRTMAX; number++) {
            if (sigaction(number, NULL, &old) == 0 && !(old.sa_flags & SA_SIGINFO) && old.sa_handler == SIG_DFL) {
                memset(&mine, 0, sizeof mine);
                mine.sa_handler = pyvmm_kicked;
                if (sigaction(number, &mine, NULL) == 0)
                    return number;
            }
        }
        return 0;
    }

    /* A vCPU thread takes the kick and the signals of its own faults; all others go to the process's other threads. */
    static void pyvmm_block_signals(int kick)
    {
        sigset_t set;
        sigfillset(&set);
        sigdelset(&set, kick);
        sigdelset(&set, SIGSEGV); sigdelset(&set, SIGBUS); sigdelset(&set, SIGILL);
        sigdelset(&set, SIGFPE); sigdelset(&set, SIGTRAP); sigdelset(&set, SIGABRT); sigdelset(&set, SIGSYS);
        pthread_sigmask(SIG_SETMASK, &set, NULL);
    }

    static void pyvmm_name_thread(int index)
    {
        char name[16];
        snprintf(name, sizeof name, "CPU %d/KVM", index);
        prctl(PR_SET_NAME, name);
    }

    static int pyvmm_gettid(void) { return (int)syscall(SYS_gettid); }
    static void pyvmm_tgkill(int pid, int tid, int number) { syscall(SYS_tgkill, pid, tid, number); }
    """
    int pyvmm_install_kick() nogil
    void pyvmm_block_signals(int) nogil
    void pyvmm_name_thread(int) nogil
    int pyvmm_gettid() nogil
    void pyvmm_tgkill(int, int, int) nogil

cdef extern from "Python.h":
    Py_buffer *PyMemoryView_GET_BUFFER(object)

cdef extern from "<errno.h>" nogil:
    int EHWPOISON

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
    int wait_on "poll" (pollfd *, unsigned long, int)
    short POLLIN

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int, int)
    int EFD_CLOEXEC, EFD_NONBLOCK

cdef int kick_signal = 0

# Where the kernel says in KVM_CAP_COALESCED_MMIO (pages from kvm_run) its ring stands.
cdef enum:
    PAGE_BYTES = 4096


class StopReason:
    """Why ``CpuExec.run`` came back; ``detail`` has the rest. One object each: compare with ``is``.

    KICKED          somebody asked: kick()
    SHUTDOWN        KVM_EXIT_SHUTDOWN: triple fault
    SYSTEM_EVENT    the guest, through KVM: shutdown, reset or crash
    DEBUG           a breakpoint or a single step
    INTERNAL_ERROR  KVM can't go on
    FAIL_ENTRY      the hardware refused the guest state
    UNKNOWN         a hardware exit KVM has no name for
    EXCEPTION       KVM_EXIT_EXCEPTION
    MEMORY_FAULT    KVM could not resolve a guest-physical address
    UNHANDLED       an exit reason this loop does not know
    RUN_FAILED      KVM_RUN itself returned an errno
    DEVICE_RAISED   a device's handler raised; run() raises that exception instead of returning
    """

    __slots__ = ("name",)

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f"<StopReason {self.name}>"


# Not an enum: importing that takes a tenth of the time from the shell to the first guest instruction.
for _name in ("KICKED", "SHUTDOWN", "SYSTEM_EVENT", "DEBUG", "INTERNAL_ERROR", "FAIL_ENTRY", "UNKNOWN", "EXCEPTION",
              "MEMORY_FAULT", "UNHANDLED", "RUN_FAILED", "DEVICE_RAISED"):
    setattr(StopReason, _name, StopReason(_name))

# The exits that end a run, by KVM's reason; any other that has no answer is UNHANDLED.
cdef dict STOPS = {
    uapi.KVM_EXIT_SHUTDOWN: StopReason.SHUTDOWN,
    uapi.KVM_EXIT_SYSTEM_EVENT: StopReason.SYSTEM_EVENT,
    uapi.KVM_EXIT_DEBUG: StopReason.DEBUG,
    uapi.KVM_EXIT_INTERNAL_ERROR: StopReason.INTERNAL_ERROR,
    uapi.KVM_EXIT_FAIL_ENTRY: StopReason.FAIL_ENTRY,
    uapi.KVM_EXIT_UNKNOWN: StopReason.UNKNOWN,
    uapi.KVM_EXIT_EXCEPTION: StopReason.EXCEPTION,
    uapi.KVM_EXIT_MEMORY_FAULT: StopReason.MEMORY_FAULT,
}


# Final: so its methods call each other directly, and the compiler may put them together.
@cython.final
cdef class CpuExec(ViewUser):
    """The loop of one vCPU: CpuExec(vcpu, pio, mmio), then ``run()`` on the thread that is to be the vCPU.

    With no Vcpu, ``page`` (a writable buffer of at least 8 KiB) stands for kvm_run and ``handle_exit`` answers the
    exit that is written there: how the reasons that this host's KVM can't produce are tested.
    """

    def __cinit__(self, *args, **kwargs):
        self.wake_fd = -1

    def __init__(self, Vcpu vcpu, AddressSpace pio not None, AddressSpace mmio not None, *, page=None, bint
    user_irqchip=False):
        self.vcpu = vcpu
        self.pio = pio
        self.mmio = mmio
        self.stats = ExitStats()
        self.fd = -1
        if vcpu is not None:
            self.kvm_run = vcpu.run
            self.fd = vcpu.fd
        else:
            self._page = memoryview(page).cast("B")
            if self._page.nbytes < 2 * PAGE_BYTES or self._page.readonly:
                raise ConfigError("a stand-in for kvm_run needs a writable buffer of at least 8192 bytes")
            self.kvm_run = <uapi.kvm_run *><void *>page_start(self._page)
        self.user_irqchip = user_irqchip
        if user_irqchip:
            self.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
            if self.wake_fd < 0:
                raise OSError(errno, "eventfd")
        self.detail = {}
        self._take_views()
        pio.attach(self)
        mmio.attach(self)

    def __dealloc__(self):
        if self.wake_fd >= 0:
            close(self.wake_fd)

    def close(self):
        """Let go of the spaces and the descriptor. The vCPU must be out of ``run``."""
        self.abandon()
        self.pio.detach(self)
        self.mmio.detach(self)
        self.acknowledge = self.msr_handler = self.on_hypercall = self.on_eoi = self.on_tpr = None

    def abandon(self):
        """In a child of fork: close the descriptor. Takes no lock, and the vCPU's thread is not there."""
        if self.wake_fd >= 0:
            close(self.wake_fd)
            self.wake_fd = -1

    def coalesced_ring(self, int page_offset, DeviceLock lock not None):
        """Drain KVM's coalesced ring, ``page_offset`` pages into the mapping; ``lock`` is the machine's one for it."""
        self._ring_lock = lock
        self.ring = <uapi.kvm_coalesced_mmio_ring *>(<char *>self.kvm_run + page_offset * PAGE_BYTES)

    def trace_to(self, tap):
        """Record every exit there (trace/recorder.pyx Tap), by the number that it has; None: no more. From any thread."""
        tap_store(&self.tap, tap_of(tap), TAP_RELEASE)
        if tap is not None:
            self._tap = tap

    # -- of the local APIC, with irqchip off -------------------------------------------------------------------------

    @property
    def cr8(self):
        """The task priority, as of the last exit; what is set here is the guest's from its next entry on."""
        return self.kvm_run.cr8

    @cr8.setter
    def cr8(self, value):
        self.kvm_run.cr8 = value

    @property
    def apic_base(self):
        """IA32_APIC_BASE as of the last exit; 0 before the first."""
        return self.kvm_run.apic_base

    def stands_at(self, dict regs not None, dict sregs not None):
        """What KVM says in kvm_run to an interrupt controller outside of it, as at an exit with these registers. Whether
        the guest takes an interrupt only KVM knows: it is asked by the window.
        """
        self.kvm_run.cr8 = sregs["cr8"]
        self.kvm_run.apic_base = sregs["apic_base"]
        self.kvm_run.if_flag = regs["rflags"] >> 9 & 1
        self.kvm_run.ready_for_interrupt_injection = 0

    # -- from other threads ------------------------------------------------------------------------------------------

    def kick(self):
        """Make ``run`` return KICKED soon, wherever the vCPU is. Callable from any thread, and from a handler."""
        atomic_store(&self.exit_request, 1, ATOMIC_SEQ_CST)
        self._poke()

    cpdef _poke(self):
        # Order matters: exit_request (or intr) is set before immediate_exit, and the loop clears immediate_exit before
        # it reads them; pairs with the EINTR arm of _loop.
        atomic_store_u8(&self.kvm_run.immediate_exit, 1, ATOMIC_SEQ_CST)
        cdef int tid = atomic_load(&self.tid, ATOMIC_SEQ_CST)
        cdef uint64_t one = 1
        # A tid that was reused meanwhile gets a signal that does nothing.
        if tid and tid != pyvmm_gettid():
            pyvmm_tgkill(getpid(), tid, kick_signal)
        if self.wake_fd >= 0:
            write(self.wake_fd, &one, 8)

    def drain(self):
        """Make the vCPU deliver soon what KVM has gathered, even where its guest only waits for an interrupt."""
        if self.ring != NULL and self.ring.first != self.ring.last:
            self._poke()

    def cancel_kick(self):
        """Forget a kick that has not been seen yet; the caller knows that the vCPU is parked."""
        atomic_store(&self.exit_request, 0, ATOMIC_SEQ_CST)

    @property
    def interrupted(self):
        """Whether the interrupt controller in Python has one for it."""
        return bool(atomic_load(&self.intr, ATOMIC_ACQUIRE))

    def interrupt(self, int level):
        """The output of the user-space interrupt controller changed (irqchip off)."""
        atomic_store(&self.intr, level, ATOMIC_SEQ_CST)
        if level and atomic_load(&self.tid, ATOMIC_SEQ_CST) != pyvmm_gettid():
            self._poke()

    # -- the vCPU's own thread ---------------------------------------------------------------------------------------

    @staticmethod
    def prepare_thread(int index=0):
        """Call first on a thread made to be vCPU ``index``: it then takes no signal but the kick.

        Its name, for top and perf, is what QEMU calls it with debug-threads=on: "CPU 0/KVM".
        """
        install_kick()
        pyvmm_block_signals(kick_signal)
        pyvmm_name_thread(index)

    def run(self):
        """Run the guest until something stops it: the StopReason. What a device raised is raised here."""
        cdef loop_code code
        if self.fd < 0:
            raise StateError("there is no vCPU behind this loop")
        install_kick()
        atomic_store(&self.tid, pyvmm_gettid(), ATOMIC_SEQ_CST)
        self.stat = NULL
        self.stats.enter()
        try:
            while True:
                if self.halted:
                    stopped = self._sleep()
                else:
                    self.ts = PyEval_SaveThread()
                    code = self._loop()
                    PyEval_RestoreThread(self.ts)
                    stopped = self._handle(code)
                if stopped is not None:
                    return stopped
        finally:
            self._account()
            atomic_store(&self.tid, 0, ATOMIC_SEQ_CST)

    def handle_exit(self):
        """Answer the one exit that stands in kvm_run: the StopReason, or None where the guest would go on."""
        cdef loop_code code
        self.ts = PyEval_SaveThread()
        self.left_kvm = rdtsc()
        self.stat = NULL
        if self.stale:
            take_views(self)
        code = LOOP_GO_ON
        if self.ring != NULL and self.ring.first != self.ring.last:
            code = self._drain_ring()
        if code == LOOP_GO_ON:
            code = self._dispatch()
        PyEval_RestoreThread(self.ts)
        try:
            return self._handle(code)
        finally:
            self._account()

    def complete(self):
        """Finish an access the guest has under way, run nothing more: after this the registers are whole.

        For a vCPU whose handler raised; one that was kicked has done it already. Reads give what kvm_run holds.
        """
        cdef int rc, tries
        for tries in range(16):
            atomic_store_u8(&self.kvm_run.immediate_exit, 1, ATOMIC_SEQ_CST)
            with nogil:
                rc = ioctl(self.fd, uapi.KVM_RUN, 0)
            if rc < 0:
                break
        atomic_store_u8(&self.kvm_run.immediate_exit, 0, ATOMIC_SEQ_CST)

    # -- the loop, without the GIL -----------------------------------------------------------------------------------

    cdef loop_code _loop(self) noexcept nogil:
        cdef loop_code code
        cdef int rc, number
        while True:
            if self.user_irqchip:
                if atomic_load(&self.intr, ATOMIC_ACQUIRE):
                    if self.kvm_run.ready_for_interrupt_injection:
                        return LOOP_INJECT
                    self.kvm_run.request_interrupt_window = 1
                else:
                    self.kvm_run.request_interrupt_window = 0
            # The last exit is charged to its row, and the row is closed: where the ring's drain ends the next exit
            # before that has a row of its own, nothing is charged twice.
            self._account()
            rc = ioctl(self.fd, uapi.KVM_RUN, 0)
            self.left_kvm = rdtsc()
            number = errno if rc < 0 else 0     # before anything else can change it
            if self.stale:
                take_views(self)
            if number == 0:
                if self.ring != NULL and self.ring.first != self.ring.last:
                    code = self._drain_ring()
                    if code != LOOP_GO_ON:
                        return code
                code = self._dispatch()
            else:
                code = self._run_error(number)
            if code != LOOP_GO_ON:
                return code

    cdef loop_code _run_error(self, int number) noexcept nogil:
        """KVM_RUN returned -1: a kick or another signal, an AP that is not running yet, or a real error."""
        cdef loop_code code = LOOP_GO_ON
        self.stat = NULL
        if number == EINTR or number == EAGAIN:
            self.stat = self.stats.slot(exit_key(uapi.KVM_EXIT_INTR, DIRECTION_NONE, 0))
            if self.ring != NULL and self.ring.first != self.ring.last:
                code = self._drain_ring()
                if code != LOOP_GO_ON:
                    return code
            # Cleared before the request is read; pairs with _poke. A kick in between only costs one more EINTR.
            atomic_store_u8(&self.kvm_run.immediate_exit, 0, ATOMIC_SEQ_CST)
            return LOOP_KICKED if atomic_load(&self.exit_request, ATOMIC_SEQ_CST) else LOOP_GO_ON
        self.error_number = number
        if (number == EFAULT or number == EHWPOISON) and self.kvm_run.exit_reason == uapi.KVM_EXIT_MEMORY_FAULT:
            return LOOP_EXIT
        return LOOP_RUN_FAILED

    cdef loop_code _dispatch(self) noexcept nogil:
        """The exit that stands in kvm_run: answered here, or left to _handle."""
        cdef uint32_t reason = self.kvm_run.exit_reason
        if reason == uapi.KVM_EXIT_IO:
            return self._exit_io()
        if reason == uapi.KVM_EXIT_MMIO:
            return self._exit_mmio()
        self.stat = self.stats.slot(exit_key(reason if reason < 0xff else 0xff, DIRECTION_NONE, 0))
        if reason == uapi.KVM_EXIT_IRQ_WINDOW_OPEN or reason == uapi.KVM_EXIT_INTR:
            # The window's work is done at the top of the loop: the guest can take the interrupt now.
            return LOOP_GO_ON
        if reason == uapi.KVM_EXIT_SET_TPR or reason == uapi.KVM_EXIT_TPR_ACCESS:
            # The new priority is in kvm_run.cr8, and KVM keeps it; accesses are reported for patching, which we don't
            # do.
            return LOOP_GO_ON if self.on_tpr is None else LOOP_EXIT
        return LOOP_EXIT

    cdef int _port_access(self, uint32_t port, access_t *access) noexcept nogil:
        cdef region_t *region = self.recent_port
        if region == NULL or port - region.base > region.last - region.base:
            region = flat_view_find(self.pio_regions, port)
            if region != NULL:
                self.recent_port = region
        return space_access(self.pio_regions, region, port, access)

    cdef int _memory_access(self, uint64_t addr, access_t *access) noexcept nogil:
        return space_access(self.mmio_regions, flat_view_find(self.mmio_regions, addr), addr, access)

    cdef loop_code _exit_io(self) noexcept nogil:
        """KVM_EXIT_IO: ``count`` units of ``size`` bytes at one port; for string I/O the data moves, the port stays."""
        cdef uapi.kvm_run *run = self.kvm_run
        cdef uint8_t *data = <uint8_t *>run + run.io.data_offset
        cdef uint32_t port = run.io.port, left = run.io.count
        cdef int size = run.io.size
        cdef bint is_write = run.io.direction == uapi.KVM_EXIT_IO_OUT
        cdef region_t *region
        cdef access_t access
        access.size = size
        access.is_write = is_write
        access.ts = self.ts
        self.stat = self.stats.slot(exit_key(uapi.KVM_EXIT_IO, DIRECTION_OUT if is_write else DIRECTION_IN, port))
        if left > 1:
            region = flat_view_find(self.pio_regions, port)
            if region != NULL and region.kind == REGION_FIFO and goes_direct(region, port - region.base, size):
                access.offset = port - region.base
                return LOOP_GO_ON if fifo_string(region, data, left, &access) == BUS_OK else LOOP_DEVICE_RAISED
        while left:
            access.value = load(data, size) if is_write else ones(size)
            if self._port_access(port, &access) != BUS_OK:
                return LOOP_DEVICE_RAISED
            if not is_write:
                store(data, size, access.value)
            data += size
            left -= 1
        return LOOP_GO_ON

    cdef loop_code _exit_mmio(self) noexcept nogil:
        """KVM_EXIT_MMIO: up to 8 bytes at a guest-physical address that is no RAM."""
        cdef uapi.kvm_run *run = self.kvm_run
        cdef uint64_t addr = run.mmio.phys_addr
        cdef access_t access
        cdef int rc
        access.size = <int>run.mmio.len
        access.is_write = run.mmio.is_write
        access.ts = self.ts
        self.stat = self.stats.slot(exit_key(uapi.KVM_EXIT_MMIO, DIRECTION_OUT if access.is_write else DIRECTION_IN,
                                             addr >> 12))
        access.value = load(run.mmio.data, access.size) if access.is_write else <uint64_t>-1
        rc = self._memory_access(addr, &access)
        if not access.is_write:
            store(run.mmio.data, access.size, access.value)
        return LOOP_GO_ON if rc == BUS_OK else LOOP_DEVICE_RAISED

    cdef loop_code _drain_ring(self) noexcept nogil:
        """Writes that KVM gathered are older than this exit: they go first. One vCPU drains at a time."""
        cdef uapi.kvm_coalesced_mmio *entry
        cdef access_t access
        cdef uint32_t first
        cdef int rc = BUS_OK
        access.is_write = True
        access.ts = self.ts
        pthread_mutex_lock(&self._ring_lock.mutex)
        # Pairs with the kernel's barrier before it moves ``last``.
        while rc == BUS_OK and self.ring.first != atomic_load_u32(&self.ring.last, ATOMIC_ACQUIRE):
            first = self.ring.first
            entry = <uapi.kvm_coalesced_mmio *>(<char *>self.ring + sizeof(uapi.kvm_coalesced_mmio_ring)) + first
            access.size = entry.len
            access.value = load(entry.data, access.size if access.size < 8 else 8)
            if entry.pio:
                rc = self._port_access(<uint32_t>entry.phys_addr, &access)
            else:
                rc = self._memory_access(entry.phys_addr, &access)
            atomic_store_u32(&self.ring.first, first + 1 if first + 1 < uapi.COALESCED_ENTRIES else 0, ATOMIC_RELEASE)
        pthread_mutex_unlock(&self._ring_lock.mutex)
        return LOOP_GO_ON if rc == BUS_OK else LOOP_DEVICE_RAISED

    cdef int _take_views(self) except -1:
        # Cleared first: a change after this line sets it again. Pairs with AddressSpace._publish.
        atomic_exchange(&self.stale, 0, ATOMIC_SEQ_CST)
        self._pio_view = self.pio.current()
        self._mmio_view = self.mmio.current()
        self.pio_regions = &self._pio_view.c
        self.mmio_regions = &self._mmio_view.c
        self.recent_port = NULL
        return 0

    # -- exits answered with the GIL ---------------------------------------------------------------------------------

    cdef void _account(self) noexcept nogil:
        """Charge the exit under way to its row: the guest is entered, the loop is left, or the vCPU goes to sleep."""
        cdef uint64_t ticks
        if self.stat != NULL:
            ticks = rdtsc() - self.left_kvm
            exit_stat_add(self.stat, ticks)
            if unlikely(self.tap != NULL):
                self._trace_exit(ticks)
            self.stat = NULL

    cdef void _trace_exit(self, uint64_t ticks) noexcept nogil:
        """The exit under way, which kvm_run still holds; format.py has what goes where."""
        cdef trace_tap_t *tap = self.tap
        cdef uapi.kvm_run *run = self.kvm_run
        # The row's reason: where KVM_RUN returned an errno kvm_run may have an older one. The rest's row has none.
        cdef uint32_t reason = <uint32_t>(self.stat.key >> 56)
        cdef uint64_t a, value = 0
        if tap == NULL:
            return              # just switched off
        if self.stat == self.stats.entries:
            reason = run.exit_reason
        a = <uint64_t>(reason if reason < 0x7f else 0x7f) << 57
        if reason == uapi.KVM_EXIT_IO:
            a |= run.io.port | <uint64_t>(run.io.count & 0xffff) << 16 | <uint64_t>(run.io.size - 1 & 7) << 52
            a |= <uint64_t>(DIRECTION_OUT if run.io.direction == uapi.KVM_EXIT_IO_OUT else DIRECTION_IN) << 55
            value = load(<uint8_t *>run + run.io.data_offset, min(<int>run.io.size, 8))
        elif reason == uapi.KVM_EXIT_MMIO:
            a |= run.mmio.phys_addr & 0xFFFFFFFFFFFFFULL | <uint64_t>(run.mmio.len - 1 & 7) << 52
            a |= <uint64_t>(DIRECTION_OUT if run.mmio.is_write else DIRECTION_IN) << 55
            value = load(run.mmio.data, min(<int>run.mmio.len, 8))
        else:
            a |= <uint64_t>DIRECTION_NONE << 55
        tap.record(tap, TRACE_EXIT, self.left_kvm, ticks, a, value)

    cdef object _handle(self, loop_code code):
        """What _loop left: None to go back into it, or the StopReason."""
        if code == LOOP_GO_ON:
            return None
        if code == LOOP_EXIT:
            return self._exit(self.kvm_run.exit_reason)
        if code == LOOP_INJECT:
            return self._inject()
        if code == LOOP_DEVICE_RAISED:
            raise_pending()
        if code == LOOP_RUN_FAILED:
            self.detail = {"exit": "KVM_RUN failed", "errno": self.error_number}
            return StopReason.RUN_FAILED
        atomic_store(&self.exit_request, 0, ATOMIC_SEQ_CST)
        return StopReason.KICKED

    cdef object _exit(self, uint32_t reason):
        """The exit that stands in kvm_run: None where the guest goes on, or the StopReason."""
        if reason == uapi.KVM_EXIT_SET_TPR or reason == uapi.KVM_EXIT_TPR_ACCESS:
            self.on_tpr()
        elif reason == uapi.KVM_EXIT_HLT:
            self._exit_hlt()
        elif reason == uapi.KVM_EXIT_HYPERCALL:
            self._exit_hypercall()
        elif reason == uapi.KVM_EXIT_X86_RDMSR:
            self._exit_rdmsr()
        elif reason == uapi.KVM_EXIT_X86_WRMSR:
            self._exit_wrmsr()
        elif reason == uapi.KVM_EXIT_IOAPIC_EOI:
            self._exit_ioapic_eoi()
        else:
            self.detail = self._detail(reason)
            return STOPS.get(reason, StopReason.UNHANDLED)
        return None

    cdef object _inject(self):
        """The user-space PIC has an interrupt and the guest can take one: acknowledge it and hand the vector to KVM."""
        cdef trace_tap_t *tap
        vector = self.acknowledge()
        if vector is not None and vector >= 0:
            self.vcpu.interrupt(vector)
            tap = self.tap
            if tap != NULL:
                trace(tap, TRACE_VECTOR, vector, 0)
            # KVM holds one interrupt, and a second one before the next entry would take its place: so the window is
            # asked for first.
            self.kvm_run.ready_for_interrupt_injection = 0

    cdef object _exit_hlt(self):
        """KVM_EXIT_HLT (irqchip off): ``run`` sleeps before it enters the guest again."""
        if self.on_tpr is not None:
            # The guest may have raised its task priority without an exit. It is looked at now, or an interrupt that it
            # holds back would end the sleep.
            self.on_tpr()
        self.halted = self.user_irqchip

    cdef object _sleep(self):
        """Until the PIC has an interrupt that this vCPU takes: None; or until a kick: KICKED."""
        cdef pollfd waiter
        cdef uint64_t count
        waiter.fd = self.wake_fd
        waiter.events = POLLIN
        self._account()     # the sleep is the guest's time, not ours
        while True:
            # The counter is emptied before the flags are read: what comes after that wakes the poll.
            read(self.wake_fd, &count, 8)
            if atomic_load(&self.exit_request, ATOMIC_SEQ_CST):
                atomic_store(&self.exit_request, 0, ATOMIC_SEQ_CST)
                atomic_store_u8(&self.kvm_run.immediate_exit, 0, ATOMIC_SEQ_CST)
                return StopReason.KICKED
            if atomic_load(&self.intr, ATOMIC_SEQ_CST) and self.kvm_run.if_flag:
                self.halted = False
                return None
            with nogil:
                wait_on(&waiter, 1, -1)

    cdef object _exit_hypercall(self):
        """KVM_EXIT_HYPERCALL: ``on_hypercall(nr, args)`` answers; with none it is -ENOSYS, as KVM's own default."""
        args = [self.kvm_run.hypercall.args[i] for i in range(6)]
        result = -1000 if self.on_hypercall is None else self.on_hypercall(self.kvm_run.hypercall.nr, args)
        self.kvm_run.hypercall.ret = result & 0xFFFF_FFFF_FFFF_FFFF

    cdef object _exit_rdmsr(self):
        """KVM_EXIT_X86_RDMSR: ``msr_handler.read(index)`` gives the value, or None for a #GP in the guest."""
        value = None if self.msr_handler is None else self.msr_handler.read(self.kvm_run.msr.index)
        self.kvm_run.msr.error = value is None
        self.kvm_run.msr.data = 0 if value is None else value & 0xFFFF_FFFF_FFFF_FFFF

    cdef object _exit_wrmsr(self):
        """KVM_EXIT_X86_WRMSR: ``msr_handler.write(index, value)`` takes it, or returns False for a #GP in the guest."""
        taken = self.msr_handler is not None and self.msr_handler.write(self.kvm_run.msr.index, self.kvm_run.msr.data)
        self.kvm_run.msr.error = not taken

    cdef object _exit_ioapic_eoi(self):
        """KVM_EXIT_IOAPIC_EOI (split irqchip): tell the user-space IOAPIC, where there is one."""
        if self.on_eoi is not None:
            self.on_eoi(self.kvm_run.eoi.vector)

    cdef dict _detail(self, uint32_t reason):
        """What kvm_run says of an exit that ends the run."""
        cdef uapi.kvm_run *run = self.kvm_run
        cdef uapi.pyvmm_memory_fault *fault
        detail = {"exit": exit_name(reason), "exit_reason": reason}
        if reason == uapi.KVM_EXIT_SYSTEM_EVENT:
            detail["type"] = run.system_event.type
            detail["event"] = SYSTEM_EVENTS.get(run.system_event.type, f"type {run.system_event.type}")
            detail["data"] = [run.system_event.data[i] for i in range(min(run.system_event.ndata, 16))]
        elif reason == uapi.KVM_EXIT_DEBUG:
            detail.update(exception=run.debug.arch.exception, pc=run.debug.arch.pc, dr6=run.debug.arch.dr6,
                          dr7=run.debug.arch.dr7)
        elif reason == uapi.KVM_EXIT_INTERNAL_ERROR:
            detail["suberror"] = run.internal.suberror
            detail["suberror_name"] = SUBERRORS.get(run.internal.suberror, f"suberror {run.internal.suberror}")
            detail["data"] = [run.internal.data[i] for i in range(min(run.internal.ndata, 16))]
        elif reason == uapi.KVM_EXIT_FAIL_ENTRY:
            detail["hardware_entry_failure_reason"] = run.fail_entry.hardware_entry_failure_reason
            detail["cpu"] = run.fail_entry.cpu
        elif reason == uapi.KVM_EXIT_UNKNOWN:
            detail["hardware_exit_reason"] = run.hw.hardware_exit_reason
        elif reason == uapi.KVM_EXIT_EXCEPTION:
            detail.update(exception=run.ex.exception, error_code=run.ex.error_code)
        elif reason == uapi.KVM_EXIT_MEMORY_FAULT:
            fault = <uapi.pyvmm_memory_fault *>&run.hw
            detail.update(flags=fault.flags, gpa=fault.gpa, size=fault.size)
        return detail


cdef void take_views(CpuExec cpu) noexcept with gil:
    cpu._take_views()


cdef int raise_pending() except -1:
    # A handler left the error indicator of this thread set; returning the error value makes Cython raise it.
    return -1


cdef uint8_t *page_start(view) except NULL:
    return <uint8_t *>PyMemoryView_GET_BUFFER(view).buf


cdef int install_kick() except -1:
    global kick_signal
    if kick_signal == 0:
        kick_signal = pyvmm_install_kick()
        if kick_signal == 0:
            raise StateError("no real-time signal is free for the vCPU kick: leave one at its default disposition")
    return 0
