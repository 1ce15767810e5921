"""VirtioFs: a folder of the host's as a file system of the guest's. OASIS virtio 1.2, 5.11.

FUSE requests go from the guest's kernel to a vhost-user back end, virtiofsd as a rule; nothing of them is seen here.
"""

from __future__ import annotations

from pyvmm.devices.virtio.vhost_user import VhostUserDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.guest_memory import GuestMemory
    from pyvmm.vhost_user.server import Server

TAG_BYTES = 36
REQUEST_QUEUES = 1  # QEMU's virtiofsd takes no more
# A request has as many pages as its queue is long: Linux asks for 1 MiB at a time where it may.
QUEUE_SIZE = 1024


class VirtioFs(VhostUserDevice):
    """``tag`` is the name by which the guest mounts it. Queue 0 is for what must not wait behind requests (5.11.2)."""

    DEVICE_ID = 26

    def __init__(self, memory: GuestMemory, server: Server, *, tag: str) -> None:
        name = tag.encode()
        config = name.ljust(TAG_BYTES, b"\0") + REQUEST_QUEUES.to_bytes(4, "little")
        super().__init__(
            memory,
            server,
            what=f"share {tag}",
            queues=(QUEUE_SIZE,) * (1 + REQUEST_QUEUES),
            config_bytes=len(config),
        )
        self.config[:] = config
        self.tag = tag

    def load(self, state: dict[str, Any]) -> None:
        own = bytes(self.config)
        super().load(state)
        self.config[:] = own  # as its options say
