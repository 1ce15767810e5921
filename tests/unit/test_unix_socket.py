"""UnixListener: whose socket it takes the place of, who may connect, and what is left in the end."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.unix_socket import LONGEST_PATH_BYTES, UnixListener


def listener(path: Path, mode: int | None = 0o600) -> UnixListener:
    return UnixListener(str(path), 5, what="test path", mode=mode)


def connected(path: Path) -> socket.socket:
    end = socket.socket(socket.AF_UNIX)
    end.connect(str(path))
    return end


def test_peers_come_in_order(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    it = listener(path)
    with pytest.raises(BlockingIOError):
        it.accept()
    with connected(path) as first, connected(path) as second:
        for n, peer in enumerate((first, second)):
            with socket.socket(fileno=it.accept()) as end:
                assert not os.get_blocking(end.fileno())
                assert not os.get_inheritable(end.fileno())
                end.send(b"%d" % n)
                assert peer.recv(10) == b"%d" % n
    it.close()
    assert it.fd == -1
    assert not path.exists()
    it.close()


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_who_may_connect(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        its = [listener(tmp_path / "own", 0o600), listener(tmp_path / "any", None)]
    finally:
        os.umask(before)
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "any").stat().st_mode & 0o777 == 0o777 & ~umask
    for it in its:
        it.close()


def test_one_that_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    it = listener(path)
    connected(path).close()
    it.close()


def test_one_that_is_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = UnixListener(str(path), 0, what="test path")
    with connected(path):  # its backlog is full, too
        with pytest.raises(ConfigError, match=f"test path={path}: Address already in use: .*give another path"):
            listener(path)
        os.close(first.accept())
    first.close()


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="give another path"):
        listener(path)
    assert path.read_text() == "mine"
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="give another path"):
        listener(dangling)
    assert dangling.is_symlink()


def test_what_has_taken_its_place_stays(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    it = listener(path)
    path.unlink()
    path.write_text("another's")
    it.close()
    assert path.read_text() == "another's"


def test_a_child_of_fork_leaves_the_file(tmp_path: Path) -> None:
    it = listener(tmp_path / "socket")
    it.abandon()
    assert it.fd == -1
    assert (tmp_path / "socket").exists()


def test_paths_that_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give another path"):
        listener(tmp_path / "no" / "folder")
    with pytest.raises(ConfigError, match=f"at most {LONGEST_PATH_BYTES} bytes: shorten it"):
        listener(Path("/" + "x" * LONGEST_PATH_BYTES))
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        it = UnixListener("x" * LONGEST_PATH_BYTES, 1, what="test path")
        it.close()
    finally:
        os.chdir(before)
