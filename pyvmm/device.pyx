"""The Device contract and its lock: with the interrupt lines of irq.pyx all a device model sees of the machine around it.

A device answers reads and writes at offsets inside its region and drives IrqLine objects. It knows no address,
no KVM and no thread. The bus (address_space.pyx) holds ``device.lock`` around every handler.
"""


cdef class DeviceLock:
    """A recursive lock on a real mutex: it excludes vCPU threads that run without the GIL, or where there is none.

    Use it as a context manager. It never blocks while holding the GIL, so a thread that owns the lock and waits
    for the GIL cannot deadlock with one that waits for the lock.
    """

    def __cinit__(self):
        cdef pthread_mutexattr_t attr
        pthread_mutexattr_init(&attr)
        pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_RECURSIVE)
        pthread_mutex_init(&self.mutex, &attr)
        pthread_mutexattr_destroy(&attr)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.mutex)

    cpdef acquire(self):
        """Take the lock, or take it once more where this thread has it already."""
        if pthread_mutex_trylock(&self.mutex) != 0:
            with nogil:
                pthread_mutex_lock(&self.mutex)

    cpdef release(self):
        """Give the lock back; RuntimeError where this thread does not hold it."""
        if pthread_mutex_unlock(&self.mutex) != 0:
            raise RuntimeError("release of a device lock that this thread does not hold")

    def __enter__(self):
        self.acquire()
        return self

    def __exit__(self, *exc):
        self.release()


class Device:
    """Base of every device model. Subclass it, write ``read`` and ``write``, map it into an address space.

    ``valid_sizes`` is the (min, max) of access sizes in bytes that the bus lets through, ``impl_sizes`` of those the
    handlers are called with: the bus splits and widens between the two. ``unaligned`` says whether handlers take
    unaligned offsets; where not, the bus splits such an access. (QEMU docs/devel/memory.rst, "MMIO Operations".)

    Handlers run on vCPU threads, one at a time. They must not raise for what a guest does; an exception stops the
    machine with a dump.
    """

    valid_sizes = (1, 4)
    impl_sizes = (1, 4)
    unaligned = False

    # Not a compiled class: CPython gives its fast inline attributes only to what object.__new__ makes, and handlers
    # touch the attributes of their device on every exit.
    __slots__ = ("lock", "__weakref__")

    def __new__(cls, *args, **kwargs):
        self = object.__new__(cls)
        self.lock = DeviceLock()    # here, so that it is there whether or not a subclass calls __init__
        return self

    def read(self, offset, size):
        """The value a guest reads at ``offset`` (bytes from the region's start), ``size`` bytes, little endian."""
        return (1 << (8 * size)) - 1

    def write(self, offset, size, value):
        """A guest wrote ``value`` of ``size`` bytes at ``offset``."""

    def reset(self):
        """Back to the power-on state. The vCPUs are parked."""

    def wake(self):
        """The machine comes out of suspend to RAM, where most chips had no power: as a reset. The vCPUs are parked."""
        self.reset()

    # What ``save`` and ``load`` go by: attributes and what they may be, and the version of that (state.pyx).
    STATE = {}
    STATE_VERSION = 1

    def save(self):
        """The state as plain data: enough to go on exactly. It reads only: state.pyx has the contract."""
        from pyvmm.state import save_fields

        with self.lock:
            return save_fields(self, self.STATE)

    def load(self, state):
        """Take over what ``save`` gave, into fields of this device only. StateError names what can't be taken."""
        from pyvmm.state import load_fields

        with self.lock:
            load_fields(self, self.STATE, state)

    def after_load(self):
        """All of the machine is loaded: drive lines, arm timers, map windows, go on with I/O."""
