"""The plugin of pytest (entry point pytest11): machines for tests, a serial line to talk to, and reports that show the
guest.

    def test_boots(vm, console):
        m = vm(kernel="vmlinuz", initrd="initrd.gz", append="console=ttyS0")
        m.resume()
        console.expect(r"# $", timeout_s=60)
        assert console.run("dmesg | grep -c Oops") == (1, "0\\n")

docs/pytest.md has it all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.errors import VmmError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from pyvmm.dialog import Dialog
    from pyvmm.machine import Machine

MARKERS = (
    "kvm_any: needs /dev/kvm, of whatever kind",
    "kvm_full: needs a KVM that runs stock kernels: VMX or SVM, no software virtualization",
)
SHOWN_LINES = 60


class Machines:
    """The fixture ``vm``: ``vm(...)`` makes a Machine, of the same arguments, that is closed after the test.

    Where no ``serial`` is given the first one has the fixture ``console`` there, and each other a Dialog of its own:
    ``vm.console_of(m)``.
    """

    def __init__(self) -> None:
        from pyvmm.dialog import Dialog

        self.console = Dialog()
        self.made: list[tuple[Machine, Dialog | None]] = []

    def __call__(self, *args: Any, **options: Any) -> Machine:
        """A Machine; it has not begun to run."""
        import pyvmm
        from pyvmm.dialog import Dialog

        taken = any(line is self.console for _, line in self.made)
        line = Dialog() if taken else self.console
        if args or "serial" in options:
            return self.keep(pyvmm.Machine(*args, **options))
        return self.keep(pyvmm.Machine(serial=line.chardev, **options), line)

    def keep(self, machine: Machine, console: Dialog | None = None) -> Machine:
        """Close this machine too after the test: one that was restored, or is a fork. ``console`` is its serial line.
        """
        if console is not None:
            console.machine = machine
        self.made.append((machine, console))
        return machine

    def console_of(self, machine: Machine) -> Dialog:
        """Its serial line. KeyError where it has none of ours."""
        for made, console in self.made:
            if made is machine and console is not None:
                return console
        raise KeyError(f"{machine!r} has no console of the fixture's")

    def close(self) -> None:
        """All of them, the last one first, whatever one raises."""
        errors = []
        while self.made:
            machine, _ = self.made.pop()
            try:
                machine.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def sections(self) -> Iterator[tuple[str, str]]:
        """What a report of a failure has of each: (title, text)."""
        for number, (machine, console) in enumerate(self.made):
            which = f"pyvmm machine {number}" if len(self.made) > 1 else "pyvmm"
            if console is not None:
                end = console.output.replace("\r", "").splitlines()[-SHOWN_LINES:]
                yield f"{which}: console", "\n".join(end) or "nothing was printed"
            yield f"{which}: state", asked(lambda m=machine: state_of(m))  # type: ignore[misc]
            yield f"{which}: exits", asked(machine.exit_stats_table)
            yield f"{which}: dump", asked(lambda m=machine: dump_of(m))  # type: ignore[misc]


def asked(question: Callable[[], str]) -> str:
    """The answer; or why there is none: a report must come in any case."""
    try:
        return question()
    except (VmmError, OSError, RuntimeError) as error:
        return f"not to be had: {error}"


def state_of(machine: Machine) -> str:
    status = machine.status
    return machine.state.value + ("" if status is None else f", status {int(status)} ({status.reason})")


def dump_of(machine: Machine) -> str:
    """That of its error, where one has ended it; else of all vCPUs as they are."""
    return getattr(machine.error, "dump", "") or machine.dump()


MACHINES = pytest.StashKey[Machines]()


@pytest.fixture
def vm(request: pytest.FixtureRequest) -> Iterator[Machines]:
    """``vm(**options)`` makes a pyvmm.Machine, closed after the test; see pyvmm.pytest_plugin.Machines."""
    machines = request.node.stash[MACHINES] = Machines()
    try:
        yield machines
    finally:
        machines.close()


@pytest.fixture
def console(vm: Machines) -> Dialog:
    """The serial line of the first machine that ``vm`` makes: expect, send, run (pyvmm.dialog.Dialog)."""
    return vm.console


# ---- hooks -----------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyvmm", "virtual machines")
    group.addoption(
        "--pyvmm-kvm", choices=("skip", "fail"), default="skip",
        help="what becomes of a test marked kvm_any or kvm_full where this host has no such KVM (default: skip)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_runtest_setup(item: pytest.Item) -> None:
    full = item.get_closest_marker("kvm_full") is not None
    if not full and item.get_closest_marker("kvm_any") is None:
        return
    missing = what_is_missing(full)
    if missing:
        (pytest.skip if item.config.getoption("--pyvmm-kvm") == "skip" else pytest.fail)(missing)


def what_is_missing(full: bool) -> str:
    """Why this host has no KVM, or none that is ``full``, in one sentence; "" where it has."""
    from pyvmm.kvm.kind import kvm_kind
    from pyvmm.kvm.system import Kvm

    try:
        Kvm().close()
    except VmmError as error:
        return str(error)
    if full and "software" in kvm_kind():
        return f"kvm_full: stock kernels need VMX or SVM, and this host has {kvm_kind()}"
    return ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    machines = item.stash.get(MACHINES, None)
    if machines is not None and report.failed and report.when == "call":
        report.sections.extend(machines.sections())
    return report
