"""AddressSpace, used twice in a machine: port I/O and MMIO.

The semantics are those of QEMU's docs/devel/memory.rst: a region states which access sizes are valid on the bus and
which its implementation takes; the bus splits, widens and aligns in between (``access_with_adjusted_size``). An
address nobody claims reads as all ones and swallows writes. An aligned access belongs whole to the region that its first
byte is in, or to nobody; only an unaligned one is split over several. Regions never overlap: adding one that would
names both. What a region answers is region.pyx's.

vCPU threads look regions up without the GIL in an immutable FlatView. A change builds a new view and tells every
vCPU that its own is stale; each takes the new one at its next exit. ``unmap`` waits for a handler under way, and none runs
after it has returned.

Whoever has to follow what is mapped (KVM's ioeventfds do) is a SpaceListener.
"""

from cpython.object cimport PyObject
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc

from pyvmm.atomic cimport ATOMIC_SEQ_CST, atomic_store
from pyvmm.bus cimport BUS_OK, access_t, flat_view_find, flat_view_t, ones, region_t, take_lock
from pyvmm.device cimport DeviceLock, pthread_mutex_unlock
from pyvmm.region cimport LateRegion, MemoryRegion, region_access

from pyvmm.errors import ConfigError, KindError, StateError


# -- accesses that no region takes as they are -----------------------------------------------------------------------------

cdef int adjusted_access(region_t *region, access_t *access) noexcept nogil:
    """QEMU's access_with_adjusted_size: ``size`` bytes by accesses between impl_min and impl_max.

    Narrower than impl_min: the aligned container is read and, for a write, merged and written back; an unaligned
    access may lie in two of them. All pieces run under one hold of the lock, so another vCPU never sees half an access.
    """
    cdef access_t part = access[0]
    cdef int size = access.size, step = size, i = 0, n, shift, rc = BUS_OK
    cdef uint64_t result = 0, mask
    if step < region.impl_min:
        step = region.impl_min
    elif step > region.impl_max:
        step = region.impl_max
    if step == size:
        return region_access(region, access)
    part.size = step
    take_lock(region, access.ts)
    if step < size:
        while i < size and rc == BUS_OK:
            part.offset = access.offset + i
            part.value = (access.value >> (8 * i)) & ones(step)
            rc = region_access(region, &part)
            result |= (part.value & ones(step)) << (8 * i)
            i += step
    else:
        while i < size and rc == BUS_OK:
            part.offset = (access.offset + i) & ~(<uint64_t>step - 1)
            part.is_write = False
            n = step - <int>(access.offset + i - part.offset)
            if n > size - i:
                n = size - i
            shift = 8 * <int>(access.offset + i - part.offset)
            rc = region_access(region, &part)
            if rc == BUS_OK and access.is_write:
                mask = ones(n) << shift
                part.value = (part.value & ~mask) | (((access.value >> (8 * i)) << shift) & mask)
                part.is_write = True
                rc = region_access(region, &part)
            result |= ((part.value >> shift) & ones(n)) << (8 * i)
            i += n
    pthread_mutex_unlock(region.lock)
    if not access.is_write:
        access.value = result
    return rc


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


cdef int bus_access(flat_view_t *view, uint64_t addr, access_t *access) noexcept nogil:
    """An access that no handler takes as it is.

    An aligned one belongs whole to the region of its first byte, or to nobody: 0xcf8's dword is never a write to 0xcf9
    (QEMU's system/physmem.c, address_space_translate_internal, says why it does not clamp). What reaches past the end of
    that region is nobody's. Only an unaligned access is split into aligned ones, each with an owner of its own.
    """
    cdef region_t *region = NULL
    cdef access_t part = access[0]
    cdef uint64_t result = 0
    cdef int size = access.size, done = 0, owned = 0, rc
    while done < size:
        if done >= owned:
            owned = done + aligned_size(addr + done, size - done)
            # Past the top of 64 bits there is nothing: an access does not wrap around to address 0.
            region = flat_view_find(view, addr + done) if addr + done >= addr else NULL
        elif region != NULL and addr + done - region.base > region.last - region.base:
            region = NULL
        part.size = owned - done if region == NULL else piece_size(region, addr + done, size - done)
        part.value = (access.value >> (8 * done)) & ones(part.size) if access.is_write else ones(part.size)
        if region != NULL and part.size >= region.valid_min:
            part.offset = addr + done - region.base
            rc = adjusted_access(region, &part)
            if rc != BUS_OK:
                return rc
        result |= (part.value & ones(part.size)) << (8 * done)
        done += part.size
    if not access.is_write:
        access.value = result
    return BUS_OK


# -- the space -------------------------------------------------------------------------------------------------------------

cdef int raised() except -1:
    """A handler left the error indicator set: let Cython raise it."""
    return -1


cdef bint is_int(value) except -1:
    return isinstance(value, int) and not isinstance(value, bool)


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


class SpaceListener:
    """One that follows what a guest meets at its addresses: derive from it, and have the methods that matter.

    ``AddressSpace.listen`` and ``MemoryMap.listen`` tell at once what is there, and from then on each change, piece by
    piece, with a ``commit`` at its end. What comes is told to the listeners in the order in which they came, what goes
    in the other order; of a region, while it is mapped. One change at a time is told, on the thread that makes it.

    No lock of a device is taken for it, and a listener takes none: a device's handler may be what makes the change, or
    waits to make another one. Nor does a listener change what it listens to. One that raises undoes an ``add`` (what
    was told of it is taken back) and holds up nothing else; what it raised comes out of the call that made the change.
    """

    def region_add(self, space, region):
        """``region`` is mapped in ``space``, at ``region.base``."""

    def region_del(self, space, region):
        """It is about to go."""

    def eventfd_add(self, space, address, size, datamatch, fd):
        """A write of ``size`` bytes (0: any) at ``address``, of ``datamatch`` where that is not None, signals ``fd``."""

    def eventfd_del(self, space, address, size, datamatch, fd):
        """No longer."""

    def coalesced_add(self, space, address, size):
        """Writes to these addresses may be gathered."""

    def coalesced_del(self, space, address, size):
        """No longer."""

    def section_add(self, section):
        """From a MemoryMap: ``section`` shows as memory."""

    def section_del(self, section):
        """It does no more. Told before what takes its place comes."""

    def commit(self):
        """The change is complete."""


class Held:
    """``with`` it: hold() at its beginning, release() at its end."""

    __slots__ = ("_hold", "_release")

    def __init__(self, hold, release):
        self._hold = hold
        self._release = release

    def __enter__(self):
        self._hold()

    def __exit__(self, *exc):
        self._release()


cdef dict _own_methods = {}     # by class


cdef tuple own_methods(kind):
    """The methods of a listener that its class has of its own."""
    found = _own_methods.get(kind)
    if found is None:
        names = ("region_add", "region_del", "eventfd_add", "eventfd_del", "coalesced_add", "coalesced_del", "commit")
        found = _own_methods[kind] = tuple([name for name in names
                                            if getattr(kind, name) is not getattr(SpaceListener, name)])
    return found


cdef class _Ear:
    """A listener and those of its methods that it has of its own: the others are not called."""
    cdef object listener
    cdef dict methods
    cdef bint owes_commit

    def __cinit__(self, listener):
        self.listener = listener
        self.methods = {name: getattr(listener, name) for name in own_methods(type(listener))}

    cdef tell(self, str name, tuple arguments):
        method = self.methods.get(name)
        if method is not None:
            self.owes_commit = True
            method(*arguments)

    cdef commit(self):
        if self.owes_commit:
            self.owes_commit = False
            method = self.methods.get("commit")
            if method is not None:
                method()


cdef list pieces(AddressSpace space, MemoryRegion region):
    """What there is to tell of a mapped region: (which methods, their arguments)."""
    cdef list told = [("region", (space, region))]
    for offset, size, datamatch, fd in region.eventfds:
        told.append(("eventfd", (space, region.c.base + offset, size, datamatch, fd)))
    for offset, size in region.coalesced:
        told.append(("coalesced", (space, region.c.base + offset, size)))
    return told


cdef class AddressSpace:
    """A space of ``size`` addresses: AddressSpace("pio", 1 << 16), AddressSpace("mmio", 1 << 52)."""

    def __init__(self, name, size):
        self.name = name
        self.size = size
        self.view = FlatView([])
        self.users = []
        self._reserved = []
        self._change = DeviceLock()
        self._ears = []
        self._telling = DeviceLock()
        self._stand_ins = None
        self._coming = None

    def reserve(self, base, size, name):
        """Nothing can be mapped into this range from now on: who answers there is below us, and no access comes here."""
        self._change.acquire()
        try:
            self._reserved.append((base, size, name))
        finally:
            self._change.release()

    def add(self, base, region):
        """Map ``region`` at ``base``. ConfigError where it overlaps another (both named) or leaves the space, and where
        RAM or an interrupt controller of KVM's answers: it would never be called.

        What a listener raises comes out here, and the region is not mapped then.
        """
        self.add_all(((base, region),))
        return region

    def add_all(self, placed):
        """``add`` of each (base, region), in one change: all of them or none."""
        cdef MemoryRegion mapped
        cdef list new = []
        error = None
        for base, region in placed:
            if not isinstance(region, MemoryRegion):
                raise KindError(f"{region!r} is no region: make one of it, or map() the device")
            if not is_int(base):
                raise KindError(f"{region.name} at {base!r}: give a whole number for the {self.name} address")
            new.append(region)
        self._have_all()
        self._begin()
        try:
            self._put_in(placed)
            if self._ears and self._concerned(new):
                error = self._tell_new(self._ears, new)
                if error is not None:
                    self._take_out(new)
        finally:
            self._end()
        if error is not None:
            for mapped in new:
                self._wait_for_handlers(mapped)
            raise error

    cdef _put_in(self, placed):
        cdef list regions, done = []
        cdef MemoryRegion region
        self._change.acquire()
        try:
            regions = list(self._mapped())
            for base, region in placed:
                self._insert(regions, base, region)
                done.append(region)
            self._publish(regions)
        except BaseException:
            for region in done:
                region.c.mapped = False
                region.space = None
            raise
        finally:
            self._change.release()

    cdef _insert(self, list regions, base, MemoryRegion region):
        """Into ``regions``, where there is room for it at ``base``."""
        cdef MemoryRegion other
        cdef uint64_t first, last
        cdef int at = 0
        if region.c.mapped:
            raise StateError(f"{region!r} is mapped already: unmap it first")
        if base < 0 or base + region.size > self.size:
            raise ConfigError(f"{region.name} at {base:#x}+{region.size:#x} leaves the {self.name} space of "
                              f"{self.size:#x}")
        first = base
        last = first + region.size - 1
        for other in regions:
            if first <= other.c.last and other.c.base <= last:
                raise ConfigError(f"{region.name} at {base:#x}-{base + region.size - 1:#x} overlaps {other.name} at "
                                  f"{other.base:#x}-{other.base + other.size - 1:#x} in {self.name}")
            at += other.c.base < first
        for start, size, name in self._reserved:
            if start <= last and first < start + size:
                raise ConfigError(f"{region.name} at {base:#x}-{base + region.size - 1:#x} lies in {name} at "
                                  f"{start:#x}-{start + size - 1:#x}, which answers by itself: map it elsewhere")
        region.c.base = first
        region.c.last = last
        region.c.mapped = True
        region.space = self
        regions.insert(at, region)

    def map(self, base, size, device, *, name=None, read=None, write=None, valid_sizes=None, impl_sizes=None,
            unaligned=None):
        """``size`` addresses at ``base`` go to ``device``: the MemoryRegion made for it, which ``unmap`` takes."""
        return self.add(base, MemoryRegion(size, device, name=name, read=read, write=write, valid_sizes=valid_sizes,
                                           impl_sizes=impl_sizes, unaligned=unaligned))

    def unmap(self, MemoryRegion region not None):
        """Take ``region`` out. Waits for a handler under way on another thread; when this returns, none will run.

        What a listener raises comes out at the end.
        """
        error = None
        self._begin()
        try:
            if region.space is not self:
                raise StateError(f"{region!r} is not mapped in {self.name}")
            if self._ears:
                # Before the region goes: what KVM does no longer, the region still does.
                error = self._tell_gone(self._told(self._ears, [region]))
            self._take_out([region])
        finally:
            self._end()
        self._wait_for_handlers(region)
        if error is not None:
            raise error

    def unmap_all(self):
        """As ``unmap`` of every region, in one change."""
        cdef MemoryRegion region
        cdef list regions
        error = None
        self._begin()
        try:
            regions = self._mapped()
            if self._ears and self._concerned(regions):
                error = self._tell_gone(self._told(self._ears, regions))
            self._take_out(regions)
            self._stand_ins = None
        finally:
            self._end()
        for region in regions:
            self._wait_for_handlers(region)
        if error is not None:
            raise error

    def replace(self, list late, list regions):
        """Each of ``late``, which are LateRegions mapped here, makes room for that of ``regions`` which has its place in
        the list: in one change, so that no access finds nobody. What a listener raises comes out at the end.
        """
        cdef MemoryRegion old, new
        cdef list placed
        error = None
        self._begin()
        try:
            told = self._ears and self._concerned(regions)
            if told:
                error = self._tell_gone(self._told(self._ears, late))
            self._change.acquire()
            try:
                placed = list(self._mapped())
                for old, new in zip(late, regions):
                    placed[placed.index(old)] = new
                    new.c.base, new.c.last, new.c.mapped, new.space = old.c.base, old.c.last, True, self
                    # It stays ``mapped``: accesses that are on their way to it go on from there.
                    (<LateRegion?>old)._home, old.space = self, None
                self._publish(placed)
            finally:
                self._change.release()
            if told:
                error = self._tell_new(self._ears, regions) or error
        finally:
            self._end()
        if error is not None:
            raise error

    cdef int _wait_for_handlers(self, MemoryRegion region) except -1:
        # No lock of ours is held while waiting for the device's: its handler may itself be mapping something.
        region._lock.acquire()
        region.c.mapped = False
        region._lock.release()
        return 0

    cdef _take_out(self, list gone):
        cdef MemoryRegion region
        self._change.acquire()
        try:
            for region in gone:
                region.space = None
            self._publish([region for region in self._mapped() if region.space is not None])
        finally:
            self._change.release()

    # -- where nothing is mapped before somebody looks (late.py) ---------------------------------------------------------

    def stand_in(self, str name, DeviceLock lock not None, arrive):
        """A LateRegion is wherever nothing is mapped, at reserved ranges too: an access there calls ``arrive``, which has
        all come that is to be here, and so does whoever asks what there is. ``gather`` begins that, ``settle`` ends it.
        """
        cdef MemoryRegion there
        cdef list regions = []
        cdef uint64_t free = 0
        self._change.acquire()
        try:
            if self._stand_ins is not None:
                raise StateError(f"{name} is to stand for all of {self.name}: something else does already")
            self._stand_ins = []
            for there in self.view.regions:
                if free < there.c.base:
                    regions.append(self._stands(free, there.c.base - 1, name, lock, arrive))
                regions.append(there)
                free = there.c.last + 1
            if free < self.size:
                regions.append(self._stands(free, self.size - 1, name, lock, arrive))
            self._publish(regions)
        finally:
            self._change.release()

    cdef LateRegion _stands(self, uint64_t first, uint64_t last, str name, DeviceLock lock, arrive):
        cdef LateRegion region = LateRegion(last - first + 1, name, lock, arrive)
        region.c.base, region.c.last, region.c.mapped, region.space = first, last, True, self
        # An access that begins in it and reaches over what is mapped behind is for the bus to split, when all is there.
        region.c.wide = last != self.size - 1
        self._stand_ins.append(region)
        return region

    def gather(self):
        """What this thread maps from now on shows with ``settle``, all of it in one change."""
        self._change.acquire()
        try:
            self._comer = PyThread_get_thread_ident()
            self._coming = [region for region in self.view.regions if region not in self._stand_ins]
        finally:
            self._change.release()

    def settle(self):
        """What has been gathered is in the stand-ins' places."""
        cdef list regions
        cdef LateRegion stood
        self._change.acquire()
        try:
            regions, self._coming = self._coming, None
            self._comer = 0
            # As in ``replace``: they stay ``mapped``, for accesses that are on their way to them.
            for stood in self._stand_ins:
                stood._home, stood.space = self, None
            self._stand_ins = None
            self._publish(regions)
        finally:
            self._change.release()

    def scatter(self):
        """Instead of ``settle``: nothing of it is there, and the stand-ins stay."""
        self._change.acquire()
        try:
            self._coming, self._comer = None, 0
        finally:
            self._change.release()

    cdef bint _comes_here(self) noexcept:
        """Whether the caller is the thread that gathers."""
        return self._coming is not None and self._comer == PyThread_get_thread_ident()

    cdef int _have_all(self) except -1:
        """What a stand-in stands for is there from now on; not for the thread that brings it."""
        if self._stand_ins and not self._comes_here():
            (<LateRegion>self._stand_ins[0]).arrive()
        return 0

    cdef list _mapped(self):
        return self.view.regions if self._coming is None else self._coming

    cdef _publish(self, list regions):
        cdef ViewUser user
        if self._coming is not None:
            self._coming = regions
            return
        self.view = FlatView(regions)
        for user in self.users:
            # Pairs with the exchange in CpuExec._take_views: the view is in place before the flag is seen.
            atomic_store(&user.stale, 1, ATOMIC_SEQ_CST)

    # -- listeners -----------------------------------------------------------------------------------------------------

    def listen(self, listener):
        """Tell ``listener``, a SpaceListener, what is mapped, and from now on what changes. What it raises comes out
        here, and it does not listen then.
        """
        cdef MemoryRegion region
        if not isinstance(listener, SpaceListener):
            raise KindError(f"{listener!r} is no listener: derive its class from pyvmm.address_space.SpaceListener")
        ear = _Ear(listener)
        self._have_all()
        self._begin()
        try:
            error = self._tell_new([ear], self._mapped())
            if error is None:
                self._ears.append(ear)
        finally:
            self._end()
        if error is not None:
            raise error

    def unlisten(self, listener):
        """Tell it that everything goes, and then nothing more. StateError where it does not listen."""
        cdef _Ear ear
        self._begin()
        try:
            mine = [ear for ear in self._ears if ear.listener is listener]
            if not mine:
                raise StateError(f"{listener!r} does not listen to {self.name}")
            self._ears.remove(mine[0])
            error = self._tell_gone(self._told(mine[:1], self._mapped()))
        finally:
            self._end()
        if error is not None:
            raise error

    @property
    def held(self):
        """``with space.held:`` what changes is told as ever, but the commit comes at the end of the outermost of these.

        For while no vCPU runs: only where the changes end up counts then.
        """
        return Held(self._hold, self._release)

    def _hold(self):
        self._begin()
        self._holders += 1
        self._end()

    def _release(self):
        self._begin()
        self._holders -= 1
        error = self._commit(self._ears)
        self._end()
        if error is not None:
            raise error

    cdef int _begin(self) except -1:
        """One change at a time, so that listeners hear of them in their order. The lock is recursive, a change is not."""
        self._telling.acquire()
        if self._changer:
            self._telling.release()
            raise StateError(f"a listener of {self.name} changes it while it is told of a change: do it afterwards")
        self._changer = PyThread_get_thread_ident()
        return 0

    cdef int _end(self) except -1:
        self._changer = 0
        self._telling.release()
        return 0

    cdef bint _changed_here(self) noexcept:
        """Whether a listener asks, in the middle of a change: no other one can begin."""
        return self._changer == PyThread_get_thread_ident()

    cdef bint _concerned(self, list regions) except -1:
        """Whether any listener wants to hear of these: most have neither eventfds nor gathered writes."""
        cdef MemoryRegion region
        cdef _Ear ear
        for region in regions:
            if region.eventfds or region.coalesced:
                return True
        for ear in self._ears:
            if "region_add" in ear.methods:
                return True
        return False

    cdef list _told(self, list ears, list regions):
        """(ear, which methods, their arguments) of all that there is to tell, in the order of coming."""
        return [(ear, what, arguments) for ear in ears for region in regions
                for what, arguments in pieces(self, region)]

    cdef object _tell_new(self, list ears, list regions):
        """All of them, or nobody: what the first one to fail raised, when all that was told has been taken back."""
        cdef _Ear ear
        cdef list done = []
        error = None
        try:
            for each in self._told(ears, regions):
                ear, what, arguments = each
                ear.tell(what + "_add", arguments)
                done.append(each)
        except BaseException as raised:
            error = raised
        late = self._commit(ears)
        error = error or late
        if error is not None:
            self._tell_gone(done)
        return error

    cdef object _tell_gone(self, list told):
        """All of them, the last one told first: what the first one to fail raised, or None."""
        cdef _Ear ear
        cdef list ears = []
        error = None
        for ear, what, arguments in reversed(told):
            if ear not in ears:
                ears.append(ear)
            try:
                ear.tell(what + "_del", arguments)
            except BaseException as raised:
                error = error or raised
        late = self._commit(ears)
        return error or late

    cdef object _commit(self, list ears):
        """What the first one to fail raised, or None."""
        cdef _Ear ear
        error = None
        if not self._holders:
            for ear in ears:
                try:
                    ear.commit()
                except BaseException as raised:
                    error = error or raised
        return error

    cdef FlatView current(self):
        # Under the lock: without the GIL, ``view`` could be replaced and freed between its load and the reference to it.
        cdef FlatView view
        self._change.acquire()
        view = FlatView(self._coming) if self._comes_here() else self.view
        self._change.release()
        return view

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
        """The mapped regions, by address. Who asks sees all devices, also those that nobody has wanted yet."""
        if not self._changed_here():
            self._have_all()
        for region in self.current().regions:
            if isinstance(region, LateRegion) and not self._changed_here():
                region.arrive()
        return list(self.current().regions)

    def find(self, addr):
        """The region at ``addr``, or None."""
        cdef MemoryRegion region
        # By the C fields: a region that is being unmapped meanwhile has no ``base`` any more.
        for region in self.current().regions:
            if region.c.base <= addr <= region.c.last:
                if isinstance(region, LateRegion) and region.space is self and not self._changed_here():
                    region.arrive()
                    return self.find(addr)
                return region
        return None

    def read(self, addr, size):
        """A read of 1, 2, 4 or 8 bytes as a vCPU would do it. Raises what a device raises."""
        self._check(addr, size)
        return self._access(addr, size, ones(size), False) & ones(size)

    def write(self, addr, size, value):
        """A write of 1, 2, 4 or 8 bytes as a vCPU would do it."""
        self._check(addr, size)
        self._access(addr, size, value & ones(size), True)

    cdef object _access(self, uint64_t addr, int size, uint64_t value, bint is_write):
        cdef FlatView view = self.current()
        cdef access_t access = access_t(offset=0, value=value, size=size, is_write=is_write, ts=NULL)
        if space_access(&view.c, flat_view_find(&view.c, addr), addr, &access) != BUS_OK:
            raised()
        return access.value

    def _check(self, addr, size):
        if size not in (1, 2, 4, 8) or not 0 <= addr <= self.size - size:
            raise ValueError(f"{self.name}: no access of {size} bytes at {addr:#x}")

    def __repr__(self):
        return f"<AddressSpace {self.name}: {len(self.view.regions)} regions>"
