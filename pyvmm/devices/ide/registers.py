"""The registers of an ATA channel, their bits, and the codes of the commands.

ATA/ATAPI-6 (T13 1410D): register descriptions in chapter 7, commands in chapter 8; what later standards added is from
ATA8-ACS. The bus master's are from "Programming Interface for Bus Master IDE Controller", revision 1.0.
"""

from __future__ import annotations

# The command block, as offsets from its second port (1F1h): the first is the data port. A device keeps the last two
# values of those up to LBA_HIGH; HOB further on is the former one, "previous content" in the standard (6.20).
ERROR = FEATURES = 0
COUNT = REASON = 1
LBA_LOW = 2
LBA_MID = BYTES_LOW = 3
LBA_HIGH = BYTES_HIGH = 4
DEVICE = 5
STATUS = COMMAND = 6
HOB = 8
FILE_SIZE = 16

# Status (7.15)
BSY = 0x80
DRDY = 0x40
DSC = 0x10  # seek complete; obsolete since ATA-4, and every disk still sets it
DRQ = 0x08
ERR = CHK = 0x01
READY = DRDY | DSC
BUSY = BSY | READY
DATA = READY | DRQ
FAILED = READY | ERR
TAKEN = BSY | DRQ  # a command is under way: the command block is not the host's

# Error (7.8)
UNC = 0x40
IDNF = 0x10
ABRT = 0x04
PASSED = 0x01  # as a diagnostic code (table 25)

# Device (7.7)
LBA = 0x40
DEV = 0x10
HEAD = 0x0F
ALWAYS_ON = 0xA0  # obsolete bits, which software compares nevertheless

# Device control (7.6)
CONTROL_HOB = 0x80
SRST = 0x04
NIEN = 0x02

# Interrupt reason of the packet commands (7.11)
REASON_COD = 0x01  # a packet, not data
REASON_IO = 0x02  # to the host

# Features of PACKET (8.23)
PACKET_DMA = 0x01
PACKET_OVERLAP = 0x02

# Commands
NOP = 0x00
DATA_SET_MANAGEMENT = 0x06
DEVICE_RESET = 0x08
RECALIBRATE = range(0x10, 0x20)  # the low digit was a step rate
READ_SECTORS = (0x20, 0x21)  # with and without retries, which modern disks do not tell apart
READ_SECTORS_EXT = 0x24
READ_DMA_EXT = 0x25
READ_NATIVE_MAX_EXT = 0x27
READ_MULTIPLE_EXT = 0x29
WRITE_SECTORS = (0x30, 0x31)
WRITE_SECTORS_EXT = 0x34
WRITE_DMA_EXT = 0x35
WRITE_MULTIPLE_EXT = 0x39
WRITE_VERIFY = 0x3C
WRITE_DMA_FUA_EXT = 0x3D
READ_VERIFY = (0x40, 0x41)
READ_VERIFY_EXT = 0x42
SEEK = range(0x70, 0x80)
EXECUTE_DEVICE_DIAGNOSTIC = 0x90
INITIALIZE_DEVICE_PARAMETERS = 0x91
PACKET = 0xA0
IDENTIFY_PACKET_DEVICE = 0xA1
READ_MULTIPLE = 0xC4
WRITE_MULTIPLE = 0xC5
SET_MULTIPLE = 0xC6
READ_DMA = (0xC8, 0xC9)
WRITE_DMA = (0xCA, 0xCB)
WRITE_MULTIPLE_FUA_EXT = 0xCE
STANDBY_IMMEDIATE = (0xE0, 0x94)  # the second code of each is that of ATA-1
IDLE_IMMEDIATE = (0xE1, 0x95)
STANDBY = (0xE2, 0x96)
IDLE = (0xE3, 0x97)
CHECK_POWER_MODE = (0xE5, 0x98)
SLEEP = (0xE6, 0x99)
FLUSH_CACHE = 0xE7
FLUSH_CACHE_EXT = 0xEA
IDENTIFY_DEVICE = 0xEC
SET_FEATURES = 0xEF
READ_NATIVE_MAX = 0xF8

# Subcommands of SET FEATURES (8.46)
WRITE_CACHE_ON = 0x02
TRANSFER_MODE = 0x03
LOOK_AHEAD_OFF = 0x55
KEEP_SETTINGS = 0x66  # software reset leaves them
WRITE_CACHE_OFF = 0x82
LOOK_AHEAD_ON = 0xAA
REVERT_SETTINGS = 0xCC

# What CHECK POWER MODE answers (8.7), and Sleep, in which nobody can ask
STANDBY_POWER = 0x00
IDLE_POWER = 0x80
ACTIVE_POWER = 0xFF
SLEEPING = -1
POWERS = ("one of", STANDBY_POWER, IDLE_POWER, ACTIVE_POWER, SLEEPING)

# Kinds of transfer modes, in the upper bits of SET FEATURES's count (table 44)
PIO_DEFAULT = 0x00  # 01h: with IORDY off
PIO_MODE = 0x08
MULTIWORD_DMA = 0x20
ULTRA_DMA = 0x40
HIGHEST_PIO = 4
HIGHEST_MULTIWORD = 2
HIGHEST_ULTRA = 5

MAX_MULTIPLE = 16  # SET MULTIPLE: sectors a DRQ block; a power of two
MAX_TRIM_BLOCKS = 8  # of ranges, in one DATA SET MANAGEMENT

# Bus master, its registers' offsets and bits
BM_COMMAND = 0
BM_STATUS = 2
BM_PRD_TABLE = 4
BM_START = 0x01
BM_TO_MEMORY = 0x08
BM_ACTIVE = 0x01
BM_ERROR = 0x02
BM_INTERRUPT = 0x04
BM_DRIVES_CAN_DMA = 0x60  # one bit a drive, for software to keep
