"""What the workers of `test_engine` do, in a module of its own: they import it, and need not wait for torch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from loopscope._util.files import held_folder
from loopscope.errors import ConfigError

__all__ = ["Hold", "Square"]


class Square:
    """Kills the process that it is in where a file says so, once."""

    def __init__(self, folder: Path, *, always: bool = False) -> None:
        self.folder, self.always = folder, always

    def __call__(self, item: int) -> tuple[int, int]:
        marker = self.folder / f"kill-{item}"
        if marker.exists():
            if not self.always:
                marker.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.folder / f"fail-{item}").exists():
            raise ConfigError(f"item {item} is wrong")
        if (self.folder / f"break-{item}").exists():
            raise ZeroDivisionError(f"item {item}")
        if (self.folder / f"talk-{item}").exists():
            print("a model that prints")
        return item * item, os.getpid()


class Hold:
    """Holds a folder until the process ends; a file beside it says from when on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, item: int) -> None:
        with held_folder(self.folder):
            self.folder.with_suffix(".held").touch()
            time.sleep(60)
