"""From a failed ioctl to a KvmError: its kernel name, errno, and what a user can do about it."""

from libc.errno cimport errno

from errno import E2BIG, EACCES, EBUSY, EEXIST, EINVAL, EMFILE, ENFILE, ENODEV, ENOENT, ENOMEM, ENOSPC, ENOTTY, ENXIO, EPERM

from pyvmm.errors import KvmError

REMEDIES = {
    ("open /dev/kvm", ENOENT): "this host has no KVM: load kvm_intel or kvm_amd, or turn on virtualization in the "
                               "firmware; in a container or a VM, pass /dev/kvm through",
    ("open /dev/kvm", ENODEV): "the kernel has KVM but no CPU virtualization to use: turn it on in the firmware",
    ("open /dev/kvm", EACCES): "ask an administrator of this host to let you in",  # access.py says how
    ("open /dev/kvm", EPERM): "the sandbox around this process forbids /dev/kvm: allow the device in its cgroup",
    ("open /dev/kvm", EMFILE): "too many open files: raise ulimit -n, or close machines that are done",
    ("open /dev/kvm", ENFILE): "the host is out of file descriptors: raise fs.file-max",
    ("KVM_CREATE_VM", EMFILE): "too many open files: raise ulimit -n, or close machines that are done",
    ("KVM_CREATE_VM", ENFILE): "the host is out of file descriptors: raise fs.file-max",
    ("KVM_CREATE_VM", ENOMEM): "the host is out of memory: close machines that are done",
    ("KVM_CREATE_VM", EBUSY): "another hypervisor holds the CPU's virtualization: unload it (VirtualBox, VMware)",
    ("KVM_CREATE_VCPU", EINVAL): "too many vCPUs, or an id past KVM_CAP_MAX_VCPU_ID: ask for fewer (pyvmm doctor tells)",
    ("KVM_CREATE_VCPU", EEXIST): "a vCPU with this id is there already",
    ("KVM_CREATE_VCPU", EMFILE): "too many open files: raise ulimit -n, or close machines that are done",
    ("KVM_CREATE_VCPU", ENOMEM): "the host is out of memory: ask for fewer vCPUs",
    ("KVM_SET_USER_MEMORY_REGION", EEXIST): "the slot overlaps another one",
    ("KVM_SET_USER_MEMORY_REGION", EINVAL): "address and size must be page-aligned and the slot number below "
                                            "KVM_CAP_NR_MEMSLOTS",
    ("KVM_CREATE_IRQCHIP", EEXIST): "the machine has its interrupt controllers already",
    ("KVM_CREATE_IRQCHIP", EINVAL): "vCPUs exist already: create the irqchip before the first of them",
    ("KVM_IRQ_LINE", ENXIO): "this machine has no in-kernel irqchip",
    ("KVM_IOEVENTFD", EEXIST): "this address, size and value signal a descriptor already",
    ("KVM_REGISTER_COALESCED_MMIO", ENOSPC): "KVM's bus is full (1000 devices): unregister some",
    ("KVM_SET_CPUID2", E2BIG): "too many CPUID entries",
    ("KVM_SET_CPUID2", EINVAL): "the vCPU has run already, or the CPUID table contradicts itself",
}


cdef int checked(int rc, str name) except -1:
    if rc >= 0:
        return rc
    remedy = REMEDIES.get((name, errno), "")
    if not remedy and errno in (ENOTTY, EINVAL) and rc == -1 and name.startswith("KVM_"):
        remedy = f"this kernel's KVM may lack it (pyvmm doctor lists the capabilities)"
    raise KvmError(name, errno, remedy)
