"""Models of what configures the machine: configuration space changes where it may; fw_cfg moves what it says."""

from __future__ import annotations

from typing import Any

from fuzz.harness import MEMORY_BYTES, ROM_BASE, FencedBoard
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from on_board import STEPS, OnBoard, run_model

# -- configuration space -----------------------------------------------------------------------------------------------

FUNCTIONS = ((0, 0), (1, 0), (1, 1), (1, 3))
STATUS_BYTES = (6, 7)  # written with ones to clear bits, or changed by the device
SMRAM, D_LCK = 0x72, 0x10  # of the first


class PciModel(OnBoard):
    """Each function's 256 bytes, and which bits a write changes: found out at the beginning, true ever after.

    But for the host bridge's D_LCK (SMRAM, 82441FX data sheet, 3.2.23), which makes others read-only until a reset: it
    is never set here, and test_pci_i440fx.py has it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.space: dict[tuple[int, int], list[int]] = {}
        self.mask: dict[tuple[int, int], list[int]] = {}
        for function in FUNCTIONS:
            self.board.machine.reset()
            masks = []
            for register in range(256):
                self.write(function, register, 1, 0)
                zeros = self.read(function, register, 1)
                self.write(function, register, 1, 0xFF & ~self.locks(function, register))
                masks.append(zeros ^ self.read(function, register, 1))
            self.mask[function] = masks
        self.board.machine.reset()
        for function in FUNCTIONS:
            self.space[function] = [self.read(function, register, 1) for register in range(256)]

    def address(self, function: tuple[int, int], register: int) -> int:
        return 1 << 31 | function[0] << 11 | function[1] << 8 | register & 0xFC

    def read(self, function: tuple[int, int], register: int, size: int) -> int:
        self.pio.write(0xCF8, 4, self.address(function, register))
        return self.pio.read(0xCFC + (register & 3), size)

    def write(self, function: tuple[int, int], register: int, size: int, value: int) -> None:
        self.pio.write(0xCF8, 4, self.address(function, register))
        self.pio.write(0xCFC + (register & 3), size, value)

    def locks(self, function: tuple[int, int], register: int) -> int:
        return D_LCK if (function, register) == ((0, 0), SMRAM) else 0

    @initialize()
    def masks_are_as_the_data_sheets_have_them(self) -> None:
        for function in FUNCTIONS:
            assert not any(self.mask[function][:4])  # vendor and device
            assert not any(self.mask[function][8:12])  # revision and class
        assert self.mask[1, 1][0x20:0x24] == [0xF0, 0xFF, 0xFF, 0xFF]  # 16 ports

    @rule(
        function=st.sampled_from(FUNCTIONS),
        register=st.integers(0, 255) | st.sampled_from((4, 0x20, 0x40, 0x59, 0x60, 0x80, 0x90)),
        size=st.sampled_from((1, 2, 4)),
        value=st.integers(0, 0xFFFF_FFFF) | st.sampled_from((0, 0xFFFF_FFFF, 0xC001, 0x1F1, 0x601, 0x0100_0005)),
    )
    def write_anything(self, function: tuple[int, int], register: int, size: int, value: int) -> None:
        register &= ~(size - 1)
        for n in range(size):
            value &= ~(self.locks(function, register + n) << 8 * n)
        self.write(function, register, size, value & (1 << 8 * size) - 1)
        for n in range(size):
            mask, old = self.mask[function][register + n], self.space[function][register + n]
            self.space[function][register + n] = old & ~mask | value >> 8 * n & mask
        for one in FUNCTIONS:
            now = [byte for register in range(0, 256, 4) for byte in self.read(one, register, 4).to_bytes(4, "little")]
            differing = [n for n in range(256) if now[n] != self.space[one][n] and n not in STATUS_BYTES]
            assert differing == []

    @rule(
        address=st.integers(0, 0xFFFF_FFFF).filter(lambda a: a >> 24 != 0x80 or a >> 16 & 0xFF),
        size=st.sampled_from((1, 2, 4)),
        value=st.integers(0, 0xFFFF_FFFF),
    )
    def where_nobody_is(self, address: int, size: int, value: int) -> None:
        if address & 0x80FF_0000 == 0x8000_0000:
            address |= 0x10000  # bus 1
        self.pio.write(0xCF8, 4, address)
        assert self.pio.read(0xCF8, 4) == address
        assert self.pio.read(0xCFC, size) == (1 << 8 * size) - 1
        self.pio.write(0xCFC, size, value & (1 << 8 * size) - 1)

    @rule(
        port=st.sampled_from((0xCF8, 0xCFA, 0xCFB, 0xCFD, 0xCFE)),
        size=st.sampled_from((1, 2, 4)),
        value=st.integers(0, 255),
    )
    def odd_accesses(self, port: int, size: int, value: int) -> None:
        self.pio.write(0xCF8, 4, 0)
        self.pio.read(port, size)
        self.pio.write(port, min(size, 2), value)

    @rule()
    def reset(self) -> None:
        self.board.machine.reset()
        for function in FUNCTIONS:
            self.space[function] = [self.read(function, register, 1) for register in range(256)]

    @invariant()
    def no_port_has_two_owners(self) -> None:
        end = 0
        for region in sorted(self.pio.regions, key=lambda region: region.base or 0):
            assert region.base is not None
            assert region.base >= end, region.name
            end = region.base + region.size
        assert end <= 1 << 16
        for port, name in ((0x1F0, "ide0.data"), (0x1F7, "ide0"), (0x510, "fw_cfg"), (0xCF8, "pci")):
            region = self.pio.find(port)
            assert region is not None
            assert region.name == name

    @invariant()
    def the_bus_master_is_where_its_bar_says(self) -> None:
        if not self.space:
            return
        space = self.space[1, 1]
        base = int.from_bytes(bytes(space[0x20:0x24]), "little") & ~0xF
        found = self.pio.find(base) if space[4] & 1 and 0x1000 <= base < 0xFFF0 else None
        if found is not None and base != self.pm_base():
            assert found.base == base
            assert found.size <= 16

    def pm_base(self) -> int:
        return int.from_bytes(bytes(self.space[1, 3][0x40:0x44]), "little") & 0xFFC0


def test_configuration_space_changes_where_it_may(shared_board: FencedBoard) -> None:
    run_model(PciModel, shared_board, settings(STEPS, max_examples=20))


# -- fw_cfg ------------------------------------------------------------------------------------------------------------

DMA_ERROR, DMA_READ, DMA_SKIP, DMA_SELECT, DMA_WRITE = 1, 2, 4, 8, 16
ACCESS = 0x1000
KEYS = st.sampled_from((0, 1, 2, 3, 5, 0x19, 0x20, 0x21, 0x22, 0x3F, 0x7FFF, 0x8001, 0x8002, 0xFFFF))
ADDRESSES = st.integers(0x2000, MEMORY_BYTES - 1) | st.sampled_from(
    (MEMORY_BYTES - 1, MEMORY_BYTES, 0x4000_0000, (1 << 64) - 1, 1 << 63, ROM_BASE, (1 << 52) - 8)
)


class FwCfgModel(OnBoard):
    def __init__(self) -> None:
        super().__init__()
        self.fw_cfg: Any = self.board.machine.devices["fw_cfg"]
        self.written = bytearray(self.fw_cfg.content(self.board.writable_key))
        self.key, self.position = 0, 0

    @property
    def item(self) -> bytes:
        if self.key == self.board.writable_key:
            return bytes(self.written)
        try:
            return bytes(self.fw_cfg.content(self.key))
        except KeyError:
            return b""

    @rule(key=KEYS)
    def select(self, key: int) -> None:
        self.pio.write(0x510, 2, key)
        self.key, self.position = key & 0xBFFF, 0

    @rule()
    def select_writable(self) -> None:
        self.select(self.board.writable_key)

    @rule(count=st.integers(0, 400))
    def read(self, count: int) -> None:
        data = bytes(self.pio.read(0x511, 1) for _ in range(count))
        assert data == self.item[self.position : self.position + count].ljust(count, b"\0")
        self.position = min(self.position + count, max(self.position, len(self.item)))

    @rule(value=st.integers(0, 255))
    def write_to_the_data_port(self, value: int) -> None:
        self.pio.write(0x511, 1, value)

    @rule(
        what=st.integers(0, 31),
        key=KEYS | st.none(),
        length=st.integers(0, 700) | st.sampled_from((0x1_0000, MEMORY_BYTES, 0xFFFF_FFFF)),
        to=ADDRESSES,
    )
    def transfer(self, what: int, key: int | None, length: int, to: int) -> None:
        if key is None:
            key = self.board.writable_key
        control = what | key << 16
        access = control.to_bytes(4, "big") + length.to_bytes(4, "big") + to.to_bytes(8, "big")
        memory = self.board.memory
        memory.write(ACCESS, access)
        before = memory.read(0, MEMORY_BYTES)
        self.pio.write(0x514, 4, 0)
        self.pio.write(0x518, 4, int.from_bytes(ACCESS.to_bytes(4, "big"), "little"))
        expected = bytearray(before)
        expected[ACCESS : ACCESS + 4] = self.effect(what, key, length, to, before, expected).to_bytes(4, "big")
        assert memory.read(0, MEMORY_BYTES) == expected

    def effect(self, what: int, key: int, length: int, target: int, before: bytes, expected: bytearray) -> int:
        """What the control field says afterwards; changes ``expected`` as memory changes."""
        if what & DMA_SELECT:
            self.key, self.position = key & 0xBFFF, 0
        if not length or not what & (DMA_READ | DMA_WRITE | DMA_SKIP):
            return 0
        start, item = self.position, self.item
        self.position = min(start + length, max(start, len(item)))
        in_memory = target + length <= MEMORY_BYTES
        if what & DMA_READ:
            if not in_memory:
                return DMA_ERROR
            expected[target : target + length] = item[start : start + length].ljust(length, b"\0")
        elif what & DMA_WRITE:
            source = self.board.rom[target - ROM_BASE :] if target >= ROM_BASE else before[target:]
            if self.key != self.board.writable_key or start + length > len(item) or length > len(source):
                return DMA_ERROR
            self.written[start : start + length] = source[:length]
        return 0

    @rule(at=ADDRESSES)
    def transfer_from_anywhere(self, at: int) -> None:
        """The access itself lies where there is no memory, or asks for nothing; not in the ROM: what is there?"""
        if at < MEMORY_BYTES:
            at = min(at, MEMORY_BYTES - 16)
            self.board.memory.write(at, bytes(16))
        elif at == ROM_BASE:
            at -= 8
        self.pio.write(0x514, 4, int.from_bytes((at >> 32).to_bytes(4, "big"), "little"))
        self.pio.write(0x518, 4, int.from_bytes((at & 0xFFFF_FFFF).to_bytes(4, "big"), "little"))

    @rule()
    def save_and_load(self) -> None:
        state = self.fw_cfg.save()
        self.fw_cfg.reset()
        self.fw_cfg.load(state)
        self.fw_cfg.after_load()

    @rule()
    def reset(self) -> None:
        self.board.machine.reset()
        self.written = bytearray(self.fw_cfg.content(self.board.writable_key))
        self.key, self.position = 0, 0


def test_fw_cfg_moves_what_it_says(shared_board: FencedBoard) -> None:
    run_model(FwCfgModel, shared_board)
