"""Two recipes: a machine leaves for another process, on this host or another one, and a machine arrives.

What they say to each other is in migration_stream.py. At any moment one of the two has the machine, and never both: the
source stands until the destination says that it goes on there, and the destination goes on only where it was told so.
"""

from __future__ import annotations

from posix import fspath
from time import monotonic, monotonic_ns

from pyvmm import migration_stream as ms
from pyvmm.errors import ConfigError, HostError, StateError, VmmError, remedy
from pyvmm.guest_memory import PAGE_BYTES
from pyvmm.machine_snapshot import STATES, absolute, image_paths, images_of, snapshot_of
from pyvmm.machine_state import FORMAT
from pyvmm.memory_pages import data_runs
from pyvmm.memory_rounds import MemoryWhileItRuns
from pyvmm.migration_stream import LOOK_S, MigrationStream
from pyvmm.snapshot import sync_image, text
from pyvmm.snapshot_piece import candidates
from pyvmm.state import check_names, save_all, shown, value_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Sequence
    from os import PathLike
    from typing import Any, Self

    from typing_extensions import Buffer

    from pyvmm.guest_memory import RamRegion
    from pyvmm.machine_state import MachineState
    from pyvmm.origin import Origin
    from pyvmm.snapshot import Snapshot
    from pyvmm.snapshot_piece import Run
    from pyvmm.spec import Spec

MOST_IMAGES = 1024
MOST_IMAGE_BYTES = 4 << 30  # all of them together
NOTHING = bytes(1 << 16)
HEAD_NAMES = ("spec", "machine", "images")


class Migrated:
    """What came of ``migrate_to``: ``sent_bytes`` went over, and the guest stood for ``stood_ns`` of ``took_ns``."""

    __slots__ = ("sent_bytes", "stood_ns", "took_ns")

    def __init__(self, sent_bytes: int, stood_ns: int, took_ns: int) -> None:
        self.sent_bytes = sent_bytes
        self.stood_ns = stood_ns
        self.took_ns = took_ns

    def __repr__(self) -> str:
        stood_ms, took_s = self.stood_ns / 1e6, self.took_ns / 1e9
        return f"<Migrated: {self.sent_bytes >> 10} KiB in {took_s:.2f} s, the guest stood {stood_ms:.1f} ms>"


# -- addresses ---------------------------------------------------------------------------------------------------------


def address_of(given: str | PathLike[str]) -> str:
    """As a str: a path object is that of a Unix socket, whatever its name."""
    return f"unix:{fspath(given)}" if hasattr(type(given), "__fspath__") else given  # type: ignore[return-value]


def parsed(address: str) -> tuple[str, int] | str:
    """tcp:HOST:PORT is the two, [HOST] for one with colons; else, with or without unix:, the path of a socket."""
    if not isinstance(address, str) or not address:
        raise ConfigError(f"address {address!r}: give the path of a Unix socket, or tcp:HOST:PORT")
    kind, _, rest = address.partition(":")
    if kind != "tcp":
        return rest if kind == "unix" else address
    host, _, port = rest.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not port.isascii() or not port.isdigit() or not 0 <= int(port) < 1 << 16:
        raise ConfigError(f"address {address!r}: give tcp:HOST:PORT, tcp:127.0.0.1:4444")
    return host, int(port)


def connected(address: str) -> socket.socket:
    """To whoever waits there. ConfigError in one sentence."""
    import socket

    place = parsed(address)
    try:
        if isinstance(place, tuple):
            return socket.create_connection(place, timeout=ms.SILENCE_S)
        there = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            there.connect(place)
        except BaseException:
            there.close()
            raise
        return there
    except OSError as error:
        why = remedy(error, "begin `pyvmm run --incoming` there first")
        raise ConfigError(f"nobody at {address}: {why}") from None


class Listener:
    """Waits at ``address`` for one machine. A Unix socket is for this user alone; at a TCP port it may be anybody who
    reaches it. ConfigError in one sentence.
    """

    def __init__(self, address: str) -> None:
        import socket

        place = parsed(address)
        self.address = address
        self._unix: Any = None
        if isinstance(place, tuple):
            try:
                self._socket = socket.create_server(place, backlog=1, family=family(place))
            except OSError as error:
                raise ConfigError(f"can't listen at {address}: {remedy(error, 'give another address')}") from None
            self.address = f"tcp:{place[0]}:{self._socket.getsockname()[1]}"
            self._socket.settimeout(LOOK_S)
        else:
            from pyvmm.unix_socket import UnixListener

            self._unix = UnixListener(place, 1, what="incoming", mode=0o600)

    def accept(self, timeout_s: float | None) -> socket.socket:
        """The first who comes. TimeoutError."""
        import select
        import socket

        end = None if timeout_s is None else monotonic() + timeout_s
        while end is None or monotonic() < end:
            if self._unix is None:
                try:
                    return self._socket.accept()[0]
                except TimeoutError:
                    continue
            poll = select.poll()
            poll.register(self._unix.fd, select.POLLIN)
            if poll.poll(LOOK_S * 1000):
                try:
                    return socket.socket(fileno=self._unix.accept())
                except OSError:
                    continue  # gone again
        raise TimeoutError(f"no machine came to {self.address} within {timeout_s} s")

    def close(self) -> None:
        (self._unix or self._socket).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def family(place: tuple[str, int]) -> Any:
    import socket

    return socket.AF_INET6 if ":" in place[0] else socket.AF_INET


# -- the source --------------------------------------------------------------------------------------------------------


class Departure:
    """A machine on its way. ``cancel`` from any thread: it stays here, unless it has gone by then."""

    def __init__(self, state: MachineState, config: Spec, origin: Origin | None) -> None:
        self._state = state
        self._config = config
        self._origin = snapshot_of(origin)
        self._cancelled = False
        self._said = False  # the destination was told to go on: nobody knows better, until it answers
        self._gone = False

    def cancel(self) -> None:
        self._cancelled = True

    def go(self, address: str) -> Migrated:
        """Return when it goes on there. Where anything is raised it goes on here as before; but where the answer to the
        very last word is missing it is paused, since it may be running there.
        """
        began_ns = monotonic_ns()
        state = self._state
        with MigrationStream(connected(address), self._called_off) as stream:
            stream.greet()
            images = images_of(self._config)
            stream.send_data(ms.HEAD, self._head(images))
            for image in images.values():
                for at in range(0, memoryview(image).nbytes, ms.PIECE_BYTES):
                    stream.send(ms.IMAGE, memoryview(image).cast("B")[at : at + ms.PIECE_BYTES])
            stream.answer(ms.READY)
            pages = Pages(stream, self._origin)
            with MemoryWhileItRuns(pages, state) as the_rest:
                state.while_it_stands("migrate_to", lambda: self._stand(stream, pages, the_rest), STATES, self._then)
            return Migrated(stream.sent_bytes, state.stood_ns, monotonic_ns() - began_ns)

    def _called_off(self) -> bool:
        return self._cancelled and not self._said

    def _head(self, images: dict[str, Buffer]) -> dict[str, Any]:
        return {
            "spec": absolute(self._config.plain()),
            "machine": self._state.description(),
            "images": {name: memoryview(image).nbytes for name, image in images.items()},
        }

    def _stand(self, stream: MigrationStream, pages: Pages, the_rest: MemoryWhileItRuns) -> None:
        the_rest()
        if not pages.began:
            pages.write_memory(self._state.memory())
        states = save_all(self._state.holders())
        for image in image_paths(self._config).values():
            sync_image(image)
        self._state.drives.give_up()
        stream.send_data(ms.STATE, states)
        stream.answer(ms.LOADED)
        stream.send(ms.GO)
        self._said = True
        try:
            stream.answer(ms.GOES)
        except StateError:
            self._said = False  # it has said that it does not
            raise
        except VmmError as error:
            raise HostError(
                f"it is not known whether the machine goes on at the other side, and it is paused here: look there"
                f" before you resume it ({error})"
            ) from None
        self._gone = True

    def _then(self) -> None:
        """What follows for the machine here."""
        state = self._state
        if self._gone:
            state.ends("migrated")
            return
        try:
            if not self._said:
                state.drives.claim()
                state.carries_on()
                return
        except ConfigError:
            pass  # somebody has taken an image meanwhile: resume() says who
        state.stays()


class Pages:
    """In the place of Saving (snapshot.py): memory that goes over, and not into a file."""

    def __init__(self, stream: MigrationStream, origin: Snapshot | None) -> None:
        self._stream = stream
        self._origin = origin
        self.began = False

    def write_memory(self, regions: Sequence[RamRegion]) -> None:
        """All that is not zero: the other side's memory is zeros."""
        self.began = True
        for region in regions:
            origin = None if self._origin is None else self._origin.pieces.get(region.gpa)
            for at, size in candidates(region, origin, None):
                self.rewrite(region, data_runs(region, None, at, size))

    def rewrite(self, region: RamRegion, runs: Iterable[Run]) -> int:
        """These pages once more: how many bytes they are."""
        sent_bytes = 0
        with memoryview(region) as memory:
            for start, size in runs:
                for at in range(start, start + size, ms.PIECE_BYTES):
                    with memory[at : min(at + ms.PIECE_BYTES, start + size)] as pages:
                        self._stream.send_pages(region.gpa + at, pages)
                sent_bytes += size
        return sent_bytes

    def clear(self, region: RamRegion, runs: Iterable[Run]) -> int:
        """These pages are zeros by now: no bytes to speak of."""
        for start, size in runs:
            self._stream.send_zeros(region.gpa + start, size)
        return 0


# -- the destination ---------------------------------------------------------------------------------------------------


class Arrival:
    """What has come of a machine: its Spec, what must be the same here, and images; as a Snapshot has them. Then
    ``receive`` its memory. StateError for whatever can't be.
    """

    def __init__(self, stream: MigrationStream, address: str) -> None:
        self.path = f"from {address}"
        self.as_it_was: Spec | None = None
        self.copies_images = False  # they are bytes already
        self._stream = stream
        stream.meet()
        _kind, length = stream.frame(ms.HEAD)
        head = stream.data(length)
        check_names(head, HEAD_NAMES)
        for name in HEAD_NAMES:
            if not isinstance(head[name], dict):
                raise StateError(f"{name} is {shown(head[name])}, no dict")
        self.spec: dict[str, Any] = head["spec"]
        self.machine: dict[str, Any] = head["machine"]
        self._images = self._received(head["images"])

    def _received(self, sizes: dict[str, Any]) -> dict[str, bytearray]:
        total = sum(value_of(range(1, MOST_IMAGE_BYTES), size, "an image's size") for size in sizes.values())
        if len(sizes) > MOST_IMAGES or total > MOST_IMAGE_BYTES:
            most = f"{MOST_IMAGES}, of {MOST_IMAGE_BYTES}"
            raise StateError(f"{len(sizes)} images of {total} bytes: {most}, are the most")
        images: dict[str, bytearray] = {}
        for name, size in sizes.items():
            image = images[text(name, "an image's name")] = bytearray()
            while len(image) < size:
                _kind, length = self._stream.frame(ms.IMAGE)
                if not 0 < length <= size - len(image):
                    raise StateError(f"a piece of {length} bytes of {name} is none of its {size}")
                image += self._stream.bytes(length)
        return images

    def image(self, name: str) -> bytearray | None:
        return self._images.get(name)

    def image_copy(self, name: str) -> bytes | None:
        found = self.image(name)
        return None if found is None else bytes(found)

    @property
    def memory_bytes(self) -> int:
        """The guest's RAM, as its Spec has it; ``machine`` is compared with what is made of that."""
        mib: int = value_of(range(1, 1 << 32), self.spec.get("memory_mib"), "memory_mib")
        return mib << 20

    def check_drives(self, names: Iterable[str]) -> None:
        """They are as the machine has left them: nobody else has had them meanwhile."""

    def receive(self, regions: Sequence[RamRegion]) -> dict[str, Any]:
        """Say that it can come; memory into these, which are zeros, until the guest stands there: the states of all its
        parts.
        """
        stream = self._stream
        stream.send(ms.READY)
        while True:
            kind, length = stream.frame(ms.PAGES, ms.ZEROS, ms.STATE)
            if kind == ms.STATE:
                return {"format": FORMAT, "machine": self.machine, "parts": stream.data(length), "memory": None}
            if kind == ms.PAGES:
                gpa, size = stream.place(), length - ms.PLACE.size
                with place_of(regions, gpa, size) as pages:
                    stream.receive_into(pages)
            else:
                with place_of(regions, *stream.range(length)) as pages:
                    zero(pages)


    def take_over(self, claim: Callable[[], None]) -> None:
        """All of it is there; ``claim`` the drives. When this returns the guest is ours, and whoever sent it has it no
        more.
        """
        self._stream.send(ms.LOADED)
        self._stream.frame(ms.GO)
        claim()
        try:
            self._stream.send(ms.GOES)
        except HostError:
            pass  # it was told to go on, and so it does


def place_of(regions: Sequence[RamRegion], gpa: int, size: int) -> memoryview:
    """Whole pages of a region. StateError where there are none."""
    if size > 0 and not gpa % PAGE_BYTES and not size % PAGE_BYTES:
        for region in regions:
            at = gpa - region.gpa
            if at >= 0 and at + size <= region.size_bytes:
                return memoryview(region)[at : at + size]
    raise StateError(f"the peer sends {shown(size)} bytes of memory at {gpa:#x}: the guest has no such pages")


def zero(pages: memoryview) -> None:
    """What nobody has touched stays so."""
    for at in range(0, pages.nbytes, len(NOTHING)):
        with pages[at : at + len(NOTHING)] as piece:
            zeros = NOTHING[: piece.nbytes]
            if piece.tobytes() != zeros:
                piece[:] = zeros
