"""The least there is: a device of two ports in Python, and a guest of 13 bytes that uses it."""

import pyvmm


class Counter(pyvmm.Device):
    """A write to port 0 adds to a sum, a read of port 1 gives it."""

    def __init__(self):
        self.sum = 0

    def write(self, offset, size, value):
        self.sum += value

    def read(self, offset, size):
        return self.sum


# mov dx, 0x7f0; mov al, 3; out dx, al; mov al, 4; out dx, al; mov dx, 0x7f1; in al, dx; out 0xf4, al; hlt
GUEST = bytes.fromhex("baf007 b003 ee b004 ee baf107 ec e6f4 f4")

if __name__ == "__main__":
    with pyvmm.Machine(memory_mib=16, flat=GUEST) as m:
        m.pio.map(0x7F0, 2, Counter(), name="counter")
        status = m.run(timeout_s=20)
        print(m.exit_stats_table())
    assert status == (7 << 1) | 1, status  # what isa-debug-exit at port 0xf4 makes of a 7
    print(f"3 + 4 = {status >> 1}")
