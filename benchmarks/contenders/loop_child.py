"""A VMM in nothing but Python: ``loop_child.py fcntl|ctypes WORK`` (cases.ExitCase's fields and the image, as JSON).

Both call the same devices in the same way. The fcntl loop reads kvm_run by struct out of the mapping; the ctypes loop
calls the C library's ioctl and reads kvm_run as a Structure. Linux Documentation/virt/kvm/api.rst; numbers are those of
<linux/kvm.h>, made by the macros of <asm-generic/ioctl.h>.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# As guests/exits/exits.inc has them.
ROM_AT, RESET_IP = 0xF_0000, 0xFFF0
MAILBOX, SAMPLES = 0x18_0000, 0x20_0000
TURN, DONE, WARM_UP, ANSWER = 0x08, 0x0C, 0x10, 0x24
OTHERS_PORT, OTHERS_PORTS = 0xE8, 4
IRQ_PORT, IRQ_LINES = 0x2000, 16

MIB = 1 << 20
LOOK_S = 0.0001
KICK_PAUSE_S = 0.0001
PR_SET_NAME = 15
# Below 2 GiB: fcntl.ioctl takes no greater number.
KVM_TSS, KVM_IDENTITY_MAP = 0x7FFB_D000, 0x7FFB_C000


def _io(number: int) -> int:
    return 0xAE << 8 | number


def _iow(number: int, size: int) -> int:
    return 1 << 30 | size << 16 | _io(number)


def _ior(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | _io(number)


KVM_CREATE_VM, KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE = _io(0x01), _io(0x03), _io(0x04)
KVM_GET_SUPPORTED_CPUID = 3 << 30 | 8 << 16 | _io(0x05)
KVM_CREATE_VCPU, KVM_SET_TSS_ADDR = _io(0x41), _io(0x47)
KVM_SET_USER_MEMORY_REGION, KVM_SET_IDENTITY_MAP_ADDR = _iow(0x46, 32), _iow(0x48, 8)
KVM_CREATE_IRQCHIP, KVM_IRQ_LINE = _io(0x60), _iow(0x61, 8)
KVM_REGISTER_COALESCED_MMIO, KVM_CREATE_PIT2, KVM_IOEVENTFD = _iow(0x67, 16), _iow(0x77, 64), _iow(0x79, 64)
KVM_RUN, KVM_GET_TSC_KHZ = _io(0x80), _io(0xA3)
KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS = _iow(0x82, 144), _ior(0x83, 312), _iow(0x84, 312)
KVM_SET_CPUID2 = _iow(0x90, 8)
KVM_CAP_COALESCED_MMIO = 15
KVM_IOEVENTFD_FLAG_PIO = 2
KVM_EXIT_IO, KVM_EXIT_MMIO = 2, 6
KVM_EXIT_IO_IN = 0

EXIT_REASON = struct.Struct("=8xI")
IO_EXIT = struct.Struct("=BBHIQ")  # direction, size, port, count, offset of the data: at 32
MMIO_EXIT = struct.Struct("=Q8sIB")  # address, data, length, is_write: at 32
IMMEDIATE_EXIT_AT = 1
EXIT_AT = 32
MMIO_DATA_AT = EXIT_AT + 8
RING = struct.Struct("=II")  # first, last; then entries
RING_ENTRY = struct.Struct("=QII8s")  # address, length, is a port, data
PAGE = mmap.PAGESIZE
RING_ENTRIES = (PAGE - RING.size) // RING_ENTRY.size


class Counter:
    """The least a handler can do and still do something."""

    def __init__(self) -> None:
        self.count = 0

    def read(self, offset: int, size: int) -> int:
        self.count += 1
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.count += 1


class Nobody:
    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        pass


class Irqs:
    def __init__(self, vm: int) -> None:
        self.vm = vm

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        fcntl.ioctl(self.vm, KVM_IRQ_LINE, struct.pack("=II", offset, value & 1))


class Bus:
    """Ports or memory: [(first, last, device)]; what answered last is looked at first."""

    def __init__(self) -> None:
        self.regions: list[tuple[int, int, Any]] = []
        self.recent: tuple[int, int, Any] = (0, -1, None)
        self.nobody = Nobody()

    def map(self, base: int, size: int, device: Any) -> None:
        self.regions.append((base, base + size - 1, device))

    def find(self, address: int) -> tuple[int, int, Any]:
        first, last, _ = self.recent
        if first <= address <= last:
            return self.recent
        for region in self.regions:
            if region[0] <= address <= region[1]:
                self.recent = region
                return region
        return (address, address, self.nobody)


class Vcpu:
    def __init__(self, kvm: int, vm: int, index: int) -> None:
        self.fd = fcntl.ioctl(vm, KVM_CREATE_VCPU, index)
        self.run = mmap.mmap(self.fd, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE))
        self.ring_at = 0  # in the mapping; 0 where nothing is gathered


class Machine:
    """What every loop here runs: one VM with the board of a case."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.pio, self.mmio = Bus(), Bus()
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.vm = fcntl.ioctl(self.kvm, KVM_CREATE_VM)
        size = work["memory_mib"] * MIB
        self.memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        with open(work["image"], "rb") as file:
            rom = file.read()
        self.memory[ROM_AT : ROM_AT + len(rom)] = rom
        fcntl.ioctl(self.vm, KVM_SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", 0, 0, 0, size, self.base))
        fcntl.ioctl(self.vm, KVM_SET_TSS_ADDR, KVM_TSS)
        fcntl.ioctl(self.vm, KVM_SET_IDENTITY_MAP_ADDR, struct.pack("=Q", KVM_IDENTITY_MAP))
        fcntl.ioctl(self.vm, KVM_CREATE_IRQCHIP)
        fcntl.ioctl(self.vm, KVM_CREATE_PIT2, struct.pack("=I60x", 1))
        self.vcpus = [Vcpu(self.kvm, self.vm, index) for index in range(work["cpus"])]
        self._enter()
        self._make_devices(work)

    def _enter(self) -> None:
        """The first vCPU to the reset vector; the others wait to be woken by it."""
        room = 256
        cpuid = bytearray(struct.pack("=II", room, 0) + bytes(40 * room))
        fcntl.ioctl(self.kvm, KVM_GET_SUPPORTED_CPUID, cpuid)
        for vcpu in self.vcpus:
            fcntl.ioctl(vcpu.fd, KVM_SET_CPUID2, cpuid)
        first = self.vcpus[0].fd
        sregs = bytearray(312)
        fcntl.ioctl(first, KVM_GET_SREGS, sregs)
        struct.pack_into("=QIH", sregs, 0, ROM_AT, 0xFFFF, ROM_AT >> 4)  # CS: base, limit, selector
        fcntl.ioctl(first, KVM_SET_SREGS, bytes(sregs))
        fcntl.ioctl(first, KVM_SET_REGS, struct.pack("=16QQQ", *[0] * 16, RESET_IP, 2))

    def _make_devices(self, work: dict[str, Any]) -> None:
        buses = {"pio": self.pio, "mmio": self.mmio}
        if work["irqs"]:
            self.pio.map(IRQ_PORT, IRQ_LINES, Irqs(self.vm))
        elif work["device"] or work["coalesce"]:
            space, address = work["at"]
            buses[space].map(address, 4, Counter())
        for other in range(min(work["cpus"] - 1, OTHERS_PORTS)):
            self.pio.map(OTHERS_PORT + other, 1, Counter())
        if work["doorbell"]:
            self._make_doorbell(*work["doorbell"], work["answer"])
        if work["coalesce"]:
            space, address = work["coalesce"]
            is_port = space == "pio"
            zone = struct.pack("=QII", address, 1 if is_port else 4, is_port)
            fcntl.ioctl(self.vm, KVM_REGISTER_COALESCED_MMIO, zone)
            pages = fcntl.ioctl(self.kvm, KVM_CHECK_EXTENSION, KVM_CAP_COALESCED_MMIO)
            self.vcpus[0].ring_at = pages * PAGE

    def _make_doorbell(self, space: str, address: int, answered: bool) -> None:
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        is_port = space == "pio"
        flags = KVM_IOEVENTFD_FLAG_PIO if is_port else 0
        bell = struct.pack("=QQIiI36x", 0, address, 1 if is_port else 0, fd, flags)
        fcntl.ioctl(self.vm, KVM_IOEVENTFD, bell)
        if answered:
            answer = memoryview(self.memory)[MAILBOX + ANSWER : MAILBOX + ANSWER + 4].cast("I")

            def wait() -> None:
                while True:
                    answer[0] += os.eventfd_read(fd)

            threading.Thread(target=wait, daemon=True).start()

    # -- exits ---------------------------------------------------------------------------------------------------

    def port_access(self, data: Any, direction: int, size: int, port: int, count: int, at: int) -> None:
        """``count`` units at one port; ``data`` is kvm_run, the units from ``at`` on."""
        first, _, device = self.pio.find(port)
        for offset in range(at, at + count * size, size):
            if direction == KVM_EXIT_IO_IN:
                data[offset : offset + size] = device.read(port - first, size).to_bytes(size, "little")
            else:
                device.write(port - first, size, int.from_bytes(data[offset : offset + size], "little"))

    def memory_write(self, address: int, size: int, data: bytes) -> None:
        first, _, device = self.mmio.find(address)
        device.write(address - first, size, int.from_bytes(data[:size], "little"))

    def memory_read(self, address: int, size: int) -> bytes:
        first, _, device = self.mmio.find(address)
        value: int = device.read(address - first, size)
        return value.to_bytes(size, "little")

    def drain(self, vcpu: Vcpu) -> None:
        """What KVM has gathered."""
        first, last = RING.unpack_from(vcpu.run, vcpu.ring_at)
        while first != last:
            at = vcpu.ring_at + RING.size + first * RING_ENTRY.size
            address, size, is_port, data = RING_ENTRY.unpack_from(vcpu.run, at)
            bus = self.pio if is_port else self.mmio
            base, _, device = bus.find(address)
            device.write(address - base, size, int.from_bytes(data[:size], "little"))
            first = (first + 1) % RING_ENTRIES
            struct.pack_into("=I", vcpu.run, vcpu.ring_at, first)


def by_fcntl(machine: Machine, vcpu: Vcpu, interrupted: Callable[[], None]) -> None:
    """fcntl.ioctl and struct."""
    run, fd, ioctl = vcpu.run, vcpu.fd, fcntl.ioctl
    while True:
        try:
            ioctl(fd, KVM_RUN)
        except (InterruptedError, BlockingIOError):
            interrupted()
            continue
        if vcpu.ring_at:
            machine.drain(vcpu)
        (reason,) = EXIT_REASON.unpack_from(run)
        if reason == KVM_EXIT_IO:
            machine.port_access(run, *IO_EXIT.unpack_from(run, EXIT_AT))
        elif reason == KVM_EXIT_MMIO:
            address, data, size, is_write = MMIO_EXIT.unpack_from(run, EXIT_AT)
            if is_write:
                machine.memory_write(address, size, data)
            else:
                run[MMIO_DATA_AT : MMIO_DATA_AT + size] = machine.memory_read(address, size)
        else:
            raise SystemExit(f"exit reason {reason}")


class Io(ctypes.Structure):
    _fields_ = [
        ("direction", ctypes.c_uint8),
        ("size", ctypes.c_uint8),
        ("port", ctypes.c_uint16),
        ("count", ctypes.c_uint32),
        ("data_offset", ctypes.c_uint64),
    ]


class Mmio(ctypes.Structure):
    _fields_ = [
        ("phys_addr", ctypes.c_uint64),
        ("data", ctypes.c_uint8 * 8),
        ("len", ctypes.c_uint32),
        ("is_write", ctypes.c_uint8),
    ]


class Exits(ctypes.Union):
    _fields_ = [("io", Io), ("mmio", Mmio), ("padding", ctypes.c_uint8 * 256)]


class KvmRun(ctypes.Structure):
    _fields_ = [
        ("request_interrupt_window", ctypes.c_uint8),
        ("immediate_exit", ctypes.c_uint8),
        ("padding1", ctypes.c_uint8 * 6),
        ("exit_reason", ctypes.c_uint32),
        ("ready_for_interrupt_injection", ctypes.c_uint8),
        ("if_flag", ctypes.c_uint8),
        ("flags", ctypes.c_uint16),
        ("cr8", ctypes.c_uint64),
        ("apic_base", ctypes.c_uint64),
        ("exit", Exits),
    ]


def by_ctypes(machine: Machine, vcpu: Vcpu, interrupted: Callable[[], None]) -> None:
    """The C library's ioctl, and kvm_run as a Structure."""
    run = KvmRun.from_buffer(vcpu.run)
    io, mmio = run.exit.io, run.exit.mmio
    ioctl = ctypes.CDLL(None, use_errno=True).ioctl
    ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
    while True:
        if ioctl(vcpu.fd, KVM_RUN, 0) < 0:
            if ctypes.get_errno() not in (errno.EINTR, errno.EAGAIN):
                raise OSError(ctypes.get_errno(), "KVM_RUN")
            interrupted()
            continue
        if vcpu.ring_at:
            machine.drain(vcpu)
        reason = run.exit_reason
        if reason == KVM_EXIT_IO:
            machine.port_access(vcpu.run, io.direction, io.size, io.port, io.count, io.data_offset)
        elif reason == KVM_EXIT_MMIO:
            size = mmio.len
            if mmio.is_write:
                machine.memory_write(mmio.phys_addr, size, bytes(mmio.data))
            else:
                mmio.data[0:size] = machine.memory_read(mmio.phys_addr, size)
        else:
            raise SystemExit(f"exit reason {reason}")


class Kicks:
    """The guest only spins; a thread takes the turns: signals to the vCPU's, timed until KVM_RUN has returned."""

    def __init__(self, machine: Machine) -> None:
        self.memory = memoryview(machine.memory)
        self.run = machine.vcpus[0].run
        self.tick_ns = 1e6 / fcntl.ioctl(machine.vcpus[0].fd, KVM_GET_TSC_KHZ)
        self.vcpu = threading.get_ident()
        self.out = threading.Semaphore(0)
        self.out_at = 0
        self.wanted = False
        signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
        threading.Thread(target=self.take_turns, daemon=True).start()

    def interrupted(self) -> None:
        """On the vCPU's thread. SIGSTOP and SIGCONT bring it here as well."""
        now = time.perf_counter_ns()
        self.run[IMMEDIATE_EXIT_AT] = 0
        if self.wanted:
            self.wanted = False
            self.out_at = now
            self.out.release()

    def take_turns(self) -> None:
        box = self.memory[MAILBOX : MAILBOX + 0x40].cast("I")
        samples = self.memory[SAMPLES : SAMPLES + MIB].cast("I")
        while True:
            while box[TURN // 4] == box[DONE // 4]:
                time.sleep(LOOK_S)
            warm_up, _, _, _, singles = struct.unpack_from("<5I", self.memory, MAILBOX + WARM_UP)
            for n in range(warm_up + singles):
                time.sleep(KICK_PAUSE_S)
                self.wanted = True
                start = time.perf_counter_ns()
                self.run[IMMEDIATE_EXIT_AT] = 1  # or a signal that comes just before KVM_RUN would be lost
                signal.pthread_kill(self.vcpu, signal.SIGUSR1)
                self.out.acquire()
                if n >= warm_up:
                    samples[n - warm_up] = round((self.out_at - start) / self.tick_ns)
            box[DONE // 4] = box[TURN // 4]


def main() -> None:
    loop = {"fcntl": by_fcntl, "ctypes": by_ctypes}[sys.argv[1]]
    work = json.loads(sys.argv[2])
    machine = Machine(work)
    khz = fcntl.ioctl(machine.vcpus[0].fd, KVM_GET_TSC_KHZ)
    print(f"memory {machine.base:#x} tsc_khz {khz}", flush=True)
    interrupted = Kicks(machine).interrupted if work["kick"] else lambda: None
    for n in range(1, len(machine.vcpus)):
        threading.Thread(target=run_vcpu, args=(n, loop, machine, interrupted), daemon=True).start()
    run_vcpu(0, loop, machine, interrupted)


def run_vcpu(n: int, loop: Callable[..., None], machine: Machine, interrupted: Callable[[], None]) -> None:
    """On its thread, which the harness knows by its name (exit_contender.py)."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, f"CPU {n}/KVM".encode())
    loop(machine, machine.vcpus[n], interrupted)


if __name__ == "__main__":
    main()
