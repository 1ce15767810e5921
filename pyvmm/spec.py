"""Spec: what a machine is made of, complete and checked, before anything is opened.

A MachineConfig says what somebody asked for; a Spec says what will be made: which board, every drive with its place,
name and serial number, every word in its one form. It does not change. Two Specs are equal where the same machine comes
of them. ``plain`` makes data of one that can be written down, and ``from_plain`` a Spec of that: what only the process
had (images given as bytes, consoles that are objects) is named there, and given again.
"""

from __future__ import annotations

from pyvmm.config import MachineConfig
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Self

    from typing_extensions import Buffer

    from pyvmm.balloon_options import BalloonOptions
    from pyvmm.boards.drive_places import PlacedDrive
    from pyvmm.config import MachineOptions
    from pyvmm.console_options import ConsoleOptions
    from pyvmm.net.options import NetOptions
    from pyvmm.vhost_user.options import ShareOptions
    from pyvmm.vsock.options import VsockOptions


class Spec(MachineConfig):
    """A MachineConfig that is complete and does not change."""

    frozen = True

    if TYPE_CHECKING:
        # What is narrower here than what may be asked for.
        machine: str
        drives: tuple[PlacedDrive, ...]
        nets: tuple[NetOptions, ...]
        consoles: tuple[ConsoleOptions, ...]
        shares: tuple[ShareOptions, ...]
        vsock: VsockOptions | None
        balloon: BalloonOptions | None
        firmware: str | Buffer | None
        kernel: str | Buffer | None
        initrd: str | Buffer | None
        modules: tuple[tuple[str | Buffer, str], ...]
        flat: str | Buffer | None

    def check_together(self, values: dict[str, Any]) -> None:
        super().check_together(values)
        if values["machine"] is None:
            values["machine"] = "pc" if wants_pc(values) else "microvm"
        if values["drives"]:
            from pyvmm.boards.drive_places import place

            values["drives"] = place(values["drives"], values["machine"], values["cpus"])
        if values["nets"]:
            from pyvmm.net.options import complete

            values["nets"] = complete(values["nets"], values["uuid"])
        if values["consoles"]:
            from pyvmm.console_options import numbered

            numbered(values["consoles"])
        if values["shares"]:
            from pyvmm.vhost_user.options import check_tags

            check_tags(values["shares"])
            values["shared_memory"] = True  # who serves it has to map it
        bare = values["machine"] == "microvm" and values["kernel"] is None and values["flat"] is None
        if bare and values["accel"] == "kvm":
            raise ConfigError("nothing to run: give kernel, flat, drives or firmware")

    @property
    def wants_virtio(self) -> bool:
        """Whether any of its devices is one of virtio's."""
        if self.rng or self.nets or self.consoles or self.shares or self.vsock is not None or self.balloon is not None:
            return True
        return bool(self.drives) and any(drive.interface == "virtio" for drive in self.drives)

    @classmethod
    def from_plain(cls, data: Mapping[str, Any], given: Mapping[str, Any] = {}) -> Self:
        """The Spec that ``plain`` wrote down. ``given`` has, by option, what it only names: an image that was given as
        bytes, a console that is an object, all of the modules where one of them was bytes. ConfigError where something
        is missing.
        """
        return cls(**cls.unplain(data, given))

    @classmethod
    def unplain(cls, data: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The options that ``plain`` wrote down, to be taken by the constructor."""
        for name in data:
            if name not in cls.rows:
                raise ConfigError(cls.unknown(name))
        return {name: cls.rows[name].kind.unplain(name, value, given) for name, value in data.items()}


def wants_pc(values: dict[str, Any]) -> bool:
    """Whether a machine of no kind in particular is a pc: where something is asked for that a microvm has not."""
    if values["firmware"] is not None or values["accel"] == "qtest":
        return True
    bare = values["kernel"] is None and values["flat"] is None
    return bool(values["drives"]) and any(bare or drive.interface != "virtio" for drive in values["drives"])


def specify(config: MachineConfig | None, options: MachineOptions) -> Spec:
    """What Machine(config) or Machine(**options) asks for. ConfigError for both at once, and for nothing to run."""
    if config is None:
        return Spec(**options)
    if not isinstance(config, MachineConfig):
        raise ConfigError(f"Machine({config!r}): give options by name, kernel=..., or one MachineConfig")
    if options:
        names = ", ".join(options)
        raise ConfigError(f"Machine(config, {names}=...): put {names} into the MachineConfig, or give options only")
    return config if isinstance(config, Spec) else Spec(**config.given())
