"""Process 1 of the lab, once the initial RAM disk has put the host's files into place: starts commands for clients.

Arguments: the port it listens on and the token that a client must know. Standard input and output are the control
line to the supervisor: a line a second goes out, the beat. Each client gets a process of its own (a fork), so that
nothing it does holds up the beat or another client. If this process ends the kernel panics and the emulator ends:
that is noticed at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import time
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from nested_lab import wire

BEAT_S = 1.0
# What a command left running may hold its output open: after its end it is waited for so long, not for ever.
AFTERMATH_S = 2.0
CGROUPS = "/sys/fs/cgroup/commands"
LIVE = "/run/lab/live"
COMMANDS = "/run/lab/commands"

STATUS_CANNOT_EXECUTE, STATUS_NOT_FOUND, STATUS_LAB_FAILED = 126, 127, 125
KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_CREATE_IRQCHIP = 0xAE01, 0xAE41, 0xAE60  # <linux/kvm.h>
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207  # <linux/random.h>


def main() -> None:
    port, token = int(sys.argv[1]), sys.argv[2]
    stir_random(bytes.fromhex(sys.argv[3]))
    os.makedirs(COMMANDS, exist_ok=True)
    make_room_for_commands()
    hold_machines()
    # Before everything else in the lab, so that a missing beat means that the lab stands still and not that it is busy.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # all orphans of the lab end up here: the kernel reaps them
    listener = socket.create_server(("0.0.0.0", port), backlog=128)
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    next_beat = time.monotonic()
    while True:
        left = next_beat - time.monotonic()
        if left <= 0:
            os.write(1, b"beat\n")
            next_beat = time.monotonic() + BEAT_S
        elif poll.poll(left * 1000):
            connection = listener.accept()[0]
            if os.fork() == 0:
                serve(listener, connection, token)
            connection.close()


def make_room_for_commands() -> None:
    """A cgroup for all of them, without processor 0: a guest there does not stay whole (docs/lab.md, "A word of
    processor 0").
    """
    write("/sys/fs/cgroup/cgroup.subtree_control", "+cpuset")
    os.mkdir(CGROUPS)
    write(f"{CGROUPS}/cpuset.cpus", f"1-{len(os.sched_getaffinity(0)) - 1}")


def hold_machines() -> None:
    """Two virtual machines that nobody runs, open for as long as this process is there. As long as there is one, the
    kernel need not patch its scheduler for the first that comes and the last that goes (docs/lab.md, "Code that changes
    under way"); nor KVM its own code for the first vCPU without an APIC in the kernel, or with one not enabled yet.
    """
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    for irqchip in (True, False):
        vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        if irqchip:
            fcntl.ioctl(vm, KVM_CREATE_IRQCHIP, 0)
        fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)


def stir_random(seed: bytes) -> None:
    """A lab that comes from a saved state would draw the same random numbers each time (random(4))."""
    with open("/dev/urandom", "rb") as device:
        fcntl.ioctl(device, RNDADDENTROPY, struct.pack("ii", 8 * len(seed), len(seed)) + seed)
        fcntl.ioctl(device, RNDRESEEDCRNG)


def serve(listener: socket.socket, connection: socket.socket, token: str) -> NoReturn:
    """One client, in a process of its own."""
    listener.close()
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kind, payload = wire.read_frame(connection)
        request = json.loads(payload)
        if request.get("token") != token:
            os._exit(1)
        if kind == wire.START:
            Command(connection, request).run()
        elif kind == wire.SIGNAL:
            send_signal(request)
        elif kind == wire.RESIZE:
            resize(request)
    except (EOFError, ValueError, OSError, wire.ProtocolError):
        pass  # the client is gone
    os._exit(0)


def send_signal(request: Mapping[str, Any]) -> None:
    command, number = int(request["command"]), int(request["number"])
    (os.killpg if request["group"] else os.kill)(command, number)


def resize(request: Mapping[str, Any]) -> None:
    with open(os.readlink(f"{COMMANDS}/{int(request['command'])}"), "rb", buffering=0) as terminal:
        set_size(terminal.fileno(), request["terminal"])


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def set_size(fd: int, size: Iterable[int]) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))


class Command:
    """A client's command: started, its streams passed on, its status told; ended with the client if that vanishes."""

    def __init__(self, connection: socket.socket, request: Mapping[str, Any]) -> None:
        self.connection = connection
        self.request = request
        self.frames = wire.Frames()
        self.to_client = wire.Outlet(connection.fileno(), wire.CHUNK_BYTES)
        self.stdin: wire.Outlet | None = None
        self.sources: dict[int, int] = {}  # descriptor -> kind of frame
        self.pid = 0
        self.cgroup = ""

    def run(self) -> None:
        self.bind(self.request["binds"])
        self.cgroup = f"{CGROUPS}/{os.getpid()}"
        os.mkdir(self.cgroup)
        if self.request["terminal"]:
            self.start_on_terminal()
        else:
            self.start_on_pipes()
        self.connection.setblocking(False)
        self.to_client.put(wire.frame(wire.STARTED, json.dumps({"command": self.pid}).encode()))
        finished = self.relay()
        if not finished:
            self.kill_all()
        self.forget()

    # ---- start ---------------------------------------------------------------------------------------------------

    def bind(self, paths: Iterable[str]) -> None:
        """Shows these of the host's /tmp: the lab's own is empty."""
        for path in paths:
            if os.path.exists(path) or not os.path.exists(LIVE + path):
                continue
            if os.path.isdir(LIVE + path):
                os.makedirs(path)
            else:
                os.close(os.open(path, os.O_CREAT, 0o600))
            if os.spawnvp(os.P_WAIT, "mount", ["mount", "--bind", LIVE + path, path]) != 0:
                raise OSError(f"cannot show {path}")

    def start_on_terminal(self) -> None:
        master, slave = os.openpty()
        set_size(slave, self.request["terminal"])
        name = os.ttyname(slave)
        self.fork((slave, slave, slave), controlling=True)
        os.symlink(name, f"{COMMANDS}/{self.pid}")
        os.close(slave)
        os.set_blocking(master, False)
        self.stdin = wire.Outlet(master, wire.CHUNK_BYTES)
        self.sources = {master: wire.STDOUT}

    def start_on_pipes(self) -> None:
        (stdin, to_stdin), (from_stdout, stdout), (from_stderr, stderr) = os.pipe(), os.pipe(), os.pipe()
        self.fork((stdin, stdout, stderr), controlling=False)
        for fd in (stdin, stdout, stderr):
            os.close(fd)
        os.set_blocking(to_stdin, False)
        self.stdin = wire.Outlet(to_stdin, wire.CHUNK_BYTES)
        self.sources = {from_stdout: wire.STDOUT, from_stderr: wire.STDERR}

    def fork(self, streams: tuple[int, int, int], controlling: bool) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        try:
            write(f"{self.cgroup}/cgroup.procs", "0")
            os.setsid()
            for fd, source in enumerate(streams):
                os.dup2(source, fd)
            if controlling:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            # What Python ignores for itself must not be ignored by the command.
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            os._exit(self.execute())
        finally:
            os._exit(STATUS_LAB_FAILED)

    def execute(self) -> int:
        """Becomes the command, or the status that a shell gives."""
        argv, environment = self.request["argv"], self.request["env"]
        try:
            os.chdir(self.request["cwd"])
        except OSError as error:
            os.write(2, f"lab: {self.request['cwd']}: {error.strerror}\n".encode())
            return STATUS_LAB_FAILED
        try:
            os.execvpe(argv[0], argv, environment)
        except OSError as error:
            os.write(2, f"lab: {argv[0]}: {error.strerror}\n".encode())
            return STATUS_NOT_FOUND if isinstance(error, FileNotFoundError) else STATUS_CANNOT_EXECUTE

    # ---- while it runs -------------------------------------------------------------------------------------------

    def relay(self) -> bool:
        """Until the command's end has been told: True; False if the client is gone before."""
        ended = os.pidfd_open(self.pid)
        status: int | None = None
        deadline = float("inf")
        client = self.connection.fileno()
        while not self.to_client.broken:
            if status is not None and (not self.sources or time.monotonic() > deadline):
                self.to_client.put(wire.frame(wire.EXIT, str(status).encode()))
                return self.drain_to_client()
            for fd, events in self.poll(client, None if status is not None else ended, deadline):
                if fd == ended:
                    status, deadline = self.reap(), time.monotonic() + AFTERMATH_S
                elif fd == client:
                    if events & ~select.POLLOUT and not self.hear_client():
                        return False
                    if events & select.POLLOUT:
                        self.to_client.flush()
                elif self.stdin and fd == self.stdin.fd and events & (select.POLLOUT | select.POLLERR):
                    self.stdin.flush()
                    self.close_stdin_if_over()
                if fd in self.sources and events & ~select.POLLOUT:
                    self.read(fd)
        return False

    def poll(self, client: int, ended: int | None, deadline: float) -> list[tuple[int, int]]:
        wanted = {client: select.POLLRDHUP}
        if self.stdin is None or not self.stdin.full:
            wanted[client] |= select.POLLIN
        if self.to_client.waiting:
            wanted[client] |= select.POLLOUT
        if not self.to_client.full:
            wanted.update(dict.fromkeys(self.sources, select.POLLIN))
        if self.stdin and self.stdin.waiting:
            wanted[self.stdin.fd] = wanted.get(self.stdin.fd, 0) | select.POLLOUT
        if ended is not None:
            wanted[ended] = select.POLLIN
        poll = select.poll()
        for fd, events in wanted.items():
            poll.register(fd, events)
        left = deadline - time.monotonic()
        return poll.poll(max(0.0, left) * 1000 if left != float("inf") else None)

    def reap(self) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return status if status >= 0 else 128 - status

    def hear_client(self) -> bool:
        """What the client sends; False if it is gone."""
        try:
            data = self.connection.recv(wire.CHUNK_BYTES)
        except BlockingIOError:
            return True
        if not data:
            return False
        for kind, payload in self.frames.feed(data):
            if kind == wire.STDIN and self.stdin:
                self.stdin.put(payload)
                self.stdin.ending |= not payload
                self.close_stdin_if_over()
            elif kind == wire.CLOSE:
                wanted = {b"1": wire.STDOUT, b"2": wire.STDERR}.get(payload)
                for fd in [fd for fd, kind in self.sources.items() if kind == wanted]:
                    self.close_source(fd)
        return True

    def close_stdin_if_over(self) -> None:
        """All of it is written and the end has come, or nobody reads it. A terminal is told so by its EOF character."""
        stdin = self.stdin
        if stdin is None or not (stdin.broken or (stdin.ending and not stdin.waiting)):
            return
        if stdin.fd in self.sources:
            if not stdin.broken:
                stdin.put(termios.tcgetattr(stdin.fd)[6][termios.VEOF])
            stdin.ending = False
            return
        os.close(stdin.fd)
        self.stdin = None

    def read(self, fd: int) -> None:
        try:
            data = os.read(fd, wire.CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:  # EIO of a terminal that nobody has open any more
            data = b""
        if data:
            self.to_client.put(wire.frame(self.sources[fd], data))
        else:
            self.close_source(fd)

    def close_source(self, fd: int) -> None:
        del self.sources[fd]
        if self.stdin and self.stdin.fd == fd:
            self.stdin = None
        os.close(fd)

    def drain_to_client(self) -> bool:
        while self.to_client.waiting:
            poll = select.poll()
            poll.register(self.to_client.fd, select.POLLOUT)
            poll.poll()
            self.to_client.flush()
        return not self.to_client.broken

    # ---- end -----------------------------------------------------------------------------------------------------

    def kill_all(self) -> None:
        """The command and all that it started, also in sessions of their own (cgroup.kill, Linux 5.14)."""
        write(f"{self.cgroup}/cgroup.kill", "1")
        with open(f"{self.cgroup}/cgroup.events") as file:
            poll = select.poll()
            poll.register(file, select.POLLPRI)
            while "populated 0" not in os.pread(file.fileno(), 4096, 0).decode():
                poll.poll()

    def forget(self) -> None:
        """A cgroup that a background process of the command is still in stays with it."""
        for remove, path in ((os.unlink, f"{COMMANDS}/{self.pid}"), (os.rmdir, self.cgroup)):
            try:
                remove(path)
            except OSError:
                pass


if __name__ == "__main__":
    main()
