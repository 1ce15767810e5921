"""The tests as a background job of a shell, with SIGINT ignored: Ctrl-C is tested all the same, and ends pytest."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120.0
PYTEST = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def test_tests_of_ctrl_c() -> None:
    command = [*PYTEST, f"{ROOT / 'tests/unit/test_light.py'}", "-k", "ctrl_c"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ran.returncode == 0, ran.stdout
    assert " passed" in ran.stdout


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
