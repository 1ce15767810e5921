"""The command: ``pyvmm run``, ``demo``, ``doctor``, ``bench``. Each verb imports what it needs when it is called."""

from __future__ import annotations

import gc
import sys

from pyvmm.errors import ConfigError, VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = """\
usage: pyvmm VERB [OPTIONS]

  run      run a guest; `pyvmm run --help` lists the options
  demo     run the small guest that comes with pyvmm, and show what its exits cost
  doctor   can this host run guests, how well, and what to do about what is missing
  qtest    a board without a vCPU, driven from outside through QEMU's qtest protocol
  bench    what an exit and a start cost on this host, against a loop in C and other VMMs

  --help, --version
"""

# Exit statuses beside the guest's own (README, "Exit status").
STATUS_USAGE = 2
STATUS_TIMEOUT = 124
STATUS_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status. Errors are one sentence on standard error."""
    args = list(sys.argv[1:] if argv is None else argv)
    # Nothing that is made on the way to the guest becomes garbage; looking for it would take a tenth of that way.
    gc.disable()
    try:
        return dispatch(args)
    except (ConfigError, VmmError) as error:
        print(f"pyvmm: {error}", file=sys.stderr)
        return STATUS_USAGE
    except KeyboardInterrupt:
        return STATUS_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; nothing is left to tell him.
        return STATUS_USAGE
    finally:
        gc.enable()


def dispatch(args: list[str]) -> int:
    verb = args[0] if args else "--help"
    if verb in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0 if args else STATUS_USAGE
    if verb == "--version":
        from pyvmm import __version__

        print(f"pyvmm {__version__}")
        return 0
    if verb == "run":
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
    if verb == "bench":
        from pyvmm.cli.bench import bench

        return bench(args[1:])
    raise ConfigError(f"there is no verb {verb!r}: use run, demo, doctor, qtest or bench")
