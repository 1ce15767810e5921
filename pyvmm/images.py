"""Images: the files a machine boots from, mapped for as long as it lives: a reset loads them again."""

from __future__ import annotations

from posix import fspath
from posix import stat as status

from pyvmm.errors import ConfigError, remedy_for_path
from pyvmm.options import is_path, path_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.config import Image


class Images:
    """A path is mapped once, whoever asks for it, and until ``close``."""

    def __init__(self) -> None:
        self._views: dict[str | bytes, memoryview] = {}
        self._maps: list[Any] = []

    def get(self, image: Image, what: str) -> memoryview:
        """The bytes of a path or a buffer. ConfigError where the file can't be read, or is empty."""
        if not is_path(image):
            return memoryview(image).cast("B")
        path = fspath(image)
        if path not in self._views:
            self._views[path] = self._map(path, what)
        return self._views[path]

    def _map(self, path: str, what: str) -> memoryview:
        import mmap
        import stat

        try:
            kind = stat.S_IFMT(status(path).st_mode)
            if kind not in (stat.S_IFREG, stat.S_IFDIR):
                raise ConfigError(f"{what} {path} is a device or a pipe: give a file, or its bytes")
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except OSError as error:
            why = remedy_for_path(path, error, "give a file that can be read")
            raise ConfigError(f"{what} {path}: {why}") from None
        except ValueError:
            raise ConfigError(f"{what} {path} is empty: give a whole image") from None
        self._maps.append(mapped)
        return memoryview(mapped)

    def close(self) -> None:
        """Give the files back. BufferError where somebody still has a view of one."""
        for view in self._views.values():
            view.release()
        for mapped in self._maps:
            mapped.close()
        self._views.clear()
        self._maps.clear()

    def abandon(self) -> None:
        """In a child of fork, where a device of the embedder's may have a view of one: it goes with that."""
        try:
            self.close()
        except BufferError:
            pass


def image_name(image: Image, otherwise: str) -> str:
    """What to call it in messages, and the first word of a multiboot kernel's or module's command line."""
    return path_text(image) if is_path(image) else otherwise
