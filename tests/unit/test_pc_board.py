"""The pc board without a vCPU: its parts at their places, drives by index, firmware, reset. Needs no /dev/kvm."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from errno import EIO
from pathlib import Path
from typing import Any

import pytest

import pyvmm
from pyvmm import ConfigError, Machine, StateError
from pyvmm.block.options import DriveOptions
from pyvmm.boards import pc as pc_board

IDS = {0x0000: 0x1237_8086, 0x0800: 0x7000_8086, 0x0900: 0x7010_8086, 0x0B00: 0x7113_8086}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([n]) * 512 for n in range(64)))
    return path


def board(**options: Any) -> Machine:
    return Machine(accel="qtest", memory_mib=4, **options)


@pytest.fixture
def pc(image: Path) -> Iterator[Machine]:
    with board(drives=[image]) as machine:
        yield machine


def config_read(m: Machine, address: int, size: int = 4) -> int:
    m.pio.write(0xCF8, 4, 0x8000_0000 | address & ~3)
    return m.pio.read(0xCFC + (address & 3), size)


def config_write(m: Machine, address: int, size: int, value: int) -> None:
    m.pio.write(0xCF8, 4, 0x8000_0000 | address & ~3)
    m.pio.write(0xCFC + (address & 3), size, value)


def identify(m: Machine, base: int, unit: int) -> bytes:
    """IDENTIFY DEVICE by PIO; empty where nobody answers."""
    m.pio.write(base + 6, 1, 0xA0 | unit << 4)
    m.pio.write(base + 7, 1, 0xEC)
    if not m.pio.read(base + 7, 1) & 0x08:
        return b""
    return b"".join(m.pio.read(base, 2).to_bytes(2, "little") for _ in range(256))


def test_the_chipset_is_on_the_bus(pc: Machine) -> None:
    found = {at: config_read(pc, at) for at in range(0, 0x1_0000, 0x100)}
    assert {at: value for at, value in found.items() if value != 0xFFFF_FFFF} == IDS


def test_an_interrupt_shared_by_pci_and_isa_stays_up_until_both_are_done(pc: Machine) -> None:
    levels: list[int] = []
    pc.irq_controllers["pic"].inputs.watch = lambda n, level: levels.append(level) if n == 14 else None
    config_write(pc, 0x860, 1, 14)  # PIRQA to the first IDE channel's interrupt
    function, channel = pc.devices["piix3"].intx(1, 0), pc.irq_line(14)  # type: ignore[attr-defined]  # a Piix3Isa
    function.raise_()
    channel.pulse()
    assert levels == [1]
    function.lower()
    assert levels == [1, 0]


def test_a_drive_answers_at_its_place_and_nobody_at_the_others(pc: Machine) -> None:
    data = identify(pc, 0x1F0, 0)
    assert int.from_bytes(data[120:124], "little") == 64  # words 60 and 61: sectors by LBA28
    assert identify(pc, 0x1F0, 1) == identify(pc, 0x170, 0) == identify(pc, 0x170, 1) == b""


def test_a_sector_is_read_by_pio(pc: Machine) -> None:
    for port, value in ((2, 1), (3, 7), (4, 0), (5, 0), (6, 0xE0), (7, 0x20)):
        pc.pio.write(0x1F0 + port, 1, value)
    pc.drain()
    assert pc.pio.read(0x1F7, 1) & 0x89 == 0x08
    assert b"".join(pc.pio.read(0x1F0, 4).to_bytes(4, "little") for _ in range(128)) == bytes([7]) * 512
    assert pc.pio.read(0x1F7, 1) & 0x88 == 0


def test_pam_switches_what_shows_below_1_mib(pc: Machine) -> None:
    gpa = 0xC_0000
    pc.memory_map.write(gpa, b"lost")
    assert pc.memory_map.read(gpa, 4) == b"\xff" * 4
    config_write(pc, 0x5A, 1, 0x33)
    pc.memory_map.write(gpa, b"kept")
    assert pc.memory_map.read(gpa, 4) == b"kept"
    config_write(pc, 0x5A, 1, 0x11)
    pc.memory_map.write(gpa, b"lost")
    assert pc.memory_map.read(gpa, 4) == b"kept"
    config_write(pc, 0x72, 1, 0x4A)  # D_OPEN
    pc.memory_map.write(0xA_0000, b"smm")
    config_write(pc, 0x72, 1, 0x0A)
    assert pc.memory_map.read(0xA_0000, 3) == b"\xff" * 3
    assert pc.memory.read(0xA_0000, 3) == b"smm"


def test_bus_master_and_pm_blocks_go_where_the_guest_says(pc: Machine) -> None:
    assert pc.pio.read(0xC002, 1) == 0xFF
    config_write(pc, 0x920, 4, 0xC000)
    config_write(pc, 0x904, 2, 5)
    assert pc.pio.read(0xC002, 1) != 0xFF
    config_write(pc, 0xB40, 4, 0x600)
    config_write(pc, 0xB80, 1, 1)
    assert pc.pio.find(0x600) is not None
    config_write(pc, 0x920, 4, 0xD000)
    assert pc.pio.find(0xC000) is None
    assert pc.pio.read(0xD00A, 1) != 0xFF


def test_a_reset_brings_the_board_back(pc: Machine) -> None:
    config_write(pc, 0x5A, 1, 0x33)
    config_write(pc, 0x920, 4, 0xC000)
    config_write(pc, 0x904, 2, 5)
    pc.pio.write(0xCF9, 1, 6)
    assert config_read(pc, 0x5A, 1) == 0
    assert pc.pio.find(0xC000) is None
    assert pc.memory_map.read(0xC_0000, 1) == b"\xff"


def test_time_stands_still_until_it_is_moved(pc: Machine) -> None:
    before = pc.clock.now_ns()
    pc.clock.step(1_000_000)  # type: ignore[attr-defined]  # a VirtualClock
    assert pc.clock.now_ns() == before + 1_000_000


def test_there_is_no_vcpu_to_run(pc: Machine) -> None:
    assert pc.cpus == []
    with pytest.raises(StateError, match="qtest"):
        pc.run(1)


def test_host_mistakes_are_one_sentence(tmp_path: Path, image: Path) -> None:
    odd = tmp_path / "odd.bin"
    odd.write_bytes(b"x" * 5000)
    for options, message in (
        ({"drives": [tmp_path / "none.img"]}, "none.img"),
        ({"drives": [tmp_path]}, "directory"),
        ({"firmware": odd}, "whole pages"),
        ({"drives": [f"file={image},if=ide"], "machine": "microvm"}, "microvm"),
        ({"drives": image}, "a list of drives"),
        ({"machine": "isapc"}, "use pc or microvm"),
        ({"boot": "x"}, "letters of c"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            board(**options)
        assert "\n" not in str(caught.value)


def test_the_same_image_is_not_opened_twice_for_writing(image: Path) -> None:
    with board(drives=[image]):
        with pytest.raises(ConfigError, match="lock"):
            board(drives=[image])
        with board(drives=[DriveOptions(image, locking=False)]):
            pass
    with board(drives=[image]):
        pass


def test_nothing_is_left_of_many_boards(image: Path) -> None:
    import os

    before = set(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with board(drives=[image], firmware=bytes(4096)) as machine:
            assert machine.memory_map.read(0xFFFF_F000, 4) == bytes(4)
    assert set(os.listdir("/proc/self/fd")) == before
    assert pyvmm.RunState.CLOSED is machine.state


def test_resume_tries_again_what_a_policy_has_put_aside(image: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_text('[inject-error]\niotype = "read"\nonce = "on"\nimmediately = "on"\n')
    with board(drives=[DriveOptions(f"blkdebug:{rules}:{image}", rerror="stop")]) as m:
        told: list[dict[str, Any]] = []
        m.events.listen(lambda event: told.append(event.data), "io-error")
        for port, value in ((0x1F2, 1), (0x1F3, 5), (0x1F6, 0xE0), (0x1F7, 0x20)):
            m.pio.write(port, 1, value)
        m.drain()
        assert (m.state.name, m.pio.read(0x1F7, 1)) == ("IO_ERROR", 0xD0)
        m.events.flush()
        assert told == [{"drive": "ide0-hd0", "operation": "read", "errno": EIO, "action": "stop"}]
        assert m.io_error == "ide0-hd0: read: Input/output error"
        m.resume()
        m.drain()
        assert (m.state.name, m.pio.read(0x1F7, 1)) == ("PAUSED", 0x58)
        assert m.pio.read(0x1F0, 2) == 0x0505
        with pytest.raises(StateError, match="no vCPU to run"):
            m.resume()


@pytest.mark.parametrize("size", [256 << 10, 2 << 20, 8 << 20])
def test_kvm_s_pages_are_reserved_and_under_no_firmware(tmp_path: Path, size: int) -> None:
    """Linux virt/kvm/api.rst, KVM_SET_TSS_ADDR and KVM_SET_IDENTITY_MAP_ADDR: no memory slot may be there.

    QEMU's place (target/i386/kvm/kvm.c, 0xfeffc000), which it tells its firmware in etc/e820 as well.
    """
    firmware = tmp_path / "firmware"
    firmware.write_bytes(bytes(size))
    with board(firmware=firmware) as m:
        entry = m.devices["fw_cfg"]
        names = [entry._items[key].name for key in entry._files]  # type: ignore[attr-defined]
        content = entry.content(0x20 + names.index("etc/e820"))  # type: ignore[attr-defined]
        told = list(struct.iter_unpack("<QQI", content))
        assert told == [(0, 4 << 20, 1), (0xFEFF_C000, 0x4000, 2)]
        for region in m.memory.ram:
            assert region.gpa + region.size_bytes <= 0xFEFF_C000 or region.gpa >= 0xFF00_0000


def test_a_firmware_that_is_a_link_to_nowhere_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that was taken away leaves such links; the next place is looked at."""
    (tmp_path / "gone.bin").symlink_to(tmp_path / "nowhere")
    (tmp_path / "bios.bin").write_bytes(b"")
    monkeypatch.setattr(pc_board, "FIRMWARE", (str(tmp_path / "gone.bin"), str(tmp_path / "bios.bin")))
    assert pc_board.find_firmware() == str(tmp_path / "bios.bin")
