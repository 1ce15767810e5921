"""BootState: in what state the first processor enters a kernel."""

from __future__ import annotations

from pyvmm.x86 import cpu_state, layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.x86.cpu_state import State


class BootState:
    """The registers of the first processor at a kernel's entry.

    ``protocol`` bzimage, pvh, multiboot or flat; ``mode`` real16, protected32 or long64; ``rip`` an offset in
    ``cs`` in real16, else an address; ``regs`` the general registers that are not zero but for rsp; ``image``
    (start, end) of the kernel in guest memory.
    """

    __slots__ = ("cs", "gdt_gpa", "image", "mode", "protocol", "regs", "rip", "rsp")

    def __init__(
        self,
        protocol: str,
        mode: str,
        rip: int,
        *,
        rsp: int = 0,
        regs: dict[str, int] | None = None,
        cs: int = 0,
        gdt_gpa: int = layout.BOOT_GDT,
        image: tuple[int, int] = (0, 0),
    ) -> None:
        self.protocol = protocol
        self.mode = mode
        self.rip = rip
        self.rsp = rsp
        self.regs = regs or {}
        self.cs = cs
        self.gdt_gpa = gdt_gpa
        self.image = image

    def apply(self, regs: State, sregs: State) -> None:
        """Fill the dicts of KVM_GET_REGS and KVM_GET_SREGS; KVM's own (the APIC base) stays."""
        if self.mode == "real16":
            cpu_state.real_mode(regs, sregs, self.cs, self.rip, data=self.cs, sp=self.rsp)
        elif self.mode == "protected32":
            cpu_state.protected_mode(regs, sregs, self.rip, esp=self.rsp, gdt_gpa=self.gdt_gpa)
        else:
            cpu_state.long_mode(regs, sregs, self.rip, rsp=self.rsp, gdt_gpa=self.gdt_gpa)
        regs.update(self.regs)
