"""Images: a path is one mapping, whoever names it; bytes are taken as they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm import ConfigError
from pyvmm.images import Images, image_name


def test_a_path_is_mapped_once_whatever_object_names_it(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(b"a kernel")
    images = Images()
    first = images.get(path, "kernel")
    assert images.get(Path(str(path)), "module") is first
    assert images.get(str(path), "initrd") is first
    assert bytes(first) == b"a kernel"
    path.unlink()  # a reset still finds it
    assert bytes(images.get(str(path), "kernel")) == b"a kernel"
    images.close()
    with pytest.raises(ConfigError, match=f"kernel {path}: No such file"):
        images.get(path, "kernel")


def test_two_paths_that_take_one_object_s_place_are_two(tmp_path: Path) -> None:
    """Objects that are gone give their id to the next."""
    images = Images()
    for n in range(20):
        path = tmp_path / f"{n}"
        path.write_bytes(bytes([n]))
        assert bytes(images.get(tmp_path / f"{n}", "module")) == bytes([n])
    images.close()


def test_bytes_are_views_and_no_files() -> None:
    before = os.listdir("/proc/self/fd")
    content = bytearray(b"content")
    images = Images()
    view = images.get(content, "flat binary")
    content[0] = ord("C")
    assert bytes(view) == b"Content"
    assert os.listdir("/proc/self/fd") == before
    images.close()


def test_what_can_t_be_mapped(tmp_path: Path) -> None:
    images = Images()
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match=r"kernel .*/empty is empty: give a whole image"):
        images.get(tmp_path / "empty", "kernel")
    with pytest.raises(ConfigError, match="initrd /dev/null is a device or a pipe: give a file, or its bytes"):
        images.get("/dev/null", "initrd")
    with pytest.raises(ConfigError, match=r"kernel .*: Is a directory: give a file that can be read"):
        images.get(tmp_path, "kernel")


def test_a_view_that_somebody_keeps_stops_close_and_not_abandon(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"image")
    images = Images()
    kept = images.get(path, "kernel")[1:]
    with pytest.raises(BufferError):
        images.close()
    kept.release()
    images.close()
    kept = images.get(path, "kernel")[1:]
    images.abandon()
    assert bytes(kept) == b"mage"


def test_names() -> None:
    assert image_name("a/kernel", "kernel") == "a/kernel"
    assert image_name(Path("a/kernel"), "kernel") == "a/kernel"
    assert image_name(b"bytes", "flat binary") == "flat binary"
