"""Start: what it takes to have a machine, in a process and from the shell, and what is left of it.

1. In one process, a machine from nothing to its first exit and closed again, against floor.c doing the
   same in C: with the interrupt controllers in KVM, and with none there.
2. Leaks: many machines one after the other, and many alive at once: descriptors, threads, resident
   memory.
3. Resident memory beyond guest RAM, of the first machine (interpreter and all) and of each further one.
4. From the shell: `pyvmm run --flat` to the first byte that its guest prints with its first instructions,
   and to its end, against a bare `python -c pass`.

1 and 4 are interleaved, A B B A; 1 runs pinned to one CPU, 4 as a user would, unpinned.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from typing import Any

import measure
from measure import interval, median, quantile

MEMORY_MIB = 256
WARM_UP = 3  # machines a process makes before it counts
MS_PER_NS = 1e-6
MIB_PER_KIB = 1 / 1024
IRQCHIPS = ("off", "kernel")
# mov dx, 0x3f8; mov al, '!'; out dx, al; then the end
PRINTS_A_BYTE = b"\xba\xf8\x03\xb0!\xee" + measure.FIRST_EXIT


# -- in the child --------------------------------------------------------------------------------------------


def children(work: dict[str, Any]) -> Any:
    return {"cycle": cycle, "serial": serial, "alive": alive, "memory": memory}[work["what"]](work)


def cycle(work: dict[str, Any]) -> None:
    """For every line it reads a machine; prints the ns to build it, to its first exit and stopped, to close it."""
    from pyvmm import Machine

    while sys.stdin.readline():
        t0 = time.perf_counter_ns()
        machine = Machine(memory_mib=MEMORY_MIB, flat=measure.FIRST_EXIT, irqchip=work["irqchip"])
        t1 = time.perf_counter_ns()
        machine.run()
        t2 = time.perf_counter_ns()
        machine.close()
        print(t1 - t0, t2 - t1, time.perf_counter_ns() - t2, flush=True)


def holdings() -> dict[str, float]:
    """What this process holds."""
    gc.collect()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,  # one is the listing's own
        "threads": len(os.listdir("/proc/self/task")),
        "rss_mib": rss_kib() * MIB_PER_KIB,
    }


def rss_kib(ram: list[tuple[int, int]] | None = None) -> int:
    """Resident KiB of this process, less those in the given (address, bytes) ranges."""
    total = 0
    counted = False
    with open("/proc/self/smaps") as file:
        for line in file:
            first, _, rest = line.partition(" ")
            if not first.endswith(":"):
                start, end = (int(each, 16) for each in first.split("-"))
                # Several machines' RAM may stand in one mapping, but never together with anything else.
                counted = not any(start < at + size and at < end for at, size in ram or ())
            elif first == "Rss:" and counted:
                total += int(rest.split()[0])
    return total


def serial(work: dict[str, Any]) -> dict[str, dict[str, float]]:
    from pyvmm import Machine

    def one(irqchip: str) -> None:
        with Machine(memory_mib=MEMORY_MIB, flat=measure.FIRST_EXIT, irqchip=irqchip) as machine:
            machine.run()

    for irqchip in IRQCHIPS * 10:
        one(irqchip)
    before = holdings()
    for n in range(work["count"]):
        one(IRQCHIPS[n % 2])
    return {"before": before, "after": holdings()}


def alive(work: dict[str, Any]) -> dict[str, dict[str, float]]:
    from pyvmm import Machine

    def some(count: int) -> list[Machine]:
        machines = [Machine(memory_mib=MEMORY_MIB, flat=measure.FIRST_EXIT) for _ in range(count)]
        for machine in machines:
            machine.run()
        return machines

    for machine in some(work["count"]):
        machine.close()
    del machine
    before = holdings()
    machines = some(work["count"])
    alive = holdings()
    while machines:
        machines.pop().close()
    return {"before": before, "alive": alive, "after": holdings()}


def memory(work: dict[str, Any]) -> dict[str, float]:
    """MiB beyond guest RAM."""
    from pyvmm import Machine

    machines: list[Machine] = []
    resident = []
    for _ in range(work["count"]):
        machines.append(Machine(memory_mib=MEMORY_MIB, flat=measure.FIRST_EXIT))
        machines[-1].run()
        ram = [(region.host_address, region.size_bytes) for each in machines for region in each.memory.ram]
        resident.append(rss_kib(ram) * MIB_PER_KIB)
    for machine in machines:
        machine.close()
    return {"first": resident[0], "further": (resident[-1] - resident[0]) / (len(resident) - 1)}


# -- 1: in one process ---------------------------------------------------------------------------------------


def in_process(args: argparse.Namespace, directory: str) -> None:
    binary = measure.build_floor(directory)
    image = os.path.join(directory, "first_exit.bin")
    with open(image, "wb") as file:
        file.write(measure.FIRST_EXIT)

    print(f"1. one process: {args.sets} sets of processes, {args.rounds} rounds each; medians, ms")
    columns = f"{'create':>8}{'1st exit':>9}{'close':>8}{'all':>8}{'p99':>8}{'x C':>7}  (95%)"
    print(f"  {'irqchip':<9}{'':7}{columns}")
    for irqchip in IRQCHIPS:
        command = [binary, "start", image, str(MEMORY_MIB), str(int(irqchip == "kernel"))]
        c: list[list[int]] = []
        pyvmm: list[list[int]] = []
        ratios: list[list[float]] = []
        for _ in range(args.sets):
            work = {"what": "cycle", "irqchip": irqchip}
            with (
                measure.Contender(command, args.pin) as floor,
                measure.Contender(measure.child_command(__file__, work), args.pin) as ours,
            ):
                for _ in range(WARM_UP):
                    turn(floor)
                    turn(ours)
                ratios.append([])
                for _ in range(args.rounds):
                    times = [turn(who) for who in (floor, ours, ours, floor)]
                    c += times[::3]
                    pyvmm += times[1:3]
                    ratios[-1].append(sum(map(sum, times[1:3])) / sum(map(sum, times[::3])))
        print(f"  {irqchip:<9}{'C':<7}{phases(c)}")
        low, high = interval(ratios)
        all_ratios = [ratio for each in ratios for ratio in each]
        print(f"  {irqchip:<9}{'pyvmm':<7}{phases(pyvmm)}{median(all_ratios):>7.2f}  ({low:.2f}-{high:.2f})")
    print()


def turn(who: measure.Contender) -> list[int]:
    who.go()
    return who.numbers()


def phases(times: list[list[int]]) -> str:
    wholes = [sum(each) * MS_PER_NS for each in times]
    create, first, close = (median([each[n] for each in times]) * MS_PER_NS for n in range(3))
    return f"{create:>8.2f}{first:>9.2f}{close:>8.2f}{median(wholes):>8.2f}{quantile(wholes, 0.99):>8.2f}"


# -- 2 and 3: what is left, what is held ---------------------------------------------------------------------


def leaks(args: argparse.Namespace) -> None:
    print("2. descriptors, threads, resident MiB")
    for what, count, title in (
        ("serial", args.machines, "one after the other"),
        ("alive", args.alive, "alive at once"),
    ):
        found = measure.child(__file__, {"what": what, "count": count}, None)
        print(f"  {count} machines {title}:")
        for when, held in found.items():
            print(f"    {when:<7}{held['descriptors']:>6.0f}{held['threads']:>6.0f}{held['rss_mib']:>8.1f}")
    print()


def resident(args: argparse.Namespace) -> None:
    found = measure.child(__file__, {"what": "memory", "count": 17}, None)
    print("3. resident memory beyond guest RAM, MiB")
    print(f"  first machine, the interpreter included: {found['first']:.1f}")
    print(f"  each further one: {found['further']:.2f}\n")


# -- 4: from the shell ---------------------------------------------------------------------------------------


def console_script(directory: str) -> tuple[str, str]:
    """The `pyvmm` that pip made beside this interpreter, or one like it where pyvmm is not installed."""
    installed = os.path.join(os.path.dirname(sys.executable), "pyvmm")
    if os.path.exists(installed):
        return installed, "installed"
    path = os.path.join(directory, "pyvmm")
    with open(path, "w") as file:
        file.write(
            f"#!{sys.executable}\nimport sys\nfrom pyvmm.cli import main\nif __name__ == '__main__':\n"
            "    sys.argv[0] = sys.argv[0].removesuffix('.exe')\n    sys.exit(main())\n"
        )
    os.chmod(path, 0o755)
    return path, "stand-in"


def timed(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """ns to the first byte on standard output (0 where there is none), and to the end."""
    t0 = time.perf_counter_ns()
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        byte = process.stdout.read(1)
        t1 = time.perf_counter_ns()
        process.wait()
        return (t1 - t0 if byte else 0, time.perf_counter_ns() - t0)


def from_shell(args: argparse.Namespace, directory: str) -> None:
    image = os.path.join(directory, "prints.bin")
    with open(image, "wb") as file:
        file.write(PRINTS_A_BYTE)
    script, kind = console_script(directory)
    guest = ["run", "--flat", image]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import pyvmm'": [sys.executable, "-c", "import pyvmm"],
        "python -m pyvmm run": [sys.executable, "-m", "pyvmm", *guest],
        f"pyvmm run ({kind})": [script, *guest],
        "pyvmm run --irqchip off": [script, *guest, "--irqchip", "off"],
    }
    env = measure.environment()
    # What pip does when it installs a package.
    compiled = [sys.executable, "-c", "import compileall, pyvmm; compileall.compile_dir(pyvmm.__path__[0], quiet=1)"]
    subprocess.run(compiled, env=env, check=True)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for command in commands.values():
        timed(command, env)
    for _ in range(args.shell_rounds):
        for name in (*commands, *reversed(commands)):
            found[name].append(timed(commands[name], env))
    bare = [end for _, end in found["python -c pass"]]
    limit = 1.5 * median(bare) * MS_PER_NS + 15
    print(f"4. from the shell, {args.shell_rounds} rounds, two turns each; medians (10%-90%), ms")
    for name, times in found.items():
        line = f"  {name:<26}"
        for at, label in ((0, "first byte"), (1, "end")):
            values = [t[at] * MS_PER_NS for t in times]
            if values[0]:
                spread = f"({quantile(values, 0.1):.1f}-{quantile(values, 0.9):.1f})"
                line += f"{label} {median(values):>6.1f} {spread:<15}"
            else:
                line += " " * 33
        print(line)
    print(f"  1.5 times a bare python plus 15 ms is {limit:.1f} ms")


def benchmark(args: argparse.Namespace, directory: str) -> None:
    if "process" in args.parts:
        in_process(args, directory)
    if "leaks" in args.parts:
        leaks(args)
    if "memory" in args.parts:
        resident(args)
    if "shell" in args.parts:
        from_shell(args, directory)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("parts", nargs="*", default=["process", "leaks", "memory", "shell"])
    options.add_argument("--sets", type=int, default=4, help="of fresh processes, of 1 (default 4)")
    options.add_argument("--rounds", type=int, default=25, help="a set, of 1 (default 25)")
    options.add_argument("--machines", type=int, default=1000, help="one after the other, of 2 (default 1000)")
    options.add_argument("--alive", type=int, default=64, help="at once, of 2 (default 64)")
    options.add_argument("--shell-rounds", type=int, default=10, help="of 4 (default 10)")
    measure.main(children, benchmark, options)
