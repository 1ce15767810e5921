"""What every test has: lab_plugin.py decides where it runs, left_out.py whether this machine has what it is about."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pyvmm.block.protocols.image import in_memory

pytest_plugins = ["lab_plugin", "left_out"]


def on_a_disk(directory: str) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            return not in_memory(os.fstat(file.fileno()))
    except OSError:
        return False


# Debian 13's /tmp is in memory. Images of tests are to be where images are: such a file system takes O_DIRECT and
# RWF_NOWAIT in another way, or not at all. In the lab everything is in memory.
if "PYTEST_DEBUG_TEMPROOT" not in os.environ and not on_a_disk(tempfile.gettempdir()):
    for place in ("/var/tmp", str(Path(__file__).parents[1] / ".cache")):
        if on_a_disk(place):
            os.environ["PYTEST_DEBUG_TEMPROOT"] = place
            break
