"""The nested lab behind ci/lab: one boot of a machine with a full KVM, for one command.

Outside: QEMU's TCG emulates an AMD processor with SVM and nested paging. Debian's generic kernel boots on it
from its uncompressed image by PVH (half the time of the bzImage, some of whose boots were seen to wedge) and
loads kvm-amd. Inside: the host's / over 9p, read-only, under a tmpfs overlay (writes work and vanish); fresh
/proc, /sys, /dev, /dev/pts, /dev/shm, /run and /tmp (of the host's /tmp only what the checkout, the current
directory or a word of the command lies in); `lo` up, tun loaded; root; the caller's directory and of its
variables PATH, HOME, LANG, TERM, PYVMM_* and those of Python and pytest. PYVMM_LAB=1 tells a program that it
is in the lab. LAB_SCRATCH names a directory shared with the host, under the same path on both sides: what is
written there stays.

The command's standard output and error pass through pipes into files on a second share, which are followed
here: they never mix with the kernel's messages, which go to .cache/lab/console.log. Standard input is empty.

Exit status: the command's own (128 + n if signal n ended it); 124 if the time limit ended it; 125 if the lab
itself failed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import boot_assets  # noqa: E402

LAB = boot_assets.CACHE / "lab"
STATUS_TIMEOUT, STATUS_LAB_FAILED = 124, 125

# A boot prints a line at least every two seconds; on a busy machine it may take a few times that.
BOOT_SILENCE_S = 8.0
BOOT_LIMIT_S = 90.0
# The lab writes a beat every 5 s however busy its processors are.
BEAT_SILENCE_S = 90.0
POLL_S = 0.02

MODULES = ("kvm-amd", "virtio_pci", "9pnet_virtio", "9p", "overlay", "tun")
SHARE = "trans=virtio,version=9p2000.L,msize=512000"
PASSED_VARIABLES = ("HOME", "LANG", "LOGNAME", "PATH", "TERM", "USER", "VIRTUAL_ENV")
PASSED_PREFIXES = ("LC_", "PYVMM_", "PYTEST_", "PYTHON", "HYPOTHESIS_")

# Process 1 of the lab. /lab is the control share: `command`, `settings` and `kept-in-tmp` come in;
# `up`, `beat`, `stdout`, `stderr` and `status` go out.
INIT = f"""\
mkdir -p /lab /host /over /new
mount -t 9p -o {SHARE},cache=none control /lab
mount -t 9p -o {SHARE},ro,cache=loose root /host
mount -t tmpfs tmpfs /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work overlay /new
mount -t proc proc /new/proc
mount -t sysfs sysfs /new/sys
mount -t devtmpfs devtmpfs /new/dev
mkdir -p /new/dev/pts /new/dev/shm /new/dev/net
mount -t devpts -o mode=600,ptmxmode=666 devpts /new/dev/pts
mkdir /over/tmp
mount --bind /new/tmp /over/tmp
for place in /new/dev/shm /new/run /new/tmp; do mount -t tmpfs -o mode=1777 tmpfs $place; done
while IFS= read -r name; do
    if [ -d "/over/tmp/$name" ]; then mkdir "/new/tmp/$name"; else : > "/new/tmp/$name"; fi
    mount --bind "/over/tmp/$name" "/new/tmp/$name"
done < /lab/kept-in-tmp
chmod 666 /dev/kvm
ip link set lo up
hostname lab
. /lab/settings
mkdir -p "/new$LAB_SCRATCH"
mount -t 9p -o {SHARE},cache=mmap scratch "/new$LAB_SCRATCH"
mkdir /new/run/lab
cp /lab/command /new/run/lab/command
echo > /lab/up
( while sleep 5; do date > /lab/beat; done ) &
if [ -n "$LAB_TERMINAL" ]; then
    exec 3<>/dev/ttyS1 # held open: its settings go with the last close
    stty $LAB_TERMINAL <&3
    setsid -c chroot /new /bin/sh /run/lab/command <&3 >&3 2>&3
    status=$?
else
    mkfifo /run/stdout /run/stderr
    cat /run/stdout > /lab/stdout & relays=$!
    cat /run/stderr > /lab/stderr & relays="$relays $!"
    setsid chroot /new /bin/sh /run/lab/command </dev/null >/run/stdout 2>/run/stderr
    status=$?
    # What the command left running may hold the pipes open: give the relays a moment, not for ever.
    ( sleep 2; kill $relays ) 2>/dev/null &
    wait $relays
fi
sync
umount "/new$LAB_SCRATCH"
echo $status > /lab/status.part
mv /lab/status.part /lab/status
sleep 60
poweroff -f
"""


class LabError(Exception):
    """The lab itself failed; `wedged` when the boot stood still and another try is worth it."""

    def __init__(self, message: str, wedged: bool = False) -> None:
        super().__init__(message)
        self.wedged = wedged


def say(text: str) -> None:
    print(f"ci/lab: {text}", file=sys.stderr, flush=True)


def build() -> tuple[Path, Path]:
    """The kernel and the initial RAM disk of the lab, made once for each kernel and version of this file."""
    kernel = boot_assets.kernel("generic")
    sources = Path(__file__).read_bytes() + Path(boot_assets.__file__).read_bytes() + kernel.release.encode()
    initrd = LAB / f"initrd-{hashlib.sha256(sources).hexdigest()[:16]}.cpio"
    if not initrd.exists():
        LAB.mkdir(parents=True, exist_ok=True)
        for old in LAB.glob("initrd-*.cpio"):
            old.unlink(missing_ok=True)
        boot_assets.initrd(INIT, LAB, kernel.modules(*MODULES)).replace(initrd)
    return kernel.vmlinux, initrd


class Lab:
    """One boot of the lab for one command: its directory, its QEMU, and the streams that come out of it."""

    def __init__(self, options: argparse.Namespace, scratch: Path, terminal: bool) -> None:
        self.options = options
        self.scratch = scratch
        self.terminal = terminal
        LAB.mkdir(parents=True, exist_ok=True)
        self.directory = Path(tempfile.mkdtemp(prefix="boot-", dir=LAB))
        self.control = self.directory / "control"
        self.console = self.directory / "console.log"
        self.qemu: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Starts QEMU; returns when the lab is about to run the command."""
        self.control.mkdir()
        self.console.touch()
        (self.control / "command").write_text(self._command_script())
        (self.control / "settings").write_text(self._settings())
        (self.control / "kept-in-tmp").write_text("".join(f"{name}\n" for name in self._kept_in_tmp()))
        for stream in ("stdout", "stderr"):
            (self.control / stream).touch()
        # Its own session, so that a ctrl-C comes to this process alone, which then ends QEMU in order; with a
        # terminal to share, QEMU has to stay in the foreground process group. It never outlives this process.
        self.qemu = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *self._qemu_command()],
            stdin=None if self.terminal else subprocess.DEVNULL,
            stdout=None if self.terminal else sys.stderr,
            start_new_session=not self.terminal,
        )
        started = grown_at = time.monotonic()
        size = 0
        while not (self.control / "up").exists():
            now = time.monotonic()
            self._pause(f"QEMU ended during the boot of the lab, see {LAB / 'console.log'}")
            if self.console.stat().st_size != size:
                size, grown_at = self.console.stat().st_size, now
            if now - grown_at > BOOT_SILENCE_S or now - started > BOOT_LIMIT_S:
                raise LabError(f"the boot stood still {now - started:.0f} s after its start", wedged=True)

    def follow(self) -> int:
        """Copies the command's output here as it comes, and returns its exit status."""
        deadline = time.monotonic() + self.options.timeout if self.options.timeout else float("inf")
        beat_at, beat = time.monotonic(), -1
        with open(self.control / "stdout", "rb", 0) as out, open(self.control / "stderr", "rb", 0) as err:
            while True:
                ended = (self.control / "status").exists()
                for source, sink in ((out, 1), (err, 2)):
                    while data := source.read(1 << 16):
                        _write_all(sink, data)
                if ended:
                    return int((self.control / "status").read_text())
                now = time.monotonic()
                if now > deadline:
                    say(f"time limit: the command was ended after {self.options.timeout:g} s")
                    return STATUS_TIMEOUT
                with contextlib.suppress(FileNotFoundError):
                    modified = (self.control / "beat").stat().st_mtime_ns
                    if modified != beat:
                        beat_at, beat = now, modified
                if now - beat_at > BEAT_SILENCE_S:
                    raise LabError(f"the lab stood still for {BEAT_SILENCE_S:.0f} s while the command ran")
                self._pause(f"the lab ended before the command did, see {LAB / 'console.log'}")

    def close(self) -> None:
        """Ends QEMU if it still runs and removes all but the console log, which becomes the last one."""
        if self.qemu is not None and self.qemu.poll() is None:
            self.qemu.kill()
            self.qemu.wait()
        if self.console.exists():
            self.console.replace(LAB / "console.log")
        shutil.rmtree(self.directory)

    def _pause(self, message: str) -> None:
        """One polling interval; raises LabError with the message if QEMU ends and no status has come out."""
        assert self.qemu is not None
        if self.qemu.poll() is not None and not (self.control / "status").exists():
            raise LabError(message)
        time.sleep(POLL_S)

    def _command_script(self) -> str:
        """The shell text that takes up the caller's directory and variables and becomes the command."""
        passed = {
            name: value
            for name, value in sorted(os.environ.items())
            if name in PASSED_VARIABLES or name.startswith(PASSED_PREFIXES)
        }
        passed |= {"PYVMM_LAB": "1", "LAB_SCRATCH": str(self.scratch)}
        lines = [f"export {name}={shlex.quote(value)}" for name, value in passed.items()]
        lines.append(f"cd {shlex.quote(os.getcwd())} || exit {STATUS_LAB_FAILED}")
        lines.append(f"exec {shlex.join(self.options.command)}")
        return "\n".join(lines) + "\n"

    def _kept_in_tmp(self) -> list[str]:
        """The names right under the host's /tmp that the command needs: a checkout may well be there."""
        venv = os.environ.get("PYVMM_VENV", ROOT)
        needed = [Path.cwd(), ROOT, Path(venv), boot_assets.CACHE, self.scratch]
        needed += [Path(word) for word in self.options.command if word.startswith("/tmp/")]
        found = [path for path in needed if path.is_relative_to("/tmp") and path.exists()]
        return sorted({path.parts[2] for path in found if path != Path("/tmp")})

    def _settings(self) -> str:
        size = os.get_terminal_size() if self.terminal else None
        terminal = f"rows {size.lines} cols {size.columns} sane" if size else ""
        return f"LAB_SCRATCH={shlex.quote(str(self.scratch))}\nLAB_TERMINAL={shlex.quote(terminal)}\n"

    def _qemu_command(self) -> list[str]:
        kernel, initrd = build()
        shares = (
            ("root", "/", ",readonly=on,multidevs=remap"),
            ("control", self.control, ""),
            ("scratch", self.scratch, ""),
        )
        command = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max"]
        command += ["-nodefaults", "-no-reboot", "-display", "none", "-nic", "none"]
        command += ["-smp", str(self.options.cpus), "-m", str(self.options.memory)]
        command += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", "console=ttyS0 panic=-1"]
        command += ["-serial", f"file:{_escaped(self.console)}"]
        for tag, path, more in shares:
            command += ["-virtfs", f"local,path={_escaped(path)},mount_tag={tag},security_model=none{more}"]
        if self.terminal:
            command += ["-chardev", "stdio,id=terminal,mux=off,signal=off", "-serial", "chardev:terminal"]
        return command


def _escaped(path: Path | str) -> str:
    """QEMU's options are separated by commas; one inside a value is doubled."""
    return str(path).replace(",", ",,")


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def terminal_restored(terminal: bool) -> Iterator[None]:
    """QEMU puts the terminal into raw mode and is killed in the end: what it leaves is undone here."""
    if not terminal:
        yield
        return
    saved = termios.tcgetattr(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)


@contextlib.contextmanager
def scratch_directory(asked: str | None) -> Iterator[Path]:
    """The caller's directory, or a fresh one that goes away again if nothing was put into it."""
    if asked is not None:
        path = Path(asked).resolve()
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    LAB.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="scratch-", dir=LAB)).resolve()
    try:
        yield path
    finally:
        if any(path.iterdir()):
            say(f"the command left files in {path}")
        else:
            path.rmdir()


def run(options: argparse.Namespace, terminal: bool = False) -> int:
    """One command in the lab; a boot that wedges is tried once more."""
    with scratch_directory(options.scratch) as scratch, terminal_restored(terminal):
        for last_try in (False, True):
            lab = Lab(options, scratch, terminal)
            try:
                lab.boot()
                return lab.follow()
            except LabError as error:
                say(str(error))
                if last_try or not error.wedged:
                    return STATUS_LAB_FAILED
                say("trying the boot once more")
            finally:
                lab.close()
    raise AssertionError("unreachable: the last try returns")


def stop_on_signal(number: int, _frame: object) -> NoReturn:
    """Ends the run by way of every `finally`, with the status a shell gives for the signal."""
    raise SystemExit(128 + number)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ci/lab", description="A complete KVM, nested in QEMU's emulator.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument("--memory", type=int, default=4096, metavar="MIB", help="default: %(default)s")
    cpus = max(2, min(4, os.cpu_count() or 1))
    machine.add_argument("--cpus", type=int, default=cpus, metavar="N", help="default: %(default)s")
    machine.add_argument("--scratch", metavar="DIR", help="shared as $LAB_SCRATCH (default: a new one)")
    run_verb = verbs.add_parser("run", parents=[machine], help="run a command, end with its exit status")
    run_verb.add_argument("--timeout", type=float, default=900.0, metavar="S", help="default: %(default)s")
    run_verb.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND...")
    shell_verb = verbs.add_parser("shell", parents=[machine], help="an interactive shell")
    shell_verb.set_defaults(timeout=0.0, command=[os.environ.get("SHELL", "/bin/sh")])
    verbs.add_parser("build", help="prepare the kernel and the initial RAM disk")
    options = parser.parse_args(arguments)
    if options.verb == "run":
        if options.command[:1] == ["--"]:
            del options.command[0]
        if not options.command:
            run_verb.error("which command?")
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop_on_signal)
    if options.verb == "build":
        for path in build():
            print(path)
        return 0
    if options.verb == "shell":
        if not os.isatty(0):
            say("a shell needs a terminal; use ci/lab run")
            return 2
        return run(options, terminal=True)
    try:
        return run(options)
    except BrokenPipeError:
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
