"""The Device contract, its lock, and the interrupt line: all a device model sees of the machine around it.

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

    def acquire(self):
        """Take the lock, or take it once more where this thread has it already."""
        if pthread_mutex_trylock(&self.mutex) != 0:
            with nogil:
                pthread_mutex_lock(&self.mutex)

    def release(self):
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

    def save(self):
        """The state as plain data (ints, bytes, strings, lists, dicts): enough to go on exactly."""
        return {}

    def load(self, state):
        """Take over what ``save`` gave."""


class IrqLine:
    """One interrupt line: the device end. ``set_level(level)`` is called on a change of level only."""

    __slots__ = ("gsi", "level", "_set_level")

    def __init__(self, set_level=None, gsi=-1):
        self.gsi = gsi
        self.level = 0
        self._set_level = set_level

    def set(self, level):
        """Drive the line to ``level`` (0 or 1; all that is true is 1)."""
        level = 1 if level else 0
        if level != self.level:
            self.level = level
            if self._set_level is not None:
                self._set_level(level)

    def raise_(self):
        self.set(1)

    def lower(self):
        self.set(0)

    def pulse(self):
        """An edge: up, and down again."""
        self.set(1)
        self.set(0)


class IrqWire:
    """One interrupt input and all lines that drive it, ORed: PCI's pins share interrupts with each other and with ISA.

    ``set_level(level)`` is called, one call at a time, when the first line goes up and when the last one goes down. An
    only line calls it itself.
    """

    __slots__ = ("gsi", "_lines", "_lock", "_set_level", "_up")

    def __init__(self, set_level, gsi=-1):
        self.gsi = gsi
        self._set_level = set_level
        self._lock = DeviceLock()
        self._lines = []
        self._up = 0    # a bit for each line that is

    def line(self):
        """Another IrqLine that drives it."""
        with self._lock:
            line = IrqLine(self._set_level, self.gsi)
            self._lines.append(line)
            if len(self._lines) == 2:
                self._share(0)
            if len(self._lines) > 1:
                self._share(len(self._lines) - 1)
            return line

    def _share(self, n):
        line, bit = self._lines[n], 1 << n
        self._up |= bit if line.level else 0
        line._set_level = lambda level: self._drive(bit, level)

    def _drive(self, bit, level):
        with self._lock:
            before = self._up
            self._up = before | bit if level else before & ~bit
            if bool(before) != bool(self._up):
                self._set_level(level)
