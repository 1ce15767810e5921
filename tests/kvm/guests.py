"""A machine that runs assembly, always with a time limit, and the devices that tests put into it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import asm

import pyvmm
from pyvmm import ExitStatus

# Generous: they end what hangs, they measure nothing. The lab emulates every instruction of its host.
TIMEOUT_S = 240.0 if "PYVMM_LAB" in os.environ else 60.0

PORT = 0x700  # DEVICE_PORT and DEVICE_MMIO of common.inc
MMIO = 0xD000_0000
MSI_ADDRESS, MSI_DATA = 0xFEE0_0000, 0x51  # to APIC id 0, fixed, edge, vector 0x51
# Guests that several tests use: the files say what they do.
RING_FOR_MSIS = '.include "msi64.inc"'
SPIN_ON_BOTH = '.include "interrupts64.inc"\n.include "smp64.inc"\nspin_on_both'
PASSED = 1  # what finish 0 ends with: (0 << 1) | 1


class Guest:
    """Guest(source, mode): ``machine`` is paused at the first instruction of ``program``."""

    def __init__(self, source: str, mode: str = "long64", **options: Any) -> None:
        self.program = asm.assemble(source, mode, options.get("flat_address"))
        options = {"memory_mib": 4, "flat_address": self.program.address, **options}
        self.machine = pyvmm.Machine(flat=self.program.image, flat_mode=mode, **options)

    def run(self) -> ExitStatus:
        """To the end of the guest."""
        return self.machine.run(TIMEOUT_S)

    def start(self) -> None:
        self.machine.resume()

    def wait(self) -> None:
        """Until the machine stops, whatever the reason."""
        assert self.machine.wait(TIMEOUT_S), "the guest did not stop"

    def bytes_at(self, symbol: str, size: int) -> bytes:
        return self.machine.memory.read(self.program.symbols[symbol], size)

    def value(self, symbol: str, size: int = 4) -> int:
        """A number in the guest's memory."""
        return int.from_bytes(self.bytes_at(symbol, size), "little")

    def regs(self, cpu: int = 0) -> dict[str, int]:
        return self.machine.cpus[cpu].regs

    def exits(self, reason: str) -> int:
        """How many exits of that KVM reason reached user space."""
        return sum(row.count for row in self.machine.exit_stats() if row.reason == reason)

    def close(self) -> None:
        self.machine.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


class Recorder(pyvmm.Device):
    """Notes every call as ("read", offset, size) or ("write", offset, size, value); reads give ``answer``'s value.

    ``calls`` may be waited for from other threads: ``wait_for(count)``.
    """

    valid_sizes = (1, 8)
    impl_sizes = (1, 8)
    unaligned = True

    def __init__(self, answer: Callable[[int, int], int] = lambda offset, size: 0) -> None:
        self.answer = answer
        self.log: list[tuple[Any, ...]] = []
        self.resets = 0
        self._changed = threading.Condition()

    def read(self, offset: int, size: int) -> int:
        self._note("read", offset, size)
        return self.answer(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._note("write", offset, size, value)

    def reset(self) -> None:
        self.resets += 1

    def _note(self, *call: Any) -> None:
        with self._changed:
            self.log.append(call)
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        """Until the guest has made that many calls."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.log) >= count, TIMEOUT_S), f"only {len(self.log)} calls"

    @property
    def writes(self) -> list[int]:
        """The values written, in order."""
        return [call[3] for call in self.log if call[0] == "write"]
