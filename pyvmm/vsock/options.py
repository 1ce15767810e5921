"""What a user may say about a vsock device: the rows of VsockOptions, and the way to write them, ``--vsock``."""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.options import SWITCH, Kind, Options, decimal, option, whole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# virtio 1.2, 5.10.4: 0, 1 and the last are reserved, 2 is the host.
LEAST_CID, MOST_CID = 3, 0xFFFF_FFFE
MOST_CONNECTIONS = 4096
# sockaddr_un's 107, less an underscore and the longest number of a port.
MOST_PATH_BYTES = 96


def take_path(name: str, value: Any) -> str | None:
    """Of a Unix socket, with room for a port behind it."""
    if value is None:
        return None
    import os

    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"{name}={value!r}: give a path")
    path = os.fsdecode(value)
    if not path or "\0" in path:
        raise ConfigError(f"{name}={value!r}: give the path of a socket")
    if len(os.fsencode(path)) > MOST_PATH_BYTES:
        raise ConfigError(f"{name}={path}: ports are put behind it, so give one of {MOST_PATH_BYTES} bytes at most")
    return path


PATH = Kind(take_path, metavar="PATH")


class VsockOptions(Options):
    """A virtio socket device. An object does not change: ``changed`` makes another one.

    ``VsockOptions(3, "/run/vm.sock")``. Without a path nobody is at the host's end, and connections are refused.
    """

    noun = "vsock option "
    thing = "a vsock device"
    frozen = True

    cid: int = option(
        whole(least=LEAST_CID, most=MOST_CID, give=f"the guest's address, a number from {LEAST_CID} to {MOST_CID}: 2 is"
        " the host", from_text=decimal), LEAST_CID, "the guest's address, from 3", words="cid guest-cid")  # fmt: skip
    path: str | None = option(
        PATH, None, "the Unix socket that leads into the guest: a client says CONNECT PORT on a line, and behind the"
        " answer OK it has the stream; for the guest's connections to port N of the host a program listens at PATH_N",
        words="path")  # fmt: skip
    seqpacket: bool = option(
        SWITCH, False, "sockets with messages too (SOCK_SEQPACKET): clients at PATH.seq, and for the guest's"
        " connections a program that listens at PATH_N with such a socket", words="seqpacket")  # fmt: skip
    connections: int = option(
        whole(least=1, most=MOST_CONNECTIONS, from_text=decimal), 256, f"as many at a time, 1 to {MOST_CONNECTIONS}:"
        " each has a descriptor, and holds what the host does not take at once, up to 256 KiB",
        words="connections")  # fmt: skip

    def __init__(self, cid: int = LEAST_CID, path: Any = None, **values: Any) -> None:
        super().__init__(cid=cid, path=path, **values)

    @classmethod
    def parse(cls, text: str) -> VsockOptions:
        """From "cid=3,path=/run/vm.sock". A comma in a value is written twice. ConfigError for what is wrong."""
        values = cls.from_words(text)
        for name, example in (("cid", "cid=3"), ("path", "path=/run/vm.sock")):
            if name not in values:
                raise ConfigError(f"vsock {text!r} has no {name}: write {example}")
        return cls(**values)
