"""Compiled units drive interrupt lines without the GIL: KVM's take none at all, a Python sink takes it for its call."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from guests import TIMEOUT_S, Guest

from pyvmm.irq import IrqWire
from pyvmm.kvm.vm import IOAPIC

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEADLINE_S = TIMEOUT_S
IRQ = 5
IOAPIC_IRR = 8 + 16  # of struct kvm_ioapic_state, behind kvm_irqchip's header: the pins that are up

BUILD = """
import sys
from Cython.Build import cythonize
from setuptools import Extension, setup
unit = Extension("line_driver", ["line_driver.pyx"])
setup(ext_modules=cythonize([unit], include_path=[sys.argv.pop(1)], language_level=3), script_args=["build_ext", "-i"])
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """line_driver.pyx, compiled here as a unit of the package's is."""
    directory = tmp_path_factory.mktemp("line_driver")
    (directory / "line_driver.pyx").write_text((HERE / "line_driver.pyx").read_text())
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(ROOT)], cwd=directory, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (path,) = directory.glob("line_driver.*.so")
    spec = importlib.util.spec_from_file_location("line_driver", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def beside(target: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def body() -> None:
        try:
            target()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, raised


def is_up(guest: Guest) -> bool:
    state = guest.machine.vm.get_irqchip(IOAPIC)
    return bool(int.from_bytes(state[IOAPIC_IRR : IOAPIC_IRR + 4], "little") >> IRQ & 1)


def test_kvms_controllers_see_the_level(boot: Callable[..., Guest], driver: ModuleType) -> None:
    guest = boot("finish")
    first, second = guest.machine.irq_line(IRQ), guest.machine.irq_line(IRQ)
    seen = []
    for line, level in ((first, 1), (second, 1), (first, 0), (second, 0)):
        driver.drive(line, [level])
        seen.append((is_up(guest), line.level))
    assert seen == [(True, 1), (True, 1), (True, 0), (False, 0)]


@pytest.mark.parametrize("through", ["its wire", "a router"])
def test_a_line_to_kvm_needs_no_gil(boot: Callable[..., Guest], driver: ModuleType, through: str) -> None:
    """All of it happens while another thread keeps the GIL."""
    guest = boot("finish")
    wire = guest.machine.irqchip.wire(IRQ)
    line = (wire if through == "its wire" else IrqWire(wire)).line()
    thread, raised = beside(lambda: driver.pulse_when_told(line, 1000))
    assert driver.hold_the_gil(DEADLINE_S)
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert raised == []
    assert line.level == 0
    assert not is_up(guest)


def test_a_python_sink_is_called(driver: ModuleType) -> None:
    levels: list[int] = []
    driver.drive(IrqWire(levels.append).line(), [1, 0, 0, 1, 1, 0])
    assert levels == [1, 0, 1, 0]


def test_what_a_sink_raises_reaches_the_caller(boot: Callable[..., Guest], driver: ModuleType) -> None:
    def refuse(level: int) -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        driver.drive(IrqWire(IrqWire(refuse)).line(), [1])
    guest = boot("finish")
    line = guest.machine.irq_line(IRQ)
    guest.close()
    with pytest.raises(Exception, match="this VM is closed"):
        driver.drive(line, [1])


def test_with_and_without_the_gil_at_once(driver: ModuleType) -> None:
    """A wire to a Python sink: who waits for it with the GIL gives that up, or the other never gets it."""
    levels: list[int] = []
    wire = IrqWire(IrqWire(levels.append))
    lines: list[Any] = [wire.line() for _ in range(4)]

    def in_python(line: Any) -> None:
        for _ in range(500):
            line.pulse()

    threads = [beside(lambda line=line: driver.drive(line, [1, 0] * 500)) for line in lines[:2]]
    threads += [beside(lambda line=line: in_python(line)) for line in lines[2:]]
    for thread, raised in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        assert raised == []
    assert levels == [1, 0] * (len(levels) // 2)
    assert wire.level == 0
