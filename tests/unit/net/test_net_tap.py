"""Tap interfaces, in a network namespace of each test's own."""

from __future__ import annotations

from netns import in_namespace

OPEN = """
import os, socket
from pyroute2 import IPRoute
from pyvmm.errors import ConfigError
from pyvmm.net.open import open_net
from pyvmm.net.options import NetOptions

def net(words):
    return open_net(NetOptions.parse(words))

def says(words):
    try:
        net(words)
    except ConfigError as error:
        return str(error)
    raise AssertionError(words)

def raw(name):
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    end.bind((name, 0))
    end.settimeout(10)
    return end

def frame(n, size=100):
    return b"\\xff" * 6 + b"\\x02" + bytes(5) + b"\\x88\\xb5" + n.to_bytes(4, "big") + bytes(size - 18)

def ours(end, wanted):
    while True:
        got = end.recv(70000)
        if got[12:14] == b"\\x88\\xb5":
            assert got == wanted, got
            return

def guests(port, header, wanted):
    while True:
        views = [bytearray(header), bytearray(30), bytearray(70000)]
        size = port.receive(views)
        got = (views[1] + views[2])[: size - header]
        if size and got[12:14] == b"\\x88\\xb5":
            assert got == wanted, got
            return
"""


def test_frames_go_both_ways_with_virtios_header() -> None:
    in_namespace(
        OPEN
        + """
back = net("tap=tap0,address=10.1.2.3/24")
assert back.has_header and back.connected and back.offloads & 1
end = raw("tap0")
for header in (12, 10):
    back.configure(header)
    for n in range(3):
        assert back.ports[0].send([bytes(header), frame(n)])
        ours(end, frame(n))
        end.send(frame(n))
        guests(back.ports[0], header, frame(n))
# A header that makes no sense is the kernel's to refuse: the frame is lost, and no more.
back.ports[0].send([b"\\x01\\x00" + bytes(4) + b"\\xff\\xff\\xff\\xff", frame(1)])
assert back.ports[0].lost == 1 and back.connected
back.close()
assert "tap0" not in [name for _, name in socket.if_nameindex()]
back.close()
"""
    )


def test_an_interface_that_is_there_and_what_is_said_of_others() -> None:
    in_namespace(
        OPEN
        + """
assert "`ip tuntap add dev tap7 mode tap user $USER &&" in says("tap=tap7")
assert "user $USER multi_queue" in says("tap=tap7,queues=2")
assert "no tap interface" in says("tap=lo")
assert "ip link add br7 type bridge" in says("tap=tap7,bridge=br7")
one, many = net("tap=one,address=10.0.0.1/24"), net("tap=many,address=fd00::1/64,queues=2")
assert len(many.ports) == 2
assert "another program has it open" in says("tap=one")
assert "there is such an interface already" in says("tap=one,address=10.0.0.2/24")
assert "multi_queue" in says("tap=one,queues=2")
net("tap=many").close()  # made for several, and used with one
assert net("tap=%s,queues=1,offloads=off" % "many").offloads == 0
"""
    )


def test_a_bridge_joins_two() -> None:
    in_namespace(
        OPEN
        + """
with IPRoute() as route:
    route.link("add", ifname="br0", kind="bridge")
    route.link("set", index=route.link_lookup(ifname="br0")[0], state="up")
a, b = net("tap=a,bridge=br0"), net("tap=b,bridge=br0,queues=2")
for back in (a, b):
    back.configure(12)
import time
deadline = time.monotonic() + 60
got = 0
while not got:  # the bridge's ports take a moment to be forwarding
    assert time.monotonic() < deadline
    a.ports[0].send([bytes(12), frame(1)])
    for port in b.ports:
        views = [bytearray(12), bytearray(70000)]
        while size := port.receive(views):
            got += views[1][: size - 12] == frame(1)
"""
    )


def test_queues_are_detached_and_attached() -> None:
    in_namespace(
        OPEN
        + """
back = net("tap=tap0,queues=3,address=10.0.0.1/24")
back.configure(12)
end = raw("tap0")
for count in (1, 3, 2, 1):
    back.enable_pairs(count)
    for port in back.ports:
        while port.receive([bytearray(70000)]):
            pass
    for n in range(30):
        # A flow each: they are spread by the addresses.
        packet = bytearray(frame(n, 200))
        packet[0:6] = n.to_bytes(6, "big")
        end.send(bytes(packet))
    got = []
    for n, port in enumerate(back.ports[:count]):
        while port.receive([bytearray(70000)]):
            got.append(n)
    assert len(got) >= 30 and set(got) <= set(range(count)), (count, got)
"""
    )


def test_a_guest_may_take_any_offloads() -> None:
    in_namespace(
        OPEN
        + """
import fcntl, struct
back = net("tap=tap0,address=10.0.0.1/24")
end = raw("tap0")
taken = []
set_offloads = back._set_offloads
back._set_offloads = lambda offloads: taken.append(set_offloads(offloads)) or taken[-1]
for bits in range(64):
    wanted = bits & 0xF | (bits & 0x30) << 1
    if not wanted & ~back.offloads:
        back.set_offloads(wanted)
assert all(taken) and len(taken) >= 16
"""
    )


def test_an_interface_that_goes_away_closes_the_port() -> None:
    in_namespace(
        OPEN
        + """
back = net("tap=tap0,address=10.0.0.1/24")
with IPRoute() as route:
    route.link("del", index=route.link_lookup(ifname="tap0")[0])
assert back.ports[0].receive([bytearray(70000)]) == 0
assert not back.connected
back.ports[0].send([bytes(12), frame(1)])
back.configure(10)
back.set_offloads(1)
back.lost()
back.configure(12)
back.set_offloads(0)
"""
    )


def test_a_descriptor_that_is_open_already() -> None:
    in_namespace(
        OPEN
        + """
first = net("tap=tap0,address=10.0.0.1/24")
fd = first.ports[0].fd
second = net(f"fd={fd}")
assert second.has_header and second.offloads == first.offloads
assert second.ports[0].fd != fd
first.close()
second.configure(12)
end = raw("tap0")
second.ports[0].send([bytes(12), frame(3)])
ours(end, frame(3))
null = os.open("/dev/null", os.O_RDWR)
assert "it is no tap" in says(f"fd={null}")
assert f"fd={null}:" in says(f"fd={null}")
tun = os.open("/dev/net/tun", os.O_RDWR)
assert "no interface yet" in says(f"fd={tun}")
assert "open" in says("fd=999")
"""
    )

