"""virtio devices on a board: which ones a Spec asks for, and what each is wired to: eventfds, threads, interrupts.

A kind of device is a small function here, which makes it of the Spec and gives it to ``Board.add_virtio``; ``make_all``
calls them in order.
"""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from pyvmm.address_space import AddressSpace
    from pyvmm.announcer import Announcer
    from pyvmm.balloon import Balloon
    from pyvmm.balloon_options import BalloonOptions
    from pyvmm.boards.drive_places import PlacedDrive
    from pyvmm.chassis import Chassis
    from pyvmm.clock import Clock
    from pyvmm.devices.pci.host import PciHost
    from pyvmm.devices.virtio.blk import VirtioBlk
    from pyvmm.devices.virtio.device import IoWatcher, VirtioDevice
    from pyvmm.devices.virtio.net import VirtioNet
    from pyvmm.devices.virtio.ring import Virtqueue
    from pyvmm.guest_memory import GuestMemory
    from pyvmm.irq import IrqLine
    from pyvmm.irqchip import Irqchip
    from pyvmm.irqfd import IrqFd, Msi
    from pyvmm.net.options import NetOptions
    from pyvmm.places import Places
    from pyvmm.platform import Platform
    from pyvmm.spec import Spec
    from pyvmm.vhost_user.options import ShareOptions
    from pyvmm.vhost_user.server import Server
    from pyvmm.vsock.options import VsockOptions

    class Board(Protocol):
        """What of a board (board.py) is needed here."""

        config: Spec
        chassis: Chassis
        clock: Clock
        memory: GuestMemory
        mmio: AddressSpace
        windows: Places
        irqchip: Irqchip
        balloon: Balloon | None
        announcer: Announcer | None
        disks: dict[str, VirtioBlk]

        def add(self, name: str, device: Any) -> Any: ...
        def add_virtio(self, name: str, device: VirtioDevice, asked: Any = None) -> None: ...
        def describe(self, aml: Callable[[], bytes] | None = None, words: str = "") -> None: ...
        def irq_line(self, gsi: int, name: str = "a device") -> IrqLine: ...

    class PciBoard(Board, Protocol):
        """And of one with PCI."""

        pio: AddressSpace
        pci: PciHost
        pci_slots: Places
        platform: Platform
        runs_guests: bool

# GSIs for transports that have one each. First those of ISA interrupts that nothing of a PC without PCI and IDE has: a
# kernel knows them without ACPI, too. 13 is a coprocessor's, 2 the second PIC's.
GSIS = (5, 10, 11, 12, 6, 7, 14, 15, 3, *range(layout.ISA_IRQS, layout.IOAPIC_PINS))


def make_all(board: Board) -> None:
    """Every virtio device that the Spec asks for, in the order in which the guest finds them."""
    for drive in board.config.drives:
        if drive.interface == "virtio":
            make_disk(board, drive)
    if board.config.nets:
        from pyvmm.announcer import Announcer

        board.announcer = Announcer(board.clock, {str(net.id): make_net(board, net) for net in board.config.nets})
    if board.config.vsock is not None:
        make_vsock(board, board.config.vsock)
    if board.config.rng:
        make_rng(board)
    if board.config.consoles:
        make_console(board)
    for share in board.config.shares:
        make_share(board, share)
    if board.config.balloon is not None:
        make_balloon(board, board.config.balloon)


def make_net(board: Board, options: NetOptions) -> VirtioNet:
    from pyvmm.devices.virtio.net import VirtioNet
    from pyvmm.net.open import open_net

    name, mac = options.id, options.mac
    assert name is not None and mac is not None  # of a Spec they are complete
    backend = board.chassis.closers.add(open_net(options))
    address = bytes.fromhex(mac.replace(":", ""))
    card = VirtioNet(board.memory, backend, mac=address, mtu=options.mtu)
    events = board.chassis.events
    card.on_filter = lambda: events.tell("rx-filter", device=name)
    board.add_virtio(name, card, options)
    return card


def make_vsock(board: Board, options: VsockOptions) -> None:
    from pyvmm.devices.virtio.vsock import VirtioVsock
    from pyvmm.vsock.host import HostEnd

    closers = board.chassis.closers
    host = closers.add(HostEnd(options.path))
    messages = closers.add(HostEnd(options.path, messages=True)) if options.seqpacket else None
    device = VirtioVsock(board.memory, host, cid=options.cid, connections=options.connections, messages=messages)
    board.add_virtio("vsock", device)
    closers.add(device)  # before its queues' descriptors go


def make_share(board: Board, options: ShareOptions) -> None:
    from pyvmm.devices.virtio.fs import VirtioFs
    from pyvmm.vhost_user.server import Listening
    from pyvmm.vhost_user.virtiofsd import Virtiofsd

    server: Server
    if options.socket is not None:
        example = f"virtiofsd --socket-path={options.socket} --shared-dir=FOLDER"
        server = Listening(options.socket, what=f"share {options.tag}", example=example)
    else:
        server = Virtiofsd(options)
    device = VirtioFs(board.memory, server, tag=options.tag)
    closers = board.chassis.closers
    closers.add(device)  # also where it can't be placed
    board.add_virtio(f"share {options.tag}", device)
    closers.add(device)  # before its queues' descriptors go
    board.chassis.back_ends.append(device)


def make_disk(board: Board, drive: PlacedDrive) -> None:
    from pyvmm.block.open import open_drive
    from pyvmm.boards.geometry import disk_geometry
    from pyvmm.devices.virtio.blk import SECTOR_BYTES, VirtioBlk

    chassis = board.chassis
    drives = chassis.drives
    backend = open_drive(drive, loop=chassis.loop, clock=board.clock, on_error=drives.failed, later=drives.later)
    chassis.drives.add(backend)
    disk = VirtioBlk(
        board.memory,
        backend,
        serial=drive.serial,
        queues=drive.num_queues or 1,
        logical_block_bytes=drive.logical_block_size or SECTOR_BYTES,
        physical_block_bytes=drive.physical_block_size,
        geometry=disk_geometry(drive, backend)[0],
    )
    board.add_virtio(f"blk{drive.index}", disk, drive)
    board.disks[backend.name] = disk


def make_rng(board: Board) -> None:
    from pyvmm.devices.virtio.rng import VirtioRng

    board.add_virtio("rng", VirtioRng(board.memory))


def make_console(board: Board) -> None:
    """One device, whose ports are the consoles."""
    from pyvmm.console_options import numbered
    from pyvmm.devices.virtio.console import VirtioConsole

    consoles = board.chassis.consoles
    places = numbered(board.config.consoles)
    ends = [(number, consoles.open(each.where, label), each.name) for number, label, each in places]
    console = VirtioConsole(board.memory, ends)
    for port in console.ports:
        if port.name is not None:
            port.on_open = tells_of_port(board, port.name)
    consoles.add_flush(console.flush)
    board.add_virtio("console", console)


def tells_of_port(board: Board, name: str) -> Callable[[bool], object]:
    events = board.chassis.events
    return lambda is_open: events.tell("console-port", console=name, open=is_open)


def make_balloon(board: Board, options: BalloonOptions) -> None:
    from pyvmm.balloon import PAGES_A_MIB, Balloon
    from pyvmm.devices.virtio.balloon import VirtioBalloon

    balloon = VirtioBalloon(
        board.memory,
        target_pages=options.mib * PAGES_A_MIB,
        deflate_on_oom=options.deflate_on_oom,
        free_page_reporting=options.free_page_reporting,
    )
    events = board.chassis.events
    balloon.on_actual = lambda pages: events.tell("balloon", actual_bytes=pages * layout.PAGE_BYTES)
    board.add_virtio("balloon", balloon, options)
    board.balloon = Balloon(balloon)


# -- what all of them have -------------------------------------------------------------------------------------------


def wire_up(board: Board, name: str, device: VirtioDevice) -> None:
    """Queues get their eventfds and are watched by their thread; the board is told of a driver that breaks the device.
    """
    from pyvmm.devices.virtio.ring import F_RING_PACKED

    chassis = board.chassis
    if board.config.virtio_ring == "packed":
        device.ring_features |= F_RING_PACKED
    threads = chassis.io_threads
    own = threads.make() if device.own_thread or device.thread_per_queue else threads.shared
    device.io = own
    for queue in device.queues:
        queue.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        closing = Closing(queue)
        chassis.closers.call(closing, closing)
        if device.served_elsewhere:
            continue
        number = device.thread_of(queue) if device.thread_per_queue else 0
        if number and number not in device.ios:
            device.ios[number] = threads.make()
        watch(device.ios[number] if number else own, device, queue.index)
    device.on_broken = lambda why: chassis.events.tell("device-broken", device=name, why=why)
    board.add(name, device)


class Closing:
    """Closes a queue's eventfd, once. Whoever kicks it later must not write into what has its number then."""

    def __init__(self, queue: Virtqueue) -> None:
        self._queue = queue

    def __call__(self) -> None:
        fd, self._queue.kick_fd = self._queue.kick_fd, -1
        if fd >= 0:
            os.close(fd)


def watch(thread: IoWatcher, device: VirtioDevice, index: int) -> None:
    queue = device.queues[index]
    serve = device.serve
    thread.add_reader(queue.kick_fd, lambda: serve(queue), edge=True)


# -- virtio-mmio -----------------------------------------------------------------------------------------------------


def add_mmio(board: Board, name: str, device: VirtioDevice) -> None:
    """Registers at the lowest free window, an interrupt of its own, and what ACPI says of both.

    A kernel that is told of a transport by ACPI and by its command line takes both, and finds the second one's
    registers taken. So the words are there only where the command line turns ACPI off.
    """
    from pyvmm.devices.virtio.mmio import REGION_BYTES, VirtioMmio

    wire_up(board, name, device)
    base = board.windows.give(REGION_BYTES, name, first=layout.VIRTIO_MMIO, end=layout.VIRTIO_MMIO_END)
    gsi, interrupt, call_fd = edge(board, name)
    mmio = VirtioMmio(device, interrupt, call_fd=call_fd)
    if board.config.virtio_ioeventfd == "on":
        mmio.ring_doorbells()
    board.add(f"{name}.mmio", mmio)
    board.mmio.add(base, mmio.region)
    words = f"virtio_mmio.device={layout.VIRTIO_MMIO_BYTES}@{base:#x}:{gsi}"
    acpi_off = "acpi=off" in board.config.append.split()
    uid = base - layout.VIRTIO_MMIO >> 9
    board.describe(lambda: mmio_aml(uid, base, gsi), words if acpi_off else "")


def edge(board: Board, name: str) -> tuple[int, Callable[[], object], int]:
    """An interrupt: its GSI, a function that makes an edge of it, and the eventfd that does so too, or -1."""
    irqchip = board.irqchip
    gsi = irqchip.free_gsi(GSIS)
    if gsi is not None and irqchip.in_kernel and board.config.virtio_irqfd == "on":
        irqfd = irqchip.irqfd(gsi, name=name)
        return gsi, irqfd.signal, irqfd.fd
    if gsi is None:
        gsi = GSIS[0]  # shared with whoever has it, as the test device has all: its handler finds no cause
    try:
        return gsi, board.irq_line(gsi, name).pulse, -1
    except ConfigError:  # an irqfd has it for itself, as all others
        raise ConfigError(
            f"no interrupt is left for {name}: a microvm has {len(GSIS)} for its virtio devices: leave one out, or"
            " give machine=pc or virtio_irqfd=off"
        ) from None


# -- virtio-pci ------------------------------------------------------------------------------------------------------


def add_pci(pc: PciBoard, name: str, device: VirtioDevice, asked: Any = None) -> None:
    """A function of its own in the lowest free slot."""
    from pyvmm.boards.virtio_interfaces import interfaces
    from pyvmm.devices.virtio.pci import VirtioPci

    wire_up(pc, name, device)
    by_fd = pc.irqchip.in_kernel and pc.config.virtio_irqfd == "on"
    legacy, modern = interfaces(pc.config, asked)
    messages = Messages(pc.irqchip, name, by_fd)
    function = VirtioPci(device, pc.pio, pc.mmio, messages, legacy=legacy, modern=modern)
    pc.pci.add(function, pc.pci_slots.give(1, name))
    pc.add(f"{name}.pci", function)
    if pc.config.virtio_ioeventfd == "off" and pc.runs_guests:
        pc.platform.listener.ioeventfds = False


class Messages:
    """The irqchip, as a function's MSI-X sees it."""

    def __init__(self, irqchip: Irqchip, name: str, by_fd: bool) -> None:
        self._irqchip = irqchip
        self._name = name
        self._by_fd = by_fd

    def msi(self, address: int, data: int) -> Msi:
        return self._irqchip.msi(address, data, self._name)

    def irqfd(self, message: Any) -> IrqFd | None:
        """None where there is to be none, or no more can be had: then each message is a call."""
        try:
            return self._irqchip.irqfd(message, name=self._name) if self._by_fd else None
        except (ConfigError, OSError):  # no number, no descriptor, or KVM takes no more: the guest is not to blame
            return None


def mmio_aml(uid: int, base: int, gsi: int) -> bytes:
    from pyvmm.x86 import acpi

    return acpi.virtio_mmio(uid, base, gsi)
