"""From NetOptions to what they ask for, open."""

from __future__ import annotations

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.net.backend import NetBackend
    from pyvmm.net.options import NetOptions


def open_net(options: NetOptions) -> NetBackend:
    """ConfigError in one sentence for what the host has not."""
    if options.kind == "tap":
        from pyvmm.net.tap import open_tap

        return open_tap(options)
    if options.kind == "passt":
        from pyvmm.net.passt import open_passt

        return open_passt(options)
    if options.kind == "unix":
        from pyvmm.net.unix import open_unix

        return open_unix(options)
    return open_fd(options)


def open_fd(options: NetOptions) -> NetBackend:
    """A copy of a descriptor that is open: the caller's stays the caller's."""
    import os
    import stat

    fd = options.fd
    assert fd is not None
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        copy = os.dup(fd)
    except OSError as error:
        raise ConfigError(f"net fd={fd}: {error.strerror}: give a descriptor that is open") from None
    try:
        if is_socket:
            from pyvmm.net.unix import socket_of

            return socket_of(copy, fd)
        from pyvmm.net.tap import tap_of

        return tap_of(copy, fd, offloads=options.offloads)
    except BaseException:
        os.close(copy)
        raise
