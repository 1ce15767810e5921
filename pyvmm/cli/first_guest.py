"""Somebody's first guest: this host's own kernel, and what would work here where nobody said what to run."""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError

IMAGE_ENDS = (".qcow2", ".img", ".raw")
SUGGESTIONS = 3


def host_kernel(root: str = "/") -> tuple[str, str | None]:
    """(kernel, initrd or None) that this host runs, or has for its next start. ConfigError where none can be read."""
    running = os.uname().release
    kernels = [
        f"{root}boot/vmlinuz-{running}",
        f"{root}usr/lib/modules/{running}/vmlinuz",
        f"{root}lib/modules/{running}/vmlinuz",
        f"{root}vmlinuz",
        *reversed(in_directory(f"{root}boot", "vmlinuz")),
    ]
    there = [path for path in kernels if os.path.exists(path)]
    for path in there:
        if os.access(path, os.R_OK):
            return path, initrd_of(path, root)
    if there:
        raise ConfigError(
            f"--kernel host: {there[0]} may not be read by this user: sudo chmod +r {there[0]}, or copy it and give"
            " --kernel FILE"
        )
    raise ConfigError(
        f"--kernel host: this host has no kernel that can be read, neither in {root}boot nor in {root}usr/lib/modules"
        f"/{running} (containers have none): give --kernel FILE"
    )


def initrd_of(kernel: str, root: str = "/") -> str | None:
    """The initial RAM disk that the distribution made for it."""
    version = os.path.basename(kernel).partition("vmlinuz")[2].lstrip("-")
    if not version:
        version = os.path.basename(os.path.dirname(os.path.realpath(kernel)))
    for name in (f"initrd.img-{version}", f"initramfs-{version}.img", f"initrd-{version}", "initrd.img"):
        path = f"{root}boot/{name}"
        if os.access(path, os.R_OK):
            return path
    return None


def in_directory(path: str, begins: str = "", ends: tuple[str, ...] = ("",)) -> list[str]:
    """Files there with such names, in order."""
    try:
        names = sorted(os.listdir(path))
    except OSError:
        return []
    return [os.path.join(path, name) for name in names if name.startswith(begins) and name.endswith(ends)]


def suggestions() -> list[str]:
    """Up to three commands that would work here."""
    import shlex

    found = []
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        for path in in_directory(".", ends=IMAGE_ENDS)[:1]:
            if os.access(path, os.R_OK | os.W_OK):
                found.append(f"pyvmm run {shlex.quote(path)}")
        try:
            host_kernel()
        except ConfigError:
            kernels = [path for path in in_directory(".", "vmlinuz") if os.access(path, os.R_OK)]
            found += [f"pyvmm run --kernel {shlex.quote(path)} --append console=ttyS0" for path in kernels[:1]]
        else:
            found.append("pyvmm run --kernel host")
        found += ["pyvmm demo", "pyvmm bench exits --quick"]
    return [*found, "pyvmm doctor", "pyvmm run --help", "pyvmm --help"][:SUGGESTIONS]


def no_guest() -> str:
    """What to say to whoever has not said what to run."""
    lines = "\n  ".join(suggestions())
    return f"no guest: give a disk image, --kernel FILE or --flat FILE. Here these would work:\n  {lines}"
