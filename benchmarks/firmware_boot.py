"""From the shell to a boot loader's prompt: SeaBIOS from the start of the process on, pyvmm beside QEMU.

The images are those of tests/disk_images.py (`ci/setup test` brings what they are made of). The firmware is one file
for both, and so are RAM (64 MiB), disk (IDE, cache=writeback) and the console (the first serial port, with the BIOS on
it by etc/sercon-port). The time ends when the text has come out of the process's standard output:

    handoff        the end of what syslinux's handoff.bin prints: a boot sector that only uses the BIOS
    GRUB legacy    the prompt of GRUB 0.97, stage2 loaded by int 13h, configuration read from FAT
    GRUB 2         the prompt of GRUB 2.06's small core
    CD             the same from a CD-ROM on the second channel

The contenders take turns, A B B A. A round's ratio is pyvmm's two times by QEMU's two; the last columns have the median
of all rounds with its bootstrap 95% interval, by the clock (the mark is at most 1.00) and by the processor time of the
whole process, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import measure
from measure import interval, median, quantile

sys.path.insert(0, str(measure.ROOT / "tests"))
import boot_assets
import disk_images
import qemu_pc

LIMIT_S = 180.0
S_PER_NS = 1e-9

# name: the image's maker, the text that ends it, how it is put in.
CASES = {
    "handoff": (disk_images.handoff, "Press any key", "disk"),
    "GRUB legacy": (disk_images.grub_legacy, disk_images.GRUB_LEGACY_PROMPT, "disk"),
    "GRUB 2": (disk_images.grub2, disk_images.GRUB2_PROMPT, "disk"),
    "CD": (disk_images.grub_cd, disk_images.GRUB2_PROMPT, "cdrom"),
}
CONTENDERS = ("qemu", "pyvmm")


def command(contender: str, image: Path, media: str, directory: Path) -> list[str]:
    firmware = boot_assets.firmware()
    if contender == "qemu":
        return qemu_pc.command(image, directory / "sercon-port", media=media, firmware=firmware)
    script = Path(sys.executable).with_name("pyvmm")
    start = [str(script)] if script.exists() else [sys.executable, "-m", "pyvmm"]
    put_in = [str(image)] if media == "disk" else ["--cdrom", str(image)]
    return [*start, "run", *put_in, "--firmware", str(firmware), "--memory", "64"]


def timed(text: str, command: list[str]) -> tuple[float, float]:
    """Until the process has printed ``text``: seconds from its start, and of processor time. It is killed then."""
    wanted, said = text.encode(), bytearray()
    start = time.perf_counter_ns()
    with subprocess.Popen(
        command, env=measure.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        timer = threading.Timer(LIMIT_S, process.kill)
        timer.start()
        try:
            while wanted not in said:
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    errors = process.stderr.read().decode()
                    raise SystemExit(f"{command[0]} did not print {text!r}: {said.decode(errors='replace')}\n{errors}")
                said += data
            end = time.perf_counter_ns()
        finally:
            timer.cancel()
            process.kill()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    return (end - start) * S_PER_NS, usage.ru_utime + usage.ru_stime


def benchmark(args: argparse.Namespace, directory: str) -> None:
    print(f"{args.rounds} rounds, two turns each; medians (10%-90%), s from the start of the process")
    print(f"  {'until':<14}{'QEMU':<22}{'pyvmm':<22}{'ratio (95%)':<20}ratio of processor time")
    for name in args.cases:
        make, text, media = CASES[name]
        images = {who: Path(directory, f"{who}.img") for who in CONTENDERS}
        make(images["qemu"])
        shutil.copyfile(images["qemu"], images["pyvmm"])
        commands = {who: command(who, images[who], media, Path(directory)) for who in CONTENDERS}
        turns: dict[str, list[tuple[float, float]]] = {who: [] for who in CONTENDERS}
        ratios = []
        for _ in range(args.rounds):
            for who in (*CONTENDERS, *reversed(CONTENDERS)):
                turns[who].append(timed(text, commands[who]))
            clock_ratio, cpu_ratio = (
                sum(turn[n] for turn in turns["pyvmm"][-2:]) / sum(turn[n] for turn in turns["qemu"][-2:])
                for n in range(2)
            )
            ratios.append((clock_ratio, cpu_ratio))
        figures = "".join(f"{spread([turn[0] for turn in turns[who]]):<22}" for who in CONTENDERS)
        clock, cpu = (with_interval([ratio[n] for ratio in ratios]) for n in range(2))
        print(f"  {name:<14}{figures}{clock:<20}{cpu}", flush=True)


def spread(times: list[float]) -> str:
    return f"{median(times):6.2f} ({quantile(times, 0.1):.2f}-{quantile(times, 0.9):.2f})"


def with_interval(ratios: list[float]) -> str:
    low, high = interval([[ratio] for ratio in ratios])
    return f"{median(ratios):.2f} ({low:.2f}-{high:.2f})"


def children(work: dict[str, Any]) -> None:
    """Nothing: the contenders are programs of their own."""


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    options.add_argument("--rounds", type=int, default=5, help="of four turns (default 5)")
    measure.main(children, benchmark, options)
