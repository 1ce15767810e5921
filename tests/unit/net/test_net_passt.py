"""passt: it is started, carries frames, and ends with whoever started it. In network namespaces of their own."""

from __future__ import annotations

import pytest
from boot_assets import LeftOutError
from netns import in_namespace, refusal

from pyvmm.errors import ConfigError
from pyvmm.net.options import NetOptions
from pyvmm.net.passt import hint, open_passt, what_it_said, words

# An interface with a default route, of which passt takes the addresses.
HEAD = """
import os, select, signal, socket
from pyroute2 import IPRoute
from pyvmm.errors import ConfigError
from pyvmm.net.open import open_net
from pyvmm.net.options import NetOptions

def net(words):
    return open_net(NetOptions.parse(words))

with IPRoute() as route:
    for name in ("lo", "up0"):
        if name == "up0":
            route.link("add", ifname=name, kind="bridge")
        index = route.link_lookup(ifname=name)[0]
        route.link("set", index=index, state="up")
    route.addr("add", index=index, address="192.0.2.10", prefixlen=24)
    route.route("add", dst="default", gateway="192.0.2.1")

def arp(back):
    guest, asked = b"\\x02" + bytes(5), socket.inet_aton("192.0.2.1")
    packet = b"\\xff" * 6 + guest + b"\\x08\\x06" + bytes.fromhex("0001080006040001")
    packet += guest + socket.inet_aton("192.0.2.10") + bytes(6) + asked
    port = back.ports[0]
    assert port.send([packet]) and port.flush()
    while True:
        select.select([port.fd], [], [], 20)
        view = bytearray(70000)
        size = port.receive([view])
        assert not port.closed
        if view[12:14] == b"\\x08\\x06" and view[20:22] == b"\\0\\2":
            return bytes(view[28:32]) == asked

def passts():
    return {int(pid) for pid in os.listdir("/proc") if pid.isdigit() and mine(pid)}

def mine(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().startswith(b"passt\\0") and os.readlink(f"/proc/{pid}/ns/net") == here
    except OSError:
        return False

here = os.readlink("/proc/self/ns/net")

def gone():
    # Each ends by itself.
    for pid in passts():
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([fd], [], [], 60)[0]
        os.close(fd)
    assert not passts()
"""


@pytest.fixture
def passt() -> None:
    """Also root may make no user namespace in a chroot (unshare(2)), and passt wants one."""
    if refused := refusal("unshare", "--user"):
        raise LeftOutError(f"passt wants a user namespace, and none may be made here: {refused}")


@pytest.mark.usefixtures("passt")
def test_it_answers_and_ends_with_the_machine() -> None:
    in_namespace(
        HEAD
        + """
back = net("passt,forward=18080:80,forward=udp:127.0.0.1/15353:53,mtu=9000")
assert arp(back)
listening = open("/proc/self/net/tcp").read() + open("/proc/self/net/tcp6").read()
assert f":{18080:04X} " in listening
assert f":{15353:04X} " in open("/proc/self/net/udp").read()
assert back.connected and not back.has_header and not back.offloads
try:
    net("passt,forward=18080:80")
except ConfigError as error:
    assert "18080" in str(error) and "forward ports that are free" in str(error), error
else:
    raise AssertionError
back.close()
gone()
"""
    )


@pytest.mark.usefixtures("passt")
def test_it_ends_where_its_machine_is_killed() -> None:
    in_namespace(
        HEAD
        + """
pid = os.fork()
if pid == 0:
    back = net("passt")
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(pid, 0)
gone()
"""
    )


@pytest.mark.usefixtures("passt")
def test_its_end_is_noticed() -> None:
    in_namespace(
        HEAD
        + """
back = net("passt")
assert arp(back)
for pid in passts():
    os.kill(pid, signal.SIGKILL)
while back.connected:
    assert select.select([back.ports[0].fd], [], [], 20)[0]
    back.ports[0].receive([bytearray(70000)])
"""
    )


@pytest.mark.usefixtures("passt")
def test_a_host_without_a_route_is_told_so() -> None:
    in_namespace(
        HEAD
        + """
with IPRoute() as route:
    route.link("del", index=index)
try:
    net("passt")
except ConfigError as error:
    assert "default route" in str(error), error
else:
    raise AssertionError
"""
    )


def test_where_it_is_missing_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="install the package passt"):
        open_passt(NetOptions("passt"))


def test_its_own_words() -> None:
    options = NetOptions.parse("passt,forward=8080:80,forward=udp:5353:53,forward=tcp:127.0.0.1/22,mtu=1300")
    assert words(options) == [
        *("--tcp-ports", "8080:80", "--tcp-ports", "127.0.0.1/22", "--udp-ports", "5353:53", "--mtu", "1300"),
    ]
    assert words(NetOptions("passt")) == []


def test_where_it_may_make_no_user_namespace_the_remedy_is_said() -> None:
    why = "Couldn't create user namespace: Operation not permitted"
    said = what_it_said(f"Don't run as root. Changing to nobody...\n{why}\n")
    assert said == why
    assert "give --net tap=NAME" in hint(said, NetOptions("passt"))
