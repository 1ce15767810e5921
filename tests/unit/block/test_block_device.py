"""Block devices of the host: loop devices over an image, of 512 and of 4096 byte sectors. Where we may make them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from block_drives import ENGINES, LEFT_OUT, SECTOR, Result, flush, read, write

from pyvmm.block import BlockBackend
from pyvmm.errors import ConfigError

Open = Callable[..., BlockBackend]


def losetup(*arguments: str | Path) -> str | None:
    """What losetup prints; None where it fails."""
    run = subprocess.run(["losetup", *arguments], capture_output=True, text=True)
    return None if run.returncode else run.stdout.strip()


def attach(image: Path, sector_bytes: int) -> str | None:
    return losetup("-f", "--show", "--sector-size", str(sector_bytes), image)


def we_may() -> bool:
    if not shutil.which("losetup") or not os.access("/dev/loop-control", os.W_OK):
        return False
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(8192))
        file.flush()
        device = attach(Path(file.name), 4096)
        if device is None:
            return False
        losetup("-d", device)
    return True


if not we_may():
    LEFT_OUT.append("block devices: this user may not make loop devices here")
else:

    @pytest.fixture(params=[512, 4096])
    def device(request: pytest.FixtureRequest, image: Path) -> Iterator[str]:
        path = attach(image, request.param)
        assert path is not None
        yield path
        losetup("-d", path)

    @pytest.fixture
    def device_drive(device: str, drive: Open) -> Iterator[Open]:
        # Last made, first gone: the drive has to let go of the device before that is taken away.
        opened = []

        def open_it(**options: object) -> BlockBackend:
            opened.append(drive(device, **options))
            return opened[-1]

        yield open_it
        for backend in opened:
            backend.close()

    @pytest.mark.parametrize("aio", ENGINES)
    @pytest.mark.parametrize("cache", ["none", "writeback", "directsync"])
    def test_a_block_device_is_a_drive(device_drive: Open, image: Path, aio: str, cache: str) -> None:
        backend = device_drive(aio=aio, cache=cache)
        content = bytearray(image.read_bytes())
        assert (backend.size_bytes, backend.sectors) == (1 << 20, 2048)
        assert read(backend, 0, 2048) == content
        generator = random.Random(3)
        for _ in range(20):
            sector, count = generator.randrange(2000), generator.randint(1, 40)
            data = generator.randbytes(count * SECTOR)
            assert write(backend, sector, data) == 0
            content[sector * SECTOR : (sector + count) * SECTOR] = data
        for sector, count in ((3, 5), (64, 256), (1000, 1)):
            result = Result()
            backend.aio_write_zeroes(sector, count, result)
            assert result.wait() == 0
            content[sector * SECTOR : (sector + count) * SECTOR] = bytes(count * SECTOR)
        result = Result()
        backend.aio_discard(1024, 512, result)
        assert result.wait() == 0
        found = read(backend, 0, 2048)
        content[1024 * SECTOR : 1536 * SECTOR] = found[1024 * SECTOR : 1536 * SECTOR]  # anything is right there
        assert found == content
        assert flush(backend) == 0
        with pytest.raises(ConfigError, match="is in use by this process"):
            device_drive(aio=aio, cache=cache)
