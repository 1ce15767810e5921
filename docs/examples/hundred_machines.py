"""A hundred machines in one process, all at once: each counts, says its number on its serial port, and powers off."""

import resource
import time

import pyvmm

COUNT = 100

# mov ecx, 1000; 1: dec ecx; jnz 1b (in real mode)
# mov dx, 0x3f8; mov al, [NUMBER]; out dx, al; mov dx, 0x604; mov ax, 0x2000; out dx, ax (ACPI: off); hlt
GUEST = bytes.fromhex("66b9e8030000 6649 75fc baf803 a0007e ee ba0406 b80020 ef f4")


def main():
    said = {}
    begun = time.monotonic()
    machines = []
    for number in range(COUNT):
        m = pyvmm.Machine(flat=GUEST, memory_mib=2, serial=lambda data, number=number: said.update({number: data}))
        m.memory.write(0x7E00, bytes([number]))
        machines.append(m)
    made = time.monotonic()
    for m in machines:
        m.resume()
    for m in machines:
        assert m.wait(timeout_s=60), m
        assert (m.status, m.status.reason) == (0, "shutdown"), m.status
    ended = time.monotonic()
    for m in machines:
        m.close()
    assert said == {number: bytes([number]) for number in range(COUNT)}, said
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{COUNT} machines made in {made - begun:.2f} s, run in {ended - made:.2f} s, closed in", end=" ")
    print(f"{time.monotonic() - ended:.2f} s; {mib:.0f} MiB at most, Python and all of their memory together")


if __name__ == "__main__":
    main()
