"""The code blocks of README and of the pages in docs/, and how each kind of them runs.

A page is read from top to bottom: its blocks in Python share their names, and all of them share a directory with the
files that pages speak of: a kernel that says a word and powers off, an initrd, a disk's image. What stands in a comment
of the page before a block (``<!-- before``, Python, ``-->``) is run first, and ``title="name"`` makes a file of it.

What can't run here says so where its reader sees it: a command with ``# needs`` or ``# takes`` in its comment, a block
in Python that begins with such a comment. Of these the words are checked: options by the parser of the command and by
the Spec that is made of them, Python by its compiler. So are commands that boot a disk by firmware, of which tests/boot
has real ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from netns import refusal

import pyvmm
from pyvmm.cli.options import parse
from pyvmm.cli.run import OPTIONS, configure
from pyvmm.spec import specify

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("sh", "bash", "shell", "console")
NO_CODE = ("text",)  # pictures, and what a program printed
LIMIT_S = 200 if "PYVMM_LAB" in os.environ else 50
NOT_RUN = re.compile(r"#.*\b(needs|takes)\b")
STATUS = re.compile(r"#.*\bexit status (\d+)")
# What a page calls by its place on a machine that is set up, and where it is in a test.
PLACES = ("/run/", "/home/me/", "/srv/", "/var/lib/vms/")

POWER_OFF_SECTOR = bytes.fromhex("ba0406 b80020 ef f4")  # mov dx, 0x604; mov ax, 0x2000; out dx, ax; hlt
KERNEL = """
    .code32
    .set MAGIC, 0x1BADB002              # Multiboot Specification 0.6.96, 3.1
    .set FLAGS, 0x10003
header:
    .long MAGIC, FLAGS, -(MAGIC + FLAGS), header, header, end, end, entry
    .globl entry
entry:
    mov $text, %esi
1:  lodsb
    test %al, %al
    jz 2f
    mov $0x3f8, %dx
    outb %al, %dx
    jmp 1b
2:  mov $0x604, %dx                     # ACPI: off
    mov $0x2000, %ax
    outw %ax, %dx
3:  hlt
    jmp 3b
text:
    .asciz "guest\\r\\n"
end:
"""


class Block:
    """``line`` is the page's of its first line of text."""

    def __init__(self, page: Path, line: int, info: str, before: str, lines: list[str]) -> None:
        self.page = page
        self.line = line
        self.language, _, rest = info.partition(" ")
        titles = re.search(r'title="([^"]+)"', rest)
        self.title = titles[1] if titles else ""
        self.before = before
        indent = min((len(text) - len(text.lstrip()) for text in lines if text.strip()), default=0)
        self.text = "".join(text[indent:].rstrip() + "\n" for text in lines)

    def __repr__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All of a page, in their order."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    before: list[str] = []
    n = 0
    while n < len(lines):
        text = lines[n]
        n += 1
        if text.startswith("<!-- before"):
            end = next(k for k in range(n, len(lines)) if lines[k] == "-->")
            before, n = lines[n:end], end + 1
        elif fence := re.match(r"^ *(`{3,})(.*)$", text):
            end = next(k for k in range(n, len(lines)) if lines[k].strip() == fence[1])
            text_lines = [text for line in lines[n:end] for text in with_files(line)]
            found.append(Block(page, n + 1, fence[2].strip(), "\n".join(before), text_lines))
            before, n = [], end + 1
    return found


def with_files(line: str) -> list[str]:
    """A line that the site replaces by a file (pymdownx.snippets)."""
    taken = re.match(r'^ *--8<-- "([^":]+)"$', line)
    return (ROOT / taken[1]).read_text().splitlines() if taken else [line]


class Reader:
    """Does what one page says, in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: dict[str, object] = {"__name__": "page", "pyvmm": pyvmm}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.ran: list[str] = []
        self.only_checked: list[str] = []
        sys.path.insert(0, str(directory))
        for place in PLACES:
            (directory / place.strip("/")).mkdir(parents=True)
        (directory / "home/me/src").mkdir()
        (directory / "srv/root").mkdir()
        for name, data in stand_ins(directory).items():
            (directory / name).write_bytes(data)

    def close(self) -> None:
        """Machines of the page are closed, and what it has imported of its own is forgotten."""
        sys.path.remove(str(self.directory))
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "") or "").startswith(str(self.directory)):
                del sys.modules[name]
        for value in self.names.values():
            machines = value if isinstance(value, list) else [value]
            for machine in machines:
                if isinstance(machine, pyvmm.Machine):
                    machine.close()

    def read(self, block: Block) -> None:
        """AssertionError, or whatever the block raises."""
        if block.title:
            path = self.directory / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        if block.before:
            exec(compile(self.placed(block.before), f"{block} (before)", "exec"), self.names)
        if block.language in SHELL:
            self.shell(block)
        elif block.language == "python":
            self.python(block)
        elif block.language in ("gas", "asm"):
            assemble(self.directory / block.title if block.title else block.text, self.directory)
            self.ran.append(repr(block))
        elif block.language == "c":
            compiled = subprocess.run(
                ["gcc", "-x", "c", "-fsyntax-only", "-Wall", "-Werror", "-"],
                input=block.text, text=True, capture_output=True, cwd=self.directory,
            )  # fmt: skip
            assert compiled.returncode == 0, f"{block}: {compiled.stderr}"
            self.ran.append(repr(block))
        elif block.language == "toml":
            tomllib.loads(block.text)
            self.ran.append(repr(block))
        elif block.language == "json":
            json.loads(block.text)
            self.ran.append(repr(block))
        else:
            assert block.language in NO_CODE, f"{block}: no way to run {block.language or 'a block without a language'}"

    def placed(self, text: str) -> str:
        """With the directories that stand for those of the machine."""
        for place in PLACES:
            text = re.sub(rf"(?<![\w/.]){place}", f"{self.directory}{place}", text)
        return re.sub(r"\b8080\b", str(self.port), text)

    # -- Python ----------------------------------------------------------------------------------------------

    def python(self, block: Block) -> None:
        # With the page's own numbers of lines in tracebacks.
        code = compile("\n" * (block.line - 1) + self.placed(block.text), str(block.page), "exec")
        if NOT_RUN.search(block.text.split("\n", 1)[0]) or wants_a_namespace(block.text):
            self.only_checked.append(repr(block))
            return
        with time_limit():
            exec(code, self.names)
        self.ran.append(repr(block))

    # -- the shell -------------------------------------------------------------------------------------------

    def shell(self, block: Block) -> None:
        text = block.text
        if block.language == "console":
            text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
        script = text if "<<" in text else ""
        commands = [script] if script else text.replace("\\\n", " ").splitlines()
        for command in commands:
            if command.strip() and not command.strip().startswith("#"):
                self.command(block, self.placed(command.replace(" run ... ", " run --kernel vmlinuz ")))

    def command(self, block: Block, command: str) -> None:
        if NOT_RUN.search(command):
            check_words(shlex.split(command, comments=True))
            self.only_checked.append(f"{block}: {command}")
            return
        words = [] if "<<" in command else shlex.split(command, comments=True)
        if words[:2] == ["pyvmm", "run"] and boots_firmware(words):
            check_words(words)
            self.only_checked.append(f"{block}: {command}")
            return
        if wants_a_namespace(command):
            check_words(words)
            self.only_checked.append(f"{block}: {command}")
            return
        path = f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}:/usr/sbin:/sbin"
        made = subprocess.run(
            ["bash", "-ec", command], cwd=self.directory, env={**os.environ, "PATH": path, "HOME": str(self.directory)},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip
        wanted = STATUS.search(command)
        assert made.returncode == (int(wanted[1]) if wanted else 0), f"{block}: {command}\n{made.stdout}{made.stderr}"
        self.ran.append(f"{block}: {command}")


def wants_a_namespace(text: str) -> bool:
    """Whether it starts passt or virtiofsd, which want one, and none may be made here: in a chroot, say."""
    return any(word in text for word in ("passt", "--share")) and bool(refusal("unshare", "--user"))


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """TimeoutError in this thread after LIMIT_S: a guest of a page's must come to its end."""

    def ended(number: int, frame: object) -> None:
        raise TimeoutError(f"a block runs for more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def boots_firmware(words: list[str]) -> bool:
    """Whether this `pyvmm run` has firmware look for something to boot, which takes seconds."""
    starts = ("--kernel", "-k", "--flat", "--restore", "--incoming", "--help", "help", "-kernel")
    return not any(word.split("=")[0] in starts or word.endswith(".toml") for word in words)


def check_words(words: list[str]) -> None:
    """The options of a command that is not run."""
    words = [word for word in words if word not in ("sudo", "&")]
    if words[:2] == ["pyvmm", "run"]:
        given = parse(OPTIONS, words[2:], verb="run", words="images")
        for name in ("timeout", "exit_stats", "qmp", "gdb", "wait_gdb", "metrics", "restore", "incoming"):
            given.pop(name, None)
        if any(name in given for name in ("kernel", "flat", "images", "drives", "cdrom")):
            specify(configure(given), {})
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for word in words[2:]:
            if extra := re.search(r"\[(.+)\]", word):
                assert set(extra[1].split(",")) <= set(project["optional-dependencies"]), word
            wheel = re.match(r"pyvmm_kvm-.*\.whl$", word)
            assert "pyvmm" not in word or wheel or word.split("[")[0] == project["name"], word
    elif words[0].startswith("ci/"):
        assert os.access(ROOT / words[0], os.X_OK), words[0]


def assemble(source: Path | str, directory: Path) -> bytes:
    """What GNU as makes of it, as a flat binary linked at 0x7c00; also as a file beside the source's."""
    path = source if isinstance(source, Path) else directory / "block.S"
    if isinstance(source, str):
        path.write_text(source)
    obj, flat = path.with_suffix(".o"), path.with_suffix(".bin")
    for command in (
        ["as", "--64", "-o", obj, path],
        ["ld", "-m", "elf_x86_64", "--oformat", "binary", "-N", "-e", "0", "-Ttext", "0x7c00", "-o", flat, obj],
    ):
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
    return flat.read_bytes()


def stand_ins(directory: Path) -> dict[str, bytes]:
    """The files that pages speak of."""
    source, obj, kernel = (directory / name for name in ("kernel.S", "kernel.o", "vmlinuz"))
    source.write_text(KERNEL)
    subprocess.run(["as", "--32", "-o", obj, source], check=True)
    options = ["-m", "elf_i386", "-N", "--no-warn-rwx-segments", "-e", "entry", "-Ttext", "0x100000"]
    subprocess.run(["ld", *options, "-o", kernel, obj], check=True)
    for path in (source, obj):
        path.unlink()
    disk = POWER_OFF_SECTOR.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20)
    names = ("disk.img", "a.img", "b.img", "install.iso", "debian.img")
    return {"vmlinux": kernel.read_bytes(), "initrd.gz": bytes(4096), **dict.fromkeys(names, disk)}
