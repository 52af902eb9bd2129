"""What is measured in a process of its own: the numbers that it prints, and the memory that it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
"""For glibc: what is freed is at hand again, so that time is not spent on asking for it."""
GIVE_MEMORY_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""For glibc: what is freed is the system's again, so that a peak is what was in use."""


def in_a_process(script: str, *arguments: str, **environment: str) -> list[float]:
    """The numbers in the last line that a script prints in a process of its own."""
    command = [sys.executable, script, *arguments]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    return [float(number) for number in process.stdout.splitlines()[-1].split()]


def memory(which: str) -> float:
    """Of this process, in MiB: `VmRSS` now, `VmHWM` at the most."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(which))
