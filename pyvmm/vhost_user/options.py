"""What a user may say about a shared folder: the rows of ShareOptions, and the way to write them, ``--share``."""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.options import SWITCH, Kind, Options, option, word

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

TAG_BYTES = 36  # virtio 1.2, 5.11.4


def take_tag(name: str, value: Any) -> str:
    """The name by which the guest mounts it."""
    good = isinstance(value, str) and 0 < len(value.encode()) <= TAG_BYTES and value.isprintable()
    if not good:
        raise ConfigError(f"{name}={value!r}: give the name that the guest mounts it by, at most {TAG_BYTES} bytes")
    return str(value)


def take_path(name: str, value: Any) -> str | None:
    if value is None:
        return None
    import os

    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"{name}={value!r}: give a path")
    path = os.fsdecode(value)
    if not path or "\0" in path:
        raise ConfigError(f"{name}={value!r}: give a path")
    return os.path.abspath(path)


TAG = Kind(take_tag, metavar="TAG")
PATH = Kind(take_path, metavar="PATH")


class ShareOptions(Options):
    """A folder of the host's for the guest. An object does not change: ``changed`` makes another one.

    ``ShareOptions("data", "/srv/data")``, and in the guest ``mount -t virtiofs data /mnt``.
    """

    noun = "share option "
    thing = "a shared folder"
    frozen = True

    tag: str = option(TAG, "share", "the name by which the guest mounts it", words="tag")
    path: str | None = option(
        PATH, None, "the folder: virtiofsd is started to serve it, and ends with the machine", words="path")
    socket: str | None = option(
        PATH, None, "instead of a path: the Unix socket of a vhost-user back end that serves one already",
        words="socket")  # fmt: skip
    cache: str = option(
        word("auto", "always", "none"), "auto", "what the guest may keep of it: auto, for a second; always, where"
        " nobody else writes to the folder; none", words="cache")  # fmt: skip
    sandbox: str = option(
        word("namespace", "chroot", "none"), "namespace", "how virtiofsd shuts itself into the folder: namespace;"
        " chroot (as root); none (not QEMU's own)", words="sandbox")  # fmt: skip
    xattr: bool = option(SWITCH, False, "files may have extended attributes", words="xattr")

    def __init__(self, tag: str = "share", path: Any = None, **values: Any) -> None:
        super().__init__(tag=tag, path=path, **values)

    def check_together(self, values: dict[str, Any]) -> None:
        if values["path"] is None and values["socket"] is None:
            raise ConfigError(f"share {values['tag']} has no folder: write path=FOLDER")
        if values["path"] is None:
            return
        if values["socket"] is not None:
            raise ConfigError(
                f"share {values['tag']}: path and socket: who listens at a socket has a folder, give one of them"
            )

    @classmethod
    def parse(cls, text: str) -> ShareOptions:
        """From "tag=data,path=/srv/data,cache=always". A comma in a value is written twice. ConfigError for what is
        wrong.
        """
        values = cls.from_words(text)
        if "tag" not in values:
            raise ConfigError(f"share {text!r} has no tag: write tag=NAME,path=FOLDER")
        return cls(**values)


def check_tags(shares: Sequence[ShareOptions]) -> None:
    """ConfigError for two with one tag: the guest could not tell them apart."""
    seen = set()
    for share in shares:
        if share.tag in seen:
            raise ConfigError(f"two shares with tag={share.tag}: give each its own")
        seen.add(share.tag)
