"""A guest writes to an image on a small file system that is full: python full_file_system.py DIRECTORY.

test_disk_faults.py runs it where it may mount something there. A line for each stop of the machine: "io-error", and at
last "passed", which it only says where everything the guest wrote is in the image.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import disk_images
from guests import PASSED, TIMEOUT_S, Guest
from test_disk_faults import FLUSH, SECTOR, SOURCE, WRITE, WRITE_MULTIPLE, steps_source

from pyvmm.machine import STATUS_IO_ERROR

KIB = 1024
# Room for 20 KiB of the 64 that the guest writes; with the first one gone for 56.
SIZE_KIB, FILLERS_KIB = 256, (36, 200)
SECTORS = 128


def main(directory: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_KIB}k", "none", directory], check=True)
    fillers = []
    for size_kib in FILLERS_KIB:
        fillers.append(directory / f"{size_kib}")
        fillers[-1].write_bytes(b"x" * size_kib * KIB)
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(1 << 20)
    data = disk_images.seeded("in memory", SECTORS * SECTOR)
    source = steps_source([(WRITE, 0, 64), (WRITE_MULTIPLE, 64, 64), (FLUSH, 0, 0)])
    with Guest(source, "real16", machine="pc", drives=[str(image)]) as guest:
        machine = guest.machine
        machine.memory.write(SOURCE, data)
        while (status := machine.run(TIMEOUT_S)) == STATUS_IO_ERROR:
            assert "No space left" in status.reason, status.reason
            print("io-error", flush=True)
            fillers.pop(0).unlink()
        assert status == PASSED, status
        assert guest.bytes_at("outcomes", 6) == bytes(6)
    assert image.read_bytes() == data.ljust(1 << 20, b"\0")
    print("passed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
