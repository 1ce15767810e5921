"""The NBD driver against the servers that people have: qemu-nbd, which brings QEMU's formats, and nbdkit with filters
that fail and that have block sizes of their own.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boot_assets
import pytest
from block_drives import LIMIT_S, SECTOR, Result, flush, read, write

from pyvmm.block import BlockBackend

Open = Callable[..., BlockBackend]
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(command...): a server that listens at tmp_path / "nbd" by now."""
    started = []

    def run(*command: str | Path) -> subprocess.Popen[bytes]:
        server = subprocess.Popen([str(word) for word in command])
        started.append(server)
        wait_for_server(server, socket.AF_UNIX, str(tmp_path / "nbd"))
        return server

    yield run
    for server in started:
        server.kill()
        server.wait()


def wait_for_server(server: subprocess.Popen[bytes], family: int, address: object) -> None:
    """Until it listens: its socket is there a moment before."""
    end = time.monotonic() + LIMIT_S
    while True:
        with socket.socket(family) as line:
            try:
                line.connect(address)  # type: ignore[arg-type]
                return
            except OSError:
                assert server.poll() is None and time.monotonic() < end
        time.sleep(0.01)


def qemu_nbd(image: Path, format: str, *words: str) -> tuple[str, ...]:
    return ("qemu-nbd", "--socket", str(image.parent / "nbd"), "--format", format, "--persistent", *words, str(image))


def nbdkit(directory: Path, plugin: str, *words: str) -> tuple[str, ...]:
    """In the foreground: words are filters by name, and the plugin's own."""
    root = boot_assets.package("nbdkit")

    def module(name: str, kind: str) -> str:
        return str(next(root.glob(f"usr/lib/*/nbdkit/{kind}s/nbdkit-{name}-{kind}.so")))

    filters = [f"--filter={module(word[1:], 'filter')}" for word in words if word.startswith("+")]
    program = next(path for path in (root / "usr/bin/nbdkit", root / "usr/sbin/nbdkit") if path.exists())
    options = ("-f", "--unix", str(directory / "nbd"), *filters, module(plugin, "plugin"))
    return (str(program), *options, *(word for word in words if not word.startswith("+")))


def play(backend: BlockBackend, seed: int, operations: int = 60) -> bytearray:
    """Random requests of every kind: what the disk has to hold then. It began with zeros."""
    generator = random.Random(seed)
    model = bytearray(backend.size_bytes)
    for _ in range(operations):
        sector = generator.randrange(backend.sectors - 300)
        count = generator.choice((1, 7, 8, 200, 300))
        span = slice(sector * SECTOR, (sector + count) * SECTOR)
        what = generator.randrange(4)
        if what == 0:
            assert read(backend, sector, count) == model[span]
        elif what == 1:
            result = Result()
            backend.aio_write_zeroes(sector, count, result)
            assert result.wait() == 0
            model[span] = bytes(count * SECTOR)
        else:
            data = generator.randbytes(count * SECTOR)
            assert write(backend, sector, data) == 0
            model[span] = data
    assert flush(backend) == 0
    return model


def test_qemu_nbd_brings_formats(start: Start, drive: Open, tmp_path: Path) -> None:
    image = tmp_path / "disk.vmdk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", image, "4M"], check=True)
    server = start(*qemu_nbd(image, "vmdk", "--discard", "unmap"))
    backend = drive(f"nbd:unix:{tmp_path / 'nbd'}")
    model = play(backend, 1)
    assert read(backend, 0, backend.sectors) == model
    backend.close()
    server.terminate()  # it has the image's lock
    server.wait()
    raw = tmp_path / "disk.raw"
    subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", image, raw], check=True)
    assert raw.read_bytes() == model


def test_qemu_nbd_may_die_and_come_back(start: Start, drive: Open, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4 << 20))
    server = start(*qemu_nbd(image, "raw"))
    backend = drive(f"nbd:unix:{tmp_path / 'nbd'}", reconnect_delay=60)
    data = os.urandom(64 * SECTOR)
    assert write(backend, 0, data) == 0
    server.kill()
    server.wait()
    (tmp_path / "nbd").unlink()
    result, buffer = Result(), bytearray(len(data))
    backend.aio_readv(0, [memoryview(buffer)], result)
    start(*qemu_nbd(image, "raw"))
    assert result.wait() == 0
    assert buffer == data


def test_nbdkit_has_a_disk_in_memory(start: Start, drive: Open, tmp_path: Path) -> None:
    start(*nbdkit(tmp_path, "memory", "4M"))
    backend = drive(f"nbd+unix:///?socket={tmp_path / 'nbd'}")
    model = play(backend, 2)
    assert read(backend, 0, backend.sectors) == model


def test_nbdkit_has_block_sizes(start: Start, drive: Open, tmp_path: Path) -> None:
    words = ("blocksize-minimum=4096", "blocksize-preferred=65536", "blocksize-maximum=65536")
    start(*nbdkit(tmp_path, "memory", "+blocksize-policy", "4M", *words, "blocksize-error-policy=error"))
    backend = drive(f"nbd:unix:{tmp_path / 'nbd'}")
    model = play(backend, 3)
    assert read(backend, 0, backend.sectors) == model


def test_nbdkit_tells_of_errors(start: Start, drive: Open, tmp_path: Path) -> None:
    start(*nbdkit(tmp_path, "memory", "+error", "4M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"))
    backend = drive(f"nbd:unix:{tmp_path / 'nbd'}", werror="report")
    assert write(backend, 0, bytes(SECTOR)) == -28
    assert read(backend, 0, 8) == bytes(8 * SECTOR)


def test_a_port_of_the_loopback(start: Start, drive: Open, tmp_path: Path) -> None:
    """A server that is no file's: TCP, and a name."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["qemu-nbd", "--port", str(port), "--bind", "127.0.0.1", "--export-name", "a", "--format", "raw"]
    server = subprocess.Popen([*command, "--persistent", str(image)])
    try:
        wait_for_server(server, socket.AF_INET, ("127.0.0.1", port))
        backend = drive(f"nbd://127.0.0.1:{port}/a")
        assert write(backend, 5, b"z" * SECTOR) == 0
        assert read(backend, 5, 1) == b"z" * SECTOR
    finally:
        server.kill()
        server.wait()
