"""A machine with a qcow2 disk: saved and restored, forked, moved to another process, its disk made longer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guests import PASSED, TIMEOUT_S, Guest
from qcow2_trials import qemu_img, whole
from test_migration import PAGES, Destination
from test_saved_state import COUNTER

import pyvmm
from pyvmm import Machine
from pyvmm.block import BlockBackend, image_tool

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image_tool.create(str(tmp_path / "base"), "qcow2", 2 * MIB)
    image_tool.create(str(tmp_path / "disk"), "qcow2", None, backing="base")
    return tmp_path / "disk"


def disk(m: Machine) -> BlockBackend:
    (backend,) = m.backends.values()
    return backend


def asked(m: Machine, submit: Callable[..., Any], *words: Any) -> None:
    results: list[int] = []
    submit(*words, results.append)
    disk(m).drain()
    assert results == [0]


def written(m: Machine, sector: int, byte: bytes) -> None:
    asked(m, disk(m).aio_writev, sector, [memoryview(byte * 512)])


def there(m: Machine, sector: int) -> bytes:
    data = bytearray(512)
    asked(m, disk(m).aio_readv, sector, [memoryview(data)])
    return bytes(data)


def test_saved_and_restored(boot: Callable[..., Guest], tmp_path: Path, image: Path) -> None:
    m = boot(COUNTER, drives=[f"file={image},if=virtio,cache=unsafe"]).machine
    written(m, 5, b"a")
    m.save(tmp_path / "snapshot")
    assert whole(image, 2 * MIB, locking=False)[5 * 512] == ord("a")
    m.close()
    with Machine.restore(tmp_path / "snapshot") as again:
        assert disk(again).format == "qcow2"
        assert there(again, 5) == b"a" * 512
        written(again, 6, b"b")
        assert again.run(TIMEOUT_S) == PASSED
    assert "No errors" in qemu_img("check", image).stdout
    assert whole(image, 2 * MIB)[5 * 512 : 7 * 512] == b"a" * 512 + b"b" * 512


def test_forks_have_copies(boot: Callable[..., Guest], image: Path) -> None:
    m = boot(COUNTER, drives=[f"file={image},if=virtio"]).machine
    written(m, 5, b"a")
    drive = pyvmm.DriveOptions(image, interface="virtio", snapshot=True, locking=False)
    copies = m.fork(2, drives=[drive])
    for byte, copy in zip((b"b", b"c"), copies, strict=True):
        assert there(copy, 5) == b"a" * 512
        written(copy, 5, byte)
    for byte, copy in zip((b"b", b"c"), copies, strict=True):
        with copy:
            assert there(copy, 5) == byte * 512
            assert copy.run(TIMEOUT_S) == PASSED
    assert there(m, 5) == b"a" * 512


def test_moved_to_another_machine(boot: Callable[..., Guest], tmp_path: Path, image: Path) -> None:
    """Both have the image open; what the one wrote the other finds, and goes on from."""
    guest = boot(PAGES, drives=[f"file={image},if=virtio"])
    m = guest.machine
    m.resume()
    written(m, 5, b"a")
    destination = Destination(str(tmp_path / "socket"))
    written(m, 1024, b"b")  # when the other one has opened it already
    m.migrate_to(destination.address)
    with destination.come() as other:
        assert there(other, 5) == b"a" * 512
        assert there(other, 1024) == b"b" * 512
        written(other, 2048, b"c")
        m.close()
        other.memory.write(guest.program.symbols["end"], b"\1")
        assert other.run(TIMEOUT_S) == PASSED
    assert "No errors" in qemu_img("check", image).stdout
    found = whole(image, 2 * MIB)
    assert [found[sector * 512] for sector in (5, 1024, 2048)] == [ord("a"), ord("b"), ord("c")]


def test_block_resize(boot: Callable[..., Guest], image: Path) -> None:
    m = boot(COUNTER, drives=[f"file={image},if=virtio,id=disk"]).machine
    assert m.block_resize("disk", 4 << 30) == 4 << 30
    written(m, (4 << 30) // 512 - 1, b"e")
    assert there(m, (4 << 30) // 512 - 1) == b"e" * 512
    written(m, 5, b"a")
    assert m.block_resize("disk", 1 << 20) == 1 << 20
    assert there(m, 5) == b"a" * 512
    m.close()
    assert image_tool.info(str(image), None)["virtual-size"] == 1 << 20
    assert "No errors" in qemu_img("check", image).stdout
