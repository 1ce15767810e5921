"""A trace file that holds anything: it is read by all that reads one, or refused with a sentence.

``one_input`` takes the bytes of a file. What is neither comes through as an exception.
"""

from __future__ import annotations

import os
import tempfile

from pyvmm.errors import ConfigError
from pyvmm.trace.events import device_of, line
from pyvmm.trace.export import everything, export
from pyvmm.trace.format import TraceFile
from pyvmm.trace.summary import Summary


def one_input(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "trace")
        with open(path, "wb") as file:
            file.write(data)
        try:
            trace = TraceFile(path)
        except ConfigError:
            return
        count = 0
        for record in trace.records():
            text = line(trace, record)
            device_of(record, trace.names)
            assert text.isprintable(), text
            count += 1
        assert count <= len(data) // 32
        summary = Summary(trace)
        assert summary.records == count
        summary.text()
        for suffix in ("json", "pftrace"):
            export(trace, f"{path}.{suffix}", everything)
