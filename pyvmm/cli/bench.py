"""``pyvmm bench exits|launch|disk|net|snapshot``: what exits, starts, requests to a disk, frames and restores cost.

The benchmarks are a package of their own: ``pyvmm_benchmarks`` where pyvmm is installed, the directory benchmarks/
beside pyvmm/ in a checkout.
"""

from __future__ import annotations

import gc
import os
import sys

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

PACKAGE = "pyvmm_benchmarks"
WHICH = ("exits", "launch", "disk", "net", "snapshot")

USAGE = """\
usage: pyvmm bench exits|launch|disk|net|snapshot [OPTIONS]

  exits     what a VM exit costs: pyvmm, a loop in C, loops in Python, other VMMs
  launch    from the shell to the guest, and in one process: pyvmm and other VMMs
  disk      what a request to a disk on virtio takes: pyvmm and QEMU
  net       what a frame of a network card on virtio takes: pyvmm and QEMU
  snapshot  to go on from a snapshot, to fork, to save what runs: pyvmm and the same in C

`pyvmm bench exits --help` lists the options. Exit status: 0, 1 a regression (--compare), 2 wrong use or host error."""
""


def bench(args: list[str]) -> int:
    which = args[0] if args else ""
    if which in ("--help", "-h"):
        print(USAGE)
        return 0
    if which not in WHICH:
        which_there_are = "`pyvmm bench exits`, `launch`, `disk`, `net` or `snapshot`"
        raise ConfigError(f"there is no benchmark {which!r}: say {which_there_are}")
    load()
    # The command has it off, for the way to a guest's first instruction; a benchmark runs for minutes.
    gc.enable()
    module = __import__(f"{PACKAGE}.{which}", fromlist=("main",))
    return int(module.main(args[1:]))


def load() -> ModuleType:
    """The package, wherever it stands; after this ``import pyvmm_benchmarks`` works."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec, spec_from_file_location

    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    spec = PathFinder.find_spec(PACKAGE)
    if spec is None:
        directory = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(__file__))), "benchmarks")
        top = os.path.join(directory, "__init__.py")
        if not os.path.exists(top):
            raise ConfigError("the benchmarks are not installed here: pip install 'pyvmm-kvm[bench]'")
        spec = spec_from_file_location(PACKAGE, top, submodule_search_locations=[directory])
    assert spec is not None and spec.loader is not None
    module = sys.modules[PACKAGE] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
