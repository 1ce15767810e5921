# <linux/kvm.h>, the fields and constants pyvmm uses, in the kernel's spelling. Values come from the header; the few
# that are newer than Debian 12's header have a fallback, checked against the kernel's api.rst.

from libc.stdint cimport uint8_t, uint16_t, uint32_t

cdef extern from "<linux/types.h>":
    ctypedef unsigned long long __u64   # the header's own: a uint64_t * is another type to C

cdef extern from *:
    """
    #include <linux/kvm.h>
    #ifndef KVM_EXIT_MEMORY_FAULT
    #define KVM_EXIT_MEMORY_FAULT 39
    #endif
    /* kvm_run's union gained memory_fault in 6.8: {flags, gpa, size}. */
    struct pyvmm_memory_fault { __u64 flags, gpa, size; };
    /* KVM_COALESCED_MMIO_MAX is written in terms of PAGE_SIZE, which user space has not. */
    #define PYVMM_COALESCED_ENTRIES \
        ((4096 - sizeof(struct kvm_coalesced_mmio_ring)) / sizeof(struct kvm_coalesced_mmio))
    """
    unsigned int COALESCED_ENTRIES "PYVMM_COALESCED_ENTRIES"
    struct pyvmm_memory_fault:
        __u64 flags, gpa, size

cdef extern from "<linux/kvm.h>" nogil:
    int KVM_API_VERSION

    enum:
        KVM_EXIT_UNKNOWN, KVM_EXIT_EXCEPTION, KVM_EXIT_IO, KVM_EXIT_HYPERCALL, KVM_EXIT_DEBUG, KVM_EXIT_HLT
        KVM_EXIT_MMIO, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_SHUTDOWN, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTR
        KVM_EXIT_SET_TPR, KVM_EXIT_TPR_ACCESS, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_IOAPIC_EOI
        KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_EXIT_MEMORY_FAULT
        KVM_EXIT_IO_OUT
        KVM_SYSTEM_EVENT_SHUTDOWN, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_CRASH

    unsigned int KVM_INTERNAL_ERROR_EMULATION

    unsigned long KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_GET_MSR_INDEX_LIST, KVM_CHECK_EXTENSION
    unsigned long KVM_GET_VCPU_MMAP_SIZE, KVM_GET_SUPPORTED_CPUID, KVM_GET_EMULATED_CPUID
    unsigned long KVM_GET_MSR_FEATURE_INDEX_LIST, KVM_ENABLE_CAP

    unsigned long KVM_CREATE_VCPU, KVM_GET_DIRTY_LOG, KVM_SET_USER_MEMORY_REGION, KVM_SET_TSS_ADDR
    unsigned long KVM_SET_IDENTITY_MAP_ADDR, KVM_CREATE_IRQCHIP, KVM_IRQ_LINE, KVM_GET_IRQCHIP, KVM_SET_IRQCHIP
    unsigned long KVM_CREATE_PIT2, KVM_GET_PIT2, KVM_SET_PIT2, KVM_REINJECT_CONTROL, KVM_SET_GSI_ROUTING
    unsigned long KVM_SIGNAL_MSI, KVM_IRQFD, KVM_IOEVENTFD, KVM_REGISTER_COALESCED_MMIO
    unsigned long KVM_UNREGISTER_COALESCED_MMIO, KVM_GET_CLOCK, KVM_SET_CLOCK, KVM_CLEAR_DIRTY_LOG, KVM_GET_STATS_FD

    unsigned long KVM_RUN, KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS, KVM_GET_SREGS2, KVM_SET_SREGS2
    unsigned long KVM_TRANSLATE, KVM_INTERRUPT, KVM_GET_MSRS, KVM_SET_MSRS, KVM_GET_FPU, KVM_SET_FPU, KVM_GET_LAPIC
    unsigned long KVM_SET_LAPIC, KVM_SET_CPUID2, KVM_GET_CPUID2, KVM_TPR_ACCESS_REPORTING, KVM_GET_MP_STATE
    unsigned long KVM_SET_MP_STATE, KVM_NMI, KVM_SET_GUEST_DEBUG, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS
    unsigned long KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, KVM_SET_TSC_KHZ, KVM_GET_TSC_KHZ, KVM_GET_XSAVE
    unsigned long KVM_SET_XSAVE, KVM_GET_XSAVE2, KVM_GET_XCRS, KVM_SET_XCRS, KVM_KVMCLOCK_CTRL, KVM_SMI
    unsigned long KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR, KVM_GET_NESTED_STATE, KVM_SET_NESTED_STATE

    int KVM_CAP_IRQCHIP, KVM_CAP_NR_VCPUS, KVM_CAP_MAX_VCPUS, KVM_CAP_NR_MEMSLOTS, KVM_CAP_COALESCED_MMIO
    int KVM_CAP_COALESCED_PIO, KVM_CAP_XSAVE2, KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_IMMEDIATE_EXIT
    int KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_EXIT_HYPERCALL, KVM_CAP_MAX_VCPU_ID, KVM_CAP_SPLIT_IRQCHIP

    unsigned int KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
    struct kvm_userspace_memory_region:
        uint32_t slot, flags
        __u64 guest_phys_addr, memory_size, userspace_addr

    struct kvm_dirty_log:
        uint32_t slot
        void *dirty_bitmap

    struct kvm_clear_dirty_log:
        uint32_t slot, num_pages
        __u64 first_page
        void *dirty_bitmap

    struct kvm_device_attr:
        uint32_t flags, group
        __u64 attr, addr

    struct kvm_enable_cap:
        uint32_t cap, flags
        __u64 args[4]

    struct kvm_msr_list:
        uint32_t nmsrs
        uint32_t *indices

    struct kvm_cpuid_entry2:
        uint32_t function, index, flags, eax, ebx, ecx, edx

    struct kvm_cpuid2:
        uint32_t nent
        kvm_cpuid_entry2 *entries

    struct kvm_pit_config:
        uint32_t flags

    struct kvm_reinject_control:
        uint8_t pit_reinject

    struct kvm_irq_level:
        uint32_t irq, level

    struct kvm_irqchip:
        uint32_t chip_id

    struct kvm_pit_state2:
        uint32_t flags

    unsigned int KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI
    unsigned int KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC
    struct kvm_irq_routing_irqchip:
        uint32_t irqchip, pin
    struct kvm_irq_routing_msi:
        uint32_t address_lo, address_hi, data
    union _routing_target:
        kvm_irq_routing_irqchip irqchip
        kvm_irq_routing_msi msi
    struct kvm_irq_routing_entry:
        uint32_t gsi, type, flags
        _routing_target u
    struct kvm_irq_routing:
        uint32_t nr, flags
        kvm_irq_routing_entry *entries

    struct kvm_msi:
        uint32_t address_lo, address_hi, data, flags

    unsigned int KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE
    struct kvm_irqfd:
        uint32_t fd, gsi, flags, resamplefd

    unsigned int KVM_IOEVENTFD_FLAG_DATAMATCH, KVM_IOEVENTFD_FLAG_PIO, KVM_IOEVENTFD_FLAG_DEASSIGN
    struct kvm_ioeventfd:
        __u64 datamatch, addr
        uint32_t len
        int fd
        uint32_t flags

    struct kvm_coalesced_mmio_zone:
        __u64 addr
        uint32_t size, pio

    struct kvm_coalesced_mmio:
        __u64 phys_addr
        uint32_t len, pio
        uint8_t data[8]

    struct kvm_coalesced_mmio_ring:
        uint32_t first, last
        kvm_coalesced_mmio *coalesced_mmio

    struct kvm_clock_data:
        __u64 clock
        uint32_t flags
        __u64 realtime, host_tsc

    struct kvm_regs:
        __u64 rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags

    struct kvm_segment:
        __u64 base
        uint32_t limit
        uint16_t selector
        uint8_t type, present, dpl, db, s, l, g, avl, unusable, padding

    struct kvm_dtable:
        __u64 base
        uint16_t limit
        uint16_t padding[3]

    struct kvm_sregs:
        kvm_segment cs, ds, es, fs, gs, ss, tr, ldt
        kvm_dtable gdt, idt
        __u64 cr0, cr2, cr3, cr4, cr8, efer, apic_base
        __u64 interrupt_bitmap[4]

    struct kvm_sregs2:
        kvm_segment cs, ds, es, fs, gs, ss, tr, ldt
        kvm_dtable gdt, idt
        __u64 cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags
        __u64 pdptrs[4]

    struct kvm_debugregs:
        __u64 db[4]
        __u64 dr6, dr7, flags
        __u64 reserved[9]

    struct kvm_fpu:
        uint16_t fcw

    struct kvm_xsave:
        uint32_t *region

    struct kvm_xcr:
        uint32_t xcr, reserved
        __u64 value
    enum:
        KVM_MAX_XCRS
    struct kvm_xcrs:
        uint32_t nr_xcrs, flags
        kvm_xcr xcrs[16]

    struct kvm_lapic_state:
        char regs[0x400]

    struct kvm_mp_state:
        uint32_t mp_state

    struct kvm_vcpu_events:
        uint32_t flags

    struct kvm_msr_entry:
        uint32_t index, reserved
        __u64 data
    struct kvm_msrs:
        uint32_t nmsrs, pad
        kvm_msr_entry *entries

    struct kvm_interrupt:
        uint32_t irq

    struct kvm_translation:
        __u64 linear_address, physical_address
        uint8_t valid, writeable, usermode

    struct kvm_tpr_access_ctl:
        uint32_t enabled, flags

    unsigned int KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_SW_BP, KVM_GUESTDBG_USE_HW_BP
    unsigned int KVM_GUESTDBG_BLOCKIRQ
    struct kvm_guest_debug_arch:
        __u64 debugreg[8]
    struct kvm_guest_debug:
        uint32_t control, pad
        kvm_guest_debug_arch arch

    struct kvm_stats_header:
        uint32_t flags, name_size, num_desc, id_offset, desc_offset, data_offset

    # kvm_run's union: the header's structures are anonymous; these names stand for them and are never instantiated.
    struct _run_hw:
        __u64 hardware_exit_reason
    struct _run_fail_entry:
        __u64 hardware_entry_failure_reason
        uint32_t cpu
    struct _run_ex:
        uint32_t exception, error_code
    struct _run_io:
        uint8_t direction, size
        uint16_t port
        uint32_t count
        __u64 data_offset
    struct kvm_debug_exit_arch:
        uint32_t exception
        __u64 pc, dr6, dr7
    struct _run_debug:
        kvm_debug_exit_arch arch
    struct _run_mmio:
        __u64 phys_addr
        uint8_t data[8]
        uint32_t len
        uint8_t is_write
    struct _run_hypercall:
        __u64 nr
        __u64 args[6]
        __u64 ret
    struct _run_tpr_access:
        __u64 rip
        uint32_t is_write
    struct _run_internal:
        uint32_t suberror, ndata
        __u64 data[16]
    struct _run_system_event:
        uint32_t type, ndata
        __u64 data[16]
    struct _run_eoi:
        uint8_t vector
    struct _run_msr:
        uint8_t error
        uint32_t reason, index
        __u64 data

    struct kvm_run:
        uint8_t request_interrupt_window, immediate_exit
        uint32_t exit_reason
        uint8_t ready_for_interrupt_injection, if_flag
        __u64 cr8, apic_base
        _run_hw hw
        _run_fail_entry fail_entry
        _run_ex ex
        _run_io io
        _run_debug debug
        _run_mmio mmio
        _run_hypercall hypercall
        _run_tpr_access tpr_access
        _run_internal internal
        _run_system_event system_event
        _run_eoi eoi
        _run_msr msr
