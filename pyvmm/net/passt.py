"""passt (https://passt.top): a program that plays the guest's network on ordinary sockets of the host, without root.

It answers ARP and DHCP, and opens a socket for every connection the guest opens. The guest has the host's own address;
the gateway's leads to the host's loopback. passt is given one end of a socket pair, and ends when the other is closed:
however this process ends.
"""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError, describe
from pyvmm.net.backend import StreamBackend
from pyvmm.net.options import protocol_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.net.options import NetOptions

PROGRAM = "passt"
LONGEST_START_S = 20.0


def open_passt(options: NetOptions) -> StreamBackend:
    """Start it, and return when it is ready. ConfigError where it is not there, or says why it can't."""
    import socket
    import subprocess

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        ours.setblocking(False)
        command = [PROGRAM, "--quiet", "--fd", str(theirs.fileno()), *words(options)]
        try:
            # It goes into the background when all its ports are open.
            started = subprocess.run(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=LONGEST_START_S,
                check=False,
            )
        except FileNotFoundError:
            raise ConfigError(
                "net passt: there is no such program here: install the package passt (Debian: `apt install passt`;"
                " https://passt.top), or give --net tap=NAME"
            ) from None
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError(f"net passt: it does not start: {describe(error)}: try `passt --foreground`") from None
        if started.returncode:
            said = what_it_said(started.stderr.decode("utf-8", "replace"))
            raise ConfigError(f"net passt: it does not start: {said or started.returncode}: {hint(said, options)}")
        return StreamBackend(os.dup(ours.fileno()))


def words(options: NetOptions) -> list[str]:
    """passt's own, for what is asked for."""
    ports: dict[str, list[str]] = {"tcp": [], "udp": []}
    for forward in options.forward:
        protocol, rest = protocol_of(forward)
        ports[protocol].append(rest)
    told = [word for protocol, many in ports.items() for one in many for word in (f"--{protocol}-ports", one)]
    return told + (["--mtu", str(options.mtu)] if options.mtu is not None else [])


def what_it_said(errors: str) -> str:
    """Its last words, without what it always says."""
    lines = [line.strip() for line in errors.splitlines()]
    told = [line for line in lines if line and not line.startswith(("Failed to send", "Don't run as root"))]
    return told[-1].removesuffix(", exiting") if told else ""


def hint(said: str, options: NetOptions) -> str:
    if options.forward and ("bind" in said or "port" in said):
        return "forward ports that are free, from 1024 on"
    if "user namespace" in said:  # unshare(2), CLONE_NEWUSER's EPERM
        return (
            "it shuts itself off in one, which this user may not make here: a chroot and many containers forbid it, and"
            " sysctl user.max_user_namespaces; give --net tap=NAME"
        )
    if "interface" in said:
        return "the host needs an address and a default route"
    return "run `passt --foreground` to see more"
