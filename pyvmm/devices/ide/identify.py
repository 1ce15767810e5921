"""What a disk says about itself: IDENTIFY DEVICE (ATA/ATAPI-6, 8.15; TRIM: ATA8-ACS-2), and its geometry."""

from __future__ import annotations

from pyvmm.block.driver import SECTOR_BYTES
from pyvmm.devices.ide.atapi import ata_string, selected
from pyvmm.devices.ide.registers import (
    HIGHEST_MULTIWORD,
    HIGHEST_ULTRA,
    MAX_MULTIPLE,
    MAX_TRIM_BLOCKS,
    MULTIWORD_DMA,
    ULTRA_DMA,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Identified(Protocol):
        """What a disk tells of itself."""

        sectors: int
        serial: str
        model: str
        revision: str
        cylinders: int
        heads: int
        track: int
        multiple: int
        transfer_mode: int
        look_ahead: bool
        write_cache: bool
        unit: int

        @property
        def geometry(self) -> tuple[int, int, int]: ...

IDENTIFY_BYTES = 512
LBA28_SECTORS = 0x0FFF_FFFF  # the most that words 60 and 61 say

HEADS = 16
SECTORS_PER_TRACK = 63
MAX_CYLINDERS = 16383

# Words 82 to 87: features, of which the second three say which are on
NOP_COMMAND, LOOK_AHEAD, WRITE_CACHE, POWER_MANAGEMENT = 1 << 14, 1 << 6, 1 << 5, 1 << 3
VALID, FLUSH_EXT, FLUSH, LBA48 = 1 << 14, 1 << 13, 1 << 12, 1 << 10
FUA = 1 << 6


def geometry(sectors: int) -> tuple[int, int, int]:
    """(cylinders, heads, sectors a track) of the default translation: as every disk has it (ATA/ATAPI-5, 6.2), but with
    fewer heads, then shorter tracks, where the whole disk is less than a cylinder of that."""
    sectors = max(1, sectors)
    track = min(SECTORS_PER_TRACK, sectors)
    heads = min(HEADS, sectors // track)
    return min(MAX_CYLINDERS, sectors // (heads * track)), heads, track


def identify(disk: Identified) -> bytes:
    """The 512 bytes."""
    words = [0] * 256
    cylinders, heads, track = disk.geometry
    words[0] = 0x0040  # ATA, not removable
    words[1], words[3], words[6] = cylinders, heads, track
    # What only ATA-1 (X3.221, 9.9) gives a meaning, and BIOSes of its time (Bochs') go by: unformatted bytes a track
    # and a sector; the buffer (dual-ported, with a cache; its sectors); bytes more in READ LONG. QEMU's values.
    words[4], words[5] = min(0xFFFF, track * SECTOR_BYTES), SECTOR_BYTES
    words[20], words[21], words[22] = 3, 512, 4
    words[10:20] = ata_string(disk.serial, 20)
    words[23:27] = ata_string(disk.revision, 8)
    words[27:47] = ata_string(disk.model, 40)
    words[47] = 0x8000 | MAX_MULTIPLE
    words[48] = 1  # 32-bit accesses to the data port
    words[49] = 0x2B00  # standby timer as in the standard, IORDY, LBA, DMA
    words[50] = 0x4000
    words[51] = 0x0200  # PIO mode 2 without flow control
    words[53] = 0x0007  # words 54-58, 64-70 and 88 are valid
    words[54], words[55], words[56] = disk.cylinders, disk.heads, disk.track
    capacity = disk.cylinders * disk.heads * disk.track
    words[57], words[58] = capacity & 0xFFFF, capacity >> 16
    words[59] = 0x0100 | disk.multiple if disk.multiple else 0
    low = min(disk.sectors, LBA28_SECTORS)
    words[60], words[61] = low & 0xFFFF, low >> 16
    words[63] = 0x0007 | selected(disk.transfer_mode, MULTIWORD_DMA, HIGHEST_MULTIWORD)
    words[64] = 0x0003  # PIO modes 3 and 4
    words[65:69] = [120, 120, 120, 120]  # ns a cycle of multiword DMA and of PIO
    words[80] = 0x00F0  # ATA/ATAPI-4 to -7: for ATA8-ACS word 48 would say that the disk does Trusted Computing
    words[82] = NOP_COMMAND | LOOK_AHEAD | WRITE_CACHE | POWER_MANAGEMENT
    words[83] = VALID | FLUSH_EXT | FLUSH | LBA48
    words[84] = VALID | FUA
    words[85] = NOP_COMMAND | POWER_MANAGEMENT
    words[85] |= (LOOK_AHEAD if disk.look_ahead else 0) | (WRITE_CACHE if disk.write_cache else 0)
    words[86] = FLUSH_EXT | FLUSH | LBA48
    words[87] = VALID | FUA
    words[88] = 0x003F | selected(disk.transfer_mode, ULTRA_DMA, HIGHEST_ULTRA)
    words[93] = 0x6B00 if disk.unit else 0x600B  # a cable of 80 wires; passed its diagnostics, number by jumper
    for n in range(4):
        words[100 + n] = disk.sectors >> 16 * n & 0xFFFF
    words[105] = MAX_TRIM_BLOCKS
    words[169] = 1  # TRIM
    data = bytearray(b"".join(word.to_bytes(2, "little") for word in words))
    data[510] = 0xA5  # the integrity word: all bytes add up to 0
    data[511] = -sum(data) & 0xFF
    return bytes(data)
