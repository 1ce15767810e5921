"""The tests as a background job of a shell, with SIGINT and SIGQUIT ignored: they are tested all the same, and Ctrl-C
ends pytest.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120.0
IGNORING = ["sh", "-c", 'trap "" INT QUIT; exec "$@"', "sh"]
PYTEST = [*IGNORING, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def test_tests_of_ctrl_c() -> None:
    command = [*PYTEST, f"{ROOT / 'tests/unit/test_light.py'}", "-k", "ctrl_c"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ran.returncode == 0, ran.stdout
    assert " passed" in ran.stdout


def test_what_it_starts_takes_sigquit(tmp_path: Path) -> None:
    test = "import signal\ndef test_it():\n    assert signal.getsignal(signal.SIGQUIT) == signal.SIG_DFL\n"
    (tmp_path / "conftest.py").write_text(f"import runpy\nrunpy.run_path({str(ROOT / 'conftest.py')!r})\n")
    (tmp_path / "test_quit.py").write_text(test)
    subprocess.run([*PYTEST, str(tmp_path)], stdout=subprocess.DEVNULL, timeout=LIMIT_S, check=True)


def test_an_interrupt_ends_it(tmp_path: Path) -> None:
    """With pytest's own status for that, 2, and a report."""
    (tmp_path / "conftest.py").write_text(f"import runpy\nrunpy.run_path({str(ROOT / 'conftest.py')!r})\n")
    test = "import time\ndef test_long():\n    print('here', flush=True)\n    time.sleep(999)\n"
    (tmp_path / "test_long.py").write_text(test)
    with subprocess.Popen([*PYTEST, "-s", str(tmp_path)], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert any(line.endswith("here\n") for line in running.stdout)
        running.send_signal(signal.SIGINT)
        output = running.communicate(timeout=LIMIT_S)[0]
    assert running.returncode == 2
    assert "KeyboardInterrupt" in output
