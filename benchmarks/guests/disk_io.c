/* The guest of benchmarks/ide_lab.py: reads and writes a disk with O_DIRECT as it is told on standard input.
 *
 *     disk_io DEVICE
 *
 * A request is a line: what (`read`, `write`: in order from the start; `random`, `randomwrite`: at places of a fixed
 * sequence; with `pages` behind it, to memory in which no page stands behind its neighbour, else to memory in one
 * piece), the bytes of each transfer, their number. The answer is a line with the nanoseconds all of them took, and a
 * checksum of the first word of each. One transfer is in flight at a time.
 *
 * How memory lies decides how many entries a transfer's table has, and so into how many commands the kernel divides it.
 * The kernel has to be given `hugepages=1`.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <linux/fs.h>
#include <time.h>
#include <unistd.h>

enum { MOST_BYTES = 1 << 20, PAGE_BYTES = 4096, HUGE_PAGE_BYTES = 2 << 20 };

static uint64_t *memory(int flags)
{
    void *found = mmap(NULL, HUGE_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    return found == MAP_FAILED ? NULL : found;
}

/* Pages are given in order as they are touched: every other one first, then the rest. */
static uint64_t *pages(void)
{
    uint64_t *found = memory(0);
    if (!found || madvise(found, HUGE_PAGE_BYTES, MADV_NOHUGEPAGE))
        return NULL;
    for (unsigned odd = 0; odd < 2; odd++)
        for (unsigned n = odd; n < MOST_BYTES / PAGE_BYTES; n += 2)
            memset((char *)found + n * PAGE_BYTES, 0x5a, PAGE_BYTES);
    return found;
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* xorshift64: the same places in every run. */
static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

int main(int argc, char **argv)
{
    char what[16];
    unsigned bytes, count;
    uint64_t size, *whole = memory(MAP_HUGETLB), *scattered = pages();
    int fd = argc > 1 ? open(argv[1], O_RDWR | O_DIRECT) : -1;

    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size) || !whole || !scattered) {
        printf("failed: %s\n", strerror(errno));
        return 1;
    }
    memset(whole, 0x5a, MOST_BYTES);
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("READY\n");
    while (scanf("%15s %u %u", what, &bytes, &count) == 3 && bytes && bytes <= MOST_BYTES) {
        uint64_t state = 88172645463325252ull, places = size / bytes, sum = 0, start = now_ns();
        uint64_t *buffer = strstr(what, "pages") ? scattered : whole;
        int writes = strstr(what, "write") != NULL, random = !strncmp(what, "random", 6);
        for (unsigned n = 0; n < count; n++) {
            off_t at = (random ? next_random(&state) : n) % places * bytes;
            if (writes)
                buffer[0] = n;
            ssize_t done = writes ? pwrite(fd, buffer, bytes, at) : pread(fd, buffer, bytes, at);
            if (done != (ssize_t)bytes) {
                printf("failed: %s at %lld gave %zd: %s\n", what, (long long)at, done, strerror(errno));
                return 1;
            }
            sum = sum * 31 + buffer[0];
        }
        printf("T %llu %llx\n", (unsigned long long)(now_ns() - start), (unsigned long long)sum);
    }
    return 0;
}
