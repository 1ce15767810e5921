"""Who takes part in the benchmarks: each file knows how one of them is found, started, and what it can't do.

``*_child.py`` and floor.c are not imported: they are the programs of the processes that are measured.
"""
