"""What the site has besides the pages in this folder: the reference, from the one place where each part is written.

Options come from their rows (pyvmm/config.py and its like, and the table in pyvmm/cli/run.py), the Python interface
from docstrings, with the signatures of stubs where a class is compiled.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pyvmm  # noqa: E402
from pyvmm.options import Options  # noqa: E402


def on_files(files: Files, *, config: Any) -> Files:
    files.append(File.generated(config, "reference/options.md", content=options_page()))
    files.append(File.generated(config, "reference/api.md", content=api_page()))
    files.append(File.generated(config, "examples.md", content=examples_page()))
    return files


# -- options -------------------------------------------------------------------------------------------------------


def options_page() -> str:
    from pyvmm.balloon_options import BalloonOptions
    from pyvmm.block.options import DriveOptions
    from pyvmm.cli.run import OPTIONS
    from pyvmm.config import MachineConfig
    from pyvmm.console_options import ConsoleOptions
    from pyvmm.net.options import NetOptions
    from pyvmm.vhost_user.options import ShareOptions
    from pyvmm.vsock.options import VsockOptions

    rows = {row.cli.split()[0]: row for row in MachineConfig.rows.values() if row.cli}
    text = [
        "# Options\n",
        "`pyvmm run --help` prints the same, and `--help OPTION` what one of them takes. An option of the command is",
        "a keyword argument of `Machine` in Python, by the name in the second column.\n",
        "## `pyvmm run`\n",
        "| option | in Python | what it does |\n|---|---|---|",
    ]
    for option in OPTIONS:
        row = rows.get(option.names[0])
        words = ", ".join(f"`{name}`" for name in option.names)
        metavar = f" `{option.metavar}`" if option.metavar else ""
        more = "; may be repeated" if option.many else ""
        text.append(f"| {words}{cell(metavar)} | {f'`{row.name}`' if row else ''} | {cell(option.help + more)} |")
    only = [row for row in MachineConfig.rows.values() if not row.cli]
    if only:
        text += ["\n## Only in Python\n", "| argument | default | what it does |\n|---|---|---|"]
        text += [f"| `{row.name}` | `{row.default!r}` | {cell(row.help + row.python)} |" for row in only]
    for title, options in (
        ("A drive: `--drive`, `DriveOptions`", DriveOptions),
        ("A network card: `--net`, `NetOptions`", NetOptions),
        ("A console: `--console`, `ConsoleOptions`", ConsoleOptions),
        ("A socket device: `--vsock`, `VsockOptions`", VsockOptions),
        ("A shared folder: `--share`, `ShareOptions`", ShareOptions),
        ("A memory balloon: `--balloon`, `BalloonOptions`", BalloonOptions),
    ):
        text += [f"\n## {title}\n", *words_of(options)]
    return "\n".join(text) + "\n"


def words_of(options: type[Options]) -> list[str]:
    """One table of the words of an option that has some."""
    table = ["| word | in Python | default | what it does |\n|---|---|---|---|"]
    for row in options.rows.values():
        words = ", ".join(f"`{word}`" for word in row.words)
        choices = "; ".join(f"`{choice}`" for choice in row.kind.choices)
        told = f"{choices}: {cell(row.help)}" if choices else cell(row.help)
        default = f"`{row.default!r}`" if row.has_default_to_tell else ""
        table.append(f"| {words} | `{row.name}` | {cell(default)} | {told} |")
    return table


def cell(text: str) -> str:
    """Inside of a table."""
    return re.sub(r"<", "&lt;", text).replace("|", "\\|")


# -- the Python interface ----------------------------------------------------------------------------------------------

ORDER = (
    ("Machines", ("Machine", "RunState", "ExitStatus", "Cpu", "Event", "Events", "Snapshot", "Template")),
    ("Devices", ("Device", "AddressSpace", "MemoryRegion", "LatchRegion", "SinkRegion", "FifoRegion", "EventRegion",
                 "BufferRegion", "IrqLine", "Clock", "Timer", "GuestMemory", "Chardev")),
    ("Options", ("MachineConfig", "MachineOptions", "DriveOptions")),
    ("What exits cost", ("ExitStat",)),
    ("Errors", ("VmmError", "ConfigError", "StateError", "KvmError", "GuestError", "DeviceError", "BusError")),
)  # fmt: skip


def api_page() -> str:
    text = ["# Python\n", "Everything here is `pyvmm.NAME`. `help(pyvmm)` has the vocabulary in one screen.\n"]
    told = set()
    for title, names in ORDER:
        text.append(f"## {title}\n")
        for name in names:
            if name in pyvmm.__all__:
                text += class_text(name, getattr(pyvmm, name))
                told.add(name)
    others = [name for name in pyvmm.__all__ if name not in told]
    if others:
        text.append("## The rest\n")
        for name in others:
            text += class_text(name, getattr(pyvmm, name))
    return "\n".join(text) + "\n"


def class_text(name: str, thing: Any) -> list[str]:
    text = [f"### `{name}` {{ #{name} }}\n", *constructor(thing), docstring(thing), ""]
    if not inspect.isclass(thing) or name in ("MachineConfig", "MachineOptions", "DriveOptions"):
        return text
    signatures = {}
    for base in reversed(ours(thing)):
        signatures.update(stub(base))
    for member in dict.fromkeys(name for base in ours(thing) for name in vars(base)):
        value = inspect.getattr_static(thing, member)
        told = inspect.getdoc(value)
        if member.startswith("_") or not told or not is_ours(value):
            continue
        text += [f"#### `{signature(member, value, signatures)}` {{ #{name}.{member} }}\n", docstring(value), ""]
    return text


def constructor(thing: Any) -> list[str]:
    """How one of a compiled class is made; the docstrings of the others have it, or their users make none."""
    made = stub(thing).get("__init__", "") if inspect.isclass(thing) else ""
    return [f"`{thing.__name__}{made}`\n"] if made else []


def ours(thing: type) -> list[type]:
    """The class, and what of the package it is made of."""
    return [base for base in thing.__mro__ if base.__module__.startswith("pyvmm")]


def is_ours(value: Any) -> bool:
    """A method or a property, and no constant with the docstring of its type."""
    if isinstance(value, (property, classmethod, staticmethod)):
        return True
    return inspect.isroutine(value) or inspect.isgetsetdescriptor(value)


def signature(name: str, value: Any, stubs: dict[str, str]) -> str:
    if isinstance(value, property) or inspect.isgetsetdescriptor(value):
        return name
    if name in stubs:
        return name + stubs[name]
    function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return f"{name}(...)"
    if parameters and not isinstance(value, staticmethod):
        parameters = parameters[1:]
    return f"{name}({', '.join(without_types(p) for p in separated(parameters))})"


def separated(parameters: list[inspect.Parameter]) -> list[inspect.Parameter | str]:
    """With the star before what is given by name only."""
    found: list[inspect.Parameter | str] = []
    named = False  # what comes now is given by name only
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not named:
            found.append("*")
        named = named or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        found.append(p)
    return found


def without_types(parameter: inspect.Parameter | str) -> str:
    if isinstance(parameter, str):
        return parameter
    bare = parameter.replace(annotation=parameter.empty)
    return str(bare)


def stub(thing: Any) -> dict[str, str]:
    """{method: "(arguments)"} by the stub of a compiled class."""
    module = sys.modules.get(thing.__module__)
    path = ROOT / (thing.__module__.replace(".", "/") + ".pyi")
    if module is None or not path.exists():
        return {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == thing.__name__:
            return {f.name: arguments(f.args) for f in node.body if isinstance(f, ast.FunctionDef)}
    return {}


def arguments(args: ast.arguments) -> str:
    for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
        if arg is not None:
            arg.annotation = None
    args.args = args.args[1:] if args.args and args.args[0].arg in ("self", "cls") else args.args
    return f"({ast.unparse(args)})"


def docstring(thing: Any) -> str:
    """In Markdown: what is indented is a block of text as it stands."""
    text = inspect.getdoc(thing) or ""
    found: list[str] = []
    block = False
    for line in text.splitlines():
        indented = line.startswith("    ")
        if indented != block and (indented or line.strip()):
            found.append("```text\n" + line[4:] if indented else "```\n" + line)
            block = indented
        else:
            found.append(line[4:] if block else line.replace("``", "`").replace("<", "&lt;"))
    if block:
        found.append("```")
    return "\n".join(found)


# -- examples ----------------------------------------------------------------------------------------------------------


LANGUAGES = {".py": "python", ".S": "gas", ".c": "c"}


def examples_page() -> str:
    """The files of docs/examples, with what each says of itself."""
    text = [
        "# Examples\n",
        "Each is a file of less than a hundred lines that runs as it is: `python NAME.py`. They are in `docs/examples`",
        "of the source, and tests run each of them.\n",
    ]
    for path in sorted(p for p in (ROOT / "docs" / "examples").iterdir() if p.suffix in LANGUAGES):
        source = path.read_text()
        told = (ast.get_docstring(ast.parse(source)) or "").replace("``", "`") if path.suffix == ".py" else ""
        text += [f"## `{path.name}`\n", told, "", f"```{LANGUAGES[path.suffix]}", source, "```", ""]
    return "\n".join(text)
