"""blkdebug: a protocol in front of another that fails as a file of rules says (QEMU's name, QEMU's way of writing).

    [inject-error]          the request fails, with errno (a number, or a name; default EIO)
    [inject-short]          no more than bytes (default 512) of the transfer are done; of a write none where bytes is 0
    [inject-stall]          the request is held for milliseconds (default 2000), then goes on
    [set-state]             the state becomes new_state (at first it is 1)

and in each of them, which requests it is for:

    event = "write_aio"     read_aio, write_aio (pwritev), flush_to_disk (flush_to_os), none: any
    iotype = "write"        read, write, write-zeroes, discard, flush
    sector = "100"          those that touch this sector of the image; sectors = "8": this and those after it
    state = "1"             while this is the state; 0: always
    skip = "3"              not the first three of them
    times = "2"             two of them only; once = "on": one
    immediately = "on"      inject-error: at once, on the submitter's thread, not by way of another one

A request meets the first rule of each kind that is for it; [set-state] is looked at last. Ours beside QEMU's: the
sections inject-short and inject-stall, and sectors, skip and times.
"""

from __future__ import annotations

import errno as errnos
from errno import ECANCELED, EIO

from pyvmm.block.coroutine import Waiter
from pyvmm.block.driver import SECTOR_BYTES, ProtocolDriver
from pyvmm.block.iov import IovSlice
from pyvmm.block.thread_pool import ThreadPool
from pyvmm.errors import ConfigError
from pyvmm.light import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.block.coroutine import AioContext
    from pyvmm.block.driver import Iov

SECTIONS = {
    "inject-error": ("errno", "immediately"),
    "inject-short": ("bytes",),
    "inject-stall": ("milliseconds",),
    "set-state": ("new_state",),
}
COMMON = ("event", "iotype", "sector", "sectors", "state", "skip", "times", "once")
EVENTS = {
    "read_aio": "read",
    "preadv": "read",
    "write_aio": "write",
    "pwritev": "write",
    "flush_to_disk": "flush",
    "flush_to_os": "flush",
    "none": "",
}
IO_TYPES = ("read", "write", "write-zeroes", "discard", "flush")
LIMIT_STALLS = 64  # at the same time


class Rule:
    """One section. What it is for, and what it does."""

    __slots__ = (
        *("_left", "_skip", "action", "bytes", "errno", "immediately", "io_type", "milliseconds", "new_state"),
        *("sector", "sectors", "state"),
    )

    def __init__(
        self,
        action: str,
        io_type: str = "",
        *,
        errno: int = EIO,
        bytes: int = SECTOR_BYTES,
        milliseconds: int = 2000,
        new_state: int = 1,
        sector: int = -1,
        sectors: int = 1,
        state: int = 0,
        skip: int = 0,
        times: int = -1,
        immediately: bool = False,
    ) -> None:
        self.action = action
        self.io_type = io_type
        self.errno = errno
        self.bytes = bytes
        self.milliseconds = milliseconds
        self.new_state = new_state
        self.sector = sector
        self.sectors = sectors
        self.state = state
        self.immediately = immediately
        self._skip = skip
        self._left = times

    def takes(self, io_type: str, state: int, offset: int, length: int) -> bool:
        """Whether it is for this request; if so, it is used up by one. The caller holds the lock."""
        if self.io_type not in ("", io_type) or self.state not in (0, state) or not self._left:
            return False
        if self.sector >= 0:
            begin, end = self.sector * SECTOR_BYTES, (self.sector + self.sectors) * SECTOR_BYTES
            if offset >= end or offset + length <= begin:
                return False
        if self._skip:
            self._skip -= 1
            return False
        if self._left > 0:
            self._left -= 1
        return True


class Stall(Waiter):
    """A request that is held; or, with no time given, one that just goes by way of another thread."""

    __slots__ = ("_ended", "milliseconds")

    def __init__(self, milliseconds: int) -> None:
        super().__init__()
        self.milliseconds = milliseconds
        self._ended = Lock()
        self._ended.acquire()

    def hold(self) -> int:
        return -ECANCELED if self._ended.acquire(timeout=self.milliseconds / 1000) else 0

    def cancel(self) -> None:
        if self._ended.locked():
            try:
                self._ended.release()
            except RuntimeError:
                pass  # cancelled twice


class BlkDebug(ProtocolDriver):
    """``rules`` may be changed while nothing is in flight."""

    def __init__(self, file: ProtocolDriver, rules: Iterable[Rule], context: AioContext) -> None:
        self._file = file
        self._context = context
        self.rules = list(rules)
        self.state = 1
        self.size_bytes = file.size_bytes
        self.read_only = file.read_only
        self.alignment = file.alignment
        self._lock = Lock()
        self._pool = ThreadPool(self._hold, LIMIT_STALLS)

    def claim(self) -> None:
        self._file.claim()

    def give_up(self) -> None:
        self._file.give_up()

    def _hold(self, job: object) -> None:
        assert isinstance(job, Stall)
        self._context.complete(job, job.hold())

    def _matching(self, io_type: str, offset: int, length: int) -> dict[str, Rule]:
        found: dict[str, Rule] = {}
        with self._lock:
            state = self.state
            for rule in self.rules:
                if rule.action not in found and rule.takes(io_type, state, offset, length):
                    found[rule.action] = rule
            if "set-state" in found:
                self.state = found["set-state"].new_state
        return found

    async def _co_meddle(self, found: dict[str, Rule]) -> int:
        """Hold it; then 0 to go on, or the error."""
        if "inject-stall" in found:
            stall = Stall(found["inject-stall"].milliseconds)
            self._pool.submit(stall)
            ret = await stall
            if ret:
                return ret
        if "inject-error" in found:
            rule = found["inject-error"]
            if not rule.immediately and "inject-stall" not in found:
                elsewhere = Stall(0)
                self._pool.submit(elsewhere)
                await elsewhere
            return -rule.errno
        return 0

    async def co_preadv(self, offset: int, iov: Iov, length: int) -> int:
        found = self._matching("read", offset, length)
        if found:
            ret = await self._co_meddle(found)
            if ret:
                return ret
            if "inject-short" in found:
                count = max(1, min(length, found["inject-short"].bytes))
                with IovSlice(iov, 0, count) as part:
                    return await self._file.co_preadv(offset, part, count)
        return await self._file.co_preadv(offset, iov, length)

    async def co_pwritev(self, offset: int, iov: Iov, length: int, fua: bool) -> int:
        found = self._matching("write", offset, length)
        if found:
            ret = await self._co_meddle(found)
            if ret:
                return ret
            if "inject-short" in found:
                count = min(length, found["inject-short"].bytes)
                if not count:
                    return 0
                with IovSlice(iov, 0, count) as part:
                    return await self._file.co_pwritev(offset, part, count, fua)
        return await self._file.co_pwritev(offset, iov, length, fua)

    async def co_flush(self) -> int:
        found = self._matching("flush", 0, 0)
        if found:
            ret = await self._co_meddle(found)
            if ret:
                return ret
        return await self._file.co_flush()

    async def co_pdiscard(self, offset: int, length: int) -> int:
        found = self._matching("discard", offset, length)
        if found:
            ret = await self._co_meddle(found)
            if ret:
                return ret
        return await self._file.co_pdiscard(offset, length)

    async def co_pwrite_zeroes(self, offset: int, length: int, may_unmap: bool, fua: bool) -> int:
        found = self._matching("write-zeroes", offset, length)
        if found:
            ret = await self._co_meddle(found)
            if ret:
                return ret
        return await self._file.co_pwrite_zeroes(offset, length, may_unmap, fua)

    def measure(self, least_bytes: int = 0) -> None:
        self._file.measure(least_bytes)
        self.size_bytes = self._file.size_bytes

    def shorten(self, most_bytes: int) -> None:
        self._file.shorten(most_bytes)
        self.size_bytes = self._file.size_bytes

    def may_grow_to(self, end: int) -> bool:
        return self._file.may_grow_to(end)

    def peek(self, offset: int, length: int) -> bytes:
        return self._file.peek(offset, length)

    def ending(self) -> None:
        self._file.ending()

    def close(self) -> None:
        self._pool.close()
        self._file.close()

    def abandon(self) -> None:
        self._file.abandon()


def read_rules(path: str) -> list[Rule]:
    """The rules in a file; none where ``path`` is empty. ConfigError for what is wrong, with the line."""
    if not path:
        return []
    try:
        with open(path) as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the rules {path} of blkdebug can't be read: {exc}") from exc
    try:
        return parse_rules(text)
    except ConfigError as exc:
        raise ConfigError(f"the rules {path} of blkdebug, {exc}") from None


def parse_rules(text: str) -> list[Rule]:
    """ConfigError names the line."""
    rules = []
    section = ""
    values: dict[str, str] = {}
    number = begin = 0
    for number, raw_line in enumerate([*text.splitlines(), "[end]"], 1):
        line = raw_line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            if section:
                rules.append(make_rule(section, values, begin))
            section, values, begin = line[1:-1].strip(), {}, number
            if section not in SECTIONS and number <= len(text.splitlines()):
                raise ConfigError(f"line {number}: there is no section [{section}]: use {', '.join(SECTIONS)}")
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not section:
            raise ConfigError(f"line {number}: {line!r} is neither [SECTION] nor KEY = VALUE in one")
        if key not in (*COMMON, *SECTIONS[section]):
            raise ConfigError(f"line {number}: [{section}] has no {key!r}")
        values[key] = value.strip('"')
    return rules


def make_rule(section: str, values: dict[str, str], line: int) -> Rule:
    def number(key: str, default: int) -> int:
        try:
            return int(values.get(key, default))
        except ValueError:
            raise ConfigError(f"line {line}: {key}={values[key]!r} in [{section}] is no number") from None

    event, io_type = values.get("event", "none"), values.get("iotype", "")
    if event not in EVENTS:
        raise ConfigError(f"line {line}: event={event!r} in [{section}]: use {', '.join(EVENTS)}")
    if io_type and io_type not in IO_TYPES:
        raise ConfigError(f"line {line}: iotype={io_type!r} in [{section}]: use {', '.join(IO_TYPES)}")
    errno = values.get("errno", "EIO")
    for key in ("once", "immediately"):
        if values.get(key, "off") not in ("on", "off"):
            raise ConfigError(f"line {line}: {key}={values[key]!r} in [{section}]: use on or off")
    return Rule(
        section,
        io_type or EVENTS[event],
        errno=getattr(errnos, errno, 0) or number("errno", EIO),
        bytes=number("bytes", SECTOR_BYTES),
        milliseconds=number("milliseconds", 2000),
        new_state=number("new_state", 1),
        sector=number("sector", -1),
        sectors=number("sectors", 1),
        state=number("state", 0),
        skip=number("skip", 0),
        times=1 if values.get("once") == "on" else number("times", -1),
        immediately=values.get("immediately") == "on",
    )
