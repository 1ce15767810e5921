"""Interrupt lines and wires: how the request of a device gets to an input of an interrupt controller.

A device drives an IrqLine. Each line belongs to one IrqWire, which ORs its lines: PCI's pins share interrupts with each
other and with ISA. What the wire drives is its sink: a GSI of KVM's controllers, a Python callable for controllers of
ours, or one more line of another wire, as an interrupt router needs it.

A GSI (global system interrupt) is the number of an interrupt for the whole machine, a pin an input of one controller, a
line the device's end; to drive any of them is ``set``.

Compiled units drive a line with ``line_set`` (irq.pxd), which needs no GIL. The wire's lock is a real one and is held
while the sink is driven, so that levels arrive in the order they had; it is taken before the GIL and never waited for
with the GIL held.
"""

from cpython.object cimport PyObject

from pyvmm.bus cimport PyEval_RestoreThread, PyEval_SaveThread, PyThreadState
from pyvmm.device cimport (PTHREAD_MUTEX_RECURSIVE, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
                           pthread_mutex_t, pthread_mutex_trylock, pthread_mutex_unlock, pthread_mutexattr_destroy,
                           pthread_mutexattr_init, pthread_mutexattr_settype, pthread_mutexattr_t)
from pyvmm.kvm.vm cimport Vm, vm_set_line
from pyvmm.trace.tap cimport TAP_RELEASE, TRACE_LINE, tap_of, tap_store, trace, trace_tap_t, unlikely

from pyvmm.errors import KindError

cdef extern from "Python.h" nogil:
    # Declared nogil: call_sink takes and gives the GIL by hand, and leaves what was raised where it is.
    ctypedef enum PyGILState_STATE:
        pass
    PyGILState_STATE PyGILState_Ensure()
    void PyGILState_Release(PyGILState_STATE)
    PyObject *PyLong_FromLong(long)
    PyObject *PyObject_CallOneArg(PyObject *, PyObject *)
    void Py_DECREF(PyObject *)


cdef class IrqWire:
    """One interrupt input and all the lines that drive it, ORed: ``sink`` goes up with the first and down with the last.

    ``sink`` is a Vm, whose GSI ``gsi`` it is; another IrqWire, of which this one is then one more line; a callable that
    takes the level, 0 or 1, one call at a time; or None. ``connect`` gives it another one.
    """

    def __cinit__(self, sink=None, int gsi=-1):
        cdef pthread_mutexattr_t attr
        pthread_mutexattr_init(&attr)
        pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_RECURSIVE)
        pthread_mutex_init(&self.mutex, &attr)
        pthread_mutexattr_destroy(&attr)
        self.gsi = gsi
        check_sink(sink)
        self.take_sink(sink)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.mutex)

    @property
    def level(self):
        """1 where a line is up, else 0."""
        return 1 if self.up else 0

    def line(self):
        """Another IrqLine that drives it."""
        return IrqLine(self)

    def trace_to(self, tap):
        """Record there (trace/recorder.pyx Tap) each level that it drives its input to; None: no more."""
        tap_store(&self.tap, tap_of(tap), TAP_RELEASE)
        if tap is not None:
            self._tap = tap

    def connect(self, sink):
        """Drive ``sink`` from now on. Where a line is up, the sink there was goes down and the new one up."""
        check_sink(sink)
        cdef int failed = 0
        lock_wire(&self.mutex, True)
        try:
            if sink is self.sink:
                return      # no edge where nothing changes
            if self.up:
                failed = self.drive(0, True)
            if not failed:
                self.take_sink(sink)
                if self.up:
                    failed = self.drive(1, True)
        finally:
            pthread_mutex_unlock(&self.mutex)
        if failed:
            raise_pending()

    cdef int take_sink(self, sink) except -1:
        self._borrowed_call = NULL      # before what it borrows from may go
        self.sink = sink
        self._vm = None
        self._further = None
        self._call = None
        if isinstance(sink, IrqWire):
            self._further = IrqLine(sink)
            return 0
        if isinstance(sink, Vm):
            self._vm = sink
            sink = _refused(sink, self.gsi)
        self._call = sink
        if sink is not None:
            self._borrowed_call = <PyObject *>sink
        return 0

    cdef int change(self, IrqLine line, int level, bint has_gil) noexcept nogil:
        """One of its lines is set to ``level``."""
        cdef int failed = 0
        lock_wire(&self.mutex, has_gil)
        if level != line.level:
            line.level = level
            self.up += 1 if level else -1
            # The first one up, or the last one down.
            if self.up == level:
                failed = self.drive(level, has_gil)
        pthread_mutex_unlock(&self.mutex)
        return failed

    cdef int drive(self, int level, bint has_gil) noexcept nogil:
        """The sink to ``level``. The lock is held."""
        cdef trace_tap_t *tap = self.tap
        if unlikely(tap != NULL):
            trace(tap, TRACE_LINE, level, 0)
        if self._further is not None:
            return self._further.wire.change(self._further, level, has_gil)
        if self._vm is not None and vm_set_line(self._vm, self.gsi, level) >= 0:
            return 0
        return call_sink(self._borrowed_call, level) if self._borrowed_call != NULL else 0


cdef class IrqLine:
    """One interrupt line: the device's end. Only a change of level goes on to its wire.

    ``IrqLine(wire)`` is one more line of an IrqWire. ``IrqLine(sink, gsi)`` has a wire of its own, ``IrqLine()`` one
    that leads nowhere.
    """

    def __cinit__(self, sink=None, int gsi=-1):
        self.wire = sink if isinstance(sink, IrqWire) else IrqWire(sink, gsi)

    @property
    def gsi(self):
        """The global system interrupt that the line leads to; -1 where its wire has none."""
        return self.wire.gsi

    def set(self, level):
        """Drive the line to ``level`` (0 or 1; all that is true is 1). From any thread."""
        put(self, 1 if level else 0)

    def raise_(self):
        put(self, 1)

    def lower(self):
        put(self, 0)

    def pulse(self):
        """An edge: up, and down again."""
        put(self, 1)
        put(self, 0)


cdef inline int put(IrqLine line, int level) except -1:
    if line.wire.change(line, level, True) < 0:
        raise_pending()
    return 0


def _refused(vm, gsi):
    """For an ioctl that failed without the GIL: asks once more, and raises what it means."""
    return lambda level: vm.irq_line(gsi, level)


cdef int check_sink(sink) except -1:
    if sink is None or isinstance(sink, (IrqWire, Vm)) or callable(sink):
        return 0
    raise KindError(f"a wire to {sink!r}: give an IrqWire, a Vm, or a function that takes the level")


cdef inline void lock_wire(pthread_mutex_t *mutex, bint has_gil) noexcept nogil:
    cdef PyThreadState *ts
    if pthread_mutex_trylock(mutex) == 0:
        return
    if not has_gil:
        pthread_mutex_lock(mutex)
        return
    # Whoever has it may be on the way to a Python sink, and want the GIL for that.
    ts = PyEval_SaveThread()
    pthread_mutex_lock(mutex)
    PyEval_RestoreThread(ts)


cdef int call_sink(PyObject *call, int level) noexcept nogil:
    """``call(level)``, with or without the GIL. -1: it raised, and the error indicator of this thread is set."""
    cdef PyGILState_STATE state = PyGILState_Ensure()
    cdef PyObject *argument = PyLong_FromLong(level)    # 0 and 1 always are there
    cdef PyObject *answer = PyObject_CallOneArg(call, argument)
    Py_DECREF(argument)
    if answer != NULL:
        Py_DECREF(answer)
    PyGILState_Release(state)
    return 0 if answer != NULL else -1


cdef int raise_pending() except -1:
    # A sink left the error indicator of this thread set; returning the error value makes Cython raise it.
    return -1
