"""A pause: the process that serves a device's queues lets go of them, and takes them up as the machine goes on."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "virtio"))
import vhost_back_end as b
from machine_guest import MachineGuest

import pyvmm

HALTS = bytes.fromhex("fa f4 eb fd")  # cli; hlt; jmp
REQUEST = 1


def test_nothing_is_served_while_the_machine_stands(tmp_path: Path) -> None:
    back_end = b.BackEnd(tmp_path / "s")
    with pyvmm.Machine(flat=HALTS, memory_mib=16, shares=[f"tag=data,socket={tmp_path / 's'}"]) as m:
        guest = MachineGuest(m, "share data")
        m.resume()
        guest.start(0, REQUEST)
        driver = guest.drivers[REQUEST]
        for n in range(3):
            chain = driver.add([b"while it runs"], [100])
            guest.notify(REQUEST)
            assert guest.used(REQUEST) == [(chain, 13)]
            m.pause()
            assert back_end.rings[REQUEST].kick < 0
            assert back_end.requests.count(b.GET_VRING_BASE) == n + 1
            chain = driver.add([b"meanwhile"], [100])
            guest.notify(REQUEST)
            m.resume()
            assert guest.used(REQUEST) == [(chain, 9)]
            assert driver.data(chain)[:9] == b"elihwnaem"
    back_end.close()
