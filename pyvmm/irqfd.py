"""Msi and IrqFd: interrupts that are messages, and eventfds that interrupt. Irqchip makes them.

Apart from irqchip.py because most machines have neither: they are imported for the first.
"""

from __future__ import annotations

import os

from pyvmm.light import Lock

MESSAGE_AREA = 0xFEE  # bits 39 to 20 of a message's address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pyvmm.irq import IrqLine

    class Sender(Protocol):
        """What of Irqchip an Msi uses."""

        def send(self, address: int, data: int) -> bool: ...

        def write(self, address: int, data: int) -> None: ...

        def msi_changed(self, msi: Msi) -> None: ...

    class Owner(Protocol):
        """What of Irqchip an IrqFd uses."""

        def close_irqfd(self, irqfd: IrqFd) -> None: ...


class Msi:
    """A message-signalled interrupt. ``change`` is for a guest that writes another address or data."""

    __slots__ = ("_sender", "address", "data", "gsi", "name")

    def __init__(self, sender: Sender, address: int, data: int, name: str) -> None:
        self._sender = sender
        self.address = address
        self.data = data
        self.name = name
        self.gsi = -1
        """Its number in KVM's table, while an irqfd sends it; else -1."""

    @property
    def message(self) -> tuple[int, int] | None:
        """Address and data, where the address is that of a message to local APICs (SDM vol. 3, 11.11.1); None: it is
        another, and a write there interrupts nobody. Bits 63 to 40 are part of a long APIC id (Linux virt/kvm/api.rst,
        KVM_CAP_X2APIC_API).
        """
        return (self.address, self.data) if self.address >> 20 & 0xF_FFFF == MESSAGE_AREA else None

    def fire(self) -> bool:
        """Send it. Whether a local APIC took it. From any thread."""
        message = self.message
        if message is None:
            self._sender.write(self.address, self.data)
            return False
        return self._sender.send(*message)

    def change(self, address: int, data: int) -> None:
        """From now on it is this message, also where an irqfd sends it."""
        self.address, self.data = address, data
        self._sender.msi_changed(self)


class IrqFd:
    """An eventfd that interrupts, ``fd``; and, for a level, ``resample_fd``, which the guest's end of interrupt signals
    (else -1). ``close`` gives both back; whoever got them has copies of his own.
    """

    def __init__(self, owner: Owner, target: int | Msi, resample: bool, name: str) -> None:
        self._owner = owner
        self.target = target
        self.resample = resample
        self.name = name
        self._closing = Lock()
        self.fd = -1
        self.resample_fd = -1
        self.line: IrqLine | None = None  # where the controllers are ours: what it drives

    def open_descriptors(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        if self.resample:
            self.resample_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def signal(self) -> None:
        """What writing 1 to ``fd`` does."""
        os.eventfd_write(self.fd, 1)

    def take(self) -> bool:
        """Whether it was signalled since the last look; where the controllers are ours."""
        with self._closing:
            try:
                return self.fd >= 0 and os.eventfd_read(self.fd) > 0
            except BlockingIOError:
                return False

    def close(self) -> None:
        """It interrupts no more, and its GSI is free. A second call does nothing."""
        self._owner.close_irqfd(self)

    def close_descriptors(self) -> None:
        with self._closing:  # the event loop may be about to look
            self.abandon()

    def abandon(self) -> None:
        """In a child of fork, where a lock may be held by a thread that is not there."""
        fds, self.fd, self.resample_fd = (self.fd, self.resample_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)
