"""Fuzzing a driver: a guest is booted once, and each input is tried on a fork of it, which takes some milliseconds.

The guest's driver reads a message from a device, its length first, into a buffer of 16 bytes, and forgets to look at
the length. Needs GNU binutils, for the guest.
"""

import random
import subprocess
import sys
import tempfile
import time

import pyvmm

GUEST = """
        mov     $0x701, %edx            # here a real guest would have booted for seconds
        outb    %al, %dx                # "ready"
        call    receive
        outb    %al, $0xf4              # the end, with its last byte
receive:
        sub     $16, %rsp
        mov     %rsp, %rdi
        mov     $0x700, %edx
        inb     %dx, %al
        movzbl  %al, %ecx
        jrcxz   2f
1:      inb     %dx, %al
        stosb                           # the mistake
        loop    1b
2:      add     $16, %rsp
        ret
"""


class Message(pyvmm.Device):
    """Port 0 gives the message, byte by byte; a write to port 1 says that the driver is ready for one."""

    def __init__(self, machine):
        self.machine, self.left = machine, []

    def read(self, offset, size):
        return self.left.pop(0) if self.left else 0

    def write(self, offset, size, value):
        self.machine.pause()  # when this access is over


def attach(machine):
    machine.pio.map(0x700, 2, Message(machine))


def booted(path):
    """A snapshot of the guest where it waits for its message."""
    with tempfile.NamedTemporaryFile() as obj, tempfile.NamedTemporaryFile() as flat:
        subprocess.run(["as", "--64", "-o", obj.name], input=GUEST, text=True, check=True)
        link = ["ld", "-N", "-e", "0", "-Ttext=0x100000", "--oformat", "binary", "-o", flat.name, obj.name]
        subprocess.run(link, check=True)
        with open(flat.name, "rb") as file:
            image = file.read()
    with pyvmm.Machine(flat=image, flat_mode="long64", memory_mib=4, no_reboot=True) as m:
        attach(m)
        m.resume()
        m.wait(timeout_s=20)
        m.save(path)


def attempt(template, message):
    """How the guest ends that gets this message: "fine", or what went wrong."""
    with template.start() as m:
        m.pio.find(0x700).device.left = list(message)
        try:
            status = m.run(timeout_s=0.5)
        except (pyvmm.GuestError, TimeoutError) as error:
            return type(error).__name__
        return "fine" if status & 1 else status.reason  # 6: it has reset itself


def mutated(rng, message):
    data = bytearray(message)
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] = rng.choice((0, 1, 15, 16, 17, 64, 255, rng.randrange(256)))
    return bytes(data)


if __name__ == "__main__":
    rng, found, tried = random.Random(1), {}, int((*sys.argv, 500)[1])
    with tempfile.TemporaryDirectory() as directory:
        booted(f"{directory}/ready.snap")
        begun = time.monotonic()
        with pyvmm.Template(f"{directory}/ready.snap", prepare=attach) as template:
            for _ in range(tried):
                message = mutated(rng, b"\x05hello" + bytes(24))
                found.setdefault(attempt(template, message), message)
    print(f"{tried * 60 / (time.monotonic() - begun):.0f} forks a minute")
    for how, message in found.items():
        print(f"{how}: {message.hex(' ')}")
    assert "fine" in found and len(found) > 1, found
