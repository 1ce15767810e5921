"""The benchmarks' package, found as ``pyvmm bench`` finds it."""

from pyvmm.cli.bench import load

load()
