# cpuid.S, linked at 0x100000. vmexit's: CPUID, which KVM answers by itself. Where it does not exit at all (software
# virtualization may patch it) it is the cost of that.

        .set    USES_RCX, 1
        .macro  access
        xor     %eax, %eax
        cpuid
        .endm
        .include "exits.inc"
