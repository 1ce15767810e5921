from typing import Self

from typing_extensions import disjoint_base

from pyvmm.block.lane import Lane
from pyvmm.devices.virtio.chain import Chain
from pyvmm.devices.virtio.ring import Virtqueue

@disjoint_base
class FastBlk:
    def __new__(cls, queue: Virtqueue, lane: Lane, size_bytes: int, block_bytes: int) -> Self: ...
    def resize(self, size_bytes: int) -> None: ...
    def serve(self, poll_ns: int) -> tuple[list[Chain], bool]: ...
