/* The floor: the least a VMM can do, in C, so that pyvmm's figures have something to stand on.

   floor exits GUEST MEMORY_MIB IRQCHIP
       Runs the flat real-mode GUEST (a file, loaded and entered at 0x7c00). Every exit is a port access; it does
       with it what the simplest VMM does: nothing, reads give all ones. At the gate port it prints a line, the first
       time the TSC's kHz, later the ticks that the guest measured by itself and stored from 0x10000 on,
       and reads a line to go on, or the end of the file to stop. Its last line has the median and 99th percentile of
       the ticks from one return of KVM_RUN to the next.

   floor start GUEST MEMORY_MIB IRQCHIP
       For every line it reads: create a machine, run it to its first exit, close it, and print ns to create (open
       /dev/kvm, VM, slot, irqchip, vCPU, registers), to the first exit, to close.

   IRQCHIP is 1 for the in-kernel PIC, IOAPIC, LAPIC and PIT, 0 for none. The memory slot comes first: a slot made
   after the irqchip waits for an SRCU grace period. The ports and the sample area are those of measure.py.
   Linux Documentation/virt/kvm/api.rst. */

#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

enum { LOAD = 0x7c00, GATE_PORT = 0x12, END_PORT = 0xf4, SAMPLES_AT = 0x10000, MOST_SAMPLES = 0x4000 };

struct machine {
    int kvm, vm, vcpu;
    uint8_t *memory;
    size_t memory_bytes, run_bytes;
    struct kvm_run *run;
};

static long checked(long result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

static void *mapped(void *address, const char *what)
{
    checked(address == MAP_FAILED ? -1 : 0, what);
    return address;
}

static struct machine create(const uint8_t *guest, size_t guest_bytes, size_t memory_mib, int irqchip)
{
    struct machine m = { .memory_bytes = memory_mib << 20 };
    m.kvm = checked(open("/dev/kvm", O_RDWR | O_CLOEXEC), "open /dev/kvm");
    m.vm = checked(ioctl(m.kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    m.memory = mapped(mmap(NULL, m.memory_bytes, PROT_READ | PROT_WRITE, flags, -1, 0), "mmap guest memory");
    memcpy(m.memory + LOAD, guest, guest_bytes);
    struct kvm_userspace_memory_region slot = { .memory_size = m.memory_bytes, .userspace_addr = (uintptr_t)m.memory };
    checked(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
    if (irqchip) {
        struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };
        checked(ioctl(m.vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
        checked(ioctl(m.vm, KVM_CREATE_PIT2, &pit), "KVM_CREATE_PIT2");
    }
    m.vcpu = checked(ioctl(m.vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    m.run_bytes = checked(ioctl(m.kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    m.run = mapped(mmap(NULL, m.run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m.vcpu, 0), "mmap kvm_run");

    struct kvm_sregs sregs;
    checked(ioctl(m.vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs.base = sregs.cs.selector = 0;
    checked(ioctl(m.vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    struct kvm_regs regs = { .rip = LOAD, .rsp = LOAD, .rflags = 1 << 1 };
    checked(ioctl(m.vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
    return m;
}

static void destroy(struct machine *m)
{
    munmap(m->run, m->run_bytes);
    close(m->vcpu);
    close(m->vm);
    close(m->kvm);
    munmap(m->memory, m->memory_bytes);
}

static int ascending(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* The guest is at the gate: hand over its samples and wait. 0 to stop. */
static int gate(struct machine *m)
{
    uint32_t *samples = (uint32_t *)(m->memory + SAMPLES_AT);
    char line[16];

    if (!samples[0])
        printf("%ld", checked(ioctl(m->vcpu, KVM_GET_TSC_KHZ, 0), "KVM_GET_TSC_KHZ"));
    for (size_t i = 0; i < MOST_SAMPLES && samples[i]; i++)
        printf("%u ", samples[i]);
    printf("\n");
    fflush(stdout);
    return fgets(line, sizeof line, stdin) != NULL;
}

static void exits(const uint8_t *guest, size_t guest_bytes, size_t memory_mib, int irqchip)
{
    enum { ROOM = 1 << 20 };
    struct machine m = create(guest, guest_bytes, memory_mib, irqchip);
    uint64_t *trips = calloc(ROOM, sizeof *trips), before = 0, now;
    size_t trip_count = 0;

    checked(trips == NULL ? -1 : 0, "memory for the samples");
    for (;;) {
        checked(ioctl(m.vcpu, KVM_RUN, 0), "KVM_RUN");
        now = __rdtsc();
        if (m.run->exit_reason != KVM_EXIT_IO) {
            fprintf(stderr, "floor: exit reason %u, only port accesses were expected\n", m.run->exit_reason);
            exit(1);
        }
        if (m.run->io.port == GATE_PORT) {
            if (!gate(&m))
                break;
            before = 0;
            continue;
        }
        if (m.run->io.direction == KVM_EXIT_IO_IN)
            memset((uint8_t *)m.run + m.run->io.data_offset, 0xff, m.run->io.size);
        if (before && trip_count < ROOM)
            trips[trip_count++] = now - before;
        before = now;
    }
    if (trip_count) {
        qsort(trips, trip_count, sizeof *trips, ascending);
        printf("%lu %lu\n", trips[trip_count / 2], trips[trip_count * 99 / 100]);
    }
    destroy(&m);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void start(const uint8_t *guest, size_t guest_bytes, size_t memory_mib, int irqchip)
{
    char line[16];

    while (fgets(line, sizeof line, stdin) != NULL) {
        uint64_t t0 = now_ns();
        struct machine m = create(guest, guest_bytes, memory_mib, irqchip);
        uint64_t t1 = now_ns();
        checked(ioctl(m.vcpu, KVM_RUN, 0), "KVM_RUN");
        checked(m.run->exit_reason == KVM_EXIT_IO && m.run->io.port == END_PORT ? 0 : -1, "the first exit");
        uint64_t t2 = now_ns();
        destroy(&m);
        printf("%lu %lu %lu\n", t1 - t0, t2 - t1, now_ns() - t2);
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    uint8_t guest[512];
    if (argc != 5) {
        fprintf(stderr, "usage: floor exits|start GUEST MEMORY_MIB IRQCHIP\n");
        return 2;
    }
    int fd = checked(open(argv[2], O_RDONLY), argv[2]);
    size_t guest_bytes = checked(read(fd, guest, sizeof guest), argv[2]);
    close(fd);
    if (!strcmp(argv[1], "start"))
        start(guest, guest_bytes, atoi(argv[3]), atoi(argv[4]));
    else
        exits(guest, guest_bytes, atoi(argv[3]), atoi(argv[4]));
    return 0;
}
