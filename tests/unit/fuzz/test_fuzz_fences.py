"""The fuzz harness itself: its fences notice what they are for, a seed does the same again, a short run is clean."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz import driver
from fuzz.guest import BytesChoices, Choices, Guest, NoMoreChoices
from fuzz.harness import GUARD_BYTES, MARGIN_BYTES, MEMORY_BYTES, Escaped, FencedBoard, Stuck
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[3]


@pytest.fixture
def board(tmp_path: Path) -> Iterator[FencedBoard]:
    made = FencedBoard(tmp_path)
    made.power_up()
    yield made
    made.close()


def test_a_short_run_finds_nothing(tmp_path: Path) -> None:
    report = driver.run(tmp_path, 60_000, 3, watch=False)
    assert report.accesses >= 60_000
    assert len(report.steps) == 15  # each kind of step had its turn
    assert {"ata_command", "dma_command", "packet_command", "pci_config", "fw_cfg_dma"} <= set(report.steps)


def test_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--accesses", "3000", "--seed", "7"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "seed 7\n" in run.stdout
    assert "nothing raised" in run.stdout


def test_the_same_seed_does_the_same(tmp_path: Path) -> None:
    logs = []
    for name in ("a", "b"):
        directory = tmp_path / name
        directory.mkdir()
        board = FencedBoard(directory)
        board.power_up()
        guest = Guest(board, Choices(5))
        values = []
        for _ in range(300):
            guest.step()
            values.append(board.pio.read(0x1F7, 1) << 8 | board.pio.read(0x177, 1))
        logs.append((list(guest.log), values))
        board.close()
    assert logs[0] == logs[1]


@pytest.mark.parametrize("place", [-1, -GUARD_BYTES, MEMORY_BYTES, MEMORY_BYTES + GUARD_BYTES - 1])
def test_a_byte_beside_the_guests_memory_is_noticed(board: FencedBoard, place: int) -> None:
    board.check()
    address = board.memory.ram[0].host_address + place
    byte = ctypes.c_ubyte.from_address(address)
    byte.value ^= 1
    with pytest.raises(Escaped, match="outside of the guest's"):
        board.check()
    byte.value ^= 1
    board.check()


@pytest.mark.parametrize("name", ["small", "cd", "disc"])
def test_a_byte_of_a_read_only_image_is_noticed(board: FencedBoard, name: str) -> None:
    with board.path(name).open("r+b") as file:
        file.seek(1000)
        file.write(b"\0" if board.images[name][1000] else b"\1")
    with pytest.raises(Escaped, match=f"image {name} was written"):
        board.check()


@pytest.mark.parametrize("offset", [MARGIN_BYTES - 1, -MARGIN_BYTES])
def test_a_byte_beside_the_disk_is_noticed(board: FencedBoard, offset: int) -> None:
    with board.path("disk").open("r+b") as file:
        file.seek(offset, 2 if offset < 0 else 0)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes((byte[0] ^ 1,)))
    with pytest.raises(Escaped, match="outside of the drive's window"):
        board.check()


def test_another_size_of_the_image_is_noticed(board: FencedBoard) -> None:
    with board.path("disk").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(Escaped, match="another size"):
        board.check()


def test_a_write_to_the_rom_is_noticed(board: FencedBoard) -> None:
    rom = next(region for region in board.memory.ram if region.readonly)
    memoryview(rom)[5] ^= 1
    with pytest.raises(Escaped, match="ROM"):
        board.check()


def test_what_a_callback_raises_is_noticed(board: FencedBoard) -> None:
    board.machine.board.chassis.outcomes.callback_raised(ZeroDivisionError())
    with pytest.raises(Escaped, match="callback raised"):
        board.check()


def test_a_drive_that_does_not_answer_is_noticed(board: FencedBoard) -> None:
    board.check_alive()
    board.pio.unmap(board.pio.find(0x1F1))  # type: ignore[arg-type]  # it is mapped
    with pytest.raises(Stuck):
        board.check_alive()


def test_other_bytes_on_the_disk_are_noticed(board: FencedBoard) -> None:
    board.memory.write(0x2000, bytes(1024))
    read = board._read_dma
    board._read_dma = lambda unit, lba: bytes(len(read(unit, lba)))  # type: ignore[method-assign]
    with pytest.raises(Stuck, match="by DMA is 00000000"):
        board.check_alive()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="atheris has no build for this Python")
@pytest.mark.parametrize(
    "target", ["board", "virtio_blk", "virtio_console", "virtio_net", "virtio_ring", "virtio_vsock"]
)
def test_the_atheris_targets(tmp_path: Path, target: str) -> None:
    command = [sys.executable, f"tests/fuzz/fuzz_{target}.py", "-runs=300", "-seed=1", "-max_len=500", f"{tmp_path}/"]
    command.append(f"-artifact_prefix={tmp_path}/")
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Done 300 runs" in run.stderr
    assert list(tmp_path.iterdir())  # inputs that reached something new: the devices are instrumented


def test_a_fuzzers_bytes_decide() -> None:
    choices = BytesChoices(bytes((3, 0xFF, 0x01, 2, 9)))
    assert choices.below(2) == 1
    assert choices.number(12) == 0x1FF
    assert choices.pick("abcd") == "c"
    assert choices.chance(9) is False
    with pytest.raises(NoMoreChoices):
        choices.below(2)


@given(st.binary(max_size=4096))
@example(b"\x17" * 4000)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_input_of_a_fuzzer(shared_board: FencedBoard, data: bytes) -> None:
    shared_board.power_up()
    guest = Guest(shared_board, BytesChoices(data))
    try:
        while True:
            guest.step()
            shared_board.check_errors()
    except NoMoreChoices:
        shared_board.check_alive()
        shared_board.check()
