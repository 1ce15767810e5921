"""What the command says on standard error, and the statuses it ends with."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

# Exit statuses beside the guest's own (README, "Exit status").
STATUS_USAGE = 2
STATUS_TIMEOUT = 124
STATUS_INTERRUPTED = 130
STATUS_BROKEN_PIPE = 141  # as of a program that SIGPIPE ends


def say(text: str) -> None:
    """A line on standard error, if anybody takes it: what went wrong must not fail for want of a place to say it."""
    if sys.stderr is None:
        return  # print would take standard output
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        give_up(sys.stderr)


def give_up(stream: TextIO | None) -> None:
    """Drop what ``stream`` still holds: at its end the interpreter would try again, and complain."""
    if stream is not None:
        try:
            stream.close()
        except (OSError, ValueError):
            pass
