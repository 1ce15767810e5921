"""MemoryMap: what a processor meets at each guest-physical address: RAM, ROM, or a device.

GuestMemory holds the bytes; this says which of them show where, tells KVM by memory slots, and gives the host the
processor's own view (a monitor's, qtest's). Devices that do DMA go to GuestMemory itself.

Below 1 MiB a PC has a window that its host bridge switches piece by piece between RAM, ROM and the bus (PAM and SMRAM
of the 82441FX, "Programmable Attribute Map"). Each change of a slot costs an SRCU grace period, milliseconds on a
machine with an irqchip: so pieces are as large as one PAM register's, never merged, and only those that differ change.
"""

from __future__ import annotations

from pyvmm.address_space import Held
from pyvmm.errors import BusError
from pyvmm.region import BufferRegion
from pyvmm.x86.layout import PAM_BYTES, PAM_LAST, WINDOW, WINDOW_END

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pyvmm.address_space import AddressSpace, SpaceListener
    from pyvmm.guest_memory import GuestMemory, RamRegion
    from pyvmm.region import MemoryRegion

    Key = tuple[int, int, int, bool]  # gpa, size_bytes, host_address, readonly
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
    def host_address(self) -> int:
        """Where its first byte stands in this process."""
        return self.region.host_address + self.offset

    @property
    def key(self) -> Key:
        """What tells it from others: two with the same are the same slot."""
        return self.gpa, self.size, self.host_address, self.readonly


class MemoryMap:
    """MemoryMap(memory, mmio) shows every region of ``memory`` at its own address.

    ``open_window(rom)`` puts the PC's window below 1 MiB into it, with ``rom`` ending at 1 MiB; ``set_window`` switches
    its segments. Listeners are told what is shown, a section each, and what changes of it.
    """

    def __init__(self, memory: GuestMemory, mmio: AddressSpace) -> None:
        self._memory = memory
        self._mmio = mmio
        self._rom: RamRegion | None = None
        self._text: RamRegion | None = None
        self._listeners: list[SpaceListener] = []
        self._holders = 0
        self._written: list[MemoryRegion] = []
        self.sections: list[Section] = [Section(r.gpa, r.size_bytes, r, 0, r.readonly) for r in memory.ram]
        self._shown: dict[Key, Section] = {section.key: section for section in self.sections}

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
        self._publish()

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

    # -- who is told -------------------------------------------------------------------------------------------

    def listen(self, listener: SpaceListener) -> None:
        """Tell it what is shown, and from now on what changes: KVM's slots follow it so. What it raises comes out of
        the call that made the change.
        """
        self._listeners.append(listener)
        for section in self._shown.values():
            listener.section_add(section)
        listener.commit()

    @property
    def held(self) -> Held:
        """``with map.held:`` tells nobody of changes before the end of the outermost such block: while no vCPU runs,
        only the last state counts.
        """
        return Held(self._hold, self._release)

    def _hold(self) -> None:
        self._holders += 1

    def _release(self) -> None:
        self._holders -= 1
        self._publish()

    def _publish(self) -> None:
        """Tell what is different: first all that goes, for what comes may take its place."""
        if self._holders:
            return
        wanted = {section.key: section for section in self.sections}
        gone = [key for key in self._shown if key not in wanted]
        come = [key for key in wanted if key not in self._shown]
        if not gone and not come:
            return
        for listener in reversed(self._listeners):
            for key in gone:
                listener.section_del(self._shown[key])
        for key in gone:
            del self._shown[key]
        for listener in self._listeners:
            for key in come:
                listener.section_add(wanted[key])
        self._shown.update({key: wanted[key] for key in come})
        for listener in self._listeners:
            listener.commit()

    def close(self) -> None:
        """Show nothing any more, and let go of the memory. Nobody is told: the VM with its slots is about to go."""
        self._listeners.clear()
        self._shown.clear()
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

    def in_memory(self, gpa: int, size: int) -> memoryview | None:
        """The bytes that show at ``gpa``, RAM or ROM, up to ``size`` of them: as many as one section has. To be looked
        at without asking a device, and to be changed where a guest could not, as a debugger does. None on the bus.
        """
        for section in self.sections:
            if section.gpa <= gpa < section.gpa + section.size:
                start = gpa - section.gpa
                return memoryview(section.region)[section.offset + start :][: min(size, section.size - start)]
        return None

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
