"""The command as pip puts it down (pyvmm/launcher/pyvmm): it finds its interpreter, its package, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PYTHON = f"python{sysconfig.get_config_var('LDVERSION')}"
VERSION = "0.1.0"
EDITABLE = f"__editable__.pyvmm_kvm-{VERSION}.pth"
TELL = (
    "import sys; print(sys.flags.isolated, sys.flags.no_site, 'site' in sys.modules, 're' in sys.modules,"
    " sys.modules['pyvmm'].__file__, sys.argv[1:])"
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with bin/pyvmm, as built for this interpreter, and no interpreter beside it."""
    text = (ROOT / "pyvmm/launcher/pyvmm").read_text()
    for word, value in (("@PYTHON@", PYTHON), ("@DISTRIBUTION@", "pyvmm_kvm"), ("@VERSION@", VERSION)):
        text = text.replace(word, value)
    command = tmp_path / "home/bin/pyvmm"
    command.parent.mkdir(parents=True)
    command.write_text(text)
    command.chmod(0o755)
    return tmp_path / "home"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A directory for PATH with that interpreter, which sees its own library only."""
    directory = tmp_path / "path"
    directory.mkdir()
    base = Path(sys.base_prefix) / "bin" / PYTHON
    (directory / PYTHON).symlink_to(base)
    return directory


def package(directory: Path) -> Path:
    """One that tells how it was started; the real one is not needed for that."""
    where = directory / "pyvmm"
    (where / "cli").mkdir(parents=True)
    (where / "__init__.py").write_text("")
    (where / "cli/__init__.py").write_text(f"def main():\n    {TELL}\n    return 7\n")
    (where / "cli/way_in.py").write_bytes((ROOT / "pyvmm/cli/way_in.py").read_bytes())
    return where / "__init__.py"


def run(*command: str | Path, path: Path, cwd: Path | None = None, **environment: str) -> list[str]:
    made = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={"PATH": f"{path}:/usr/bin:/bin", **environment}
    )
    assert made.returncode == 7, made.stderr
    return made.stdout.split(maxsplit=5)


def site_packages(home: Path) -> Path:
    return home / "lib" / PYTHON / "site-packages"


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "prefix": site_packages,
    "debian": lambda home: home / "lib" / PYTHON / "dist-packages",
    "lib64": lambda home: home / "lib64" / PYTHON / "site-packages",
    "target": lambda home: home,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(home: Path, path: Path, layout: str) -> None:
    file = package(LAYOUTS[layout](home))
    told = run(home / "bin/pyvmm", "run", "a b", path=path)
    assert told == ["1", "1", "False", "False", str(file), "['run', 'a b']\n"]


def test_the_interpreter_beside_it_goes_first(home: Path, path: Path) -> None:
    package(site_packages(home))
    (path / PYTHON).unlink()
    (path / PYTHON).write_text("#!/bin/sh\nexit 1\n")
    (path / PYTHON).chmod(0o755)
    (home / "bin" / PYTHON).symlink_to(Path(sys.base_prefix) / "bin" / PYTHON)
    run(home / "bin/pyvmm", path=path)


def test_an_editable_one(home: Path, path: Path, tmp_path: Path) -> None:
    file = package(tmp_path / "checkout")
    site_packages(home).mkdir(parents=True)
    (site_packages(home) / EDITABLE).write_text(f"{tmp_path / 'checkout'}\n")
    assert run(home / "bin/pyvmm", path=path)[4] == str(file)


def test_one_that_only_site_finds(home: Path, path: Path, tmp_path: Path) -> None:
    """In a virtual environment, by a .pth file of another name."""
    file = package(tmp_path / "elsewhere")
    site_packages(home).mkdir(parents=True)
    (site_packages(home) / "other.pth").write_text(f"{tmp_path / 'elsewhere'}\n")
    (home / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
    (home / "bin" / PYTHON).symlink_to(Path(sys.base_prefix) / "bin" / PYTHON)
    assert run(home / "bin/pyvmm", path=path)[4] == str(file)


def test_extras_are_found_late(home: Path, path: Path, tmp_path: Path) -> None:
    file = package(site_packages(home))
    (site_packages(home) / "beside.py").write_text("")
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra/by_site.py").write_text("")
    (site_packages(home) / "extra.pth").write_text(f"{tmp_path / 'extra'}\n")
    (home / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
    (home / "bin" / PYTHON).symlink_to(Path(sys.base_prefix) / "bin" / PYTHON)
    cli = file.parent / "cli/__init__.py"
    late = "import beside, sys; assert 'site' not in sys.modules; import by_site; assert 'site' in sys.modules"
    cli.write_text(cli.read_text().replace("def main():\n", f"def main():\n    {late}\n"))
    run(home / "bin/pyvmm", path=path)
    cli.write_text(cli.read_text().replace("by_site", "nowhere_at_all"))
    failed = subprocess.run([home / "bin/pyvmm"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert "No module named 'nowhere_at_all'" in failed.stderr


def test_nothing_of_the_environment(home: Path, path: Path, tmp_path: Path) -> None:
    """Files of the names of modules where it is started, and in PYTHONPATH; a start-up file."""
    package(site_packages(home))
    for name in ("re.py", "os.py", "pyvmm.py", "startup.py", "sitecustomize.py"):
        (tmp_path / name).write_text("raise SystemExit('taken from the wrong place')\n")
    run(home / "bin/pyvmm", path=path, cwd=tmp_path, PYTHONPATH=str(tmp_path), PYTHONSTARTUP="startup.py")


def test_by_a_link_and_by_name(home: Path, path: Path, tmp_path: Path) -> None:
    package(site_packages(home))
    (tmp_path / "vm").symlink_to(home / "bin/pyvmm")
    run(tmp_path / "vm", path=path)
    run("pyvmm", path=Path(f"{home / 'bin'}:{path}"))
    run("sh", "pyvmm", path=path, cwd=home / "bin")
    for name, directory in (("./pyvmm", "bin"), ("../bin/pyvmm", "bin"), ("bin/.//pyvmm", "."), ("bin/pyvmm", ".")):
        run("sh", name, path=path, cwd=home / directory)


def test_an_interpreter_of_ones_own(home: Path, path: Path) -> None:
    package(site_packages(home))
    where = {"PYTHONPATH": str(site_packages(home)), "PYVMM_PYTHON": f"{sys.executable} -X dev"}
    assert run(home / "bin/pyvmm", path=path, **where)[:2] == ["0", "0"]


def test_no_interpreter(home: Path, tmp_path: Path) -> None:
    package(site_packages(home))
    made = subprocess.run(
        ["/bin/sh", home / "bin/pyvmm"], capture_output=True, text=True, env={"PATH": str(tmp_path)}
    )
    assert made.returncode == 127
    assert made.stderr.startswith(f"pyvmm: {PYTHON}, for which it was installed, is gone")


@pytest.mark.parametrize("status", [0, 2, 130])
def test_the_status_and_all_output_come_out(home: Path, path: Path, status: int) -> None:
    file = package(site_packages(home))
    body = "    import sys; print('x' * 100000); sys.stderr.write('e')\n"
    (file.parent / "cli/__init__.py").write_text(f"def main():\n{body}    return {status}\n")
    made = subprocess.run([home / "bin/pyvmm"], capture_output=True, env={"PATH": f"{path}:/usr/bin:/bin"})
    assert (made.returncode, len(made.stdout), made.stderr) == (status, 100001, b"e")


def test_an_output_that_was_given_up_is_not_flushed(home: Path, path: Path) -> None:
    file = package(site_packages(home))
    (file.parent / "cli/__init__.py").write_text("def main():\n    import sys; sys.stdout.close()\n    return 141\n")
    made = subprocess.run([home / "bin/pyvmm"], capture_output=True, env={"PATH": f"{path}:/usr/bin:/bin"})
    assert (made.returncode, made.stdout, made.stderr) == (141, b"", b"")


def test_the_installed_command_is_this_one() -> None:
    command = Path(sys.prefix) / "bin/pyvmm"
    text = (ROOT / "pyvmm/launcher/pyvmm").read_text()
    words = {"@PYTHON@": PYTHON, "@DISTRIBUTION@": "pyvmm_kvm", "@VERSION@": VERSION}
    for word, value in words.items():
        text = text.replace(word, value)
    assert command.read_text() == text
    assert os.access(command, os.X_OK)
