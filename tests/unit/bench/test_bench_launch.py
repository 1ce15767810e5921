"""pyvmm bench launch: launches of a VMM with known delays come out right; what fails says why; the report's parts."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from pyvmm.errors import ConfigError
from pyvmm.x86 import elf
from pyvmm_benchmarks import (
    cycles,
    footprint,
    instructions,
    launch,
    launch_bench,
    launch_guests,
    launch_plots,
    stopwatch,
)
from pyvmm_benchmarks.contenders import c_floor
from pyvmm_benchmarks.contenders.launch_contender import Launcher
from pyvmm_benchmarks.contenders.launch_others import CloudHypervisor, Firecracker, Kvmtool
from pyvmm_benchmarks.contenders.launch_pyvmm import Pyvmm
from pyvmm_benchmarks.contenders.launch_qemu import Qemu
from pyvmm_benchmarks.launch_guests import Guest, Linux
from pyvmm_benchmarks.report import Case, Report, Result, compare
from pyvmm_benchmarks.stopwatch import Failed, Launch

FAKE = Path(__file__).with_name("fake_vmm.py")
LIMIT_S = 60.0
MS = 1_000_000


def fake(*steps: Any) -> list[str]:
    return [sys.executable, "-S", "-E", str(FAKE), json.dumps(steps)]


class Fake(Launcher):
    """A contender whose launch takes these steps; ``fails`` from the n-th on."""

    def __init__(self, name: str, *steps: Any, ours: bool = False, fails_from: int | None = None) -> None:
        self.name = name
        self.ours = ours
        self.steps = steps
        self.fails_from = fails_from
        self.launched = 0

    def version(self) -> str | None:
        return "1.0"

    def why_not(self, guest: Guest) -> str:
        return "" if self.steps else "not installed"

    def command(self, guest: Guest) -> list[str]:
        self.launched += 1
        if self.fails_from is not None and self.launched >= self.fails_from:
            return fake(["complain", "no such luck\n"], ["end", 3])
        return fake(*self.steps)


def bench(directory: Path, *contenders: Launcher, **settings: Any) -> launch_bench.Bench:
    made = launch_bench.Settings(
        **{"quick": True, "rounds": 2, "linux_rounds": 1, "sets": 1, "many": (1, 3), **settings}
    )
    return launch_bench.Bench(directory, contenders, made, {})


def value(case: Case, name: str) -> float:
    result = case.find(name)
    assert result is not None and result.value is not None, result
    return result.value.value


# -- one launch ------------------------------------------------------------------------------------------------


def test_times_of_a_launch() -> None:
    command = fake(["sleep", 0.2], ["say", "boot\nLinux ver"], ["sleep", 0.2], ["say", "sion 6\n"], ["sleep", 0.2],
                   ["say", "init\n"], ["sleep", 0.2], ["end", 9])  # fmt: skip
    launched = stopwatch.launch(command, {"init": b"init", "console": b"Linux version"}, limit_s=LIMIT_S)
    assert launched.status == 9
    assert launched.said == b"boot\nLinux version 6\ninit\n"
    assert launched.first_ns is not None
    assert launched.first_ns > 200 * MS
    assert launched.marks["console"] - launched.first_ns > 195 * MS  # the text is whole only then
    assert launched.marks["init"] - launched.marks["console"] > 195 * MS
    assert launched.end_ns - launched.marks["init"] > 195 * MS
    assert 0 < launched.cpu_ns < launched.end_ns


def test_a_launch_may_be_cut_short_at_a_mark() -> None:
    launched = stopwatch.launch(fake(["say", "up"], ["hang"]), {"up": b"up"}, limit_s=LIMIT_S, until="up")
    assert launched.status == -9
    assert launched.end_ns >= launched.marks["up"]


def test_a_launch_that_says_nothing() -> None:
    launched = stopwatch.launch(fake(["end", 0]), limit_s=LIMIT_S)
    assert (launched.first_ns, launched.said) == (None, b"")
    with pytest.raises(Failed, match="said nothing"):
        launch_bench.spoken(launched)


def test_a_launch_that_hangs() -> None:
    with pytest.raises(Failed, match=r"not over after 0.5 s; it said: stuck"):
        stopwatch.launch(fake(["complain", "stuck"], ["hang"]), limit_s=0.5)


def test_a_launch_that_ends_too_early_says_its_last_words() -> None:
    command = fake(["say", "console\n"], ["complain", "one\ntwo\nthree\nno memory\n"], ["end", 1])
    with pytest.raises(Failed, match="status 1 before init: two / three / no memory"):
        stopwatch.launch(command, {"console": b"console", "init": b"init"}, limit_s=LIMIT_S)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        stopwatch.launch(["/no/such/program"], limit_s=LIMIT_S)


def test_many_at_once() -> None:
    slow = fake(["sleep", 0.6], ["say", "x"], ["sleep", 0.3])
    taken = stopwatch.at_once([fake(["say", "x"]), slow, fake(["say", "x"], ["say", "y"])], limit_s=LIMIT_S)
    assert taken.first_ns > 600 * MS
    assert taken.end_ns - taken.first_ns > 295 * MS


def test_many_at_once_of_whom_one_fails() -> None:
    with pytest.raises(Failed, match="one of 2 ended with status 4 and said nothing: oh"):
        stopwatch.at_once([fake(["say", "x"]), fake(["complain", "oh"], ["end", 4])], limit_s=LIMIT_S)
    with pytest.raises(Failed, match="1 of 2 not over"):
        stopwatch.at_once([fake(["say", "x"]), fake(["hang"])], limit_s=1.0)


# -- the parts -------------------------------------------------------------------------------------------------


def test_delays_come_out_as_they_are(tmp_path: Path) -> None:
    quick = Fake("qemu-pc", ["say", "!"], ["end", 0])
    slow = Fake("pyvmm", ["sleep", 0.3], ["say", "!"], ["sleep", 0.2], ["end", 0], ours=True)
    first, gone, processor = bench(tmp_path, quick, slow, Fake("kvmtool")).part("small")
    assert value(first, "pyvmm") > 300
    assert 0 < value(processor, "pyvmm") < value(gone, "pyvmm") - 400  # it slept
    assert value(gone, "pyvmm") - value(first, "pyvmm") > 195
    assert value(first, "pyvmm") - value(first, "qemu-pc") > 150  # the interpreter's start is both's
    ratio = first.results[1].ratio
    assert ratio is not None and ratio.value == pytest.approx(value(first, "pyvmm") / value(first, "qemu-pc"), rel=0.5)
    assert [result.reason for result in first.results] == ["", "", "not installed"]
    assert [[len(each) for each in result.sets] for result in first.results] == [[2], [2], []]
    assert (quick.launched, slow.launched) == (5, 5)  # two rounds of two, and a warm-up
    lines = launch.verdict([first])
    assert len(lines) == 1 and lines[0].startswith("first_instruction: pyvmm takes ") and "(qemu-pc)" in lines[0]


@pytest.mark.parametrize("fails_from", [1, 3])
def test_who_fails_takes_part_no_more(tmp_path: Path, fails_from: int) -> None:
    good = Fake("qemu-pc", ["say", "!"])
    bad = Fake("qemu-microvm", ["say", "!"], fails_from=fails_from)
    first, *_ = bench(tmp_path, good, bad).part("small")
    assert first.results[1].reason == "ended with status 3 and said nothing"
    assert not first.results[1].ran and first.results[0].ran
    assert bad.launched == fails_from
    assert launch.verdict([first]) == []


def linux_bench(tmp_path: Path, *contenders: Launcher, full: bool = True, **settings: Any) -> launch_bench.Bench:
    made = bench(tmp_path, *contenders, **settings)
    made._linux = Guest("linux", tmp_path, 512, Linux("bzImage", "initrd", "console=ttyS0", full, "vmlinux"))
    return made


BOOT = (["say", "Linux version 6"], ["sleep", 0.2], ["say", "pyvmm-bench: this is init\r\n"], ["sleep", 0.1])


def test_linux(tmp_path: Path) -> None:
    cases = linux_bench(tmp_path, Fake("qemu-pc", *BOOT), Fake("pyvmm", *BOOT, ours=True)).part("linux")
    assert [case.name for case in cases] == ["linux_console", "linux_init", "linux_gone", "linux_processor"]
    console, init, gone, processor = (value(case, "pyvmm") for case in cases)
    assert init - console > 195 and gone - init > 95
    assert 0 < processor < gone


def test_a_linux_that_hangs_is_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_bench, "LINUX_LIMIT_S", 2.0)
    hanging = Fake("qemu-pc", ["say", "Linux version"], ["hang"])
    cases = linux_bench(tmp_path, hanging).part("linux")
    assert cases[0].results[0].reason.startswith("not over after 2 s")
    assert hanging.launched == 1


def test_linux_on_software_kvm_goes_to_its_console_only(tmp_path: Path) -> None:
    forever = Fake("qemu-pc", ["say", "Linux version 6"], ["hang"])
    (case,) = linux_bench(tmp_path, forever, full=False, quick=False).part("linux")
    assert case.name == "linux_console" and case.results[0].ran
    (case,) = linux_bench(tmp_path, forever, full=False, quick=True).part("linux")
    assert "software KVM" in case.results[0].reason


def test_linux_without_a_kernel(tmp_path: Path) -> None:
    made = bench(tmp_path, Fake("qemu-pc", *BOOT))
    made.given = {"kernel": str(tmp_path / "none")}
    (case,) = made.part("linux")
    assert "--kernel" in case.results[0].reason


def test_many(tmp_path: Path) -> None:
    class Vmm(Fake):
        """Its guest waits where it is told to."""

        def command(self, guest: Guest) -> list[str]:
            command = super().command(guest)
            return fake(["hold", 256], ["say", "!"], ["hang"]) if guest.name == "waiting" else command

    cases = bench(tmp_path, Vmm("qemu-pc", ["sleep", 0.2], ["say", "!"], ["sleep", 0.2])).part("many")
    assert [case.name for case in cases] == [
        f"many_{count}{what}" for count in (1, 3) for what in ("", "_gone", "_pss")
    ]
    for first, gone, pss in (cases[:3], cases[3:]):
        assert value(first, "qemu-pc") > 200
        assert value(gone, "qemu-pc") - value(first, "qemu-pc") > 150
        assert value(pss, "qemu-pc") > 1
    # The interpreter's own code and data are shared by three.
    assert value(cases[5], "qemu-pc") < value(cases[2], "qemu-pc")


def test_many_need_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_bench, "available_mib", lambda: 250)
    cases = bench(tmp_path, Fake("qemu-pc", ["say", "!"])).part("many")
    assert cases[0].results[0].ran
    assert cases[3].results[0].reason == "3 at once want 300 MiB of free memory"


def test_memory_beyond_the_guest_s(tmp_path: Path) -> None:
    lean = Fake("qemu-pc", ["hold", 256], ["say", "!"], ["hang"])
    fat = Fake("pyvmm", ["hold", 256], ["hold", 24], ["say", "!"], ["hang"])
    none = Fake("qemu-microvm", ["say", "!"], ["hang"])
    rss, uss = bench(tmp_path, lean, fat, none).part("memory")
    assert 2 < value(rss, "qemu-pc") < 64
    assert value(rss, "pyvmm") - value(rss, "qemu-pc") == pytest.approx(24, abs=3)
    assert value(uss, "pyvmm") - value(uss, "qemu-pc") == pytest.approx(24, abs=3)
    assert value(uss, "qemu-pc") <= value(rss, "qemu-pc")
    assert rss.results[2].reason == "its memory can't be told apart: no mapping of 256 MiB"


def test_instructions_are_counted(tmp_path: Path) -> None:
    """An interpreter that starts and ends takes 20 to 40 million; a counter that lost a process would say none."""
    count = instructions.counter()
    assert count is not None
    short = count([sys.executable, "-ISsc", "pass"], None, LIMIT_S)
    assert 10 < short < 100
    through_a_shell = count(["sh", "-c", f"exec {sys.executable} -ISsc pass"], None, LIMIT_S)
    assert short * 0.99 < through_a_shell < short * 1.2
    (case,) = bench(tmp_path, Fake("qemu-pc", ["say", "!"])).part("instructions")
    assert value(case, "qemu-pc") > short


def test_instructions_where_nothing_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (case,) = bench(tmp_path, Fake("qemu-pc", ["say", "!"])).part("instructions")
    assert case.results[0].reason == "neither perf nor callgrind counts here (Debian: valgrind)"


def test_starts_that_waited() -> None:
    case = launch_bench.first_exits("first_exit_small", [0.3, 14.0, 0.4, 0.3])
    assert "1 of 4 starts waited more than 5 ms" in case.title
    assert value(case, "pyvmm") == pytest.approx(0.35)


SMAPS = """\
55a0000000-55a0100000 r-xp 00000000 fe:00 1 /usr/bin/vmm
Rss: 800 kB
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
Rss: 40 kB
Private_Dirty: 40 kB
VmFlags: rd wr mr mw me dd
7f0000200000-7f0010000000 rw-p 00000000 00:00 0
Rss: 1024 kB
THPeligible:    0
7f0020000000-7f0030400000 rw-s 00000000 00:00 0 /memfd:ram (deleted)
Rss: 4 kB
"""


def test_guest_ram_among_the_mappings() -> None:
    found = footprint.mappings(SMAPS)
    assert [each.size_kib for each in found] == [1024, 2048, 260096, 266240]
    assert footprint.guest_ram(found, 256) == found[1:3]  # two neighbours
    assert footprint.guest_ram(found, 260) == [found[3]]
    assert footprint.guest_ram(found, 258) == [found[3]]  # with something more in it
    assert footprint.mean([footprint.Footprint(4, 3, 2, 1), footprint.Footprint(8, 5, 4, 1)]) == (6, 4, 3, 1)
    with pytest.raises(footprint.NoGuestRam):
        footprint.guest_ram(found, 300)


# -- in one process ----------------------------------------------------------------------------------------------


def test_cycles_of_makers_with_known_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def maker(a: int, b: int, c: int) -> list[str]:
        return [sys.executable, "-S", "-c", f"import sys\nwhile sys.stdin.readline(): print({a}, {b}, {c}, flush=True)"]

    made = {"c": maker(MS, 0, MS), "pyvmm": maker(2 * MS, MS, 2 * MS)}
    monkeypatch.setattr(cycles, "commands", lambda directory, irqchip: made)
    sets = [cycles.measure(tmp_path, "off", 4) for _ in range(2)]
    case = Case("machine", "", "ms", cycles.results(sets), reference="c")
    assert (value(case, "c"), value(case, "pyvmm")) == (2, 5)
    pyvmm = case.find("pyvmm")
    assert pyvmm is not None and pyvmm.ratio is not None
    assert pyvmm.ratio.value == 2.5
    assert pyvmm.details == {"create": 2, "first exit": 1, "close": 2}
    assert [len(each) for each in pyvmm.sets] == [4, 4]


def test_no_compiler_no_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_floor, "compiler", lambda: None)
    assert list(cycles.commands(tmp_path, "off")) == ["pyvmm"]
    results = cycles.results([{"pyvmm": [[(1, 1, 1), (1, 1, 1)]]}])
    assert "no C compiler" in results[0].reason


def test_the_floor_compiles(tmp_path: Path) -> None:
    assert cycles.commands(tmp_path, "kernel")["c"][1:] == ["start", str(tmp_path / "first_exit.bin"), "256", "1"]


# -- the trace ---------------------------------------------------------------------------------------------------


def test_the_steps_of_a_trace_are_all_the_time_there_is() -> None:
    spent = {"imports": 20 * MS, "KVM": 10 * MS, "guest": 100 * MS, "closing": 5 * MS}
    told = {"born": 1010 * MS, "resumed": 1045 * MS, "stopped": 1145 * MS, "ended": 1150 * MS, "spent": spent}
    launched = Launch(60 * MS, {"console": 60 * MS, "init": 130 * MS}, 160 * MS, 0, 0, b"")
    steps = launch_bench.steps_of(1000 * MS, launched, told)
    assert steps == {
        "interpreter": 10, "imports": 20, "KVM": 10, "between": 5,
        "guest to console": 15, "guest to first byte": 0, "guest to init": 70, "guest to end": 15,
        "closing": 5, "process end": 10,
    }  # fmt: skip
    assert sum(steps.values()) == 160


def test_a_trace_of_a_tracer_with_known_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(self: Pyvmm, guest: Guest, fd: int) -> list[str]:
        told = {"born": 0, "resumed": 0, "stopped": 0, "ended": 0, "first_exit": 7 * MS, "spent": {"imports": 3 * MS}}
        return fake(["say", "!"], ["tell", fd, json.dumps(told) + "\n"])

    monkeypatch.setattr(Pyvmm, "traced", traced)
    made = bench(tmp_path)
    made.given = {"kernel": str(tmp_path / "none")}
    case, first_exit = made.part("trace")
    assert case.name == "trace_small"
    assert value(case, "imports") == 3
    assert first_exit.name == "first_exit_small"
    assert value(first_exit, "pyvmm") == 7
    assert all(result.ours for result in case.results)


def test_the_picture_of_a_trace(tmp_path: Path) -> None:
    steps = [Result("imports", [[20.0]], ours=True), Result("KVM", [[10.0]], ours=True)]
    host = {"kvm": "a KVM", "kernel": "6.18", "cpu": "a CPU"}
    report = Report("launch", host, {}, [Case("trace_small", "the small guest", "ms", steps, reference="")])
    paths = launch_plots.draw(report, str(tmp_path / "x"))
    assert paths == [str(tmp_path / "x-trace.png"), str(tmp_path / "x-trace.svg")]
    assert Path(paths[0]).read_bytes().startswith(b"\x89PNG")
    assert "imports" in Path(paths[1]).read_text() or Path(paths[1]).stat().st_size > 5000
    report.cases.clear()
    assert launch_plots.draw(report, str(tmp_path / "y")) == []
    with pytest.raises(ConfigError, match="can be written"):
        report.cases.append(Case("trace_small", "the small guest", "ms", steps, reference=""))
        launch_plots.draw(report, str(tmp_path / "no" / "x"))


# -- guests and command lines ------------------------------------------------------------------------------------


def test_the_small_guest_in_all_its_forms(tmp_path: Path) -> None:
    guest = launch_guests.write_flat("first", tmp_path, launch_guests.END)
    rom = Path(guest.file("rom")).read_bytes()
    assert len(rom) == 0x10000 and rom[-16:].startswith(bytes.fromhex("baf803b021ee"))
    assert Path(guest.file("bin")).read_bytes() == rom[-16:-1]
    for suffix, pvh in (("elf", None), ("pvh", 0x10_0000)):
        image = Path(guest.file(suffix)).read_bytes()
        parsed = elf.Elf(memoryview(image), suffix)
        assert parsed.entry == 0x10_0000 and parsed.pvh_entry() == pvh
        (segment,) = parsed.load_segments
        assert bytes(parsed.contents(segment)).startswith(bytes.fromhex("66baf803b021ee"))


def unpacked(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """A newc archive: {name: (mode, data)}."""
    found, at = {}, 0
    while True:
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        data_at = at + (110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (fields[1], archive[data_at : data_at + fields[6]])
        at = data_at + (fields[6] + 3) // 4 * 4


def test_the_initrd() -> None:
    found = unpacked(launch_guests.initrd(b"the busybox"))
    assert found["bin/busybox"] == (0o100755, b"the busybox")
    assert found["dev/console"][0] == 0o20600
    lines = found["init"][1].decode().splitlines()
    assert lines[0] == "#!/bin/busybox sh"
    assert launch_guests.INIT_TEXT.decode() in lines[1]  # first thing
    assert found["init"][0] == 0o100755


def test_what_is_no_static_busybox(tmp_path: Path) -> None:
    dynamic = Path(sys.executable).resolve()
    with pytest.raises(ConfigError, match="busybox-static"):
        launch_guests.static_program(str(dynamic))
    (tmp_path / "text").write_text("#!/bin/sh\n")
    with pytest.raises(ConfigError, match="busybox-static"):
        launch_guests.static_program(str(tmp_path / "text"))
    with pytest.raises(ConfigError, match="--busybox"):
        launch_guests.static_program(str(tmp_path / "none"))


def test_the_cache_s_kernel_and_busybox_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path))
    for name in ("linux-image-cloud-amd64/boot/vmlinuz-6.1", "busybox-static/usr/bin/busybox"):
        path = tmp_path / "debian" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    assert launch_guests.find_kernel().endswith("vmlinuz-6.1")
    assert launch_guests.find_busybox().endswith("bin/busybox")


@pytest.fixture
def guests(tmp_path: Path) -> tuple[Guest, Guest]:
    small = Guest("first", tmp_path, 256)
    return small, Guest("linux", tmp_path, 512, Linux("bzImage", "initrd", "console=ttyS0", True, "vmlinux"))


def installed(kind: type[Launcher], monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Launcher:
    monkeypatch.setenv(kind.variable, "/opt/vmm")
    return kind(*arguments)


def test_command_lines(guests: tuple[Guest, Guest], monkeypatch: pytest.MonkeyPatch) -> None:
    small, linux = guests
    pc = installed(Qemu, monkeypatch, "pc")
    assert pc.name == "qemu-pc" and pc.why_not(small) == ""
    words = pc.command(small)
    assert words[0] == "/opt/vmm" and words[words.index("-bios") + 1] == small.file("rom")
    words = pc.command(linux)
    assert words[words.index("-kernel") + 1] == "bzImage" and words[words.index("-cpu") + 1] == "host"
    words = Pyvmm("microvm").command(small)
    assert words[words.index("--flat") + 1] == small.file("bin")
    words = Pyvmm("pc").command(linux)
    assert words[words.index("--kernel") + 1] == "bzImage" and "--cpu" not in words
    assert "--firmware" in Pyvmm("pc").command(small)
    traced = Pyvmm("microvm").traced(small, 7)
    assert (traced[1:3], traced[4], traced[6]) == (["-I", "-S"], "7", "run")
    software = linux._replace(linux=linux.linux._replace(full=False) if linux.linux else None)
    assert "vmlinux" in Pyvmm("microvm").command(software)
    assert "host,-cx16,-xsave" in Pyvmm("microvm").command(software)
    assert "host,-arch-capabilities,-cx16,-xsave" in pc.command(software)


def test_command_lines_of_others(guests: tuple[Guest, Guest], monkeypatch: pytest.MonkeyPatch) -> None:
    small, linux = guests
    words = installed(Kvmtool, monkeypatch).command(linux)
    assert words[:2] == ["/opt/vmm", "run"] and "ending=reboot" in words[-1]
    assert small.file("rom") in installed(Kvmtool, monkeypatch).command(small)
    words = installed(Firecracker, monkeypatch).command(linux)
    config = json.loads(Path(words[-1]).read_text())
    assert config["boot-source"]["kernel_image_path"] == "vmlinux"
    assert config["machine-config"]["mem_size_mib"] == 512
    words = installed(CloudHypervisor, monkeypatch).command(linux)
    assert "vmlinux" in words and "console=ttyS0" in words
    assert small.file("pvh") in installed(CloudHypervisor, monkeypatch).command(small)


@pytest.mark.parametrize("kind", [Kvmtool, Firecracker, CloudHypervisor])
def test_what_is_not_installed_says_how_to_name_it(
    kind: type[Launcher], guests: tuple[Guest, Guest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(kind.variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    made = kind()
    assert made.version() == "not installed"
    assert made.why_not(guests[0]) == f"not installed (or name it in {kind.variable})"


# -- the command -------------------------------------------------------------------------------------------------


def test_wrong_use_says_what_to_do() -> None:
    for words, remedy in (
        (["--cases", "smoll"], "choose of small, linux"),
        (["--contenders", "bochs"], "choose of qemu-pc"),
        (["--rounds", "0"], "at least 1"),
        (["--from", "/no/such/file"], "--json has written"),
        (["--speed"], "did you mean|`pyvmm bench launch --help` lists"),
    ):
        with pytest.raises(ConfigError, match=remedy):
            launch.main(words)


def test_help_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--help"]) == 0
    assert launch.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert "usage: pyvmm bench launch" in said
    assert all(word in said for word in (*launch.PARTS, "qemu-microvm", "pyvmm-pc", "firecracker"))


def test_a_run_is_written_read_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    delays = {"pyvmm": 0.1}

    def launchers() -> list[Launcher]:
        return [Fake("qemu-pc", ["sleep", 0.1], ["say", "!"]),
                Fake("pyvmm", ["sleep", delays["pyvmm"]], ["say", "!"], ours=True)]  # fmt: skip

    monkeypatch.setattr(launch, "launchers", launchers)
    path = str(tmp_path / "old.json")
    words = ["--cases", "small", "--rounds", "3"]
    assert launch.main([*words, "--json", path]) == 0
    assert "pyvmm takes" in capsys.readouterr().out
    old = Report.read(path, "launch")
    assert [case.name for case in old.cases] == ["first_instruction", "small_gone", "small_processor"]
    assert old.settings["rounds"] == 3
    assert launch.main(["--from", path, "--compare", path]) == 0
    # A pyvmm that has become four times as slow is a regression, wherever the noise is.
    delays["pyvmm"] = 0.8
    assert launch.main([*words, "--compare", path]) == 1
    assert "REGRESSION  first_instruction, pyvmm" in capsys.readouterr().out
    assert compare(old, old) == []


def test_the_header_of_an_elf_guest_is_sound() -> None:
    image = launch_guests.elf_image(b"\xf4", pvh=True)
    assert struct.unpack_from("<H", image, 0x38)[0] == 2  # program headers
