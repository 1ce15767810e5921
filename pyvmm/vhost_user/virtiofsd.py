"""Virtiofsd: the program that serves a folder to a guest, started here and ended with the machine.

There are two of the name: QEMU's in C (Debian 12, up to QEMU 7.2) and the one in Rust that came after it. Each takes
the listening socket as a descriptor and serves the first connection, which is ours already; it ends when that is
closed, and so with this process, however this ends. Each shuts itself into the folder (sandbox). QEMU's needs root for
that: as an ordinary user it gets a user namespace in which it is root and every file is that user's.
"""

from __future__ import annotations

import os
from _socket import AF_UNIX, SOCK_STREAM, socket

from pyvmm.errors import ConfigError, remedy

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess

    from pyvmm.vhost_user.options import ShareOptions

PROGRAM = "virtiofsd"
# Where it is kept when it is not on the PATH: Debian 13 and Fedora, Debian 12, Arch.
PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")
WHAT_TO_INSTALL = (
    "install virtiofsd (Debian: `apt install virtiofsd`, on Debian 12 `apt install qemu-system-common`), or start it"
    " yourself and give socket=PATH"
)
OF_RUST = b"separate-options"  # a feature of its --print-capabilities
MOST_FILES = 1_000_000  # each file that the guest knows is a descriptor of its own
LONGEST_WORDS_BYTES = 4096
LONGEST_END_S = 5.0
LONGEST_ASK_S = 20.0


def find_program() -> str | None:
    """The program's path; None where there is none."""
    import shutil

    found = shutil.which(PROGRAM)
    return found or next((place for place in PLACES if os.access(place, os.X_OK)), None)


class Virtiofsd:
    """Serves ``share``'s folder. ConfigError where it can't be: no program, no folder."""

    own = True

    def __init__(self, share: ShareOptions) -> None:
        assert share.path is not None
        self._share = share
        self._folder = share.path
        self._child: subprocess.Popen[bytes] | None = None
        self.log_fd = -1
        self._words = b""
        program = find_program()
        if program is None:
            raise ConfigError(f"share {share.tag}: there is no virtiofsd here: {WHAT_TO_INSTALL}")
        self._program = program
        self._is_of_rust = OF_RUST in capabilities(program)

    def connect(self) -> socket:
        """Start one, whose only connection this is."""
        import subprocess
        import tempfile

        self.end()
        self._check_folder()
        # A folder that only this user may look into: nobody else is the first to connect.
        with tempfile.TemporaryDirectory(prefix="pyvmm-") as place:
            listening, ours = socket(AF_UNIX, SOCK_STREAM), socket(AF_UNIX, SOCK_STREAM)
            try:
                listening.bind(os.path.join(place, "s"))
                listening.listen(1)
                ours.connect(os.path.join(place, "s"))
                # What it says is read now and then, and lost where that is too late: it never waits for us.
                self.log_fd, told_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                with open(told_fd, "wb") as told:
                    self._child = subprocess.Popen(
                        [*self._prefix(), self._program, *self._words_for(listening.fileno())],
                        pass_fds=[listening.fileno()],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=told,
                        start_new_session=True,  # a terminal's Ctrl-C is the guest's, or ours
                    )
            except OSError as error:
                ours.close()
                self.end()
                raise ConfigError(
                    f"share {self._share.tag}: {self._program} does not start: {remedy(error, 'try to run it')}"
                ) from None
            finally:
                listening.close()
        return ours

    def _check_folder(self) -> None:
        try:
            os.listdir(self._folder)
        except OSError as error:
            why = remedy(error, "give a folder that you may read")
            raise ConfigError(f"share {self._share.tag}: path={self._folder}: {why}") from None

    def _prefix(self) -> list[str]:
        if os.geteuid() == 0 or self._is_of_rust:
            return []
        import shutil

        # It gives up its further groups, which only a namespace whose groups were mapped by newgidmap lets it do.
        mapped = os.getgroups() and shutil.which("newgidmap") and shutil.which("newuidmap")
        return ["unshare", "--user", "--map-root-user", *(["--map-auto"] if mapped else [])]

    def _words_for(self, fd: int) -> list[str]:
        """The command line: each of the two has its own."""
        import resource

        share = self._share
        files = min(MOST_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        words = [f"--fd={fd}", f"--rlimit-nofile={files}"]
        if self._is_of_rust:
            cache = "never" if share.cache == "none" else share.cache
            words += [f"--shared-dir={self._folder}", f"--cache={cache}", f"--sandbox={share.sandbox}"]
            return [*words, "--log-level=warn", *(["--xattr"] if share.xattr else [])]
        # Its options are split at commas, and a backslash takes one's meaning away (libfuse's fuse_opt).
        folder = self._folder.replace("\\", "\\\\").replace(",", "\\,")
        told = f"source={folder},cache={share.cache},sandbox={share.sandbox},log_level=warn"
        return ["-f", *words, "-o", f"{told},{'xattr' if share.xattr else 'no_xattr'}"]

    # -- what it says --------------------------------------------------------------------------------------------------

    def hear(self) -> bool:
        """Read what it has said: the last of it is kept. False: it says no more."""
        try:
            while self.log_fd >= 0 and (data := os.read(self.log_fd, LONGEST_WORDS_BYTES)):
                self._words = (self._words + data)[-LONGEST_WORDS_BYTES:]
        except BlockingIOError:
            return True
        return False

    def last_words(self) -> str:
        """Once it has gone: what it said last, and what to do where that is known."""
        self._reap(LONGEST_END_S)
        self.hear()
        said = [line.strip() for line in self._words.decode("utf-8", "replace").splitlines() if line.strip()]
        last = said[-1] if said else ""
        return f"{last}{advice(last)}"

    def _close_log(self) -> None:
        fd, self.log_fd = self.log_fd, -1
        if fd >= 0:
            os.close(fd)

    # -- its end -------------------------------------------------------------------------------------------------------

    def _reap(self, limit_s: float) -> None:
        """Return when it has ended; one that takes longer is killed."""
        import subprocess

        if self._child is None:
            return
        try:
            self._child.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child = None

    def end(self) -> None:
        """It ends by itself, since its connection is closed; where it does not, it is killed."""
        self._reap(LONGEST_END_S)
        self._words = b""
        self._close_log()

    def abandon(self) -> None:
        """In a child of fork, of which it is none: only the descriptor."""
        self._child = None
        self._close_log()


def advice(said: str) -> str:
    """What to do about the mistakes that are likely."""
    if "setgroups" in said:
        return ": install uidmap, run pyvmm as root, or give socket= of a virtiofsd that root has started"
    if any(word in said for word in ("unshare", "CLONE_NEW", "pivot_root", "entering sandbox")):
        why = "a chroot and many containers let it have no namespaces of its own"
        return f": {why}: give sandbox=chroot as root, or socket= of one elsewhere"
    return ""


def capabilities(program: str) -> bytes:
    """What it says of itself (QEMU's docs/interop/vhost-user.json); empty where it says nothing."""
    import subprocess

    try:
        asked = subprocess.run(
            [program, "--print-capabilities"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=LONGEST_ASK_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return b""
    return asked.stdout
