"""One QEMU that emulates the lab's machine: its command line, its monitor, its state when it stands still."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nested_lab import image

MONITOR_LIMIT_S = 10.0
# A monitor that has not answered by then will not: the process is stopped, or hangs itself.
DIAGNOSIS_LIMIT_S = 2.0
LOOKS, LOOK_EVERY_S = 4, 1.0
RESUMED_WITHIN_S = 5.0


class EmulatorError(Exception):
    """QEMU ended, or its monitor did not do what it was asked."""


def unix_connection(path: Path, limit_s: float | None = None) -> socket.socket:
    """Connected to the Unix socket at `path`, however long that is (sun_path has 108 bytes)."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(limit_s)
    directory = os.open(path.parent, os.O_PATH)
    try:
        connection.connect(f"/proc/self/fd/{directory}/{path.name}")
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(directory)
    return connection


class Monitor:
    """QEMU's monitor by QMP (docs/interop/qmp-spec): one request at a time, events passed over."""

    def __init__(self, path: Path, limit_s: float) -> None:
        self._socket = unix_connection(path, limit_s)
        try:
            self._lines = self._socket.makefile("r")
            self._lines.readline()  # the greeting
            self.ask("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def ask(self, command: str, **arguments: Any) -> Any:
        """What the command returns. Raises EmulatorError, also for an answer that does not come."""
        try:
            self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
            while line := self._lines.readline():
                answer = json.loads(line)
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    raise EmulatorError(f"{command}: {answer['error']['desc']}")
        except OSError as error:
            raise EmulatorError(f"{command}: no answer from the monitor ({error})") from None
        raise EmulatorError(f"{command}: QEMU ended")

    def words(self, command_line: str) -> str:
        """The answer of the monitor for people."""
        answer: str = self.ask("human-monitor-command", **{"command-line": command_line})
        return answer

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Emulator:
    """QEMU for one boot of a lab, in a directory of its own; `state` if it is to go on from a saved one."""

    def __init__(self, directory: Path, arguments: list[str], scratch: Path, state: Path | None) -> None:
        self.directory = directory
        self.console = directory / "console.log"
        self.console.touch()
        command = [image.QEMU, *arguments, *self._ends(scratch)]
        if state is not None:
            command += ["-incoming", f"exec:exec cat {shlex.quote(str(state))}"]
        with open(directory / "qemu.log", "ab") as log:
            # A session of its own: a Ctrl-C is for who owns it. It never outlives that process.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid
        self.control: socket.socket | None = None

    def _ends(self, scratch: Path) -> list[str]:
        """The host's ends of the devices, which differ from lab to lab and are no part of a saved state."""
        shares = (
            ("root", "/", ",readonly=on,multidevs=remap"),
            ("live", "/", ",readonly=on,multidevs=remap"),
            ("scratch", scratch, ""),
        )
        # Names in QEMU's own directory: a path to a Unix socket may have 107 bytes only.
        ends = ["-serial", f"file:{self.console.name}"]
        ends += ["-chardev", "socket,id=control,path=control,server=on,wait=off", "-serial", "chardev:control"]
        ends += ["-qmp", "unix:monitor,server=on,wait=off"]
        for tag, path, more in shares:
            ends += ["-virtfs", f"local,path={escaped(path)},mount_tag={tag},security_model=none{more}"]
        # Loopback only, and nothing goes out: the lab reaches no network.
        ends += ["-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:{image.AGENT_PORT}"]
        return [*ends, "-device", "virtio-net-pci,netdev=net,romfile="]

    @staticmethod
    def arguments(cpus: int, memory_mib: int) -> list[str]:
        """What makes the machine, and so a saved state of it. `cpus` are those that commands run on."""
        # Without ERMS memory is copied and cleared in words: the emulator takes as long for each byte of a REP MOVSB.
        # Processor 0 is the agent's alone (docs/lab.md, "A word of processor 0").
        arguments = ["-accel", "tcg,thread=multi", "-cpu", "max,-erms", "-smp", str(1 + cpus), "-m", str(memory_mib)]
        arguments += ["-nodefaults", "-no-reboot", "-display", "none"]
        arguments += ["-kernel", str(image.kernel()), "-initrd", str(image.initrd())]
        return [*arguments, "-append", image.KERNEL_COMMAND_LINE]

    def ended(self) -> bool:
        return self._process.poll() is not None

    def connect(self) -> bool:
        """To the control line; False as long as QEMU is not that far."""
        if self.control is None:
            with contextlib.suppress(OSError):
                self.control = unix_connection(self.directory / "control")
        return self.control is not None

    def monitor(self, limit_s: float = MONITOR_LIMIT_S) -> Monitor:
        return Monitor(self.directory / "monitor", limit_s)

    def agent_port(self) -> int:
        """Where on 127.0.0.1 the agent's port is reached."""
        with contextlib.closing(self.monitor()) as monitor:
            said = monitor.words("info usernet")
        found = re.search(rf"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+{image.AGENT_PORT}\b", said)
        if found is None:
            raise EmulatorError(f"no forwarded port in what the monitor says: {said}")
        return int(found[1])

    def save(self, path: Path, pause: Callable[[], None]) -> None:
        """Writes the machine's state to `path` and lets it go on; `pause` is called between looks."""
        with contextlib.closing(self.monitor()) as monitor:
            monitor.ask("stop")
            monitor.ask("migrate", uri=f"exec:exec cat > {shlex.quote(str(path))}")
            while (status := monitor.ask("query-migrate").get("status")) not in ("completed", "failed"):
                pause()
            if status == "failed":
                raise EmulatorError("the state of the lab could not be saved")
            monitor.ask("cont")

    def resume(self, pause: Callable[[], None]) -> None:
        """Lets a machine go on that has come from a saved state, once it is read."""
        with contextlib.closing(self.monitor()) as monitor:
            while monitor.ask("query-status")["status"] == "inmigrate":
                pause()
            monitor.ask("cont")

    def diagnose(self) -> str:
        """What can be seen of a machine that stands still, and whether `stop` and `cont` set it going again."""
        seen = [self._threads()]
        try:
            with contextlib.closing(self.monitor(DIAGNOSIS_LIMIT_S)) as monitor:
                for look in range(LOOKS):
                    seen.append(f"---- look {look + 1} of {LOOKS}")
                    for command in ("info status", "info registers -a", *self._lapics(monitor), "info pic"):
                        seen.append(f"-- {command}\n{monitor.words(command)}")
                    time.sleep(LOOK_EVERY_S)
                monitor.ask("stop")
                monitor.ask("cont")
                again = self.control is not None and select.select([self.control], [], [], RESUMED_WITHIN_S)[0]
                seen.append(f"---- after stop and cont the beat {'is there again' if again else 'did not come back'}")
        except (EmulatorError, OSError) as error:
            seen.append(f"---- {error}")
        return "\n".join(seen)

    def _lapics(self, monitor: Monitor) -> list[str]:
        cpus = monitor.ask("query-cpus-fast")
        return [f"info lapic {cpu['props']['core-id']}" if len(cpus) > 1 else "info lapic" for cpu in cpus]

    def _threads(self) -> str:
        """Name, state and kernel function of each thread of QEMU."""
        lines = ["---- threads of QEMU"]
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
                lines.append(f"{task.name} {status['Name']} {status['State']} {(task / 'wchan').read_text()}")
        return "\n".join(lines)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self.control is not None:
            self.control.close()


class LabClock:
    """Time as the lab gets it, in seconds: while its processors wait for one of the host's, it does not pass.

    Of each step what QEMU's threads have waited is taken away (/proc/PID/task/TID/schedstat, nanoseconds: running,
    waiting): of all of them, for one processor waits for another's lock, both for the main loop, so that they are late
    one after the other. A wait is told when it is over: what is longer than the step is taken from the next ones.
    Limits counted so mean at least the same work on a busy machine as on a quiet one.
    """

    # Even a hopelessly busy machine comes to the end of a limit.
    LEAST_RATE = 0.05
    LONGEST_WAIT_S = 5.0

    def __init__(self) -> None:
        self.now = 0.0
        self._pid: int | None = None
        self._at = time.monotonic()
        self._waited: dict[str, int] = {}
        self._owed = 0.0

    def watch(self, pid: int | None) -> None:
        self._pid, self._waited, self._owed = pid, {}, 0.0

    def tick(self) -> float:
        """The time by now."""
        at = time.monotonic()
        step = at - self._at
        waited = self._waited_ns()
        self._owed += sum(ns - self._waited.get(task, ns) for task, ns in waited.items()) / 1e9
        passed = max(step - self._owed, self.LEAST_RATE * step)
        self._owed = min(max(self._owed - step, 0.0), self.LONGEST_WAIT_S)
        self.now += passed
        self._at, self._waited = at, waited
        return self.now

    def _waited_ns(self) -> dict[str, int]:
        waited: dict[str, int] = {}
        if self._pid is None:
            return waited
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{self._pid}/task"):
                with contextlib.suppress(OSError), open(f"/proc/{self._pid}/task/{task}/schedstat") as file:
                    waited[task] = int(file.read().split()[1])
        return waited


def escaped(path: Path | str) -> str:
    """QEMU's options are separated by commas; one inside a value is doubled."""
    return str(path).replace(",", ",,")
