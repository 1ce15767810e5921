"""Guest RAM: host mappings laid out in guest-physical space, and bounds-checked views of them.

A view goes straight into os.preadv/os.pwritev as an iovec, so a disk transfer is copied once, by the kernel.
A mapping lives as long as the last view of it; closing a machine cannot pull memory from under a transfer.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES
from libc.errno cimport errno
from posix.mman cimport (MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ,
                         PROT_WRITE, mmap, mprotect, munmap)
from posix.unistd cimport close, ftruncate

import posix

from pyvmm.errors import BusError, ConfigError, StateError, remedy
from pyvmm.x86.layout import PAGE_BYTES, RAM_HIGH, RAM_HOLE

cdef extern from "<sys/mman.h>" nogil:
    int memfd_create(const char *, unsigned int)
    int madvise(void *, size_t, int)
    unsigned int MFD_CLOEXEC
    int MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_DONTNEED, MADV_REMOVE

cdef enum:
    MADV_POPULATE_READ = 22     # Linux 5.14; older headers have no name for it

cdef extern from "<linux/memfd.h>" nogil:
    unsigned int MFD_HUGETLB, MFD_HUGE_2MB, MFD_HUGE_1GB

cdef char *BYTE_FORMAT = b"B"   # what memoryview calls an unsigned byte

# x86-64 physical addresses have at most 52 bits (Intel SDM vol. 3, 4.1.4); below that no sum of ours can wrap.
GPA_END = 1 << 52

_HUGE = {None: 0, "transparent": 0, "2M": MFD_HUGETLB | MFD_HUGE_2MB, "1G": MFD_HUGETLB | MFD_HUGE_1GB}


cdef enum:
    SMALL_PAGE_BYTES = 4096
    LARGE_PAGE_BYTES = 2 << 20


cdef void *map_aligned(size_t length, int flags) noexcept nogil:
    """Anonymous memory at a multiple of 2 MiB, or MAP_FAILED.

    Only there can KVM map a large page of the host's into the guest as one: 1 fault instead of 512.
    """
    cdef size_t more = length + LARGE_PAGE_BYTES - SMALL_PAGE_BYTES
    cdef char *start = <char *>mmap(NULL, more, PROT_READ | PROT_WRITE, flags, -1, 0)
    if start == <char *>MAP_FAILED:
        return MAP_FAILED
    cdef size_t before = -<size_t>start & (LARGE_PAGE_BYTES - 1)
    if before:
        munmap(start, before)
    if more > before + length:
        munmap(start + before + length, more - before - length)
    return start + before


cdef class RamRegion:
    """One host mapping that stands at ``gpa`` in the guest. Exports its bytes through the buffer protocol.

    ``source``, a descriptor and an offset in whole pages, has what is in it at first: the file is mapped privately, so
    that pages are read when they are touched, and what is written stays in this process. It has to be there, as long as
    the mapping and unchanged, until the region is gone: a page that a file no longer has is a SIGBUS.
    """

    def __cinit__(self, gpa, length, *, bint shared=False, huge_pages=None,
                  bint readonly=False, str name="ram", source=None):
        if length <= 0 or length % PAGE_BYTES or gpa % PAGE_BYTES:
            raise ConfigError(f"{name}: address {gpa:#x} and size {length:#x} must be multiples of {PAGE_BYTES} bytes")
        if gpa < 0 or gpa + length > GPA_END:
            raise ConfigError(f"{name}: {length >> 20} MiB at {gpa:#x}: memory ends at {GPA_END:#x}, ask for less")
        if huge_pages not in _HUGE:
            raise ConfigError(f"huge_pages={huge_pages!r}: use None, 'transparent', '2M' or '1G'")
        page = {"2M": 2 << 20, "1G": 1 << 30}.get(huge_pages, PAGE_BYTES)
        if length % page:
            raise ConfigError(f"{name}: {length >> 20} MiB in pages of {huge_pages}: give a multiple of {page >> 20} MiB")
        self.fd = -1
        self.hva = NULL
        self.gpa = gpa
        self.length = length
        self.readonly = readonly
        self.name = name
        self.from_file = self.file_behind = source is not None
        cdef unsigned int huge = _HUGE[huge_pages]
        self.reserved = huge != 0
        self._hear_discards = ()
        cdef int flags
        cdef int file = -1
        cdef uint64_t start = 0
        if source is not None:
            if shared or huge:
                raise ConfigError(f"{name}: memory that comes from a file can be neither shared nor in huge pages of its own")
            file, start = source
        if shared or huge:
            self.fd = memfd_create(b"pyvmm-ram", MFD_CLOEXEC | huge)
            if self.fd < 0 or ftruncate(self.fd, length) < 0:
                raise ConfigError(f"{name}: no memory file of {length >> 20} MiB: "
                                  + remedy(OSError(errno, posix.strerror(errno)),
                                           "reserve huge pages in /proc/sys/vm/nr_hugepages" if huge
                                           else "ask for less memory"))
            # Hugetlb pages must be reserved now: a page missing later would be a SIGBUS inside a guest's access.
            flags = MAP_SHARED if huge else MAP_SHARED | MAP_NORESERVE
            file = self.fd
        elif file >= 0:
            flags = MAP_PRIVATE | MAP_NORESERVE
        else:
            flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        cdef bint large = file < 0 and length >= LARGE_PAGE_BYTES
        cdef void *p = map_aligned(length, flags) if large \
            else mmap(NULL, length, PROT_READ | PROT_WRITE, flags, file, start)
        if p == MAP_FAILED:
            raise ConfigError(f"{name}: can't map {length >> 20} MiB: {posix.strerror(errno)}"
                              + ("; reserve huge pages in /proc/sys/vm/nr_hugepages" if huge
                                 else "; ask for less memory, or raise `ulimit -v`"))
        self.hva = <uint8_t *>p
        # Advice only: a kernel without transparent huge pages says EINVAL and the guest runs all the same.
        if huge_pages == "transparent":
            madvise(p, length, MADV_HUGEPAGE)
        elif large and gpa == 0:
            # On hosts that give large pages unasked: the first guest instruction needs not wait for 2 MiB of zeros.
            madvise(p, LARGE_PAGE_BYTES, MADV_NOHUGEPAGE)
        madvise(p, length, MADV_DONTDUMP)

    def __dealloc__(self):
        if self.hva != NULL:
            munmap(self.hva, self.length)
        # Refused arguments end here too, with a descriptor number that nobody has set.
        if self.length and self.fd >= 0:
            close(self.fd)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self.shape[0] = self.length
        self.strides[0] = 1
        buffer.buf = self.hva
        buffer.obj = self
        buffer.len = self.length
        buffer.itemsize = 1
        buffer.readonly = 0
        buffer.ndim = 1
        buffer.format = BYTE_FORMAT if flags & PyBUF_FORMAT else NULL
        buffer.shape = self.shape if flags & PyBUF_ND else NULL
        buffer.strides = self.strides if (flags & PyBUF_STRIDES) == PyBUF_STRIDES else NULL
        buffer.suboffsets = NULL
        buffer.internal = NULL

    def overlay(self, offset, size, source):
        """Put ``size`` bytes of another file in the place of what is at ``offset``: as ``source`` in the constructor, all
        in whole pages. Nothing may use the memory yet.
        """
        cdef int file
        cdef uint64_t start
        file, start = source
        if offset < 0 or size <= 0 or offset % PAGE_BYTES or size % PAGE_BYTES or offset + size > self.length:
            raise ConfigError(f"{self.name}: {size:#x} bytes at offset {offset:#x}: give whole pages inside of it")
        if mmap(self.hva + <size_t>offset, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, file,
                start) == MAP_FAILED:
            raise ConfigError(f"{self.name}: can't map {size >> 10} KiB of a file: "
                              + remedy(OSError(errno, posix.strerror(errno)), "raise /proc/sys/vm/max_map_count"))
        self.file_behind = True

    def read_ahead(self, uint64_t offset, uint64_t size):
        """Have whole pages of the file behind it read and mapped, but not written: False where the kernel can't (before
        Linux 5.14), or the file is not there any more.
        """
        cdef int rc
        if offset > self.length or size > self.length - offset:
            raise ConfigError(f"{self.name}: {size:#x} bytes at offset {offset:#x}: give a part of it")
        with nogil:
            rc = madvise(self.hva + offset, size, MADV_POPULATE_READ)
        return rc == 0

    def hear_discards(self, hear):
        """``hear(region, offset, size)`` for each range of whole pages that has gone back to the host from here on, on
        the thread that gave it.
        """
        self._hear_discards += (hear,)

    def hear_no_discards(self, hear):
        """No more; of one that is not heard that is no harm."""
        self._hear_discards = tuple([other for other in self._hear_discards if other != hear])

    cdef bint give_back(self, uint64_t offset, uint64_t size) noexcept nogil:
        """Whole pages to the host; whether it took them. It may refuse: mlock(2), a sealed memfd."""
        return madvise(self.hva + offset, size, MADV_REMOVE if self.fd >= 0 else MADV_DONTNEED) == 0

    @property
    def size_bytes(self):
        return self.length

    @property
    def host_address(self):
        """The hva of the first byte: what KVM_SET_USER_MEMORY_REGION takes."""
        return <uint64_t>self.hva


cdef class GuestMemory:
    """The RAM of one machine.

    GuestMemory(size_bytes) puts RAM at 0 up to 0xC000_0000 and what is left at 4 GiB. ``shared`` backs it by a memfd
    (another process can map it), ``huge_pages`` is None, 'transparent', '2M' or '1G'. ``sources`` has for each of the
    two, by its address, the ``source`` of RamRegion. ConfigError where it can't be had.
    """

    def __init__(self, size_bytes, *, bint shared=False, huge_pages=None, sources={}):
        if size_bytes <= 0 or size_bytes % PAGE_BYTES:
            raise ConfigError(f"memory of {size_bytes} bytes: give a positive multiple of {PAGE_BYTES}")
        if size_bytes > GPA_END - RAM_HIGH:
            raise ConfigError(f"memory of {size_bytes >> 20} MiB is more than a guest can address: ask for less")
        self.ram = []
        self._views = []
        low = min(size_bytes, RAM_HOLE)
        self.add(RamRegion(0, low, shared=shared, huge_pages=huge_pages, name="ram", source=sources.get(0)))
        if size_bytes > low:
            self.add(RamRegion(RAM_HIGH, size_bytes - low, shared=shared, huge_pages=huge_pages, name="ram-high",
                               source=sources.get(RAM_HIGH)))

    def add(self, RamRegion region not None):
        """One more region (a ROM, say). ConfigError where it overlaps one that is there, naming both."""
        for other in self.ram:
            if region.gpa < other.gpa + other.size_bytes and other.gpa < region.gpa + region.size_bytes:
                raise ConfigError(f"{region.name} at {region.gpa:#x}+{region.size_bytes:#x} overlaps "
                                  f"{other.name} at {other.gpa:#x}+{other.size_bytes:#x}")
        self.ram.append(region)
        self._views.append(memoryview(region))
        if not region.readonly:
            self.size_bytes += region.size_bytes

    @property
    def regions(self):
        """(gpa, size_bytes) of each writable region, lowest first."""
        return sorted((r.gpa, r.size_bytes) for r in self.ram if not r.readonly)

    cdef uint8_t *host(self, uint64_t gpa, uint64_t size) noexcept:
        """The host address of a guest range wholly inside one region, or NULL."""
        cdef RamRegion region
        for region in self.ram:
            # Written so that no sum can wrap: gpa and size come from the guest.
            if gpa >= region.gpa and gpa - region.gpa < <uint64_t>region.length \
                    and size <= <uint64_t>region.length - (gpa - region.gpa):
                return region.hva + (gpa - region.gpa)
        return NULL

    def view(self, gpa, size, bint write=True):
        """A memoryview ('B') of ``size`` bytes at ``gpa``. BusError where it is not all in one region.

        A ROM is there for ``write=False`` only: devices do what guests ask, and a guest can't write it.
        """
        cdef RamRegion region
        cdef Py_ssize_t i
        if not self.ram:
            raise StateError("guest memory is closed")
        for i in range(len(self.ram)):
            region = <RamRegion>self.ram[i]
            if region.gpa <= gpa and gpa + size <= region.gpa + region.length and size >= 0:
                if write and region.readonly:
                    break
                start = gpa - region.gpa
                piece = self._views[i][start:start + size]
                return piece.toreadonly() if region.readonly else piece
        raise BusError(f"{size:#x} bytes at guest-physical {gpa:#x} are not inside RAM")

    def read(self, gpa, size):
        """A copy of ``size`` bytes at ``gpa``."""
        return bytes(self.view(gpa, size, False))

    def write(self, gpa, data):
        """Copy a bytes-like object to ``gpa``."""
        source = memoryview(data).cast("B")
        self.view(gpa, source.nbytes)[:] = source

    def drop_mapping(self, gpa):
        """Make KVM forget how it maps the page at ``gpa``, content kept: its next access faults it in again."""
        cdef uint8_t *page = self.host(gpa & ~0xFFF, PAGE_BYTES)
        if page == NULL:
            raise BusError(f"guest-physical {gpa:#x} is not inside RAM")
        # The way of QEMU's pc-testdev: taking the rights away and giving them back goes through KVM's MMU notifier.
        if mprotect(page, PAGE_BYTES, PROT_NONE) < 0 or mprotect(page, PAGE_BYTES, PROT_READ | PROT_WRITE) < 0:
            raise OSError(errno, posix.strerror(errno))

    def discard(self, uint64_t gpa, uint64_t size, *, bint zeros=False):
        """Give ``size`` bytes of whole pages at ``gpa`` back to the host, until they are touched again: how many bytes it
        took. What was in them is lost: they read as zeros, or where memory is a snapshot's or a fork's as its file has it.

        ``zeros``: leave those last as they are. Reserved huge pages stay too: the next access might find none left, and
        that would be a SIGBUS. BusError where it is not whole pages inside of one region of RAM.
        """
        cdef RamRegion region
        cdef bint taken
        if not size or gpa % PAGE_BYTES or size % PAGE_BYTES:
            raise BusError(f"{size:#x} bytes at guest-physical {gpa:#x} are not whole pages")
        for region in self.ram:
            if not region.readonly and gpa >= region.gpa and gpa - region.gpa < <uint64_t>region.length \
                    and size <= <uint64_t>region.length - (gpa - region.gpa):
                if region.reserved or zeros and region.file_behind:
                    return 0
                with nogil:
                    taken = region.give_back(gpa - region.gpa, size)
                if not taken:
                    return 0
                for hear in region._hear_discards:  # now that it has happened: whoever reads it afterwards sees it
                    hear(region, gpa - region.gpa, size)
                return size
        raise BusError(f"{size:#x} bytes at guest-physical {gpa:#x} are not inside RAM")

    def close(self):
        """Let go of the mappings; each is unmapped when the last view of it is gone."""
        self._views.clear()
        self.ram.clear()
