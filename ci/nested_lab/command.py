"""The verbs of ci/lab; its head and docs/lab.md tell what they are for."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from nested_lab import image
from nested_lab.client import STATUS_LAB_FAILED, LabConnection, NoLabError, execute, remove_if_empty
from nested_lab.supervisor import locked, say, stop_on_signal, supervise

UP_POLL_S = 0.05


# ---- labs ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def scratch_directory(asked: str | None) -> Iterator[Path]:
    """The caller's directory, or a fresh one that goes away again if nothing was put into it."""
    if asked is not None:
        path = Path(asked).resolve()
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    path = Path(tempfile.mkdtemp(prefix="scratch-", dir=image.LAB)).resolve()
    try:
        yield path
    finally:
        remove_if_empty(path)


def start(
    directory: Path, options: argparse.Namespace, scratch: Path, owner: int | None, turn: int | None = None
) -> int:
    """A supervisor in a process of its own; returns its pid once the lab is up. Raises NoLabError with what it says.

    ``turn`` is a lock that the supervisor is not to keep.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if turn is not None:
                os.close(turn)
            status = become_supervisor(directory, options, scratch, owner)
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)
    while True:
        try:
            with LabConnection(directory) as lab:
                lab.status()
            return pid
        except NoLabError:
            if os.waitpid(pid, os.WNOHANG)[0]:
                failure = directory / "failure"
                why = failure.read_text().strip() if failure.exists() else f"see {directory / 'supervisor.log'}"
                raise NoLabError(f"no lab: {why}") from None
            time.sleep(UP_POLL_S)


def become_supervisor(directory: Path, options: argparse.Namespace, scratch: Path, owner: int | None) -> int:
    os.setsid()
    lock = locked(directory)
    if lock is None:
        return 0  # somebody was faster
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(directory / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for source, fd in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, fd)
    return supervise(directory, options.cpus, options.memory, scratch, owner)


def stop(directory: Path) -> bool:
    """Ends the lab in `directory`, waited for; False if there is none."""
    lock = locked(directory) if directory.exists() else 0
    if lock is not None:
        return False
    os.kill(int((directory / "pid").read_text()), signal.SIGTERM)
    fd = os.open(directory / "lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.close(fd)
    return True


# ---- verbs -----------------------------------------------------------------------------------------------------------


def up(options: argparse.Namespace) -> int:
    directory: Path = options.at
    directory.mkdir(parents=True, exist_ok=True)
    turn = os.open(directory / "turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)  # of two at once the second finds the lab of the first
        return up_in_turn(directory, options, turn)
    finally:
        os.close(turn)


def up_in_turn(directory: Path, options: argparse.Namespace, turn: int) -> int:
    try:
        with LabConnection(directory) as lab:
            say(f"a lab is up already, at its boot {lab.status()['boot']}")
            return 0
    except NoLabError:
        pass
    scratch = Path(options.scratch or directory / "scratch").resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        start(directory, options, scratch, options.owner, turn)
    except NoLabError as error:
        say(str(error))
        return STATUS_LAB_FAILED
    return 0


def down(options: argparse.Namespace) -> int:
    if not stop(options.at):
        say("no lab is up here")
    return 0


def status(options: argparse.Namespace) -> int:
    try:
        with LabConnection(options.at) as lab:
            for name, value in lab.status().items():
                print(f"{name}: {value}")
    except NoLabError as error:
        say(str(error))
        return 1
    return 0


def exec_verb(options: argparse.Namespace) -> int:
    return execute(options.at, options.command, options.timeout, options.tty)


def run(options: argparse.Namespace) -> int:
    """A lab of its own for one command."""
    on_terminal = options.tty
    with (
        tempfile.TemporaryDirectory(prefix="run-", dir=image.LAB) as name,
        scratch_directory(options.scratch) as scratch,
    ):
        directory = Path(name)
        try:
            pid = start(directory, options, scratch, os.getpid())
        except NoLabError as error:
            say(str(error))
            return STATUS_LAB_FAILED
        try:
            return execute(directory, options.command, options.timeout, on_terminal)
        finally:
            stop(directory)
            os.waitpid(pid, 0)


def shell(options: argparse.Namespace) -> int:
    if not os.isatty(0):
        say("a shell needs a terminal; use ci/lab run")
        return 2
    options.tty, options.timeout = True, None
    options.command = [os.environ.get("SHELL", "/bin/sh")]
    return run(options)


def build(_options: argparse.Namespace) -> int:
    print(image.kernel(), image.initrd(), sep="\n")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ci/lab", description="A complete KVM, nested in QEMU's emulator.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument("--memory", type=int, default=4096, metavar="MIB", help="default: %(default)s")
    machine.add_argument("--cpus", type=int, default=2, metavar="N", help="default: %(default)s")
    machine.add_argument("--scratch", metavar="DIR", help="shared as $LAB_SCRATCH")
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument(
        "--at", type=lambda text: Path(text).resolve(), default=image.LAB / "up", metavar="DIR",
        help="the lab's directory (default: one for this checkout's cache)",
    )  # fmt: skip
    command = argparse.ArgumentParser(add_help=False)
    command.add_argument("--tty", action="store_true", help="on a terminal of its own in the lab")
    command.add_argument("--timeout", type=float, metavar="S", help="ends it then, on the lab's clock (default: never)")
    command.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND...")

    verb = verbs.add_parser("up", parents=[machine, place], help="start a lab that stays")
    verb.add_argument("--with", dest="owner", type=int, metavar="PID", help="end the lab when this process ends")
    verb.set_defaults(call=up)
    verbs.add_parser("exec", parents=[place, command], help="run a command in it").set_defaults(call=exec_verb)
    verbs.add_parser("status", parents=[place], help="what the lab knows of itself").set_defaults(call=status)
    verbs.add_parser("down", parents=[place], help="end it").set_defaults(call=down)
    verbs.add_parser("run", parents=[machine, command], help="a lab for one command").set_defaults(call=run)
    verbs.add_parser("shell", parents=[machine], help="a lab for one interactive shell").set_defaults(call=shell)
    verbs.add_parser("build", help="prepare the kernel and the initial RAM disk").set_defaults(call=build)
    options = parser.parse_args(arguments)
    if hasattr(options, "command"):
        if options.command[:1] == ["--"]:
            del options.command[0]
        if not options.command:
            parser.error("which command?")
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    image.LAB.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop_on_signal)
    call = options.call
    return int(call(options))

