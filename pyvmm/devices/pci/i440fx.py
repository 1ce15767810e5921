"""I440fx: the host bridge, function 00.0. Of its registers those that say who answers below 1 MiB do something.

Intel 82441FX (PMC) data sheet, 3.2: PAM[6:0] (3.2.18), SMRAM (3.2.23). The DRAM controller's registers are kept for
whoever looks.
"""

from __future__ import annotations

from pyvmm.devices.pci.device import (
    COMMAND_PARITY,
    COMMAND_SERR,
    LATENCY_TIMER,
    STATUS_DEVSEL_MEDIUM,
    STATUS_FAST_BACK_TO_BACK,
    PciDevice,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Segment = tuple[int, int, str]

DEVICE_ID = 0x1237
REVISION = 2
HOST_BRIDGE = 0x060000
# Fixed: memory is always decoded, and it is always a bus master.
COMMAND_FIXED = 0x0006

# Programmable attribute map. PAM0 has one area, in its high nibble, PAM1 to PAM6 two of 16 KiB each.
PAM0 = 0x59
PAM_COUNT = 7
PAM_READ = 0x1  # of a nibble: reads go to memory
PAM_WRITE = 0x2  # writes go to memory
PAM_BOTH = PAM_READ | PAM_WRITE
BIOS_AREA, BIOS_AREA_BYTES = 0xF_0000, 0x1_0000
EXPANSION_AREA, EXPANSION_AREA_BYTES = 0xC_0000, 0x4000

SMRAM = 0x72
D_OPEN = 0x40  # memory shows at 0xa0000 without being in SMM
D_CLS = 0x20
D_LCK = 0x10  # D_OPEN is cleared and stays so until a reset
G_SMRAME = 0x08
C_BASE_SEG = 0x02  # fixed: 0xa0000 is the only place
SMRAM_AREA, SMRAM_AREA_BYTES = 0xA_0000, 0x2_0000

ERRSTS = 0x91

# Who answers. Reads / writes:
MMIO = "mmio"  # PCI: a video adapter, if any
ROM = "rom"  # PCI: the BIOS ROM / nobody
ROM_WRITE_RAM = "rom-wram"  # the BIOS ROM / memory, for a BIOS that copies itself
RAM_READ_ONLY = "ram-ro"  # memory / nobody
RAM = "ram-rw"  # memory
KINDS = (ROM, RAM_READ_ONLY, ROM_WRITE_RAM, RAM)  # by a nibble's two bits


class I440fx(PciDevice):
    """``on_memory_layout(segments)`` is told of each new view of 0xa0000-0xfffff, on the vCPU's thread.

    A segment is (gpa, bytes, kind), kind one of this module's words; neighbours differ. It is not called for the view
    after power-on, which ``segments`` gives too.
    """

    def __init__(self, on_memory_layout: Callable[[list[Segment]], None]) -> None:
        super().__init__(
            device_id=DEVICE_ID,
            class_code=HOST_BRIDGE,
            revision=REVISION,
            command=COMMAND_FIXED,
            command_writable=COMMAND_SERR | COMMAND_PARITY,
            status=STATUS_DEVSEL_MEDIUM | STATUS_FAST_BACK_TO_BACK,
        )
        self._on_memory_layout = on_memory_layout
        self.define(LATENCY_TIMER, 1, 0, 0xF8)
        self.define(0x50, 2, 0, 0xFFFF)  # PMCCFG
        self.define(0x52, 1, 0, 0xFF)  # DETURBO
        self.define(0x53, 1, 0x80, 0xE0)  # DBC
        self.define(0x54, 1, 0, 0xFF)  # AXC
        self.define(0x55, 2, 0, 0xFFFF)  # DRT
        self.define(0x57, 1, 0x01, 0xFF)  # DRAMC
        self.define(0x58, 1, 0x10, 0xFF)  # DRAMT
        self.define(PAM0, 1, 0, PAM_BOTH << 4)
        for n in range(1, PAM_COUNT):
            self.define(PAM0 + n, 1, 0, PAM_BOTH << 4 | PAM_BOTH)
        for row in range(8):
            self.define(0x60 + row, 1, 0x01, 0xFF)  # DRB, in 8 MiB
        self.define(0x68, 1, 0, 0xC0)  # FDHC
        self.define(0x70, 1, 0, 0xF8)  # MTT
        self.define(0x71, 1, 0x10, 0x1F)  # CLT
        self.define(SMRAM, 1, C_BASE_SEG, D_OPEN | D_CLS | D_LCK | G_SMRAME)
        self.define(0x90, 1, 0, 0xFF)  # ERRCMD
        self.define(ERRSTS, 1, 0, 0, 0x11)
        self.define(0x93, 1, 0, 0x0E)  # TRC: a reset through here is port 0xcf9's
        self._segments = self.segments()

    def segments(self) -> list[Segment]:
        """Who answers from 0xa0000 to 0xfffff."""
        areas = [(SMRAM_AREA, SMRAM_AREA_BYTES, RAM if self.config[SMRAM] & (D_OPEN | D_LCK) == D_OPEN else MMIO)]
        for n in range(1, PAM_COUNT):
            for nibble in (0, 1):
                gpa = EXPANSION_AREA + (2 * (n - 1) + nibble) * EXPANSION_AREA_BYTES
                areas.append((gpa, EXPANSION_AREA_BYTES, KINDS[self.config[PAM0 + n] >> 4 * nibble & PAM_BOTH]))
        areas.append((BIOS_AREA, BIOS_AREA_BYTES, KINDS[self.config[PAM0] >> 4 & PAM_BOTH]))
        merged = [areas[0]]
        for gpa, size, kind in areas[1:]:
            start, before, last_kind = merged[-1]
            if kind == last_kind:
                merged[-1] = (start, before + size, kind)
            else:
                merged.append((gpa, size, kind))
        return merged

    def changed(self, first: int, last: int) -> None:
        super().changed(first, last)
        if first <= SMRAM and last >= PAM0:
            self._update()

    def config_write(self, register: int, size: int, value: int) -> None:
        super().config_write(register, size, value)
        if register <= SMRAM < register + size:
            self._set_smram_lock()
            self._update()

    def _set_smram_lock(self) -> None:
        """What the lock takes away at once: D_OPEN, and the right to change the two."""
        locked = self.config[SMRAM] & D_LCK
        if locked:
            self.config[SMRAM] &= ~D_OPEN
        self._writable[SMRAM] = D_CLS | G_SMRAME | (0 if locked else D_OPEN | D_LCK)

    def _update(self) -> None:
        segments = self.segments()
        if segments != self._segments:
            self._segments = segments
            self._on_memory_layout(segments)

    def post_firmware(self) -> None:
        """All of it memory, as a BIOS leaves it that has copied itself and what it found."""
        with self._config_lock:
            for n in range(PAM_COUNT):
                self.config[PAM0 + n] = self._writable[PAM0 + n]
            self.changed(PAM0, PAM0 + PAM_COUNT - 1)  # once: each change may cost the board a memory slot or two

    def reset(self) -> None:
        with self._config_lock:
            self._writable[SMRAM] = D_OPEN | D_CLS | D_LCK | G_SMRAME
            super().reset()

    def wake(self) -> None:
        """Nothing is reset: memory was kept, and with it what shows where; firmware goes on in its shadow RAM."""

    def load(self, state: dict[str, Any]) -> None:
        with self._config_lock:
            super().load(state)
            self._set_smram_lock()

    def after_load(self) -> None:
        with self._config_lock:
            super().after_load()
            self._update()
