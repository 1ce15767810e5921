"""Late: a device that is made when somebody first wants it: a guest that touches it, or whoever asks for it.
LateSpaces: all of them at once.

Of the devices that every PC has a small guest touches two or three, and to make all of them takes as long as a third of
what KVM does for a machine. So a board says where a device is, and how it is made; whoever looks, at the bus, at the
board's parts, by a reset or a save, finds it made. Where making one may go wrong by what somebody has asked for, it is
made at once: nobody is told of such a thing when the guest runs.

It is made as it would have been at power-on: a device that takes the time then is told when that was.
"""

from __future__ import annotations

from pyvmm.device import DeviceLock
from pyvmm.errors import HOST_LIMITS, HostError, StateError, describe, remedy
from pyvmm.region import LateRegion, MemoryRegion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.address_space import AddressSpace
    from pyvmm.device import Device

    # Space, address, how many; the region's name, and which attribute of the device answers there, itself a device or a
    # region: "" is all of it.
    Place = tuple[AddressSpace, int, int, str, str]


class Late:
    """``make()`` makes the device, which is mapped at ``places`` from then on. Once, from any thread.

    ``differs``: at power-on, too, it has something that no other machine's has.
    """

    __slots__ = ("_device", "_lock", "_make", "_places", "_regions", "differs")

    def __init__(self, make: Callable[[], Device], *places: Place, differs: bool = False) -> None:
        self._make = make
        self.differs = differs
        self._places = places
        self._device: Device | None = None
        self._lock = DeviceLock()
        self._regions: list[LateRegion] = []

    @property
    def device(self) -> Device:
        """It, made by now."""
        return self._device or self._arrive()

    @property
    def made(self) -> bool:
        """Whether anybody has wanted it."""
        return self._device is not None

    # -- state (state.pyx has the contract): the device's

    @property
    def STATE_VERSION(self) -> int:
        return self.device.STATE_VERSION

    def save(self) -> dict[str, Any]:
        return self.device.save()

    def load(self, state: dict[str, Any]) -> None:
        self.device.load(state)

    def after_load(self) -> None:
        self.device.after_load()

    # -- its places

    def regions(self) -> list[tuple[AddressSpace, int, MemoryRegion]]:
        """What stands for it until then: (space, address, region), to be mapped before anybody asks for it."""
        found: list[tuple[AddressSpace, int, MemoryRegion]] = []
        for space, address, size, name, _part in self._places:
            region = LateRegion(size, name, self._lock, self._arrive)
            self._regions.append(region)
            found.append((space, address, region))
        return found

    def _arrive(self) -> Device:
        with self._lock:
            if self._device is None:
                self._device = self._make()
            # Also where it is made, and could not go there: a listener has wanted it in the middle of a change.
            if self._regions:
                self._take_places(self._device)
            return self._device

    def _take_places(self, made: Device) -> None:
        spaces: dict[str, tuple[AddressSpace, list[MemoryRegion], list[MemoryRegion]]] = {}
        for (space, _address, size, name, part), late in zip(self._places, self._regions, strict=True):
            if late.space is None:
                continue  # it is there
            answers = getattr(made, part) if part else made
            region = answers if isinstance(answers, MemoryRegion) else MemoryRegion(size, answers, name=name)
            _space, lates, regions = spaces.setdefault(space.name, (space, [], []))
            lates.append(late)
            regions.append(region)
        for space, lates, regions in spaces.values():
            space.replace(lates, regions)
        self._regions.clear()

    def forget(self) -> None:
        """At the end: nobody asks any more, and it holds on to nobody."""
        self._regions.clear()
        self._places = ()
        self._make = closed


def closed() -> Device:
    raise StateError("the machine is closed, and this device of it was never made")


class LateSpaces:
    """``make()`` maps all that is to be in ``spaces`` beside what is there already, when somebody first looks into one
    of them: a guest's access to anything else, or whoever asks what there is. Then comes what ``then`` lists. Once,
    from any thread.

    Where any of that raises, there is nothing in the spaces, and whoever looks is told of it: what is there would be
    taken for all that there is.
    """

    __slots__ = ("_lock", "_make", "_spaces", "_why_not", "then")

    def __init__(self, spaces: Sequence[AddressSpace], make: Callable[[], object]) -> None:
        self._lock = DeviceLock()
        self._make: Callable[[], object] | None = make
        self._spaces = spaces
        self._why_not = ""
        self.then: list[Callable[[], object]] = []
        for space in spaces:
            space.stand_in("a device", self._lock, self.arrive)

    def arrive(self) -> None:
        """Return when it is there; at once where that is asked by ``make`` itself. HostError where the host has no room
        for it, and for everyone after the first who finds that it is not there.
        """
        with self._lock:
            make, self._make = self._make, None
            if make is None:
                if self._why_not:
                    raise HostError(f"the machine's devices could not be made: {self._why_not}: make another machine")
                return
            for space in self._spaces:
                space.gather()
            try:
                make()
                for follows in self.then:
                    follows()
            except BaseException as error:
                for space in self._spaces:
                    space.scatter()
                self._why_not = describe(error)
                if isinstance(error, OSError) and error.errno in HOST_LIMITS:
                    raise HostError(f"the machine's devices could not be made: {remedy(error, '')}") from error
                if isinstance(error, MemoryError):
                    raise HostError("the machine's devices could not be made: there is no memory left") from error
                raise
            finally:
                self.then.clear()
            for space in self._spaces:
                space.settle()

    def forget(self) -> None:
        """At the end: nothing comes any more."""
        with self._lock:
            self._make = None
            self._why_not = ""
            self.then.clear()
