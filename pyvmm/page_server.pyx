"""PageServer: puts pages into memory when somebody touches them, by a thread of the kernel's kind that needs no GIL.

    server = PageServer(KVM_RUN)
    server.serve(region, pieces)      # (offset in the region, size, descriptor, offset there) of what is no zero
    server.start()

Memory that nobody has touched is missing; whoever touches it, a vCPU in KVM_RUN, a thread of Python's that holds the
GIL or the kernel in a system call, sleeps until this thread has read the file and put the pages there (Linux
Documentation/admin-guide/mm/userfaultfd.rst, UFFDIO_REGISTER_MODE_MISSING). So nothing here may wait for the GIL.

Where a piece can't be read, ``failed_fd`` becomes readable and ``failure`` says why. From then on pages are zeros for
those who must not be kept waiting, since they may hold the GIL; who sleeps in the one ioctl that was named, vCPUs, does
so until ``give_up``, before which its caller has seen to it that none of them goes on with what it finds.
"""

from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EEXIST, EINTR, ENOMEM, ENOSPC, ENOSYS, EPERM, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.unistd cimport close, getpid, pread

from pyvmm.guest_memory cimport RamRegion

import posix

from pyvmm.errors import ConfigError, StateError, remedy

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <pthread.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/eventfd.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* <linux/userfaultfd.h>; that of the machine that this is compiled on may be older. */
    struct ps_api { uint64_t api, features, ioctls; };
    struct ps_range { uint64_t start, len; };
    struct ps_register { struct ps_range range; uint64_t mode, ioctls; };
    struct ps_copy { uint64_t dst, src, len, mode; int64_t copy; };
    struct ps_zeropage { struct ps_range range; uint64_t mode; int64_t zeropage; };
    struct ps_message { uint8_t event, reserved[7]; uint64_t flags, address; uint32_t tid, padding; };
    #define PS_API _IOWR(0xAA, 0x3F, struct ps_api)
    #define PS_REGISTER _IOWR(0xAA, 0x00, struct ps_register)
    #define PS_UNREGISTER _IOR(0xAA, 0x01, struct ps_range)
    #define PS_WAKE _IOR(0xAA, 0x02, struct ps_range)
    #define PS_COPY _IOWR(0xAA, 0x03, struct ps_copy)
    #define PS_ZEROPAGE _IOWR(0xAA, 0x04, struct ps_zeropage)
    #define PS_NEW _IO(0xAA, 0x00)   /* of /dev/userfaultfd */
    #define PS_API_VERSION 0xAA
    #define PS_THREAD_ID (1 << 8)
    #define PS_MODE_MISSING 1
    #define PS_PAGEFAULT 0x12

    /* Not UFFD_USER_MODE_ONLY: KVM, and system calls that read a disk into memory, touch it in the kernel. -1: errno. */
    static int ps_open(void)
    {
        int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
        if (fd < 0 && errno == EPERM) {
            int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
            if (device >= 0) {
                fd = ioctl(device, PS_NEW, O_CLOEXEC | O_NONBLOCK);
                close(device);
            }
            if (fd < 0)
                errno = EPERM;
        }
        return fd;
    }

    static int ps_event(void) { return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); }
    static void ps_signal(int fd) { uint64_t one = 1; if (write(fd, &one, sizeof one) < 0) { } }

    /* Until there is a fault, or `stop_fd` is readable: 0 then. */
    static int ps_wait(int fd, int stop_fd)
    {
        struct pollfd look[2] = { { fd, POLLIN, 0 }, { stop_fd, POLLIN, 0 } };
        while (poll(look, 2, -1) < 0 && errno == EINTR)
            ;
        return !look[1].revents;
    }

    /* Whether a thread of this process sleeps in that ioctl; -1 where it can't be told. Its system call and the arguments
       show once it sleeps, which it may not do quite yet when its fault is known. */
    static int ps_in_ioctl(uint32_t tid, unsigned long request)
    {
        char path[64], text[128], *at;
        for (int n = 0; n < 1000; n++) {
            ssize_t got;
            int fd;
            snprintf(path, sizeof path, "/proc/self/task/%u/syscall", tid);
            fd = open(path, O_RDONLY | O_CLOEXEC);
            if (fd < 0)
                return -1;
            got = read(fd, text, sizeof text - 1);
            close(fd);
            if (got <= 0)
                return -1;
            text[got] = 0;
            if (strncmp(text, "running", 7)) {
                if (strtol(text, &at, 10) != SYS_ioctl)
                    return 0;
                strtoul(at, &at, 16);   /* the descriptor */
                return (strtoul(at, NULL, 16) & 0xffffffff) == request;
            }
            usleep(100);
        }
        return 0;
    }

    /* A thread that takes no signal: those are for threads of Python's. */
    static int ps_start(pthread_t *thread, void *(*run)(void *), void *argument)
    {
        sigset_t all, before;
        int rc;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        rc = pthread_create(thread, NULL, run, argument);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (!rc)
            pthread_setname_np(*thread, "pages");
        return rc;
    }
    """
    struct ps_range:
        uint64_t start, len

    struct ps_api:
        uint64_t api, features, ioctls

    struct ps_register:
        ps_range range
        uint64_t mode, ioctls

    struct ps_copy:
        uint64_t dst, src, len, mode
        int64_t copy

    struct ps_zeropage:
        ps_range range
        uint64_t mode
        int64_t zeropage

    struct ps_message:
        uint8_t event
        uint64_t flags, address
        uint32_t tid

    ctypedef unsigned long pthread_t
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef void *(*ps_run)(void *) noexcept nogil

    unsigned long PS_API, PS_REGISTER, PS_UNREGISTER, PS_WAKE, PS_COPY, PS_ZEROPAGE
    uint64_t PS_API_VERSION, PS_THREAD_ID, PS_MODE_MISSING
    int PS_PAGEFAULT
    int MADV_DONTNEED
    int ps_open() noexcept nogil
    int ps_event() noexcept nogil
    void ps_signal(int fd) noexcept nogil
    bint ps_wait(int fd, int stop_fd) noexcept nogil
    int ps_in_ioctl(uint32_t tid, unsigned long request) noexcept nogil
    int ps_start(pthread_t *thread, ps_run run, void *argument) noexcept nogil
    int pthread_join(pthread_t thread, void **result) nogil
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes) nogil
    int pthread_mutex_lock(pthread_mutex_t *mutex) nogil
    int pthread_mutex_unlock(pthread_mutex_t *mutex) nogil
    int posix_memalign(void **memory, size_t alignment, size_t size) nogil
    int ioctl(int fd, unsigned long request, void *argument) nogil
    int madvise(void *start, size_t size, int advice) nogil
    ssize_t ps_read "read" (int fd, void *buffer, size_t size) nogil

cdef extern from * nogil:
    int32_t load_i32 "__atomic_load_n" (int32_t *, int)
    uint64_t load_u64 "__atomic_load_n" (uint64_t *, int)
    void store_i32 "__atomic_store_n" (int32_t *, int32_t, int)
    uint64_t add_u64 "__atomic_fetch_add" (uint64_t *, uint64_t, int)
    uint64_t sub_u64 "__atomic_fetch_sub" (uint64_t *, uint64_t, int)
    int SEQ_CST "__ATOMIC_SEQ_CST"

cdef enum:
    PAGE = 4096
    BLOCK = 64 << 10        # what a fault brings: that many bytes around it, where they are in one piece
    CHUNK = 256 << 10       # what ``fetch`` reads at a time
    MOST_REGIONS = 8
    # What became of a piece.
    DONE = 0
    CUT_OFF = -1            # the file is shorter than it was
    # above 0: errno


cdef struct piece_t:
    uint64_t start, size, file_offset
    int fd


cdef struct served_t:
    uint8_t *hva
    uint64_t size, count
    piece_t *pieces


cdef struct server_t:   # what the thread needs: no object
    served_t regions[MOST_REGIONS]
    int count
    int fd, stop_fd, failed_fd
    int32_t failed, gave_up, closed
    int32_t why             # DONE, CUT_OFF or errno; written before ``failed``
    int which_fd            # of the file that failed
    uint64_t where          # in it
    uint64_t faults, copied, zeroed
    uint8_t *block
    bint told_by_proc       # whether /proc says what a thread sleeps in
    unsigned long request   # the ioctl of those who may be kept waiting
    pthread_mutex_t lock    # held while ``fetch`` uses what ``close`` closes


cdef piece_t *piece_at(served_t *region, uint64_t offset, uint64_t *hole_start, uint64_t *hole_end) noexcept nogil:
    """The piece that has ``offset``; NULL where there is none, and then between which two offsets."""
    cdef uint64_t low = 0
    cdef uint64_t high = region.count
    cdef uint64_t middle
    while low < high:
        middle = (low + high) // 2
        if region.pieces[middle].start + region.pieces[middle].size <= offset:
            low = middle + 1
        else:
            high = middle
    if low < region.count and region.pieces[low].start <= offset:
        return &region.pieces[low]
    hole_start[0] = region.pieces[low - 1].start + region.pieces[low - 1].size if low else 0
    hole_end[0] = region.pieces[low].start if low < region.count else region.size
    return NULL


cdef int read_all(int fd, uint8_t *to, uint64_t size, uint64_t offset) noexcept nogil:
    cdef ssize_t got
    cdef uint64_t done = 0
    while done < size:
        got = pread(fd, to + done, size - done, offset + done)
        if got > 0:
            done += got
        elif got == 0:
            return CUT_OFF
        elif errno != EINTR:
            return errno
    return DONE


cdef void put(server_t *server, uint8_t *at, uint8_t *data, uint64_t size) noexcept nogil:
    """``data``, or zeros where it is NULL, into those of the pages at ``at`` that are missing; their waiters wake."""
    cdef ps_copy copy
    cdef ps_zeropage zero
    cdef uint64_t done = 0
    cdef int64_t got
    cdef int rc
    cdef uint64_t *counted = &server.copied if data != NULL else &server.zeroed
    add_u64(counted, size, SEQ_CST)     # first: whoever wakes finds itself counted
    while done < size:
        if data != NULL:
            copy.dst, copy.src, copy.len = <uint64_t>at + done, <uint64_t>data + done, size - done
            copy.mode = copy.copy = 0
            rc = ioctl(server.fd, PS_COPY, &copy)
            got = copy.copy
        else:
            zero.range.start, zero.range.len = <uint64_t>at + done, size - done
            zero.mode = zero.zeropage = 0
            rc = ioctl(server.fd, PS_ZEROPAGE, &zero)
            got = zero.zeropage
        if rc == 0:
            got = size - done
        if got > 0:
            done += got
        elif got == -EEXIST:
            wake(server, at + done, PAGE)   # it is there: nobody need wait for it
            sub_u64(counted, PAGE, SEQ_CST)
            done += PAGE
        elif got != -EAGAIN and got != -EINTR:
            sub_u64(counted, size - done, SEQ_CST)
            if got == -ENOMEM or got == -ENOSPC:
                fail(server, ENOMEM, -1, 0)
            return      # nobody's memory any more: unregistered, or unmapped


cdef void wake(server_t *server, uint8_t *at, uint64_t size) noexcept nogil:
    cdef ps_range range_
    range_.start, range_.len = <uint64_t>at, size
    ioctl(server.fd, PS_WAKE, &range_)


cdef void fail(server_t *server, int why, int fd, uint64_t where) noexcept nogil:
    """The first failure is told."""
    if load_i32(&server.failed, SEQ_CST):
        return
    server.why, server.which_fd, server.where = why, fd, where
    store_i32(&server.failed, 1, SEQ_CST)
    ps_signal(server.failed_fd)


cdef void answer(server_t *server, uint64_t address, uint32_t tid) noexcept nogil:
    """A fault: its page, and what is around it in the same piece."""
    cdef served_t *region
    cdef piece_t *piece
    cdef uint64_t offset, start, end
    cdef uint64_t first = 0
    cdef uint64_t last = 0
    cdef int n, rc
    address &= ~<uint64_t>(PAGE - 1)
    for n in range(server.count):
        region = &server.regions[n]
        if <uint64_t>region.hva <= address < <uint64_t>region.hva + region.size:
            break
    else:
        return
    add_u64(&server.faults, 1, SEQ_CST)
    if load_i32(&server.failed, SEQ_CST):
        answer_failed(server, address, tid)
        return
    offset = address - <uint64_t>region.hva
    start = offset & ~<uint64_t>(BLOCK - 1)
    end = min(start + BLOCK, region.size)
    piece = piece_at(region, offset, &first, &last)
    if piece == NULL:
        start, end = max(start, first), min(end, last)
        put(server, region.hva + start, NULL, end - start)
        return
    start, end = max(start, piece.start), min(end, piece.start + piece.size)
    rc = read_all(piece.fd, server.block, end - start, piece.file_offset + start - piece.start)
    if rc == DONE:
        put(server, region.hva + start, server.block, end - start)
    else:
        fail(server, rc, piece.fd, piece.file_offset + start - piece.start)
    if load_i32(&server.failed, SEQ_CST):
        answer_failed(server, address, tid)


cdef void answer_failed(server_t *server, uint64_t address, uint32_t tid) noexcept nogil:
    """Of a vCPU, or of the kernel's threads for one, ``give_up`` is waited for, which wakes them once more; pairs with it.
    """
    cdef bint waits = server.told_by_proc and ps_in_ioctl(tid, server.request) != 0
    if not waits or load_i32(&server.gave_up, SEQ_CST):
        put(server, <uint8_t *>address, NULL, PAGE)


cdef void *work(void *argument) noexcept nogil:
    """The thread."""
    cdef server_t *server = <server_t *>argument
    cdef ps_message message
    while ps_wait(server.fd, server.stop_fd):
        while ps_read(server.fd, &message, sizeof(message)) == sizeof(message):
            if message.event == PS_PAGEFAULT:
                answer(server, message.address, message.tid)
    return NULL


cdef class PageServer:
    """``request``: the ioctl whose callers hold no GIL, and may be kept waiting after a failure. ConfigError where this
    kernel, or this user, can't.
    """

    cdef server_t server
    cdef list _held         # the regions
    cdef pthread_t _thread
    cdef bint _runs
    cdef int _pid

    def __cinit__(self, unsigned long request):
        cdef ps_api api
        self.server.request = request
        self.server.fd = self.server.stop_fd = self.server.failed_fd = -1
        self._held = []
        pthread_mutex_init(&self.server.lock, NULL)
        self._pid = getpid()
        self.server.told_by_proc = ps_in_ioctl(posix.getpid(), request) >= 0
        self.server.fd = ps_open()
        if self.server.fd < 0:
            raise ConfigError(_CANT.get(errno) or remedy(OSError(errno, posix.strerror(errno)), _OTHERWISE))
        api.api, api.features, api.ioctls = PS_API_VERSION, PS_THREAD_ID, 0
        if ioctl(self.server.fd, PS_API, &api) < 0:
            raise ConfigError(_TOO_OLD)
        self.server.stop_fd = ps_event()
        self.server.failed_fd = ps_event()
        if self.server.stop_fd < 0 or self.server.failed_fd < 0:
            PyErr_SetFromErrno(OSError)
        if posix_memalign(<void **>&self.server.block, PAGE, BLOCK) != 0:
            raise MemoryError

    def serve(self, RamRegion region not None, pieces):
        """All of ``region``, which nobody has touched and no file is behind, is missing from here on. ``pieces`` are in
        order and do not overlap, in whole pages; whoever gives them keeps the descriptors open until ``close``.
        """
        cdef served_t *served = &self.server.regions[self.server.count]
        cdef ps_register range_
        cdef uint64_t n
        cdef uint64_t end = 0
        if self._runs or self.server.count == MOST_REGIONS:
            raise StateError("regions are given before the start, and few")
        if region.fd >= 0 or region.file_behind:
            raise ConfigError(f"{region.name}: userfaultfd: memory that a file is behind, or that is shared, can't be served")
        found = list(pieces)
        for start, size, fd, file_offset in found:
            if start % PAGE or size % PAGE or size <= 0 or start < end or start + size > region.length:
                raise StateError(f"a piece of {size:#x} bytes at {start:#x} is not in order, or not in {region.name}")
            end = start + size
        served.pieces = <piece_t *>calloc(max(1, len(found)), sizeof(piece_t))
        if served.pieces == NULL:
            raise MemoryError
        served.hva, served.size, served.count = region.hva, region.length, len(found)
        for n in range(served.count):
            start, size, fd, file_offset = found[n]
            served.pieces[n].start, served.pieces[n].size = start, size
            served.pieces[n].fd, served.pieces[n].file_offset = fd, file_offset
        self.server.count += 1
        self._held.append(region)
        region.file_behind = True
        range_.range.start, range_.range.len = <uint64_t>region.hva, region.length
        range_.mode, range_.ioctls = PS_MODE_MISSING, 0
        if ioctl(self.server.fd, PS_REGISTER, &range_) < 0:
            PyErr_SetFromErrno(OSError)
        madvise(region.hva, region.length, MADV_DONTNEED)   # what a kernel has put there by itself

    def start(self):
        """OSError where there can be no thread."""
        cdef int rc = ps_start(&self._thread, work, &self.server)
        if rc != 0:
            raise OSError(rc, posix.strerror(rc))
        self._runs = True

    def fetch(self, RamRegion region not None, uint64_t offset, uint64_t size):
        """Read these bytes of ``region`` beside the guest, as far as they are missing. False where that is of no use any
        more: it is closed, or has failed.
        """
        cdef uint8_t *chunk = NULL
        cdef int n
        cdef bint on = True
        for n in range(self.server.count):
            if self.server.regions[n].hva == region.hva:
                break
        else:
            return False
        if offset > region.length or size > region.length - offset:
            raise StateError(f"{size:#x} bytes at {offset:#x} are not in {region.name}")
        if posix_memalign(<void **>&chunk, PAGE, CHUNK) != 0:
            raise MemoryError
        with nogil:
            on = self._fetch(&self.server.regions[n], chunk, offset, offset + size)
        free(chunk)
        return on

    cdef bint _fetch(self, served_t *region, uint8_t *chunk, uint64_t at, uint64_t end) noexcept nogil:
        cdef piece_t *piece
        cdef uint64_t first, last, size, where
        cdef int rc
        cdef bint on = True
        while at < end:
            first = last = 0
            piece = piece_at(region, at, &first, &last)
            if piece == NULL:
                at = last
                continue
            size = min(min(end, piece.start + piece.size) - at, CHUNK)
            where = piece.file_offset + at - piece.start
            pthread_mutex_lock(&self.server.lock)
            on = not self.server.closed and not load_i32(&self.server.failed, SEQ_CST)
            if on:
                rc = read_all(piece.fd, chunk, size, where)
                if rc == DONE:
                    put(&self.server, region.hva + at, chunk, size)
                else:
                    fail(&self.server, rc, piece.fd, where)
                    on = False
            pthread_mutex_unlock(&self.server.lock)
            if not on:
                return False
            at += size
        return True

    def complete(self):
        """Read all that is missing; from then on the memory is like any other's. False as from ``fetch``."""
        cdef RamRegion region
        for region in self._held:
            if not self.fetch(region, 0, region.length):
                return False
        self.close()
        for region in self._held:
            region.file_behind = False
        return True

    def give_up(self):
        """After a failure: those who still wait find zeros. None of them goes on with that, as the caller has seen to."""
        cdef int n
        with nogil:
            pthread_mutex_lock(&self.server.lock)
            store_i32(&self.server.gave_up, 1, SEQ_CST)
            if not self.server.closed:
                for n in range(self.server.count):
                    wake(&self.server, self.server.regions[n].hva, self.server.regions[n].size)
            pthread_mutex_unlock(&self.server.lock)

    @property
    def failure(self):
        """None, or (errno, or 0 where the file was cut off; descriptor of the file, or -1; offset in it)."""
        if not load_i32(&self.server.failed, SEQ_CST):
            return None
        return max(0, self.server.why), self.server.which_fd, self.server.where

    @property
    def failed_fd(self):
        """Readable once a piece could not be read."""
        return self.server.failed_fd

    @property
    def faults(self):
        """How often somebody has waited for a page."""
        return load_u64(&self.server.faults, SEQ_CST)

    @property
    def copied_bytes(self):
        """Of the files, by now."""
        return load_u64(&self.server.copied, SEQ_CST)

    @property
    def zeroed_bytes(self):
        """Of which the files have nothing."""
        return load_u64(&self.server.zeroed, SEQ_CST)

    def close(self):
        """Nobody waits any more: what was missing is zeros from here on. Again is fine."""
        cdef ps_range range_
        cdef int n
        if self.server.fd < 0 or getpid() != self._pid:
            return
        with nogil:
            pthread_mutex_lock(&self.server.lock)
            self.server.closed = 1
            for n in range(self.server.count):
                # Not left to the end of the descriptor: a child of fork may have it too.
                range_.start, range_.len = <uint64_t>self.server.regions[n].hva, self.server.regions[n].size
                ioctl(self.server.fd, PS_UNREGISTER, &range_)
            pthread_mutex_unlock(&self.server.lock)
            if self._runs:
                ps_signal(self.server.stop_fd)
                pthread_join(self._thread, NULL)
        self._runs = False
        self.abandon()

    def abandon(self):
        """In a child of fork, which has no such thread, and whose memory nobody serves: close the descriptors."""
        for fd in (self.server.fd, self.server.stop_fd, self.server.failed_fd):
            if fd >= 0:
                close(fd)
        self.server.fd = self.server.stop_fd = self.server.failed_fd = -1

    def __dealloc__(self):
        cdef int n
        if self.server.fd >= 0 and getpid() == self._pid:
            self.close()
        self.abandon()
        for n in range(self.server.count):
            free(self.server.regions[n].pieces)
        free(self.server.block)


_OTHERWISE = "leave userfaultfd out"
_TOO_OLD = f"userfaultfd: this kernel's is older than Linux 4.14's: {_OTHERWISE}"
_CANT = {
    EPERM: (
        "userfaultfd: this user may not have faults of the kernel's served: run `sysctl vm.unprivileged_userfaultfd=1`,"
        f" give the user /dev/userfaultfd (Linux 6.1), or {_OTHERWISE}"
    ),
    ENOSYS: f"userfaultfd: this kernel has none: {_OTHERWISE}",
}
