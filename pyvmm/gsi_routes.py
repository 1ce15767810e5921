"""GsiRoutes: where each global system interrupt (GSI) leads in KVM, and which numbers are free.

KVM_SET_GSI_ROUTING takes the whole table each time, so the table is kept here (Linux virt/kvm/api.rst, 4.52). The pins
of the interrupt controllers have the low numbers for good; an MSI that an eventfd is to send gets one above them for as
long as it needs it.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.light import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Route = tuple[int, str, int, int]  # as Vm.set_gsi_routing takes it
Message = tuple[int, int]  # address and data


class GsiRoutes:
    """``apply(routes)`` makes a whole table KVM's, of ``limit`` routes at most (KVM_CAP_IRQ_ROUTING). ``pins`` are in
    it already, and stay: ``owner``'s routes, whose GSIs lie below ``first_free``.

    The methods may be called from any thread. Where KVM refuses a table the one before is kept.
    """

    def __init__(
        self, apply: Callable[[list[Route]], None], limit: int, owner: str, pins: Iterable[Route], first_free: int
    ) -> None:
        self._apply = apply
        self._limit = limit
        self._lock = Lock()
        self._first_free = first_free
        self._table: dict[int, tuple[str, list[Route]]] = {}
        for route in pins:
            self._table.setdefault(route[0], (owner, []))[1].append(route)
        self._more_routes = len(self.table) - len(self._table)  # a pin of the IOAPIC may be one of the PIC's too

    @property
    def table(self) -> list[Route]:
        """Every route there is, by GSI."""
        return [route for gsi in sorted(self._table) for route in self._table[gsi][1]]

    def owner(self, gsi: int) -> str | None:
        """Who has the number; None: nobody."""
        return self._table[gsi][0] if gsi in self._table else None

    def add_msi(self, message: Message | None, owner: str, gsi: int | None = None) -> int:
        """A GSI for an MSI: the lowest that is free, or the one that is asked for. ``message`` is its address and data;
        None: it leads nowhere.

        ConfigError where that one is taken, or all are.
        """
        with self._lock:
            if gsi is None:
                gsi = self._first_free
                while gsi in self._table:
                    gsi += 1
            if gsi in self._table:
                raise ConfigError(f"GSI {gsi} is {self._table[gsi][0]}'s: {owner} needs another one")
            if len(self._table) + self._more_routes >= self._limit:
                most = f"KVM takes {self._limit} routes at most"
                raise ConfigError(f"{owner} wants a GSI, and {most}: ask for fewer MSIs")
            self._change({**self._table, gsi: (owner, msi_routes(gsi, message))})
            return gsi

    def change_msi(self, gsi: int, message: Message | None) -> None:
        """The MSI of ``gsi`` is another one from now on, or leads nowhere."""
        with self._lock:
            owner, _ = self._table[gsi]
            self._change({**self._table, gsi: (owner, msi_routes(gsi, message))})

    def remove(self, gsi: int) -> None:
        """Give the number of an MSI back."""
        with self._lock:
            self._change({n: entry for n, entry in self._table.items() if n != gsi})

    def _change(self, table: dict[int, tuple[str, list[Route]]]) -> None:
        before, self._table = self._table, table
        try:
            self._apply(self.table)
        except BaseException:
            self._table = before
            raise


def msi_routes(gsi: int, message: Message | None) -> list[Route]:
    return [] if message is None else [(gsi, "msi", *message)]
