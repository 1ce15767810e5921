"""Names: KVM exit reasons, internal-error suberrors, system events, and the hardware's own exit codes (VMX, SVM).

All numbers come from the kernel's headers. Hardware codes: Intel SDM volume 3, appendix C; AMD APM volume 2, appendix C.
"""

cdef extern from *:
    """
    #include <linux/kvm.h>
    /* Only the tables of names are wanted from these two. */
    #include <asm/vmx.h>
    #include <asm/svm.h>
    typedef struct { int code; const char *name; } pyvmm_name;
    #ifndef KVM_EXIT_MEMORY_FAULT
    #define KVM_EXIT_MEMORY_FAULT 39
    #endif
    #define EXIT(n) { KVM_EXIT_##n, #n }
    static const pyvmm_name pyvmm_exits[] = {
        EXIT(UNKNOWN), EXIT(EXCEPTION), EXIT(IO), EXIT(HYPERCALL), EXIT(DEBUG), EXIT(HLT), EXIT(MMIO),
        EXIT(IRQ_WINDOW_OPEN), EXIT(SHUTDOWN), EXIT(FAIL_ENTRY), EXIT(INTR), EXIT(SET_TPR), EXIT(TPR_ACCESS),
        EXIT(S390_SIEIC), EXIT(S390_RESET), EXIT(DCR), EXIT(NMI), EXIT(INTERNAL_ERROR), EXIT(OSI), EXIT(PAPR_HCALL),
        EXIT(S390_UCONTROL), EXIT(WATCHDOG), EXIT(S390_TSCH), EXIT(EPR), EXIT(SYSTEM_EVENT), EXIT(S390_STSI),
        EXIT(IOAPIC_EOI), EXIT(HYPERV), EXIT(ARM_NISV), EXIT(X86_RDMSR), EXIT(X86_WRMSR), EXIT(DIRTY_RING_FULL),
        EXIT(AP_RESET_HOLD), EXIT(X86_BUS_LOCK), EXIT(XEN), EXIT(RISCV_SBI), EXIT(RISCV_CSR), EXIT(NOTIFY),
        EXIT(MEMORY_FAULT),
    };
    static const pyvmm_name pyvmm_suberrors[] = {
        { KVM_INTERNAL_ERROR_EMULATION, "EMULATION" }, { KVM_INTERNAL_ERROR_SIMUL_EX, "SIMUL_EX" },
        { KVM_INTERNAL_ERROR_DELIVERY_EV, "DELIVERY_EV" },
        { KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, "UNEXPECTED_EXIT_REASON" },
    };
    static const pyvmm_name pyvmm_system_events[] = {
        { KVM_SYSTEM_EVENT_SHUTDOWN, "SHUTDOWN" }, { KVM_SYSTEM_EVENT_RESET, "RESET" },
        { KVM_SYSTEM_EVENT_CRASH, "CRASH" }, { KVM_SYSTEM_EVENT_WAKEUP, "WAKEUP" },
        { KVM_SYSTEM_EVENT_SUSPEND, "SUSPEND" }, { KVM_SYSTEM_EVENT_SEV_TERM, "SEV_TERM" },
    };
    static const pyvmm_name pyvmm_vmx[] = { VMX_EXIT_REASONS };
    static const pyvmm_name pyvmm_svm[] = { SVM_EXIT_REASONS };
    #define COUNT(table) ((int)(sizeof(table) / sizeof *(table)))
    """
    ctypedef struct pyvmm_name:
        int code
        const char *name
    const pyvmm_name pyvmm_exits[]
    const pyvmm_name pyvmm_suberrors[]
    const pyvmm_name pyvmm_system_events[]
    const pyvmm_name pyvmm_vmx[]
    const pyvmm_name pyvmm_svm[]
    int COUNT(const pyvmm_name *)


EXIT_REASONS = {pyvmm_exits[i].code: pyvmm_exits[i].name.decode() for i in range(COUNT(pyvmm_exits))}
SUBERRORS = {pyvmm_suberrors[i].code: pyvmm_suberrors[i].name.decode() for i in range(COUNT(pyvmm_suberrors))}
SYSTEM_EVENTS = {pyvmm_system_events[i].code: pyvmm_system_events[i].name.decode()
                 for i in range(COUNT(pyvmm_system_events))}
VMX_EXIT_REASONS = {pyvmm_vmx[i].code: pyvmm_vmx[i].name.decode() for i in range(COUNT(pyvmm_vmx))}
SVM_EXIT_CODES = {pyvmm_svm[i].code: pyvmm_svm[i].name.decode() for i in range(COUNT(pyvmm_svm))}

# The high bit of VMX's exit reason: the entry itself failed (SDM vol. 3, 25.9.1).
VMX_FAILED_VMENTRY = 1 << 31


def exit_name(reason):
    """KVM_EXIT_<name> by number: "IO"; a number nobody knows stays a number."""
    return EXIT_REASONS.get(reason, f"exit {reason}")


def hardware_exit_name(code, vendor):
    """The hardware's exit code by name; ``vendor`` is CPUID's ("GenuineIntel", "AuthenticAMD")."""
    if vendor == "GenuineIntel":
        name = VMX_EXIT_REASONS.get(code & 0xFFFF, f"reason {code & 0xFFFF}")
        return f"VMX {name}" + (" (VM entry failed)" if code & VMX_FAILED_VMENTRY else "")
    if code == 0xFFFFFFFF or code == 0xFFFFFFFFFFFFFFFF:
        return "SVM INVALID (VMRUN refused the guest state)"
    return f"SVM {SVM_EXIT_CODES.get(code, f'code {code:#x}')}"
