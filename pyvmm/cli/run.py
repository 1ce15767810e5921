"""``pyvmm run``: one guest, its serial console on the terminal, its end as the exit status."""

from __future__ import annotations

import gc
import posix

from pyvmm.cli.options import Option, from_rows, parse, usage
from pyvmm.cli.say import STATUS_INTERRUPTED, STATUS_TIMEOUT, say
from pyvmm.cli.signals import Signals
from pyvmm.config import DRIVES, MachineConfig, read_file
from pyvmm.errors import ConfigError, GuestError, HostError, StateError, remedy
from pyvmm.light import SIGNAL_CHECK_S
from pyvmm.machine import STATUS_IO_ERROR, Machine
from pyvmm.run_control import ENDED
from pyvmm.run_state import RunState

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence
    from types import FrameType
    from typing import Any

    from pyvmm.block.options import DriveOptions
    from pyvmm.cli.text_watch import TextWatch
else:
    import _signal as signal


# What only a command has, beside the options of a machine.
CDROM = Option("--cdrom", "FILE", "a CD image, on the second channel", file="")
SNAPSHOT = Option(
    "--snapshot", "", "what the guest writes to its disks goes to temporary files; the images stay as they are", file=""
)


def gdb_place(text: str) -> str | int:
    """A port of the loopback, or a path; also as QEMU's -gdb has them: tcp::1234, unix:PATH."""
    scheme, colon, rest = text.partition(":")
    if colon and scheme in ("", "tcp"):
        host, _, port = rest.rpartition(":")
        if host not in ("", "localhost", "127.0.0.1"):
            raise ValueError(text)
        return int(port.partition(",")[0])
    if text.isdecimal():
        return int(text)
    path = rest.partition(",")[0] if scheme == "unix" and colon else text
    if not path:
        raise ValueError(text)
    if path.isdecimal() or path.startswith(("unix:", "tcp:", ":")):
        return f"./{path}"  # alone, as machine.toml has it, it would be a port, say
    return path


def log_option(text: str) -> str:
    from pyvmm.cli.log import parts

    parts(text)
    return text


OPTIONS = (
    *from_rows(MachineConfig),
    CDROM,
    SNAPSHOT,
    Option(
        "--cloud-init",
        "user=NAME[,ssh-key=KEY|FILE][,password=WORD][,hostname=NAME]",
        "a cloud image's user, by a read-only drive with a seed for cloud-init (NoCloud); needs the extra cloud",
        file="",
    ),
    Option(
        "--config", "FILE", "options from a TOML or JSON file (docs/configuration.md), as by an argument NAME.toml;"
        " those given here win", file="",
    ),
    Option("--print-config", "", "print the configuration file of this command line, and do no more", file=""),
    Option(
        "--restore",
        "FILE[,check=on][,eager=on|,userfaultfd=on][,prefetch=on][,clock=now]",
        "go on from a snapshot: compare its memory with the checksums, read all of it, or what is touched, into memory"
        " of its own, read what was in use beside the guest, set the guest's clocks forward; other options take the"
        " place of what it has",
        file="",
    ),
    Option(
        *("--qmp", "PATH", "let clients drive and watch the machine by QMP, at a Unix socket that is made there"),
        many=True, words=True,
    ),
    Option(
        "--incoming",
        "ADDRESS",
        "wait for a machine that another pyvmm migrates to a Unix socket's path or tcp:HOST:PORT, and go on with it;"
        " other options as with --restore",
        file="",
    ),
    Option(
        "--gdb", "PATH|PORT", "let gdb connect: at a Unix socket, or a port of the loopback (0: any)", gdb_place,
        file="integer string",
    ),
    Option(
        "--metrics", "[ADDRESS:]PORT|unix:PATH", "let Prometheus read what the machine counts, at /metrics there; a"
        " port alone is the loopback's", file="integer string",
    ),
    Option("--wait-gdb", "", "with --gdb: the guest begins when gdb says so"),
    Option("--timeout", "SECONDS", "stop a guest that runs longer; status 124", float, file="number"),
    Option("--trace", "FILE", "write what it does into FILE: exits, requests, interrupts; `pyvmm trace FILE` reads it"),
    Option(
        "--log",
        "LEVEL[,file=PATH]",
        "what happens to it, a JSON object a line, on standard error or at a file's end; debug, info, warning or error",
        log_option,
        file="string",
    ),
    Option("--exit-stats", "", "at the end, what each kind of exit cost, on standard error"),
    Option("--help -h", "", "this; of one option: --help drive, or --drive help", file=""),
)

HOST = "host"  # in a kernel's place
CDROM_INDEX = 2  # master of the second channel, as QEMU's -cdrom

TITLE = """\
usage: pyvmm run [OPTIONS] [MACHINE.TOML] [DISK.IMG ...]

Runs one guest: from disk images by firmware, or a kernel (host: this host's own), or a flat binary. On a terminal
Ctrl-A x quits and Ctrl-A h tells the other keys. Exit status: 0 guest power-off or Ctrl-A x, odd (value << 1) | 1 by
isa-debug-exit, 2 wrong use or host error, 4 KVM internal error or unhandled exit, 6 reset with --no-reboot, 8 a device
raised, 124 --timeout. A guest that a drive's error has stopped (werror, rerror) goes on at SIGCONT."""


def run(args: list[str]) -> int:
    if not args:
        from pyvmm.cli.first_guest import no_guest

        raise ConfigError(no_guest())
    given = parse(OPTIONS, args, verb="run", words="images")
    if "help" in given:
        print(help_text(given["help"], TITLE, OPTIONS), end="")
        return 0
    if given.get("kernel") == HOST:
        take_host_kernel(given)
    others = [name for name in ("print_config", "restore", "incoming") if name in given]
    if "cloud_init" in given and others:
        other = others[0].replace("_", "-")
        raise ConfigError(f"--cloud-init makes a drive for this one run: leave it or --{other} out")
    if "config" in given or any(path.endswith(".toml") for path in given.get("images", ())):
        from pyvmm.cli.config_given import with_file

        with_file(given, OPTIONS)
    if given.pop("print_config", False):
        print_config(given)
        return 0
    timeout_s = given.pop("timeout", None)
    exit_stats = given.pop("exit_stats", False)
    sockets, metrics, trace = given.pop("qmp", ()), given.pop("metrics", None), given.pop("trace", None)
    log = given.pop("log", None)
    snapshot, incoming = given.pop("restore", None), given.pop("incoming", None)
    if snapshot is not None and incoming is not None:
        raise ConfigError("--restore beside --incoming: a machine comes from one of them, leave the other out")
    gdb, wait_gdb = given.pop("gdb", None), given.pop("wait_gdb", False)
    if wait_gdb and gdb is None:
        raise ConfigError("--wait-gdb waits for gdb: give --gdb PATH or PORT too")
    config = configure(given) if snapshot is None and incoming is None else None
    with Signals() as signals, made(config, snapshot, incoming, given) as machine:
        signals.terminal = machine.terminal
        end_log = begin_log(machine, log)
        announce(machine)
        if gdb is not None:
            say(f"pyvmm: gdb: target remote {serve_gdb(machine, gdb, wait_gdb)}")
        for path in sockets:  # from here on a client may end the machine, at any moment
            machine.serve_qmp(path, at_once=wait_gdb)  # else it waits for nothing: the guest comes first
        if machine.config.name is not None:
            machine.register()
        if metrics is not None:
            machine.serve_metrics(metrics, at_once=False)
        if trace is not None:
            machine.start_trace(trace)
        gc.freeze()  # the collector's first pass would look through all that has been made, for nothing
        gc.enable()
        attended = bool(sockets) or machine.config.name is not None
        try:
            return go(machine, timeout_s, exit_stats, attended=attended, trace=trace)
        finally:
            end_log()


def begin_log(machine: Machine, option: str | None) -> Callable[[], None]:
    """What to call at the end."""
    if option is None:
        return lambda: None
    from pyvmm.cli.log import begin

    return begin(option, machine)


def take_host_kernel(given: dict[str, Any]) -> None:
    """--kernel host: with its initial RAM disk and a console, where none are given."""
    from pyvmm.cli.first_guest import host_kernel

    given["kernel"], initrd = host_kernel()
    if initrd is not None:
        given.setdefault("initrd", initrd)
    given.setdefault("append", "console=ttyS0")


def serve_gdb(machine: Machine, place: str | int, wait: bool) -> str:
    """What to tell gdb."""
    where = machine.serve_gdb(place, wait=wait).where
    return f":{where}" if isinstance(where, int) else where


def help_text(topic: str | bool, title: str, options: Sequence[Option]) -> str:
    """All options, or one of them."""
    if isinstance(topic, bool):
        return usage(title, options)
    from pyvmm.cli.topics import topic_text

    return topic_text(topic, options)


def print_config(given: dict[str, Any]) -> None:
    """The configuration file of a command line, which is checked as a run would. ConfigError."""
    from pyvmm.cli.config_print import config_text

    for option in ("restore", "incoming"):
        if option in given:
            raise ConfigError(f"--print-config beside --{option}: that says what the machine is made of, leave one out")
    command = {option.key: given.pop(option.key) for option in OPTIONS if option.file and option.key in given}
    configure(dict(given))
    join_drives(given)
    join_boot_words(given)
    print(config_text(given, command), end="")


def configure(given: dict[str, Any]) -> MachineConfig:
    join_drives(given)
    if not (given["drives"] or any(name in given for name in ("kernel", "flat", "firmware"))):
        raise ConfigError("no guest: give a disk image, --kernel FILE or --flat FILE (or see `pyvmm demo`)")
    if "cloud_init" in given:
        from pyvmm.cli.cloud_init import seed_drive

        given["drives"] = [*given["drives"], seed_drive(given.pop("cloud_init"))]
    join_boot_words(given)
    if "fw_cfg" in given:
        given["fw_cfg"] = {name: read_file(path) for name, path in given["fw_cfg"]}
    given.setdefault("serial", "none" if has_console(given) else "stdio")
    return MachineConfig(raw_terminal=True, **given)


def has_console(given: dict[str, Any]) -> bool:
    """Whether a virtio console has the terminal: then the serial port has it only where that is said."""
    if "consoles" not in given:
        return False
    from pyvmm.console_options import on_terminal

    return on_terminal(given["consoles"])


def made(config: MachineConfig | None, snapshot: str | None, incoming: str | None, given: dict[str, Any]) -> Machine:
    if config is not None:
        return Machine(config)
    from pyvmm.cli.restored import arrived, restored

    join_drives(given)
    if not given["drives"]:
        del given["drives"]
    join_boot_words(given)
    if incoming is None:
        return restored(str(snapshot), given)
    given.setdefault("serial", "none" if has_console(given) else "stdio")
    return arrived(incoming, given)


def join_drives(given: dict[str, Any]) -> None:
    """--drive, --cdrom and what is given by a path alone are the drives, --snapshot is for each of them."""
    drives = [*given.get("drives", ()), *images(given.pop("images", ()), given.pop("cdrom", None))]
    if given.pop("snapshot", False):
        drives = [drive.changed(snapshot=True) for drive in DRIVES.take("drives", drives)]
    given["drives"] = drives


def join_boot_words(given: dict[str, Any]) -> None:
    """Several --boot are one, whose later words win."""
    if isinstance(given.get("boot"), list):
        given["boot"] = ",".join(given["boot"])


def images(paths: Sequence[str], cdrom: str | None) -> list[DriveOptions]:
    """The drives that are given by a path alone."""
    if not paths and cdrom is None:
        return []
    from pyvmm.block.options import DriveOptions

    drives = [DriveOptions(path) for path in paths]
    if cdrom is not None:
        drives.append(DriveOptions(cdrom, media="cdrom", index=CDROM_INDEX))
    return drives


def announce(machine: Machine) -> None:
    """Where a console went that has no fixed place."""
    from pyvmm.chardev import PtyChardev

    for made in machine.chardevs:
        if isinstance(made, PtyChardev):
            say(f"pyvmm: console on {made.path}")


def tell_of_resets(machine: Machine) -> None:
    """A line on standard error at the third reset within a second: from outside such a guest looks alive."""

    def tell(sentence: str) -> None:
        from pyvmm.kvm.kind import kvm_kind

        hint = "--no-reboot ends it at the first"
        if "triple fault" in machine.resets.why and "software" in kvm_kind():
            hint += "; software KVM lacks parts of a processor, 32-bit paging for one (pyvmm doctor)"
        say(f"pyvmm: {sentence}; {hint}")

    machine.resets.on_often = tell


def go(
    machine: Machine, timeout_s: float | None, exit_stats: bool, *, attended: bool = False, trace: str | None = None
) -> int:
    """``attended``: somebody may pause it from outside, and have it go on. ``trace`` is being written."""
    message = ""
    tell_of_resets(machine)
    watches = watch_text_memory(machine)
    try:
        status = run_attended(machine, timeout_s) if attended else run_through_errors(machine, timeout_s)
    except GuestError as error:
        message = error.dump or str(error)
        status = error.status
    except TimeoutError as error:
        message = f"pyvmm: {error}"
        status = STATUS_TIMEOUT
    except SystemExit as ended:  # by a signal (cli/signals.py)
        status = int(ended.code or 0)
    except KeyboardInterrupt:
        status = STATUS_INTERRUPTED
    machine.events.flush()
    for watch in watches:
        watch.look()
    table = machine.exit_stats_table() if exit_stats else ""
    gaps = [] if trace is None else end_trace(machine, trace)
    # The terminal is given back first: what follows must not be printed in raw mode.
    try:
        machine.close()
    except HostError as error:  # what the guest wrote has not all been written
        gaps.append(f"pyvmm: {error}")
        status = STATUS_IO_ERROR
    for text in (message, *lost_output(machine), *gaps, table):
        if text:
            say(text)
    return status & 0xFF


def end_trace(machine: Machine, path: str) -> list[str]:
    """A sentence where the trace is not whole."""
    try:
        dropped = machine.stop_trace()
    except HostError as error:
        return [f"pyvmm: {error}"]
    except StateError:
        return []  # somebody else has stopped it
    return [f"pyvmm: trace {path}: {dropped} records are missing, they came too fast"] if dropped else []


def watch_text_memory(machine: Machine) -> list[TextWatch]:
    """Have the user told where the guest writes to text memory that nobody sees. The list is empty until it runs."""
    watches: list[TextWatch] = []

    def begin(_event: object) -> None:
        machine.events.forget(begin)
        try:
            from pyvmm.cli.text_watch import TextWatch

            watches.append(TextWatch(machine))
        except (OSError, ImportError, MemoryError):
            return  # no descriptor is left to read it by, or no memory: what the guest needs comes first

    if machine.vga is None:
        machine.events.listen(begin, "resume")
    return watches


def lost_output(machine: Machine) -> list[str]:
    """A sentence for each console whose output the host would not take."""
    from pyvmm.chardev import FdChardev, FileChardev

    sentences = []
    for line in (machine.terminal, *machine.chardevs):
        if isinstance(line, FdChardev) and line.write_error is not None:
            where = line.path if isinstance(line, FileChardev) else "standard output"
            why = remedy(line.write_error, "write elsewhere")
            sentences.append(f"pyvmm: {where}: a part of the guest's output is lost: {why}")
    return sentences


def run_through_errors(machine: Machine, timeout_s: float | None) -> int:
    """machine.run; where a drive's error stops the guest, say so, and go on when told to."""
    from time import monotonic

    end = None if timeout_s is None else monotonic() + timeout_s
    left_s = timeout_s
    while (status := machine.run(left_s)) == STATUS_IO_ERROR:
        mended = wait_for_sigcont(machine, held_up(status.reason), end)
        ended = not mended and machine.control.state is not RunState.IO_ERROR
        if ended and machine.control.status is not None:
            return int(machine.control.status)  # Ctrl-A x, say
        left_s = None if end is None else max(0.0, end - monotonic())
    return int(status)


def run_attended(machine: Machine, timeout_s: float | None) -> int:
    """machine.run for a machine that clients drive: it is over when the guest has ended, whatever holds it up."""
    from time import monotonic

    before = machine.resets.count
    if not machine.control.held and machine.state not in ENDED:
        machine.resume()
    end = None if timeout_s is None else monotonic() + timeout_s
    states = [state for state in RunState if state not in (*ENDED, RunState.IO_ERROR)]
    while True:
        left_s = None if end is None else max(0.0, end - monotonic())
        ended = machine.control.wait(left_s, states)
        if machine.state is RunState.IO_ERROR and wait_for_sigcont(machine, held_up(machine.io_error), end):
            machine.resume()
        elif ended and machine.state in ENDED:
            return int(machine.control.outcome())
        elif end is not None and monotonic() >= end:
            machine.pause()
            often = machine.resets.sentence(before)
            raise TimeoutError(f"the guest was still running after {timeout_s} s" + (often and f": {often}"))


def held_up(why: str) -> str:
    return f"pyvmm: {why}; the guest is stopped: mend it, then `kill -CONT {posix.getpid()}`"


def wait_for_sigcont(machine: Machine, message: str, end: float | None) -> bool:
    """Say so, and whether SIGCONT came, before ``end`` (monotonic, in seconds) and before the machine left io-error."""
    from time import monotonic

    heard = []

    def go_on(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if callable(before):
            before(number, frame)  # it gives us the terminal again

    before = signal.signal(signal.SIGCONT, go_on)
    try:
        say(message)
        while not heard and (end is None or monotonic() < end):
            if machine.control.wait(SIGNAL_CHECK_S, (RunState.IO_ERROR,)):
                break
        return bool(heard)
    finally:
        signal.signal(signal.SIGCONT, before)
