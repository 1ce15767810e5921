"""Guests that come with pyvmm, assembled when it is built. ``image("demo")`` gives the bytes."""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError, remedy


def image(name: str) -> bytes:
    """The flat binary made from ``name``.S, to be loaded at the address that its first line states."""
    path = os.path.join(os.path.dirname(__file__), f"{name}.bin")
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        why = remedy(error, "build it with `python setup.py build_py`")
        raise ConfigError(f"guest {path}: {why}") from None
