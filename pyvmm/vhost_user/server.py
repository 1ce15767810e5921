"""Who serves a device by vhost-user: a program that listens at a Unix socket. (virtiofsd.py: one that is started here.)
"""

from __future__ import annotations

from _socket import AF_UNIX, SOCK_STREAM, socket

from pyvmm.errors import ConfigError, remedy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Server(Protocol):
        """The back end of one device, as a VhostUserDevice knows it."""

        own: bool
        """Whether it was started for this device, and ends with it: then each driver gets a new one."""
        log_fd: int
        """Readable while it says something, for ``hear``; -1: it says nothing to us."""

        def connect(self) -> socket:
            """A new connection. ConfigError in one sentence where there is nobody."""

        def hear(self) -> bool:
            """Read what it has said. False: it says no more."""

        def last_words(self) -> str:
            """What it said last, where that is known."""

        def end(self) -> None:
            """Its connection is closed: it is not needed any more. Again is fine."""

        def abandon(self) -> None:
            """In a child of fork."""

LONGEST_CONNECT_S = 5.0


class Listening:
    """Somebody else's program at the socket ``path``; ``what`` names the device in what is said."""

    own = False
    log_fd = -1

    def __init__(self, path: str, *, what: str, example: str) -> None:
        self._path = path
        self._what = what
        self._example = example

    def connect(self) -> socket:
        end = socket(AF_UNIX, SOCK_STREAM)
        try:
            end.settimeout(LONGEST_CONNECT_S)
            end.connect(self._path)
        except OSError as error:
            end.close()
            why = remedy(error, f"start its back end there first, as `{self._example}`")
            raise ConfigError(f"{self._what}: socket={self._path}: {why}") from None
        return end

    def hear(self) -> bool:
        """It has a log of its own."""
        return False

    def last_words(self) -> str:
        return ""

    def end(self) -> None:
        """It is not ours to end."""

    def abandon(self) -> None:
        """Nothing of it is here."""
