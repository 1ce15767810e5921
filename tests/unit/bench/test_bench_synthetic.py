"""The harness against contenders whose costs are known: what it says of them, and what it does with those that fail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from synthetic import CASE, SETTINGS, TSC_KHZ, CantEver, Synthetic, measure, report

from pyvmm.errors import ConfigError
from pyvmm_benchmarks import exits
from pyvmm_benchmarks.contenders import exit_contender


@pytest.fixture(autouse=True)
def known_tsc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "_tsc_khz", [TSC_KHZ])


def test_costs_and_ratios_come_out_right(tmp_path: Path) -> None:
    case = measure(tmp_path, Synthetic("c", 8.0), Synthetic("pyvmm", 8.4, ours=True), Synthetic("slow", 20.0))
    costs = {result.name: result.value.value for result in case.results if result.value}
    assert costs == pytest.approx({"c": 8.0, "pyvmm": 8.4, "slow": 20.0}, rel=1e-3)
    ratios = {result.name: result.ratio.value for result in case.results if result.ratio}
    assert ratios == pytest.approx({"pyvmm": 1.05, "slow": 2.5}, rel=1e-3)
    assert [[len(values) for values in result.sets] for result in case.results] == [[6, 6]] * 3
    pyvmm = case.find("pyvmm")
    assert pyvmm is not None and pyvmm.p50 == pytest.approx(8.4, rel=1e-3)


@pytest.mark.parametrize("at", [3, 12, -4, -1])
def test_a_first_line_that_comes_in_pieces(tmp_path: Path, at: int) -> None:
    """As it does where PYTHONUNBUFFERED is set: its end by a write of its own."""
    kind = Synthetic("c", 8.0, pause_at=at)
    measure(tmp_path, kind)
    assert kind.started[0].tsc_khz == TSC_KHZ


def test_what_a_block_takes_beside_its_accesses_is_not_counted(tmp_path: Path) -> None:
    case = measure(tmp_path, Synthetic("c", 8.0, overhead_us=30.0), Synthetic("pyvmm", 8.4, overhead_us=3.0))
    costs = [result.value.value for result in case.results if result.value]
    assert costs == pytest.approx([8.0, 8.4], rel=1e-3)
    singles = [result.p50 for result in case.results]  # these can't be told apart from what is around them
    assert singles == pytest.approx([38.0, 11.4], rel=1e-3)


@pytest.mark.parametrize("disturbed", [3, 5])
def test_disturbed_blocks_and_noise_hardly_matter(tmp_path: Path, disturbed: int) -> None:
    options = {"noise": 0.03, "disturbed": disturbed, "overhead_us": 1.0}
    case = measure(tmp_path, Synthetic("c", 8.0, **options), Synthetic("pyvmm", 8.8, **options))
    floor, pyvmm = case.results
    assert floor.value and pyvmm.value and pyvmm.ratio
    assert pyvmm.ratio.value == pytest.approx(1.1, rel=0.03)
    assert pyvmm.ratio.low <= 1.11 and pyvmm.ratio.high >= 1.09
    assert pyvmm.p99 is not None and pyvmm.p99 > 80  # the distribution has them


@pytest.mark.parametrize("cost_us", [0.02, 0.3, 1.5, 60.0, 3000.0])
def test_cheap_and_dear_accesses(tmp_path: Path, cost_us: float) -> None:
    case = measure(tmp_path, Synthetic("c", cost_us), Synthetic("pyvmm", 1.5 * cost_us))
    floor, pyvmm = case.results
    assert floor.value and floor.value.value == pytest.approx(cost_us, rel=0.02)
    assert pyvmm.ratio and pyvmm.ratio.value == pytest.approx(1.5, rel=0.02)


def test_singles_alone_where_threads_meet(tmp_path: Path) -> None:
    case = measure(tmp_path, Synthetic("c", 8.0), Synthetic("pyvmm", 10.0), case=CASE._replace(cpus=2))
    assert case.details["pairs"] == 0
    assert [result.value.value for result in case.results if result.value] == pytest.approx([8.0, 10.0], rel=1e-3)


def test_a_vmm_that_does_not_say_where_its_memory_is(tmp_path: Path) -> None:
    case = measure(tmp_path, Synthetic("c", 8.0), Synthetic("other", 9.0, tells=False))
    other = case.find("other")
    assert other is not None and other.ratio is not None and other.ratio.value == pytest.approx(1.125, rel=1e-3)


def test_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "TURN_S", 0.3)
    kinds = [
        *(Synthetic("c", 8.0), CantEver("absent", 1.0), Synthetic("dies", 8.0, end=True)),
        Synthetic("fades", 8.0, fade=True),
        *(Synthetic("hangs", 8.0, hang=4), Synthetic("goes", 8.0, die=4)),
    ]
    case = measure(tmp_path, *kinds)
    reasons = {result.name: result.reason for result in case.results}
    assert reasons == {
        "c": "",
        "absent": "not installed",
        "dies": "ended at once: no such instruction",
        "fades": "ended at once: no such instruction",
        "hangs": "no end of a turn within 0.3 s",
        "goes": "its process has ended",
    }
    assert [result.ran for result in case.results] == [True, *5 * [False]]
    # In the second set of processes nobody tries again who has failed in the first.
    assert [len(kind.started) for kind in kinds] == [2, 0, *4 * [1]]
    text = report(case).table()
    assert "- not installed" in text and "- ended at once: no such instruction" in text


def test_where_the_first_hangs_nobody_else_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "FIRST_TURN_S", 0.3)
    case = measure(tmp_path, Synthetic("c", 8.0, hang=1), Synthetic("pyvmm", 8.0, ours=True))
    assert [result.reason for result in case.results] == [
        "hangs in this KVM: no end of a turn within 0.3 s",
        "not tried: the same guest hangs in c",
    ]


def test_a_contender_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_contender, "START_S", 0.3)

    class Silent(Synthetic):
        def command(self, case: object, directory: Path) -> list[str]:
            return ["sleep", "60"]

    case = measure(tmp_path, Synthetic("c", 8.0), Silent("silent", 1.0))
    assert case.results[1].reason == "was not ready after 0.3 s"


def test_no_process_is_left(tmp_path: Path) -> None:
    kinds = [Synthetic("c", 8.0), Synthetic("pyvmm", 8.0)]
    measure(tmp_path, *kinds)
    processes = [contender.process for kind in kinds for contender in kind.started]
    assert len(processes) == 4
    assert all(process.returncode is not None for process in processes)


def test_contenders_stand_still_between_their_turns(tmp_path: Path) -> None:
    kind = Synthetic("c", 8.0)
    contender = kind.start(CASE, tmp_path, None)
    try:
        contender.wait_until_ready()
        for _ in range(3):
            assert Path(f"/proc/{contender.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
            contender.turn(exits.CALIBRATION, 5.0)
    finally:
        contender.close()


def test_a_pinned_contender_runs_where_it_should(tmp_path: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    contender = Synthetic("c", 8.0).start(CASE, tmp_path, cpu)
    try:
        contender.wait_until_ready()
        assert os.sched_getaffinity(contender.process.pid) == {cpu}
    finally:
        contender.close()


def test_a_slowed_loop_is_caught_by_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = {"noise": 0.02, "overhead_us": 1.0}
    paths = {}
    for name, cost_us in {"old": 8.4, "same": 8.4, "slowed": 9.3, "mended": 7.0}.items():
        case = measure(tmp_path, Synthetic("c", 8.0, **noise), Synthetic("pyvmm", cost_us, ours=True, **noise))
        paths[name] = str(tmp_path / f"{name}.json")
        report(case).write(paths[name])
    found = {}
    for name in ("same", "slowed", "mended"):
        status = exits.main(["--from", paths[name], "--compare", paths["old"]])
        found[name] = (status, capsys.readouterr().out.splitlines()[-1])
    assert found["same"] == (0, "nothing changed beyond noise (intervals apart and more than 5%)")
    status, line = found["slowed"]
    assert status == 1 and line.startswith("REGRESSION  outl_to_qemu, pyvmm: 1") and "% slower" in line
    status, line = found["mended"]
    assert status == 0 and "% faster" in line


def test_quick_takes_as_many_rounds_as_there_is_time_for(tmp_path: Path) -> None:
    settings = SETTINGS._replace(quick=True, sets=1, rounds=exits.QUICK_ROUNDS[1])
    kinds = [Synthetic("c", 8.0), Synthetic("pyvmm", 8.0)]
    late = exits.measure(CASE, kinds, settings, tmp_path, limit_s=0.0)
    early = exits.measure(CASE, kinds, settings, tmp_path, limit_s=30.0)
    assert [len(each.results[0].sets[0]) for each in (late, early)] == list(exits.QUICK_ROUNDS)


def test_options() -> None:
    with pytest.raises(ConfigError, match="no case 'inl': choose of cpuid"):
        exits.main(["--cases", "inl"])
    with pytest.raises(ConfigError, match="no contender 'xen'"):
        exits.main(["--contenders", "xen"])
    with pytest.raises(ConfigError, match="--pin all: give the number of a CPU, or none"):
        exits.main(["--pin", "all"])
    with pytest.raises(ConfigError, match="at least 1"):
        exits.main(["--sets", "0"])
