"""Which tests run where, and how those that need a complete KVM get to the nested lab.

The marker `lab` says that a test needs a complete KVM. Where this machine has no KVM for us at all, ci/test sets
PYVMM_KVM_TESTS=lab, and every test of tests/kvm and tests/boot carries that marker; and one marked `userfaultfd` does
where this user may not have the kernel's faults served. There are two ways:

- a test with the fixture `guest_console` runs here, and what it starts on a console runs in the lab;
- any other runs there, in a process that serves the whole session (lab_worker.py), and its reports come here.

`-m lab_consoles` and `-m lab_inside` select the one and the other. The lab is started for the first test that needs
it. Where it breaks (it stands still, or QEMU ends), its supervisor boots it anew and the one test that this hit is
tried again, once; the summary says so. So is one whose guest's dump shows the emulator's own fault. In the lab itself
all this is out of the way.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from console import Console, pyvmm_run
from lab import Lab, NoLabError

TESTS = Path(__file__).resolve().parent
NEEDS_KVM = [TESTS / name for name in ("kvm", "boot")]
INSIDE = "PYVMM_LAB" in os.environ
# The directory of a lab that several pytests use; whose process it ends with is PYVMM_LAB_OWNER.
SHARED_LAB = os.environ.get("PYVMM_LAB_AT")
# On the lab's clock: the longest that a test there may say nothing.
REPORT_LIMIT_S = 600.0
LAST_WORDS_BYTES = 8000

SYS_USERFAULTFD = 323  # <asm/unistd_64.h>
LARGEST_GUEST = 1 << 30  # RAM of the guests that tests start in the lab

SESSION = pytest.StashKey["LabSession"]()


Reports = dict[str, list[pytest.TestReport]]  # by node id


class WorkerEndedError(Exception):
    """The process in the lab ended, or says nothing any more."""


def is_over(reports: Sequence[pytest.TestReport]) -> bool:
    return any(report.when == "teardown" for report in reports)


class Worker:
    """lab_worker.py in the lab."""

    def __init__(self, lab: Lab, boot: int) -> None:
        self._lab = lab
        self.boot = boot
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = lab.popen(
            sys.executable, str(TESTS / "lab_worker.py"),
            cwd=TESTS.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self._data = b""
        self._reports: Reports = {}
        self._collection = ""
        self._asked: set[str] = set()
        self._lists = 0  # that it was given and has not come to the end of

    def ask(self, ids: list[str]) -> None:
        assert self._process.stdin is not None
        self._asked.update(ids)
        self._lists += 1
        try:
            self._process.stdin.write(json.dumps(ids).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerEndedError(self._last_words()) from None

    def was_asked(self, nodeid: str) -> bool:
        return nodeid in self._asked

    def reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Those of a test that it was asked for. Raises WorkerEndedError."""
        while not is_over(self._reports.get(item.nodeid, ())):
            self._hear(item.config)
        return self._reports.pop(item.nodeid)

    def told(self) -> Reports:
        """Those of tests that are over and that nobody has asked for: it is ahead of the pytest outside."""
        return {nodeid: reports for nodeid, reports in self._reports.items() if is_over(reports)}

    def told_to_its_end(self, config: pytest.Config) -> Reports:
        """The same, of one whose lab broke: what it said before that may not have been heard yet."""
        try:
            while True:
                self._hear(config)
        except WorkerEndedError:
            return self.told()

    def _hear(self, config: pytest.Config) -> None:
        line = json.loads(self._line())
        if "report" in line:
            report = config.hook.pytest_report_from_serializable(config=config, data=line["report"])
            if report.failed:
                report.sections.append(("Standard error of the process in the lab", self._last_words()))
            self._reports.setdefault(report.nodeid, []).append(report)
        elif "collection" in line:
            self._collection += line["collection"]
        else:
            self._lists -= 1
            if not self._lists:
                raise WorkerEndedError(self._collection or f"its pytest ended with {line['over']} before it")

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        end = self._lab.clock() + REPORT_LIMIT_S
        while b"\n" not in self._data:
            if self._lab.clock() > end:
                raise WorkerEndedError(f"it said nothing for {REPORT_LIMIT_S:g} s\n{self._last_words()}")
            if select.select([self._process.stdout], [], [], 1.0)[0]:
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    raise WorkerEndedError(f"it ended with {self._process.wait()}\n{self._last_words()}")
                self._data += data
        line, _, self._data = self._data.partition(b"\n")
        return line

    def _last_words(self) -> str:
        file = self._errors.fileno()
        # Not by seek: the process writes where that goes to.
        size = os.fstat(file).st_size
        return os.pread(file, LAST_WORDS_BYTES, max(0, size - LAST_WORDS_BYTES)).decode("utf-8", "replace")

    def close(self) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()
        self._process.wait()


class LabSession:
    """The lab of this pytest session, made when it is first needed, and what was tried again in it."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._lab: Lab | None = None
        self._worker: Worker | None = None
        self._told: Reports = {}  # by workers that ended, of tests whose turn has not come
        self.tried_again: list[str] = []

    @property
    def lab(self) -> Lab:
        if self._lab is None:
            # What a test writes into its tmp_path the lab sees at the same place.
            if SHARED_LAB is not None:
                self._lab = Lab(Path(SHARED_LAB), Path(SHARED_LAB) / "scratch", int(os.environ["PYVMM_LAB_OWNER"]))
            else:
                shared = self._config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
                self._lab = Lab(Path(tempfile.mkdtemp(prefix="lab-", dir=shared)), shared)
        return self._lab

    def run(self, item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
        """One test, and once more where the lab broke under it."""
        here = runs_here(item)
        try:
            before = self.lab.status()["boot"]
            reports = self._here(item, nextitem) if here else self._there(item, before)
            failures = [report.longreprtext for report in reports if report.failed]
            if not failures:
                return reports
            if self.lab.status()["boot"] != before:
                why = self.lab.status()["breaks"][-1]
                self.tried_again.append(f"{item.nodeid}: {why['why']} ({why['log']})")
            elif any(has_outer_registers(text) for text in failures):
                self.tried_again.append(f"{item.nodeid}: a vCPU of the guest had registers of the lab's own kernel")
            else:
                return reports
            if here:
                item._initrequest()  # type: ignore[attr-defined]
                return self._here(item, nextitem)
            return self._there(item, self.lab.status()["boot"])
        except NoLabError as error:
            return [failure(item, str(error))]

    def _here(self, item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
        return runtestprotocol(item, log=False, nextitem=nextitem)

    def _there(self, item: pytest.Item, boot: int) -> list[pytest.TestReport]:
        if self._worker is not None and self._worker.boot != boot:
            # It went with the boot that broke. The tests that it had done by then are not hit by that.
            self._told |= self._worker.told_to_its_end(item.config)
            self._end_worker()
        if item.nodeid in self._told:
            return self._told.pop(item.nodeid)
        try:
            if self._worker is None:
                self._worker = Worker(self.lab, boot)
            if not self._worker.was_asked(item.nodeid):
                self._worker.ask([nodeid for nodeid in rest_of_session(item) if nodeid not in self._told])
            return self._worker.reports(item)
        except WorkerEndedError as error:
            if self._worker is not None:
                self._told |= self._worker.told()
            self._end_worker()
            return [failure(item, f"the process in the lab that ran this: {error}")]

    def summary(self) -> Iterator[str]:
        if self._lab is None:
            return
        status = self._lab.status()
        yield f"lab: {status['boot']} boots, {len(status['breaks'])} broke, {len(self.tried_again)} tests tried again"
        yield from (f"lab: tried again {line}" for line in self.tried_again)

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def close(self) -> None:
        self._end_worker()
        if self._lab is not None:
            self._lab.close()


def has_outer_registers(text: str) -> bool:
    """Whether a dump in it shows the emulator's fault (docs/lab.md): a guest whose page tables are where no test gives
    it memory, because the lab's own kernel has its there.
    """
    found = re.findall(r"\bcr0 [0-9a-f]+  cr2 [0-9a-f]+  cr3 ([0-9a-f]+)", text)
    return any(int(cr3, 16) >= LARGEST_GUEST for cr3 in found)


def runs_here(item: pytest.Item) -> bool:
    """Whether only what it starts is in the lab."""
    return "guest_console" in getattr(item, "fixturenames", ())


def may_serve_faults() -> bool:
    """Whether this user may have faults of the kernel's served by userfaultfd(2): as page_server.pyx asks for it."""
    fd = ctypes.CDLL(None).syscall(SYS_USERFAULTFD, os.O_CLOEXEC)
    if fd >= 0:
        os.close(fd)
    return fd >= 0 or os.access("/dev/userfaultfd", os.R_OK | os.W_OK)


def rest_of_session(item: pytest.Item) -> list[str]:
    """The tests from this one on that go to the lab's process: each list costs it ten seconds before its first test."""
    items = item.session.items
    rest = items[items.index(item) :]
    return [i.nodeid for i in rest if i.get_closest_marker("lab") and not runs_here(i)]


def failure(item: pytest.Item, text: str) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")


# ---- hooks -----------------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = LabSession(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[SESSION].close()


@pytest.hookimpl(tryfirst=True)  # before pytest itself selects by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    all_kvm_tests = os.environ.get("PYVMM_KVM_TESTS") == "lab"
    may = any(item.get_closest_marker("userfaultfd") for item in items) and may_serve_faults()
    for item in items:
        if item.get_closest_marker("userfaultfd") and not may:
            item.add_marker("lab")
        if all_kvm_tests and any(item.path.is_relative_to(directory) for directory in NEEDS_KVM):
            item.add_marker("lab")
        if item.get_closest_marker("lab"):
            item.add_marker("lab_consoles" if runs_here(item) else "lab_inside")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if INSIDE or not item.get_closest_marker("lab"):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in item.config.stash[SESSION].run(item, nextitem):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in config.stash[SESSION].summary():
        terminalreporter.write_line(line)


@pytest.fixture
def guest_console(request: pytest.FixtureRequest) -> Iterator[Callable[..., Console]]:
    """guest_console(*args): the console of a `pyvmm run`, in the lab for a test marked so; closed after the test."""
    made: list[Console] = []

    def start(*args: str) -> Console:
        if INSIDE or request.node.get_closest_marker("lab") is None:
            console = pyvmm_run(*args)
        else:
            console = request.config.stash[SESSION].lab.guest_console(*args)
        made.append(console)
        return console

    yield start
    for console in made:
        console.close()
