"""MemoryMap: what a processor meets at each guest-physical address: RAM, ROM, or a device.

GuestMemory holds the bytes; this says which of them show where, tells KVM by memory slots, and gives the host the
processor's own view (a monitor's, qtest's). Devices that do DMA go to GuestMemory itself.

Below 1 MiB a PC has a window that its host bridge switches piece by piece between RAM, ROM and the bus (PAM and SMRAM
of the 82441FX, "Programmable Attribute Map"). Each change of a slot costs an SRCU grace period, milliseconds on a
machine with an irqchip: so pieces are as large as one PAM register's, never merged, and only those that differ change.
"""

from __future__ import annotations

from pyvmm.errors import BusError
from pyvmm.region import BufferRegion
from pyvmm.x86.layout import PAM_BYTES, PAM_LAST, WINDOW, WINDOW_END

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pyvmm.address_space import AddressSpace
    from pyvmm.guest_memory import GuestMemory, RamRegion
    from pyvmm.region import MemoryRegion

    # slot, gpa, size_bytes (0 deletes), host_address, readonly
    SetSlot = Callable[[int, int, int, int, bool], None]
    Segment = tuple[int, int, str]

# The kinds of a window's segment: what reads give, and where writes go.
RAM = "ram-rw"
RAM_READONLY = "ram-ro"  # RAM, writes are lost
ROM = "rom"  # ROM, writes are lost
ROM_OVER_RAM = "rom-wram"  # ROM, writes go to the RAM behind
BUS = "mmio"  # the bus: a device's MMIO, or nobody


class Section:
    """``size`` bytes at ``gpa`` that a slot shows: those of ``region`` from ``offset`` on."""

    __slots__ = ("gpa", "offset", "readonly", "region", "size", "writes_to")

    def __init__(
        self, gpa: int, size: int, region: RamRegion, offset: int, readonly: bool, writes_to: int | None = None
    ) -> None:
        self.gpa = gpa
        self.size = size
        self.region = region
        self.offset = offset
        self.readonly = readonly
        self.writes_to = writes_to  # gpa of the RAM that takes the writes of a readonly section, or None

    @property
    def key(self) -> tuple[int, int, int, bool]:
        return self.gpa, self.size, self.region.host_address + self.offset, self.readonly


class Held:
    """What MemoryMap.held gives."""

    __slots__ = ("_map",)

    def __init__(self, memory_map: MemoryMap) -> None:
        self._map = memory_map

    def __enter__(self) -> None:
        self._map._hold()

    def __exit__(self, *exc: object) -> None:
        self._map._release()


class MemoryMap:
    """MemoryMap(memory, mmio) shows every region of ``memory`` at its own address.

    ``open_window(rom)`` puts the PC's window below 1 MiB into it, with ``rom`` ending at 1 MiB; ``set_window`` switches
    its segments. ``attach(set_slot)`` gives what is shown to KVM, then and at each change.
    """

    def __init__(self, memory: GuestMemory, mmio: AddressSpace) -> None:
        self._memory = memory
        self._mmio = mmio
        self._rom: RamRegion | None = None
        self._text: RamRegion | None = None
        self._set_slot: SetSlot | None = None
        self._holders = 0
        self._slots: dict[tuple[int, int, int, bool], int] = {}
        self._written: list[MemoryRegion] = []
        self.sections: list[Section] = [Section(r.gpa, r.size_bytes, r, 0, r.readonly) for r in memory.ram]

    # -- the window --------------------------------------------------------------------------------------------

    def open_window(self, rom: RamRegion | None) -> None:
        """Cut the window out of the lowest RAM; everything in it is on the bus until ``set_window``."""
        low = self._memory.ram[0]
        self._rom = rom
        self.sections = [
            Section(low.gpa, min(WINDOW, low.size_bytes), low, 0, False),
            *(s for s in self.sections if s.region is not low),
        ]
        if low.size_bytes > WINDOW_END:
            self.sections.append(Section(WINDOW_END, low.size_bytes - WINDOW_END, low, WINDOW_END, False))

    def show_text_memory(self, text: RamRegion) -> None:
        """From the next ``set_window`` on a display adapter's text memory answers where the bus would: RAM, a memory
        slot, so that no character that a guest puts there costs an exit.
        """
        self._text = text

    @property
    def own_memory(self) -> list[RamRegion]:
        """What it shows beside the regions of GuestMemory, and a guest can write."""
        return [] if self._text is None else [self._text]

    def set_window(self, segments: Iterable[Segment]) -> None:
        """(gpa, size_bytes, kind) of what the window shows from now on; what is left out is on the bus."""
        kept = [s for s in self.sections if not WINDOW <= s.gpa < WINDOW_END]
        window = [s for piece in pieces(segments) if (s := self._section(*piece)) is not None]
        self.sections = [*kept, *window]
        self._publish()
        self._route_writes(window)

    def _section(self, gpa: int, size: int, kind: str) -> Section | None:
        ram, rom = self._memory.ram[0], self._rom
        in_ram = gpa + size <= ram.size_bytes
        text = self._text
        if kind == BUS and text is not None and gpa == text.gpa:
            return Section(gpa, size, text, 0, False)
        if kind in (RAM, RAM_READONLY):
            return Section(gpa, size, ram, gpa, kind == RAM_READONLY) if in_ram else None
        if kind in (ROM, ROM_OVER_RAM) and rom is not None and gpa >= WINDOW_END - rom.size_bytes:
            writes_to = gpa if kind == ROM_OVER_RAM and in_ram else None
            return Section(gpa, size, rom, gpa - (WINDOW_END - rom.size_bytes), True, writes_to)
        return None

    def _route_writes(self, window: list[Section]) -> None:
        """Writes to a read-only slot leave KVM as MMIO exits: where they belong to the RAM behind, they get a region.
        """
        wanted = {s.gpa: s for s in window if s.writes_to is not None}
        for region in [r for r in self._written if r.base not in wanted]:
            self._written.remove(region)
            self._mmio.unmap(region)
        there = {r.base for r in self._written}
        for gpa, section in wanted.items():
            if gpa not in there:
                behind = BufferRegion(self._memory.view(gpa, section.size), name="shadow RAM")
                self._written.append(self._mmio.add(gpa, behind))

    # -- KVM's slots -------------------------------------------------------------------------------------------

    def attach(self, set_slot: SetSlot) -> None:
        """``set_slot(slot, gpa, size_bytes, host_address, readonly)``: KVM_SET_USER_MEMORY_REGION; size 0 deletes."""
        self._set_slot = set_slot
        self._publish()

    @property
    def held(self) -> Held:
        """``with map.held:`` tells KVM of changes only at the end of the outermost such block: while no vCPU runs, only
        the last state counts.
        """
        return Held(self)

    def _hold(self) -> None:
        self._holders += 1

    def _release(self) -> None:
        self._holders -= 1
        self._publish()

    def _publish(self) -> None:
        if self._set_slot is None or self._holders:
            return
        wanted = {s.key for s in self.sections}
        for key in [k for k in self._slots if k not in wanted]:
            self._set_slot(self._slots.pop(key), key[0], 0, key[2], key[3])
        taken = set(self._slots.values())
        free = (n for n in range(len(wanted)) if n not in taken)
        for section in self.sections:
            if section.key not in self._slots:
                slot = next(free)
                self._set_slot(slot, *section.key)
                self._slots[section.key] = slot

    def close(self) -> None:
        """Show nothing any more, and let go of the memory. The VM is on its way out, its slots with it."""
        self._set_slot = None
        self._rom = self._text = None
        self.sections.clear()

    # -- the processor's view ----------------------------------------------------------------------------------

    def read(self, gpa: int, size: int) -> bytes:
        """``size`` bytes as a processor would read them."""
        return b"".join(self._read_piece(at, n, section) for at, n, section in self._split(gpa, size))

    def write(self, gpa: int, data: bytes) -> None:
        """Write ``data`` as a processor would."""
        for at, n, section in self._split(gpa, len(data)):
            piece = data[at - gpa : at - gpa + n]
            if section is None:
                self._write_bus(at, piece)
            elif not section.readonly:
                memoryview(section.region)[at - section.gpa + section.offset :][:n] = piece
            elif section.writes_to is not None:
                self._memory.write(at, piece)

    def _split(self, gpa: int, size: int) -> Iterator[tuple[int, int, Section | None]]:
        """(address, size, section or None for the bus) of each piece, in order. BusError past the space's end."""
        if gpa < 0 or gpa + size > self._mmio.size:
            raise BusError(f"{size:#x} bytes at guest-physical {gpa:#x} leave the address space")
        end = gpa + size
        while gpa < end:
            section = next((s for s in self.sections if s.gpa <= gpa < s.gpa + s.size), None)
            if section is not None:
                stop = section.gpa + section.size
            else:
                stop = min((s.gpa for s in self.sections if s.gpa > gpa), default=end)
            n = min(stop, end) - gpa
            yield gpa, n, section
            gpa += n

    def _read_piece(self, gpa: int, size: int, section: Section | None) -> bytes:
        if section is not None:
            start = gpa - section.gpa + section.offset
            return bytes(memoryview(section.region)[start : start + size])
        return b"".join(self._mmio.read(at, n).to_bytes(n, "little") for at, n in accesses(gpa, size))

    def _write_bus(self, gpa: int, data: bytes) -> None:
        for at, n in accesses(gpa, len(data)):
            self._mmio.write(at, n, int.from_bytes(data[at - gpa : at - gpa + n], "little"))


def accesses(gpa: int, size: int) -> Iterator[tuple[int, int]]:
    """(address, size) of the largest aligned accesses that make up a range."""
    end = gpa + size
    while gpa < end:
        n = 8
        while gpa % n or gpa + n > end:
            n //= 2
        yield gpa, n
        gpa += n


def pieces(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Cut segments where one PAM register's part ends and the next one's begins."""
    for gpa, size, kind in segments:
        end = gpa + size
        while gpa < end:
            step = PAM_BYTES - gpa % PAM_BYTES if gpa < PAM_LAST else WINDOW_END - gpa
            stop = min(end, gpa + step)
            yield gpa, stop - gpa, kind
            gpa = stop
