/* What runs in a guest that is saved and restored: each kind of work notices by itself what is lost, and says at the end
   how much it did and how often something was wrong. All of them end when /tmp/stop is there.

       saved_load counter            a line each 10 ms: its number, how often the timer has expired, the time before and after
                                     it was asked, in ms since the beginning, and the latter since the boot
       saved_load ticks              a numbered line of 40 characters each 250 ms
       saved_load sums               checksums of a memory that it fills anew each time
       saved_load writer FILE        blocks with their number and checksum, fsync after each, all read back in the end
       saved_load tcp ADDRESS PORT   words in order, to a peer who gives them back: one connection
       saved_load vsock PORT         the same, with a new connection where one was reset, as a restore does it, or refused */

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, BLOCKS = 1024, WORDS = 1 << 15, PIECE = 1024, SILENCE_MS = 120000 };

static int stopped(void)
{
    return access("/tmp/stop", F_OK) == 0;
}

static void die(const char *what)
{
    printf("%s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

static void sleep_ms(int ms)
{
    struct timespec time = { ms / 1000, ms % 1000 * 1000000L };
    while (nanosleep(&time, &time) < 0 && errno == EINTR)
        ;
}

static uint64_t mixed(uint64_t n)
{
    n = (n ^ n >> 30) * 0xbf58476d1ce4e5b9;
    n = (n ^ n >> 27) * 0x94d049bb133111eb;
    return n ^ n >> 31;
}

static void say(const char *line)
{
    if (write(1, line, strlen(line)) != (ssize_t)strlen(line))
        exit(1);
}

static void counter(void)
{
    struct itimerspec each = { { 0, 10000000 }, { 0, 10000000 } };
    int timer = timerfd_create(CLOCK_MONOTONIC, 0);
    uint64_t expired, total = 0;
    int64_t began = now_ms(), before, after;
    char line[80];

    if (timer < 0 || timerfd_settime(timer, 0, &each, NULL) < 0)
        die("timerfd");
    for (uint64_t n = 0; !stopped(); n++) {
        before = now_ms();
        if (read(timer, &expired, sizeof expired) != sizeof expired)
            die("read");
        after = now_ms();
        total += expired;
        snprintf(line, sizeof line, "c %lu %lu %ld %ld %ld\n", n, total, before - began, after - began, after);
        say(line);
    }
    say("end\n");
}

static void ticks(void)
{
    char line[80];

    for (int n = 0; !stopped(); n++) {
        snprintf(line, sizeof line, "tick %08d abcdefghijklmnopqrstuvwxy\n", n);
        say(line);
        sleep_ms(250);
    }
}

static void sums(void)
{
    static uint64_t words[WORDS];
    unsigned long rounds = 0, wrong = 0;

    for (; !stopped(); rounds++) {
        uint64_t sum = 0, wanted = 0;
        for (int n = 0; n < WORDS; n++) {
            words[n] = mixed(rounds * WORDS + n);
            wanted += words[n];
        }
        for (int n = 0; n < WORDS; n++) {
            sum += words[n];
            wrong += words[n] != mixed(rounds * WORDS + n);
        }
        wrong += sum != wanted;
    }
    printf("rounds %lu wrong %lu\n", rounds, wrong);
}

static void fill(uint64_t *block, uint64_t n)
{
    block[0] = n;
    for (unsigned at = 1; at < BLOCK / 8; at++)
        block[at] = mixed(n * BLOCK + at);
}

static void writer(const char *path)
{
    static uint64_t block[BLOCK / 8], back[BLOCK / 8];
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
    uint64_t n = 0;
    unsigned long wrong = 0;

    if (file < 0)
        die("open");
    for (; !stopped(); n++) {
        fill(block, n);
        if (pwrite(file, block, BLOCK, n % BLOCKS * BLOCK) != BLOCK || fsync(file) < 0)
            die("write");
    }
    posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    for (uint64_t old = n > BLOCKS ? n - BLOCKS : 0; old < n; old++) {
        fill(block, old);
        wrong += pread(file, back, BLOCK, old % BLOCKS * BLOCK) != BLOCK || memcmp(block, back, BLOCK);
    }
    printf("writes %lu wrong %lu\n", (unsigned long)n, wrong);
}

/* Whether that is what becomes of a connection that was reset: Linux says ENOTCONN of one of vsock's that has something
   unread, and of one that is about to be written to. */
static int is_reset(int error)
{
    return error == ECONNRESET || error == EPIPE || error == ENOTCONN;
}

/* Words from `*next` on, given back in order, until the end or an error: -1, with the number of them in `*next`. */
static int exchange(int end, uint64_t *next, unsigned long *wrong)
{
    uint64_t out[PIECE / 8], in[PIECE / 8], sent = *next;
    struct pollfd look = { end, POLLIN | POLLOUT, 0 };
    size_t out_at = sizeof out, in_at = 0;

    while (!stopped() || *next < sent) {
        look.events = POLLIN | (stopped() || sent - *next > 8192 ? 0 : POLLOUT);
        if (poll(&look, 1, SILENCE_MS) <= 0) {
            errno = ETIMEDOUT;
            return -1;
        }
        if (look.revents & POLLIN) {
            ssize_t got = recv(end, (char *)in + in_at, sizeof in - in_at, MSG_DONTWAIT);
            if (got == 0)
                errno = ECONNRESET;
            if (got == 0 || (got < 0 && errno != EAGAIN))
                return -1;
            in_at += got > 0 ? got : 0;
            for (size_t n = 0; n < in_at / 8; n++)
                *wrong += in[n] != mixed((*next)++);
            memmove(in, (char *)in + in_at / 8 * 8, in_at % 8);
            in_at %= 8;
        } else if (look.revents & (POLLERR | POLLHUP)) {
            errno = ECONNRESET;
            return -1;
        }
        if (look.revents & POLLOUT) {
            if (out_at == sizeof out) {
                for (unsigned n = 0; n < PIECE / 8; n++)
                    out[n] = mixed(sent + n);
                sent += PIECE / 8;
                out_at = 0;
            }
            ssize_t gone = send(end, (char *)out + out_at, sizeof out - out_at, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (gone < 0 && errno != EAGAIN)
                return -1;
            out_at += gone > 0 ? gone : 0;
        }
        /* The last piece goes whole. */
        while (stopped() && out_at < sizeof out) {
            ssize_t gone = send(end, (char *)out + out_at, sizeof out - out_at, MSG_NOSIGNAL);
            if (gone < 0)
                return -1;
            out_at += gone;
        }
    }
    return 0;
}

static void tcp(const char *address, int port)
{
    struct sockaddr_in peer = { .sin_family = AF_INET, .sin_port = htons(port) };
    int end = socket(AF_INET, SOCK_STREAM, 0);
    uint64_t words = 0;
    unsigned long wrong = 0;

    inet_pton(AF_INET, address, &peer.sin_addr);
    if (end < 0 || connect(end, (struct sockaddr *)&peer, sizeof peer) < 0)
        die("connect");
    if (exchange(end, &words, &wrong) < 0)
        die("tcp");
    printf("words %lu wrong %lu\n", (unsigned long)words, wrong);
}

static void vsock(int port)
{
    struct sockaddr_vm peer = { .svm_family = AF_VSOCK, .svm_port = port, .svm_cid = VMADDR_CID_HOST };
    uint64_t total = 0;
    unsigned long wrong = 0, connections = 0, refused = 0, in_a_row = 0;

    while (!stopped()) {
        int end = socket(AF_VSOCK, SOCK_STREAM, 0);
        uint64_t words = 0;
        if (end < 0)
            die("socket");
        if (connect(end, (struct sockaddr *)&peer, sizeof peer) < 0) {
            refused++;
            if (++in_a_row > 100)
                die("connect");
            sleep_ms(100);
        } else {
            connections++;
            in_a_row = 0;
            if (exchange(end, &words, &wrong) < 0 && !is_reset(errno))
                die("vsock");
            total += words;
        }
        close(end);
    }
    printf("words %lu wrong %lu connections %lu refused %lu\n", (unsigned long)total, wrong, connections, refused);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";

    if (!strcmp(what, "counter"))
        counter();
    else if (!strcmp(what, "ticks"))
        ticks();
    else if (!strcmp(what, "sums"))
        sums();
    else if (!strcmp(what, "writer") && argc == 3)
        writer(argv[2]);
    else if (!strcmp(what, "tcp") && argc == 4)
        tcp(argv[2], atoi(argv[3]));
    else if (!strcmp(what, "vsock") && argc == 3)
        vsock(atoi(argv[2]));
    else
        return 2;
    return 0;
}
