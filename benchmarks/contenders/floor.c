/* The floor of `pyvmm bench exits`: the least a VMM can do, in C, so that all others have something to stand on.

   floor ROM MEMORY_MIB [cpus=N] [doorbell=pio|mmio:ADDRESS] [answer] [coalesce=pio|mmio:ADDRESS] [irqs] [kick] [share]

   Runs the 64 KiB ROM from its reset vector; its guest takes turns through the mailbox in its memory, which whoever
   measures reads and writes from outside (mailbox.py). Accesses are answered with the least: reads give all ones.

       cpus=N      so many vCPUs, each on a thread of its own; one runs on the process's only thread
       doorbell    an ioeventfd there, which nobody waits for
       answer      a thread waits for the doorbell, and tells the guest in the mailbox how often it rang
       coalesce    KVM gathers writes of 4 bytes there (1 to a port)
       irqs        a byte to port 0x2000 + n is the level of interrupt n
       kick        the guest only spins; a thread takes the turns: signals to the vCPU's thread, timed until that is out
                   of KVM_RUN
       share       note the ticks from leaving KVM_RUN to entering it again

   The first line printed is `memory ADDRESS tsc_khz N`, with share also `share ADDRESS`: of a count and as many 32-bit
   numbers, the last SHARES of them kept. Ends when it is killed. Linux Documentation/virt/kvm/api.rst. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>
#include <x86intrin.h>

enum { ROM_AT = 0xf0000, ROM_BYTES = 0x10000, RESET_IP = 0xfff0, KVM_TSS = 0xfffbd000, KVM_IDENTITY_MAP = 0xfffbc000 };
enum { MAILBOX = 0x180000, SAMPLES = 0x200000 };        /* exits.inc has these, and the mailbox */
enum { IRQ_PORT = 0x2000, IRQ_LINES = 16, SHARES = 1 << 16, KICK_PAUSE_US = 100, LOOK_US = 100 };

struct mailbox {
    uint64_t magic;
    _Atomic uint32_t turn, done;
    uint32_t warm_up, blocks, short_, long_, singles;
    _Atomic uint32_t answer;
};

struct vcpu {
    int fd;
    struct kvm_run *run;
    struct kvm_coalesced_mmio_ring *ring;
    pthread_t thread;
};

static int vm;
static uint8_t *memory;
static int irqs, share;
static struct { uint64_t count; uint32_t ticks[SHARES]; } shares;

static struct vcpu vcpus[256];
static _Atomic int wanted;              /* kick: a signal is under way */
static uint64_t out_at;                 /* kick: the TSC when it was out, */
static sem_t out;                       /* said by this: who waited by spinning could slow down a sibling core */
static int doorbell;

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

static void port_access(struct kvm_run *run)
{
    uint8_t *data = (uint8_t *)run + run->io.data_offset;

    if (run->io.direction == KVM_EXIT_IO_IN) {
        memset(data, 0xff, (size_t)run->io.size * run->io.count);
    } else if (irqs && run->io.port - IRQ_PORT < IRQ_LINES) {
        struct kvm_irq_level line = { .irq = run->io.port - IRQ_PORT, .level = data[0] & 1 };
        checked(ioctl(vm, KVM_IRQ_LINE, &line), "KVM_IRQ_LINE");
    }
}

/* By its name the harness knows which thread a vCPU is (exit_contender.py). */
static void name_thread(struct vcpu *vcpu)
{
    char name[16];

    snprintf(name, sizeof name, "CPU %d/KVM", (int)(vcpu - vcpus));
    prctl(PR_SET_NAME, name);
}

/* The loop that everything is measured against. */
static void *loop(void *argument)
{
    struct vcpu *vcpu = argument;
    struct kvm_run *run = vcpu->run;

    name_thread(vcpu);
    for (;;) {
        if (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
            checked(errno == EINTR || errno == EAGAIN ? 0 : -1, "KVM_RUN");
            continue;
        }
        if (vcpu->ring)
            vcpu->ring->first = vcpu->ring->last;       /* nobody wants to know what was written */
        switch (run->exit_reason) {
        case KVM_EXIT_IO:
            port_access(run);
            break;
        case KVM_EXIT_MMIO:
            if (!run->mmio.is_write)
                memset(run->mmio.data, 0xff, run->mmio.len);
            break;
        default:
            fprintf(stderr, "floor: exit reason %u\n", run->exit_reason);
            exit(1);
        }
    }
}

/* The same, with a look at the clock: that costs something, so it is a loop of its own. */
static void *loop_share(void *argument)
{
    struct vcpu *vcpu = argument;
    struct kvm_run *run = vcpu->run;
    uint64_t left = 0;

    for (;;) {
        if (left)
            shares.ticks[shares.count++ % SHARES] = __rdtsc() - left;
        left = 0;
        if (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
            checked(errno == EINTR || errno == EAGAIN ? 0 : -1, "KVM_RUN");
            continue;
        }
        left = __rdtsc();
        if (vcpu->ring)
            vcpu->ring->first = vcpu->ring->last;
        if (run->exit_reason == KVM_EXIT_IO)
            port_access(run);
        else if (run->exit_reason == KVM_EXIT_MMIO && !run->mmio.is_write)
            memset(run->mmio.data, 0xff, run->mmio.len);
    }
    return NULL;
}

/* Waits for the doorbell, and answers in the guest's memory. */
static void *answer(void *argument)
{
    struct mailbox *box = (struct mailbox *)(memory + MAILBOX);
    uint64_t rung;

    (void)argument;
    for (;;) {
        checked(read(doorbell, &rung, sizeof rung), "the doorbell");
        atomic_fetch_add(&box->answer, rung);
    }
    return NULL;
}

static void *loop_kicked(void *argument)
{
    struct vcpu *vcpu = argument;

    name_thread(vcpu);
    for (;;) {
        int result = ioctl(vcpu->fd, KVM_RUN, 0);
        uint64_t now = __rdtsc();
        checked(result < 0 && errno == EINTR ? 0 : -1, "a guest that only spins");
        vcpu->run->immediate_exit = 0;
        if (atomic_exchange(&wanted, 0)) {              /* SIGSTOP brings it here as well */
            out_at = now;
            sem_post(&out);
        }
    }
    return NULL;
}

/* A signal that comes just before KVM_RUN must not be lost. */
static void kicked(int number)
{
    (void)number;
    vcpus[0].run->immediate_exit = 1;
}

/* Takes the turns itself. The vCPU is left alone before each kick, for it to be deep in the guest. */
static void kick(void)
{
    struct mailbox *box = (struct mailbox *)(memory + MAILBOX);
    uint32_t *samples = (uint32_t *)(memory + SAMPLES);
    struct sigaction action = { .sa_handler = kicked };

    checked(sigaction(SIGUSR1, &action, NULL), "sigaction");
    checked(sem_init(&out, 0, 0), "sem_init");
    for (;;) {
        while (atomic_load(&box->turn) == atomic_load(&box->done))
            usleep(LOOK_US);
        for (uint32_t n = 0; n < box->warm_up + box->singles; n++) {
            usleep(KICK_PAUSE_US);
            atomic_store(&wanted, 1);
            uint64_t start = __rdtsc();
            pthread_kill(vcpus[0].thread, SIGUSR1);
            while (sem_wait(&out) < 0)
                ;
            if (n >= box->warm_up)
                samples[n - box->warm_up] = out_at - start;
        }
        atomic_store(&box->done, atomic_load(&box->turn));
    }
}

static void set_up_memory(const char *rom, size_t bytes)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    memory = mapped(mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, -1, 0), "mmap guest memory");
    int fd = checked(open(rom, O_RDONLY | O_CLOEXEC), rom);
    checked(read(fd, memory + ROM_AT, ROM_BYTES) == ROM_BYTES ? 0 : -1, "a ROM of 64 KiB");
    close(fd);
    struct kvm_userspace_memory_region slot = { .memory_size = bytes, .userspace_addr = (uintptr_t)memory };
    checked(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
}

static void set_up_irqchip(void)
{
    struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };
    uint64_t identity_map = KVM_IDENTITY_MAP;
    checked(ioctl(vm, KVM_SET_TSS_ADDR, KVM_TSS), "KVM_SET_TSS_ADDR");
    checked(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map), "KVM_SET_IDENTITY_MAP_ADDR");
    checked(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    checked(ioctl(vm, KVM_CREATE_PIT2, &pit), "KVM_CREATE_PIT2");
}

static void create_vcpu(int kvm, int n)
{
    static struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } cpuid;
    struct vcpu *vcpu = &vcpus[n];

    vcpu->fd = checked(ioctl(vm, KVM_CREATE_VCPU, n), "KVM_CREATE_VCPU");
    size_t run_bytes = checked(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    vcpu->run = mapped(mmap(NULL, run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0), "mmap kvm_run");
    cpuid.head.nent = 256;
    checked(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
    checked(ioctl(vcpu->fd, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
    if (n)
        return;                         /* the others wait for the first one's INIT and SIPI */
    struct kvm_sregs sregs;
    checked(ioctl(vcpu->fd, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs.base = ROM_AT;
    sregs.cs.selector = ROM_AT >> 4;
    checked(ioctl(vcpu->fd, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    struct kvm_regs regs = { .rip = RESET_IP, .rflags = 1 << 1 };
    checked(ioctl(vcpu->fd, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

/* "pio:0xe0": whether it is a port, and the address. */
static int place(const char *text, uint64_t *address)
{
    *address = strtoull(strchr(text, ':') + 1, NULL, 0);
    return !strncmp(text, "pio:", 4);
}

static void make_doorbell(const char *text)
{
    struct kvm_ioeventfd bell = { 0 };
    uint64_t address;
    doorbell = checked(eventfd(0, EFD_CLOEXEC), "eventfd");
    bell.fd = doorbell;
    bell.flags = place(text, &address) ? KVM_IOEVENTFD_FLAG_PIO : 0;
    bell.addr = address;
    bell.len = bell.flags ? 1 : 0;                      /* memory: a write of any size */
    checked(ioctl(vm, KVM_IOEVENTFD, &bell), "KVM_IOEVENTFD");
}

static void coalesce(int kvm, const char *text)
{
    uint64_t address;
    int is_port = place(text, &address);
    struct kvm_coalesced_mmio_zone zone = { .addr = address, .size = is_port ? 1 : 4, .pio = is_port };
    checked(ioctl(vm, KVM_REGISTER_COALESCED_MMIO, &zone), "KVM_REGISTER_COALESCED_MMIO");
    long pages = checked(ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_COALESCED_MMIO), "KVM_CAP_COALESCED_MMIO");
    vcpus[0].ring = (void *)((uint8_t *)vcpus[0].run + pages * sysconf(_SC_PAGESIZE));
}

int main(int argc, char **argv)
{
    int cpus = 1, kicks = 0, answers = 0;
    const char *bell = NULL, *gathered = NULL;

    if (argc < 3) {
        fprintf(stderr, "usage: floor ROM MEMORY_MIB [OPTION...]: see floor.c\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int n = 3; n < argc; n++) {
        if (!strncmp(argv[n], "cpus=", 5))
            cpus = atoi(argv[n] + 5);
        else if (!strncmp(argv[n], "doorbell=", 9))
            bell = argv[n] + 9;
        else if (!strncmp(argv[n], "coalesce=", 9))
            gathered = argv[n] + 9;
        else if (!strcmp(argv[n], "answer"))
            answers = 1;
        else if (!strcmp(argv[n], "irqs"))
            irqs = 1;
        else if (!strcmp(argv[n], "kick"))
            kicks = 1;
        else if (!strcmp(argv[n], "share"))
            share = 1;
        else
            checked(-1, argv[n]);
    }
    int kvm = checked(open("/dev/kvm", O_RDWR | O_CLOEXEC), "open /dev/kvm");
    vm = checked(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    /* The slot comes first: one made after the irqchip waits for a grace period. */
    set_up_memory(argv[1], (size_t)atoi(argv[2]) << 20);
    set_up_irqchip();
    for (int n = 0; n < cpus; n++)
        create_vcpu(kvm, n);
    if (bell)
        make_doorbell(bell);
    if (gathered)
        coalesce(kvm, gathered);
    printf("memory %p tsc_khz %ld", memory, checked(ioctl(vcpus[0].fd, KVM_GET_TSC_KHZ, 0), "KVM_GET_TSC_KHZ"));
    if (share)
        printf(" share %p", &shares);
    printf("\n");
    fflush(stdout);
    pthread_t waiter;
    if (answers)
        checked(-pthread_create(&waiter, NULL, answer, NULL), "pthread_create");
    for (int n = kicks ? 0 : 1; n < cpus; n++)
        checked(-pthread_create(&vcpus[n].thread, NULL, kicks ? loop_kicked : loop, &vcpus[n]), "pthread_create");
    if (kicks)
        kick();
    (share ? loop_share : loop)(&vcpus[0]);
    return 0;
}
