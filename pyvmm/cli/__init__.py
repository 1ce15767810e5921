"""The command: ``pyvmm run``, ``demo``, ``image``, ``bench`` and so on. Each verb imports what it needs when called."""

from __future__ import annotations

import gc
import posix
import sys

from pyvmm.bundle import installed
from pyvmm.cli.say import STATUS_BROKEN_PIPE, STATUS_INTERRUPTED, STATUS_USAGE, give_up, say
from pyvmm.errors import HOST_LIMITS, ConfigError, VmmError, remedy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = """\
usage: pyvmm VERB [OPTIONS]

  run      run a guest; `pyvmm run --help` lists the options
  demo     run the small guest that comes with pyvmm, and show what its exits cost
  doctor   can this host run guests, how well, and what to do about what is missing
  qtest    a board without a vCPU, driven from outside through QEMU's qtest protocol
  image    tell of disk images, make, copy, check and resize them (qcow2, raw)
  trace    what a machine did, out of the FILE of `pyvmm run --trace FILE`
  bench    what an exit and a start cost on this host, against a loop in C and other VMMs

  list     the running machines of this user that have a name (pyvmm run --name NAME)
  attach   a console of one of them, on this terminal
  qmp      a QMP command to one of them
  save     one of them to a file, to go on from later
  top      what they are doing: exits, time, drives, network

  --help, --version
"""

# What is asked of machines that run already.
RUNNING = {
    "list": ("pyvmm.cli.machines", "list_machines"),
    "attach": ("pyvmm.cli.attach", "attach"),
    "qmp": ("pyvmm.cli.machines", "qmp"),
    "save": ("pyvmm.cli.machines", "save"),
    "top": ("pyvmm.cli.top", "top"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status. Errors are one sentence on standard error."""
    args = list(sys.argv[1:] if argv is None else argv)
    # Nothing that is made on the way to the guest becomes garbage; to look for it would take a tenth of that time.
    gc.disable()
    open_standard_files()
    try:
        status = dispatch(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure can still be told
        return status
    except (ConfigError, VmmError) as error:
        say(f"pyvmm: {error}")
        return STATUS_USAGE
    except KeyboardInterrupt:
        return STATUS_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; nothing is left to tell him.
        give_up(sys.stdout)
        return STATUS_BROKEN_PIPE
    except (OSError, MemoryError, ImportError) as error:
        text = host_lacks(error)
        if text is None:
            raise
        give_up(sys.stdout)
        say(f"pyvmm: {text}")
        return STATUS_USAGE
    finally:
        gc.unfreeze()
        gc.enable()


def open_standard_files() -> None:
    """Where standard input, output or error is closed (``>&-``): /dev/null, or the next file that is opened would take
    its number, and a guest's console would write into its disk.
    """
    for fd in range(3):
        try:
            posix.fstat(fd)
        except OSError:
            posix.open("/dev/null", posix.O_RDWR)  # the lowest number that is free


def host_lacks(error: OSError | MemoryError | ImportError) -> str | None:
    """The sentence for what may go wrong anywhere, because this host has no more of something. None: another error."""
    from errno import EMFILE, ENFILE, ENOMEM

    if isinstance(error, MemoryError):
        error = OSError(ENOMEM, "out of memory")
    elif isinstance(error, ImportError):
        # The dynamic linker tells it in words (dlopen(3)): of files that it can't open or map.
        number = next((n for n in (EMFILE, ENFILE, ENOMEM) if posix.strerror(n) in str(error)), None)
        if number is None and "failed to map segment" in str(error):
            number = ENOMEM
        if number is None:
            return None
        error = OSError(number, posix.strerror(number))
    if error.errno not in HOST_LIMITS:
        return None
    where = "" if error.errno in (EMFILE, ENFILE, ENOMEM) else f"{error.filename or 'standard output'}: "
    return where + remedy(error, "")


def load_ahead() -> None:
    """What every run needs, and all of it at once (bundle.py)."""
    bundle = installed()
    if bundle is not None:
        bundle.run_ahead()
        if bundle.times_ns:
            from pyvmm.bundle_build import note_times

            note_times(bundle)


def dispatch(args: list[str]) -> int:
    verb = args[0] if args else "--help"
    if verb in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0 if args else STATUS_USAGE
    if verb == "--version":
        from pyvmm.cli.version import version_text

        print(version_text(), end="")
        return 0
    if verb == "run":
        load_ahead()
        from pyvmm.cli.run import run

        return run(args[1:])
    if verb == "demo":
        from pyvmm.cli.demo import demo

        return demo(args[1:])
    if verb == "doctor":
        from pyvmm.cli.doctor import doctor

        return doctor(args[1:])
    if verb == "qtest":
        from pyvmm.cli.qtest import qtest

        return qtest(args[1:])
    if verb == "image":
        from pyvmm.cli.image import image

        return image(args[1:])
    if verb == "trace":
        from pyvmm.cli.trace import trace

        return trace(args[1:])
    if verb == "bench":
        from pyvmm.cli.bench import bench

        return bench(args[1:])
    if verb in RUNNING:
        module, function = RUNNING[verb]
        __import__(module)
        status: int = getattr(sys.modules[module], function)(args[1:])
        return status
    raise ConfigError(f"there is no verb {verb!r}: `pyvmm --help` lists them")
