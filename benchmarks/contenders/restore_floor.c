/* The floor of a restore, in C: the least that any VMM has to do for a machine that goes on from a file.

   restore_floor SNAPSHOT IRQCHIP COUNT GPA:SIZE:OFFSET...
       For every line it reads: COUNT machines one after another, each with its memory mapped privately from the file
       (pieces as the arguments say), slots, irqchip, vCPU and all of the vCPU's state set, and run to its first exit;
       then all of them closed. Prints ns to make them, to their first exits (in all), to close them.

   The state that is set is a vCPU's that has just been made, with registers as a flat guest begins: as much as a
   snapshot's. Slots come before the irqchip: later ones wait for a grace period.
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

enum { LOAD = 0x7c00, END_PORT = 0xf4, MOST_MSRS = 1024, MOST_PIECES = 8, MOST_MACHINES = 1024 };

struct piece { uint64_t gpa, size, offset; };

struct machine {
    int kvm, vm, vcpu;
    void *memory[MOST_PIECES];
    struct kvm_run *run;
    size_t run_bytes;
};

static struct {
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_debugregs debugregs;
    struct kvm_xcrs xcrs;
    struct kvm_vcpu_events events;
    struct kvm_mp_state mp_state;
    struct kvm_lapic_state lapic;
    struct kvm_xsave xsave;
    struct { struct kvm_msrs head; struct kvm_msr_entry entries[MOST_MSRS]; } msrs;
    struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } cpuid;
    struct kvm_irqchip chips[3];
    struct kvm_pit_state2 pit;
    struct kvm_clock_data clock;
} state;

static struct piece pieces[MOST_PIECES];
static int piece_count, file, irqchip;

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

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void make(struct machine *m)
{
    m->kvm = checked(open("/dev/kvm", O_RDWR | O_CLOEXEC), "open /dev/kvm");
    m->vm = checked(ioctl(m->kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    for (int n = 0; n < piece_count; n++) {
        int flags = MAP_PRIVATE | MAP_NORESERVE;
        m->memory[n] = mapped(mmap(NULL, pieces[n].size, PROT_READ | PROT_WRITE, flags, file, pieces[n].offset), "mmap");
        struct kvm_userspace_memory_region slot = {
            .slot = n, .guest_phys_addr = pieces[n].gpa, .memory_size = pieces[n].size,
            .userspace_addr = (uintptr_t)m->memory[n],
        };
        checked(ioctl(m->vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
    }
    if (irqchip)
        checked(ioctl(m->vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    m->vcpu = checked(ioctl(m->vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    m->run_bytes = checked(ioctl(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    m->run = mapped(mmap(NULL, m->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m->vcpu, 0), "mmap kvm_run");
    checked(ioctl(m->vcpu, KVM_SET_CPUID2, &state.cpuid), "KVM_SET_CPUID2");
}

static void set(struct machine *m)
{
    checked(ioctl(m->vcpu, KVM_SET_SREGS, &state.sregs), "KVM_SET_SREGS");
    checked(ioctl(m->vcpu, KVM_SET_REGS, &state.regs), "KVM_SET_REGS");
    checked(ioctl(m->vcpu, KVM_SET_XSAVE, &state.xsave), "KVM_SET_XSAVE");
    checked(ioctl(m->vcpu, KVM_SET_XCRS, &state.xcrs), "KVM_SET_XCRS");
    checked(ioctl(m->vcpu, KVM_SET_DEBUGREGS, &state.debugregs), "KVM_SET_DEBUGREGS");
    checked(ioctl(m->vcpu, KVM_SET_MSRS, &state.msrs), "KVM_SET_MSRS");
    if (irqchip) {
        checked(ioctl(m->vcpu, KVM_SET_LAPIC, &state.lapic), "KVM_SET_LAPIC");
        for (int n = 0; n < 3; n++)
            checked(ioctl(m->vm, KVM_SET_IRQCHIP, &state.chips[n]), "KVM_SET_IRQCHIP");
    }
    checked(ioctl(m->vcpu, KVM_SET_MP_STATE, &state.mp_state), "KVM_SET_MP_STATE");
    checked(ioctl(m->vcpu, KVM_SET_VCPU_EVENTS, &state.events), "KVM_SET_VCPU_EVENTS");
    checked(ioctl(m->vm, KVM_SET_CLOCK, &state.clock), "KVM_SET_CLOCK");
}

static void destroy(struct machine *m)
{
    munmap(m->run, m->run_bytes);
    close(m->vcpu);
    close(m->vm);
    close(m->kvm);
    for (int n = 0; n < piece_count; n++)
        munmap(m->memory[n], pieces[n].size);
}

/* The state of a vCPU that has just been made, with registers as a flat guest begins. */
static void note_state(void)
{
    static struct { struct kvm_msr_list head; uint32_t indices[MOST_MSRS]; } list;
    struct machine m;
    int kvm = checked(open("/dev/kvm", O_RDWR | O_CLOEXEC), "open /dev/kvm");

    state.cpuid.head.nent = 256;
    checked(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &state.cpuid), "KVM_GET_SUPPORTED_CPUID");
    list.head.nmsrs = MOST_MSRS;
    checked(ioctl(kvm, KVM_GET_MSR_INDEX_LIST, &list), "KVM_GET_MSR_INDEX_LIST");
    close(kvm);
    make(&m);
    for (uint32_t n = 0; n < list.head.nmsrs; n++) {
        struct { struct kvm_msrs head; struct kvm_msr_entry entry; } one = { .head.nmsrs = 1 };
        one.entry.index = list.indices[n];
        if (ioctl(m.vcpu, KVM_GET_MSRS, &one) == 1 && ioctl(m.vcpu, KVM_SET_MSRS, &one) == 1)
            state.msrs.entries[state.msrs.head.nmsrs++] = one.entry;
    }
    checked(ioctl(m.vcpu, KVM_GET_SREGS, &state.sregs), "KVM_GET_SREGS");
    state.sregs.cs.base = state.sregs.cs.selector = 0;
    state.regs = (struct kvm_regs){ .rip = LOAD, .rsp = LOAD, .rflags = 1 << 1 };
    checked(ioctl(m.vcpu, KVM_GET_XSAVE, &state.xsave), "KVM_GET_XSAVE");
    checked(ioctl(m.vcpu, KVM_GET_XCRS, &state.xcrs), "KVM_GET_XCRS");
    checked(ioctl(m.vcpu, KVM_GET_DEBUGREGS, &state.debugregs), "KVM_GET_DEBUGREGS");
    checked(ioctl(m.vcpu, KVM_GET_VCPU_EVENTS, &state.events), "KVM_GET_VCPU_EVENTS");
    checked(ioctl(m.vcpu, KVM_GET_MP_STATE, &state.mp_state), "KVM_GET_MP_STATE");
    if (irqchip) {
        checked(ioctl(m.vcpu, KVM_GET_LAPIC, &state.lapic), "KVM_GET_LAPIC");
        for (int n = 0; n < 3; n++) {
            state.chips[n].chip_id = n;
            checked(ioctl(m.vm, KVM_GET_IRQCHIP, &state.chips[n]), "KVM_GET_IRQCHIP");
        }
    }
    checked(ioctl(m.vm, KVM_GET_CLOCK, &state.clock), "KVM_GET_CLOCK");
    state.clock.flags = 0;
    destroy(&m);
}

int main(int argc, char **argv)
{
    static struct machine machines[MOST_MACHINES];
    char line[16];

    if (argc < 5 || argc - 4 > MOST_PIECES || atoi(argv[3]) > MOST_MACHINES) {
        fprintf(stderr, "usage: restore_floor SNAPSHOT IRQCHIP COUNT GPA:SIZE:OFFSET...\n");
        return 2;
    }
    file = checked(open(argv[1], O_RDONLY | O_CLOEXEC), argv[1]);
    irqchip = atoi(argv[2]);
    int count = atoi(argv[3]);
    for (int n = 4; n < argc; n++) {
        struct piece *p = &pieces[piece_count++];
        checked(sscanf(argv[n], "%lu:%lu:%lu", &p->gpa, &p->size, &p->offset) == 3 ? 0 : -1, argv[n]);
    }
    note_state();
    while (fgets(line, sizeof line, stdin) != NULL) {
        uint64_t t0 = now_ns(), making = 0, running = 0;
        for (int n = 0; n < count; n++) {
            struct machine *m = &machines[n];
            make(m);
            set(m);
            uint64_t t1 = now_ns();
            checked(ioctl(m->vcpu, KVM_RUN, 0), "KVM_RUN");
            checked(m->run->exit_reason == KVM_EXIT_IO && m->run->io.port == END_PORT ? 0 : -1, "the first exit");
            uint64_t t2 = now_ns();
            making += t1 - t0;
            running += t2 - t1;
            t0 = t2;
        }
        for (int n = 0; n < count; n++)
            destroy(&machines[n]);
        printf("%lu %lu %lu\n", making, running, now_ns() - t0);
        fflush(stdout);
    }
    return 0;
}
