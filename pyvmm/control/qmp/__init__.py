"""QMP: a machine asked and told by JSON on a socket, as QEMU's is (docs/interop/qmp-spec.rst).

Read ``session.py`` for the conversation and ``table.py`` for what a command is; commands are grouped by what they ask.
"""
