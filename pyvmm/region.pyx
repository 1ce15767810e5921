"""The kinds of region: who answers at a range of ports or of guest-physical addresses, and how.

A MemoryRegion calls the handlers of a Python device. A RegisterRegion does so too, but for registers that the device
lets it answer for a while. The others answer by themselves: LatchRegion, SinkRegion, FifoRegion, BufferRegion,
EventRegion. address_space.pyx puts them where a guest finds them, and splits what a region does not take as it is.

An access that a region takes goes through ``region_access`` (region.pxd), for the run loop and for the bus alike.
"""

from cpython.exc cimport PyErr_Fetch, PyErr_NormalizeException, PyErr_Restore
from cpython.method cimport PyMethod_Check
from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from pyvmm.bus cimport (BUS_OK, BUS_RAISED, REGION_BUFFER, REGION_EVENT, REGION_FIFO, REGION_LATCH,
                        REGION_PYTHON, REGION_SINK, SHORTCUT_GATHER, SHORTCUT_LATCH, PY_VECTORCALL_ARGUMENTS_OFFSET,
                        Py_DECREF, PyEval_RestoreThread, PyEval_SaveThread, PyObject_Vectorcall, PyThreadState, access_t,
                        load, ones, region_t, store, take_lock, write)
from pyvmm.device cimport DeviceLock, pthread_mutex_unlock

from pyvmm.device import Device
from pyvmm.errors import ConfigError, KindError, StateError, add_access_note

cdef extern from "Python.h" nogil:
    PyObject *PyBytes_FromStringAndSize(const char *, Py_ssize_t)
    Py_buffer *PyMemoryView_GET_BUFFER(object)


# -- what answers without Python ---------------------------------------------------------------------------------------

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


cdef int sink_write(region_t *region, access_t *access) noexcept nogil:
    cdef int i, rc = BUS_OK
    cdef uint8_t byte
    for i in range(access.size):
        byte = <uint8_t>(access.value >> (8 * i))
        region.memory[region.position] = byte
        region.position += 1
        if byte == 10 or region.position == region.memory_size:
            rc = call_end(region, True, access.ts)
            if rc != BUS_OK:
                break       # nothing may be called with an exception pending
    return rc


cdef int fifo_access(region_t *region, access_t *access) noexcept nogil:
    """Move ``size`` bytes through the window. Outside of one, or past its end, reads are ones and writes are lost."""
    cdef uint64_t left = region.memory_size - region.position
    if region.direction != (2 if access.is_write else 1) or left == 0:
        if not access.is_write:
            access.value = ones(access.size)
        return BUS_OK
    if left > <uint64_t>access.size:
        left = access.size
    if access.is_write:
        memcpy(region.memory + region.position, &access.value, left)
    else:
        access.value = ones(access.size)
        memcpy(&access.value, region.memory + region.position, left)
    region.position += left
    if region.position == region.memory_size:
        # Closed before the call: the device may open the next window from inside it.
        region.direction = 0
        return call_end(region, False, access.ts)
    return BUS_OK


cdef int fifo_string(region_t *region, uint8_t *data, uint32_t count, access_t *access) noexcept nogil:
    """``count`` units of ``size`` bytes through the window, as fifo_access each, but copied in one go where they fit."""
    cdef uint64_t left, units
    cdef int size = access.size
    cdef int rc = BUS_OK
    take_lock(region, access.ts)
    while count and rc == BUS_OK:
        if not region.mapped:
            # Before this access, or by the call at a window's end: nobody answers for the rest.
            if not access.is_write:
                memset(data, 0xff, <size_t>count * size)
            break
        left = region.memory_size - region.position
        units = left // size if region.direction == (2 if access.is_write else 1) else 0
        if units == 0:
            # No window, or its last bytes are fewer than a unit.
            access.value = load(data, size)
            rc = fifo_access(region, access)
            if not access.is_write:
                store(data, size, access.value)
            units = 1
        else:
            if units > count:
                units = count
            if access.is_write:
                memcpy(region.memory + region.position, data, units * size)
            else:
                memcpy(data, region.memory + region.position, units * size)
            region.position += units * size
            if region.position == region.memory_size:
                region.direction = 0
                rc = call_end(region, False, access.ts)
        region.count += units
        data += units * size
        count -= <uint32_t>units
    pthread_mutex_unlock(region.lock)
    if rc == BUS_RAISED:
        handler_raised(region, access)
    return rc


cdef bint event_takes(region_t *region, access_t *access) noexcept nogil:
    """Whether KVM's ioeventfd would signal for it."""
    if region.event_size and (access.size != region.event_size or access.offset != 0):
        return False
    return not region.event_match or access.value == region.value


cdef int compiled_access(region_t *region, access_t *access) noexcept nogil:
    """A region that needs no Python to decide."""
    cdef int rc = BUS_OK
    cdef uint64_t one = 1
    take_lock(region, access.ts)
    if not region.mapped:
        pthread_mutex_unlock(region.lock)
        access.value = ones(access.size)
        return BUS_OK
    region.count += 1
    if region.kind == REGION_LATCH:
        if not access.is_write:
            access.value = region.value & ones(access.size)
        elif region.writable:
            region.value = access.value
    elif region.kind == REGION_SINK:
        if access.is_write:
            rc = sink_write(region, access)
        else:
            access.value = region.value & ones(access.size)
    elif region.kind == REGION_FIFO:
        rc = fifo_access(region, access)
    elif region.kind == REGION_EVENT:
        if not access.is_write:
            access.value = 0
        elif event_takes(region, access):
            # A full counter means the reader has a wake-up pending anyway.
            write(region.fd, &one, 8)
    elif access.offset >= region.memory_size or <uint64_t>access.size > region.memory_size - access.offset:
        # Moved by another thread between lookup and lock: that access came too late.
        access.value = ones(access.size)
    elif access.is_write:
        store(region.memory + access.offset, access.size, access.value)
    else:
        access.value = load(region.memory + access.offset, access.size)
    pthread_mutex_unlock(region.lock)
    if rc != BUS_OK:
        handler_raised(region, access)
    return rc


cdef void handler_raised(region_t *region, access_t *access) noexcept with gil:
    """The error indicator is set: have the exception say which handler raised it, and for which access."""
    cdef PyObject *kind
    cdef PyObject *value
    cdef PyObject *where
    PyErr_Fetch(&kind, &value, &where)
    PyErr_NormalizeException(&kind, &value, &where)
    try:
        # Of what a late region has passed on it is told already.
        if not isinstance(<object>region.owner, LateRegion) or (<LateRegion>region.owner).space is not None:
            add_access_note(<object>value,
                            (<MemoryRegion>region.owner)._handler(access.offset, access.size, access.is_write))
    except BaseException:
        pass    # one that takes no notes
    PyErr_Restore(kind, value, where)


# -- the Python side -------------------------------------------------------------------------------------------------

cdef int raised() except -1:
    """A handler left the error indicator set: let Cython raise it."""
    return -1


cdef object LONGEST = 1 << 64    # no region is so long
cdef object SIZES = frozenset([(a, b) for a in (1, 2, 4, 8) for b in (1, 2, 4, 8) if a <= b])


cdef int check_sizes(str what, sizes) except -1:
    # A machine makes some thirty regions on the way to its first instruction: the usual is looked at once.
    if type(sizes) is tuple and sizes in SIZES and type((<tuple>sizes)[0]) is int and type((<tuple>sizes)[1]) is int:
        return 0
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or not all(is_int(n) and n in (1, 2, 4, 8) for n in sizes) \
            or sizes[0] > sizes[1]:
        raise ConfigError(f"{what}={sizes!r}: give (min, max) out of 1, 2, 4 and 8 bytes")
    return 0


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

    cdef int _set_up(self, size, name, lock, valid_sizes, impl_sizes, bint unaligned) except -1:
        check_sizes("valid_sizes", valid_sizes)
        check_sizes("impl_sizes", impl_sizes)
        if not isinstance(name, str):
            raise KindError(f"name={name!r}: give a string")
        if type(size) is not int and not is_int(size):
            raise KindError(f"{name}: a region of {size!r} bytes: give a whole number")
        if size <= 0 or size >= LONGEST:
            raise ConfigError(f"{name}: a region of {size} bytes: give at least 1, and less than 2**64")
        if impl_sizes[0] > valid_sizes[0] and size % impl_sizes[0]:
            raise ConfigError(f"{name}: {size} bytes is no multiple of the smallest implemented access, {impl_sizes[0]}")
        self.name = name
        self.size = size
        self.eventfds = self.coalesced = ()
        self.c.owner = <PyObject *>self
        self._lock = lock
        self.c.lock = &(<DeviceLock?>lock).mutex
        self.c.valid_min, self.c.valid_max = valid_sizes[0], valid_sizes[1]
        self.c.impl_min, self.c.impl_max = impl_sizes[0], impl_sizes[1]
        self.c.unaligned = unaligned
        self.c.fd = -1
        cdef int n = 1
        while n <= 8:
            if n >= self.c.valid_min and n >= self.c.impl_min and n <= self.c.valid_max and n <= self.c.impl_max:
                self.c.direct_sizes |= 1 << n
            n *= 2
        return 0

    cdef int _set_handlers(self, read, write) except -1:
        # A method of the device is called as its plain function with the device as first argument: one object less
        # to touch while the caches are cold.
        device = self.device
        if PyMethod_Check(read) and read.__self__ is device and PyMethod_Check(write) and write.__self__ is device:
            read, write = read.__func__, write.__func__
            self.c.device = <PyObject *>device
        self._read = read
        self._write = write
        self.c.read_func = <PyObject *>read
        self.c.write_func = <PyObject *>write
        return 0

    def add_eventfd(self, fd, *, offset=0, size=0, datamatch=None):
        """A write of ``size`` bytes (0: any) at ``offset``, of the value ``datamatch`` where that is given, signals the
        eventfd ``fd``: before the region is mapped, any number of them.

        Whoever listens to the space may see to it, and the region does not hear of the write (KVM's ioeventfd does). It
        has to signal by itself what comes to it all the same. The descriptor stays open while the region is mapped.
        """
        if not is_int(fd) or fd < 0:
            raise KindError(f"{self.name}: fd={fd!r}: give the descriptor of an eventfd")
        if not is_int(offset) or not 0 <= offset < self.size:
            raise ConfigError(f"{self.name}: an eventfd at offset {offset!r}: give one inside its {self.size} bytes")
        if not is_int(size) or size not in (0, 1, 2, 4, 8) or (size == 0 and datamatch is not None):
            raise ConfigError(f"{self.name}: an eventfd for writes of {size!r} bytes: give 1, 2, 4 or 8, or without a "
                              "datamatch 0, which is any")
        if datamatch is not None and (not is_int(datamatch) or not 0 <= datamatch <= ones(size)):
            raise ConfigError(f"{self.name}: datamatch={datamatch!r}: give a number of {size} bytes")
        for other_offset, other_size, other_match, other_fd in self.eventfds:
            if offset == other_offset and (not size or not other_size or size == other_size and (
                    datamatch is None or other_match is None or datamatch == other_match)):
                raise ConfigError(f"{self.name}: eventfds {other_fd} and {fd} at offset {offset:#x} want the same writes")
        self._not_mapped("eventfds")
        self.eventfds = (*self.eventfds, (offset, size, datamatch, fd))

    def add_coalesced(self, offset=0, size=None):
        """Writes to ``size`` bytes from ``offset`` on may be gathered, and come late, but in order and before whatever
        the guest does next that leaves KVM: before the region is mapped.

        ``size`` may reach past the end of the region, for the accesses of a wide one.
        """
        size = self.size - offset if size is None else size
        if not 0 <= offset < self.size or size < 1:
            raise ConfigError(f"{self.name}: {size} bytes at offset {offset} can't be gathered: give a part of the region")
        self._not_mapped("gathered writes")
        self.coalesced = (*self.coalesced, (offset, size))

    def _not_mapped(self, what):
        if self.space is not None:
            raise StateError(f"{self!r} is mapped: give it its {what} before that, listeners are told when it comes")

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
    def kept(self):
        """What ``take`` would give: bytes. Assign what a saved state has; ValueError where there is no room for it."""
        return self.c.memory[:self.c.position]

    @kept.setter
    def kept(self, bytes data):
        if <uint64_t>len(data) > self.c.memory_size:
            raise ValueError(f"{self.name}: {len(data)} bytes were kept, there is room for {self.c.memory_size}")
        memcpy(self.c.memory, <const char *>data, len(data))
        self.c.position = len(data)

    @property
    def gathering(self):
        """Whether writes are being kept."""
        return bool(self.c.shortcuts & SHORTCUT_GATHER)


cdef class LateRegion(MemoryRegion):
    """Where a device will be that is made when somebody wants it (late.py). ``arrive()`` makes it and maps it in this
    one's place; the access that came here goes to it there, and so does one that was on its way here meanwhile.
    """

    def __init__(self, size, name, lock, arrive):
        self._set_up(size, name, lock, (1, 8), (1, 8), True)
        self.c.kind = REGION_PYTHON
        self._end = arrive
        self._read, self._write = type(self)._pass_read, type(self)._pass_write
        self.c.device = <PyObject *>self
        self.c.read_func = <PyObject *>self._read
        self.c.write_func = <PyObject *>self._write

    def arrive(self):
        """Have the device there. Returns when it is."""
        self._end()

    def _pass_read(self, offset, size):
        return self._arrived().read(self.c.base + offset, size)

    def _pass_write(self, offset, size, value):
        self._arrived().write(self.c.base + offset, size, value)

    cdef object _arrived(self):
        """The space, in which the device is by now."""
        self._end()
        if self._home is None:
            raise StateError(f"{self.name} has not come to its place: a listener has wanted it while it was told of one")
        return self._home


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
        cdef access_t access = access_t(offset=0, value=0, size=1, is_write=True, ts=NULL)
        with self._lock:
            if self.c.position and call_end(&self.c, True, NULL) != BUS_OK:
                handler_raised(&self.c, &access)
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
    """A write adds one to the eventfd ``fd``; reads give zero. In a machine with KVM its first address is an ioeventfd,
    which saves the exit as well, wherever the region is mapped.

    ``write_size`` has only writes of that many bytes do it, to the first address; ``datamatch`` only those of a value.
    Others are lost.
    """

    def __init__(self, size, fd, *, write_size=0, datamatch=None, name="event"):
        self._set_up(size, name, DeviceLock(), (1, 8), (1, 8), True)
        self.add_eventfd(fd, size=write_size, datamatch=datamatch)
        self.c.kind = REGION_EVENT
        self.c.fd = fd
        self.c.event_size = write_size
        self.c.event_match = datamatch is not None
        self.c.value = 0 if datamatch is None else datamatch


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
