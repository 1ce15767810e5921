"""A target that is made up, and a peer that keeps what it is sent: the other two ends of a gdb session."""

from __future__ import annotations

from typing import Any

from pyvmm.control.gdb.registers import all_registers
from pyvmm.control.gdb.target import Stop


class FakeCpu:
    def __init__(self, index: int) -> None:
        self.index = index


class FakeRegisters:
    table = all_registers(avx=False)
    size_bytes = sum(r.size_bytes for r in table)

    def xml(self) -> str:
        return "<target>" + "#$}*x" * 4000 + "</target>"


class FakeTarget:
    """Notes what it is asked for. ``stopped`` is what it stands with, None while it runs."""

    registers = FakeRegisters()
    holds_interrupts = True

    def __init__(self, cpus: int = 2) -> None:
        self.cpus = [FakeCpu(n) for n in range(cpus)]
        self.log: list[Any] = []
        self.stopped: Stop | None = Stop(2, None)
        self.next_stop: Stop | None = None  # what a resume comes to at once
        self.memory = bytearray(range(256)) * 64
        self.values = [list(range(len(self.registers.table))) for _ in self.cpus]
        self.fails: Exception | None = None

    def _note(self, *what: Any) -> None:
        self.log.append(what if len(what) > 1 else what[0])
        if self.fails is not None:
            raise self.fails

    def attach(self) -> None:
        self._note("attach")

    def detach(self) -> None:
        self._note("detach")

    def leave(self) -> None:
        self.log.append("leave")

    def kill(self) -> None:
        self._note("kill")

    def remove_all(self) -> None:
        self._note("remove all")

    def interrupt(self) -> None:
        self.log.append("interrupt")
        self.stopped = Stop(2, None)

    def no_steps(self) -> None:
        pass

    @property
    def runs(self) -> bool:
        return self.stopped is None

    def stop(self) -> Stop | None:
        return self.stopped

    def resume(self, steps: dict[int, bool], hold: bool) -> None:
        self._note("resume", dict(steps), hold)
        self.stopped = self.next_stop

    def read_registers(self, index: int) -> list[int]:
        return self.values[index]

    def write_registers(self, index: int, changed: dict[int, int]) -> None:
        self._note("write", index, changed)

    def read(self, index: int, address: int, size: int, *, physical: bool) -> bytes:
        self._note("read", index, physical)
        return bytes(self.memory[address : address + size])

    def write(self, index: int, address: int, data: bytes, *, physical: bool) -> None:
        self._note("write", index, address, data, physical)

    def insert(self, index: int, kind: int, address: int, length: int) -> None:
        self._note("insert", index, kind, address, length)

    def remove(self, kind: int, address: int, length: int) -> None:
        self._note("remove", kind, address, length)

    def describe(self) -> str:
        return "made up"

    def describe_cpu(self, index: int) -> str:
        return f"CPU#{index}"

    def dump(self) -> str:
        return "x" * 1_000_000

    def reset(self) -> None:
        self._note("reset")

    def nmi(self, index: int) -> None:
        self._note("nmi", index)


class FakePeer:
    def __init__(self) -> None:
        self.sent = bytearray()
        self.closed = self.held = self.crowded = False

    def send(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True

    def hold(self) -> None:
        self.held = True

    def go_on(self) -> None:
        self.held = False
