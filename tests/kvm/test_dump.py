"""The state of every vCPU of a machine that runs: by Machine.dump, and by Ctrl-A r on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from console import CTRL_A, pyvmm_run
from guests import PASSED, PORT, Guest, Recorder

from pyvmm import Machine

# Waits until a read of the device's port gives something else than 0.
WAITING = """
program:
        mov     $DEVICE_PORT, %dx
        mov     $0x1234567, %ebx
wait:   in      (%dx), %eax
        test    %eax, %eax
        jz      wait
        finish  0
"""
# mov $0x5a5a, %bx; then on COM1 "!"; jmp .
SPIN = bytes.fromhex("bb5a5a baf803 b021 ee ebfe")


def test_a_machine_that_runs_goes_on(boot: Callable[..., Guest]) -> None:
    guest = boot(WAITING)
    go_on: list[int] = []
    recorder = Recorder(lambda offset, size: len(go_on))
    guest.machine.pio.map(PORT, 4, recorder)
    guest.start()
    recorder.wait_for(2)
    text = guest.machine.dump()
    assert text.startswith("vCPU 0, machine running\n")
    assert "rbx 0000000001234567" in text
    go_on.append(1)
    guest.wait()
    assert guest.machine.status == PASSED


def test_on_the_terminal(tmp_path: Path) -> None:
    flat = tmp_path / "spin"
    flat.write_bytes(SPIN)
    with pyvmm_run("--flat", str(flat)) as console:
        console.expect("!", 60)
        for _ in range(2):
            console.send(CTRL_A + "r")
            console.expect("vCPU 0, machine running", 60)
            console.expect("rbx 0000000000005a5a", 60)
        console.send(CTRL_A + "x")
        assert console.wait(60) == 0


def test_before_the_start() -> None:
    with Machine(memory_mib=4, flat=SPIN, cpus=2) as machine:
        assert [line for line in machine.dump().splitlines() if line.startswith("vCPU")] == [
            "vCPU 0, machine prelaunch",
            "vCPU 1, machine prelaunch",
        ]
