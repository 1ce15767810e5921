"""MachineBase: what a machine is made of, and its end. What it can do stands in the classes upon it: RunningMachine,
SavingMachine, MovingMachine, and Machine (machine.py), which is the one to use.
"""

from __future__ import annotations

import sys
from posix import getpid

from pyvmm import builder
from pyvmm import run_control as states
from pyvmm.errors import StateError
from pyvmm.light import Lock, Thread
from pyvmm.run_state import RunState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from pyvmm.address_space import AddressSpace
    from pyvmm.block.backend import BlockBackend
    from pyvmm.boards.board import Board
    from pyvmm.breakpoints import Breakpoints
    from pyvmm.builder import MemorySource
    from pyvmm.chardev import Chardev
    from pyvmm.cpu import Cpu
    from pyvmm.device import Device
    from pyvmm.devices.irq_pins import ControllerPins
    from pyvmm.devices.vga_text import VgaText
    from pyvmm.event_loop import EventLoop
    from pyvmm.irqchip import Irqchip
    from pyvmm.kvm.system import Kvm
    from pyvmm.kvm.vm import Vm
    from pyvmm.kvm_listener import KvmListener
    from pyvmm.machine_state import MachineState
    from pyvmm.reset_count import ResetCount
    from pyvmm.spec import Spec
    from pyvmm.terminal import Terminal

ReadOnly = type(type.__dict__)  # types.MappingProxyType, whose module nothing else needs


class MachineBase:
    """Its parts by name, and what each call asks first: whether there is a machine to speak of."""


    _closed = True  # until there is something to close
    def _make(
        self,
        config: Spec,
        board: type[Board] | None,
        snapshot: MemorySource | None = None,
        *,
        fresh: bool = True,
        later: bool = False,
        late: bool = False,
    ) -> None:
        self.config = config
        self._pid = getpid()
        self._closing = Lock()
        self._adding = Lock()  # of what is made once; close() waits for threads that may want it, and does not hold it
        made = builder.build(config, board, self, snapshot, fresh=fresh, later=later, late=late)
        self._chassis, self._board, self._platform = made
        self._closed = False
        chassis = self._chassis
        self.pio: AddressSpace = chassis.pio
        self.mmio: AddressSpace = chassis.mmio
        self.memory = chassis.memory
        self.memory_map = self._board.memory_map
        self.clock = chassis.clock
        self.event_loop: EventLoop = chassis.loop
        self.control = chassis.control
        self.events = chassis.events
        self.drives = chassis.drives
        self.backends: Mapping[str, BlockBackend] = chassis.drives.backends
        self.cpus: list[Cpu] = self._platform.cpus

    # -- what it is made of --------------------------------------------------------------------------------

    @property
    def board(self) -> Board:
        """What it is made of besides its processors; all of it, made by now."""
        self._board.arrive()
        return self._board

    @property
    def consoles(self) -> Mapping[str, Chardev]:
        """The host's ends of its consoles, by name."""
        self._board.arrive()
        return self._chassis.consoles.by_name

    @property
    def irqchip(self) -> Irqchip:
        """Its interrupt controllers, and the ways to interrupt the guest."""
        self._board.arrive()
        return self._platform.irqchip

    @property
    def devices(self) -> Mapping[str, Device]:
        """The board's devices by name."""
        parts: Mapping[str, Device] = ReadOnly(dict(self.board.parts))
        return parts

    @property
    def kvm(self) -> Kvm:
        """/dev/kvm. StateError without one, as the next."""
        return self._platform.kvm

    @property
    def vm(self) -> Vm:
        return self._platform.vm

    @property
    def kvm_listener(self) -> KvmListener:
        """What tells KVM of all that is mapped; with the dirty log of memory."""
        return self._platform.listener

    @property
    def vga(self) -> VgaText | None:
        """With vga="text": ``lines()`` is what the guest has on its screen, ``cursor`` where that is."""
        return self.board.vga

    @property
    def terminal(self) -> Terminal | None:
        """Where a console is on "stdio": the owner of standard input and output."""
        return self._chassis.consoles.terminal

    @property
    def chardevs(self) -> list[Chardev]:
        """The consoles' host ends that the machine has made, and closes."""
        self._board.arrive()
        return self._chassis.consoles.made

    @property
    def resets(self) -> ResetCount:
        """How often the guest has reset itself, and why last."""
        return self._chassis.power.resets

    @property
    def io_error(self) -> str:
        """What failed when a drive's policy last stopped the machine."""
        return self.drives.io_error

    @property
    def breakpoints(self) -> Breakpoints | None:
        """What a debugger (``serve_gdb``) has set in it, while there is one: bytes of its memory may be such."""
        return self._chassis.breakpoints

    @property
    def irq_controllers(self) -> Mapping[str, ControllerPins]:
        """The pins of the interrupt controllers by name, where those are in Python: to watch and to drive them."""
        return self.irqchip.controllers

    # -- what a call may need ------------------------------------------------------------------------------

    def _all_state(self, call: str) -> MachineState:
        from pyvmm.machine_state import MachineState

        self._usable(call)
        self._not_from_inside(call)
        if self._chassis.origin is not None:
            self._chassis.origin.complete()
        return MachineState(self._chassis, self.board, self._platform)

    def _same_process(self, call: str) -> None:
        if getpid() != self._pid:
            raise StateError(f"{call}() in a child of fork: the VM is its parent's, close() is all that is left here")

    def _usable(self, call: str) -> None:
        self._same_process(call)
        if self.control.state is RunState.CLOSED:
            raise StateError(f"{call}(): the machine is closed: make another one")

    def _not_from_inside(self, call: str) -> None:
        self._same_process(call)
        if self._chassis.on_own_thread():
            raise StateError(f"{call}() {states.FROM_INSIDE}")

    # -- the end -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End everything and give it back: threads, descriptors, memory. Idempotent; a second caller waits for it.

        HostError, when all is given back, where something that the guest has written could not be brought to its
        image. StateError in a handler or a callback of this machine. In a child of ``os.fork`` it closes the child's
        descriptors and mappings and does nothing else.
        """
        if self._closed:
            return
        if getpid() != self._pid:
            self._closed = True
            self.control.abandon()
            self._chassis.closers.abandon()
            return
        self._not_from_inside("close")
        with self._closing:
            if self._closed:
                return
            # Where this is interrupted the threads may still run: nothing they use has been closed, and close() can be
            # called again.
            self.control.close()
            try:
                self._chassis.closers.close()
            except Exception:
                self._gone()  # all was given back all the same
                raise
            self._gone()

    def _gone(self) -> None:
        self._chassis.let_go()
        self._closed = True

    def __del__(self) -> None:
        # As the interpreter ends, its daemon threads stand still for good: nobody may wait for them.
        if self._closed or sys.is_finalizing():
            return
        if getpid() != self._pid:
            self.close()
            return
        import warnings

        try:
            warnings.warn(f"{self!r} was dropped without close()", ResourceWarning, source=self, stacklevel=2)
        finally:
            if self._chassis.on_own_thread():
                # The collector came by on one of its threads, which can't wait for itself.
                Thread(self.close).start()
            else:
                self.close()

    def __reduce__(self) -> str:
        raise StateError("a machine can't be copied or sent: it is descriptors, threads and memory of this process")

    def __repr__(self) -> str:
        if self._closed:
            return "<Machine closed>"
        return f"<Machine {self.config.machine}, {len(self.cpus)} vCPUs, {self.control.state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
