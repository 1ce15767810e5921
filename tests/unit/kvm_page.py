"""A kvm_run page laid out by hand: the exits that no KVM at hand can produce, written where the kernel would.

Offsets are the ABI of struct kvm_run, Linux Documentation/virt/kvm/api.rst, "5. The kvm_run structure".
"""

from __future__ import annotations

import struct
from typing import Any

from pyvmm.address_space import AddressSpace
from pyvmm.cpu_exec import CpuExec, StopReason
from pyvmm.device import Device

PAGE_BYTES = 4096
REQUEST_INTERRUPT_WINDOW, IMMEDIATE_EXIT, EXIT_REASON, READY, IF_FLAG = 0, 1, 8, 12, 13
CR8, APIC_BASE, UNION = 16, 24, 32
IO_DATA = PAGE_BYTES  # where KVM puts the data of a port access
RING = 2 * PAGE_BYTES  # where this page has its coalesced ring
RING_ENTRIES = (PAGE_BYTES - 8) // 24

UNKNOWN, EXCEPTION, IO, HYPERCALL, DEBUG, HLT, MMIO, IRQ_WINDOW_OPEN, SHUTDOWN, FAIL_ENTRY, INTR = range(11)
SET_TPR, TPR_ACCESS = 11, 12
INTERNAL_ERROR, SYSTEM_EVENT, IOAPIC_EOI, RDMSR, WRMSR, MEMORY_FAULT = 17, 24, 26, 29, 30, 39
IN, OUT = 0, 1


class Recorder(Device):
    """Keeps what is written, answers with ``values`` in turn, or with the number of the read."""

    valid_sizes = impl_sizes = (1, 8)

    def __init__(self, *values: Any) -> None:
        self.values = list(values)
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        value = self.values[(len(self.reads) - 1) % len(self.values)] if self.values else len(self.reads)
        if isinstance(value, type) and issubclass(value, BaseException):
            raise value("told to")
        return value  # type: ignore[no-any-return]

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))
        if self.values and self.values[0] is KeyError:
            raise KeyError("told to")


class Guest:
    """The guest's end of a CpuExec without KVM: ``exit(...)`` is what KVM_RUN would return with."""

    def __init__(self, **options: Any) -> None:
        self.page = bytearray(3 * PAGE_BYTES)
        self.pio = AddressSpace("pio", 1 << 16)
        self.mmio = AddressSpace("mmio", 1 << 52)
        self.cpu = CpuExec(None, self.pio, self.mmio, page=self.page, **options)

    def exit(self, reason: int, layout: str = "", *fields: Any) -> StopReason | None:
        """Lay out an exit and have it answered."""
        struct.pack_into("=I", self.page, EXIT_REASON, reason)
        struct.pack_into("=" + layout, self.page, UNION, *fields)
        return self.cpu.handle_exit()

    def union(self, layout: str, offset: int = 0) -> tuple[Any, ...]:
        return struct.unpack_from("=" + layout, self.page, UNION + offset)

    # -- the two that move data

    def io(
        self, direction: int, size: int, port: int, count: int = 1, at: int = IO_DATA
    ) -> StopReason | None:
        return self.exit(IO, "BBHIQ", direction, size, port, count, at)

    def out(self, port: int, size: int, *values: int) -> StopReason | None:
        """OUT, or REP OUTS where there are more values."""
        for i, value in enumerate(values):
            self.page[IO_DATA + i * size : IO_DATA + (i + 1) * size] = value.to_bytes(size, "little")
        return self.io(OUT, size, port, len(values))

    def in_(self, port: int, size: int, count: int = 1) -> list[int]:
        """IN, or REP INS: the values the guest gets."""
        self.page[IO_DATA : IO_DATA + size * count] = b"\xee" * (size * count)
        assert self.io(IN, size, port, count) is None
        data = self.page[IO_DATA : IO_DATA + size * count]
        return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]

    def mmio_write(self, addr: int, data: bytes) -> StopReason | None:
        return self.exit(MMIO, "Q8sIB", addr, data, len(data), 1)

    def mmio_read(self, addr: int, size: int) -> bytes:
        assert self.exit(MMIO, "Q8sIB", addr, b"\xee" * 8, size, 0) is None
        data: bytes = self.union("8s", 8)[0]
        assert data[size:] == b"\xee" * (8 - size)
        return data[:size]

    # -- the coalesced ring

    def ring_put(self, addr: int, data: bytes, pio: bool = False) -> None:
        """Append a write, as KVM does: never into the last free entry."""
        first, last = struct.unpack_from("=II", self.page, RING)
        following = (last + 1) % RING_ENTRIES
        assert following != first
        struct.pack_into("=QII8s", self.page, RING + 8 + 24 * last, addr, len(data), pio, data)
        struct.pack_into("=I", self.page, RING + 4, following)

    def ring_state(self) -> tuple[int, int]:
        return struct.unpack_from("=II", self.page, RING)
