"""From a name to a folder."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from loopscope.errors import CheckpointError

__all__ = ["demo_names", "find_checkpoint"]

_PREFIX = "demo:"


def demo_names() -> list[str]:
    """Names of the shipped models, `demo:injected` and so on."""
    models = _demo_folder()
    if not models.is_dir():
        return []
    return sorted(_PREFIX + path.name for path in models.iterdir() if (path / "config.json").is_file())


def find_checkpoint(name_or_path: str | Path) -> Path:
    """The folder of a shipped model or of a path.

    Raises `CheckpointError` with the names that exist.
    """
    name = str(name_or_path)
    if name.startswith(_PREFIX):
        if name in demo_names():
            return _demo_folder() / name.removeprefix(_PREFIX)
        raise CheckpointError(
            f"There is no shipped model {name!r}{_suggestion(name)}; the shipped ones are {', '.join(demo_names())}."
        )
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and model.safetensors.")
    raise CheckpointError(
        f"{name!r} is neither a folder nor a shipped model{_suggestion(_PREFIX + name)}; the shipped ones are "
        f"{', '.join(demo_names())}."
    )


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, demo_names(), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _demo_folder() -> Path:
    return Path(str(files("loopscope"))) / "demo" / "models"
