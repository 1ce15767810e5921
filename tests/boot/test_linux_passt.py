"""A stock Debian kernel on the network by passt, without root: out to the host's loopback, in by a forwarded port."""

from __future__ import annotations

import linux_net
import pytest


@pytest.mark.lab
@pytest.mark.after_consoles
@pytest.mark.parametrize(("machine", "ring"), [("microvm", "packed")])
def test_a_guest_of_somebody_who_is_not_root(machine: str, ring: str) -> None:
    linux_net.run("beside_a_router", machine, ring)
