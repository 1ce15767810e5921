# vmcall.S, linked at 0x100000. vmexit's: a hypercall that KVM does not know and refuses by itself. On AMD KVM replaces
# the instruction by VMMCALL when it first meets it.

        .set    USES_RCX, 1
        .macro  access
        xor     %eax, %eax
        vmcall
        .endm
        .include "exits.inc"
