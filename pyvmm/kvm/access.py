"""What to do where this user may not open /dev/kvm: it depends on who may."""

from __future__ import annotations

import posix
import stat
from errno import EACCES

from pyvmm.kvm.ioctl import REMEDIES


def how_to_be_let_in(path: str) -> str:
    """A command that an administrator of this host can run, and what follows it."""
    try:
        status = posix.stat(path)
    except OSError:
        return REMEDIES["open /dev/kvm", EACCES]
    group = group_name(status.st_gid)
    if status.st_gid != 0 and status.st_mode & (stat.S_IRGRP | stat.S_IWGRP) == stat.S_IRGRP | stat.S_IWGRP:
        if posix.geteuid() == 0 or status.st_gid in posix.getgroups():
            return "a security module or the sandbox around this process forbids it: allow the device there"
        user = user_name(posix.geteuid())
        return f"join the group that may: `sudo usermod -aG {group} {user}`, then log in again"
    mode = stat.S_IMODE(status.st_mode)
    # As udev sets it by default (systemd's 50-udev-default.rules, dev-kvm-mode).
    return (
        f"it belongs to {user_name(status.st_uid)}:{group} with mode {mode:04o}, which lets no group in:"
        f" `sudo chmod 666 {path}`, and have your udev rules say so"
    )


def group_name(gid: int) -> str:
    try:
        import grp

        return grp.getgrgid(gid).gr_name
    except (KeyError, ImportError):
        return str(gid)


def user_name(uid: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(uid).pw_name
    except (KeyError, ImportError):
        return str(uid)
