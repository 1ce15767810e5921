"""A vhost-user back end for tests, on a thread: it answers each request with what it read of it, backwards.

Written from QEMU's docs/interop/vhost-user.rst and OASIS virtio 1.2 (2.7, split rings), and knows nothing of pyvmm's.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
VRING_NUM, VRING_ADDR, VRING_BASE, GET_VRING_BASE, KICK, CALL = 8, 9, 10, 11, 12, 13
GET_PROTOCOL, SET_PROTOCOL, GET_QUEUE_NUM, ENABLE, GET_CONFIG = 15, 16, 17, 18, 24
MQ, REPLY_ACK = 1, 8
F_PROTOCOL, F_VERSION_1 = 1 << 30, 1 << 32
NEXT, WRITE = 1, 2
LIMIT_S = 20.0

# What a back end says in the place of its answer; None: nothing at all.
Fault = Callable[[bytes], bytes | None]


class Ring:
    def __init__(self) -> None:
        self.size = self.base = 0
        self.addresses = (0, 0, 0)  # descriptors, used, available
        self.kick = self.call = -1
        self.enabled = False


class BackEnd:
    """Listens at ``path``. ``requests`` are those of all connections, by number, in their order; ``faults`` has, by
    request, what it answers instead.
    """

    def __init__(
        self,
        path: Path,
        *,
        features: int = F_VERSION_1 | F_PROTOCOL,
        protocol: int = MQ | REPLY_ACK,
        queues: int = 2,
    ) -> None:
        self.features, self.protocol, self.queues = features, protocol, queues
        self.requests: list[int] = []
        self.negotiated = 0
        self.served = 0
        self.connections = 0
        self.faults: dict[int, Fault] = {}
        self._changed = threading.Condition()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(4)
        self._quit, self._quit_write = os.pipe()
        self._end: socket.socket | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.close(self._quit_write)
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        self._listening.close()
        os.close(self._quit)

    def hang_up(self) -> None:
        assert self._end is not None
        self._end.shutdown(socket.SHUT_RDWR)

    def say(self, data: bytes) -> None:
        """What nobody has asked for."""
        assert self._end is not None
        self._end.sendall(data)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, LIMIT_S), self.requests

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        while self._until_readable([self._listening.fileno()]):
            end, _ = self._listening.accept()
            self._end = end
            self.rings = [Ring() for _ in range(self.queues)]
            self._memory: list[tuple[int, int, int, int, mmap.mmap]] = []
            with self._changed:
                self.connections += 1
                self._changed.notify_all()
            try:
                self._serve(end)
            except (ConnectionError, EOFError):
                pass
            finally:
                end.close()
                for ring in self.rings:
                    self._drop(ring)

    def _until_readable(self, fds: list[int]) -> list[int]:
        """Which of them are; none where it is to end."""
        ready, _, _ = select.select([self._quit, *fds], [], [])
        return [] if self._quit in ready else ready

    def _serve(self, end: socket.socket) -> None:
        while ready := self._until_readable([end.fileno(), *(ring.kick for ring in self.rings if ring.kick >= 0)]):
            if end.fileno() in ready:
                self._take(end)
            for ring in self.rings:
                if ring.kick in ready and ring.kick >= 0:
                    try:
                        os.eventfd_read(ring.kick)
                    except BlockingIOError:
                        pass
                    self._run(ring)

    def _take(self, end: socket.socket) -> None:
        data, fds, _, _ = socket.recv_fds(end, 12, 8)
        while data and len(data) < 12:
            data += end.recv(12 - len(data))
        if not data:
            raise EOFError
        request, flags, size = struct.unpack("<III", data)
        payload = b""
        while len(payload) < size:
            payload += end.recv(size - len(payload))
        answer = self._answer(request, payload, fds)
        if answer is None and flags & 8:
            answer = bytes(8)
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
        if answer is not None:
            fault = self.faults.get(request)
            said = struct.pack("<III", request, 1 | 4, len(answer)) + answer
            told = said if fault is None else fault(said)
            if told is not None:
                end.sendall(told)

    def _answer(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        if request == GET_FEATURES:
            return struct.pack("<Q", self.features)
        if request == GET_PROTOCOL:
            return struct.pack("<Q", self.protocol)
        if request == GET_QUEUE_NUM:
            return struct.pack("<Q", self.queues)
        if request == GET_CONFIG:
            return payload[:12] + bytes(range(len(payload) - 12))
        if request == SET_FEATURES:
            (self.negotiated,) = struct.unpack("<Q", payload)
        elif request == SET_MEM_TABLE:
            self._map(payload, fds)
        elif request in (VRING_NUM, VRING_BASE, ENABLE, GET_VRING_BASE):
            index, value = struct.unpack("<II", payload)
            return self._set(self.rings[index], request, index, value)
        elif request == VRING_ADDR:
            index, _, desc, used, avail, _ = struct.unpack("<IIQQQQ", payload)
            self.rings[index].addresses = desc, used, avail
        elif request in (KICK, CALL):
            ring = self.rings[struct.unpack("<Q", payload)[0] & 0xFF]
            old = ring.kick if request == KICK else ring.call
            if old >= 0:
                os.close(old)
            if request == KICK:
                (ring.kick,) = fds
                ring.enabled = ring.enabled or not self.features & F_PROTOCOL  # "Ring states"
            else:
                (ring.call,) = fds
        return None

    def _set(self, ring: Ring, request: int, index: int, value: int) -> bytes | None:
        if request == VRING_NUM:
            ring.size = value
        elif request == VRING_BASE:
            ring.base = value
        elif request == ENABLE:
            ring.enabled = bool(value)
            if value:
                self._run(ring)
        else:
            self._drop(ring)
            return struct.pack("<II", index, ring.base)
        return None

    def _drop(self, ring: Ring) -> None:
        for fd in (ring.kick, ring.call):
            if fd >= 0:
                os.close(fd)
        ring.kick = ring.call = -1
        ring.enabled = False

    def _map(self, payload: bytes, fds: list[int]) -> None:
        count, _ = struct.unpack_from("<II", payload)
        assert count == len(fds)
        self._memory = []
        for n, fd in enumerate(fds):
            gpa, size, user, offset = struct.unpack_from("<QQQQ", payload, 8 + 32 * n)
            self._memory.append((gpa, size, user, offset, mmap.mmap(fd, offset + size)))
            os.close(fd)

    # -- rings ---------------------------------------------------------------------------------------------------------

    def _at(self, address: int, size: int, *, user: bool) -> tuple[mmap.mmap, int]:
        for gpa, length, user_address, offset, memory in self._memory:
            start = user_address if user else gpa
            if start <= address and address + size <= start + length:
                return memory, address - start + offset
        raise AssertionError(f"{address:#x} is not in its memory")

    def _get(self, address: int, form: str, *, user: bool = True) -> tuple[int, ...]:
        memory, at = self._at(address, struct.calcsize(form), user=user)
        return struct.unpack_from(form, memory, at)

    def _put(self, address: int, form: str, *values: int) -> None:
        memory, at = self._at(address, struct.calcsize(form), user=True)
        struct.pack_into(form, memory, at, *values)

    def _run(self, ring: Ring) -> None:
        """All that is available."""
        if not ring.enabled:
            return
        desc, used, avail = ring.addresses
        done = 0
        while ring.base != self._get(avail + 2, "<H")[0]:
            (head,) = self._get(avail + 4 + 2 * (ring.base % ring.size), "<H")
            written = self._one(desc, head)
            self._put(used + 4 + 8 * (ring.base % ring.size), "<II", head, written)
            ring.base = ring.base + 1 & 0xFFFF
            self._put(used + 2, "<H", ring.base)
            done += 1
        if done:
            with self._changed:
                self.served += done
                self._changed.notify_all()
            os.eventfd_write(ring.call, 1)

    def _one(self, desc: int, at: int) -> int:
        read, targets, flags = b"", [], NEXT
        while flags & NEXT:
            gpa, size, flags, following = self._get(desc + 16 * at, "<QIHH")
            memory, place = self._at(gpa, size, user=False)
            if flags & WRITE:
                targets.append((memory, place, size))
            else:
                read += memory[place : place + size]
            at = following
        answer = read[::-1]
        written = 0
        for memory, place, size in targets:
            piece = answer[written : written + size]
            memory[place : place + len(piece)] = piece
            written += len(piece)
        return written
