"""AddressSpace and MemoryRegion, used twice in a machine: port I/O and MMIO.

The semantics are those of QEMU's docs/devel/memory.rst: a region states which access sizes are valid on the bus and
which its implementation takes; the bus splits, widens and aligns in between (``access_with_adjusted_size``). An
address nobody claims reads as all ones and swallows writes. An aligned access belongs whole to the region that its first
byte is in, or to nobody; only an unaligned one is split over several. Regions never overlap: adding one that would
names both.

vCPU threads look regions up without the GIL in an immutable FlatView. A change builds a new view and tells every
vCPU that its own is stale; each takes the new one at its next exit. ``unmap`` waits for a handler under way, and none runs
after it has returned.
"""

from cpython.exc cimport PyErr_Fetch, PyErr_NormalizeException, PyErr_Restore
from cpython.method cimport PyMethod_Check
from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from pyvmm.bus cimport (BUS_OK, BUS_RAISED, BUS_UNMAPPED, REGION_BUFFER, REGION_EVENT, REGION_FIFO, REGION_LATCH,
                        REGION_PYTHON, REGION_SINK, SHORTCUT_GATHER, SHORTCUT_LATCH, PY_VECTORCALL_ARGUMENTS_OFFSET, Py_DECREF, PyEval_RestoreThread,
                        PyEval_SaveThread, PyLong_FromUnsignedLongLong, PyObject_Vectorcall, PyThreadState, flat_view_find,
                        flat_view_t, goes_direct, ones, python_read, python_write, region_t, shortcut, take_lock,
                        write)
from pyvmm.atomic cimport ATOMIC_SEQ_CST, atomic_store
from pyvmm.device cimport DeviceLock, pthread_mutex_unlock

from pyvmm.device import Device
from pyvmm.errors import ConfigError, KindError, StateError, add_access_note

cdef extern from "Python.h" nogil:
    PyObject *PyBytes_FromStringAndSize(const char *, Py_ssize_t)
    Py_buffer *PyMemoryView_GET_BUFFER(object)


# -- one access of one region ------------------------------------------------------------------------------------------

cdef int call_end(region_t *region, bint with_bytes, PyThreadState *ts) noexcept nogil:
    """The Python call at the end of a compiled region's work; the device's lock is held."""
    cdef PyObject *args[2]
    cdef PyObject *result
    if ts != NULL:
        PyEval_RestoreThread(ts)
    args[0] = args[1] = NULL
    if with_bytes:
        args[1] = PyBytes_FromStringAndSize(<char *>region.memory, region.position)
        region.position = 0
        result = NULL
        if args[1] != NULL:
            result = PyObject_Vectorcall(region.end_func, &args[1], 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL)
            Py_DECREF(args[1])
    else:
        result = PyObject_Vectorcall(region.end_func, &args[1], 0 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL)
    if result != NULL:
        Py_DECREF(result)
    if ts != NULL:
        PyEval_SaveThread()
    return BUS_OK if result != NULL else BUS_RAISED


cdef int sink_write(region_t *region, int size, uint64_t value, PyThreadState *ts) noexcept nogil:
    cdef int i, rc = BUS_OK
    cdef uint8_t byte
    for i in range(size):
        byte = <uint8_t>(value >> (8 * i))
        region.memory[region.position] = byte
        region.position += 1
        if byte == 10 or region.position == region.memory_size:
            rc = call_end(region, True, ts)
            if rc != BUS_OK:
                break       # nothing may be called with an exception pending
    return rc


cdef int fifo_access(region_t *region, int size, uint64_t *value, bint is_write, PyThreadState *ts) noexcept nogil:
    """Move ``size`` bytes through the window. Outside of one, or past its end, reads are ones and writes are lost."""
    cdef uint64_t left = region.memory_size - region.position
    if region.direction != (2 if is_write else 1) or left == 0:
        if not is_write:
            value[0] = ones(size)
        return BUS_OK
    if left > <uint64_t>size:
        left = size
    if is_write:
        memcpy(region.memory + region.position, value, left)
    else:
        value[0] = ones(size)
        memcpy(value, region.memory + region.position, left)
    region.position += left
    if region.position == region.memory_size:
        # Closed before the call: the device may open the next window from inside it.
        region.direction = 0
        return call_end(region, False, ts)
    return BUS_OK


cdef int fifo_string(region_t *region, uint8_t *data, uint32_t count, int size, bint is_write,
                     PyThreadState *ts) noexcept nogil:
    """``count`` units of ``size`` bytes through the window, as fifo_access each, but copied in one go where they fit."""
    cdef uint64_t left, units
    cdef uint64_t value
    cdef int rc = BUS_OK
    take_lock(region, ts)
    while count and rc == BUS_OK:
        if not region.mapped:
            # Before this access, or by the call at a window's end: nobody answers for the rest.
            if not is_write:
                memset(data, 0xff, <size_t>count * size)
            break
        left = region.memory_size - region.position
        units = left // size if region.direction == (2 if is_write else 1) else 0
        if units == 0:
            # No window, or its last bytes are fewer than a unit.
            value = 0
            memcpy(&value, data, size)
            rc = fifo_access(region, size, &value, is_write, ts)
            if not is_write:
                memcpy(data, &value, size)
            units = 1
        else:
            if units > count:
                units = count
            if is_write:
                memcpy(region.memory + region.position, data, units * size)
            else:
                memcpy(data, region.memory + region.position, units * size)
            region.position += units * size
            if region.position == region.memory_size:
                region.direction = 0
                rc = call_end(region, False, ts)
        region.count += units
        data += units * size
        count -= <uint32_t>units
    pthread_mutex_unlock(region.lock)
    if rc == BUS_RAISED:
        handler_raised(region, 0, size, is_write)
    return rc


cdef int compiled_access(region_t *region, uint64_t offset, int size, uint64_t *value, bint is_write,
                         PyThreadState *ts) noexcept nogil:
    """A region that needs no Python to decide."""
    cdef int rc = BUS_OK
    cdef uint64_t one = 1
    take_lock(region, ts)
    if not region.mapped:
        pthread_mutex_unlock(region.lock)
        return BUS_UNMAPPED
    region.count += 1
    if region.kind == REGION_LATCH:
        if not is_write:
            value[0] = region.value & ones(size)
        elif region.writable:
            region.value = value[0]
    elif region.kind == REGION_SINK:
        if is_write:
            rc = sink_write(region, size, value[0], ts)
        else:
            value[0] = region.value & ones(size)
    elif region.kind == REGION_FIFO:
        rc = fifo_access(region, size, value, is_write, ts)
    elif region.kind == REGION_EVENT:
        if is_write:
            # A full counter means the reader has a wake-up pending anyway.
            write(region.fd, &one, 8)
        else:
            value[0] = 0
    elif offset >= region.memory_size or <uint64_t>size > region.memory_size - offset:
        # Moved by another thread between lookup and lock: that access came too late.
        rc = BUS_UNMAPPED
    elif is_write:
        memcpy(region.memory + offset, value, size)
    else:
        value[0] = 0
        memcpy(value, region.memory + offset, size)
    pthread_mutex_unlock(region.lock)
    return rc


cdef int handler_access(region_t *region, uint64_t offset, int size, uint64_t *value, bint is_write,
                        PyThreadState *ts) noexcept nogil:
    """One access of a size the region implements."""
    cdef int rc
    if region.kind != REGION_PYTHON:
        rc = compiled_access(region, offset, size, value, is_write, ts)
    elif region.shortcuts and shortcut(region, offset, size, value, is_write, ts):
        rc = BUS_OK
    elif is_write:
        rc = python_write(region, offset, size, value[0], ts)
    else:
        rc = python_read(region, offset, size, value, ts)
    if rc == BUS_UNMAPPED:
        value[0] = ones(size)
        rc = BUS_OK
    elif rc == BUS_RAISED:
        handler_raised(region, offset, size, is_write)
    return rc


cdef void handler_raised(region_t *region, uint64_t offset, int size, bint is_write) noexcept with gil:
    """The error indicator is set: have the exception say which handler raised it, and for which access."""
    cdef PyObject *kind
    cdef PyObject *value
    cdef PyObject *where
    PyErr_Fetch(&kind, &value, &where)
    PyErr_NormalizeException(&kind, &value, &where)
    try:
        add_access_note(<object>value, (<MemoryRegion>region.owner)._handler(offset, size, is_write))
    except BaseException:
        pass    # one that takes no notes
    PyErr_Restore(kind, value, where)


cdef int adjusted_access(region_t *region, uint64_t offset, int size, uint64_t *value, bint is_write,
                         PyThreadState *ts) noexcept nogil:
    """QEMU's access_with_adjusted_size: ``size`` bytes by accesses between impl_min and impl_max.

    Narrower than impl_min: the aligned container is read and, for a write, merged and written back; an unaligned
    access may lie in two of them. All pieces run under one hold of the lock, so another vCPU never sees half an access.
    """
    cdef int step = size, i = 0, n, shift, rc = BUS_OK
    cdef uint64_t part, result = 0, start, mask
    if step < region.impl_min:
        step = region.impl_min
    elif step > region.impl_max:
        step = region.impl_max
    if step == size:
        return handler_access(region, offset, size, value, is_write, ts)
    take_lock(region, ts)
    if step < size:
        while i < size and rc == BUS_OK:
            part = (value[0] >> (8 * i)) & ones(step)
            rc = handler_access(region, offset + i, step, &part, is_write, ts)
            result |= (part & ones(step)) << (8 * i)
            i += step
    else:
        while i < size and rc == BUS_OK:
            start = (offset + i) & ~(<uint64_t>step - 1)
            n = step - <int>(offset + i - start)
            if n > size - i:
                n = size - i
            shift = 8 * <int>(offset + i - start)
            rc = handler_access(region, start, step, &part, False, ts)
            if rc == BUS_OK and is_write:
                mask = ones(n) << shift
                part = (part & ~mask) | (((value[0] >> (8 * i)) << shift) & mask)
                rc = handler_access(region, start, step, &part, True, ts)
            result |= ((part >> shift) & ones(n)) << (8 * i)
            i += n
    pthread_mutex_unlock(region.lock)
    if not is_write:
        value[0] = result
    return rc


# -- any access of a space -----------------------------------------------------------------------------------------------

cdef int piece_size(region_t *region, uint64_t addr, int size) noexcept nogil:
    """How much of an access at ``addr`` this region takes at once: inside it, valid, aligned, a power of two."""
    cdef uint64_t offset = addr - region.base, align = offset & (~offset + 1)
    cdef int limit = size, step = 1
    if <uint64_t>limit > region.last - addr + 1 and not region.wide:
        limit = <int>(region.last - addr + 1)
    if limit > region.valid_max:
        limit = region.valid_max
    if not region.unaligned and align != 0 and <uint64_t>limit > align:
        limit = <int>align
    while step * 2 <= limit:
        step *= 2
    return step


cdef int aligned_size(uint64_t addr, int size) noexcept nogil:
    """What the bus moves at once at ``addr`` of ``size`` bytes there: all of an aligned access."""
    cdef int step = 1
    while step * 2 <= size and not addr & (2 * step - 1):
        step *= 2
    return step


cdef int bus_access(flat_view_t *view, uint64_t addr, int size, uint64_t *value, bint is_write,
                    PyThreadState *ts) noexcept nogil:
    """An access that no handler takes as it is.

    An aligned one belongs whole to the region of its first byte, or to nobody: 0xcf8's dword is never a write to 0xcf9
    (QEMU's system/physmem.c, address_space_translate_internal, says why it does not clamp). What reaches past the end of
    that region is nobody's. Only an unaligned access is split into aligned ones, each with an owner of its own.
    """
    cdef region_t *region = NULL
    cdef uint64_t result = 0, part
    cdef int done = 0, owned = 0, step, rc
    while done < size:
        if done >= owned:
            owned = done + aligned_size(addr + done, size - done)
            # Past the top of 64 bits there is nothing: an access does not wrap around to address 0.
            region = flat_view_find(view, addr + done) if addr + done >= addr else NULL
        elif region != NULL and addr + done - region.base > region.last - region.base:
            region = NULL
        step = owned - done if region == NULL else piece_size(region, addr + done, size - done)
        part = (value[0] >> (8 * done)) & ones(step) if is_write else ones(step)
        if region != NULL and step >= region.valid_min:
            rc = adjusted_access(region, addr + done - region.base, step, &part, is_write, ts)
            if rc != BUS_OK:
                return rc
        result |= (part & ones(step)) << (8 * done)
        done += step
    if not is_write:
        value[0] = result
    return BUS_OK


cdef int bus_read(flat_view_t *view, uint64_t addr, int size, uint64_t *value, PyThreadState *ts) noexcept nogil:
    cdef region_t *region = flat_view_find(view, addr)
    if region == NULL and size == 1:
        value[0] = 0xff
        return BUS_OK
    if region != NULL and goes_direct(region, addr - region.base, size):
        return handler_access(region, addr - region.base, size, value, False, ts)
    return bus_access(view, addr, size, value, False, ts)


cdef int bus_write(flat_view_t *view, uint64_t addr, int size, uint64_t value, PyThreadState *ts) noexcept nogil:
    cdef region_t *region = flat_view_find(view, addr)
    if region != NULL and goes_direct(region, addr - region.base, size):
        return handler_access(region, addr - region.base, size, &value, True, ts)
    return bus_access(view, addr, size, &value, True, ts)


# -- the Python side -----------------------------------------------------------------------------------------------------

cdef int raised() except -1:
    """A handler left the error indicator set: let Cython raise it."""
    return -1


cdef void check_sizes(str what, sizes) except *:
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or not all(is_int(n) and n in (1, 2, 4, 8) for n in sizes) \
            or sizes[0] > sizes[1]:
        raise ConfigError(f"{what}={sizes!r}: give (min, max) out of 1, 2, 4 and 8 bytes")


cdef bint is_int(value) except -1:
    return isinstance(value, int) and not isinstance(value, bool)


cdef int check_device(device) except -1:
    """KindError where ``device`` is none, or the class of one."""
    if isinstance(device, Device):
        return 0
    if isinstance(device, type) and issubclass(device, Device):
        raise KindError(f"{device.__name__} is a class and no device: give an instance, {device.__name__}()")
    raise KindError(f"{device!r} is no device: derive its class from pyvmm.Device, which brings the lock")


cdef int check_handler(what, handler) except -1:
    if not callable(handler):
        raise KindError(f"{what}={handler!r}: give a function, or leave it out")
    return 0


cdef uint8_t *buffer_start(view, bint for_writing) except NULL:
    """The first byte of a memoryview; its owner keeps the memory still for as long as the view is held."""
    if for_writing and view.readonly:
        raise TypeError("a window that the guest writes needs a writable buffer")
    return <uint8_t *>PyMemoryView_GET_BUFFER(view).buf


cdef class MemoryRegion:
    """A range of ports or of guest-physical addresses with one answer: here, the handlers of a Python device.

    MemoryRegion(size, device) calls ``device.read(offset, size)`` and ``device.write(offset, size, value)``; ``read``
    and ``write`` name others (one device with several regions). Sizes default to the device's own.
    The handlers are looked up once, here: a method replaced later is not seen.
    """

    def __init__(self, size, device=None, *, name=None, read=None, write=None, valid_sizes=None, impl_sizes=None,
                 unaligned=None):
        check_device(device)
        self.device = device
        self._set_up(size, name or type(device).__name__, device.lock,
                     device.valid_sizes if valid_sizes is None else valid_sizes,
                     device.impl_sizes if impl_sizes is None else impl_sizes,
                     device.unaligned if unaligned is None else unaligned)
        self.c.kind = REGION_PYTHON
        read = device.read if read is None else read
        write = device.write if write is None else write
        check_handler("read", read)
        check_handler("write", write)
        self._set_handlers(read, write)

    def _set_up(self, size, name, lock, valid_sizes, impl_sizes, unaligned):
        check_sizes("valid_sizes", valid_sizes)
        check_sizes("impl_sizes", impl_sizes)
        if not isinstance(name, str):
            raise KindError(f"name={name!r}: give a string")
        if not is_int(size):
            raise KindError(f"{name}: a region of {size!r} bytes: give a whole number")
        if size <= 0 or size >= 1 << 64:
            raise ConfigError(f"{name}: a region of {size} bytes: give at least 1, and less than 2**64")
        if impl_sizes[0] > valid_sizes[0] and size % impl_sizes[0]:
            raise ConfigError(f"{name}: {size} bytes is no multiple of the smallest implemented access, {impl_sizes[0]}")
        self.name = name
        self.size = size
        self.c.owner = <PyObject *>self
        self._lock = lock
        self.c.lock = &(<DeviceLock?>lock).mutex
        self.c.valid_min, self.c.valid_max = valid_sizes
        self.c.impl_min, self.c.impl_max = impl_sizes
        self.c.unaligned = unaligned
        self.c.fd = -1
        for n in (1, 2, 4, 8):
            if max(valid_sizes[0], impl_sizes[0]) <= n <= min(valid_sizes[1], impl_sizes[1]):
                self.c.direct_sizes |= 1 << n

    def _set_handlers(self, read, write):
        # A method of the device is called as its plain function with the device as first argument: one object less
        # to touch while the caches are cold.
        device = self.device
        if all(PyMethod_Check(f) and f.__self__ is device for f in (read, write)):
            read, write = read.__func__, write.__func__
            self.c.device = <PyObject *>device
        self._read = read
        self._write = write
        self.c.read_func = <PyObject *>read
        self.c.write_func = <PyObject *>write

    def _handler(self, offset, size, is_write):
        """What was called for that access, for messages."""
        handler = self._write if is_write else self._read
        if self.c.kind != REGION_PYTHON:
            handler = self._end
        owner = type(self if self.device is None else self.device).__name__
        method = getattr(handler, "__name__", repr(handler))
        at = "port" if self.space is not None and self.space.name == "pio" else "address"
        return f"{owner}.{method} ({at} {self.c.base + offset:#x}, {size} byte{'s' * (size > 1)}, region {self.name})"

    @property
    def base(self):
        """Where it is mapped; None before and after."""
        return self.c.base if self.c.mapped else None

    @property
    def count(self):
        """Accesses that a compiled region served by itself."""
        return self.c.count

    def __repr__(self):
        where = f"{self.c.base:#x}-{self.c.last:#x}" if self.c.mapped else f"{self.size} bytes, not mapped"
        return f"<{type(self).__name__} {self.name} {where}>"


cdef enum:
    LATCHES = 8     # bytes of region_t.value


cdef class RegisterRegion(MemoryRegion):
    """The byte registers of a Python device, some of which may answer without Python while the device says so.

    Reads of ``latch``ed ones give a value, writes to the ``gather``ed one are kept for ``take``: a newline, and what
    no longer fits into ``capacity`` bytes, goes to the device's ``write`` as ever, and finds there what came before it.
    All methods are for the device, which holds its lock. Only the first eight registers can be latched.
    """

    def __init__(self, size, device, *, name=None, read=None, write=None, capacity=1024):
        MemoryRegion.__init__(self, size, device, name=name, read=read, write=write)
        if not 1 <= size <= 256 or capacity < 1:
            raise ConfigError(f"{self.name}: {size} registers, {capacity} bytes of room: give 1 to 256, and at least 1")
        self._buffer = bytearray(capacity)
        self.c.memory = <uint8_t *>self._buffer
        self.c.memory_size = capacity

    def latch(self, uint8_t offset, uint8_t value):
        """Until further notice a read of that byte gives ``value``."""
        if offset >= LATCHES:
            raise ValueError(f"{self.name}: register {offset} can't be latched, only the first {LATCHES} can")
        self.c.value = self.c.value & ~(<uint64_t>0xff << (8 * offset)) | <uint64_t>value << (8 * offset)
        self.c.latched |= 1 << offset
        self.c.shortcuts |= SHORTCUT_LATCH

    def unlatch(self, uint8_t offset):
        """Its reads are the device's again."""
        if offset < LATCHES:
            self.c.latched &= ~(1 << offset)
            if not self.c.latched:
                self.c.shortcuts &= ~SHORTCUT_LATCH

    def gather(self, uint8_t offset):
        """Until further notice bytes written there are kept."""
        self.c.gathered_at = offset
        self.c.shortcuts |= SHORTCUT_GATHER

    def release(self):
        """Every write is the device's again. What was kept stays, to be taken."""
        self.c.shortcuts &= ~SHORTCUT_GATHER

    def take(self):
        """What was kept since the last time: bytes."""
        kept = self.c.memory[:self.c.position]
        self.c.position = 0
        return kept

    @property
    def gathering(self):
        """Whether writes are being kept."""
        return bool(self.c.shortcuts & SHORTCUT_GATHER)


cdef class LatchRegion(MemoryRegion):
    """Keeps the last value written and gives it to reads, without Python. ``writable=False``: a constant."""

    def __init__(self, size, value=0, *, bint writable=True, name="latch"):
        self._set_up(size, name, DeviceLock(), (1, 8), (1, 8), True)
        self.c.kind = REGION_LATCH
        self.c.value = value
        self.c.writable = writable

    @property
    def value(self):
        """What a read gives now."""
        return self.c.value


cdef class SinkRegion(MemoryRegion):
    """Gathers written bytes without Python and hands them to ``callback(bytes)`` at each newline, or when it is full.

    Reads give ``read_value``. ``flush()`` hands over what is gathered so far.
    """

    def __init__(self, size, callback, *, read_value=0xFFFF_FFFF, capacity=4096, name="sink"):
        check_handler("callback", callback)
        if not is_int(capacity) or capacity < 1:
            raise ConfigError(f"{name}: a capacity of {capacity} bytes: give at least 1")
        self._set_up(size, name, DeviceLock(), (1, 4), (1, 4), True)
        self._buffer = bytearray(capacity)
        self.c.kind = REGION_SINK
        self.c.value = read_value
        self.c.memory = <uint8_t *>self._buffer
        self.c.memory_size = capacity
        self._end = callback
        self.c.end_func = <PyObject *>callback

    def flush(self):
        """Hand over what is gathered, if anything."""
        with self._lock:
            if self.c.position and call_end(&self.c, True, NULL) != BUS_OK:
                handler_raised(&self.c, 0, 1, True)
                raised()


cdef class BufferRegion(MemoryRegion):
    """Plain memory behind MMIO exits: ``buffer`` is any writable contiguous buffer, its length the region's size."""

    def __init__(self, buffer, *, name="buffer"):
        try:
            self._buffer = memoryview(buffer).cast("B")
        except TypeError as error:
            raise KindError(f"{name}: {error}: give a contiguous buffer") from None
        self._set_up(self._buffer.nbytes, name, DeviceLock(), (1, 8), (1, 8), True)
        self.c.kind = REGION_BUFFER
        self.c.memory = buffer_start(self._buffer, True)
        self.c.memory_size = self._buffer.nbytes


cdef class EventRegion(MemoryRegion):
    """A write adds one to the eventfd ``fd``; reads give zero. Where KVM has ioeventfd, that saves the exit as well."""

    def __init__(self, size, fd, *, name="event"):
        if not is_int(fd) or fd < 0:
            raise KindError(f"{name}: fd={fd!r}: give the descriptor of an eventfd")
        self._set_up(size, name, DeviceLock(), (1, 8), (1, 8), True)
        self.c.kind = REGION_EVENT
        self.c.fd = fd


cdef class FifoRegion(MemoryRegion):
    """A data port: accesses move through a window over a buffer, and one Python call comes at the window's end.

    ``device`` gives the lock; ``on_end()`` runs under it when the guest has read or written the last byte (an ATA
    sector: one call into Python instead of 256). With no window open reads give ones and writes are lost.

    ``wide``: a data port as ATA has it, whose 16- and 32-bit accesses reach over the ports behind it: those that begin
    here are taken whole, and single bytes are not taken at all.
    """

    def __init__(self, size, device, on_end, *, bint wide=False, name="fifo"):
        check_device(device)
        check_handler("on_end", on_end)
        self.device = device
        sizes = (2, 4) if wide else (1, 4)
        self._set_up(size, name, device.lock, sizes, sizes, True)
        self.c.wide = wide
        self.c.kind = REGION_FIFO
        self._end = on_end
        self.c.end_func = <PyObject *>on_end

    cdef _open(self, buffer, int direction, start, size):
        # A device hands out one buffer piece by piece: the view of it is made once.
        if buffer is not self._source or direction == 2 and self._buffer.readonly:
            window = memoryview(buffer).cast("B")
            buffer_start(window, direction == 2)
        else:
            window = self._buffer
        length = window.nbytes
        if size is None:
            size = length - start
        if start < 0 or size < 0 or start + size > length:
            raise ValueError(f"{self.name}: a window of {size} bytes at {start} leaves a buffer of {length}")
        with self._lock:
            self._source = buffer
            self._buffer = window
            self.c.memory = buffer_start(window, direction == 2) + <uint64_t>start
            self.c.memory_size = size
            self.c.position = 0
            self.c.direction = direction if size else 0

    def open_read(self, buffer, start=0, size=None):
        """The guest reads ``buffer`` out through the port: all of it, or ``size`` bytes from ``start``."""
        self._open(buffer, 1, start, size)

    def open_write(self, buffer, start=0, size=None):
        """The guest's writes fill ``buffer``: all of it, or ``size`` bytes from ``start``."""
        self._open(buffer, 2, start, size)

    def close(self):
        """No window: let go of the buffer."""
        with self._lock:
            self.c.direction = 0
            self.c.memory_size = self.c.position = 0
            self._buffer = self._source = None

    @property
    def position(self):
        """Bytes moved so far in this window."""
        return self.c.position

    @property
    def writing(self):
        """Whether a window stands open for the guest's writes."""
        return self.c.direction == 2


cdef class FlatView:
    """The regions of a space at one moment, sorted: immutable, so a vCPU reads it without a lock."""

    def __cinit__(self, list regions):
        cdef MemoryRegion region
        cdef int i
        self.regions = regions
        self.c.count = len(regions)
        self.c.bases = <uint64_t *>malloc(max(1, len(regions)) * (sizeof(uint64_t) + sizeof(void *)))
        if self.c.bases == NULL:
            raise MemoryError
        self.c.regions = <region_t **>(self.c.bases + len(regions))
        for i in range(self.c.count):
            region = regions[i]
            self.c.bases[i] = region.c.base
            self.c.regions[i] = &region.c

    def __dealloc__(self):
        free(self.c.bases)


cdef class ViewUser:
    """One that reads an AddressSpace's view without a lock, and is told when there is a newer one."""


cdef class AddressSpace:
    """A space of ``size`` addresses: AddressSpace("pio", 1 << 16), AddressSpace("mmio", 1 << 52)."""

    def __init__(self, name, size):
        self.name = name
        self.size = size
        self.view = FlatView([])
        self.users = []
        self._reserved = []
        self._change = DeviceLock()

    def reserve(self, base, size, name):
        """Nothing can be mapped into this range from now on: who answers there is below us, and no access comes here."""
        with self._change:
            self._reserved.append((base, size, name))

    def add(self, base, region):
        """Map ``region`` at ``base``. ConfigError where it overlaps another (both named) or leaves the space, and where
        RAM or an interrupt controller of KVM's answers: it would never be called.
        """
        if not isinstance(region, MemoryRegion):
            raise KindError(f"{region!r} is no region: make one of it, or map() the device")
        if not is_int(base):
            raise KindError(f"{region.name} at {base!r}: give a whole number for the {self.name} address")
        return self._add(base, region)

    cdef MemoryRegion _add(self, base, MemoryRegion region):
        with self._change:
            if region.c.mapped:
                raise StateError(f"{region!r} is mapped already: unmap it first")
            if base < 0 or base + region.size > self.size:
                raise ConfigError(f"{region.name} at {base:#x}+{region.size:#x} leaves the {self.name} space "
                                  f"of {self.size:#x}")
            for other in self.view.regions:
                if base < other.base + other.size and other.base < base + region.size:
                    raise ConfigError(f"{region.name} at {base:#x}-{base + region.size - 1:#x} overlaps {other.name} at "
                                      f"{other.base:#x}-{other.base + other.size - 1:#x} in {self.name}")
            for start, size, name in self._reserved:
                if base < start + size and start < base + region.size:
                    raise ConfigError(f"{region.name} at {base:#x}-{base + region.size - 1:#x} lies in {name} at "
                                      f"{start:#x}-{start + size - 1:#x}, which answers by itself: map it elsewhere")
            region.c.base = base
            region.c.last = base + region.size - 1
            region.c.mapped = True
            region.space = self
            self._publish(sorted([*self.view.regions, region], key=lambda r: r.base))
        return region

    def map(self, base, size, device, *, name=None, read=None, write=None, valid_sizes=None, impl_sizes=None,
            unaligned=None):
        """``size`` addresses at ``base`` go to ``device``: the MemoryRegion made for it, which ``unmap`` takes."""
        return self.add(base, MemoryRegion(size, device, name=name, read=read, write=write, valid_sizes=valid_sizes,
                                           impl_sizes=impl_sizes, unaligned=unaligned))

    def unmap(self, MemoryRegion region not None):
        """Take ``region`` out. Waits for a handler under way on another thread; when this returns, none will run."""
        with self._change:
            if region.space is not self:
                raise StateError(f"{region!r} is not mapped in {self.name}")
            region.space = None
            # The change lock is not held while waiting for the device's: its handler may itself be mapping something.
            self._publish([r for r in self.view.regions if r is not region])
        with region._lock:
            region.c.mapped = False

    def _publish(self, regions):
        cdef ViewUser user
        self.view = FlatView(regions)
        for user in self.users:
            # Pairs with the exchange in CpuExec.refresh_views: the view is in place before the flag is seen.
            atomic_store(&user.stale, 1, ATOMIC_SEQ_CST)

    cdef FlatView current(self):
        # Under the lock: without the GIL, ``view`` could be replaced and freed between its load and the reference to it.
        with self._change:
            return self.view

    cdef int attach(self, ViewUser user) except -1:
        with self._change:
            self.users.append(user)
        return 0

    cdef int detach(self, ViewUser user) except -1:
        with self._change:
            if user in self.users:
                self.users.remove(user)
        return 0

    @property
    def regions(self):
        """The mapped regions, by address."""
        return list(self.current().regions)

    def find(self, addr):
        """The region at ``addr``, or None."""
        cdef MemoryRegion region
        # By the C fields: a region that is being unmapped meanwhile has no ``base`` any more.
        for region in self.current().regions:
            if region.c.base <= addr <= region.c.last:
                return region
        return None

    def read(self, addr, size):
        """A read of 1, 2, 4 or 8 bytes as a vCPU would do it. Raises what a device raises."""
        cdef FlatView view = self.current()
        cdef uint64_t value = ones(self._check(addr, size))
        if bus_read(&view.c, addr, size, &value, NULL) != BUS_OK:
            raised()
        return value & ones(size)

    def write(self, addr, size, value):
        """A write of 1, 2, 4 or 8 bytes as a vCPU would do it."""
        cdef FlatView view = self.current()
        self._check(addr, size)
        if bus_write(&view.c, addr, size, value & ones(size), NULL) != BUS_OK:
            raised()

    def _check(self, addr, size):
        if size not in (1, 2, 4, 8) or not 0 <= addr <= self.size - size:
            raise ValueError(f"{self.name}: no access of {size} bytes at {addr:#x}")
        return size

    def __repr__(self):
        return f"<AddressSpace {self.name}: {len(self.view.regions)} regions>"
