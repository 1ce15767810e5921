"""Writes numbered batches of sectors to a disk on virtio until somebody kills it, as power_cut.S does on IDE.

    python tests/boot/virtio_power_cut.py IMAGE MACHINE RING FIRST_BATCH

The requests of a batch are in flight together. Then comes VIRTIO_BLK_T_FLUSH (virtio 1.2, 5.2.6.2), and when that is
answered the batch's number on standard output.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "unit" / "virtio")]

from machine_guest import MachineGuest  # noqa: E402
from test_power_cut import FIRST_SECTOR, SLOT_SECTORS, SLOTS, WAYS, sector_bytes  # noqa: E402

import pyvmm  # noqa: E402
from pyvmm.devices.virtio.blk import F_FLUSH, T_FLUSH, T_OUT  # noqa: E402
from pyvmm.devices.virtio.ring import F_RING_PACKED  # noqa: E402

SECTORS_A_REQUEST = {4: 1, 16: 8, 128: 32}
OK = b"\0"


def main(image: str, machine: str, ring: str, first_batch: str) -> None:
    drive = f"file={image},if=virtio"
    options = {"machine": machine, "virtio_ring": ring, "accel": "qtest", "memory_mib": 16, "drives": [drive]}
    with pyvmm.Machine(**options) as m:  # type: ignore[arg-type]
        guest = MachineGuest(m, "blk0")
        packed = ring == "packed"
        guest.start(F_FLUSH | (F_RING_PACKED if packed else 0), 0, packed=packed)
        batch = int(first_batch)
        while True:
            write(guest, batch)
            print(f"{batch:08x}", flush=True)
            batch += 1


def write(guest: MachineGuest, batch: int) -> None:
    count = WAYS[batch % 3]
    at_once = SECTORS_A_REQUEST[count]
    start = FIRST_SECTOR + batch % SLOTS * SLOT_SECTORS
    requests = []
    for first in range(0, count, at_once):
        data = b"".join(sector_bytes(batch, first + n) for n in range(at_once))
        requests.append([struct.pack("<IIQ", T_OUT, 0, start + first), data])
    ask(guest, requests)
    ask(guest, [[struct.pack("<IIQ", T_FLUSH, 0, 0)]])


def ask(guest: MachineGuest, requests: list[list[bytes]]) -> None:
    driver = guest.drivers[0]
    chains = [driver.add(request, [1]) for request in requests]
    guest.notify(0)
    assert {chain for chain, _ in guest.used(0, len(chains))} == set(chains)
    assert all(driver.data(chain) == OK for chain in chains)


if __name__ == "__main__":
    main(*sys.argv[1:])
