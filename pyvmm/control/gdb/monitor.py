"""gdb's ``monitor COMMAND``: what a person asks of the machine itself, in words."""

from __future__ import annotations

from pyvmm.errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.control.gdb.target import Target


def help_text(target: Target, index: int) -> str:
    return "".join(f"{name:8}{text}\n" for name, (text, _) in COMMANDS.items())


def reset(target: Target, index: int) -> str:
    target.reset()
    return "the machine was reset\n"


def nmi(target: Target, index: int) -> str:
    target.nmi(index)
    return f"vCPU {index} has a non-maskable interrupt\n"


COMMANDS: dict[str, tuple[str, Callable[[Target, int], str]]] = {
    "help": ("this", help_text),
    "kvm": ("what of debugging this KVM does", lambda target, index: target.describe() + "\n"),
    "dump": ("registers and code of every vCPU", lambda target, index: target.dump()),
    "nmi": ("send the current vCPU a non-maskable interrupt", nmi),
    "reset": ("back to power-on, stopped at the first instruction", reset),
}


def answer(target: Target, index: int, line: str) -> str:
    """What a command says; ``index`` is the vCPU that the debugger looks at."""
    word = " ".join(line.split())
    known = COMMANDS.get(word or "help")
    if known is None:
        return f"there is no {word[:40]!r}: monitor help tells what there is\n"
    try:
        return known[1](target, index)
    except VmmError as error:
        return f"{error}\n"
