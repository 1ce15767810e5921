"""The way into the command from its file (launcher/pyvmm), and out of it."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
    """The last of the finders, which this module is (sys.meta_path): what nobody else finds may be where only site
    looks, in other directories and by .pth files.
    """
    if path is not None or "site" in sys.modules:
        return None
    import site
    from importlib.machinery import PathFinder

    site.main()
    return PathFinder.find_spec(name, path, target)


def command() -> None:
    """``main``, and then the process is gone: a closed machine does not need what finalising the interpreter does."""
    from pyvmm.cli import main

    if not sys.flags.no_site:
        sys.exit(main())
    sys.meta_path.append(sys.modules[__name__])
    status = main()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:  # as where its reader has gone (cli/say.py, give_up)
            stream.flush()
    from posix import _exit

    _exit(status)
