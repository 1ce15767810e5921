"""What a user may say about a network card, and QEMU's way of saying it."""

from __future__ import annotations

import json

import pytest

from pyvmm.errors import ConfigError
from pyvmm.net.options import NetOptions, complete


def test_words() -> None:
    tap = NetOptions.parse("tap=tap0,mac=02-0:0:0:0:A,mtu=9000,queues=4,offloads=off,id=lan")
    assert (tap.kind, tap.tap, tap.mac, tap.mtu, tap.queues, tap.offloads, tap.name) == (
        *("tap", "tap0", "02:00:00:00:00:0a", 9000, 4, False, "lan"),
    )
    passt = NetOptions.parse("passt,forward=8080:80,forward=udp:5353:53,forward=127.0.0.1/2222")
    assert passt == NetOptions("passt", forward=["8080:80", "udp:5353:53", "127.0.0.1/2222"])
    assert NetOptions.parse("unix=/run/a,,b.sock,server=on") == NetOptions("unix", path="/run/a,b.sock", server=True)
    assert NetOptions.parse("fd=7") == NetOptions("fd", fd=7)
    assert NetOptions() == NetOptions.parse("passt")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "begin with tap=NAME"),
        ("tap", "begin with tap=NAME"),
        ("passt=1", "begin with tap=NAME"),
        ("mac=02:00:00:00:00:01", "begin with tap=NAME"),
        ("tap=", "give the name of a network interface"),
        ("tap=a/b", "give the name of a network interface"),
        ("tap=abcdefghijklmnop", "at most 15"),
        ("tap=t,mac=01:00:00:00:00:01", "group"),
        ("tap=t,mac=0:0:0:0:0:0", "nobody's"),
        ("tap=t,mac=02:00:00:00:00", "six bytes"),
        ("tap=t,mac=02:00:00:00:00:100", "six bytes"),
        ("tap=t,mac=02:00:00:00:00:-1", "six bytes"),
        ("tap=t,mtu=67", "from 68 to 65535"),
        ("tap=t,mtu=x", "give a number"),
        ("tap=t,queues=17", "from 1 to 16"),
        ("passt,queues=2", "only a tap has more than one"),
        ("tap=t,forward=1:2", "forward is for passt"),
        ("passt,forward=1:2:3", "give HOST:GUEST"),
        ("passt,forward=0:1", "give HOST:GUEST"),
        ("passt,forward=65536:1", "give HOST:GUEST"),
        ("passt,forward=all", "give HOST:GUEST"),
        ("passt,forward=-x/1:1", "give HOST:GUEST"),
        ("passt,server=on", "server is for unix"),
        ("passt,path=x", "joined to one thing"),
        ("passt,unix=x", "joined to one thing"),
        ("tap=t,address=10.0.0.1", "address and its prefix"),
        ("tap=t,address=10.0.0.1/24,bridge=b", "give bridge only"),
        ("tap=t,offloads=maybe", "use on or off"),
        ("tap=t,mcc=1", "did you mean"),
        ("tap=t,up", "has no value"),
        ("unix=\0", "path of a socket"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_give_instead(words: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        NetOptions.parse(words)


def test_a_forward_that_looks_like_an_option_of_passts_is_refused() -> None:
    for forward in ("--help/1:1", "-1/1:1", "tcp:--pcap/1", "1:1 --pcap x"):
        with pytest.raises(ConfigError, match="give HOST:GUEST"):
            NetOptions("passt", forward=[forward])


def test_each_card_of_a_machine_has_a_name_and_an_address_that_stay() -> None:
    nets = [NetOptions("tap", tap="a"), NetOptions("tap", tap="b"), NetOptions("passt", id="user")]
    done = complete(nets, None)
    assert [net.id for net in done] == ["net0", "net1", "user"]
    addresses = [bytes.fromhex(str(net.mac).replace(":", "")) for net in done]
    assert len(set(addresses)) == 3
    assert all(address[0] & 3 == 2 for address in addresses)  # local, and one card's
    assert complete(nets, None) == done
    assert complete(done, None) == done
    assert complete(nets, "00000000-0000-0000-0000-000000000001")[0].mac != done[0].mac
    ends = [complete([NetOptions("unix", path="/a", server=server)], None)[0].mac for server in (False, True)]
    assert ends[0] != ends[1]
    again = [NetOptions(**values) for values in json.loads(json.dumps([net.plain() for net in done]))]
    assert tuple(again) == done


@pytest.mark.parametrize("same", ["id=x", "mac=02:00:00:00:00:01"])
def test_two_cards_with_one_name_or_address(same: str) -> None:
    with pytest.raises(ConfigError, match="two network cards with"):
        complete([NetOptions.parse(f"tap=a,{same}"), NetOptions.parse(f"tap=b,{same}")], None)
    with pytest.raises(ConfigError, match="two network cards with tap=a"):
        complete([NetOptions.parse("tap=a"), NetOptions.parse("tap=a")], None)
