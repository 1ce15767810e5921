"""``python -m pytest benchmarks``: the same cases as ``pyvmm bench``, for day-to-day use with pytest-benchmark.

They measure, so ci/test does not run them. To compare two states of the tree: --benchmark-save=NAME, then
--benchmark-compare.
"""

from pyvmm.cli.bench import load

load()
