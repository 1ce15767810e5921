"""The registry of running machines: whose folder it is, who is in it, and what a killed process leaves."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm import ConfigError
from pyvmm.control import registry as r
from pyvmm.control.registry import Registry

LIMIT_S = 60


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry({"XDG_RUNTIME_DIR": str(tmp_path)})


def test_a_machine_is_there_while_somebody_listens(registry: Registry) -> None:
    assert registry.names() == []
    qmp, console = registry.register("b")
    others = registry.register("a")
    assert registry.names() == ["a", "b"]
    assert stat.S_IMODE(os.lstat(registry.path).st_mode) == 0o700
    assert {stat.S_IMODE(os.lstat(each.path).st_mode) for each in (qmp, console)} == {0o600}
    assert r.listening_pid(registry.find("b")) == os.getpid()
    for each in (qmp, console, *others):
        each.close()
    assert registry.names() == []
    assert os.listdir(registry.path) == []


def test_a_name_is_one_machine_s(registry: Registry) -> None:
    qmp, console = registry.register("web")
    with pytest.raises(ConfigError) as caught:
        registry.register("web")
    assert str(caught.value) == (
        f"name='web': a machine of that name is running, process {os.getpid()}: give another name, --name NAME"
    )
    qmp.close()
    console.close()
    for each in registry.register("web"):
        each.close()


def test_what_a_killed_process_leaves_is_taken_away(registry: Registry) -> None:
    program = "import os\nfrom pyvmm.control.registry import Registry\nkept = Registry().register('web')\nos._exit(9)"
    environment = {**os.environ, "XDG_RUNTIME_DIR": os.path.dirname(registry.path)}
    made = subprocess.run([sys.executable, "-c", program], env=environment, timeout=LIMIT_S)
    assert made.returncode == 9
    assert len(os.listdir(registry.path)) == 2
    living = registry.register("other")
    assert registry.names() == ["other"]
    assert sorted(os.listdir(registry.path)) == ["other.console", "other.qmp"]
    with pytest.raises(ConfigError, match=r"no machine called 'web' is running; there are: other"):
        registry.find("web")
    for each in living:
        each.close()


def test_one_that_was_stopped_with_the_folder_locked_is_not_waited_for(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    qmp, console = registry.register("a")
    monkeypatch.setattr(r, "LOCK_LIMIT_S", 0.05)
    before = len(os.listdir("/proc/self/fd"))
    with r.Locked(registry.path), pytest.raises(ConfigError, match="is locked by a pyvmm that was stopped"):
        registry.names()
    assert registry.names() == ["a"]
    assert len(os.listdir("/proc/self/fd")) == before
    qmp.close()
    console.close()


def test_what_is_known_is_not_connected_to(registry: Registry) -> None:
    qmp, console = registry.register("a")
    assert registry.names({"a"}) == ["a"]
    with pytest.raises(BlockingIOError):
        qmp.accept()
    assert registry.names() == ["a"]
    os.close(qmp.accept())
    for each in (qmp, console):
        each.close()
    assert registry.names({"a"}) == []  # its socket is gone


def test_a_socket_that_is_full_is_alive(registry: Registry, tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    registry.register("x")[1].close()  # the folder is there now
    listener.bind(registry.qmp_path("full"))
    listener.listen(0)
    waiting = []
    for _ in range(3):
        waiting.append(socket.socket(socket.AF_UNIX))
        waiting[-1].setblocking(False)
        waiting[-1].connect_ex(registry.qmp_path("full"))
    assert "full" in registry.names()
    for each in (listener, *waiting):
        each.close()


def test_a_folder_that_others_may_enter_is_refused(registry: Registry) -> None:
    os.mkdir(registry.path)
    os.chmod(registry.path, 0o755)
    for use in (registry.names, lambda: registry.register("web"), lambda: registry.find("web")):
        with pytest.raises(ConfigError, match="is not a folder that only you may enter"):
            use()


def test_so_is_a_link_to_one(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    os.symlink(tmp_path / "elsewhere", registry.path)
    with pytest.raises(ConfigError, match="is not a folder"):
        registry.register("web")


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.geteuid()
    run = f"/run/user/{mine}"
    fallback = f"{run}/pyvmm" if os.path.isdir(run) and os.stat(run).st_uid == mine else f"/tmp/pyvmm-{mine}"
    assert Registry({"XDG_RUNTIME_DIR": str(tmp_path)}).path == f"{tmp_path}/pyvmm"
    assert Registry({}).path == fallback
    for other in ("relative", f"{tmp_path}/none", ""):
        assert Registry({"XDG_RUNTIME_DIR": other}).path == fallback
    monkeypatch.setattr(r.os, "geteuid", lambda: mine + 1)  # another user's, as after su
    theirs = (f"/run/user/{mine + 1}/pyvmm", f"/tmp/pyvmm-{mine + 1}")
    assert Registry({"XDG_RUNTIME_DIR": str(tmp_path)}).path in theirs


def test_a_path_that_is_too_long_is_one_sentence(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        Registry({"XDG_RUNTIME_DIR": str(deep)}).register("web")


def test_where_nothing_can_be_made_it_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of his own that is read only, as in some containers; root may write where others may not."""
    allowed = os.access

    def access(path: str, mode: int, **how: bool) -> bool:
        return path != str(tmp_path) and allowed(path, mode, **how)

    monkeypatch.setattr(os, "access", access)
    assert Registry({"XDG_RUNTIME_DIR": str(tmp_path)}).path == Registry({}).path
    (tmp_path / "pyvmm").mkdir(mode=0o700)  # made by whoever may
    assert Registry({"XDG_RUNTIME_DIR": str(tmp_path)}).path == f"{tmp_path}/pyvmm"


def test_what_no_machine_can_be_called_is_not_listed(registry: Registry) -> None:
    qmp, console = registry.register("web")
    strange: list[socket.socket] = []
    for name in ("a\x1b[2J", "a b", "-x", ""):
        strange.append(socket.socket(socket.AF_UNIX))
        strange[-1].bind(registry.qmp_path(name))
        strange[-1].listen()
    assert registry.names() == ["web"]
    for end in strange:
        end.close()
    for each in (qmp, console):
        each.close()
