"""The nested lab behind ci/lab: a machine with a complete KVM, on any x86-64 host.

Outside: QEMU's TCG emulates an AMD processor with SVM and nested paging, and Debian's generic kernel runs on it with
kvm-amd. Inside: the host's files, and root. The modules, each on those before it:

    wire        the frames that the agent and a client exchange
    agent       runs inside as process 1 and starts commands there; imports nothing but wire
    image       the kernel, the initial RAM disk, the saved state of a booted lab
    emulator    one QEMU: its command line, its monitor, what it looks like when it stands still
    supervisor  owns the emulator of one lab: boots it, watches its beat, boots it anew, keeps its clock
    client      asks a supervisor; runs a command in its lab
    command     the verbs of ci/lab

What the emulator is known to do wrong stands in docs/lab.md, with what is done about it.
"""
