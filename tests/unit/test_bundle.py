"""The package's modules from one file (pyvmm/bundle.py): as importlib has them, never older than their sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm import bundle, bundle_build

PACKAGE = Path(bundle.__file__).parent
# A package of that name with the real bundle in it, and these.
FILES = {
    "__init__.py": "from pyvmm.bundle import install\ninstall(__path__[0])\n",
    "one.py": (
        '"""One."""\nimport pyvmm.part.two\nVALUE = 1\nclass Kept:\n    pass\n'
        'def fail():\n    raise OSError("here")\n'
    ),
    "part/__init__.py": '"""Part."""\n',
    "part/two.py": "from pyvmm.part import three\nVALUE = 2\n",
    "part/three.py": "VALUE = 3\n",
    "broken.py": "raise RuntimeError('broken')\n",
    "late.py": "VALUE = 4\n",
    "no_package/script.py": "raise SystemExit('no module')\n",
}
AHEAD = ("pyvmm.part", "pyvmm.part.three", "pyvmm.part.two", "pyvmm.one")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "pyvmm"
    for name, text in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    for name in ("bundle.py", "bundle_build.py"):
        shutil.copy(PACKAGE / name, directory)
    monkeypatch.setattr(bundle_build, "AHEAD", AHEAD)
    bundle_build.build(str(directory))
    return directory


def run(package: Path, script: str, *options: str) -> str:
    """What it prints, in an interpreter that knows nothing else."""
    head = f"import sys; sys.path.insert(0, {str(package.parent)!r}); from pyvmm.bundle import installed\n"
    command = [sys.executable, "-I", "-S", *options, "-c", head + script]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


TELL = """
import pyvmm.one, pyvmm.late
m = sys.modules
names = ["one", "late", "part", "part.two", "part.three"]
print(*(type(m[f"pyvmm.{n}"].__spec__.loader).__name__ + str(getattr(m[f"pyvmm.{n}"], "VALUE", "")) for n in names))
"""
NOTE = "from pyvmm.bundle_build import note_times; note_times(installed())\n"
BUNDLED = "Loader1 Loader4 Loader Loader2 Loader3"
AHEAD_TOO = "installed().run_ahead();"


@pytest.mark.parametrize("ahead", ["", AHEAD_TOO], ids=["asked", "ahead"])
def test_modules_come_from_it(package: Path, ahead: str) -> None:
    for name in FILES:  # what stands there is not looked at, but for its time and size
        path = package / name
        status = path.stat()
        if name != "__init__.py":
            path.write_text("#" * status.st_size)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run(package, ahead + "\n" + TELL) == BUNDLED


@pytest.mark.parametrize("ahead", ["", AHEAD_TOO], ids=["asked", "ahead"])
def test_they_are_as_importlib_makes_them(package: Path, ahead: str) -> None:
    tell = """
import pyvmm.one, pyvmm.late
for name in sorted(n for n in sys.modules if n.startswith("pyvmm.") and not "bundle" in n):
    module = sys.modules[name]
    spec = module.__spec__
    print({k: v for k, v in sorted(vars(module).items()) if not k.startswith("__b") and "0x" not in repr(v)})
    print(spec.name, spec.origin, spec.parent, spec.cached, spec.has_location, spec.submodule_search_locations)
    print(module.__loader__ is spec.loader, spec.loader.name, spec.loader.path, spec.loader.is_package(name))
    print(getattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2]) is module)
    print(spec.loader.get_source(name), spec.loader.get_code(name).co_filename)
print(pyvmm.one.fail.__code__.co_filename, type(spec.loader).__mro__[-3:])
"""
    assert run(package, ahead + "\n" + tell) == run(package, tell, "-X", "pyvmm_files")


def test_what_needs_the_source_finds_it(package: Path) -> None:
    """inspect, tracebacks, pickle and reload, after the whole has been moved."""
    there = package.rename(package.parent / "moved").parent / "moved"
    (there.parent / "new").mkdir()
    there = there.rename(there.parent / "new/pyvmm")
    told = run(there, AHEAD_TOO + """
import importlib, inspect, pickle, traceback, pyvmm.one
print(inspect.getsource(pyvmm.one.fail).splitlines()[1], pickle.loads(pickle.dumps(pyvmm.one.Kept())).__class__)
try:
    pyvmm.one.fail()
except OSError:
    print(traceback.format_exc())
with open(pyvmm.one.__file__, "a") as file:
    file.write("VALUE = 7\\n")
print(importlib.reload(pyvmm.one).VALUE, pyvmm.one.__spec__.loader.get_code("pyvmm.one").co_filename)
""")  # fmt: skip
    assert "raise OSError(\"here\") <class 'pyvmm.one.Kept'>" in told
    assert f'File "{there}/one.py", line 7, in fail\n    raise OSError("here")' in told
    assert told.endswith(f"7 {there}/one.py")


@pytest.mark.parametrize("ahead", ["", AHEAD_TOO], ids=["asked", "ahead"])
def test_an_edited_source_is_what_runs(package: Path, ahead: str) -> None:
    three, late = package / "part/three.py", package / "late.py"
    before = three.stat()
    three.write_text("VALUE = 5\n")  # of the same size
    late.write_text("VALUE = 444\n")
    os.utime(late, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(package, ahead + "\n" + TELL) == "Loader1 SourceFileLoader444 Loader Loader2 SourceFileLoader5"
    os.utime(three, ns=(0, before.st_mtime_ns - 10**9))  # an older one is another one too
    assert run(package, ahead + "\n" + TELL).endswith("SourceFileLoader5")
    three.unlink()
    told = run(package, f"try:\n    {ahead}import pyvmm.one\nexcept ImportError as error:\n    print(error)")
    assert "three" in told


def test_a_new_time_of_the_same_source_is_noted(package: Path) -> None:
    """As after pip has installed it."""
    for path in package.rglob("*.py"):
        os.utime(path, ns=(16 * 10**17, 16 * 10**17))
    before = (package / bundle.NAME).read_bytes()
    assert run(package, TELL) == BUNDLED
    assert (package / bundle.NAME).read_bytes() == before
    assert run(package, AHEAD_TOO + NOTE + TELL) == BUNDLED
    after = (package / bundle.NAME).read_bytes()
    assert after != before
    assert len(after) == len(before)
    assert run(package, AHEAD_TOO + "print(installed().times_ns)") == "{}"
    assert run(package, AHEAD_TOO + NOTE + TELL) == BUNDLED
    assert (package / bundle.NAME).read_bytes() == after
    assert [path.name for path in package.glob("*.bundle*")] == [bundle.NAME]


def test_where_it_can_not_be_written_nothing_is(package: Path) -> None:
    for path in package.rglob("*.py"):
        os.utime(path, ns=(16 * 10**17, 16 * 10**17))
    before = (package / bundle.NAME).read_bytes()
    assert run(package, AHEAD_TOO + NOTE + TELL, "-B") == BUNDLED
    (package / "bundle_build.py").write_text(
        (package / "bundle_build.py").read_text().replace("fd = os.open(", "raise PermissionError\n    fd = os.open(")
    )
    assert run(package, AHEAD_TOO + NOTE + TELL) == BUNDLED
    assert (package / bundle.NAME).read_bytes() == before


@pytest.mark.parametrize("options", [("-O",), ("-X", "pyvmm_files"), ("-X", "pycache_prefix=/nowhere")], ids=str)
def test_when_it_is_left_aside(package: Path, options: tuple[str, ...]) -> None:
    assert "Loader1" not in run(package, AHEAD_TOO + "\n" + TELL, *options).split()


def test_a_broken_one_is_left_aside(package: Path) -> None:
    path = package / bundle.NAME
    whole = path.read_bytes()
    start = bundle.INDEX_AT
    index_end = start + int.from_bytes(whole[start - bundle.LENGTH_BYTES : start], "little")
    broken = [whole[:length] for length in (0, 3, start, start + 9, index_end, len(whole) - 1)]
    broken += [whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :] for at in (1, 5, start, index_end - 1)]
    for data in (*broken, whole + b"x"):
        path.write_bytes(data)
        for ahead in ("", AHEAD_TOO):
            assert "SourceFileLoader1 SourceFileLoader4" in run(package, ahead + "\n" + TELL), len(data)
    path.write_bytes(whole[:index_end] + bytes(len(whole) - index_end))  # seen only when a module is wanted
    for ahead in ("", AHEAD_TOO):
        assert run(package, ahead + "\n" + TELL) == BUNDLED
    path.unlink()
    assert "SourceFileLoader1 SourceFileLoader4" in run(package, AHEAD_TOO + "\n" + TELL)


def test_one_that_is_made_anew_while_a_process_runs(package: Path) -> None:
    """Another module's bytecode stands then where one's stood: what the process still wants comes from the files."""
    (package / "broken.py").write_text(f"TEXT = {'x' * 1000!r}\n")
    (package / "late.py").write_text(f"VALUE, TEXT = 4, {'y' * 300!r}\n")
    (package / "lazy.py").write_text("VALUE = 5\n")
    bundle_build.build(str(package))
    *_, length = bundle.Bundle(str(package)).entries["pyvmm.late"]
    shorter = f"TEXT = {'x' * (1000 - length)!r}\n"
    told = run(package, f"""
with open(f"{{sys.modules['pyvmm'].__path__[0]}}/broken.py", "w") as file:
    file.write({shorter!r})
from pyvmm.bundle_build import build
build(sys.modules["pyvmm"].__path__[0])
import pyvmm.late
print(pyvmm.late.VALUE)
""")  # fmt: skip
    assert told == "4"


def test_a_module_that_raises_is_not_there_after(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_build, "AHEAD", (*AHEAD, "pyvmm.broken"))
    bundle_build.build(str(package))
    tell = "try:\n    {}\nexcept RuntimeError as error:\n    print(error, 'pyvmm.broken' in sys.modules)"
    for how in ("import pyvmm.broken", "installed().run_ahead()"):
        assert run(package, tell.format(how)) == "broken False"


def test_units_come_from_one_shared_object() -> None:
    import pyvmm.device
    import pyvmm.kvm.ioctl

    for module in (pyvmm.device, pyvmm.kvm.ioctl):
        assert module.__file__ == str(PACKAGE / bundle.UNITS)
        assert module.__spec__ is not None
        assert (module.__spec__.origin, module.__spec__.has_location) == (module.__file__, True)
        assert module.__spec__.parent == module.__package__ == module.__name__.rpartition(".")[0]
    assert [path.name for path in PACKAGE.rglob("*.so")] == [bundle.UNITS]


def test_what_has_no_stub_is_no_unit(package: Path) -> None:
    finder = bundle.Bundle(str(PACKAGE))
    assert finder.find_spec("pyvmm.kvm.ioctl") is not None
    assert finder.find_spec("pyvmm.kvm.nothing") is None
    assert finder.find_spec("pyvmm.units") is finder.find_spec("re") is finder.find_spec("pyvmm_more.device") is None
    (package / "device.pyi").touch()
    tell = "try:\n    import pyvmm.device\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert run(package, tell) == "pyvmm.device"  # not built
