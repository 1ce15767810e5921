/* The guest of benchmarks/net_lab.py: a TCP client that does as it is told on standard input.
 *
 *     net_io ADDRESS PORT
 *
 * A request is a line: what (`send`, `receive`, `ping`), the bytes of each call, their number. It is passed on to the
 * server, over the connection that all of them use, and carried out: `send` ends with the server's sum, `receive` with
 * the last byte, `ping` is a write and its echo, again and again. The answer is a line: nanoseconds, the sum of the
 * first byte of each call's worth, and what the card has counted meanwhile: packets and bytes out and in, interrupts.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MOST_BYTES = 1 << 16, COUNTERS = 5 };

static char buffer[MOST_BYTES];

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* A card's counter, by its name. */
static uint64_t statistic(const char *name)
{
    char path[80];
    unsigned long long value = 0;
    snprintf(path, sizeof path, "/sys/class/net/eth0/statistics/%s", name);
    FILE *file = fopen(path, "r");
    if (file) {
        if (fscanf(file, "%llu", &value) != 1)
            value = 0;
        fclose(file);
    }
    return value;
}

/* Of all virtio queues, on the one processor. */
static uint64_t interrupts(void)
{
    char line[256];
    uint64_t total = 0;
    FILE *file = fopen("/proc/interrupts", "r");
    while (file && fgets(line, sizeof line, file)) {
        char *number = strchr(line, ':');
        if (number && strstr(line, "virtio"))
            total += strtoull(number + 1, NULL, 10);
    }
    if (file)
        fclose(file);
    return total;
}

static void look(uint64_t *counters)
{
    static const char *names[] = {"tx_packets", "tx_bytes", "rx_packets", "rx_bytes"};
    for (int n = 0; n < COUNTERS - 1; n++)
        counters[n] = statistic(names[n]);
    counters[COUNTERS - 1] = interrupts();
}

/* All of it; 0 where the connection ends. */
static int whole(int line, char *at, size_t size, int out)
{
    while (size) {
        ssize_t done = out ? write(line, at, size) : read(line, at, size);
        if (done <= 0)
            return 0;
        at += done;
        size -= done;
    }
    return 1;
}

int main(int argc, char **argv)
{
    char what[16], told[64];
    unsigned bytes, count;
    struct sockaddr_in peer = {.sin_family = AF_INET};
    int line = socket(AF_INET, SOCK_STREAM, 0), one = 1;

    if (argc < 3 || !inet_aton(argv[1], &peer.sin_addr))
        return 2;
    peer.sin_port = htons(atoi(argv[2]));
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (connect(line, (struct sockaddr *)&peer, sizeof peer)) {
        printf("failed: connect: %s\n", strerror(errno));
        return 1;
    }
    setsockopt(line, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    printf("READY\n");
    while (scanf("%15s %u %u", what, &bytes, &count) == 3 && bytes && bytes <= MOST_BYTES) {
        uint64_t before[COUNTERS], after[COUNTERS], sum = 0, start;
        int fine;
        look(before);
        memset(told, 0, sizeof told);
        snprintf(told, sizeof told, "%s %u %u", what, bytes, count);
        start = now_ns();
        fine = whole(line, told, sizeof told, 1);
        for (unsigned n = 0; fine && n < count; n++) {
            if (what[0] != 'r') {
                buffer[0] = n;
                fine = whole(line, buffer, bytes, 1);
            }
            if (fine && what[0] != 's') {
                fine = whole(line, buffer, bytes, 0);
                sum += (unsigned char)buffer[0];
            }
        }
        if (fine && what[0] == 's')
            fine = whole(line, (char *)&sum, sizeof sum, 0);
        start = now_ns() - start;
        look(after);
        if (!fine) {
            printf("failed: %s: %s\n", what, strerror(errno));
            return 1;
        }
        printf("T %llu %llx", (unsigned long long)start, (unsigned long long)sum);
        for (int n = 0; n < COUNTERS; n++)
            printf(" %llu", (unsigned long long)(after[n] - before[n]));
        printf("\n");
    }
    return 0;
}
