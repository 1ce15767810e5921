"""Fixtures for tests that boot whole guests; what they give is explained in tests/boot_assets.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import boot_assets
import pytest


@pytest.fixture(scope="session")
def cloud_kernel() -> boot_assets.Kernel:
    """Debian's cloud kernel: .bzimage, .vmlinux (uncompressed, with the PVH note), .modules(...)."""
    return boot_assets.kernel("cloud")


@pytest.fixture
def make_initrd(tmp_path: Path) -> Callable[..., Path]:
    """make_initrd(init, modules=(), files=None): an initial RAM disk whose /init ends with this text."""

    def make(init: str, modules: Iterable[Path] = (), files: Mapping[str, bytes] | None = None) -> Path:
        return boot_assets.initrd(init, tmp_path, modules, files)

    return make


@pytest.fixture(scope="session")
def multiboot_kernel() -> Path:
    """The example kernel of Debian's multiboot package."""
    return boot_assets.multiboot_kernel()


@pytest.fixture(scope="session")
def firmware() -> Path:
    """SeaBIOS, out of Debian's package."""
    return boot_assets.firmware()
