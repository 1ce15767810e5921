"""Stock Debian kernels with network cards on virtio: to the host, to each other on a bridge, and by passt."""

from __future__ import annotations

import linux_net
import pytest


@pytest.mark.lab
@pytest.mark.parametrize(("machine", "ring"), [("microvm", "split"), ("microvm", "packed")])
def test_to_the_host_by_a_tap(machine: str, ring: str) -> None:
    linux_net.run("with_the_host", machine, ring)


@pytest.mark.lab
@pytest.mark.slow
def test_two_on_a_bridge() -> None:
    linux_net.run("on_a_bridge", "microvm", "split")


@pytest.mark.lab
def test_without_root_by_passt() -> None:
    linux_net.run("by_passt", "microvm", "split")
