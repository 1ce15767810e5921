"""``pyvmm top``: what running machines are doing, from the counters that they keep anyway, asked for by QMP.

A Sample is what one machine has counted at a moment; a Look is two of them and what was between. Lines are made of
Looks, by functions that know no socket and no terminal.
"""

from __future__ import annotations

import os
import select
import sys
import time

from pyvmm.cli.machines import duration
from pyvmm.cli.options import Option, parse, usage
from pyvmm.cli.say import STATUS_INTERRUPTED
from pyvmm.cli.signals import Signals
from pyvmm.control.qmp_client import NoAnswer, QmpClient, QmpRefused
from pyvmm.control.registry import Registry
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

TITLE = """\
usage: pyvmm top [OPTIONS] [NAME ...]

What the running machines of this user do, or those that are named: exits a second by reason and by port or page, where
the time goes, threads, drives and network. q leaves."""
OPTIONS = (
    Option("--all", "", "all of them; so it is without a name"),
    Option("--interval", "SECONDS", "between two looks (default 1)", float),
    Option("--once", "", "one look, and no more; for a pipe"),
    Option("--batch", "N", "so many looks one after the other, as lines; for a pipe", int),
    Option("--lines", "N", "so many kinds of exits of each machine (default 10)", int),
    Option("--help -h", "", "this"),
)
COMMANDS = ("query-status", "query-exits", "query-threads", "query-blockstats", "query-netstats")
LIMIT_S = 2.0
LEAST_S = 0.02  # for one to which others have left no time
NS = 1e9
MOST_LINES = 10
COLUMNS, ROWS = 80, 24
# The terminal's other screen and no cursor; back again (xterm's control sequences, DEC private modes 1049 and 25).
BEGIN, END = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, LINE_END, SCREEN_END = "\x1b[H", "\x1b[K\r\n", "\x1b[J"


class Sample:
    """What a machine has told: ``at_s`` when, ``status`` its state, and its counters by name."""

    def __init__(self, at_s: float, answers: Sequence[Any]) -> None:
        status, exits, threads, drives, cards = answers
        self.at_s = at_s
        self.status: str = status["status"]
        self.exits = {
            (row["reason"], row.get("address"), row.get("region", ""), row["direction"]): (row["count"], row["time-ns"])
            for row in exits
        }
        self.threads = {
            row["thread-id"]: (row["name"], row.get("vcpu"), [row[f"{mode}-ns"] for mode in MODES]) for row in threads
        }
        self.drives = {row["device"]: row["stats"] for row in drives}
        self.cards = {row["name"]: row for row in cards}


MODES = ("guest", "user", "system", "wait")


class Look:
    """What has happened from ``before`` to ``now``, a second; a counter that has been set back counts from nothing."""

    def __init__(self, before: Sample, now: Sample) -> None:
        self.status = now.status
        seconds = self.seconds = max(1e-9, now.at_s - before.at_s)
        nothing = (0, 0)
        self.exits = []
        for key, (count, time_ns) in now.exits.items():
            count_before, ns_before = before.exits.get(key, nothing)
            if count < count_before:
                count_before, ns_before = nothing
            if count > count_before:
                done = count - count_before
                self.exits.append((key, done / seconds, (time_ns - ns_before) / seconds, (time_ns - ns_before) / done))
        self.exits.sort(key=lambda row: -row[1])
        self.threads = []
        for number, (name, vcpu, times) in now.threads.items():
            _, _, earlier = before.threads.get(number, ("", None, [0] * len(MODES)))
            shares = [max(0, ns - ns_before) / seconds / NS for ns, ns_before in zip(times, earlier, strict=True)]
            self.threads.append((name, number, vcpu, shares))
        self.threads.sort(key=lambda row: (row[2] is None, row[2] or 0, -sum(row[3][:3])))
        self.drives = {n: rates(before.drives.get(n, {}), row, seconds) for n, row in now.drives.items()}
        self.in_flight = {name: row["in_flight"] for name, row in now.drives.items()}
        self.cards = {n: rates(before.cards.get(n, {}), row, seconds) for n, row in now.cards.items()}


def rates(before: dict[str, Any], now: dict[str, Any], seconds: float) -> dict[str, float]:
    return {name: max(0, value - before.get(name, 0)) / seconds for name, value in now.items() if type(value) is int}


# -- lines -------------------------------------------------------------------------------------------------------------


def lines_of(name: str, uptime_s: int, look: Look, most: int) -> Iterator[str]:
    """Of one machine."""
    total = sum(rate for _, rate, _, _ in look.exits)
    user = sum(ns for _, _, ns, _ in look.exits) / NS
    yield f"{name}: {look.status}, up {duration(uptime_s)}, {total:.0f} exits/s, {user:.1%} of a processor in them"
    by_reason: dict[str, float] = {}
    for (reason, *_), rate, _, _ in look.exits:
        by_reason[reason] = by_reason.get(reason, 0.0) + rate
    if by_reason:
        yield "  " + "  ".join(f"{reason} {rate:.0f}/s" for reason, rate in by_reason.items())
        yield f"  {'EXIT':<16} {'ADDRESS':>10} {'':3} {'PER S':>10} {'MEAN us':>9} {'CPU':>6}  REGION"
    for (reason, address, region, direction), rate, ns, mean_ns in look.exits[:most]:
        where = "" if address is None else f"{address:#x}"
        line = f"  {reason:<16} {where:>10} {direction:3} {rate:>10.0f} {mean_ns / 1e3:>9.2f} {ns / NS:>6.1%}  {region}"
        yield line.rstrip()
    if len(look.exits) > most:
        yield f"  and {len(look.exits) - most} more kinds"
    yield f"  {'THREAD':<20} {'GUEST':>7} {'USER':>7} {'KERNEL':>7} {'STEAL':>7}"
    quiet = 0
    for name_, number, vcpu, shares in look.threads:
        if vcpu is None and sum(shares) < 0.001:
            quiet += 1
            continue
        label = f"vCPU {vcpu}" if vcpu is not None else f"{name_} {number}"
        yield f"  {label:<20} " + " ".join(f"{share:>7.1%}" for share in shares)
    if quiet:
        yield f"  and {quiet} more that do nothing"
    yield from drive_lines(look)
    yield from card_lines(look)


def drive_lines(look: Look) -> Iterator[str]:
    if look.drives:
        yield f"  {'DRIVE':<12} {'READS/S':>9} {'WRITES/S':>9} {'READ':>10} {'WRITTEN':>10} {'MEAN us':>9} {'BUSY':>5}"
    for name, rate in look.drives.items():
        reads, writes = rate["rd_operations"], rate["wr_operations"]
        ns = rate["rd_total_time_ns"] + rate["wr_total_time_ns"]
        mean = ns / (reads + writes) / 1e3 if reads + writes else 0.0
        moved = f"{size(rate['rd_bytes']):>10} {size(rate['wr_bytes']):>10}"
        yield f"  {name:<12} {reads:>9.0f} {writes:>9.0f} {moved} {mean:>9.1f} {look.in_flight[name]:>5}"


def card_lines(look: Look) -> Iterator[str]:
    if look.cards:
        yield f"  {'CARD':<12} {'RECEIVED/S':>11} {'SENT/S':>9} {'RECEIVED':>10} {'SENT':>10} {'LOST/S':>9}"
    for name, rate in look.cards.items():
        lost = rate["rx-dropped"] + rate["tx-dropped"]
        moved = f"{size(rate['rx-bytes']):>10} {size(rate['tx-bytes']):>10}"
        yield f"  {name:<12} {rate['rx-packets']:>11.0f} {rate['tx-packets']:>9.0f} {moved} {lost:>9.0f}"


def size(bytes_a_second: float) -> str:
    """950 B/s, 12.3 MiB/s."""
    value = bytes_a_second
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B/s" if unit == "B" else f"{value:.1f} {unit}/s"
        value /= 1024
    return f"{value:.1f} GiB/s"


# -- machines ----------------------------------------------------------------------------------------------------------


class Machines:
    """Those that are looked at. A look waits LIMIT_S for all of them together: who does not answer by then is left out
    of that one, and asked anew.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._registry = Registry()
        for name in names:
            self._registry.find(name)
        self._clients: dict[str, QmpClient] = {}
        self._before: dict[str, Sample] = {}

    def look(self, most: int) -> list[str]:
        """Lines of all that were there the last time too."""
        lines: list[str] = []
        running = self._registry.names(self._before)
        wanted = [name for name in self._names if name in running] if self._names else running
        asked = [name for name in wanted if self._ask(name)]
        end_s = time.monotonic() + LIMIT_S
        samples = {name: sample for name in asked if (sample := self._answer(name, end_s)) is not None}
        for name in wanted:
            if name not in samples:
                lines += [f"{name}: silent", ""]
            elif name in self._before:
                lines += [*lines_of(name, self._uptime_s(name), Look(self._before[name], samples[name]), most), ""]
        for name in set(self._clients) - set(samples):
            self._drop(name)
        self._before = samples
        return lines or ([] if wanted else ["no machine with a name is running", ""])

    def _ask(self, name: str) -> bool:
        try:
            if name not in self._clients:
                self._clients[name] = QmpClient(self._registry.qmp_path(name), LIMIT_S)
            for command in COMMANDS:
                self._clients[name].send(command)
        except NoAnswer:
            return False
        return True

    def _answer(self, name: str, end_s: float) -> Sample | None:
        client, answers = self._clients[name], []
        try:
            for _ in COMMANDS:
                client.limit_s = max(LEAST_S, end_s - time.monotonic())
                answers.append(client.receive())
            return Sample(time.monotonic(), answers)
        except (NoAnswer, QmpRefused):
            pass
        except (LookupError, TypeError, AttributeError):
            pass  # another version of pyvmm, which tells of something else
        self._drop(name)
        return None

    def _uptime_s(self, name: str) -> int:
        try:
            return max(0, round(time.time() - os.lstat(self._registry.qmp_path(name)).st_mtime))
        except OSError:  # it is ending
            return 0

    def _drop(self, name: str) -> None:
        client = self._clients.pop(name, None)
        if client is not None:
            client.close()

    def close(self) -> None:
        for name in list(self._clients):
            self._drop(name)


# -- the terminal ------------------------------------------------------------------------------------------------------


class LiveScreen:
    """A context: the terminal shows ``show``'s lines and nothing else, and is as before in the end; keys are not
    echoed. For cli/signals.py it is a terminal too: stopped, the process gives it back.
    """

    def __init__(self) -> None:
        self._cooked: list[Any] | None = None

    def __enter__(self) -> LiveScreen:
        self.enter_raw()
        return self

    def __exit__(self, *exc: object) -> None:
        self.leave_raw()

    def enter_raw(self) -> None:
        import termios as t

        self._cooked = t.tcgetattr(0)
        modes = t.tcgetattr(0)
        modes[3] &= ~(t.ECHO | t.ICANON)  # Ctrl-C and Ctrl-Z are what they were
        t.tcsetattr(0, t.TCSANOW, modes)
        self._write(BEGIN)

    def leave_raw(self) -> None:
        import termios as t

        cooked, self._cooked = self._cooked, None
        if cooked is not None:
            self._write(END)
            t.tcsetattr(0, t.TCSANOW, cooked)

    def resized(self) -> None:
        """The next look has the new size."""

    def show(self, lines: Iterable[str]) -> None:
        columns, rows = os.get_terminal_size(1)
        columns, rows = columns or COLUMNS, rows or ROWS  # a serial line has none
        shown = [line[: max(1, columns - 1)] for line in lines][: max(1, rows - 1)]
        self._write(HOME + "".join(plain(line) + LINE_END for line in shown) + SCREEN_END)

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    @staticmethod
    def key(limit_s: float) -> str:
        """The next that is pressed, "" where none is in that time; "q" at the end of the input."""
        if not select.select([0], [], [], limit_s)[0]:
            return ""
        return os.read(0, 1).decode("latin-1") or "q"


def plain(line: str) -> str:
    """A thread's name may hold anything."""
    return "".join(char if char.isprintable() else "?" for char in line)


# -- the command -------------------------------------------------------------------------------------------------------


def top(args: list[str]) -> int:
    names, options = split_names(args)
    given = parse(OPTIONS, options, verb="top")
    if "help" in given:
        print(usage(TITLE, OPTIONS), end="")
        return 0
    if names and given.get("all"):
        raise ConfigError("--all beside names: leave one of them out")
    interval_s, most, looks = given.get("interval", 1.0), given.get("lines", MOST_LINES), given.get("batch")
    if not 0.05 <= interval_s <= 3600 or most < 0 or (looks is not None and looks < 1):
        raise ConfigError("top: give an interval from 0.05 to 3600 seconds, 1 look or more, and 0 lines or more")
    if given.get("once"):
        looks = 1
    machines = Machines(names)
    try:
        machines.look(most)  # what there is to begin with
        if looks is not None or not (os.isatty(0) and os.isatty(1)):
            return batch(machines, looks, interval_s, most)
        return live(machines, interval_s, most)
    except SystemExit as ended:  # by a signal (cli/signals.py)
        return int(ended.code or 0)
    except KeyboardInterrupt:
        return STATUS_INTERRUPTED
    finally:
        machines.close()


def split_names(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names may stand before options and behind them."""
    with_value = {name for option in OPTIONS if option.metavar for name in option.names}
    names: list[str] = []
    options: list[str] = []
    taken = False  # the word before wants this one
    for word in args:
        (options if taken or word.startswith("-") else names).append(word)
        taken = not taken and word in with_value
    return names, options


def batch(machines: Machines, looks: int | None, interval_s: float, most: int) -> int:
    done = 0
    while looks is None or done < looks:
        time.sleep(interval_s)
        print("\n".join(map(plain, machines.look(most))), flush=True)
        done += 1
    return 0


def live(machines: Machines, interval_s: float, most: int) -> int:
    with Signals() as signals, LiveScreen() as screen:
        signals.terminal = screen
        screen.show(["looking ..."])
        end = time.monotonic() + interval_s
        while True:
            key = screen.key(max(0.0, end - time.monotonic()))
            if key in ("q", "Q"):
                return 0
            if not key:
                screen.show(machines.look(most))
                end = time.monotonic() + interval_s
