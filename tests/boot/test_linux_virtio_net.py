"""A stock Debian kernel with a network card on virtio, to the host and back."""

from __future__ import annotations

import linux_net
import pytest


@pytest.mark.lab
@pytest.mark.parametrize(("machine", "ring"), [("microvm", "split"), ("microvm", "packed")])
def test_to_the_host_by_a_tap(machine: str, ring: str) -> None:
    linux_net.run("with_the_host", machine, ring)
