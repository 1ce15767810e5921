from collections.abc import Callable

from typing_extensions import disjoint_base

from pyvmm.devices.virtio.blk_fast import FastBlk
from pyvmm.devices.virtio.chain import Chain
from pyvmm.devices.virtio.ring import Virtqueue

@disjoint_base
class WaitingBlk(FastBlk):
    back: Callable[[Virtqueue, list[Chain]], None]
