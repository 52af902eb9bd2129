"""A few of the campaigns of `make crash`, in forks of one process."""

import subprocess
import sys
from pathlib import Path

CRASH = Path(__file__).resolve().parent.parent / "tools" / "crash.py"


def test_an_analysis_survives_full_disks_and_signals() -> None:
    asked = ["analyze:disk full", "analyze:read-only", "analyze:two signals"]
    done = subprocess.run([sys.executable, CRASH, "--quick", *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()[1:]] == ["0"] * 4
