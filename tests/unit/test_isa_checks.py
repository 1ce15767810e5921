"""The boards' ports and files are known before anything is made: an option that wants one of them is refused then."""

from __future__ import annotations

from typing import Any

import pytest

import pyvmm
from pyvmm import ConfigError, Machine, builder
from pyvmm.boards.isa import IsaBoard
from pyvmm.boards.isa_checks import files_in_use, ports_in_use


@pytest.mark.parametrize("machine", ["microvm", "pc"])
@pytest.mark.parametrize("options", [{}, {"testdev": True, "vga": "text", "debugcon": print}])
def test_they_are_those_of_the_devices(machine: str, options: dict[str, Any]) -> None:
    with Machine(accel="qtest", machine=machine, memory_mib=4, debug_exit=None, **options) as m:
        mapped = {port for r in m.pio.regions for port in range(r.base or 0, (r.base or 0) + r.size)}
        kind = type(m.board)
        assert issubclass(kind, IsaBoard)
        ports = ports_in_use(m.config, kind.chipset_ports(), debugcon=kind.has_debugcon(m.config))
        listed = [port for first, count, _ in ports for port in range(first, first + count)]
    assert sorted(listed) == sorted(mapped)
    assert not {0xF4, 0xF5, 0xF6, 0xF7} & mapped  # where isa-debug-exit is unless something else is asked for


@pytest.mark.parametrize("machine", ["microvm", "pc"])
def test_the_files_are_those_of_fw_cfg(machine: str) -> None:
    with Machine(accel="qtest", machine=machine, memory_mib=4, fw_cfg={"opt/mine": b"x"}) as m:
        fw_cfg = m.devices["fw_cfg"]
        names = {fw_cfg._items[key].name for key in fw_cfg._files}  # type: ignore[attr-defined]  # a FwCfg
        kind = type(m.board)
        assert issubclass(kind, IsaBoard)
        assert names == {*files_in_use(kind.firmware_files()), "opt/mine"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"debug_exit": 0x3F8}, "of its 4 ports COM1 has 0x3f8: give another port, or None"),
        ({"debug_exit": 0x3F5}, "COM1 has 0x3f8"),
        ({"debug_exit": 0x3FF}, "COM1 has 0x3ff"),
        ({"debug_exit": 0x402}, "the debug console has 0x402"),
        ({"debug_exit": 0xE8, "testdev": True}, "pc-testdev has 0xe8"),
        ({"debug_exit": 0x1F7, "machine": "pc"}, "an IDE channel has 0x1f7"),
        ({"debug_exit": 0x3D4, "vga": "text"}, "VGA has 0x3d4"),
        ({"fw_cfg": {"etc/e820": b""}}, "fw_cfg file 'etc/e820': the board makes it itself, leave it out"),
        ({"fw_cfg": {"etc/table-loader": b""}, "machine": "pc"}, "fw_cfg file 'etc/table-loader'"),
    ],
)
def test_what_the_board_has_itself_is_told_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], sentence: str
) -> None:
    def nobody(*args: object) -> None:
        raise AssertionError("it is being made")

    monkeypatch.setattr(builder, "make_memory", nobody)
    with pytest.raises(ConfigError) as caught:
        pyvmm.Machine(flat=b"\xf4", **options)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("options", [{"debug_exit": 0x501}, {"debug_exit": 0xE8}, {"debug_exit": 0x1F7}])
def test_a_port_that_is_free_is_taken(options: dict[str, Any]) -> None:
    with Machine(accel="qtest", machine="microvm", memory_mib=4, **options) as m:
        region = m.pio.find(options["debug_exit"])
    assert region is not None
