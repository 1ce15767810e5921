"""A tap interface of Linux (Documentation/networking/tuntap.rst; linux/if_tun.h).

The interface is there already, made by root for whoever runs the machine; or it is made here, for as long as the
machine lives, and put into a bridge or given an address: that needs root, and pyroute2, which is imported then only.
"""

from __future__ import annotations

import os
from errno import EBADFD, EBUSY, EINVAL, ENOENT, EPERM

from pyvmm.errors import HOST_LIMITS, ConfigError, HostError, remedy
from pyvmm.net.backend import CHECKSUM, TSO4, TSO6, TSO_ECN, USO4, USO6, NetBackend
from pyvmm.net.port import TapPort

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.net.options import NetOptions

DEVICE = "/dev/net/tun"
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
TUNSETQUEUE = 0x400454D9

IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

NAME_BYTES = 16  # IFNAMSIZ
REQUEST_BYTES = 40  # struct ifreq
# From the most that a kernel may take to what each can: segmentation of UDP came with Linux 6.2.
OFFLOADS = (CHECKSUM | TSO4 | TSO6 | TSO_ECN | USO4 | USO6, CHECKSUM | TSO4 | TSO6 | TSO_ECN, CHECKSUM)


class TapBackend(NetBackend):
    """Queues of one tap interface. ``has_header`` is false only of a descriptor that was opened without."""

    def __init__(self, fds: list[int], *, has_header: bool = True, offloads: bool = True) -> None:
        super().__init__([TapPort(fd) for fd in fds])
        self._pairs = len(fds)
        self.has_header = has_header
        if has_header and offloads:
            self.offloads = next((most for most in OFFLOADS if self._set_offloads(most)), 0)
        self.set_offloads(0)

    def configure(self, header_bytes: int) -> None:
        for port in self.ports if self.has_header else ():
            self._control(port.fd, TUNSETVNETHDRSZ, header_bytes.to_bytes(4, "little"))

    def set_offloads(self, offloads: int) -> None:
        """Of what does not go together the kernel would take nothing: so much of it as does."""
        if not offloads & CHECKSUM:
            offloads = 0
        if not offloads & (TSO4 | TSO6):
            offloads &= ~TSO_ECN
        if offloads & (USO4 | USO6) != USO4 | USO6:
            offloads &= ~(USO4 | USO6)
        self._set_offloads(offloads)

    def _set_offloads(self, offloads: int) -> bool:
        """Whether the kernel has taken them."""
        import fcntl

        if not self.has_header or not self.connected:
            return False
        try:
            fcntl.ioctl(self.ports[0].fd, TUNSETOFFLOAD, offloads)  # the interface's, not a queue's
        except OSError:
            return False
        return True

    def _control(self, fd: int, what: int, argument: bytes) -> None:
        """What can't fail but where the interface is gone: whoever looks for a frame finds that out."""
        try:
            if fd >= 0:
                control(fd, what, argument)
        except OSError as error:
            if error.errno != EBADFD:
                raise

    def enable_pairs(self, count: int) -> None:
        """A queue that is detached gets no frames."""
        if len(self.ports) == 1:
            return
        for n, port in enumerate(self.ports):
            if (n < count) != (n < self._pairs):
                self._control(port.fd, TUNSETQUEUE, request("", IFF_ATTACH_QUEUE if n < count else IFF_DETACH_QUEUE))
        self._pairs = count


def request(name: str, flags: int) -> bytes:
    """A struct ifreq."""
    return (name.encode().ljust(NAME_BYTES, b"\0") + flags.to_bytes(2, "little")).ljust(REQUEST_BYTES, b"\0")


def control(fd: int, what: int, argument: bytes) -> bytes:
    import fcntl

    return bytes(fcntl.ioctl(fd, what, argument))


# -- by name -----------------------------------------------------------------------------------------------------------


def open_tap(options: NetOptions) -> TapBackend:
    """The interface ``options.tap`` with as many queues as are asked for. ConfigError says what is in the way."""
    name = options.tap
    assert name is not None
    makes = options.bridge is not None or options.address is not None
    there = exists(name)
    if makes and there:
        raise ConfigError(
            f"tap {name}: there is such an interface already: leave bridge and address out, or give another name"
        )
    if not makes and not there:
        queues = " multi_queue" if options.queues > 1 else ""
        raise ConfigError(
            f"tap {name}: there is no such interface: make it, as root, with `ip tuntap add dev {name} mode tap user"
            f" $USER{queues} && ip link set {name} up`, or give bridge=NAME"
        )
    if options.bridge is not None and not exists(options.bridge):
        raise ConfigError(
            f"bridge {options.bridge}: there is no such interface: make it, as root, with `ip link add {options.bridge}"
            f" type bridge && ip link set {options.bridge} up`"
        )
    fds: list[int] = []
    try:
        for _ in range(options.queues):
            fds.append(open_queue(name, options.queues > 1))
        if makes:
            set_up(name, options)
        return TapBackend(fds, offloads=options.offloads)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def exists(name: str) -> bool:
    import socket

    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def open_queue(name: str, many: bool) -> int:
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in HOST_LIMITS:
            raise HostError(f"{DEVICE}: {remedy(error, '')}") from None
        what = "load its driver, `modprobe tun`" if error.errno == ENOENT else "it is for root, or for who may open it"
        raise ConfigError(f"{DEVICE}: {error.strerror}: {what}; --net passt needs neither") from None
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    try:
        try:
            control(fd, TUNSETIFF, request(name, flags | (IFF_MULTI_QUEUE if many else 0)))
        except OSError as error:
            if error.errno != EINVAL or many:
                raise
            # An interface that was made for several queues is so for one as well.
            control(fd, TUNSETIFF, request(name, flags | IFF_MULTI_QUEUE))
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"tap {name}: {why_not(name, error, many)}") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def why_not(name: str, error: OSError, many: bool) -> str:
    if error.errno == EPERM:
        return (
            f"{error.strerror}: it is another user's: as root, `ip tuntap add dev {name} mode tap user $USER` makes one"
            " for you; --net passt needs none"
        )
    if error.errno == EBUSY:
        return f"{error.strerror}: another program has it open: give another one, or end that program"
    if error.errno == EINVAL and many:
        return "it takes one queue only: make it by `ip tuntap add ... multi_queue`, or leave queues out"
    if error.errno == EINVAL:
        return "it is no tap interface: give the name of one"
    return remedy(error, "give another interface, or --net passt")


def set_up(name: str, options: NetOptions) -> None:
    """Up; in its bridge, or with its address."""
    try:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError
    except ImportError:
        raise ConfigError(
            f"tap {name}: bridge and address need the package pyroute2: `pip install pyvmm-kvm[net]`, or make the"
            " interface yourself and give its name only"
        ) from None
    try:
        with IPRoute() as route:
            index = route.link_lookup(ifname=name)[0]
            if options.bridge is not None:
                route.link("set", index=index, master=route.link_lookup(ifname=options.bridge)[0])
            if options.address is not None:
                address, prefix = options.address.split("/")
                route.addr("add", index=index, address=address, prefixlen=int(prefix))
            route.link("set", index=index, state="up")
    except (NetlinkError, OSError, IndexError) as error:
        raise ConfigError(f"tap {name}: setting it up: {error}: that needs root (CAP_NET_ADMIN)") from None


# -- by descriptor -----------------------------------------------------------------------------------------------------


def tap_of(fd: int, given: int, *, offloads: bool) -> TapBackend:
    """The tap that is open as ``fd``, which becomes the backend's; ``given`` is its number in what is said. ConfigError
    where it is none.
    """
    try:
        told = control(fd, TUNGETIFF, request("", 0))
    except OSError as error:
        what = "it has no interface yet: TUNSETIFF comes first" if error.errno == EBADFD else "it is no tap"
        raise ConfigError(f"net fd={given}: {what}: give a tap's descriptor, or a socket's") from None
    flags = int.from_bytes(told[NAME_BYTES : NAME_BYTES + 2], "little")
    if not flags & IFF_TAP or not flags & IFF_NO_PI:
        raise ConfigError(f"net fd={given}: it is a tun, or has packet information: open it with IFF_TAP and IFF_NO_PI")
    os.set_blocking(fd, False)
    return TapBackend([fd], has_header=bool(flags & IFF_VNET_HDR), offloads=offloads)
