/* The guest of benchmarks/ide_lab.py: reads and writes a disk with O_DIRECT as it is told on standard input.
 *
 *     disk_io DEVICE
 *
 * A request is a line: what (`read`, `write`: in order from the start; `random`, `randomwrite`: at places of a fixed
 * sequence), the bytes of each transfer, their number. The answer is a line with the nanoseconds all of them took, and a
 * checksum of the first word of each. One transfer is in flight at a time.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/fs.h>
#include <time.h>
#include <unistd.h>

enum { MOST_BYTES = 1 << 20 };

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
    uint64_t size, *buffer;
    int fd = argc > 1 ? open(argv[1], O_RDWR | O_DIRECT) : -1;

    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size) || posix_memalign((void **)&buffer, 2 << 20, 2 << 20)) {
        printf("failed: %s\n", strerror(errno));
        return 1;
    }
    memset(buffer, 0x5a, MOST_BYTES);
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("READY\n");
    while (scanf("%15s %u %u", what, &bytes, &count) == 3 && bytes && bytes <= MOST_BYTES) {
        uint64_t state = 88172645463325252ull, places = size / bytes, sum = 0, start = now_ns();
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
