"""WriteLog: which pages of a machine's memory have been written since the last look, by its guest and by the host alike.

The kernel protects the pages of this process (Linux Documentation/admin-guide/mm/userfaultfd.rst, "Write-protect
notifications", UFFD_FEATURE_WP_ASYNC; pagemap.rst, PAGEMAP_SCAN; since Linux 6.7): a write takes the protection off by
itself, and a scan finds what has none and protects it anew, in one step. KVM follows the page tables of its process, so
that is true of vCPUs as of threads here and of the kernel, which reads from a disk into memory. KVM's own dirty log
would leave those out.
"""

from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #include <fcntl.h>
    #include <stdint.h>
    #include <sys/ioctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* <linux/userfaultfd.h> and <linux/fs.h>; those of the machine that this is compiled on may be older. */
    struct wl_api { uint64_t api, features, ioctls; };
    struct wl_register { uint64_t start, len, mode, ioctls; };
    struct wl_region { uint64_t start, end, categories; };
    struct wl_scan {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
    };
    #define WL_API _IOWR(0xAA, 0x3F, struct wl_api)
    #define WL_REGISTER _IOWR(0xAA, 0x00, struct wl_register)
    #define WL_SCAN _IOWR('f', 16, struct wl_scan)
    #define WL_API_VERSION 0xAA
    #define WL_WP_ASYNC (1 << 15)
    #define WL_MODE_WP 2
    #define WL_WP_MATCHING 1
    #define WL_CHECK_WPASYNC 2
    #define WL_WRITTEN 2

    static int wl_open(void)
    {
        /* UFFD_USER_MODE_ONLY: no privilege needed, and nothing but our protection is wanted of it. */
        return syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1);
    }
    """
    struct wl_api:
        uint64_t api, features, ioctls

    struct wl_register:
        uint64_t start, len, mode, ioctls

    struct wl_region:
        uint64_t start, end, categories

    struct wl_scan:
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages
        uint64_t category_inverted, category_mask, category_anyof_mask, return_mask

    unsigned long WL_API, WL_REGISTER, WL_SCAN
    uint64_t WL_API_VERSION, WL_WP_ASYNC, WL_MODE_WP, WL_WP_MATCHING, WL_CHECK_WPASYNC, WL_WRITTEN
    int O_RDONLY, O_CLOEXEC
    int wl_open() noexcept nogil
    int open(const char *path, int flags) noexcept nogil
    int close(int fd) noexcept nogil
    int ioctl(int fd, unsigned long request, void *argument) noexcept nogil

cdef enum:
    REGIONS = 256  # that a scan gives at a time


cdef class WriteLog:
    """Of these RamRegions, from now until ``close``. OSError where the kernel can't.

    Where memory is mapped anew meanwhile (a fork's), its pages are seen no more.
    """

    cdef int _fd
    cdef int _pagemap

    def __cinit__(self):
        self._fd = self._pagemap = -1

    def __init__(self, regions):
        cdef wl_api api
        cdef wl_register range_
        self._fd = wl_open()
        if self._fd < 0:
            PyErr_SetFromErrno(OSError)
        self._pagemap = open(b"/proc/self/pagemap", O_RDONLY | O_CLOEXEC)
        if self._pagemap < 0:
            PyErr_SetFromErrno(OSError)
        api.api, api.features, api.ioctls = WL_API_VERSION, WL_WP_ASYNC, 0
        if ioctl(self._fd, WL_API, &api) < 0:
            PyErr_SetFromErrno(OSError)
        for region in regions:
            range_.start, range_.len, range_.mode = region.host_address, region.size_bytes, WL_MODE_WP
            range_.ioctls = 0
            if ioctl(self._fd, WL_REGISTER, &range_) < 0:
                PyErr_SetFromErrno(OSError)
        for region in regions:
            self.take(region)

    def take(self, region):
        """(offset, size) in bytes of each run of pages that have been written since the last call for this region, or
        since the beginning.
        """
        cdef wl_region found[REGIONS]
        cdef wl_scan scan
        cdef uint64_t first = region.host_address
        cdef long count, n
        runs = []
        scan.size, scan.flags = sizeof(wl_scan), WL_WP_MATCHING | WL_CHECK_WPASYNC
        scan.walk_end, scan.end = first, first + region.size_bytes
        scan.vec, scan.vec_len, scan.max_pages = <uint64_t><size_t>&found[0], REGIONS, 0
        scan.category_inverted, scan.category_anyof_mask = 0, 0
        scan.category_mask = scan.return_mask = WL_WRITTEN
        while scan.walk_end < scan.end:
            scan.start = scan.walk_end
            with nogil:
                count = ioctl(self._pagemap, WL_SCAN, &scan)
            if count < 0:
                PyErr_SetFromErrno(OSError)
            for n in range(count):
                if runs and runs[-1][0] + runs[-1][1] == found[n].start - first:
                    runs[-1] = (runs[-1][0], found[n].end - first - runs[-1][0])
                else:
                    runs.append((found[n].start - first, found[n].end - found[n].start))
        return runs

    def close(self):
        """Nothing is protected any more."""
        if self._fd >= 0:
            close(self._fd)
        if self._pagemap >= 0:
            close(self._pagemap)
        self._fd = self._pagemap = -1

    def __dealloc__(self):
        self.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
