"""AML terms byte by byte where the specification has an example, and by iasl's own reading otherwise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.x86 import aml


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0xFFFF, "0bffff"),
        (0x1_0000, "0c00000100"),
        (0xFFFF_FFFF, "0cffffffff"),
        (0x1_0000_0000, "0e0000000001000000"),
        ((1 << 64) - 1, "0effffffffffffffff"),
    ],
)
def test_integers_take_the_shortest_form(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("COM1", b"COM1"),
        ("_S5", b"_S5_"),
        ("\\", b"\\\0"),
        ("\\_SB", b"\\_SB_"),
        ("^^FOO", b"^^FOO_"),
        ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"),
        ("\\_SB.PCI0.ISA.COM1", b"\\\x2f\x04_SB_PCI0ISA_COM1"),
    ],
)
def test_names(path: str, encoded: bytes) -> None:
    assert aml.name_string(path) == encoded


def test_a_name_segment_has_four_characters() -> None:
    with pytest.raises(ValueError, match="more than four"):
        aml.name_string("\\_SB.TOOLONG")


@pytest.mark.parametrize(
    ("content", "encoded"),
    [(0, "01"), (62, "3f"), (63, "4104"), (0xFFD, "4fff"), (0xFFE, "810001"), (0xFFFFC, "8fffff")],
)
def test_package_lengths(content: int, encoded: str) -> None:
    assert aml.package_length(content).hex() == encoded


@given(st.integers(0, (1 << 28) - 5))
def test_package_lengths_decode(content: int) -> None:
    data = aml.package_length(content)
    extra = data[0] >> 6
    assert len(data) == 1 + extra
    low = data[0] & (0xF if extra else 0x3F)
    assert low | int.from_bytes(data[1:], "little") << 4 == content + len(data)


def test_a_package_has_an_end() -> None:
    with pytest.raises(ValueError, match="too many"):
        aml.package_length(1 << 28)


def test_the_specifications_eisa_ids() -> None:
    # PNP0303 and PNP0C08, as the specification and every DSDT have them.
    assert aml.eisa_id("PNP0303").hex() == "0c41d00303"
    assert aml.eisa_id("PNP0C08").hex() == "0c41d00c08"


def test_resource_descriptors() -> None:
    assert aml.io(0x3F8, 8).hex() == "4701f803f8030108"
    assert aml.irq(4).hex() == "221000"
    assert aml.irq(9).hex() == "220002"
    assert aml.memory32(0xFEB0_0000, 0x200).hex() == "86090001" + "0000b0fe" + "00020000"
    assert aml.interrupt(5).hex() == "890600" + "01" + "01" + "05000000"
    assert aml.interrupt(5, edge=True, active_low=True)[3] == aml.CONSUMER | aml.EDGE | aml.ACTIVE_LOW
    assert aml.resources(aml.irq(4)).hex() == "1108" + "0a05" + "221000" + "7900"


def test_terms_nest() -> None:
    inner = aml.package(1)
    assert inner.hex() == "120301" + "01"
    assert aml.package(5, 0, "a", inner).hex() == "120c04" + "0a05" + "00" + "0d6100" + "12030101"
    assert aml.scope("\\_SB", aml.device("DEV0", aml.name("_UID", 7))).hex() == (
        "1014" + "5c5f53425f" + "5b820c" + "44455630" + "085f5549440a07"
    )
    assert aml.method("_STA", aml.returns(15)).hex() == "1409" + "5f535441" + "00" + "a40a0f"
    assert aml.method("_DSM", args=4, serialized=True)[-1] == 0x0C
