"""``--log LEVEL[,file=PATH]``: what happens to the machine, one JSON object a line.

    {"time":"2026-11-30T09:20:01.123456Z","level":"info","event":"reset","pid":7,"machine":"","message":"...",...}

``time`` is UTC, ``message`` a sentence for people, the rest is for programs: what belongs to the event by name. It is
JSON because every collector of logs reads that, and values may have spaces and quotes in them. A line is one write to a
file that is appended to, so several machines may share one. ``logging`` is imported with the first event, on the event
loop's thread, when the guest runs already.
"""

from __future__ import annotations

import posix
import sys
from errno import EINVAL, ENOSPC, EROFS

from pyvmm.cli.say import say
from pyvmm.errors import ConfigError, remedy
from pyvmm.events import LEVELS

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

    from pyvmm.events import Event
    from pyvmm.machine import Machine

NAMES = {"debug": 10, "info": 20, "warning": 30, "error": 40}  # as logging numbers them


def parts(text: str) -> tuple[int, str]:
    """Level, and path or "". ValueError for words that mean nothing."""
    level, comma, rest = text.partition(",")
    word, _, path = rest.partition("=")
    if level not in NAMES or (comma and (word != "file" or not path)):
        raise ValueError(text)
    return NAMES[level], path


def begin(option: str, machine: Machine) -> Callable[[], None]:
    """Log from now on. What to call at the end. ConfigError for a file that can't be written."""
    wanted, path = parts(option)
    fd = 2
    if path:
        try:
            flags = posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND | posix.O_CLOEXEC | posix.O_NOCTTY
            fd = posix.open(path, flags, 0o666)
        except OSError as error:
            why = remedy(error, "give a file that can be written")
            raise ConfigError(f"--log {path}: {why}") from None
        except ValueError:
            raise ConfigError(f"--log {path!r}: no file has such a name: give another path") from None
        from pyvmm.block.protocols.locking import is_image

        if is_image(fd):
            posix.close(fd)
            raise ConfigError(f"--log {path}: it is the image of a drive: give another file")
    taken: list[logging.Handler] = []
    lost = Lost()

    def first(_event: Event) -> None:
        """Set up before the event itself is told: Events tells the log last."""
        machine.events.forget(first)
        taken.append(set_up(fd, wanted, lost))

    def end() -> None:
        machine.events.forget(first)
        if taken:
            sys.modules["pyvmm.log"].LOGGER.removeHandler(taken.pop())
        if fd != 2:
            lost.end(fd)
            if lost.lines:
                say(f"pyvmm: --log {path}: {lost.sentence}")

    machine.events.listen(first, *(name for name, level in LEVELS.items() if level >= wanted))
    return end


class Lost:
    """What could not be written of a log, for whoever reads it: how many ``lines``, and the first reason."""

    def __init__(self) -> None:
        self.lines = 0
        self.why = ""

    @property
    def sentence(self) -> str:
        return f"{self.lines} lines are missing, {self.why}"

    def add(self, error: OSError) -> None:
        self.lines += 1
        self.why = self.why or remedy(error, "log to another file")

    def end(self, fd: int) -> None:
        """Close it. Some file systems tell only now that there is no room."""
        try:
            posix.fsync(fd)
        except OSError as error:
            if error.errno not in (EINVAL, EROFS):  # a pipe, a terminal
                self.add(error)
        try:
            posix.close(fd)
        except OSError as error:
            self.add(error)


def set_up(fd: int, level: int, lost: Lost) -> logging.Handler:
    """Give the logger of this process a handler, which writes to ``fd``."""
    import logging
    from json import dumps
    from time import gmtime, strftime

    from pyvmm.log import LOGGER

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            data = getattr(record, "data", {})
            seconds, microseconds = divmod(round(record.created * 1e6), 1_000_000)
            line = {
                "time": f"{strftime('%Y-%m-%dT%H:%M:%S', gmtime(seconds))}.{microseconds:06}Z",
                "level": record.levelname.lower(),
                "event": getattr(record, "event", "log"),
                "pid": record.process,
                "machine": getattr(record, "machine", ""),
                "message": record.getMessage(),
            }
            text = dumps({**data, **line} if data.keys() & line.keys() else {**line, **data}, default=str)
            line_bytes = text.encode("utf-8", "replace") + b"\n"
            try:
                if posix.write(fd, line_bytes) < len(line_bytes):
                    raise OSError(ENOSPC, posix.strerror(ENOSPC))
            except OSError as error:  # a full disk, a pipe without a reader: the guest runs on
                lost.add(error)

    handler = Lines()
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    LOGGER.propagate = False
    return handler
