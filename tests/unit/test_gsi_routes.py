"""The table of GSI routes, which KVM takes whole: numbers given out, given back, refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.gsi_routes import GsiRoutes, Route

PINS: list[Route] = [(0, "irqchip", 0, 0), (0, "irqchip", 2, 2), (1, "irqchip", 0, 1), (5, "irqchip", 2, 5)]


class Kvm:
    """Takes tables, until it is told not to."""

    def __init__(self, limit: int = 10) -> None:
        self.tables: list[list[Route]] = []
        self.refuses = False
        self.routes = GsiRoutes(self.apply, limit, "the pins", PINS, 6)

    def apply(self, table: list[Route]) -> None:
        if self.refuses:
            raise OSError("no")
        self.tables.append(table)


def test_the_whole_table_goes_each_time() -> None:
    kvm = Kvm()
    gsi = kvm.routes.add_msi((0xFEE0_0000, 0x41), "net")
    assert gsi == 6
    assert kvm.tables == [[*PINS, (6, "msi", 0xFEE0_0000, 0x41)]]
    kvm.routes.change_msi(gsi, (0xFEE0_1000, 0x42))
    assert kvm.tables[1:] == [[*PINS, (6, "msi", 0xFEE0_1000, 0x42)]]
    kvm.routes.remove(gsi)
    assert kvm.tables[2:] == [PINS]


def test_what_is_no_message_leads_nowhere_and_keeps_its_number() -> None:
    kvm = Kvm()
    gsi = kvm.routes.add_msi(None, "net")
    assert (gsi, kvm.tables) == (6, [PINS])
    assert kvm.routes.owner(6) == "net"
    assert kvm.routes.add_msi((0, 1), "disk") == 7
    kvm.routes.change_msi(gsi, (0, 2))
    assert kvm.tables[-1] == [*PINS, (6, "msi", 0, 2), (7, "msi", 0, 1)]
    kvm.routes.change_msi(gsi, None)
    assert kvm.tables[-1] == [*PINS, (7, "msi", 0, 1)]


def test_the_lowest_free_number_is_given() -> None:
    routes = Kvm().routes
    assert [routes.add_msi((0, n), f"owner {n}") for n in range(3)] == [6, 7, 8]
    routes.remove(7)
    assert routes.owner(7) is None
    assert routes.add_msi((0, 9), "another") == 7
    assert [routes.owner(gsi) for gsi in (0, 5, 6, 7, 8)] == ["the pins", "the pins", "owner 0", "another", "owner 2"]


def test_a_number_that_is_taken_is_refused_with_both_names() -> None:
    routes = Kvm().routes
    assert routes.add_msi((0, 1), "disk", gsi=9) == 9
    with pytest.raises(ConfigError, match=r"GSI 9 is disk's: net needs another one"):
        routes.add_msi((0, 2), "net", gsi=9)
    with pytest.raises(ConfigError, match=r"GSI 5 is the pins's: net needs another one"):
        routes.add_msi((0, 2), "net", gsi=5)


def test_a_full_table_is_refused() -> None:
    kvm = Kvm(limit=6)
    kvm.routes.add_msi((0, 0), "net")
    kvm.routes.add_msi(None, "net")  # it may become a message later
    before = list(kvm.tables)
    with pytest.raises(ConfigError, match="disk wants a GSI, and KVM takes 6 routes at most"):
        kvm.routes.add_msi((0, 2), "disk")
    assert kvm.tables == before


def test_where_kvm_refuses_nothing_has_changed() -> None:
    kvm = Kvm()
    gsi = kvm.routes.add_msi((0, 1), "net")
    table = kvm.routes.table
    kvm.refuses = True
    for act in (
        lambda: kvm.routes.add_msi((0, 2), "disk"),
        lambda: kvm.routes.change_msi(gsi, (0, 2)),
        lambda: kvm.routes.remove(gsi),
    ):
        with pytest.raises(OSError, match="no"):
            act()
        assert kvm.routes.table == table


@given(st.lists(st.integers(0, 12)))
def test_against_a_model(steps: list[int]) -> None:
    """A step gives the number back where it is taken, else asks for any."""
    kvm = Kvm(limit=100)
    taken: dict[int, int] = {}
    for n, step in enumerate(steps):
        if step in taken:
            kvm.routes.remove(step)
            del taken[step]
        else:
            gsi = kvm.routes.add_msi((0, n), "net")
            assert gsi == min(set(range(6, 40)) - set(taken))
            taken[gsi] = n
        assert kvm.tables[-1] == [*PINS, *((gsi, "msi", 0, taken[gsi]) for gsi in sorted(taken))]
