"""A VM descriptor: memory slots, interrupt controllers and their lines, eventfds, coalesced zones, the clock.

Linux Documentation/virt/kvm/api.rst; each method names its ioctl.
"""

from libc.errno cimport EPERM, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset


from pyvmm.kvm cimport uapi
from pyvmm.kvm.ioctl cimport checked, ioctl, slow_ioctl
from pyvmm.kvm.last_close cimport last_close

from pyvmm.errors import ConfigError, StateError
from pyvmm.kvm.vcpu import Vcpu

MEM_LOG_DIRTY_PAGES = uapi.KVM_MEM_LOG_DIRTY_PAGES
DIRTY_LOG_MANUAL_PROTECT = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
MEM_READONLY = uapi.KVM_MEM_READONLY
PIC_MASTER = uapi.KVM_IRQCHIP_PIC_MASTER
PIC_SLAVE = uapi.KVM_IRQCHIP_PIC_SLAVE
IOAPIC = uapi.KVM_IRQCHIP_IOAPIC


cdef class Vm:
    """One virtual machine as the kernel sees it. Made by Kvm.create_vm().

    Set memory slots before creating the irqchip: each later slot change waits for an SRCU grace period (milliseconds).
    """

    def __cinit__(self, int fd, size_t vcpu_mmap_size):
        self.fd = fd
        self.vcpu_mmap_size = vcpu_mmap_size

    def __dealloc__(self):
        # Refused arguments end here too, with a descriptor number that nobody has set.
        if self.vcpu_mmap_size and self.fd >= 0:
            last_close(self.fd)

    def close(self):
        """Close the descriptor. The kernel's VM goes when its last vCPU descriptor is closed too: then, if all others
        were closed before, or some milliseconds later and with nobody waiting for it, where the kernel has io_uring.
        """
        cdef int fd = self.fd
        self.fd = -1
        if fd >= 0:
            with nogil:
                last_close(fd)

    cdef int _open(self) except -1:
        if self.fd < 0:
            raise StateError("this VM is closed")
        return self.fd

    def check_extension(self, int number):
        """KVM_CHECK_EXTENSION on this VM: some capabilities differ from those of the system descriptor."""
        return checked(ioctl(self._open(), uapi.KVM_CHECK_EXTENSION, <long>number), "KVM_CHECK_EXTENSION")

    def enable_cap(self, uint32_t number, *args):
        """KVM_ENABLE_CAP with up to four arguments."""
        cdef uapi.kvm_enable_cap cap
        memset(&cap, 0, sizeof(cap))
        cap.cap = number
        if len(args) > 4:
            raise ConfigError(f"KVM_ENABLE_CAP with {len(args)} arguments: give at most 4")
        for i, value in enumerate(args):
            cap.args[i] = value
        checked(ioctl(self._open(), uapi.KVM_ENABLE_CAP, &cap), "KVM_ENABLE_CAP")

    def create_vcpu(self, long vcpu_id):
        """KVM_CREATE_VCPU. With an in-kernel irqchip the id is the local APIC id."""
        fd = checked(ioctl(self._open(), uapi.KVM_CREATE_VCPU, vcpu_id), "KVM_CREATE_VCPU")
        return Vcpu(fd, vcpu_id, self.vcpu_mmap_size)

    # -- memory --------------------------------------------------------------------------------------------------------

    def set_memory_slot(self, uint32_t slot, uint64_t gpa, uint64_t size_bytes, uint64_t host_address, uint32_t flags=0):
        """KVM_SET_USER_MEMORY_REGION. ``size_bytes`` 0 deletes the slot."""
        cdef uapi.kvm_userspace_memory_region region
        region.slot = slot
        region.flags = flags
        region.guest_phys_addr = gpa
        region.memory_size = size_bytes
        region.userspace_addr = host_address
        checked(slow_ioctl(self._open(), uapi.KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION")

    def set_memory(self, memory, uint32_t flags=0):
        """A slot for each region of a GuestMemory, numbered in their order; the memory is kept alive by this Vm."""
        for slot, region in enumerate(memory.ram):
            self.set_memory_slot(slot, region.gpa, region.size_bytes, region.host_address,
                                 flags | (uapi.KVM_MEM_READONLY if region.readonly else 0))
        self.memory = memory

    def dirty_log(self, uint32_t slot, uint64_t size_bytes):
        """KVM_GET_DIRTY_LOG: a bitmap, a bit a 4 KiB page, of what was written since the last call.

        With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 enabled: since the last ``clear_dirty_log`` of that page.
        """
        cdef uapi.kvm_dirty_log log
        bitmap = bytearray((size_bytes // 4096 + 63) // 64 * 8)
        memset(&log, 0, sizeof(log))
        log.slot = slot
        log.dirty_bitmap = <uint8_t *>bitmap
        checked(slow_ioctl(self._open(), uapi.KVM_GET_DIRTY_LOG, &log), "KVM_GET_DIRTY_LOG")
        return bytes(bitmap)

    def clear_dirty_log(self, uint32_t slot, uint64_t first_page, uint32_t pages, bytes bitmap not None):
        """KVM_CLEAR_DIRTY_LOG: forget the pages that ``bitmap`` has, the first bit being ``first_page``, and note anew.

        ``first_page`` is a multiple of 64, and so is ``pages`` but where the slot ends.
        """
        cdef uapi.kvm_clear_dirty_log log
        if <uint64_t>len(bitmap) * 8 < pages:
            raise ConfigError(f"a bitmap of {len(bitmap)} bytes for {pages} pages: give a bit a page")
        memset(&log, 0, sizeof(log))
        log.slot = slot
        log.first_page = first_page
        log.num_pages = pages
        log.dirty_bitmap = <uint8_t *>bitmap
        checked(slow_ioctl(self._open(), uapi.KVM_CLEAR_DIRTY_LOG, &log), "KVM_CLEAR_DIRTY_LOG")

    # -- interrupt controllers -----------------------------------------------------------------------------------------

    def set_tss_address(self, unsigned long gpa):
        """KVM_SET_TSS_ADDR: three pages VMX may need for real mode; outside RAM and MMIO."""
        checked(ioctl(self._open(), uapi.KVM_SET_TSS_ADDR, gpa), "KVM_SET_TSS_ADDR")

    def set_identity_map_address(self, uint64_t gpa):
        """KVM_SET_IDENTITY_MAP_ADDR: one page, likewise. Before the first vCPU."""
        checked(ioctl(self._open(), uapi.KVM_SET_IDENTITY_MAP_ADDR, &gpa), "KVM_SET_IDENTITY_MAP_ADDR")

    def create_irqchip(self):
        """KVM_CREATE_IRQCHIP: PIC pair, IOAPIC, and a local APIC in every vCPU made after this."""
        checked(slow_ioctl(self._open(), uapi.KVM_CREATE_IRQCHIP, NULL), "KVM_CREATE_IRQCHIP")
        self.has_irqchip = True

    def create_pit(self, *, bint speaker=True):
        """KVM_CREATE_PIT2, with port 0x61 where ``speaker``. It reinjects lost ticks until told otherwise."""
        cdef uapi.kvm_pit_config config
        memset(&config, 0, sizeof(config))
        config.flags = speaker
        checked(slow_ioctl(self._open(), uapi.KVM_CREATE_PIT2, &config), "KVM_CREATE_PIT2")

    def set_pit_reinject(self, bint reinject):
        """KVM_REINJECT_CONTROL: False lets a tick that was missed be lost, as on a PC.

        Turning it off waits for a grace period, up to some 20 ms, without the GIL.
        """
        cdef uapi.kvm_reinject_control control
        memset(&control, 0, sizeof(control))
        control.pit_reinject = reinject
        checked(slow_ioctl(self._open(), uapi.KVM_REINJECT_CONTROL, &control), "KVM_REINJECT_CONTROL")

    def irq_line(self, uint32_t gsi, uint32_t level):
        """KVM_IRQ_LINE: drive a GSI of the in-kernel irqchip."""
        self._open()
        checked(vm_set_line(self, gsi, level), "KVM_IRQ_LINE")

    def get_irqchip(self, uint32_t chip):
        """KVM_GET_IRQCHIP: the kernel's struct kvm_irqchip of PIC_MASTER, PIC_SLAVE or IOAPIC, as bytes."""
        state = bytearray(sizeof(uapi.kvm_irqchip))
        cdef uapi.kvm_irqchip *p = <uapi.kvm_irqchip *><uint8_t *>state
        p.chip_id = chip
        checked(ioctl(self._open(), uapi.KVM_GET_IRQCHIP, p), "KVM_GET_IRQCHIP")
        return bytes(state)

    def set_irqchip(self, bytes state):
        """KVM_SET_IRQCHIP with what get_irqchip gave."""
        if len(state) != sizeof(uapi.kvm_irqchip):
            raise ValueError(f"irqchip state of {len(state)} bytes, not {sizeof(uapi.kvm_irqchip)}")
        checked(ioctl(self._open(), uapi.KVM_SET_IRQCHIP, <const uint8_t *>state), "KVM_SET_IRQCHIP")

    def get_pit(self):
        """KVM_GET_PIT2: struct kvm_pit_state2, as bytes."""
        state = bytearray(sizeof(uapi.kvm_pit_state2))
        checked(ioctl(self._open(), uapi.KVM_GET_PIT2, <uint8_t *>state), "KVM_GET_PIT2")
        return bytes(state)

    def set_pit(self, bytes state):
        """KVM_SET_PIT2 with what get_pit gave."""
        if len(state) != sizeof(uapi.kvm_pit_state2):
            raise ValueError(f"PIT state of {len(state)} bytes, not {sizeof(uapi.kvm_pit_state2)}")
        checked(ioctl(self._open(), uapi.KVM_SET_PIT2, <const uint8_t *>state), "KVM_SET_PIT2")

    def set_gsi_routing(self, routes):
        """KVM_SET_GSI_ROUTING, the whole table: (gsi, "irqchip", chip, pin) and (gsi, "msi", address, data)."""
        cdef uint32_t n = len(routes)
        cdef uapi.kvm_irq_routing *table
        cdef uapi.kvm_irq_routing_entry *e
        table = <uapi.kvm_irq_routing *>calloc(1, sizeof(uapi.kvm_irq_routing) + n * sizeof(uapi.kvm_irq_routing_entry))
        if table == NULL:
            raise MemoryError
        try:
            table.nr = n
            e = <uapi.kvm_irq_routing_entry *>(<char *>table + sizeof(uapi.kvm_irq_routing))
            for gsi, kind, a, b in routes:
                e.gsi = gsi
                if kind == "irqchip":
                    e.type = uapi.KVM_IRQ_ROUTING_IRQCHIP
                    e.u.irqchip.irqchip = a
                    e.u.irqchip.pin = b
                elif kind == "msi":
                    e.type = uapi.KVM_IRQ_ROUTING_MSI
                    e.u.msi.address_lo = a & 0xFFFFFFFF
                    e.u.msi.address_hi = a >> 32
                    e.u.msi.data = b
                else:
                    raise ValueError(f"route of kind {kind!r}: use 'irqchip' or 'msi'")
                e += 1
            checked(slow_ioctl(self._open(), uapi.KVM_SET_GSI_ROUTING, table), "KVM_SET_GSI_ROUTING")
        finally:
            free(table)

    def signal_msi(self, uint64_t address, uint32_t data):
        """KVM_SIGNAL_MSI: True where a local APIC took it."""
        cdef uapi.kvm_msi msi
        memset(&msi, 0, sizeof(msi))
        msi.address_lo = address & 0xFFFFFFFF
        msi.address_hi = address >> 32
        msi.data = data
        cdef int rc = ioctl(self._open(), uapi.KVM_SIGNAL_MSI, &msi)
        if rc == -1 and errno == EPERM:
            return False    # the -1 that KVM has for "nobody is addressed", taken for an errno
        return checked(rc, "KVM_SIGNAL_MSI") > 0

    # -- eventfds and coalescing ---------------------------------------------------------------------------------------

    def irqfd(self, int fd, uint32_t gsi, *, int resample_fd=-1, bint deassign=False):
        """KVM_IRQFD: the eventfd ``fd`` raises ``gsi``; with ``resample_fd`` a level line, signalled at its EOI."""
        cdef uapi.kvm_irqfd irqfd
        memset(&irqfd, 0, sizeof(irqfd))
        irqfd.fd = fd
        irqfd.gsi = gsi
        if deassign:
            irqfd.flags = uapi.KVM_IRQFD_FLAG_DEASSIGN
        elif resample_fd >= 0:
            irqfd.flags = uapi.KVM_IRQFD_FLAG_RESAMPLE
            irqfd.resamplefd = resample_fd
        checked(slow_ioctl(self._open(), uapi.KVM_IRQFD, &irqfd), "KVM_IRQFD")

    def ioeventfd(self, int fd, uint64_t address, uint32_t size, *, bint pio=False, datamatch=None, bint deassign=False):
        """KVM_IOEVENTFD: a guest write of ``size`` bytes (0: any) at ``address`` signals ``fd``, with no exit."""
        cdef uapi.kvm_ioeventfd event
        memset(&event, 0, sizeof(event))
        event.fd = fd
        event.addr = address
        event.len = size
        if pio:
            event.flags |= uapi.KVM_IOEVENTFD_FLAG_PIO
        if datamatch is not None:
            event.flags |= uapi.KVM_IOEVENTFD_FLAG_DATAMATCH
            event.datamatch = datamatch
        if deassign:
            event.flags |= uapi.KVM_IOEVENTFD_FLAG_DEASSIGN
        checked(slow_ioctl(self._open(), uapi.KVM_IOEVENTFD, &event), "KVM_IOEVENTFD")

    def coalesce(self, uint64_t address, uint32_t size, *, bint pio=False, bint unregister=False):
        """KVM_REGISTER_COALESCED_MMIO: writes to the zone wait in a ring that is drained at the next exit."""
        cdef uapi.kvm_coalesced_mmio_zone zone
        memset(&zone, 0, sizeof(zone))
        zone.addr = address
        zone.size = size
        zone.pio = pio
        if unregister:
            checked(slow_ioctl(self._open(), uapi.KVM_UNREGISTER_COALESCED_MMIO, &zone), "KVM_UNREGISTER_COALESCED_MMIO")
        else:
            checked(slow_ioctl(self._open(), uapi.KVM_REGISTER_COALESCED_MMIO, &zone), "KVM_REGISTER_COALESCED_MMIO")

    # -- clock and statistics ------------------------------------------------------------------------------------------

    def get_clock(self):
        """KVM_GET_CLOCK: kvmclock in ns, with its flags, realtime (ns) and host TSC where the kernel gives them."""
        cdef uapi.kvm_clock_data data
        memset(&data, 0, sizeof(data))
        checked(ioctl(self._open(), uapi.KVM_GET_CLOCK, &data), "KVM_GET_CLOCK")
        return {"clock": data.clock, "flags": data.flags, "realtime": data.realtime, "host_tsc": data.host_tsc}

    def set_clock(self, uint64_t clock_ns):
        """KVM_SET_CLOCK: kvmclock goes on from ``clock_ns``."""
        cdef uapi.kvm_clock_data data
        memset(&data, 0, sizeof(data))
        data.clock = clock_ns
        checked(ioctl(self._open(), uapi.KVM_SET_CLOCK, &data), "KVM_SET_CLOCK")

    def stats(self):
        """KVM_GET_STATS_FD: the kernel's own counters of this VM."""
        from pyvmm.kvm.stats import KvmStats

        return KvmStats(checked(ioctl(self._open(), uapi.KVM_GET_STATS_FD, 0), "KVM_GET_STATS_FD"))
