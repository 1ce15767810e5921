"""Dialog: a program's end of a guest's serial line: type, wait for what comes, run commands in a shell there.

    line = Dialog()
    with pyvmm.Machine(kernel="vmlinuz", initrd="initrd.gz", append="console=ttyS0", serial=line.chardev) as m:
        line.machine = m
        m.resume()
        line.expect(r"# $", timeout_s=60)
        status, text = line.run("uname -r")
"""

from __future__ import annotations

import codecs
import re
from secrets import token_hex
from shlex import quote
from time import monotonic

from pyvmm.chardev import CallableChardev
from pyvmm.errors import ConfigError
from pyvmm.light import Condition, Lock
from pyvmm.run_control import ENDED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine import Machine

LIMIT_S = 60.0
LOOK_S = 0.25  # how often it is looked whether the machine is still there
KEPT_CHARACTERS = 4 << 20  # a guest may print for ever: the oldest half goes when there are more
SHOWN_CHARACTERS = 3000
MOST_NEWS = 4096  # pieces, until they are joined
LONGEST_LINE_BYTES = 4095  # what a terminal of Linux's takes as one line (N_TTY_BUF_SIZE, termios(3))


class Dialog:
    """``chardev`` is for ``Machine(serial=...)`` or a console; ``output`` is what the guest has printed.

    With ``machine`` set, waiting ends when that does. One thread at a time waits.
    """

    def __init__(self) -> None:
        self.chardev = CallableChardev(self._hear)
        self.machine: Machine | None = None
        self._text = ""
        self._news: list[str] = []  # what has come since: a guest prints it a character at a time
        self.match: re.Match[str] | None = None
        """What ``expect`` found last."""
        self._seen = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._lock = Lock()
        self._changed = Condition(self._lock)

    @property
    def output(self) -> str:
        with self._lock:
            return self._heard()

    def send(self, text: str) -> None:
        """Type ``text``, as it is: a line ends with ``\\n``."""
        self.chardev.feed(text.encode())

    def expect(self, pattern: str | re.Pattern[str], timeout_s: float = LIMIT_S) -> str:
        """Wait until ``pattern``, a regular expression, comes after what was expected last: the text before it.

        AssertionError, with the end of the output, where it has not come in that time, or the machine ends without it.
        ``$`` is the end of what has come so far.
        """
        wanted = re.compile(pattern)
        end = monotonic() + timeout_s
        with self._lock:
            while True:
                ended = self._ended()  # before the look: what it said last is there by then
                found = wanted.search(self._heard(), self._seen)
                if found is not None:
                    before = self._text[self._seen : found.start()]
                    self.match, self._seen = found, found.end()
                    return before
                left_s = end - monotonic()
                if ended or left_s <= 0:
                    break
                self._changed.wait(min(left_s, LOOK_S))
        why = f"the machine ended ({ended}) without" if ended else f"within {timeout_s:g} s no"
        raise AssertionError(f"{why} {wanted.pattern!r}; the end of the output:\n{self.last_words()}")

    def run(self, command: str, timeout_s: float = LIMIT_S) -> tuple[int, str]:
        """Run ``command`` in the POSIX shell that reads this line, and say (its exit status, what it printed).

        The shell is at its prompt. What it echoes and its prompts are not in the text; what others print meanwhile, as
        the kernel, is. The command runs in this very shell: ``cd`` stays, ``exit`` ends it. ConfigError where a line of
        it is longer than a terminal takes, AssertionError as ``expect``.
        """
        mark = token_hex(4)
        # What is typed comes back as an echo: the marks are in it in two pieces, so it is not taken for them.
        typed = (
            f"printf '\\n%s%s\\n' begin- {mark}; eval {quote(command)}; printf '\\n%s%s:%d:\\n' end- {mark} \"$?\"\n"
        )
        if max(map(len, typed.encode().split(b"\n"))) >= LONGEST_LINE_BYTES:
            raise ConfigError(f"a command of {len(command)} characters is too long for one line: put it into a file")
        self.send(typed)
        end = monotonic() + timeout_s
        self.expect(rf"begin-{mark}\r*\n", timeout_s)
        text = self.expect(rf"\r*\nend-{mark}:(\d+):\r*\n", max(0.0, end - monotonic()))
        assert self.match is not None
        return int(self.match[1]), re.sub(r"\r+\n", "\n", text)

    def last_words(self, characters: int = SHOWN_CHARACTERS) -> str:
        """The end of the output."""
        return self.output[-characters:]

    def _ended(self) -> str:
        """How the machine has ended; "" where it has not."""
        machine = self.machine
        if machine is None or machine.state not in ENDED:
            return ""
        status = machine.status
        return str(machine.error or ("" if status is None else status.reason) or machine.state)

    def _hear(self, data: bytes) -> None:
        with self._lock:
            self._news.append(self._decoder.decode(data))
            if len(self._news) >= MOST_NEWS or len(data) >= MOST_NEWS:
                self._heard()
            self._changed.notify_all()

    def _heard(self) -> str:
        """All of it; the lock is held."""
        if self._news:
            self._text += "".join(self._news)
            self._news.clear()
            if len(self._text) > KEPT_CHARACTERS:
                gone = len(self._text) - KEPT_CHARACTERS // 2
                self._text = self._text[gone:]
                self._seen = max(0, self._seen - gone)
        return self._text
