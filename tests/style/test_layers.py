"""Imports go down the layers; only kvm/ and KVM_RUN know ioctl; the way to the first instruction is lean."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tree import PACKAGE, ROOT, code, module_name, sources

DESIGN = (ROOT / "docs" / "design.md").read_text()


def module_of(name: str) -> str:
    """A name of the table: x86/ is pyvmm.x86."""
    return "pyvmm" if name == "pyvmm" else "pyvmm." + name.strip("/").replace("/", ".")


def layers_of_the_design() -> list[list[str]]:
    """Lowest first. An entry stands for a module, or for a package and all that is in it."""
    table = DESIGN.split("## Layers\n")[1].split("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    return [[module_of(name) for name in re.findall(r"`([\w/]+)`", row[2])] for row in rows[2:]]


LAYERS = layers_of_the_design()

# A device sees the contract and what its host side is made of: no KVM, no address of its own, no thread.
DEVICES_MAY = [
    *("errors", "light", "state", "device", "irq", "clock", "region", "address_space", "guest_memory"),
    *("chardev", "screen", "block", "net", "vsock", "vhost_user", "devices"),
]
MODULES = sources(".py", ".pyx", ".pxd")


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def layer(module: str) -> int:
    """Of a module: the entry that names it, or the package it is in."""
    name = module
    while name != "pyvmm" or module == "pyvmm":
        for n, names in enumerate(LAYERS):
            if name in names:
                return n
        name = name.rpartition(".")[0]
    raise AssertionError(f"{module} has no layer: give it one in docs/design.md")


def names_it(module: str, name: str) -> str:
    """What ``from module import name`` brings: a module of the package, or something that module has."""
    inside = f"{module}.{name}"
    parts = PACKAGE.parent.joinpath(*inside.split("."))
    is_module = parts.is_dir() or any(parts.with_suffix(s).exists() for s in (".py", ".pyx", ".pxd"))
    return inside if is_module else module


def python_imports(path: Path, typing_too: bool = False) -> set[str]:
    """Every import of a Python file, at its top or in a function, but for what only annotations need."""
    found = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for child in (*(node.body if typing_too else ()), *node.orelse):
                walk(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found.update(names_it(str(node.module), alias.name) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(path.read_text()))
    return found


def taken_from(path: Path, module: str) -> set[str]:
    """The names that a Python file imports from ``module``; * where it takes the module itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == module:
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update("*" for alias in node.names if f"{node.module}.{alias.name}" == module)
        elif isinstance(node, ast.Import):
            found.update("*" for alias in node.names if alias.name == module)
    return found


def cython_imports(path: Path) -> set[str]:
    found = set()
    text = code(path)
    for module, names in re.findall(r"^[ \t]*from\s+([\w.]+)\s+c?import\s+(\([^)]*\)|[^\n]*)", text, re.M):
        assert not module.startswith("."), f"{path}: imports are absolute"
        found.update(
            names_it(module, name.split()[0]) for name in names.strip("()").split(",") if name.strip()
        )
    for modules in re.findall(r"^[ \t]*c?import\s+([^\n]*)", text, re.M):
        found.update(name.split()[0] for name in modules.split(","))
    return found


def imports(path: Path) -> set[str]:
    return python_imports(path) if path.suffix == ".py" else cython_imports(path)


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "pyvmm"}


def test_the_parser_sees_imports() -> None:
    # Of each kind one that is known to be there: a parser that finds nothing proves nothing.
    assert "pyvmm.kvm.ioctl" in imports(PACKAGE / "cpu_exec.pyx")
    assert "pyvmm.kvm.uapi" in imports(PACKAGE / "cpu_exec.pyx")
    assert {"posix", "pyvmm.errors"} <= imports(PACKAGE / "guest_memory.pyx")
    assert "pyvmm.boards.microvm" in imports(PACKAGE / "builder.py")  # in a function
    assert taken_from(PACKAGE / "event_loop.py", "pyvmm.light") == {"Condition", "Lock", "Thread", "deque", "get_ident"}
    assert taken_from(PACKAGE / "machine_running.py", "pyvmm.run_control") >= {"*", "ExitStatus"}
    assert "pyvmm.device" in imports(PACKAGE / "bus.pxd")
    assert "pyvmm.spec" not in imports(PACKAGE / "builder.py")  # for annotations only
    assert "pyvmm.spec" in python_imports(PACKAGE / "builder.py", typing_too=True)


def test_the_table_of_layers_is_read() -> None:
    assert LAYERS[0] == [f"pyvmm.{name}" for name in ("bundle", "bundle_build", "errors", "options", "x86.layout")]
    assert layer("pyvmm.errors") < layer("pyvmm.kvm.vm") < layer("pyvmm.devices.ide.disk") < layer("pyvmm.boards.pc")
    assert layer("pyvmm.boards.drive_places") < layer("pyvmm.spec") < layer("pyvmm") < layer("pyvmm.cli.run")
    names = [name for names in LAYERS for name in names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_imports_go_down(path: Path) -> None:
    mine = layer(module_name(path))
    above = [name for name in ours(imports(path)) if layer(name) > mine]
    assert above == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that reach one another: Tarjan's strongly connected components of more than one."""
    found: list[list[str]] = []
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        path.append(module)
        for other in sorted(graph[module]):
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in path:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            circle = path[path.index(module) :]
            del path[path.index(module) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for module in graph:
        if module not in number:
            visit(module)
    return found


def test_a_circle_would_be_found() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": set(), "f": {"g"}, "g": {"f"}}
    assert circles(graph) == [["a", "b", "c"], ["f", "g"]]


def test_no_two_modules_import_each_other() -> None:
    """Nor in a larger circle; in functions and for annotations neither. What two files need to know of each other is a
    Protocol in the lower one (RunControl's Cpu, the IDE's DriveSide), or belongs into one file.
    """
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        names = python_imports(path, typing_too=True) if path.suffix == ".py" else imports(path)
        graph.setdefault(module_name(path), set()).update(ours(names) - {module_name(path)})
    graph = {module: {name for name in names if name in graph} for module, names in graph.items()}
    assert sum(map(len, graph.values())) > 500
    assert circles(graph) == []


DEVICES = sorted((PACKAGE / "devices").rglob("*.py"))


@pytest.mark.parametrize("path", DEVICES, ids=ids(DEVICES))
def test_devices_know_no_kvm_no_address_and_no_thread(path: Path) -> None:
    names = python_imports(path, typing_too=True)
    allowed = tuple(f"pyvmm.{name}" for name in DEVICES_MAY)
    assert [n for n in ours(names) if not n.startswith(allowed)] == []
    assert (
        names & {"threading", "_thread", "concurrent.futures", "multiprocessing", "fcntl", "ctypes"} == set()
    )
    assert taken_from(path, "pyvmm.light") <= {"deque"}  # the rest of it is threads and their locks


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_only_kvm_knows_ioctl_but_for_kvm_run(path: Path) -> None:
    if path.is_relative_to(PACKAGE / "kvm"):
        return
    calls = re.findall(r"\bioctl\s*\(([^)]*)\)", code(path))
    if path in (PACKAGE / "net" / "tap.py", PACKAGE / "write_log.pyx", PACKAGE / "page_server.pyx"):
        return  # tun's own, by fcntl; userfaultfd's and the page map's
    if path == PACKAGE / "cpu_exec.pyx":
        assert calls
        assert all(call == "self.fd, uapi.KVM_RUN, 0" for call in calls)
    else:
        assert calls == []
        assert "fcntl.ioctl" not in imports(path)


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_only_the_run_loop_reads_the_union_of_kvm_run(path: Path) -> None:
    members = "hw|fail_entry|ex|io|debug|mmio|hypercall|tpr_access|internal|system_event|eoi|msr"
    reads = re.findall(rf"\b(?:kvm_)?run\.(?:{members})\b", code(path))
    assert bool(reads) == (path == PACKAGE / "cpu_exec.pyx")


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_nothing_ends_the_process_or_takes_its_signals(path: Path) -> None:
    # But the command, which owns its process.
    if path.is_relative_to(PACKAGE / "cli") or path.name == "__main__.py":
        return
    assert not re.search(r"\b(?:sys\.exit|os\._exit|signal\.signal|raise SystemExit)\b", code(path))


FORBIDDEN = {
    *(
        "typing",
        "typing_extensions",
        "dataclasses",
        "asyncio",
        "logging",
        "argparse",
        "re",
        "pathlib",
        "msgspec",
    ),
    *("contextlib", "json", "subprocess", "traceback", "tempfile", "shutil", "socket", "ctypes", "inspect"),
    *(
        "lzma",
        "zstandard",
        "lz4",
        "tty",
        "termios",
        "pty",
        "iced_x86",
        "multiprocessing",
        "concurrent.futures",
    ),
    *("threading", "enum", "functools", "collections"),  # pyvmm.light has what is needed of them
}
# These are commands of their own, off the way from `pyvmm run` to the guest; and what a client of a running machine
# talks to, imported behind the first vCPU's start: its words are JSON. And configuration files, for who has one.
LATE = {"pyvmm.cli.doctor", "pyvmm.cli.demo", "pyvmm.cli.__main__", "pyvmm.__main__"}
LATE |= {"pyvmm.config_file", "pyvmm.config_places"}
LATE |= {"pyvmm.cli.config_given", "pyvmm.cli.config_print", "pyvmm.cli.config_schema"}
# And who talks to machines that run already.
LATE |= {"pyvmm.cli.attach", "pyvmm.cli.machines", "pyvmm.cli.top"}
LATE |= {"pyvmm.control.metrics", "pyvmm.control.metrics_text", "pyvmm.control.qmp_client"}
LATE |= {"pyvmm.dialog", "pyvmm.pytest_plugin"}  # tools of programs and of tests
LATE |= {"pyvmm.log", "pyvmm.cli.log"}  # Python's log is imported with the first event
LATE |= {name for p in sources(".py") if (name := module_name(p)).startswith("pyvmm.control.qmp.")}


def loaded_by(*modules: str) -> set[str]:
    """What an interpreter without its site packages has loaded when these are imported."""
    # The suffixes of compiled modules carry the version: the same interpreter finds them.
    script = "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules)\n"
    script += "for name in sys.argv[2:]: __import__(name)\n"
    script += "print(*(set(sys.modules) - before))"
    command = [sys.executable, "-I", "-S", "-c", script, str(ROOT), *modules]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_the_diet_would_be_noticed() -> None:
    assert {"logging", "re", "threading", "enum", "functools", "collections"} <= loaded_by("logging") & FORBIDDEN


def test_the_way_to_the_first_instruction_imports_nothing_heavy() -> None:
    loaded = loaded_by("pyvmm.machine", "pyvmm.cli.run")
    assert "pyvmm.cpu_exec" in loaded
    assert loaded & FORBIDDEN == set()


def test_what_is_lazy_is_there_for_whoever_asks() -> None:
    import pyvmm
    from pyvmm.run_state import RunState

    assert pyvmm.RunState is RunState
    assert all(hasattr(pyvmm, name) for name in pyvmm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nobody'"):
        _ = pyvmm.Nobody


@pytest.mark.parametrize(
    "name", sorted({module_name(p) for p in sources(".py", ".pyx")} - LATE), ids=lambda name: str(name)
)
def test_no_module_imports_anything_heavy_at_its_top(name: str) -> None:
    assert loaded_by(name) & FORBIDDEN == set()
