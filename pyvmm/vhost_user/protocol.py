"""The messages of vhost-user, as QEMU's docs/interop/vhost-user.rst has them. All numbers are the host's, here little
endian.
"""

from __future__ import annotations

from struct import Struct

HEADER = Struct("<III")  # request, flags, size of the payload
VERSION = 1
REPLY = 1 << 2  # of flags
NEED_REPLY = 1 << 3

# Requests ("Front-end message types")
GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
SET_MEM_TABLE = 5
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
GET_QUEUE_NUM = 17
SET_VRING_ENABLE = 18
GET_CONFIG = 24

# Beside the device's own and the rings': there are protocol features.
F_PROTOCOL_FEATURES = 1 << 30

# Protocol features
P_MQ = 1 << 0
P_REPLY_ACK = 1 << 3
P_CONFIG = 1 << 9

U64 = Struct("<Q")
RING_STATE = Struct("<II")  # index, number
RING_ADDRESS = Struct("<IIQQQQ")  # index, flags, descriptors, used, available, log
MEMORY = Struct("<II")  # regions, padding
MEMORY_REGION = Struct("<QQQQ")  # guest address, size, user address, offset in the file
CONFIG = Struct("<III")  # offset, size, flags; the bytes follow

MOST_REGIONS = 8  # with SET_MEM_TABLE
MOST_CONFIG_BYTES = 256
# With SET_VRING_KICK and SET_VRING_CALL: the ring's index is in the lower bits, and a descriptor comes with it.
NO_DESCRIPTOR = 1 << 8
