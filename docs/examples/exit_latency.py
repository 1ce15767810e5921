"""What an exit to user space costs on this host, as the guest feels it, in all its spread.

A guest in long mode times 20,000 reads of a port, each on its own, and leaves the times in its memory. Three ports: one
that nobody has, one in compiled code, one in Python. docs/exits.md says how to read it. Needs GNU binutils.
"""

import struct
import subprocess
import tempfile

import pyvmm

COUNT, TIMES = 20_000, 0x20_0000
GUEST = f"""
        mov     $PORT, %r9d
        mov     ${TIMES}, %edi
        mov     ${COUNT}, %ebx
1:      lfence
        rdtsc
        mov     %eax, %esi
        mov     %r9d, %edx
        inl     %dx, %eax               # the exit
        lfence
        rdtsc
        sub     %esi, %eax
        stosl
        dec     %ebx
        jnz     1b
        outb    %al, $0xf4
"""


class Answer(pyvmm.Device):
    def read(self, offset, size):
        return 42


def assembled(port):
    with tempfile.NamedTemporaryFile() as obj, tempfile.NamedTemporaryFile() as flat:
        source = GUEST.replace("PORT", hex(port))
        subprocess.run(["as", "--64", "-o", obj.name], input=source, text=True, check=True)
        link = ["ld", "-N", "-e", "0", "-Ttext=0x100000", "--oformat", "binary", "-o", flat.name, obj.name]
        subprocess.run(link, check=True)
        with open(flat.name, "rb") as file:
            return file.read()


def times_ns(port):
    """Of each exit, sorted."""
    with pyvmm.Machine(flat=assembled(port), flat_mode="long64", memory_mib=8) as m:
        m.pio.add(0x700, pyvmm.LatchRegion(4))
        m.pio.map(0x704, 4, Answer())
        m.run(timeout_s=60)
        tsc_khz = m.cpus[0].vcpu.tsc_khz
        return sorted(t * 1_000_000 // tsc_khz for t in struct.unpack(f"<{COUNT}I", m.memory.read(TIMES, 4 * COUNT)))


def bars(times):
    """How many exits took how long, in steps of a quarter of an octave."""
    edges = [500 * 2 ** (n / 4) for n in range(48)]
    counts = [sum(low <= t < 2**0.25 * low for t in times) for low in edges]
    most = max(counts)
    for low, count in zip(edges, counts, strict=True):
        if count * 200 > most:
            yield f"  {low / 1000:8.1f} us  {'#' * (count * 50 // most)} {count}"


if __name__ == "__main__":
    for name, port in (("nobody's port", 0x7F0), ("compiled", 0x700), ("Python", 0x704)):
        times = times_ns(port)
        p1, p50, p99 = (times[COUNT * p // 100] for p in (1, 50, 99))
        print(f"{name}: p1 {p1} ns, median {p50} ns, p99 {p99} ns")
        print("\n".join(bars(times)))
